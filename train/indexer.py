"""V3.2's lightning indexer, which chooses the keys that sparse attention reads."""

from torch import nn

from train.dims import Dims

__all__ = ["Indexer"]


class Indexer(nn.Module):
    """The tensors of V3.2's lightning indexer (`self_attn.indexer.*`), carried along (deviation 1)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        heads, width = dims.index_n_heads, dims.index_head_dim
        self.wq_b = nn.Linear(dims.q_lora_rank, heads * width, bias=False)
        self.wk = nn.Linear(dims.hidden_size, width, bias=False)
        self.k_norm = nn.LayerNorm(width, eps=1e-6)
        self.weights_proj = nn.Linear(dims.hidden_size, heads, bias=False)
