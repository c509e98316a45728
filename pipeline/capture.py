"""Runs the target in vLLM and sends the state of every token to the feature store.

The engine lives in a process of its own, whose output goes to a log, and ends with the process that started
it. Its scheduler runs inside that process and steps only when asked, so the batches, and with them the
rounding of every state and the choice between two tokens that are nearly tied, follow from the block alone.

An answer ends with its end token, which is sampled last and so would never be an input of the target; a token
that has no state could not be stored. The engine is therefore told to go on behind the end token, and the
request is taken out as soon as one more token was sampled: that step computed the state of the end token.
What comes behind it is dropped by the connector. This costs one step of decoding a document.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from configs import errors
from configs.errors import CaptureError
from pipeline import child
from pipeline.prompts import Document
from pipeline.vllm_plugin import CAPTURE_VARIABLE

__all__ = ["BlockResult", "Capture", "EngineSettings"]

CPU_KV_CACHE_BYTES = 1 << 30
CPU_SEQUENCES = 128
# calls of the engine without a document leaving the cache, each after a pause of one millisecond
IDLE_STEPS = 60_000
# an engine that is asked to end takes about a second
CLOSE_SECONDS = 20.0


@dataclass(frozen=True)
class EngineSettings:
    """What the engine's process has to know; plain data."""

    model: str
    max_length: int
    tensor_parallel_size: int
    seed: int
    stop_ids: tuple[int, ...]
    store: str
    contract: dict[str, Any]
    compression: str
    writer_threads: int
    queue_bytes: int
    log: str
    vllm: dict[str, Any]


@dataclass(frozen=True)
class BlockResult:
    """What a committed block holds: documents, tokens, bytes of states, and seconds of engine and writers."""

    documents: int
    tokens: int
    bytes: int
    seconds: float
    writer_seconds: float


class Engine:
    """The engine and its driver; made in the child process only."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        from pipeline.vllm_plugin import register

        register()
        self.settings = settings
        # one token behind the end token of the longest document
        length = settings.max_length + 2
        arguments: dict[str, Any] = {"dtype": "auto", "disable_log_stats": True}
        if current_platform.is_cpu():
            arguments |= {"max_num_seqs": CPU_SEQUENCES, "max_num_batched_tokens": max(4096, length)}
            arguments |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enforce_eager": True}
        self.llm = LLM(
            **arguments
            | settings.vllm
            | {
                "model": settings.model,
                "max_model_len": length,
                "tensor_parallel_size": settings.tensor_parallel_size,
                "seed": settings.seed,
                "skip_tokenizer_init": True,
                "worker_extension_cls": "pipeline.connector.CaptureWorker",
                "kv_transfer_config": {
                    "kv_connector": "StoreConnector",
                    "kv_connector_module_path": "pipeline.connector",
                    "kv_role": "kv_producer",
                    "kv_connector_extra_config": {
                        "writer_threads": settings.writer_threads,
                        "queue_bytes": settings.queue_bytes,
                    },
                },
            }
        )
        self.engine = self.llm.llm_engine

    def _call(self, method: str, *args: Any) -> Any:
        """Call every worker; the answer of the one that writes."""
        answers = [a for a in self.engine.collective_rpc(method, args=args) if a is not None]
        return answers[0] if answers else None

    def _add(self, name: str, ids: np.ndarray, most: int, document: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=most,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": {"layer61": document}},
        )
        self.engine.add_request(name, TokensPrompt(prompt_token_ids=ids.tolist()), sampling)

    def _generate(self, progress: Callable[[str, int], None]) -> dict[str, list[int]]:
        """Step until every request is finished or taken out; the tokens sampled for each."""
        stop = set(self.settings.stop_ids)
        sampled: dict[str, list[int]] = {}
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            if not outputs:
                # every block is held back for the writers, which need this process's time
                time.sleep(1e-3)
            for output in outputs:
                tokens = sampled.setdefault(output.request_id, [])
                tokens += output.outputs[0].token_ids  # type: ignore[union-attr, index]
                done = output.finished
                if not done and any(t in stop for t in tokens[:-1]):
                    self.engine.abort_request([output.request_id])
                    done = True
                if done:
                    progress(output.request_id, len(tokens))
        return sampled

    def _drain(self, count: Callable[[], int], expected: int) -> None:
        """Step until the connector has copied the states of every request."""
        idle, last = 0, -1
        while (now := count()) < expected:
            idle, last = (0, now) if now != last else (idle + 1, last)
            if idle > IDLE_STEPS:
                raise CaptureError(
                    f"the engine gave the states of {now} of {expected} documents and no more",
                    f"see {self.settings.log}",
                )
            self.engine.step()
            time.sleep(1e-3)

    def run_block(
        self, block: str, documents: Sequence[Document], progress: Callable[[int], None]
    ) -> BlockResult:
        """Answer or prefill the documents of a block and commit its part.

        Raises:
            CaptureError: a document came back with other ids, without a state for each token, or not finite.
            StoreError: the part cannot be written.
        """
        started = time.monotonic()
        settings = self.settings
        refused = self._call("layer61_open", block, settings.store, settings.contract, settings.compression)
        if refused:
            _raise(refused)
        try:
            for document in documents:
                fields = {
                    "block": block,
                    "uid": document.uid,
                    "spans": [list(span) for span in document.spans],
                    "source": document.source,
                    "held_out": document.held_out,
                    "stop": list(settings.stop_ids) if document.answer_tokens else [],
                }
                self._add(str(document.uid), document.input_ids, document.answer_tokens + 1, fields)
            sizes = {str(d.uid): len(d.input_ids) for d in documents}
            sampled = self._generate(lambda name, count: progress(sizes[name] + count - 1))
            self._drain(lambda: self._call("layer61_count", block), len(documents))
        except BaseException:
            with contextlib.suppress(Exception):
                self._call("layer61_close", block, None)
            raise
        expected = {d.uid: self._expected(d, sampled[str(d.uid)]) for d in documents}
        written = self._call("layer61_close", block, expected)
        if written["error"]:
            _raise(written["error"])
        if written["failures"]:
            uid, reason = next(iter(written["failures"].items()))
            place = next(f"{d.source} line {d.line}" for d in documents if d.uid == uid)
            raise CaptureError(
                f"{len(written['failures'])} of {len(documents)} documents of block {block} came back wrong;"
                f" the first, {place}: {reason}",
                f"see {settings.log}",
            )
        return BlockResult(
            len(documents),
            written["tokens"],
            written["bytes"],
            time.monotonic() - started,
            written["seconds"],
        )

    def _expected(self, document: Document, sampled: list[int]) -> tuple[int, int]:
        """Number and digest of the tokens that must have been stored."""
        from pipeline.connector import digest

        kept = sampled[:-1] if document.answer_tokens else []
        stop = set(self.settings.stop_ids)
        end = next((i + 1 for i, t in enumerate(kept) if t in stop), len(kept))
        ids = [*document.input_ids.tolist(), *kept[:end]]
        return len(ids), digest(ids)

    def probe(self, ids: np.ndarray) -> np.ndarray:
        """States of one document as bf16 bits, uint16 [T, S, D], without storing them."""
        self._add("probe", ids, 1, {"block": None, "uid": 0, "stop": []})
        self._generate(lambda name, count: None)
        found: list[Any] = []

        def count() -> int:
            found[:] = [a for a in [self._call("layer61_take", 0)] if a is not None]
            return len(found)

        self._drain(count, 1)
        return found[0]


def _raise(described: dict[str, Any]) -> None:
    """Raise again what a worker described."""
    kind = getattr(errors, described["type"], None)
    if described["type"] == "PartExistsError":
        from featurestore import PartExistsError

        kind = PartExistsError
    if kind is None:
        message = f"{described['message']}\n{described['trace']}".strip()
        raise CaptureError(f"writing failed: {message}")
    raise kind(described["message"], described["hint"])


def _serve(settings: EngineSettings, connection: Connection) -> None:
    """Body of the engine's process: answers calls until the connection ends."""
    child.enter(settings.log, append=True)
    try:
        engine = Engine(settings)
    except BaseException as error:
        connection.send(("error", _describe(error)))
        return
    connection.send(("ready", None))
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
                connection.send(("error", _describe(error)))
            else:
                connection.send(("result", result))


def _describe(error: BaseException) -> dict[str, Any]:
    from pipeline.connector import describe

    return describe(error)


# read when the process starts, before any of our code runs in it; what the user has set wins. On CPU, the
# barriers of OpenMP stall where its threads, the scheduler and the writers want more cores than there are.
ENVIRONMENT = {
    CAPTURE_VARIABLE: "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, for processes started inside."""
    added = {k: v for k, v in values.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class Capture:
    """Handle of an engine in a process of its own.

    Raises:
        CaptureError: the engine does not start, or ends; names its log.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        Path(settings.log).parent.mkdir(parents=True, exist_ok=True)
        self._process = context.Process(target=_serve, args=(settings, theirs), name="layer61-engine")
        started = time.monotonic()
        with _environment(ENVIRONMENT):
            self._process.start()
        theirs.close()
        try:
            self._answer(lambda tokens: None)
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
                _raise(value)
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
        self._process.join(patience_s)
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()

    def __enter__(self) -> "Capture":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(CLOSE_SECONDS if kind is None else 0)
