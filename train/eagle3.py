"""The EAGLE-3 draft of a DeepSeek target: one dense layer with multi-head latent attention.

Faithful to vLLM 0.32.0 `model_executor/models/deepseek_eagle3.py` and sglang 0.5.23
`srt/models/kimi_k25_eagle3.py`, which compute the same function (arXiv 2503.01840, with the target's kind of
attention). Nothing is masked at position 0, and attention is dense at any length: the served draft has no
indexer.

Draft step s at place i of a document with tokens t; s_k is what enters the target's layer k at place i:

    g = fc(concat(s_k for k ascending))              fc_norm: each s_k through its own norm before
    h = g at step 0, later the carried state
    a = concat(input_layernorm(e), hidden_norm(h))   e = embed_tokens[t[i+s+1]]; 2 D wide
    x = h + self_attn(a)                             position i + s
    x = x + mlp(post_attention_layernorm(x))
    lm_head(norm(x)) predicts t[i+s+2]; carried: x (pre_norm), or norm(x) (post_norm)

Legend: T tokens, D hidden_size, K layer inputs, V vocabulary, N tokens of the draft's vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.keymap import Op
from train.blocks import MLP, Attention
from train.dims import Dims
from train.kernels.norm import RMSNorm
from train.loss import head_loss

__all__ = ["NOT_RANDOM", "Eagle3Layer", "initial_tensors", "maps"]

# what a new draft takes from the target and its store
NOT_RANDOM = ("norm.weight", "own_head.weight", "d2t", "t2d")


class Head(nn.Module):
    """The draft's own head, [N, D]: trained, or rows of the target's.

    Its loss is computed inside its forward, while its weight is whole on every rank.
    """

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, hidden_size))

    def forward(
        self, student: Tensor, teacher: Tensor, head: Tensor, **options: Any
    ) -> tuple[Tensor | None, ...]:
        """`head_loss` of what this head predicts, as a plain tuple."""
        return tuple(head_loss(student, teacher, head, draft_head=self.weight, **options))


class Eagle3Layer(nn.Module):
    """The EAGLE-3 layer; its parameters have the names that servers load, without `layers.0.`.

    The target's embedding, head and final norm are frozen tables: buffers outside the state dict.

    Args:
        dims: sizes of the target.
        config: the draft's own config.json (`configs.eagle3.draft_config`).

    Attributes:
        embed_tokens, lm_head: [V, D]; norm_weight: [D], the target's `model.norm.weight`.
        own_head: the draft's own head; None where the target's serves.
        keep: target ids of the draft's vocabulary, ascending int64 [N]; None where it is the target's. Held
            as the two maps of the checkpoint: d2t int64 [N], the target's id less the draft's, t2d bool [V].
    """

    masks_position_0 = False

    embed_tokens: Tensor
    lm_head: Tensor
    norm_weight: Tensor
    d2t: Tensor
    t2d: Tensor

    def __init__(self, dims: Dims, config: Mapping[str, Any]) -> None:
        super().__init__()
        D, eps = dims.hidden_size, dims.rms_norm_eps
        self.dims = replace(dims, intermediate_size=config["intermediate_size"], index_topk=0)
        self.aux_layers = tuple(config["eagle_aux_hidden_state_layer_ids"])
        self.carries_norm = bool(config.get("norm_output"))
        self.fc = nn.Linear(len(self.aux_layers) * D, D, bias=False)
        norms = len(self.aux_layers) if config.get("fc_norm") else 0
        self.fc_norm = nn.ModuleList(RMSNorm(D, eps=eps) for _ in range(norms))
        self.input_layernorm = RMSNorm(D, eps=eps)
        self.hidden_norm = RMSNorm(D, eps=eps)
        self.self_attn = Attention(self.dims, 2 * D)
        self.post_attention_layernorm = RMSNorm(D, eps=eps)
        self.mlp = MLP(D, self.dims.intermediate_size)
        self.norm = RMSNorm(D, eps=eps)
        size = config.get("draft_vocab_size")
        self.own_head = Head(size, D) if size else None
        self.draft_vocab_size = size or dims.vocab_size
        self.pruned = bool(size) and size != dims.vocab_size
        if self.pruned:
            assert size is not None
            self.register_buffer("d2t", torch.zeros(size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(dims.vocab_size, dtype=torch.bool))
        self.register_buffer("embed_tokens", torch.empty(0), persistent=False)
        self.register_buffer("lm_head", torch.empty(0), persistent=False)
        self.register_buffer("norm_weight", torch.empty(0), persistent=False)

    @property
    def keep(self) -> Tensor | None:
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device) if self.pruned else None

    def start(self, states_TKD: Tensor) -> Tensor:
        """What step 0 is carried from, [T, D], made of the inputs of the chosen layers, [T, K, D]."""
        states_TKD = states_TKD.to(self.fc.weight.dtype)
        if len(self.fc_norm):
            normed = [norm(x) for norm, x in zip(self.fc_norm, states_TKD.unbind(1), strict=True)]
            states_TKD = torch.stack(normed, 1)
        return self.fc(states_TKD.flatten(1))

    def enter(
        self, input_ids_T: Tensor, hidden_TD: Tensor, masked_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Begin a draft step; arguments as `MTPLayer.enter`.

        Returns:
            The residual stream [T, D] and the input of the attention [T, 2 D].
        """
        e_TD = F.embedding(input_ids_T, self.embed_tokens).to(hidden_TD.dtype)
        if masked_T is not None:
            e_TD = e_TD.masked_fill(masked_T[:, None], 0)
        return hidden_TD, torch.cat((self.input_layernorm(e_TD), self.hidden_norm(hidden_TD)), -1)

    def leave(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """End a draft step: the state for the head, and what the next step is carried from."""
        state_TD = self.norm(x_TD)
        return state_TD, state_TD if self.carries_norm else x_TD


def initial_tensors(
    ops: tuple[Op, ...], std: float, seed: int, *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield an untrained layer's weights by training name: norms of one, matrices normal, by seed and name.

    Those of `NOT_RANDOM`, which are last in `ops`, are left out.
    """
    for op in ops:
        if op.training in NOT_RANDOM:
            continue
        if len(op.shape) == 1:
            yield op.training, torch.ones(op.shape, dtype=dtype)
            continue
        generator = torch.Generator().manual_seed(crc32(f"{seed} {op.training}".encode()))
        yield op.training, torch.empty(op.shape).normal_(0, std, generator=generator).to(dtype)


def maps(keep_N: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """The two maps that servers read: d2t int64 [N], target id less draft id; t2d bool [V]."""
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[keep_N] = True
    return {"d2t": keep_N - torch.arange(len(keep_N)), "t2d": t2d}
