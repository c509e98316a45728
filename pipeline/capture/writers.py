"""Threads that check a document's states and append them to the open part of the store; no engine in it.

Whoever computes states hands them over here, so that every engine gets the same checks.

Legend: T tokens of a document, S states of a token, D width of a state.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

import numpy as np
import torch
from awscrt.checksums import crc32c

from configs.errors import describe
from featurestore import StoreWriter

__all__ = ["OpenPart", "Writers", "digest"]


def digest(token_ids: Any) -> int:
    """crc32c of token ids as little-endian uint32, by which driver and worker compare what they hold."""
    return crc32c(np.asarray(token_ids, "<u4").tobytes())


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
    writer: StoreWriter
    turns: int = 0  # handed out
    done: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    digests: dict[int, tuple[int, int]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    error: dict[str, Any] | None = None


class Writers:
    """Threads that check rows and append them to their parts, fed by a queue bounded in bytes."""

    def __init__(self, threads: int, queue_bytes: int) -> None:
        self.queue_bytes = queue_bytes
        self.parts: dict[str, OpenPart] = {}
        self._queue: deque[tuple[OpenPart, Job]] = deque()
        self._waiting_bytes = 0
        self._changed = Condition()
        for i in range(threads):
            Thread(target=self._work, name=f"layer61-writer-{i}", daemon=True).start()

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes fit; an empty queue takes a document of any size."""
        with self._changed:
            return not self._waiting_bytes or self._waiting_bytes + size <= self.queue_bytes

    def submit(
        self, block: str, document: dict[str, Any], token_ids: list[int], hidden: Any, event: Any
    ) -> None:
        part = self.parts[block]
        with self._changed:
            self._waiting_bytes += hidden.nbytes
            self._queue.append((part, Job(document, token_ids, hidden, event, part.turns)))
            part.turns += 1
            self._changed.notify_all()

    def wait(self, part: OpenPart) -> None:
        """Block until every job of a part is done."""
        with self._changed:
            self._changed.wait_for(lambda: part.done == part.turns)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                part, job = self._queue.popleft()
            started = time.monotonic()
            try:
                hidden, failure = self._check(job)
            except BaseException as error:
                hidden, failure = None, f"{type(error).__name__}: {error}"
            with self._changed:
                # jobs leave the queue in order, so the one whose turn it is always has a thread
                while part.done != job.turn:
                    self._changed.wait()
            try:
                self._append(part, job, hidden, failure)
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
        finite_T = hidden.isfinite().all(-1).all(-1)
        if not finite_T.all():
            return None, f"the state of token {int(finite_T.long().argmin())} is not finite"
        return hidden, None

    def _append(self, part: OpenPart, job: Job, hidden: torch.Tensor | None, failure: str | None) -> None:
        uid = job.document["uid"]
        if hidden is None:
            part.failures[uid] = failure or "no state"
            return
        if part.error:
            return
        mask = np.zeros(len(job.token_ids), np.uint8)
        for start, stop in job.document["spans"]:
            mask[start : len(mask) if stop is None else stop] = 1
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
