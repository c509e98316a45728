"""What is left to do of a dump, cut into parts: units that are committed whole.

Documents are what is done, parts only how they are stored: a document is left to do if no committed part of
the store holds it, or has noted that it is bad. Lines of the input may move, come and go, and workers may
change their number, without any of it being captured twice.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from configs.held_out import uid_group
from pipeline.prompts import Document, Documents

__all__ = ["Part", "cut", "own_share"]


@dataclass(frozen=True, eq=False)
class Part:
    """Documents that are committed together.

    Attributes:
        name: follows from the uids, so that two processes that do the same work make one part of it.
        documents: what is taken, in this order.
        rejected: documents of it that were found bad when it was taken before, by uid, and why.
    """

    name: str
    documents: tuple[Document, ...]
    rejected: dict[int, str] = field(default_factory=dict)


def own_share(uids: np.ndarray, worker: str) -> np.ndarray:
    """Places of the documents of `dump.worker` k/n: those whose group is k - 1 modulo n.

    Args:
        uids: uint64 [N].
        worker: "k/n".
    """
    k, n = map(int, worker.split("/"))
    return np.flatnonzero(uid_group(uids) % n == k - 1)


def cut(documents: Documents, left: np.ndarray, size: int) -> Iterator[Part]:
    """The documents at the places `left`, in parts of `size`, made one at a time."""
    for i in range(0, len(left), size):
        places = left[i : i + size]
        name = hashlib.sha256(documents.uids[places].astype("<u8").tobytes()).hexdigest()[:16]
        yield Part(name, tuple(documents[int(j)] for j in places))
