"""The order of documents and their packing into steps, as pure functions: every rank computes them alone.

An epoch's order sorts by a hash of (uid, seed, epoch), so it depends neither on how the store lists its parts
nor on the number of ranks, and documents added later leave the relative order of the others alone. A step
takes the longest prefix of the order that longest-first packing fits into one bin of tokens per rank.
"""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from configs.errors import ConfigError

__all__ = ["Position", "Step", "epoch_order", "pack", "plan", "require_fit", "steps_per_epoch"]

U64 = np.uint64
EXACT_STEPS = 1000


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit integers."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def epoch_order(uid: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Places of the documents in the order of an epoch: int64 [N], a permutation.

    Distinct uids have distinct hashes, so the order never depends on how a sort treats ties.

    Args:
        uid: uint64 [N], distinct.
        seed: seed of the run.
        epoch: from 0.
    """
    with np.errstate(over="ignore"):
        start = _mix(np.array([seed % 2**64], U64) * U64(0x9E3779B97F4A7C15))
        key = _mix(start + np.array([epoch], U64))
        return np.argsort(_mix(_mix(uid.astype(U64, copy=False)) ^ key))


def pack(lengths: np.ndarray, bins: int, capacity: int) -> list[list[int]] | None:
    """Longest-first packing into the emptiest bin; None if some length does not fit.

    Args:
        lengths: tokens of each document.
        bins: number of bins.
        capacity: tokens of a bin.

    Returns:
        For every bin the places in `lengths`, in order of decreasing length.
    """
    filled = [(0, b) for b in range(bins)]
    packed: list[list[int]] = [[] for _ in range(bins)]
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    for place, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        used, b = filled[0]
        if used + length > capacity:
            return None
        packed[b].append(place)
        heapq.heapreplace(filled, (used + length, b))
    return packed


class Position(NamedTuple):
    """Where a reader stands: `consumed` documents of the order of `epoch` are delivered."""

    epoch: int
    consumed: int


START = Position(0, 0)


class Step(NamedTuple):
    """One step of all ranks: `bins[rank]` are document numbers, `after` the position once it is consumed."""

    before: Position
    after: Position
    bins: list[list[int]]


def require_fit(lengths: np.ndarray, uid: np.ndarray, tokens_per_rank: int) -> None:
    """Raise ConfigError if a document is longer than the budget of a rank."""
    if len(lengths) and int(lengths.max()) > tokens_per_rank:
        longest = int(lengths.argmax())
        raise ConfigError(
            f"train.tokens_per_rank = {tokens_per_rank} is less than the longest document"
            f" (uid {int(uid[longest])}: {int(lengths[longest])} tokens)",
            f"set train.tokens_per_rank to at least {int(lengths[longest])}",
        )


def plan(
    uid: np.ndarray,
    lengths: np.ndarray,
    *,
    tokens_per_rank: int,
    world_size: int,
    seed: int,
    start: Position = START,
    epochs: int | None = None,
) -> Iterator[Step]:
    """Steps from a position on; a step that an epoch cannot fill goes on with the next epoch's order.

    Args:
        uid: uint64 [N], distinct.
        lengths: tokens of each document, at most `tokens_per_rank`.
        tokens_per_rank: capacity of a rank in one step.
        world_size: ranks.
        seed: seed of the run.
        start: first document not yet consumed.
        epochs: stop after so many passes, with a last step of what is left; None never stops.
    """
    count = len(uid)
    if count == 0:
        return
    lengths = lengths.astype(np.int64)
    orders: dict[int, np.ndarray] = {}

    def order(epoch: int) -> np.ndarray:
        if epoch not in orders:
            for old in [e for e in orders if e < epoch - 1]:
                del orders[old]
            orders[epoch] = epoch_order(uid, seed, epoch)
        return orders[epoch]

    position = start
    capacity = tokens_per_rank * world_size
    guess = max(64, 2 * int(capacity / max(1.0, float(lengths.mean()))))
    while True:
        if position.consumed >= count:
            position = Position(position.epoch + 1, 0)
        if epochs is not None and position.epoch >= epochs:
            return
        ahead: list[np.ndarray] = []
        have, total, at = 0, 0, position
        while total <= capacity and (epochs is None or at.epoch < epochs):
            piece = order(at.epoch)[at.consumed : at.consumed + guess]
            ahead.append(piece)
            have += len(piece)
            total += int(lengths[piece].sum())
            end = at.consumed + len(piece)
            at = Position(at.epoch, end) if end < count else Position(at.epoch + 1, 0)
        documents = np.concatenate(ahead)
        sums = np.cumsum(lengths[documents])
        take = int(np.searchsorted(sums, capacity, "right"))
        # one document a rank always fits, so this ends; it rarely tries more than a few times
        while (packed := pack(lengths[documents[:take]], world_size, tokens_per_rank)) is None:
            take -= 1
        numbers = documents.tolist()
        end = position.consumed + take
        after = Position(position.epoch + end // count, end % count)
        yield Step(position, after, [[numbers[place] for place in bin_] for bin_ in packed])
        position = after


def steps_per_epoch(
    uid: np.ndarray, lengths: np.ndarray, *, tokens_per_rank: int, world_size: int, seed: int
) -> int:
    """Steps that consume the first epoch, the one that reaches into the second included.

    Exact up to 1000 steps; beyond that the rest is extrapolated from the tokens those consumed. In either
    case a pure function of its arguments.
    """
    require_fit(lengths, uid, tokens_per_rank)
    if len(uid) == 0:
        return 0
    tokens = 0
    steps = plan(uid, lengths, tokens_per_rank=tokens_per_rank, world_size=world_size, seed=seed)
    for number, step in enumerate(steps, start=1):
        if step.after.epoch > 0:
            return number
        tokens += sum(int(lengths[bin_].sum()) for bin_ in step.bins)
        if number == EXACT_STEPS:
            return -(-int(lengths.sum(dtype=np.int64)) * number // tokens)
    raise AssertionError("a plan without an end")
