"""What every engine does with the parts it is given: turns of conversations asked for, parts committed.

An engine adds how it computes. Its states go to `Writers`, in this process or in a worker's, and come into
the store in the order in which the documents were finished.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs.errors import BadStatesError, CaptureError
from configs.held_out import is_held_out, uid_group
from pipeline.capture.engine import EngineSettings, PartResult, Refused, too_many_bad
from pipeline.capture.writers import digest
from pipeline.prompts import Document, next_turn

__all__ = ["PATIENCE_S", "Asked", "Driver", "Taken"]

# how long the states of a document may take to reach the writers: longer than any retry of the store's
PATIENCE_S = 900.0


@dataclass
class Taken:
    """A part in the engine.

    Attributes:
        conversations: how many are not at their end yet.
        expected: number and digest of the tokens of each document that will be stored, and the uid of the
            conversation it belongs to, by its uid.
        rejected: documents known to be bad.
    """

    name: str
    documents: tuple[Document, ...]
    rejected: dict[int, str]
    conversations: int
    expected: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    committing: bool = False
    moved: tuple[int, float] = (-1, 0.0)  # rows that had been handed over, and when that was new


@dataclass
class Asked:
    """What the engine was asked for: a turn of a conversation.

    Attributes:
        root: uid of the conversation's first document.
        request: an engine's own name of it.
        seen: how many tokens of the answer were looked at.
    """

    taken: Taken | None
    document: Document
    root: int
    turn: int = 0
    request: str = ""
    seen: int = 0

    @property
    def name(self) -> str:
        """What the request is called here."""
        return f"{self.document.uid}.{self.turn}"


class Driver(ABC):
    """An engine's side of the calls; made in the child process only."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.cudagraph_mode: str | None = None  # of an engine that has CUDA graphs
        self._stop = frozenset(settings.turns.stop_ids)
        self._parts: dict[str, Taken] = {}
        self._later = 0  # documents that are in no open part yet
        self._steps, self._busy = 0, 0.0
        self._done = self._bad = 0

    @abstractmethod
    def _call(self, method: str, *args: Any) -> Any:
        """Call a method of the `Writers`, wherever they are."""

    @abstractmethod
    def _ask(self, asked: Asked) -> None:
        """Begin with a turn of a conversation; what is stored of it goes to its part."""

    @abstractmethod
    def step(self) -> tuple[tuple[int, int], list[PartResult | Refused]]:
        """Compute a little, and commit what is done.

        Returns:
            number and tokens of the documents that were finished, and the parts that were.

        Raises:
            BadStatesError: more than a few documents are bad.
            CaptureError: the engine gives no more states.
        """

    @abstractmethod
    def probe(self, ids: np.ndarray) -> np.ndarray:
        """States of one document as bf16 bits, uint16 [T, S, D], without storing them."""

    def experts(self) -> np.ndarray | None:
        """Experts that the routers chose for the last probe, ascending, int32 [layers, T, K].

        Only with `watch_routers`; None where the engine does not say.
        """
        return None

    def probe_rounded(self, ids: np.ndarray) -> np.ndarray | None:
        """As `probe`, with the output of each layer moved by a rounding to bf16; None where not built.

        How far it lies from `probe` says how far rounding carries in this target.
        """
        return None

    @property
    def busy(self) -> bool:
        """Whether there is anything to do but wait for more."""
        return bool(self._parts)

    def open(
        self, name: str, documents: Sequence[Document], rejected: dict[int, str], later: int = 0
    ) -> PartResult | Refused | None:
        """Take a part.

        Args:
            name: of the part.
            documents: what to answer or to prefill.
            rejected: documents of the part known to be bad, by uid, and why.
            later: documents of parts that are to come.

        Returns:
            None, or what became of the part if it is not taken: another process has committed it, or the
            store cannot be written.
        """
        settings = self.settings
        self._later = later
        refused = self._call("open", name, settings.store, settings.contract, settings.compression)
        if refused and refused["type"] == "PartExistsError":
            return PartResult(name, there=True)
        if refused:
            return Refused(name, refused)
        taken = Taken(name, tuple(documents), dict(rejected), len(documents))
        self._parts[name] = taken
        for document in documents:
            self._ask(Asked(taken, document, document.uid))
        return None

    def _fields(self, document: Document) -> dict[str, Any]:
        """What the writers are told about a document."""
        settings = self.settings
        return {
            "uid": document.uid,
            "spans": [list(span) for span in document.spans],
            "source": document.source,
            "held_out": bool(is_held_out(uid_group(document.uid), settings.held_out, settings.seed)),
            "written": bool(document.answer_tokens),
        }

    def _answered(self, asked: Asked, answer: Sequence[int]) -> tuple[bool, list[int]]:
        """Note a finished turn and ask for the next.

        Args:
            asked: the turn.
            answer: what the target wrote, as far as it has states; the end token may be anywhere in it.

        Returns:
            whether it was the last turn, and the tokens to be stored: none where a later turn holds them too.
        """
        taken, document, kept = asked.taken, asked.document, list(answer)
        assert taken is not None
        end = next((i + 1 for i, t in enumerate(kept) if t in self._stop), len(kept))
        following = next_turn(document, kept[:end], self.settings.turns) if document.answer_tokens else None
        ids: list[int] = []
        if following is None or document.turn_uids:
            ids = [*document.input_ids.tolist(), *kept[:end]]
            taken.expected[document.uid] = len(ids), digest(ids), asked.root
        if following is None:
            taken.conversations -= 1
        else:
            self._ask(Asked(taken, following, asked.root, asked.turn + 1))
        return following is None, ids

    def _look(self) -> list[PartResult | Refused]:
        """Look after the parts whose documents are all answered."""
        ripe = {t.name: len(t.expected) for t in self._parts.values() if not t.conversations}
        found = []
        for name, (rows, state) in (self._call("states", ripe) if ripe else {}).items():
            taken = self._parts[name]
            if state is not None:
                found += self._settle(taken, state)
            elif not taken.committing:
                self._watch(taken, rows)
        return found

    def _watch(self, taken: Taken, rows: int) -> None:
        """Raise when the states of a part's documents do not leave the cache any more."""
        if rows != taken.moved[0]:
            taken.moved = rows, time.monotonic()
        elif rows < len(taken.expected) and time.monotonic() - taken.moved[1] > PATIENCE_S:
            raise CaptureError(
                f"the engine gave the states of {rows} of {len(taken.expected)} documents and no more",
                f"see {self.settings.log}",
            )

    def _settle(self, taken: Taken, state: dict[str, Any]) -> list[PartResult | Refused]:
        """Commit a part whose rows are written, or report one that is committed or cannot be."""
        name = taken.name
        if state["error"] or state["committed"]:
            self._call("close", name)
            del self._parts[name]
            if state["error"] and state["error"]["type"] == "PartExistsError":
                return [PartResult(name, there=True)]
            if state["error"]:
                return [Refused(name, state["error"])]
            steps, busy, self._steps, self._busy = self._steps, self._busy, 0, 0.0
            return [
                PartResult(
                    name,
                    documents=len(taken.expected) - len(state["bad"]) - len(state["looping"]),
                    tokens=state["tokens"],
                    bytes=state["bytes"],
                    rejected=taken.rejected | state["bad"] | state["looping"],
                    bad=len(state["bad"]) + len(taken.rejected),
                    loops=state["loops"],
                    writer_seconds=state["seconds"],
                    steps=steps,
                    busy=busy,
                )
            ]
        swapped: dict[int, str] = {}
        for uid, (count, crc, root) in taken.expected.items():
            found = state["digests"].get(uid)
            if uid not in state["bad"] and uid not in state["looping"] and found != (count, crc):
                came = found[0] if found else 0
                swapped[root] = f"{came} tokens came back, expected {count}, or their ids differ"
        self._done += len(taken.expected)
        self._bad += len(state["bad"]) + len(swapped)
        if too_many_bad(self._bad, self._done, self.settings.max_bad_share):
            self._call("close", name)
            del self._parts[name]
            reason = next(iter((state["bad"] | swapped).values()), "none of this part")
            raise BadStatesError(
                f"{self._bad:,} of {self._done:,} documents came back wrong, more than dump.max_bad_share ="
                f" {self.settings.max_bad_share:g}; one of them: {reason}",
                f"the engine itself must be at fault, see {self.settings.log}",
            )
        if swapped:  # they are in the part already: it is written again without them
            self._call("close", name)
            del self._parts[name]
            rest = [d for d in taken.documents if d.uid not in swapped]
            refused = self.open(name, rest, taken.rejected | swapped, self._later)
            return [refused] if refused else []
        taken.committing = True
        self._call("commit", name, taken.rejected | state["bad"] | state["looping"])
        return []
