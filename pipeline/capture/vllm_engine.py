"""vLLM as the engine of a capture: it answers or prefills documents, and its workers store their states.

Its scheduler runs inside this process and steps only when asked, so the batches, and with them the rounding
of every state and the choice between two tokens that are nearly tied, follow from the block alone.

An answer ends with its end token, which is sampled last and so would never be an input of the target; a token
that has no state could not be stored. The engine is therefore told to go on behind the end token, and the
request is taken out as soon as one more token was sampled: that step computed the state of the end token.
What comes behind it is dropped by the connector. This costs one step of decoding a document.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from configs.contract import aux_layers
from configs.errors import CaptureError, revive
from configs.held_out import is_held_out, uid_group
from pipeline.capture import gpu
from pipeline.capture.engine import BlockResult, EngineSettings
from pipeline.prompts import Document

__all__ = ["Engine"]

CPU_KV_CACHE_BYTES = 1 << 30

CPU_SEQUENCES = 128

# calls of the engine without a document leaving the cache, each after a pause of one millisecond
IDLE_STEPS = 60_000


class Engine:
    """The engine and its driver; made in the child process only."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        from pipeline.capture.plugin import register

        register()
        gpu.refuse_data_parallel()
        self.settings = settings
        # one token behind the end token of the longest document
        length = settings.max_length + 2
        arguments: dict[str, Any] = {"dtype": "auto", "disable_log_stats": True}
        if current_platform.is_cpu():
            arguments |= {"max_num_seqs": CPU_SEQUENCES, "max_num_batched_tokens": max(4096, length)}
            arguments |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enforce_eager": True}
        elif settings.vllm.get("distributed_executor_backend") != "ray":  # its GPUs may be elsewhere
            gpu.wait_for_memory(lambda: gpu.free_shares(settings.tensor_parallel_size), settings.vllm)
        self.llm = LLM(
            **arguments
            | settings.vllm
            | {
                "model": settings.model,
                "max_model_len": length,
                "tensor_parallel_size": settings.tensor_parallel_size,
                "seed": settings.seed,
                "skip_tokenizer_init": True,
                "worker_extension_cls": "pipeline.capture.connector.CaptureWorker",
                "kv_transfer_config": {
                    "kv_connector": "StoreConnector",
                    "kv_connector_module_path": "pipeline.capture.connector",
                    "kv_role": "kv_producer",
                    "kv_connector_extra_config": {
                        "writer_threads": settings.writer_threads,
                        "queue_bytes": settings.queue_bytes,
                        "aux_layers": aux_layers(settings.contract),
                    },
                },
            }
        )
        self.engine = self.llm.llm_engine
        self.cudagraph_mode = self._call("layer61_cudagraph_mode")
        if not current_platform.is_cpu():
            gpu.require_cudagraphs(self.cudagraph_mode, settings.vllm)

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
            raise revive(refused, CaptureError)
        try:
            for document in documents:
                fields = {
                    "block": block,
                    "uid": document.uid,
                    "spans": [list(span) for span in document.spans],
                    "source": document.source,
                    "held_out": is_held_out(uid_group(document.uid), settings.held_out, settings.seed),
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
            raise revive(written["error"], CaptureError)
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
        from pipeline.capture.writers import digest

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
