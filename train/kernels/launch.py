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
    "launch",
    "matrix",
    "record",
    "require_device",
    "require_tiles",
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


_recording: ContextVar[list[Call] | None] = ContextVar("recording", default=None)
_replaced: ContextVar[Mapping[str, Tile]] = ContextVar("replaced", default=MappingProxyType({}))


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Collect launches as sm_90 would have them instead of making them; meta tensors will do."""
    calls: list[Call] = []
    token = _recording.set(calls)
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


def require_device(device: torch.device) -> None:
    """Refuse a device no kernel can run on. Raises ValueError."""
    if device.type != "cuda" and not INTERPRETED and _recording.get() is None:
        raise ValueError(f"backend: triton needs tensors on a CUDA device, found {device}")


def require_tiles(dtype: torch.dtype) -> None:
    """Refuse a dtype that the products have no tiles for. Raises ValueError."""
    if dtype != torch.bfloat16 and not INTERPRETED:
        raise ValueError(f"x: found {dtype}, expected torch.bfloat16 with backend triton on a GPU")


def tile_for(kernel: str, rows_per_expert: float = 0) -> Tile:
    """The committed tile of a kernel.

    Args:
        kernel: name in the table.
        rows_per_expert: mean number of rows; decides the shape class.
    """
    if kernel in _replaced.get():
        return _replaced.get()[kernel]
    place = "interpreter" if INTERPRETED and _recording.get() is None else "sm90"
    shape = "any" if kernel in TABLE[place, "any"] else "short" if rows_per_expert <= 512 else "long"
    return TABLE[place, shape][kernel]


def matrix(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What a kernel reads a contiguous matrix through (of the last two dimensions, if three), in tiles."""
    return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), [rows, columns])


def run(call: Call) -> None:
    """Make a launch, on the device of its first argument, whichever is the current one."""
    options = {"num_warps": call.tile.warps, "num_stages": call.tile.stages}
    first = next(iter(call.arguments.values()))
    with torch.cuda.device_of(getattr(first, "base", first)):
        call.kernel[(call.programs,)](**call.arguments, **options)


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Run `programs` programs of a kernel."""
    call, calls = Call(kernel, programs, tile, arguments), _recording.get()
    if calls is None:
        run(call)
    else:
        calls.append(call)
