"""Writing a safetensors file tensor by tensor: one in memory at a time, checksums on the way.

The package's own writer wants every tensor at once and leaves the file readable by its owner only.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.files import BLOCK, Checksum
from export.checkpoint import DTYPES

__all__ = ["write_tensors"]

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a safetensors file and have it on disk.

    Args:
        path: the file.
        shapes: dtype and shape of each tensor by name.
        tensors: the tensors, in the order of `shapes`; each is asked for when the one before is written.
        metadata: the header's strings.

    Returns:
        Its size and checksums (`configs.files`).

    Raises:
        OSError: the disk is full, or not writable.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # data begins aligned, as the format asks for
    text += b" " * (-len(text) % 8)
    checksum = Checksum()
    with open(path, "wb", buffering=0) as f:

        def write(data: memoryview) -> None:
            for start in range(0, len(data), BLOCK):
                piece, begin = data[start : start + BLOCK], checksum.size
                checksum.update(piece)
                while piece:
                    piece = piece[f.write(piece) :]
                # the disk begins now, not at the end
                os.posix_fadvise(f.fileno(), begin, checksum.size - begin, os.POSIX_FADV_DONTNEED)

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for (name, (dtype, shape)), tensor in zip(shapes.items(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        os.fsync(f.fileno())
    return checksum.entry()
