"""Reading the layer and the target's frozen tables from a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import InputError
from export.checkpoint import Checkpoint
from export.keymap import keymap, to_training
from train.dims import Dims
from train.mtp import MTPLayer

__all__ = ["layer_tensors", "load_layer", "load_tables"]


def layer_tensors(
    target: Checkpoint, weights: Path | None = None, *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the layer's tensors by training name, one at a time, dequantised.

    Args:
        target: the target checkpoint.
        weights: directory of trained tensors with checkpoint names; by default the released layer.
        dtype: dtype of every tensor but the router bias, which is float32.

    Raises:
        InputError: the layer is missing, incomplete, or of other sizes than config.json says.
    """
    source = Checkpoint(weights, config=target.config) if weights is not None else target
    scales = {source.scale_name(name) for name in source.names}
    names = [name for name in source.mtp_names() if name not in scales]

    def read(name: str) -> Tensor:
        return source.get(name, dtype=torch.float32 if name.endswith("e_score_correction_bias") else dtype)

    return to_training(keymap(target.config), names, read)


def load_tables(
    layer: MTPLayer, target: Checkpoint, *, dtype: torch.dtype, device: torch.device | str
) -> None:
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
) -> MTPLayer:
    """Load the MTP layer of a target, with the frozen embedding, head and final norm it needs.

    Args:
        checkpoint_dir: the target: config.json and safetensors files, bf16 or block fp8.
        weights: directory of trained tensors (a training checkpoint's `weights`, or an export);
            by default the released layer.
        dtype: dtype of parameters and tables; the router bias stays float32.
        device: where they live.

    Raises:
        InputError: not a DeepSeek-V3 or V3.2 checkpoint, no MTP layer, missing or misshapen tensors.
    """
    target = Checkpoint(checkpoint_dir)
    with torch.device("meta"):
        layer = MTPLayer(Dims.from_config(target.config))
    state = {name: x.to(device) for name, x in layer_tensors(target, weights, dtype=dtype)}
    layer.load_state_dict(state, assign=True)
    load_tables(layer, target, dtype=dtype, device=device)
    return layer
