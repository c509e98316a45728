"""An engine that makes up states, in this process: everything of a dump is real but the model."""

import time
from collections import deque
from typing import Any, ClassVar

import numpy as np
import torch

from configs.errors import CaptureError
from pipeline.capture.engine import EngineSettings, PartResult, Refused
from pipeline.capture.writers import Writers
from pipeline.parts import Part
from pipeline.prompts import Document

__all__ = ["GeneratedCapture", "answer_of", "states_of"]


def answer_of(document: Document) -> list[int]:
    """Tokens that follow a document's prompt: a function of its uid."""
    random = np.random.default_rng(document.uid)
    return random.integers(3, 200, min(document.answer_tokens, 12)).tolist()


def states_of(uid: int, tokens: int, width: int) -> torch.Tensor:
    """bf16 [T, 1, D]: a function of the uid."""
    random = np.random.default_rng([uid, tokens])
    return torch.from_numpy(random.standard_normal((tokens, 1, width), np.float32)).bfloat16()


class GeneratedCapture:
    """As `pipeline.capture.process.Capture`.

    Attributes:
        taken: uids of the documents asked for, over all engines of a test.
        bad: uids whose states are not finite.
        deaths: how many engines die, at their part number `dies_at`.
    """

    taken: ClassVar[list[int]] = []
    bad: ClassVar[set[int]] = set()
    deaths, dies_at = 0, 2

    def __init__(self, settings: EngineSettings) -> None:
        self.settings, self.start_seconds, self.cudagraph_mode = settings, 0.0, "NONE"
        self._writers = Writers(settings.writer_threads, settings.queue_bytes, settings.max_loop_share)
        self._said: deque[Any] = deque()
        self._parts = 0

    def submit(self, part: Part, later: int = 0) -> None:
        """Write the part at once; `receive` says so afterwards."""
        self._parts += 1
        kind = type(self)
        if self._parts == kind.dies_at and kind.deaths:
            kind.deaths -= 1
            self._said.append(CaptureError("the engine ended (exit code -9) before its answer"))
            return
        writers, settings = self._writers, self.settings
        writers.open(part.name, settings.store, settings.contract, settings.compression)
        for document in part.documents:
            ids = document.input_ids.tolist() + answer_of(document)
            states = states_of(document.uid, len(ids), settings.contract["target"]["hidden_size"])
            if document.uid in kind.bad:
                states[1] = float("nan")
            kind.taken.append(document.uid)
            fields = {"uid": document.uid, "spans": document.spans, "source": document.source}
            fields |= {"held_out": False, "written": bool(document.answer_tokens)}
            writers.submit(part.name, fields, ids, states)
        self._said.append(part)

    def receive(self) -> PartResult | Refused:
        """Commit the oldest part."""
        part = self._said.popleft()
        if isinstance(part, CaptureError):
            raise part
        writers = self._writers
        state = self._state(part)
        rejected = part.rejected | state["bad"] | state["looping"]
        writers.commit(part.name, rejected)
        state = self._state(part)
        writers.close(part.name)
        if state["error"]:
            return Refused(part.name, state["error"])
        return PartResult(
            part.name,
            documents=len(part.documents) - len(state["bad"]) - len(state["looping"]),
            tokens=state["tokens"],
            bytes=state["bytes"],
            rejected=rejected,
            bad=len(state["bad"]),
            loops=state["loops"],
        )

    def _state(self, part: Part) -> dict[str, Any]:
        """How a part stands, once its writers are through."""
        while (state := self._writers.state(part.name, len(part.documents))) is None:
            # one that never pauses takes the cores that the writers want
            time.sleep(0.001)
        return state

    def close(self, patience_s: float = 0) -> None:
        """Nothing to end."""
