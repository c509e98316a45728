"""Reading the layer and the target's frozen tables from a checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.eagle3 import IDS, recognise
from configs.errors import InputError
from export.check import map_problem
from export.checkpoint import Checkpoint
from export.keymap import eagle3_keymap, keymap, to_training
from train.dims import Dims
from train.eagle3 import Eagle3Layer, maps
from train.mtp import MTPLayer

__all__ = ["Layer", "eagle3_config", "kept_in", "layer_tensors", "load_layer", "load_tables", "make_layer"]

Layer = MTPLayer | Eagle3Layer


def eagle3_config(weights: Path | None, target: Checkpoint) -> dict[str, Any] | None:
    """The config.json of an EAGLE-3 draft that a directory holds; None for an MTP layer.

    Where the layers begin with 1 the ids are those of outputs, as trainers write them and sglang reads them:
    the inputs are one layer on.

    Raises:
        InputError: as `configs.eagle3.recognise`.
    """
    if weights is None or (draft := recognise(weights, target.config)) is None:
        return None
    if draft[IDS][0] == 1:
        draft[IDS] = [k + 1 for k in draft[IDS]]
    if not draft.get("draft_vocab_size"):
        # vLLM takes a head that is there, whatever the configuration says
        source = Checkpoint(weights)
        if "lm_head.weight" in source:
            draft["draft_vocab_size"] = source.shape("lm_head.weight")[0]
    return draft


def kept_in(weights: Path, draft: Mapping[str, Any]) -> Tensor | None:
    """Target ids of the tokens that a directory's draft can say, ascending int64 [N]; None for all of them.

    Raises:
        InputError: its maps are missing, or do not fit the draft or one another.
    """
    source, size = Checkpoint(weights), draft.get("draft_vocab_size")
    if not size or size == draft["vocab_size"]:
        return None
    if "d2t" not in source:
        raise InputError(
            f"{weights} can say {size:,} of {draft['vocab_size']:,} tokens, and has no d2t that says which",
            "export the draft again with its maps",
        )
    d2t, t2d = source.get("d2t"), source.get("t2d").bool() if "t2d" in source else None
    problem = map_problem(d2t, t2d, draft["vocab_size"])
    if len(d2t) != size:
        problem = f"d2t has {len(d2t):,} entries, draft_vocab_size is {size:,}"
    if problem:
        raise InputError(f"{weights}: {problem}", "export the draft again")
    return d2t + torch.arange(size)


def make_layer(target: Mapping[str, Any], draft: Mapping[str, Any] | None) -> Layer:
    """An empty layer: EAGLE-3 by its own config.json, the MTP layer for None."""
    dims = Dims.from_config(dict(target))
    return MTPLayer(dims) if draft is None else Eagle3Layer(dims, draft)


def _eagle3_tensors(
    target: Checkpoint, weights: Path, draft: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    source = Checkpoint(weights)
    written = {name.replace("midlayer.", "layers.0.", 1): name for name in source.names}
    keep = kept_in(weights, draft)
    held = {} if keep is None else maps(keep, draft["vocab_size"])
    if keep is None:
        # some programs write maps of all tokens as well
        written = {name: there for name, there in written.items() if name not in ("d2t", "t2d")}
    if "embed_tokens.weight" in written:
        _require_embedding(source, target)

    def read(name: str) -> Tensor:
        return held[name] if name in held else source.get(written[name], dtype=dtype)

    return to_training(eagle3_keymap(draft), {**written, **held}, read, str(weights))


def _require_embedding(source: Checkpoint, target: Checkpoint) -> None:
    """Refuse a draft with an embedding of its own: sglang serves the target's in its place.

    Raises:
        InputError: the embeddings differ.
    """
    name = "embed_tokens.weight"
    mine, theirs = source.get(name), target.get(f"model.{name}")
    if mine.shape != theirs.shape or not torch.equal(mine.bfloat16(), theirs.bfloat16()):
        raise InputError(
            f"{source.directory} has an embedding of its own, which is not the target's",
            "train the draft with the target's embedding, frozen",
        )


def layer_tensors(
    target: Checkpoint, weights: Path | None = None, *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the layer's tensors by training name, one at a time, dequantised.

    Args:
        target: the target checkpoint.
        weights: directory of trained tensors with checkpoint names; by default the released layer.
        dtype: dtype of every tensor but the router bias, which is float32, and a vocabulary's maps.

    Raises:
        InputError: the layer is missing, incomplete, or of other sizes than config.json says.
    """
    draft = eagle3_config(weights, target)
    if draft is not None and weights is not None:
        return _eagle3_tensors(target, weights, draft, dtype)
    source = Checkpoint(weights, config=target.config) if weights is not None else target
    scales = {source.scale_name(name) for name in source.names}
    names = [name for name in source.mtp_names() if name not in scales]

    def read(name: str) -> Tensor:
        return source.get(name, dtype=torch.float32 if name.endswith("e_score_correction_bias") else dtype)

    return to_training(keymap(target.config), names, read)


def load_tables(layer: Layer, target: Checkpoint, *, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give the layer the target's frozen embedding, head and final norm.

    Raises:
        InputError: the target lacks one of them, or it has another shape than config.json says.
    """
    V, D = layer.dims.vocab_size, layer.dims.hidden_size
    tables = {
        "embed_tokens": ("model.embed_tokens.weight", (V, D)),
        "lm_head": ("lm_head.weight", (V, D)),
        "norm_weight": ("model.norm.weight", (D,)),
    }
    for attribute, (name, shape) in tables.items():
        tensor = target.get(name, dtype=dtype)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, config.json says {shape}")
        setattr(layer, attribute, tensor.to(device))


def load_layer(
    checkpoint_dir: Path | str,
    *,
    weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Layer:
    """Load a draft of a target, with the frozen embedding, head and final norm it needs.

    Args:
        checkpoint_dir: the target: config.json and safetensors files, bf16 or block fp8.
        weights: directory of trained tensors (a training checkpoint's `weights`, or an export), of an
            EAGLE-3 draft where its config.json says so; by default the released MTP layer.
        dtype: dtype of parameters and tables; the router bias stays float32.
        device: where they live.

    Raises:
        InputError: not a DeepSeek-V3 or V3.2 checkpoint, no MTP layer, missing or misshapen tensors.
    """
    target = Checkpoint(checkpoint_dir)
    with torch.device("meta"):
        layer = make_layer(target.config, eagle3_config(weights, target))
    state = {name: x.to(device) for name, x in layer_tensors(target, weights, dtype=dtype)}
    layer.load_state_dict(state, assign=True)
    load_tables(layer, target, dtype=dtype, device=device)
    return layer
