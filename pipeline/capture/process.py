"""An engine in a process of its own: its output goes to a log, and it ends with whoever started it."""

import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import cuda

from configs.errors import CaptureError, describe, revive
from configs.importing import importing
from pipeline import child
from pipeline.capture.driver import Driver
from pipeline.capture.engine import EngineSettings
from pipeline.capture.plugin import CAPTURE_VARIABLE
from pipeline.parts import Part

__all__ = ["CLOSE_SECONDS", "ENVIRONMENT", "Capture"]

# an engine that is asked to end takes about a second
CLOSE_SECONDS = 20.0


def _serve(settings: EngineSettings, connection: Connection) -> None:
    """Body of the engine's process: answers calls until the connection ends."""
    child.enter(settings.log, append=True)
    try:
        engine = _engine(settings)
    except BaseException as error:
        connection.send(("error", describe(error)))
        return
    connection.send(("ready", engine.cudagraph_mode))
    try:
        _drive(engine, connection)
    except EOFError:  # the driver wants no more
        return
    except BaseException as error:
        connection.send(("error", describe(error)))


def _engine(settings: EngineSettings) -> Driver:
    # neither needs the other to be installed
    if settings.engine == "transformers":
        with importing():
            from pipeline.capture import transformers_engine

        return transformers_engine.Engine(settings)
    with importing():
        from pipeline.capture import vllm_engine

    return vllm_engine.Engine(settings)


def _drive(engine: Driver, connection: Connection) -> None:
    """Step the engine, taking what is sent to it in between; a step that fails ends it."""
    while True:
        while connection.poll(0 if engine.busy else None):
            method, args = connection.recv()
            if method != "open":
                connection.send((method, getattr(engine, method)(*args)))
                continue
            if (refused := engine.open(*args)) is not None:
                connection.send(("part", refused))
        finished, ended = engine.step()
        if finished[0]:
            connection.send(("progress", finished))
        for part in ended:
            connection.send(("part", part))


# Read when the process starts, before any of our code runs in it; what the user has set wins.
ENVIRONMENT = {
    CAPTURE_VARIABLE: "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# On CPU the barriers of OpenMP stall where its threads, the scheduler and the writers want more cores than
# there are; for workers beside GPUs vLLM chooses the number itself. And glibc would give the memory of every
# large tensor back to the system and ask for it anew, a page at a time: half of a wide model's time.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}


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
        environment = {} if settings.engine == "transformers" else ENVIRONMENT
        if environment and not cuda.is_available():
            environment = environment | CPU_ENVIRONMENT
        self._process = child.start(_serve, (settings, theirs), "layer61-engine", environment)
        theirs.close()
        try:
            self.cudagraph_mode = self.receive()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.monotonic() - started

    def receive(self) -> Any:
        """The next thing the engine has to say: documents that are done, a part that is, or an answer.

        Returns:
            tuple: number and tokens of documents that were finished. PartResult: a part that is committed.
            Refused: one that the store would not take. Otherwise the answer of the one call under way.

        Raises:
            BadStatesError: more than a few documents came back wrong.
            CaptureError: the engine failed or ended; parts that were under way are left to do.
            ContractError: a part does not belong to the store.
        """
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise CaptureError(
                f"the engine ended (exit code {self._process.exitcode}) before its answer",
                f"see {self.settings.log}",
            ) from None
        if kind == "error":
            if value["trace"]:
                raise CaptureError(f"the engine failed: {value['message']}", f"see {self.settings.log}")
            raise revive(value, CaptureError)
        return value

    def submit(self, part: Part, later: int = 0) -> None:
        """Let the engine take a part, beside those that it has; `receive` says when it is done.

        Args:
            part: what to capture.
            later: documents of parts that are to come, which says whether the engine could be busier.
        """
        self._send("open", part.name, part.documents, part.rejected, later)

    def probe(self, ids: np.ndarray) -> np.ndarray:
        """States of one document, bf16 bits as uint16 [T, S, D]; nothing is stored, no part may be open."""
        self._send("probe", ids)
        return self.receive()

    def experts(self) -> np.ndarray | None:
        """What the routers chose for the document of the last probe: see `Driver.experts`."""
        self._send("experts")
        return self.receive()

    def probe_rounded(self, ids: np.ndarray) -> np.ndarray | None:
        """The same with roundings added, after `experts`: see `Driver.probe_rounded`."""
        self._send("probe_rounded", ids)
        return self.receive()

    def _send(self, method: str, *args: Any) -> None:
        # an engine that is gone is noticed when its answer is missing
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((method, args))

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
