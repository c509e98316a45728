"""Which conversations are kept from training: a pure function of the conversation, the share and the seed.

A document's uid is 64 bits; the upper 32 are its *group*, a hash of the conversation as it stands in the
input and of nothing else. All documents of a conversation share a group, whatever answers them, so they are
held out together, by every stage, without any record of it.
"""

from typing import TypeVar, overload

import numpy as np

__all__ = ["is_held_out", "uid_group"]

Uids = TypeVar("Uids", int, np.ndarray)


def uid_group(uid: Uids) -> Uids:
    """The upper 32 bits of uids, uint64 [N] or one int: the hash of the conversation."""
    return uid >> (np.uint64(32) if isinstance(uid, np.ndarray) else 32)


@overload
def is_held_out(group: int, share: float, seed: int) -> bool: ...
@overload
def is_held_out(group: np.ndarray, share: float, seed: int) -> np.ndarray: ...


def is_held_out(group: int | np.ndarray, share: float, seed: int) -> bool | np.ndarray:
    """Whether conversations are kept from training.

    Args:
        group: 32-bit hashes of conversations, uint64 [N] or one int.
        share: of all conversations, in [0, 1]. A larger share holds out the same ones and more.
        seed: another seed holds out others.

    Returns:
        bool [N], or one bool for an int.
    """
    groups = np.atleast_1d(np.asarray(group, np.uint64))
    key = _mix(np.array([seed % 2**64], np.uint64))
    # of 64 mixed bits the upper 32 are compared, so that a share of 1 holds out all
    found = (_mix(groups ^ key) >> np.uint64(32)).astype(np.float64) < share * 2.0**32
    return found if isinstance(group, np.ndarray) else bool(found[0])


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every bit of the input changes half of the output."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
