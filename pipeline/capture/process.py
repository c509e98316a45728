"""An engine in a process of its own: its output goes to a log, and it ends with whoever started it."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import cuda

from configs.errors import CaptureError, describe, revive
from pipeline import child
from pipeline.capture.engine import BlockResult, EngineSettings
from pipeline.capture.plugin import CAPTURE_VARIABLE
from pipeline.prompts import Document

__all__ = ["CLOSE_SECONDS", "ENVIRONMENT", "Capture"]

# an engine that is asked to end takes about a second
CLOSE_SECONDS = 20.0


def _serve(settings: EngineSettings, connection: Connection) -> None:
    """Body of the engine's process: answers calls until the connection ends."""
    child.enter(settings.log, append=True)
    try:
        from pipeline.capture.vllm_engine import Engine

        engine = Engine(settings)
    except BaseException as error:
        connection.send(("error", describe(error)))
        return
    connection.send(("ready", engine.cudagraph_mode))
    with contextlib.suppress(EOFError):
        while True:
            method, args = connection.recv()
            try:
                if method == "block":
                    name, documents = args
                    result: Any = engine.run_block(
                        name, documents, lambda tokens: connection.send(("progress", tokens))
                    )
                else:
                    result = engine.probe(*args)
            except BaseException as error:
                connection.send(("error", describe(error)))
            else:
                connection.send(("result", result))


# Read when the process starts, before any of our code runs in it; what the user has set wins.
ENVIRONMENT = {
    CAPTURE_VARIABLE: "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# On CPU the barriers of OpenMP stall where its threads, the scheduler and the writers want more cores than
# there are; for workers beside GPUs vLLM chooses the number itself.
CPU_ENVIRONMENT = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}


class Capture:
    """Handle of an engine in a process of its own.

    Raises:
        CaptureError: the engine does not start, or ends; names its log.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._connection, theirs = multiprocessing.Pipe()
        Path(settings.log).parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        environment = ENVIRONMENT | ({} if cuda.is_available() else CPU_ENVIRONMENT)
        self._process = child.start(_serve, (settings, theirs), "layer61-engine", environment)
        theirs.close()
        try:
            self.cudagraph_mode = self._answer(lambda tokens: None)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.monotonic() - started

    def _answer(self, progress: Callable[[int], None]) -> Any:
        while True:
            try:
                kind, value = self._connection.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                raise CaptureError(
                    f"the engine ended (exit code {self._process.exitcode}) before its answer",
                    f"see {self.settings.log}",
                ) from None
            if kind == "progress":
                progress(value)
            elif kind == "error":
                if value["trace"]:
                    raise CaptureError(f"the engine failed: {value['message']}", f"see {self.settings.log}")
                raise revive(value, CaptureError)
            else:
                return value

    def run_block(
        self, block: str, documents: Sequence[Document], progress: Callable[[int], None] = lambda tokens: None
    ) -> BlockResult:
        """Capture the documents of a block into its part and commit it.

        Args:
            block: name of the part.
            documents: what to answer or to prefill.
            progress: called with the tokens of each document that is finished.

        Raises:
            PartExistsError: another process committed the part first.
            CaptureError: the engine failed, or a state is missing, not finite, or of another token.
            StoreError: the part cannot be written.
        """
        self._connection.send(("block", (block, documents)))
        return self._answer(progress)

    def probe(self, ids: np.ndarray) -> np.ndarray:
        """States of one document, bf16 bits as uint16 [T, S, D]; nothing is stored."""
        self._connection.send(("probe", (ids,)))
        return self._answer(lambda tokens: None)

    def close(self, patience_s: float = 0) -> None:
        """End the engine's process; what it had not committed is lost."""
        self._connection.close()
        child.end(self._process, wait_s=patience_s)

    def __enter__(self) -> "Capture":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(CLOSE_SECONDS if kind is None else 0)
