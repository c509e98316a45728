"""The whole tiny target as one module, made of the layer's own blocks, for training and as a reference.

Legend: T tokens of all packed documents, D hidden_size, V vocab_size, B documents.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from configs.files import read_json
from train.blocks import DecoderLayer, Gate
from train.dims import Dims
from train.kernels.norm import RMSNorm
from train.mtp import MTPLayer

__all__ = ["Backbone", "load_backbone"]

IGNORED = -100
# a stacked parameter -> the checkpoint's word for one expert's matrix
EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Bfloat16Linear(nn.Linear):
    """A linear map whose product runs in bfloat16 between float32 inputs, weights and results."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16()).float()


class Backbone(nn.Module):
    """Embedding, layers, norm and head of the target, and its MTP layer, which shares embedding and head."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.embed_tokens = nn.Embedding(dims.vocab_size, dims.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(dims, i) for i in range(dims.num_hidden_layers))
        self.norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.lm_head = nn.Linear(dims.hidden_size, dims.vocab_size, bias=False)
        self.mtp = MTPLayer(dims)

    def states(self, input_ids_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """States after the final norm, [T, D], of packed documents; `lm_head` of row i predicts token i+1."""
        x_TD = self.embed_tokens(input_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, positions_T, cu_seqlens)
        return self.norm(x_TD)

    def draft(
        self, input_ids_T: Tensor, hidden_TD: Tensor, positions_T: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """First draft step, [T, D]: `lm_head` of row i predicts token i+2.

        Unlike in `MTPLayer.enter`, whose tables are frozen, gradients reach the shared embedding. The last
        row of a document joins the first token of the next one and means nothing.

        Source: arXiv 2412.19437, section 2.2, with the embedding zeroed at position 0 as vLLM serves it.
        """
        e_TD = self.embed_tokens(input_ids_T.roll(-1)).masked_fill((positions_T == 0)[:, None], 0)
        return self.mtp(e_TD, hidden_TD, positions_T, cu_seqlens)

    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy of the next token and of the one after it (by the MTP layer), in nats.

        Returns:
            both losses, scalars, and the share of the MTP layer's predictions whose arg-max is right.
        """
        wanted_T, after_T = input_ids_T.roll(-1), input_ids_T.roll(-2)
        ends = cu_seqlens[1:].long()
        wanted_T[ends - 1] = after_T[ends - 1] = IGNORED
        # of a document of one token this is the document before it, whose last place is ignored already
        after_T[ends - 2] = IGNORED
        hidden_TD = self.states(input_ids_T, positions_T, cu_seqlens)
        loss = F.cross_entropy(self.lm_head(hidden_TD).float(), wanted_T, ignore_index=IGNORED)
        logits_TV = self.lm_head(self.draft(input_ids_T, hidden_TD, positions_T, cu_seqlens)).float()
        right_T = (logits_TV.detach().argmax(-1) == after_T)[after_T != IGNORED]
        return loss, F.cross_entropy(logits_TV, after_T, ignore_index=IGNORED), right_T.float().mean()

    def use_bfloat16(self) -> None:
        """Run the linear maps in bfloat16, which CPUs with such instructions do two to three times faster.

        Attention and experts stay in float32: their shapes change from batch to batch, and oneDNN compiles
        its bfloat16 kernels anew for each shape.
        """
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = Bfloat16Linear

    def gates(self) -> list[Gate]:
        """The routers of all mixture layers, the MTP layer's last."""
        return [m for m in self.modules() if isinstance(m, Gate)]

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its checkpoint name, experts one by one, with the MTP layer's copies of tables."""
        last = f"layers.{self.dims.num_hidden_layers}."
        for name, tensor in self.state_dict().items():
            name = last + name.removeprefix("mtp.") if name.startswith("mtp.") else name
            name = name if name.startswith("lm_head.") else f"model.{name}"
            head, _, stacked = name.rpartition(".experts.")
            if head:
                for e, one in enumerate(tensor):
                    yield f"{head}.experts.{e}.{EXPERTS[stacked]}.weight", one
            else:
                yield name, tensor
        yield f"model.{last}embed_tokens.weight", self.embed_tokens.weight
        yield f"model.{last}shared_head.head.weight", self.lm_head.weight


def load_backbone(directory: Path, dtype: torch.dtype = torch.float32) -> Backbone:
    """Read an unquantised checkpoint of the target into a `Backbone`; correction biases stay float32."""
    directory = Path(directory)
    backbone = Backbone(Dims.from_config(read_json(directory / "config.json"))).to(dtype)
    for gate in backbone.gates():
        gate.float()
        gate.weight.data = gate.weight.data.to(dtype)
    found: dict[str, Tensor] = {}
    for file in sorted(set(read_json(directory / "model.safetensors.index.json")["weight_map"].values())):
        with safe_open(directory / file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, tensor in backbone.checkpoint_tensors():
            tensor.copy_(found[name])
    return backbone
