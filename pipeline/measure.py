"""One vLLM engine over all prompts of a verification: its answers, what it accepts, its logits, its speed."""

import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

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
# requests at a time whose steps are timed, as far as the engine takes them, and steps of each
CONCURRENCY = (1, 4, 16, 64, 256)
TIMED_STEPS = 6


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Let one engine answer all prompts, in a process of its own that returns its memory.

    Args:
        name: for messages.
        job: `engine` (arguments of vLLM's LLM), `prompts` (token ids), `max_tokens` of each answer,
            `stop_token_ids`, `log` (file of the engine's output), `rounds` (numbers of draft tokens, all
            prompts answered with each; [0] without drafts), `temperature` and `top_p` (where the temperature
            is not 0, every round answers all prompts sampled as well), `samples` (how often; once by
            default), `marked` (prompts whose drafts are kept), `logits` (None, or the file that keeps the
            target's logits and makes the engine measure its noise; the engine must return raw logits).

    Returns:
        `start_seconds`, `dtype`; `rounds`, in the order asked for: `num_steps`, `seconds`, and `greedy` and
        `sampled` (None at temperature 0; all prompts, then all again), each with `outputs` (token ids of each
        answer), and with drafts `accepted` (of each answer, the draft tokens accepted in each step) and
        `drafts` (of the first `marked` answers, the draft tokens of each step); `step_seconds`: by number of
        draft tokens and number of requests, as strings, the median time of a step; with `logits` the `noise`,
        as `greedy.noise`.

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
        answers = len(job["rounds"]) * len(job["prompts"]) * len(_temperatures(job))
        with (
            task(f"verify: {name}", answers, "answers") as progress,
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
    kinds = [r[kind] for r in result["rounds"] for kind in ("greedy", "sampled") if r[kind]]
    tokens = sum(len(answer) for kind in kinds for answer in kind["outputs"])
    log("verify", f"{name}: {tokens:,} tokens in {sum(r['seconds'] for r in result['rounds']):.1f} s")
    return result


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

    started = time.monotonic()
    llm = LLM(**job["engine"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]

    temperatures = _temperatures(job)

    def round_of(drafts: int) -> tuple[dict[str, Any], list[Any]]:
        """Answer all prompts, greedy and sampled at once."""
        sampling = [
            SamplingParams(
                temperature=temperature,
                top_p=job["top_p"] if temperature else 1,
                # of its own, so that another run draws the same but for rounding
                seed=(again - 1) * len(prompts) + number if again else None,
                max_tokens=max_tokens,
                stop_token_ids=job["stop_token_ids"],
                detokenize=False,
                logprobs=KEPT_LOGITS if job["logits"] else None,
            )
            for again, temperature in enumerate(temperatures)
            for number, max_tokens in enumerate(job["max_tokens"])
        ]
        began = time.monotonic()
        with _drafts_of(llm, drafts, job["marked"]) as seen:
            found = llm.generate(prompts * len(temperatures), sampling, use_tqdm=Report)
        answers = [request.outputs[0] for request in found]
        kinds = []
        for own in (answers[: len(prompts)], answers[len(prompts) :]):
            kind: dict[str, Any] = {"outputs": [list(answer.token_ids) for answer in own]}
            if drafts:
                kind["accepted"] = [
                    list(m.per_step_accepted) if (m := answer.spec_decode_metrics) else [] for answer in own
                ]
            kinds.append(kind)
        kinds[0]["drafts"] = seen
        result = {"num_steps": drafts, "seconds": round(time.monotonic() - began, 2), "greedy": kinds[0]}
        return result | {"sampled": kinds[1] if job["temperature"] else None}, answers

    result: dict[str, Any] = {"start_seconds": round(time.monotonic() - started, 2), "rounds": []}
    result["dtype"] = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    for drafts in job["rounds"]:
        found, answers = round_of(drafts)
        result["rounds"].append(found)
    if job["logits"]:
        written = [[_logits(step) for step in answer.logprobs or []] for answer in answers]
        save_logits(Path(job["logits"]), [step for steps in written for step in steps])
        result["noise"] = _noise(llm, job["prompts"], found["greedy"]["outputs"], written)
    result["step_seconds"] = {str(d): _step_seconds(llm, job, d) for d in job["rounds"]}
    connection.send(("result", result))
    connection.close()


def _temperatures(job: dict[str, Any]) -> list[float]:
    """One of each time that all prompts are answered in a round; greedy first."""
    return [0, *[job["temperature"]] * (job.get("samples", 1) if job["temperature"] else 0)]


@contextlib.contextmanager
def _drafts_of(llm: Any, drafts: int, marked: int) -> Iterator[list[list[list[int]]]]:
    """Let the engine draft so many tokens a step, and keep those of the first requests that come.

    Yields:
        Of each of these requests the draft tokens of each step; filled in while they run.
    """
    seen: list[list[list[int]]] = [[] for _ in range(marked)]
    if not drafts:
        yield seen
        return
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    # vLLM asks this table, by the number of requests, how many tokens to draft
    scheduler.dynamic_sd_lookup = [drafts] * len(scheduler.dynamic_sd_lookup)
    update, places = scheduler.update_from_output, dict[str, int]()

    def keep(scheduled: Any, output: Any) -> Any:
        for request in scheduled.num_scheduled_tokens:
            place = places.setdefault(request, len(places))
            tokens = scheduled.scheduled_spec_decode_tokens.get(request)
            if place < marked and tokens and output.sampled_token_ids[output.req_id_to_index[request]]:
                seen[place].append(list(tokens))
        return update(scheduled, output)

    scheduler.update_from_output = keep
    try:
        yield seen
    finally:
        scheduler.update_from_output = update


def _step_seconds(llm: Any, job: dict[str, Any], drafts: int) -> dict[str, float]:
    """Median time of a step that only decodes, by the number of requests."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    engine = llm.llm_engine
    most = engine.vllm_config.scheduler_config.max_num_seqs
    step, times = engine.step, list[float]()
    found: dict[str, float] = {}
    for requests in (c for c in CONCURRENCY if c <= most):
        chosen = [number % len(job["prompts"]) for number in range(requests)]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=min(TIMED_STEPS * (1 + drafts), job["max_tokens"][number]),
                ignore_eos=True,
                detokenize=False,
            )
            for number in chosen
        ]
        times.clear()

        def timed(requests: int = requests) -> Any:
            began = time.monotonic()
            outputs = step()
            # later steps have fewer requests
            if engine.get_num_unfinished_requests() == requests:
                times.append(time.monotonic() - began)
            return outputs

        engine.step = timed
        try:
            with _drafts_of(llm, drafts, 0):
                texts = [TokensPrompt(prompt_token_ids=job["prompts"][number]) for number in chosen]
                llm.generate(texts, sampling, use_tqdm=False)
        finally:
            engine.step = step
        # the first steps read the prompts
        if len(times) > 2:
            found[str(requests)] = float(np.median(times[2:]))
    return found


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
