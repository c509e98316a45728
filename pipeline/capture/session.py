"""One engine for many parts; a dead one is replaced, and a store that is away is waited for."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from configs.errors import BadStatesError, CaptureError, StoreError, revive
from configs.progress import log
from pipeline.capture.engine import EngineSettings, PartResult, Refused
from pipeline.capture.probe import compare_with_first_start
from pipeline.capture.process import Capture
from pipeline.parts import Part

__all__ = ["Session"]

# failures of the engine with no part committed in between
ATTEMPTS = 2
# a store that cannot be written is tried again after a while, twice as long each time, up to an hour in all
FIRST_WAIT_S, LONGEST_WAIT_S, STORE_PATIENCE_S = 1.0, 60.0, 3600.0


class Session:
    """One engine for many parts, started when the first one needs it and again after a failure.

    Args:
        settings: the engine's.
        probe: file of the probe's states, with which each start is compared; None to leave that out.
        probe_ids: uint32 [T], the probe's document.
    """

    def __init__(self, settings: EngineSettings, probe: Path | None, probe_ids: np.ndarray) -> None:
        self.settings, self._probe, self._probe_ids = settings, probe, probe_ids
        self._capture: Capture | None = None
        self.start_seconds = 0.0
        self.ready = time.monotonic()

    def _engine(self) -> Capture:
        if self._capture is None:
            self._capture = Capture(self.settings)
            graphs = self._capture.cudagraph_mode
            log("dump", "the engine is ready" + (f", CUDA graphs: {graphs}" if graphs else ""))
            self.start_seconds += self._capture.start_seconds
            if self._probe is not None:
                compare_with_first_start(self._capture, self._probe, self._probe_ids)
            self.ready = time.monotonic()
        return self._capture

    def start(self) -> float:
        """Start the engine now, before a part needs it; the seconds all its starts took."""
        self._engine()
        return self.start_seconds

    def run(
        self,
        parts: Iterable[Part],
        progress: Callable[[int, int], None] = lambda documents, tokens: None,
        later: Callable[[], int] = lambda: 0,
    ) -> Iterator[PartResult]:
        """Capture and commit parts, `open_parts` of them at a time, and yield each when it is committed.

        The documents of a part whose engine dies, or which the store does not take, are taken again.

        Args:
            parts: asked for the next one when there is room for it.
            progress: called with the number and the tokens of documents that are finished.
            later: how many documents of `parts` are still to come.

        Raises:
            BadStatesError: more than a few documents came back wrong.
            CaptureError: the engine failed again before it committed anything.
            StoreError: the store could not be written for an hour.
        """
        source = iter(parts)
        taken: dict[str, Part] = {}
        again: deque[Part] = deque()
        failures, wait_s, away_since = 0, FIRST_WAIT_S, 0.0
        while True:
            engine = self._engine()
            while len(taken) < self.settings.open_parts:
                part = again.popleft() if again else next(source, None)
                if part is None:
                    break
                taken[part.name] = part
                engine.submit(part, later())
            if not taken:
                return
            try:
                found = engine.receive()
            except BadStatesError:
                raise
            except CaptureError as error:
                self.close()
                failures += 1
                if failures == ATTEMPTS:
                    raise
                log("dump", f"{len(taken)} open parts failed and are taken again: {error.message}")
                again.extendleft(reversed(taken.values()))
                taken.clear()
                continue
            if isinstance(found, tuple):
                progress(*found)
            elif isinstance(found, Refused):
                refused = revive(found.error, StoreError)
                away_since = away_since or time.monotonic()
                if type(refused) is not StoreError or time.monotonic() - away_since > STORE_PATIENCE_S:
                    raise refused
                log("dump", f"part {found.name} is taken again in {wait_s:.0f} s: {refused.message}")
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                again.append(taken.pop(found.name))
            else:
                if found.there:
                    log("dump", f"part {found.name} was committed by another process: kept")
                else:
                    failures, wait_s, away_since = 0, FIRST_WAIT_S, 0.0
                del taken[found.name]
                yield found

    def close(self, patience_s: float = 0) -> None:
        """End the engine, with time to clear up after itself where nothing went wrong."""
        if self._capture is not None:
            self._capture.close(patience_s)
            self._capture = None
