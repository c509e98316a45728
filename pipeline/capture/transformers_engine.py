"""transformers as the engine of a capture: slower than vLLM, and independent of it.

It runs whatever transformers can load, on a CPU or a GPU, sparse attention included. Answers are written by a
decoding loop of our own, a batch of conversations at a time, and each finished document is then read once as
a whole: the states of an answer are those of the text it became, so given and written answers take one path.
Batches, and with them the rounding of every state, follow from one part alone.

Legend: B documents of a batch, T tokens, S states of a token, D width of a state, V vocabulary.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, cuda, nn

from configs.contract import aux_layers
from configs.errors import InputError
from configs.target import target_config
from pipeline.capture.driver import Asked, Driver
from pipeline.capture.engine import EngineSettings, PartResult, Refused
from pipeline.capture.routers import Routers
from pipeline.capture.writers import Writers
from pipeline.prompts import Document

__all__ = ["Engine"]

# documents of a batch, at most
SEQUENCES = 64
# tokens of a text whose attention weights are as many as a CPU should read at once
CPU_TOKENS = 256
# most by which rounding to bf16 moves a number, relative
ROUNDING = 2**-8

Waiting = TypeVar("Waiting")


def _take(
    waiting: list[Waiting], length: Callable[[Waiting], int], most: int
) -> tuple[list[Waiting], list[Waiting]]:
    """The shortest of what waits, with no more attention weights than a text of `most` tokens; the rest."""
    ordered = sorted(waiting, key=length)
    n = 1
    while n < min(len(ordered), SEQUENCES) and (n + 1) * length(ordered[n]) ** 2 <= most**2:
        n += 1
    return ordered[:n], ordered[n:]


def _prepare_fp8(target: str) -> None:
    """Get what an fp8 target needs before hundreds of gigabytes are read: transformers looks later.

    Raises:
        InputError: this machine cannot run it.
        ImportError: there is no package `kernels`, from which transformers has its fp8 kernels, or it cannot
            download them.
    """
    quantization = target_config(target).get("quantization_config") or {}
    if quantization.get("quant_method") != "fp8":
        return
    if not cuda.is_available() or cuda.get_device_capability() < (8, 9):
        # it would turn it into bfloat16, and takes whole blocks alone: kv_a_proj_with_mqa has four and a half
        raise InputError(
            f"{target} is fp8, which transformers runs on GPUs of compute capability 8.9 or later only",
            "run it there, or take the target in bfloat16",
        )
    from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

    load_finegrained_fp8_kernel()


class Engine(Driver):
    """The engine and its driver."""

    def __init__(self, settings: EngineSettings) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(settings)
        arguments: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager"}
        if cuda.is_available():  # from the files onto the GPUs, without a copy of all in host memory
            arguments["device_map"] = "auto" if cuda.device_count() > 1 else "cuda"
        try:
            _prepare_fp8(settings.model)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                settings.model, **arguments | settings.transformers, output_loading_info=True
            )
        except InputError:
            raise
        except (ImportError, ValueError, OSError, AttributeError, TypeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"transformers cannot load {settings.model}: {reason}", f"see {settings.log}"
            ) from error
        self.model, found = loaded
        if missing := sorted(found["missing_keys"]) or [str(x[0]) for x in found["mismatched_keys"]]:
            raise InputError(
                f"{settings.model} has no tensor {missing[0]} of the shape that transformers expects, nor"
                f" {len(missing) - 1} others",
                "fetch the checkpoint again; transformers would have made up what is missing",
            )
        self.model.eval()
        self.device = self.model.get_input_embeddings().weight.device
        self._inputs: dict[int, Tensor] = {}
        self._aux = aux_layers(settings.contract)
        for k in self._aux:
            self.model.base_model.layers[k].register_forward_pre_hook(
                lambda _, args, kwargs, k=k: self._inputs.update({k: args[0]}), with_kwargs=True
            )
        self._routers = Routers(self.model, self.model.config) if settings.watch_routers else None
        self._probed = 0
        self._writers = Writers(settings.writer_threads, settings.queue_bytes, settings.max_loop_share)
        # of each part: turns to be answered, and documents to be read, each with whether it is the last of
        # its conversation
        self._write: dict[str, list[Asked]] = {}
        self._read: dict[str, list[tuple[Document, list[int], bool]]] = {}

    def _call(self, method: str, *args: Any) -> Any:
        return getattr(self._writers, method)(*args)

    def open(
        self, name: str, documents: Sequence[Document], rejected: dict[int, str], later: int = 0
    ) -> PartResult | Refused | None:
        """As `Driver.open`."""
        self._write[name], self._read[name] = [], []
        return super().open(name, documents, rejected, later)

    def _ask(self, asked: Asked) -> None:
        assert asked.taken is not None
        if asked.document.answer_tokens:
            self._write[asked.taken.name].append(asked)
        else:
            self._finish(asked, [])

    def _finish(self, asked: Asked, answer: list[int]) -> None:
        assert asked.taken is not None
        last, ids = self._answered(asked, answer)
        if ids:
            self._read[asked.taken.name].append((asked.document, ids, last))

    def step(self) -> tuple[tuple[int, int], list[PartResult | Refused]]:
        """Answer or read one batch of the oldest part; as `Driver.step`."""
        finished = tokens = 0
        name = next((name for name in self._parts if self._write[name] or self._read[name]), None)
        if name is None:
            time.sleep(1e-3)  # the writers are at it
        elif self._write[name]:
            most = self.settings.batch_tokens
            batch, self._write[name] = _take(self._write[name], lambda a: len(a.document.input_ids), most)
            for asked, answer in zip(batch, self._decode(batch), strict=True):
                self._finish(asked, answer)
        else:
            # what a CPU holds near it is small: there most documents are faster alone
            most = min(self.settings.batch_tokens, CPU_TOKENS if self.device.type == "cpu" else sys.maxsize)
            found, self._read[name] = _take(self._read[name], lambda entry: len(entry[1]), most)
            states = self.states([np.asarray(ids) for _, ids, _ in found])
            for (document, ids, last), hidden_TSD in zip(found, states, strict=True):
                while not self._writers.has_room(hidden_TSD.nbytes):
                    time.sleep(1e-3)
                self._writers.submit(name, self._fields(document), ids, hidden_TSD)
                finished, tokens = finished + last, tokens + len(ids)
        return (finished, tokens), self._look()

    @torch.inference_mode()
    def states(self, documents: Sequence[np.ndarray]) -> list[Tensor]:
        """States of whole documents, bfloat16 [T, S, D] each, in host memory.

        Shorter documents are filled up behind their end, where no token of theirs looks. A document with more
        tokens than `batch_tokens` is read in pieces, each beside the cache of those before it, so that memory
        grows with its length and not with the square.
        """
        from transformers import DynamicCache

        longest, most = max(map(len, documents)), self.settings.batch_tokens
        ids_BT = torch.zeros(len(documents), longest, dtype=torch.long)
        for row, ids in zip(ids_BT, documents, strict=True):
            row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        piece = longest if longest <= most else max(1, most**2 // longest)
        cache = DynamicCache(config=self.model.config) if piece < longest else None
        self._use_experts("eager")
        pieces = []
        for part_BT in ids_BT.to(self.device).split(piece, 1):
            out = self.model.base_model(part_BT, past_key_values=cache, use_cache=cache is not None)
            inputs = [self._inputs[k] for k in self._aux]
            states = [x.to(torch.bfloat16).cpu() for x in (*inputs, out.last_hidden_state)]
            pieces.append(torch.stack(states, 2))
        hidden_BTSD = torch.cat(pieces, 1)
        self._steps += 1
        self._busy += sum(map(len, documents)) / ids_BT.numel()
        return [hidden_TSD[: len(ids)] for hidden_TSD, ids in zip(hidden_BTSD, documents, strict=True)]

    @torch.inference_mode()
    def _decode(self, batch: list[Asked]) -> list[list[int]]:
        """Answers up to their end token or as long as they may be; conversations leave the batch as they end.

        Prompts are filled up in front, where a mask hides what was added.
        """
        from transformers import DynamicCache

        # of the conversation, so that an answer does not depend on those beside it
        generators = [torch.Generator().manual_seed(a.document.uid + a.turn & (1 << 63) - 1) for a in batch]
        longest = max(len(asked.document.input_ids) for asked in batch)
        ids_BT, mask_BT = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
        for ids, mask, asked in zip(ids_BT, mask_BT, batch, strict=True):
            prompt = torch.from_numpy(asked.document.input_ids.astype(np.int64))
            ids[-len(prompt) :], mask[-len(prompt) :] = prompt, 1
        ids_BT, mask_BT = ids_BT.to(self.device), mask_BT.to(self.device)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache(config=self.model.config)
        self._use_experts("eager")
        answers: list[list[int]] = [[] for _ in batch]
        rows = list(range(len(batch)))
        while rows:
            out = self.model.base_model(
                ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
            )
            logits_BV = self.model.get_output_embeddings()(out.last_hidden_state[:, -1]).float()
            tokens = self._choose(logits_BV, [generators[row] for row in rows])
            self._steps += 1
            self._busy += len(rows) / len(batch)
            on = []
            for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                answers[row].append(token)
                if token not in self._stop and len(answers[row]) < batch[row].document.answer_tokens:
                    on.append(place)
            rows = [rows[place] for place in on]
            kept = torch.tensor(on, dtype=torch.long)  # on the host: layers may lie on several GPUs
            if len(on) < len(tokens):
                cache.batch_select_indices(kept)
                mask_BT, positions_BT = mask_BT[kept], positions_BT[kept]
            ids_BT = torch.tensor([tokens[place] for place in on], device=self.device)[:, None]
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], 1)
            positions_BT = positions_BT[:, -1:] + 1
            self._use_experts("grouped_mm")
        return answers

    def _choose(self, logits_BV: Tensor, generators: list[torch.Generator]) -> list[int]:
        """The next token of each row: the most likely one, or a sample of those that hold `top_p`."""
        settings = self.settings
        if settings.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        probs_BV, tokens_BV = (
            (logits_BV / settings.temperature).softmax(-1).sort(descending=True, stable=True)
        )
        probs_BV = probs_BV.masked_fill(probs_BV.cumsum(1) - probs_BV >= settings.top_p, 0).cpu()
        picked = [
            probs_V.multinomial(1, generator=generator)
            for probs_V, generator in zip(probs_BV, generators, strict=True)
        ]
        return tokens_BV.gather(1, torch.stack(picked).to(tokens_BV.device))[:, 0].tolist()

    def _use_experts(self, form: str) -> None:
        """On a CPU a loop over the experts is several times faster for whole documents, and several times
        slower for one token of each.
        """
        chosen = self.device.type == "cpu" and "experts_implementation" not in self.settings.transformers
        if chosen and hasattr(self.model.config, "n_routed_experts"):
            self.model.set_experts_implementation(form)

    def probe(self, ids: np.ndarray) -> np.ndarray:
        """As `Driver.probe`."""
        self._probed = len(ids)
        return self.states([ids])[0].view(torch.uint16).numpy()

    def experts(self) -> np.ndarray | None:
        """As `Driver.experts`."""
        return self._routers.take(self._probed) if self._routers else None

    def probe_rounded(self, ids: np.ndarray) -> np.ndarray | None:
        """As `Driver.probe_rounded`."""

        def move(_layer: nn.Module, _args: Any, out: Any) -> Any:
            first, *rest = out if isinstance(out, tuple) else (out,)
            if first.device not in generators:
                generators[first.device] = torch.Generator(first.device).manual_seed(0)
            share = torch.rand(first.shape, generator=generators[first.device], device=first.device)
            first = (first.float() * (1 + ROUNDING * (2 * share - 1))).to(first.dtype)
            return (first, *rest) if isinstance(out, tuple) else first

        generators: dict[torch.device, torch.Generator] = {}
        hooks = [layer.register_forward_hook(move) for layer in self.model.base_model.layers]
        try:
            moved = self.probe(ids)
        finally:
            for hook in hooks:
                hook.remove()
        self.experts()  # of nobody's interest
        return moved
