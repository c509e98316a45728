"""The contracts: what the stored states are, and what was trained from them (docs/contract.md).

The store's is written by the dump, carried by every part, manifest, checkpoint and export, and compared field
by field wherever two of them meet. The draft's is carried by checkpoints and exports.
"""

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from configs.errors import ContractError, InputError
from configs.files import read_json, sha256_file, sha256_json
from configs.target import target_config

__all__ = [
    "NORM_AND_HEAD",
    "Contract",
    "Draft",
    "Engine",
    "State",
    "Target",
    "Template",
    "Vocabulary",
    "aux_layers",
    "norm_and_head_sha256",
    "other_provenance",
    "require_same",
    "require_trained_for",
    "split_draft",
    "store_contract",
    "target_contract",
    "vocabulary",
]

# the two tensors that turn a layer's output into a distribution
NORM_AND_HEAD = ("model.norm.weight", "lm_head.weight")
INDEX = "model.safetensors.index.json"

# fields of the draft's contract that the store's held before the draft had its own
OF_THE_DRAFT = frozenset({"carry", "mask_position_0", "concat"})
# how states were made, which each part records of itself: a difference is worth a word and no more
PROVENANCE = ("engine", "template.sha256", "max_length")
# where a checkpoint lies says nothing about what it is
NOT_COMPARED = frozenset({"target.path"}) | OF_THE_DRAFT


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(Record):
    path: str
    config_sha256: str
    index_sha256: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    quantization: str | None


class Template(Record):
    name: str
    sha256: str


class Engine(Record):
    """What computed the states; `settings` are those of [dump.vllm] or [dump.transformers] that may change a
    number.
    """

    name: str
    version: str
    tp: int
    view: Literal["native", "v3"]
    kv_cache_dtype: str = "auto"
    settings: dict[str, Any] = {}


class State(Record):
    """One stored state of a token: `post_norm` (after the final norm) or `layer_input` of layer `layer`."""

    site: Literal["post_norm", "layer_input"]
    layer: int


class Contract(Record):
    """What the states of a store are; `shift` 1 means that token i+1 joins state i.

    All but PROVENANCE is the identity, which must be equal wherever two of them meet.
    """

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


class Vocabulary(Record):
    """Token ids; `sha256` is over them as ascending little-endian int64."""

    size: int
    sha256: str


class Draft(Record):
    """How a draft was trained, and so how a server must run it.

    `carry`: what a draft step hands on; `mask_position_0`: the embedding at position 0 is zeroed, as in vLLM;
    `concat`: the order of the joined input; `aux_layers`: the layers whose inputs it starts from;
    `vocabulary`: the tokens it can say, None for all of the target's.
    """

    kind: Literal["mtp", "eagle3"] = "mtp"
    carry: Literal["post_norm", "pre_norm"] = "post_norm"
    mask_position_0: bool = True
    concat: Literal["embed,hidden"] = "embed,hidden"
    aux_layers: tuple[int, ...] = ()
    attention: Literal["dense", "sparse"] = "dense"
    head: Literal["target", "trained"] = "target"
    vocabulary: Vocabulary | None = None


def aux_layers(contract: dict[str, Any]) -> list[int]:
    """Layers whose inputs a store of this contract holds, in the order in which it holds them."""
    return [s["layer"] for s in contract.get("states", ()) if s["site"] == "layer_input"]


def vocabulary(ids: Sequence[int]) -> Vocabulary:
    """Name a draft's tokens, ascending."""
    data = b"".join(i.to_bytes(8, "little") for i in ids)
    return Vocabulary(size=len(ids), sha256=hashlib.sha256(data).hexdigest())


def store_contract(read: dict[str, Any]) -> dict[str, Any]:
    """A store's contract as read, without the fields of the draft that older ones hold."""
    return {key: value for key, value in read.items() if key not in OF_THE_DRAFT}


def split_draft(said: dict[str, Any]) -> dict[str, Any]:
    """`layer61.json` as read, its `draft` beside its `contract`; older ones hold the one within the other."""
    held = said.get("contract")
    if isinstance(said.get("draft"), dict):
        # fields that came later had no other value than their default
        return {**said, "draft": Draft(**said["draft"]).model_dump(mode="json")}
    if not isinstance(held, dict):
        return said
    draft = Draft(**{key: held[key] for key in OF_THE_DRAFT & held.keys()})
    return {**said, "contract": store_contract(held), "draft": draft.model_dump(mode="json")}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and where its data starts (huggingface.co/docs/safetensors)."""
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > 100_000_000:  # the format's own limit
                raise ValueError("the header length is out of range")
            return json.loads(f.read(length)), 8 + length
    except FileNotFoundError:
        raise InputError(f"{path} is missing", "the checkpoint is incomplete: fetch it again") from None
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{path} is not a safetensors file: {error}", "fetch the checkpoint again") from None


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to file name, from the index, or from the one file of a checkpoint without an index."""
    index = directory / INDEX
    if not index.exists():
        return dict.fromkeys(
            _header(directory / "model.safetensors")[0].keys() - {"__metadata__"}, "model.safetensors"
        )
    try:
        return dict(read_json(index)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is not an index of safetensors files: {error!r}") from None


def target_contract(directory: Path | str) -> Target:
    """Identify a target checkpoint by its configuration and its list of tensors; reads no weights.

    `config_sha256` is taken over the parsed config.json, so that white space does not count; `index_sha256`
    over the bytes of the index, or over the header of `model.safetensors` where there is no index.

    Raises:
        InputError: a file is missing or malformed, or config.json lacks a size.
    """
    directory = Path(directory)
    config = target_config(directory)
    missing = [
        k for k in ("hidden_size", "num_hidden_layers", "vocab_size") if not isinstance(config.get(k), int)
    ]
    if missing:
        raise InputError(
            f"{directory / 'config.json'} lacks {', '.join(missing)}",
            "set target.path to a DeepSeek-V3.2 checkpoint",
        )
    index = directory / INDEX
    return Target(
        path=str(directory),
        config_sha256=sha256_json(config),
        index_sha256=(
            sha256_file(index) if index.exists() else sha256_json(_header(directory / "model.safetensors")[0])
        ),
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        quantization=(config.get("quantization_config") or {}).get("quant_method"),
    )


def norm_and_head_sha256(directory: Path | str) -> str:
    """Hash name, dtype, shape and bytes of the final norm and the head: what a stored state means.

    Reads about 1.9 GB of the released V3.2 checkpoint, in pieces of 16 MiB.

    Raises:
        InputError: one of the two tensors, or the file that should hold it, is missing.
    """
    directory = Path(directory)
    files = _weight_map(directory)
    digest = hashlib.sha256()
    for name in NORM_AND_HEAD:
        if name not in files:
            raise InputError(
                f"the checkpoint {directory} has no tensor {name}", "set target.path to the full target"
            )
        path = directory / files[name]
        header, start = _header(path)
        if name not in header:
            raise InputError(
                f"{path} has no tensor {name}, which the index places there", "fetch the checkpoint again"
            )
        begin, end = header[name]["data_offsets"]
        digest.update(json.dumps([name, header[name]["dtype"], header[name]["shape"]]).encode())
        with open(path, "rb") as f:
            f.seek(start + begin)
            left = end - begin
            while left:
                piece = f.read(min(left, 16 << 20))
                if not piece:
                    raise InputError(f"{path} ends before {name} does", "fetch the checkpoint again")
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, x in value.items() for k, v in _flat(x, f"{prefix}.{key}" if prefix else key).items()
    }


def _is_provenance(name: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in PROVENANCE)


def other_provenance(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In words, how states under two contracts in JSON form were made differently; older ones say less."""
    a, b = _flat(found), _flat(expected)
    names = sorted(n for n in a.keys() | b.keys() if _is_provenance(n))
    # a setting that one of two engines of the same form was given is a difference; a field that the older
    # program did not write is none
    whole = "engine.kv_cache_dtype" in a and "engine.kv_cache_dtype" in b
    names = [n for n in names if whole or (n in a and n in b)]
    return [f"{n}: {a.get(n)!r}, not {b.get(n)!r}" for n in names if a.get(n) != b.get(n)]


def require_same(
    found: dict[str, Any],
    expected: dict[str, Any],
    what: str,
    *,
    hint: str,
    ignore: frozenset[str] = frozenset(),
) -> None:
    """Compare the identities of two contracts in JSON form field by field.

    PROVENANCE, NOT_COMPARED and dotted names in `ignore` are left aside.

    Args:
        found: contract of the thing at hand.
        expected: contract it must equal.
        what: both things in words, for the message: "store runs/a/store and target models/v32".
        hint: what to do about a difference.

    Raises:
        ContractError: names every differing field with both values.
    """
    a, b = _flat(found), _flat(expected)
    names = sorted(n for n in (a.keys() | b.keys()) - NOT_COMPARED - ignore if not _is_provenance(n))
    differing = [f"{n}: {a.get(n)!r}, not {b.get(n)!r}" for n in names if a.get(n) != b.get(n)]
    if differing:
        raise ContractError(f"{what} do not belong together: " + "; ".join(differing), hint)


def require_trained_for(trained: dict[str, Any] | None, directory: Path, what: str) -> None:
    """Check that weights whose store's contract is known were trained for a target.

    Args:
        trained: the contract; None where nothing is known.
        directory: the target.
        what: the weights in words.

    Raises:
        ContractError: they were trained for another one.
    """
    if trained is None:
        return
    what = f"{what} and target {directory}"
    hint = "set target.path to the checkpoint whose states the layer was trained on"
    here = {"target": target_contract(directory).model_dump(mode="json")}
    require_same({"target": trained.get("target")}, here, what, hint=hint)
    key = "norm_and_head_sha256"
    require_same({key: trained.get(key)}, {key: norm_and_head_sha256(directory)}, what, hint=hint)
