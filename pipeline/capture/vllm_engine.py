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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs.contract import aux_layers
from configs.errors import BadStatesError, CaptureError
from configs.held_out import is_held_out, uid_group
from pipeline.capture import gpu
from pipeline.capture.engine import EngineSettings, PartResult, Refused, too_many_bad
from pipeline.capture.writers import digest
from pipeline.prompts import Document, next_turn

__all__ = ["Engine"]

CPU_KV_CACHE_BYTES = 1 << 30

CPU_SEQUENCES = 128

# how long the states of a document may take to leave the cache: longer than any retry of the store's
PATIENCE_S = 900.0
# between two looks at parts whose documents are all answered, each of which asks every worker
LOOK_S = 0.005


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
    moved: tuple[int, float] = (-1, 0.0)  # rows that had left the cache, and when that was new


@dataclass
class Asked:
    """A request in the engine: the turn of a conversation.

    Attributes:
        request: the engine's own name of it.
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
        self.slots: int = self.engine.vllm_config.scheduler_config.max_num_seqs
        self._stop = frozenset(settings.turns.stop_ids)
        self._parts: dict[str, Taken] = {}
        self._asked: dict[str, Asked] = {}
        self._requests: dict[str, Asked] = {}  # the same, by the engine's own names
        self._later = 0  # documents that are in no open part yet
        self._steps, self._busy = 0, 0.0
        self._done = self._bad = 0
        self._looked = 0.0
        self.cudagraph_mode = self._call("layer61_cudagraph_mode")
        if not current_platform.is_cpu():
            gpu.require_cudagraphs(self.cudagraph_mode, settings.vllm)

    def _call(self, method: str, *args: Any) -> Any:
        """Call every worker; the answer of the one that writes."""
        answers = [a for a in self.engine.collective_rpc(method, args=args) if a is not None]
        return answers[0] if answers else None

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
        refused = self._call("layer61_open", name, settings.store, settings.contract, settings.compression)
        if refused and refused["type"] == "PartExistsError":
            return PartResult(name, there=True)
        if refused:
            return Refused(name, refused)
        taken = Taken(name, tuple(documents), dict(rejected), len(documents))
        self._parts[name] = taken
        for document in documents:
            self._ask(taken, document, document.uid, 0)
        return None

    def _ask(self, taken: Taken, document: Document, root: int, turn: int) -> None:
        """Send a turn of a conversation; what is stored of it goes to its part."""
        settings = self.settings
        goes_on = None
        if document.turns and not document.turn_uids:
            goes_on = settings.turns.max_length - len(document.turns[0]) - 1
        fields = {
            "part": taken.name,
            "uid": document.uid,
            "spans": [list(span) for span in document.spans],
            "source": document.source,
            "held_out": bool(is_held_out(uid_group(document.uid), settings.held_out, settings.seed)),
            "written": bool(document.answer_tokens),
            "stop": list(self._stop) if document.answer_tokens else [],
            "goes_on": goes_on,
        }
        self._add(Asked(taken, document, root, turn), fields)

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
        """Step the engine once, and commit what is done.

        Returns:
            number and tokens of the documents that were finished, and the parts that were.

        Raises:
            BadStatesError: more than a few documents are bad.
            CaptureError: the engine gives no more states.
        """
        unfinished = self.engine.get_num_unfinished_requests()
        ended = {o.request_id: o.outputs[0].token_ids for o in self.engine.step()}  # type: ignore[union-attr, index]
        running = list(self.engine.engine_core.engine_core.scheduler.running)  # type: ignore[attr-defined]
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
            last, stored = self._answered(asked, sampled)
            finished, tokens = finished + last, tokens + stored
        if unfinished:
            self._steps += 1
            at_work = len(running) - len(at_end) + len(ended)
            self._busy += min(1.0, at_work / min(self.slots, unfinished + self._later))
        return (finished, tokens), self._look()

    def _answered(self, asked: Asked, sampled: Sequence[int]) -> tuple[bool, int]:
        """Note a finished turn and send the next; whether it was the last, and the tokens to be stored."""
        taken, document = asked.taken, asked.document
        if taken is None:
            return False, 0
        kept = list(sampled[:-1]) if document.answer_tokens else []
        end = next((i + 1 for i, t in enumerate(kept) if t in self._stop), len(kept))
        following = next_turn(document, kept[:end], self.settings.turns) if document.answer_tokens else None
        stored = 0
        if following is None or document.turn_uids:
            ids = [*document.input_ids.tolist(), *kept[:end]]
            taken.expected[document.uid] = len(ids), digest(ids), asked.root
            stored = len(ids)
        if following is None:
            taken.conversations -= 1
        else:
            self._ask(taken, following, asked.root, asked.turn + 1)
        return following is None, stored

    def _look(self) -> list[PartResult | Refused]:
        """Look after the parts whose documents are all answered."""
        ripe = {t.name: len(t.expected) for t in self._parts.values() if not t.conversations}
        if not ripe or (time.monotonic() - self._looked < LOOK_S and self.engine.has_unfinished_requests()):
            return []
        found = []
        for name, (rows, state) in self._call("layer61_state", ripe).items():
            taken = self._parts[name]
            if state is not None:
                found += self._settle(taken, state)
            elif not taken.committing:
                self._watch(taken, rows)
        self._looked = time.monotonic()
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
            self._call("layer61_close", name)
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
            self._call("layer61_close", name)
            del self._parts[name]
            reason = next(iter((state["bad"] | swapped).values()), "none of this part")
            raise BadStatesError(
                f"{self._bad:,} of {self._done:,} documents came back wrong, more than dump.max_bad_share ="
                f" {self.settings.max_bad_share:g}; one of them: {reason}",
                f"the engine itself must be at fault, see {self.settings.log}",
            )
        if swapped:  # they are in the part already: it is written again without them
            self._call("layer61_close", name)
            del self._parts[name]
            rest = [d for d in taken.documents if d.uid not in swapped]
            refused = self.open(name, rest, taken.rejected | swapped, self._later)
            return [refused] if refused else []
        taken.committing = True
        self._call("layer61_commit", name, taken.rejected | state["bad"] | state["looping"])
        return []

    def probe(self, ids: np.ndarray) -> np.ndarray:
        """States of one document as bf16 bits, uint16 [T, S, D], without storing them."""
        document = Document(0, ids, (), 0, "", 0, "", "")
        self._add(Asked(None, document, 0), {"part": None, "uid": 0, "stop": [], "goes_on": None})
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            self.step()
            states = self._call("layer61_take", 0)
            if states is not None:
                return states
        raise CaptureError("the engine gave no states of the probe document", f"see {self.settings.log}")
