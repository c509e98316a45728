"""Layer 61 of DeepSeek-V3.2: the multi-token-prediction layer, with the checkpoint's own module names.

Faithful to vLLM 0.32.0 `model_executor/models/deepseek_mtp.py` and `deepseek_v2.py`, and to sglang 0.5.23
`srt/models/deepseek_nextn.py`, which compute the same function. Deviations:

1. The indexer scores in float32, the engines with queries and keys rounded to fp8; of equal scores the later
   place counts as better, where the engines leave it to chance. sglang's draft steps do not see the own
   entries of earlier ones.
2. The router multiplies in float32; the engines may route in the model's dtype and differ on near ties.
3. Nothing is quantised: served fp8 weights and activations round what is computed here.
4. Attention is computed in its expanded form (keys and values per head), the engines' decode in the
   absorbed one.

Draft step s at place i of a document with tokens t; h is the target's state at step 0, later the carried one:

    e = embed_tokens[t[i+s+1]]                       zero at position 0 in vLLM, not in sglang
    x = eh_proj(concat(enorm(e), hnorm(h)))          embedding first
    x = x + self_attn(input_layernorm(x))            position i + s
    x = x + mlp(post_attention_layernorm(x))
    h = shared_head.norm(x)                          carried to step s+1; lm_head(h) predicts t[i+s+2]

    place i          0        1        2
    state            h(t0)    h(t1)    h(t2)
    token joined     t1       t2       t3
    step 0 predicts  t2       t3       t4
    step 1 predicts  t3       t4       t5

Legend: T tokens, D hidden_size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.blocks import DecoderLayer
from train.dims import Dims
from train.kernels.norm import RMSNorm

__all__ = ["MTPLayer"]


class SharedHead(nn.Module):
    """`shared_head.norm`; the head itself is the target's and lives in `MTPLayer.lm_head`."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """The multi-token-prediction layer with everything the checkpoint keeps under `model.layers.61.`.

    Its parameters and persistent buffers have the names of the checkpoint after that prefix, experts stacked.
    The target's embedding, head and final norm are frozen tables: buffers outside the state dict.

    Attributes:
        embed_tokens, lm_head: [V, D]; norm_weight: [D], the target's `model.norm.weight`.
    """

    masks_position_0 = True  # where the server does
    aux_layers = ()

    embed_tokens: Tensor
    lm_head: Tensor
    norm_weight: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims, dims.num_hidden_layers)
        self.enorm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.hnorm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * dims.hidden_size, dims.hidden_size, bias=False)
        self.shared_head = SharedHead(dims)
        self.register_buffer("embed_tokens", torch.empty(0), persistent=False)
        self.register_buffer("lm_head", torch.empty(0), persistent=False)
        self.register_buffer("norm_weight", torch.empty(0), persistent=False)

    def combine(self, e_TD: Tensor, hidden_TD: Tensor) -> Tensor:
        """Join the embedding of the next token with the carried state; both and the result [T, D]."""
        return self.eh_proj(torch.cat((self.enorm(e_TD), self.hnorm(hidden_TD)), -1))

    def start(self, states_TD: Tensor) -> Tensor:
        """What step 0 is carried from: the target's post-norm states as they are."""
        return states_TD

    def enter(
        self, input_ids_T: Tensor, hidden_TD: Tensor, masked_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Begin a draft step.

        Args:
            input_ids_T: the tokens to join, int64 [T]: token i+s+1 for place i at step s.
            hidden_TD: what is carried: from `start` at step 0, from `leave` after that.
            masked_T: bool [T], True where the embedding is replaced by zero (absolute position 0 in vLLM).

        Returns:
            The residual stream and the input of the attention, [T, D] each.
        """
        e_TD = F.embedding(input_ids_T, self.embed_tokens).to(self.enorm.weight.dtype)
        if masked_T is not None:
            e_TD = e_TD.masked_fill(masked_T[:, None], 0)
        x_TD = self.combine(e_TD, hidden_TD.to(e_TD.dtype))
        return x_TD, self.input_layernorm(x_TD)

    def leave(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """End a draft step: the state for the head, and what the next step is carried from; here the same."""
        state_TD = self.shared_head.norm(x_TD)
        return state_TD, state_TD

    def forward(  # type: ignore[override]
        self, e_TD: Tensor, hidden_TD: Tensor, positions_T: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """The state [T, D] of draft step 0 over packed documents, from embeddings, as a target trains it."""
        x_TD = super().forward(self.combine(e_TD, hidden_TD), positions_T, cu_seqlens)
        return self.leave(x_TD)[0]
