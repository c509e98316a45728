"""One engine for many blocks; a dead one is replaced."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.errors import CaptureError, PartExistsError
from configs.progress import log
from pipeline.blocks import Block
from pipeline.capture.engine import BlockResult, EngineSettings
from pipeline.capture.probe import compare_with_first_start
from pipeline.capture.process import Capture

__all__ = ["Session"]

ATTEMPTS = 2


class Session:
    """One engine for many blocks, started when the first one needs it and again after a failure.

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
            log("dump", f"the engine is ready, CUDA graphs: {self._capture.cudagraph_mode}")
            self.start_seconds += self._capture.start_seconds
            if self._probe is not None:
                compare_with_first_start(self._capture, self._probe, self._probe_ids)
            self.ready = time.monotonic()
        return self._capture

    def run(self, block: Block, progress: Callable[[int], None]) -> BlockResult | None:
        """Capture and commit a block, if need be again on a fresh engine; None if another was first."""
        engine = self._engine()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return engine.run_block(block.name, block.documents, progress)
            except PartExistsError:
                log("dump", f"block {block.name} was committed by another process: kept")
                return None
            except CaptureError as error:
                self.close()
                if attempt == ATTEMPTS:
                    raise
                log("dump", f"block {block.name} failed and is tried again: {error.message}")
                engine = self._engine()
        raise AssertionError("unreachable")

    def close(self, patience_s: float = 0) -> None:
        """End the engine, with time to clear up after itself where nothing went wrong."""
        if self._capture is not None:
            self._capture.close(patience_s)
            self._capture = None
