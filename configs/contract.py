"""The contract: what the stored states are and which target they belong to (docs/contract.md).

Written by the dump; carried by every part, manifest, checkpoint and export; compared field by field wherever
two of them meet.
"""

from typing import Any, Literal

from configs.errors import ContractError
from configs.schema import Section

__all__ = ["Contract", "State", "require_same"]

# where a checkpoint lies says nothing about what it is
NOT_COMPARED = frozenset({"target.path"})


class Target(Section):
    path: str
    config_sha256: str
    index_sha256: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    quantization: str | None


class Template(Section):
    name: str
    sha256: str


class Engine(Section):
    name: str
    version: str
    tp: int
    view: Literal["native", "v3"]


class State(Section):
    """One stored state of a token: `post_norm` (after the final norm) or `layer_input` of layer `layer`."""

    site: Literal["post_norm", "layer_input"]
    layer: int


class Contract(Section):
    """Everything two stages must agree on; `shift` 1 means that token i+1 joins state i."""

    format: Literal[1] = 1
    target: Target
    norm_and_head_sha256: str
    tokenizer_sha256: str
    template: Template
    engine: Engine
    states: tuple[State, ...]
    dtype: Literal["bfloat16"] = "bfloat16"
    max_length: int
    shift: Literal[1] = 1
    carry: Literal["post_norm"] = "post_norm"
    mask_position_0: bool = True
    concat: Literal["embed,hidden"] = "embed,hidden"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, x in value.items() for k, v in _flat(x, f"{prefix}.{key}" if prefix else key).items()
    }


def require_same(
    found: dict[str, Any],
    expected: dict[str, Any],
    what: str,
    *,
    hint: str,
    ignore: frozenset[str] = frozenset(),
) -> None:
    """Compare two contracts in JSON form field by field, `target.path` and dotted names in `ignore` apart.

    Args:
        found: contract of the thing at hand.
        expected: contract it must equal.
        what: both things in words, for the message: "store runs/a/store and target models/v32".
        hint: what to do about a difference.

    Raises:
        ContractError: names every differing field with both values.
    """
    a, b = _flat(found), _flat(expected)
    names = sorted((a.keys() | b.keys()) - NOT_COMPARED - ignore)
    differing = [f"{n}: {a.get(n)!r}, not {b.get(n)!r}" for n in names if a.get(n) != b.get(n)]
    if differing:
        raise ContractError(f"{what} do not belong together: " + "; ".join(differing), hint)
