"""Documents of random bits for the store's tests: every NaN payload, infinity and -0.0 occurs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from featurestore import Document, StoreWriter

CONTRACT = {"format": 1, "target": {"path": "/models/target", "config_sha256": "ab"}, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Made:
    """A document as given to the writer."""

    uid: int
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    hidden: torch.Tensor
    source: str
    held_out: bool


def make(uid: int, length: int, states: int = 1, width: int = 32) -> Made:
    """The document of a uid: a pure function of the arguments."""
    random = np.random.default_rng([uid, length, states, width])
    bits = random.integers(0, 1 << 16, (length, states, width), dtype=np.uint16)
    bits[0, 0, : min(4, width)] = np.array([0x8000, 0x7FC1, 0xFF80, 0xFFFF], np.uint16)[: min(4, width)]
    return Made(
        uid,
        torch.from_numpy(random.integers(0, 1 << 32, length)),
        torch.from_numpy(random.integers(0, 2, length).astype(bool)),
        torch.from_numpy(bits).view(torch.bfloat16),
        f"source-{uid % 3}",
        uid % 5 == 0,
    )


def append(writer: StoreWriter, document: Made) -> None:
    writer.append(
        document.uid,
        document.input_ids,
        document.loss_mask,
        document.hidden,
        source=document.source,
        held_out=document.held_out,
    )


def write(path: Path | str, documents: Iterable[Made], part: str | None = None, **options: object) -> None:
    """Commit documents as one part."""
    with StoreWriter(path, CONTRACT, part=part, durable=False, **options) as writer:  # type: ignore[arg-type]
        for document in documents:
            append(writer, document)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def assert_same(found: Document, made: Made, start: int = 0, stop: int | None = None) -> None:
    """Every field of a read document equals what was written."""
    assert found.uid == made.uid
    assert found.input_ids.dtype == torch.int64
    assert found.loss_mask.dtype == torch.bool
    assert found.hidden.dtype == torch.bfloat16
    assert torch.equal(found.input_ids, made.input_ids[start:stop])
    assert torch.equal(found.loss_mask, made.loss_mask[start:stop])
    assert found.hidden.shape == made.hidden[start:stop].shape
    assert same_bits(found.hidden, made.hidden[start:stop])
    assert found.source == made.source
    assert found.held_out == made.held_out
