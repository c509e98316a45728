"""One vLLM engine over all prompts of a verification: its outputs, its counters, its logits."""

import contextlib
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import Layer61Error
from configs.progress import log, task
from pipeline import child
from pipeline.greedy import divergences, noise

__all__ = ["measure", "read_logits", "save_logits"]

# largest logits kept of a token; the most that vLLM returns by default
KEPT_LOGITS = 20
# requests the target reads again to measure its own rounding
READ_AGAIN = 64
# an engine that is done takes about a second to end
CLOSE_SECONDS = 20.0
DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Let one engine answer all prompts, in a process of its own that returns its memory.

    Args:
        name: for messages.
        job: `engine` (arguments of vLLM's LLM), `prompts` (token ids), `max_tokens` of each answer,
            `stop_token_ids`, `log` (file of the engine's output), `temperature` (where it is not 0, answer
            all prompts again with it), `logits` (None, or the file that keeps the target's logits and makes
            the engine measure its noise; the engine must return raw logits).

    Returns:
        `start_seconds`, `dtype`; of the greedy answers `seconds`, `outputs` (token ids of each answer) and
        with speculation `num_drafts` and `num_accepted_per_position`; `sampled`: the same at `temperature`;
        with `logits` the `noise`, as `greedy.noise`.

    Raises:
        Layer61Error: the engine failed; names its log.
    """
    ours, theirs = multiprocessing.Pipe()
    result: dict[str, Any] | None = None
    log("verify", f"{name}: starting vLLM, log in {job['log']}")
    environment = child.SERVED | child.share_cores(job["engine"]["tensor_parallel_size"])
    process = child.start(_answer, (job, theirs), f"layer61-{name}", environment)
    theirs.close()
    try:
        rounds = 2 if job["temperature"] else 1
        with (
            task(f"verify: {name}", rounds * len(job["prompts"]), "answers") as progress,
            contextlib.suppress(EOFError),
        ):
            while result is None:
                kind, value = ours.recv()
                if kind == "progress":
                    progress.advance(value)
                else:
                    result = value
    finally:
        # with its result it has nothing more to do than to end
        child.end(process, wait_s=0 if result is None else CLOSE_SECONDS)
    if result is None:
        raise Layer61Error(
            f"vLLM failed while serving the {name}: {child.last_error(Path(job['log']))}",
            f"see {job['log']}",
        )
    tokens = sum(map(len, result["outputs"]))
    log("verify", f"{name}: {tokens:,} tokens in {result['seconds']:.1f} s")
    return result


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each request's value, repeated for its drafted tokens: [batch_size] to [num_tokens].

    Example: [a, b, c] with cu_num_tokens [2, 5, 6] gives [a, a, b, b, b, c].
    Source: the function of this name in vLLM's `v1/sample/rejection_sampler.py`.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts, output_size=num_tokens)


def mend_cpu_sampling() -> None:
    """Let vLLM 0.32.0 on CPU check drafts at the temperature asked for.

    There its own expansion writes values that are no int64 into a copy that is dropped
    (`utils/cpu_triton_utils.py`, `_expand_kernel_impl`): temperatures are what happened to be in memory, and
    next to no sampled draft is accepted.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.sample import rejection_sampler

        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def _answer(job: dict[str, Any], connection: Connection) -> None:
    """The body of the child process."""
    child.enter(job["log"])

    from tqdm.auto import tqdm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    class Report(tqdm):
        """Sends the number of finished requests instead of drawing a bar."""

        def update(self, n: float | None = 1) -> bool | None:
            if "Processed" in (self.desc or ""):
                connection.send(("progress", n or 0))
            return None

    mend_cpu_sampling()
    started = time.monotonic()
    llm = LLM(**job["engine"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]

    def generate(temperature: float) -> tuple[dict[str, Any], list[Any]]:
        sampling = [
            SamplingParams(
                temperature=temperature,
                # of its own, so that another run draws the same but for rounding
                seed=number if temperature else None,
                max_tokens=max_tokens,
                stop_token_ids=job["stop_token_ids"],
                detokenize=False,
                logprobs=KEPT_LOGITS if job["logits"] else None,
            )
            for number, max_tokens in enumerate(job["max_tokens"])
        ]
        before, began = _counters(llm), time.monotonic()
        answers = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=Report)]
        result: dict[str, Any] = {
            "seconds": round(time.monotonic() - began, 2),
            "outputs": [list(answer.token_ids) for answer in answers],
        }
        if after := _counters(llm):
            drafts, *accepted = (b - a for a, b in zip(before, after, strict=True))
            result |= {"num_drafts": drafts, "num_accepted_per_position": accepted}
        return result, answers

    start_seconds = round(time.monotonic() - started, 2)
    result, answers = generate(0)
    result["start_seconds"] = start_seconds
    result["dtype"] = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    if job["logits"]:
        written = [[_logits(step) for step in answer.logprobs or []] for answer in answers]
        save_logits(Path(job["logits"]), [step for steps in written for step in steps])
        result["noise"] = _noise(llm, job["prompts"], result["outputs"], written)
    if job["temperature"]:
        result["sampled"] = generate(job["temperature"])[0]
    connection.send(("result", result))
    connection.close()


def _counters(llm: Any) -> list[int]:
    """Drafts so far and accepted tokens by position; empty without speculation."""
    from vllm.v1.metrics.reader import Counter, Vector

    drafts, accepted = 0, list[int]()
    for metric in llm.get_metrics():
        if metric.name == DRAFTS and isinstance(metric, Counter):
            drafts += metric.value
        if metric.name == ACCEPTED and isinstance(metric, Vector):
            accepted = [
                a + b for a, b in zip(accepted or [0] * len(metric.values), metric.values, strict=True)
            ]
    return [drafts, *accepted] if accepted else []


def _logits(step: Any) -> dict[int, float]:
    """vLLM's record of one token as logits by token id."""
    return {token: entry.logprob for token, entry in step.items()}


def _noise(
    llm: Any, prompts: list[list[int]], outputs: list[list[int]], written: list[list[dict[int, float]]]
) -> dict[str, Any]:
    """The target's own rounding, from the first requests, each read in one pass."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=KEPT_LOGITS, detokenize=False)
    chosen = range(min(READ_AGAIN, len(outputs)))
    texts = [TokensPrompt(prompt_token_ids=prompts[r] + outputs[r][:-1]) for r in chosen]
    pairs = []
    for request, text in zip(chosen, llm.generate(texts, sampling, use_tqdm=False), strict=True):
        read = text.prompt_logprobs[len(prompts[request]) :]
        pairs += [(w, _logits(step)) for w, step in zip(written[request], read, strict=False)]
    return noise(pairs)


def save_logits(path: Path, steps: list[dict[int, float]]) -> None:
    """Write the largest logits of every token of all answers, one after the other, for `read_logits`."""
    tokens = np.full((len(steps), KEPT_LOGITS), -1, np.int32)
    logits = np.full((len(steps), KEPT_LOGITS), -np.inf, np.float32)
    for row, step in enumerate(steps):
        best = sorted(step, key=lambda token: -step[token])[:KEPT_LOGITS]
        tokens[row, : len(best)] = best
        logits[row, : len(best)] = [step[token] for token in best]
    with open(path, "wb") as file:
        np.savez(file, tokens=tokens, logits=logits)


def read_logits(
    path: Path, plain: Sequence[Sequence[int]], other: Sequence[Sequence[int]]
) -> dict[tuple[int, int], dict[int, float]]:
    """The target's logits by token id wherever other outputs diverge from its own.

    Args:
        path: from `save_logits`.
        plain: the target's own answers, token ids.
        other: answers with a draft.

    Returns:
        By (request, position); a request that went on where the target had ended is left out.
    """
    starts = np.cumsum([0, *map(len, plain)])
    with np.load(path) as kept:
        tokens, logits = kept["tokens"], kept["logits"]
    return {
        (d.request, d.position): dict(zip(tokens[row].tolist(), logits[row].tolist(), strict=True))
        for d in divergences(plain, other)
        if (row := starts[d.request] + d.position) < starts[d.request + 1]
    }
