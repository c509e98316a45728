"""Packed batches of one rank, read ahead by threads into a ring of buffers that are never reallocated.

Shapes: T tokens of a batch, B documents, S states of a token, D width of a state.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from configs.errors import ConfigError, StoreError
from featurestore.order import Position, Step, plan, require_fit, steps_per_epoch
from featurestore.reader import FeatureStore

__all__ = ["Batch", "Loader"]

STATE_VERSION = 1
Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class Batch:
    """Documents of one rank's step, one after the other; its tensors are valid until the next `next()`.

    Attributes:
        input_ids: int64 [T].
        loss_mask: bool [T]; True where the target would have to produce the token.
        cu_seqlens: int32 [B + 1]; document b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        hidden: torch.bfloat16 [T, S, D].
        uids: uid of each document.
        epoch: epoch in which the step began.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    hidden: torch.Tensor
    uids: list[int]
    epoch: int


class _Buffers:
    """Memory of one batch; pages are touched here once, not in every step.

    torch aligns memory to 64 bytes; copies into memory that is not, such as numpy's, run at half the speed.
    """

    def __init__(self, capacity: int, states: int, width: int, pin: bool) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, pin_memory=pin)

        # one state of all tokens after the other, as the store holds them
        self.hidden = empty(states, capacity, width, dtype=torch.bfloat16).transpose(0, 1)
        self.input_ids = empty(capacity, dtype=torch.int64)
        self.loss_mask = empty(capacity, dtype=torch.bool)
        self.cu_seqlens = empty(capacity + 1, dtype=torch.int32)
        self.hidden_bits = self.hidden.view(torch.uint16).numpy()
        self.mask_bytes = self.loss_mask.view(torch.uint8).numpy()
        self.raw_ids = np.zeros(capacity, np.uint32)


class Loader:
    """Iterator over the packed batches of one rank.

    Every rank computes the same plan; no rank talks to another. The state is where all ranks stand, so it may
    be restored with another world size or token budget without repeating or skipping a document.

    Args:
        store: the store; its manifest version is part of the state.
        tokens_per_rank: most tokens of a batch.
        rank: this rank.
        world_size: number of ranks.
        seed: seed of the document order.
        split: `train`, `held_out` or `all`.
        threads: threads that read documents.
        ring: batches in memory: the one in use and those being read.
        pin: page-locked host memory, for copies to a GPU.
        epochs: stop after so many passes; the last step is then what is left, and a rank's share of it may be
            empty. None goes on for ever.
        states: which states of a token to read, in which order; all of them by default.

    Raises:
        ConfigError: a document is longer than `tokens_per_rank`, or the split is empty.
    """

    def __init__(
        self,
        store: FeatureStore,
        tokens_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        *,
        split: Split = "train",
        threads: int = 2,
        ring: int = 3,
        pin: bool = False,
        epochs: int | None = None,
        states: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}, world_size {world_size}", "ranks count from 0")
        if ring < 2 or threads < 1:
            raise ConfigError(f"a loader needs at least 2 buffers and 1 thread, not {ring} and {threads}")
        self.tokens_per_rank, self.rank, self.world_size = tokens_per_rank, rank, world_size
        self.seed, self.split, self.threads, self.ring, self.epochs = seed, split, threads, ring, epochs
        self._pin, self.states = pin, states
        self._ring: list[_Buffers] = []
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[Step, _Buffers, list[Future[None]]]] = deque()
        self._free: deque[_Buffers] = deque()
        self._held: _Buffers | None = None  # of the batch returned last
        self._plan: Iterator[Step] | None = None
        self.position = Position(0, 0)
        self._use(store)

    def _use(self, store: FeatureStore) -> None:
        self.store = store
        chosen = {
            "train": ~store.held_out,
            "held_out": store.held_out,
            "all": np.ones(len(store), bool),
        }
        if self.split not in chosen:
            raise ConfigError(f"split {self.split!r} is unknown", "use train, held_out or all")
        self._documents = np.flatnonzero(chosen[self.split])
        self._uid = store.uid[self._documents]
        self._length = store.length[self._documents]
        if len(self._uid) == 0:
            raise ConfigError(
                f"{store.url} has no documents in its {self.split} split", "see `layer61 store info`"
            )
        require_fit(self._length, self._uid, self.tokens_per_rank)

    def steps_per_epoch(self) -> int:
        """Steps that consume the first epoch; see `order.steps_per_epoch`."""
        return steps_per_epoch(
            self._uid,
            self._length,
            tokens_per_rank=self.tokens_per_rank,
            world_size=self.world_size,
            seed=self.seed,
        )

    # ------------------------------------------------------------ iteration

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next batch; the tensors of the previous one may be overwritten from now on."""
        if self._plan is None:
            self._start()
        if self._held is not None:
            self._free.append(self._held)
            self._held = None
        while self._free and self._submit():
            pass
        if not self._ahead:
            raise StopIteration
        step, buffers, futures = self._ahead.popleft()
        self._held = buffers
        try:
            for future in futures:
                future.result()
        except BaseException:
            self._ahead.appendleft((step, buffers, futures))
            self._drain()  # the next call begins with this step again
            raise
        self.position = step.after
        return self._batch(step, buffers)

    def _start(self) -> None:
        if not self._ring:
            states = self.store.states if self.states is None else len(self.states)
            shape = (self.tokens_per_rank, states, self.store.hidden_size)
            self._ring = [_Buffers(*shape, self._pin) for _ in range(self.ring)]
        self._free, self._held = deque(self._ring), None
        self._pool = self._pool or ThreadPoolExecutor(self.threads, thread_name_prefix="loader")
        self._plan = plan(
            self._uid,
            self._length,
            tokens_per_rank=self.tokens_per_rank,
            world_size=self.world_size,
            seed=self.seed,
            start=self.position,
            epochs=self.epochs,
        )

    def _submit(self) -> bool:
        assert self._plan is not None
        assert self._pool is not None
        step = next(self._plan, None)
        if step is None:
            return False
        buffers = self._free.popleft()
        numbers = step.bins[self.rank]
        ends = self._ends(numbers).tolist()
        documents = zip(self._documents[numbers].tolist(), ends[:-1], ends[1:], strict=True)
        # each thread takes the next document until none is left: few hand-overs between threads
        futures = [self._pool.submit(self._read, documents, buffers) for _ in range(self.threads)]
        self._ahead.append((step, buffers, futures))
        return True

    def _ends(self, numbers: list[int]) -> np.ndarray:
        """Where documents packed one after the other begin and end, int64 [B + 1]."""
        return np.concatenate([[0], np.cumsum(self._length[numbers], dtype=np.int64)])

    def _read(self, documents: Iterator[tuple[int, int, int]], buffers: _Buffers) -> None:
        for document, row, stop in documents:
            ids, mask = buffers.raw_ids[row:stop], buffers.mask_bytes[row:stop]
            self.store.read_into(
                document, 0, stop - row, ids, mask, buffers.hidden_bits[row:stop], self.states
            )

    def _batch(self, step: Step, buffers: _Buffers) -> Batch:
        numbers = step.bins[self.rank]
        ends = self._ends(numbers)
        tokens = int(ends[-1])
        # numpy: torch releases the GIL in every call, and the reading threads would take it
        buffers.input_ids.numpy()[:tokens] = buffers.raw_ids[:tokens]
        buffers.cu_seqlens.numpy()[: len(ends)] = ends
        return Batch(
            input_ids=buffers.input_ids[:tokens],
            loss_mask=buffers.loss_mask[:tokens],
            cu_seqlens=buffers.cu_seqlens[: len(ends)],
            hidden=buffers.hidden[:tokens],
            uids=self._uid[numbers].tolist(),
            epoch=step.before.epoch,
        )

    def _drain(self) -> None:
        """Forget what was read ahead; waits for reads in progress, which still fill their buffers."""
        for _, _, futures in self._ahead:
            for future in futures:
                if not future.cancel():
                    future.exception()
        self._ahead.clear()
        self._plan = None

    def close(self) -> None:
        """Stop the threads and free the buffers; the loader may be iterated again."""
        self._drain()
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._ring = None, []

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Where all ranks stand after the batch returned last: plain numbers and strings."""
        return {
            "version": STATE_VERSION,
            "manifest": self.store.version,
            "seed": self.seed,
            "split": self.split,
            "epoch": self.position.epoch,
            "consumed": self.position.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, in the manifest version it was taken in.

        World size and token budget may differ from those of the state.

        Raises:
            StoreError: the state is of another format, seed or split, or its manifest version is gone.
        """
        if state.get("version") != STATE_VERSION:
            raise StoreError(
                f"loader state has version {state.get('version')!r}, not {STATE_VERSION}",
                "resume with the program that wrote the checkpoint",
            )
        for key in ("manifest", "epoch", "consumed"):
            if type(state.get(key)) is not int or state[key] < 0:
                raise StoreError(
                    f"loader state has {key} {state.get(key)!r}, not a whole number",
                    "it is damaged; resume from an older checkpoint",
                )
        for key, mine in (("seed", self.seed), ("split", self.split)):
            if state.get(key) != mine:
                raise StoreError(
                    f"loader state was taken with {key} {state.get(key)!r}, not {mine!r}",
                    f"start with the same {key}, or without the state",
                )
        before, store = self.store, self.store.at(state["manifest"])
        self._drain()
        try:
            self._use(store)
            if state["consumed"] > len(self._uid):
                raise StoreError(
                    f"loader state stands at document {state['consumed']} of {len(self._uid)}",
                    "it is of another store; resume with the store that the checkpoint was trained on",
                )
        except BaseException:
            self._use(before)
            raise
        self.position = Position(state["epoch"], state["consumed"])
