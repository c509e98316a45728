"""Threads that check a document's states and append them to the open parts of the store; no engine in it.

Whoever computes states hands them over here, so that every engine gets the same checks. A document that does
not pass is noted in its part and left out; the others go on.

Legend: T tokens of a document, S states of a token, D width of a state.
"""

import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any

import numpy as np
import torch
from awscrt.checksums import crc32c

from configs.errors import describe
from featurestore import StoreWriter
from pipeline.loops import loop_share

__all__ = ["OpenPart", "Writers", "digest"]

# bits of bf16; what is not a number has larger ones than the infinity of its sign
MAGNITUDE, INFINITY, MINUS_INFINITY = 0x7FFF, 0x7F80, 0xFF80
# values at a time: the second look finds them in the cache, and Python's lock changes hands seldom
LOOK_AT = 1 << 22


def digest(token_ids: Any) -> int:
    """crc32c of token ids as little-endian uint32, by which driver and worker compare what they hold."""
    return crc32c(np.asarray(token_ids, "<u4").tobytes())


def _not_finite(bits: np.ndarray) -> int | None:
    """Place of the first bf16, given as uint16, that is infinite or not a number; None if all are numbers."""
    for start in range(0, len(bits), LOOK_AT):
        block = bits[start : start + LOOK_AT]
        # read twice, as signed and as unsigned, and nothing written; `isfinite` takes 40 times as long
        if block.view(np.int16).max() >= INFINITY or block.max() >= MINUS_INFINITY:
            return start + int(((block & MAGNITUDE) >= INFINITY).argmax())
    return None


@dataclass
class Job:
    """Rows on their way to a part; `turn` is their place in it."""

    document: dict[str, Any]
    token_ids: list[int]
    hidden_TSD: torch.Tensor
    event: Any
    turn: int


@dataclass
class OpenPart:
    """A part being written; `written` documents are in it, the rest of those `done` in `bad` or `loops`."""

    writer: StoreWriter
    turns: int = 0  # handed out
    done: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    digests: dict[int, tuple[int, int]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    looping: dict[int, str] = field(default_factory=dict)
    loops: dict[str, tuple[int, int]] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    committing: bool = False
    committed: bool = False


class Writers:
    """Threads that check rows and append them to their parts, fed by a queue bounded in bytes.

    Args:
        threads: how many.
        queue_bytes: bytes of states that may wait.
        max_loop_share: documents with more of their answers in loops are left out.
    """

    def __init__(self, threads: int, queue_bytes: int, max_loop_share: float = 1.0) -> None:
        self.queue_bytes, self.max_loop_share = queue_bytes, max_loop_share
        self.parts: dict[str, OpenPart] = {}
        self._queue: deque[tuple[OpenPart, Job]] = deque()
        self._waiting_bytes = 0
        lock = Lock()
        self._came = Condition(lock)  # a document is in the queue
        self._changed = Condition(lock)  # a document is done with
        for i in range(threads):
            Thread(target=self._work, name=f"layer61-writer-{i}", daemon=True).start()

    def open(
        self, name: str, store: str, contract: dict[str, Any], compression: str
    ) -> dict[str, Any] | None:
        """Open a part; None, or the error that `StoreWriter` raised, described."""
        try:
            self.parts[name] = OpenPart(StoreWriter(store, contract, part=name, compression=compression))
        except Exception as error:
            return describe(error)
        return None

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes fit; an empty queue takes a document of any size."""
        with self._changed:
            return not self._waiting_bytes or self._waiting_bytes + size <= self.queue_bytes

    def submit(
        self, name: str, document: dict[str, Any], token_ids: list[int], hidden: Any, event: Any = None
    ) -> None:
        """Hand over the states of a document.

        Args:
            name: its part.
            document: {"uid", "spans", "source", "held_out", "written"}: see `StoreConnector`.
            token_ids: T of them.
            hidden: [T, S, D], any floating dtype, in host memory.
            event: of the device, after which `hidden` holds them.
        """
        part = self.parts[name]
        with self._changed:
            self._waiting_bytes += hidden.nbytes
            self._queue.append((part, Job(document, token_ids, hidden, event, part.turns)))
            part.turns += 1
            self._came.notify()

    def state(self, name: str, expected: int) -> dict[str, Any] | None:
        """How a part stands: None while rows are being written or it is being committed.

        Args:
            name: the part.
            expected: documents that it is to have.

        Returns:
            what was found in it once all documents are there, with `committed` False; again with True, or
            with the `error`, when a commit is over.
        """
        part = self.parts[name]
        with self._changed:
            if part.done < expected or (part.committing and not part.committed and not part.error):
                return None
            return {
                "committed": part.committed,
                "digests": {} if part.committing else dict(part.digests),
                "bad": dict(part.bad),
                "looping": dict(part.looping),
                "loops": dict(part.loops),
                "error": part.error,
                "tokens": part.tokens,
                "bytes": part.bytes,
                "seconds": part.seconds,
            }

    def states(self, expected: dict[str, int]) -> dict[str, tuple[int, dict[str, Any] | None]]:
        """How parts stand, by name: documents whose rows were handed over so far, and what `state` says.

        Args:
            expected: documents that each is to have, by its name.
        """
        return {name: (self.parts[name].turns, self.state(name, n)) for name, n in expected.items()}

    def commit(self, name: str, rejected: dict[int, str]) -> None:
        """Begin to commit a part, with what is to be noted as left out; `state` says when it is done."""
        part = self.parts[name]
        part.committing = True
        Thread(target=self._commit, args=(part, rejected), name=f"layer61-commit-{name}", daemon=True).start()

    def close(self, name: str) -> None:
        """Forget a part; one that is not committed is thrown away."""
        part = self.parts.pop(name)
        if not part.committed:
            with self._changed:
                self._changed.wait_for(lambda: part.done == part.turns)
            with contextlib.suppress(Exception):  # the store may be away; `collect` clears what is left
                part.writer.discard()

    def _commit(self, part: OpenPart, rejected: dict[int, str]) -> None:
        started = time.monotonic()
        error = None
        try:
            for uid, reason in rejected.items():
                part.writer.reject(uid, reason)
            part.writer.commit()
        except BaseException as raised:
            error = describe(raised)
        with self._changed:
            part.seconds += time.monotonic() - started
            part.error, part.committed = error, error is None

    def _work(self) -> None:
        while True:
            with self._came:
                self._came.wait_for(lambda: self._queue)
                part, job = self._queue.popleft()
            started = time.monotonic()
            hidden, bad, looping, share = None, None, None, (0, 0)
            try:
                hidden, bad = self._check(job)
                share, looping = self._loops(job)
            except BaseException as error:
                bad = f"{type(error).__name__}: {error}"
            with self._changed:
                # jobs leave the queue in order, so the one whose turn it is always has a thread
                while part.done != job.turn:
                    self._changed.wait()
            uid = job.document["uid"]
            try:
                if hidden is None or bad:
                    part.bad[uid] = bad or "no state"
                elif looping:
                    part.looping[uid] = looping
                elif not part.error:
                    self._append(part, job, hidden)
                    source = job.document["source"]
                    before = part.loops.get(source, (0, 0))
                    part.loops[source] = before[0] + share[0], before[1] + share[1]
            except BaseException as error:
                part.error = part.error or describe(error)
            with self._changed:
                part.done += 1
                part.seconds += time.monotonic() - started
                self._waiting_bytes -= job.hidden_TSD.nbytes
                self._changed.notify_all()

    def _check(self, job: Job) -> tuple[torch.Tensor | None, str | None]:
        if job.event is not None:
            job.event.synchronize()
        hidden = job.hidden_TSD.to(torch.bfloat16)
        if len(hidden) != len(job.token_ids):
            return None, f"{len(hidden)} states for {len(job.token_ids)} tokens"
        place = _not_finite(hidden.contiguous().view(torch.uint16).numpy().reshape(-1))
        if place is not None:
            return None, f"the state of token {place // hidden[0].numel()} is not finite"
        return hidden, None

    def _loops(self, job: Job) -> tuple[tuple[int, int], str | None]:
        found, tokens = loop_share(np.asarray(job.token_ids), job.document["spans"])
        if job.document["written"] and tokens and found / tokens > self.max_loop_share:
            return (found, tokens), (
                f"{found / tokens:.0%} of the answer's tokens are in loops,"
                f" prompts.max_loop_share is {self.max_loop_share:g}"
            )
        return (found, tokens), None

    def _append(self, part: OpenPart, job: Job, hidden: torch.Tensor) -> None:
        mask = np.zeros(len(job.token_ids), np.uint8)
        for start, stop in job.document["spans"]:
            mask[start : len(mask) if stop is None else stop] = 1
        uid = job.document["uid"]
        part.writer.append(
            uid,
            np.asarray(job.token_ids, np.uint32),
            mask,
            hidden,
            source=job.document["source"],
            held_out=job.document["held_out"],
        )
        part.digests[uid] = (len(job.token_ids), digest(job.token_ids))
        part.tokens += len(job.token_ids)
        part.bytes += hidden.nbytes
