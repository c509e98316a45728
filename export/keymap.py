"""The MTP layer's tensors: their names and shapes in a checkpoint and in the module that trains them.

Both sides use the checkpoint's own words. A training name is the checkpoint name without its layer prefix,
but for the routed experts, whose matrices are stacked over the experts (E of them, F wide, D model width):

    training            checkpoint, e = 0 .. E-1
    mlp.experts.w1      mlp.experts.{e}.gate_proj.weight    [E, F, D]
    mlp.experts.w3      mlp.experts.{e}.up_proj.weight      [E, F, D]
    mlp.experts.w2      mlp.experts.{e}.down_proj.weight    [E, D, F]

The layer's copies of embedding and head are known and dropped: servers take the target's. Scales of quantised
weights are not listed: each belongs to its weight (`export.checkpoint`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from configs.errors import InputError
from export.checkpoint import mtp_prefix

__all__ = [
    "DROPPED",
    "Op",
    "Rename",
    "Stack",
    "account",
    "draft_keymap",
    "eagle3_keymap",
    "is_quantized",
    "keymap",
    "layer_shapes",
    "to_training",
]

# copies of the target's own tables; a server replaces them by the target's
DROPPED = ("embed_tokens.weight", "shared_head.head.weight")

# linear maps of attention, indexer and feed-forward; not eh_proj, the router or the indexer's weights_proj
QUANTIZED = (
    ".q_a_proj.weight",
    ".q_b_proj.weight",
    ".kv_a_proj_with_mqa.weight",
    ".kv_b_proj.weight",
    ".o_proj.weight",
    ".indexer.wq_b.weight",
    ".indexer.wk.weight",
    ".gate_proj.weight",
    ".up_proj.weight",
    ".down_proj.weight",
)

EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Rename:
    """One tensor under another name.

    Attributes:
        training: name in the module.
        checkpoint: the one name in the checkpoint, as a tuple like every other op's.
        shape: shape on both sides.
    """

    training: str
    checkpoint: tuple[str, ...]
    shape: tuple[int, ...]

    def to_training(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """The module's tensor from the checkpoint's one."""
        (tensor,) = tensors
        return tensor

    def to_checkpoint(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The checkpoint's tensor, in the order of `checkpoint`."""
        return (tensor,)


@dataclass(frozen=True)
class Stack:
    """One tensor of the module that holds many of the checkpoint along its first axis.

    Attributes:
        training: name in the module.
        checkpoint: names in the checkpoint, in the order of the axis.
        shape: shape of the module's tensor; shape[0] = len(checkpoint).
    """

    training: str
    checkpoint: tuple[str, ...]
    shape: tuple[int, ...]

    def to_training(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Stack the checkpoint's tensors, taken one at a time, so that only one is held beside the result."""
        out: torch.Tensor | None = None
        for i, tensor in enumerate(tensors):
            if out is None:
                out = torch.empty(
                    len(self.checkpoint), *tensor.shape, dtype=tensor.dtype, device=tensor.device
                )
            out[i] = tensor
        assert out is not None
        return out

    def to_checkpoint(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the rows of the first axis, in the order of `checkpoint`."""
        return tensor.unbind(0)


Op = Rename | Stack


def layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the MTP layer by its name without prefix, experts one by one.

    Args:
        config: `config.json` of a DeepSeek-V3 or V3.2 model; the indexer is there iff `index_topk` is.

    Raises:
        InputError: the configuration lacks a size or describes another architecture.
    """
    try:
        D, V = config["hidden_size"], config["vocab_size"]
        H, L, R = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
        P, C, Q = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
        E, F = config["n_routed_experts"], config["moe_intermediate_size"]
        S = F * config["n_shared_experts"]
        indexer = {}
        if config.get("index_topk") is not None:
            HI, DI = config["index_n_heads"], config["index_head_dim"]
            indexer = {
                "self_attn.indexer.wq_b.weight": (HI * DI, Q),
                "self_attn.indexer.wk.weight": (DI, D),
                "self_attn.indexer.k_norm.weight": (DI,),
                "self_attn.indexer.k_norm.bias": (DI,),
                "self_attn.indexer.weights_proj.weight": (HI, D),
            }
    except KeyError as error:
        raise InputError(
            f"the model configuration has no {error.args[0]}, expected a DeepSeek-V3 or V3.2 config.json"
        ) from None
    if not isinstance(Q, int) or not isinstance(E, int):
        raise InputError(
            f"q_lora_rank is {Q!r} and n_routed_experts is {E!r}: this layer has no compressed queries or no"
            " experts; only DeepSeek-V3 and V3.2 layers are known"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (V, D),
        "enorm.weight": (D,),
        "hnorm.weight": (D,),
        "eh_proj.weight": (D, 2 * D),
        "input_layernorm.weight": (D,),
        "self_attn.q_a_proj.weight": (Q, D),
        "self_attn.q_a_layernorm.weight": (Q,),
        "self_attn.q_b_proj.weight": (H * (P + R), Q),
        "self_attn.kv_a_proj_with_mqa.weight": (L + R, D),
        "self_attn.kv_a_layernorm.weight": (L,),
        "self_attn.kv_b_proj.weight": (H * (P + C), L),
        "self_attn.o_proj.weight": (D, H * C),
        **indexer,
        "post_attention_layernorm.weight": (D,),
        "mlp.gate.weight": (E, D),
        "mlp.gate.e_score_correction_bias": (E,),
    }
    for e in range(E):
        shapes[f"mlp.experts.{e}.gate_proj.weight"] = (F, D)
        shapes[f"mlp.experts.{e}.up_proj.weight"] = (F, D)
        shapes[f"mlp.experts.{e}.down_proj.weight"] = (D, F)
    shapes["mlp.shared_experts.gate_proj.weight"] = (S, D)
    shapes["mlp.shared_experts.up_proj.weight"] = (S, D)
    shapes["mlp.shared_experts.down_proj.weight"] = (D, S)
    shapes["shared_head.norm.weight"] = (D,)
    shapes["shared_head.head.weight"] = (V, D)
    return shapes


def eagle3_keymap(config: Mapping[str, Any]) -> tuple[Op, ...]:
    """Every op between an EAGLE-3 directory and the module, in the module's order: all of them rename.

    Args:
        config: the draft's own config.json (`configs.eagle3.draft_config`).
    """
    D, F, H = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    Q, L, R = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    P, C = config["qk_nope_head_dim"], config["v_head_dim"]
    K = len(config["eagle_aux_hidden_state_layer_ids"])
    block = {
        "input_layernorm.weight": (D,),
        "hidden_norm.weight": (D,),
        "self_attn.q_a_proj.weight": (Q, 2 * D),
        "self_attn.q_a_layernorm.weight": (Q,),
        "self_attn.q_b_proj.weight": (H * (P + R), Q),
        "self_attn.kv_a_proj_with_mqa.weight": (L + R, 2 * D),
        "self_attn.kv_a_layernorm.weight": (L,),
        "self_attn.kv_b_proj.weight": (H * (P + C), L),
        "self_attn.o_proj.weight": (D, H * C),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    ops = [Rename("fc.weight", ("fc.weight",), (D, K * D))]
    if config.get("fc_norm"):
        names = [f"fc_norm.{k}.weight" for k in range(K)]
        ops += [Rename(name, (name,), (D,)) for name in names]
    ops += [Rename(name, (f"layers.0.{name}",), shape) for name, shape in block.items()]
    ops.append(Rename("norm.weight", ("norm.weight",), (D,)))
    size, V = config.get("draft_vocab_size"), config["vocab_size"]
    if size:
        ops.append(Rename("own_head.weight", ("lm_head.weight",), (size, D)))
        if size != V:
            ops += [Rename("d2t", ("d2t",), (size,)), Rename("t2d", ("t2d",), (V,))]
    return tuple(ops)


def draft_keymap(target: Mapping[str, Any], draft: Mapping[str, Any] | None) -> tuple[Op, ...]:
    """The key map of an EAGLE-3 draft by its own config.json; of the target's MTP layer for None."""
    return keymap(target) if draft is None else eagle3_keymap(draft)


def is_quantized(name: str) -> bool:
    """Whether a released fp8 checkpoint stores this tensor of the layer in float8 (full or short name)."""
    return name.endswith(QUANTIZED)


def keymap(config: Mapping[str, Any]) -> tuple[Op, ...]:
    """Every op between the checkpoint's MTP layer and the module, in the module's order.

    Each checkpoint name other than the dropped copies belongs to exactly one op.

    Raises:
        InputError: as `layer_shapes`.
    """
    prefix, shapes = mtp_prefix(config), layer_shapes(config)
    E = config["n_routed_experts"]
    ops: list[Op] = []
    for name, shape in shapes.items():
        if name in DROPPED:
            continue
        if not name.startswith("mlp.experts."):
            ops.append(Rename(name, (prefix + name,), shape))
        elif name == "mlp.experts.0.gate_proj.weight":
            for short, long in EXPERTS.items():
                names = [f"mlp.experts.{e}.{long}.weight" for e in range(E)]
                ops.append(
                    Stack(f"mlp.experts.{short}", tuple(prefix + n for n in names), (E, *shapes[names[0]]))
                )
    return tuple(ops)


def account(
    found: Iterable[str], expected: Iterable[str], what: str, *, optional: Iterable[str] = ()
) -> None:
    """Check that every expected name is there once and nothing else is.

    Args:
        found: the names at hand; a repeated one counts.
        expected: the names that must be there.
        what: the thing at hand in words.
        optional: names that may be there as well.

    Raises:
        InputError: lists the missing and the unexpected names.
    """
    counts, needed = Counter(iter(found)), set(expected)
    missing = sorted(needed - counts.keys())
    surplus = sorted(counts.keys() - needed - set(optional))
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if not (missing or surplus or repeated):
        return

    def listed(names: list[str]) -> str:
        return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"

    parts = [
        f"{len(names)} {word}: {listed(names)}"
        for word, names in (("missing", missing), ("unexpected", surplus), ("repeated", repeated))
        if names
    ]
    raise InputError(f"{what} does not hold exactly the tensors of one draft; {'; '.join(parts)}")


def to_training(
    ops: Iterable[Op],
    names: Iterable[str],
    get: Callable[[str], torch.Tensor],
    what: str = "the checkpoint",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the module's tensors by name, each checkpoint tensor read once.

    Args:
        ops: from `keymap`.
        names: checkpoint names of the layer, scales left out; copies of embedding and head may be among them.
        get: reads one checkpoint tensor.
        what: the thing at hand in words.

    Raises:
        InputError: a name is missing, unexpected or repeated, or a tensor has another shape than expected.
    """
    ops = tuple(ops)
    prefix = ops[0].checkpoint[0].removesuffix(ops[0].training)
    expected = [name for op in ops for name in op.checkpoint]
    account(names, expected, what, optional=[prefix + name for name in DROPPED])

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = get(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, the configuration says {shape}")
        return tensor

    for op in ops:
        shape = op.shape[1:] if isinstance(op, Stack) else op.shape
        yield op.training, op.to_training(read(name, shape) for name in op.checkpoint)
