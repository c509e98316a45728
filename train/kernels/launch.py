"""Launching Triton kernels with the tiles of the table, and recording launches instead of making them.

A recorded launch holds the kernel and its arguments as the real one would have them, so that a kernel can be
compiled ahead of time, on a machine without its GPU, exactly as it would be compiled there.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from train.kernels.tiles import TABLE, Tile

__all__ = [
    "INTERPRETED",
    "Call",
    "architecture",
    "launch",
    "matrix",
    "record",
    "require_device",
    "run",
    "tile_for",
    "use_tiles",
]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""


class Call(NamedTuple):
    """One launch that was recorded."""

    kernel: Any
    programs: int
    tile: Tile
    arguments: dict[str, Any]


class _Recording(NamedTuple):
    arch: str
    calls: list[Call]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)
_replaced: ContextVar[Mapping[str, Tile]] = ContextVar("replaced", default=MappingProxyType({}))


@contextlib.contextmanager
def record(arch: str) -> Iterator[list[Call]]:
    """Collect launches for an architecture of the table instead of making them; meta tensors will do."""
    calls: list[Call] = []
    token = _recording.set(_Recording(arch, calls))
    try:
        yield calls
    finally:
        _recording.reset(token)


@contextlib.contextmanager
def use_tiles(**tiles: Tile) -> Iterator[None]:
    """Put tiles in place of the table's, by kernel name; in this thread, which autograd's is not on a GPU."""
    token = _replaced.set({**_replaced.get(), **tiles})
    try:
        yield
    finally:
        _replaced.reset(token)


def architecture(device: torch.device) -> str:
    """Row of the table for a device."""
    if recording := _recording.get():
        return recording.arch
    if INTERPRETED:
        return "interpreter"
    major = torch.cuda.get_device_capability(device)[0]
    # others have the shared memory of sm_80's smaller siblings, for which its tiles are made
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def require_device(device: torch.device) -> None:
    """Refuse a device no kernel can run on. Raises ValueError."""
    if device.type != "cuda" and not INTERPRETED and _recording.get() is None:
        raise ValueError(f"backend: triton needs tensors on a CUDA device, found {device}")


def tile_for(kernel: str, device: torch.device, dtype: torch.dtype, rows_per_expert: float = 0) -> Tile:
    """The committed tile of a kernel.

    Args:
        kernel: name in the table.
        device: where it runs.
        dtype: of its matrix operands.
        rows_per_expert: mean number of rows; decides the shape class.
    """
    if kernel in _replaced.get():
        return _replaced.get()[kernel]
    arch = architecture(device)
    name = str(dtype).removeprefix("torch.")
    shape = "short" if rows_per_expert <= 512 else "long"
    for key in ((arch, name, shape), (arch, name, "any"), (arch, "any", "any")):
        if kernel in TABLE.get(key, ()):
            return TABLE[key][kernel]
    raise KeyError(f"no tile for {kernel} on {arch} with {name}")


def matrix(tensor: torch.Tensor, rows: int, columns: int, tile: Tile) -> TensorDescriptor | torch.Tensor:
    """What a kernel reads a contiguous matrix through (of the last two dimensions, if three), in tiles."""
    if not tile.descriptors:
        return tensor
    return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), [rows, columns])


def run(call: Call) -> None:
    """Make a launch, on the device of its first argument, whichever is the current one."""
    options = {"num_warps": call.tile.warps, "num_stages": call.tile.stages}
    first = next(iter(call.arguments.values()))
    with torch.cuda.device_of(getattr(first, "base", first)):
        call.kernel[(call.programs,)](**call.arguments, **options)


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Run `programs` programs of a kernel."""
    if recording := _recording.get():
        recording.calls.append(Call(kernel, programs, tile, arguments))
        return
    run(Call(kernel, programs, tile, arguments))
