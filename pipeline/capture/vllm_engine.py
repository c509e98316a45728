"""vLLM as the engine of a capture: it answers or prefills documents, and its workers store their states.

Its scheduler runs inside this process and steps only when asked. While one part is taken at a time, the
batches, and with them the rounding of every state and the choice between two tokens that are nearly tied,
follow from that part alone. With several, the documents of the next parts take the places that come free, and
each part is committed while the engine goes on with the others.

An answer ends with its end token, which is sampled last and so would never be an input of the target; a token
that has no state could not be stored. The engine is therefore told to go on behind the end token, and the
request is taken out as soon as one more token was sampled: that step computed the state of the end token.
What comes behind it is dropped by the connector. This costs one step of decoding a document.
"""

import time
from typing import Any

import numpy as np

from configs.contract import aux_layers
from configs.errors import CaptureError
from pipeline.capture import gpu
from pipeline.capture.driver import PATIENCE_S, Asked, Driver
from pipeline.capture.engine import EngineSettings, PartResult, Refused
from pipeline.prompts import Document

__all__ = ["Engine"]

CPU_KV_CACHE_BYTES = 1 << 30

CPU_SEQUENCES = 128

# between two looks at parts whose documents are all answered, each of which asks every worker
LOOK_S = 0.005


class Engine(Driver):
    """The engine and its driver."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        from pipeline.capture.plugin import register

        register()
        gpu.refuse_data_parallel()
        super().__init__(settings)
        # one token behind the end token of the longest document
        length = settings.turns.max_length + 2
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
                        "max_loop_share": settings.max_loop_share,
                        "aux_layers": aux_layers(settings.contract),
                    },
                },
            }
        )
        self.engine = self.llm.llm_engine
        self._core: Any = self.engine.engine_core.engine_core  # type: ignore[attr-defined]
        if not self.engine.vllm_config.cache_config.enable_prefix_caching:
            # hashes of all tokens are for connectors that look blocks up; ours does not
            self._core.request_block_hasher = None
        self.slots: int = self.engine.vllm_config.scheduler_config.max_num_seqs
        self._asked: dict[str, Asked] = {}
        self._requests: dict[str, Asked] = {}  # the same, by the engine's own names
        self._looked, self._probed = 0.0, 0
        if settings.watch_routers:
            self._call("watch_routers")
        self.cudagraph_mode = self._call("cudagraph_mode")
        if not current_platform.is_cpu():
            gpu.require_cudagraphs(self.cudagraph_mode, settings.vllm)

    def _call(self, method: str, *args: Any) -> Any:
        """Call every worker; the answer of the one that writes."""
        answers = self.engine.collective_rpc(f"layer61_{method}", args=args)
        answers = [a for a in answers if a is not None]
        return answers[0] if answers else None

    def _ask(self, asked: Asked) -> None:
        settings, document = self.settings, asked.document
        assert asked.taken is not None
        goes_on = None
        if document.turns and not document.turn_uids:
            goes_on = settings.turns.max_length - len(document.turns[0]) - 1
        fields = self._fields(document) | {
            "part": asked.taken.name,
            "stop": list(self._stop) if document.answer_tokens else [],
            "goes_on": goes_on,
        }
        self._add(asked, fields)

    def _add(self, asked: Asked, fields: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        settings, document = self.settings, asked.document
        greedy = settings.temperature == 0
        sampling = SamplingParams(
            temperature=settings.temperature,
            top_p=1.0 if greedy else settings.top_p,
            # of the document, so that an answer does not depend on the order of documents
            seed=None if greedy else (document.uid + asked.turn) & (1 << 63) - 1,
            max_tokens=document.answer_tokens + 1,
            ignore_eos=True,
            detokenize=False,
            # an object for every token of every request would cost more than the rest of this class
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {"layer61": fields}},
        )
        prompt = TokensPrompt(prompt_token_ids=document.input_ids.tolist())
        asked.request = self.engine.add_request(asked.name, prompt, sampling)
        self._asked[asked.name] = self._requests[asked.request] = asked

    def step(self) -> tuple[tuple[int, int], list[PartResult | Refused]]:
        """Step the engine once; as `Driver.step`."""
        unfinished = self.engine.get_num_unfinished_requests()
        ended = {o.request_id: o.outputs[0].token_ids for o in self.engine.step()}  # type: ignore[union-attr, index]
        running = list(self._core.scheduler.running)
        if not running and not ended:
            # every block is held back for the writers, which need this process's time
            time.sleep(1e-3)
        at_end = []
        for request in running:
            asked = self._requests[request.request_id]
            count = request.num_output_tokens
            # the newest token has no state yet
            if not self._stop.isdisjoint(request.output_token_ids[max(asked.seen - 1, 0) : count - 1]):
                at_end.append(request.request_id)
                ended[asked.name] = list(request.output_token_ids)
            asked.seen = count
        if at_end:
            self.engine.abort_request(at_end, internal=True)
        finished = tokens = 0
        for name, sampled in ended.items():
            asked = self._asked.pop(name)
            del self._requests[asked.request]
            if asked.taken is not None:
                last, stored = self._answered(asked, sampled[:-1] if asked.document.answer_tokens else [])
                finished, tokens = finished + last, tokens + len(stored)
        if unfinished:
            self._steps += 1
            at_work = len(running) - len(at_end) + len(ended)
            self._busy += min(1.0, at_work / min(self.slots, unfinished + self._later))
        return (finished, tokens), self._look()

    def _look(self) -> list[PartResult | Refused]:
        if time.monotonic() - self._looked < LOOK_S and self.engine.has_unfinished_requests():
            return []
        found = super()._look()
        self._looked = time.monotonic()
        return found

    def probe(self, ids: np.ndarray) -> np.ndarray:
        """As `Driver.probe`."""
        self._probed = len(ids)
        document = Document(0, ids, (), 0, "", 0, "", "")
        self._add(Asked(None, document, 0), {"part": None, "uid": 0, "stop": [], "goes_on": None})
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            self.step()
            states = self._call("take", 0)
            if states is not None:
                return states
        raise CaptureError("the engine gave no states of the probe document", f"see {self.settings.log}")

    def experts(self) -> np.ndarray | None:
        """As `Driver.experts`."""
        return self._call("experts", self._probed)
