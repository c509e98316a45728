"""One vLLM engine over all prompts of a verification: its outputs, its counters, its logits."""

import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from configs.errors import Layer61Error
from configs.progress import log, task
from pipeline import child
from pipeline.greedy import divergences, noise

__all__ = ["measure"]

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
            `stop_token_ids`, `log` (file of the engine's output), `keep_logits` (judge `others`, the outputs
            of other engines by name, and measure the noise; the engine must return raw logits).

    Returns:
        `start_seconds`, `seconds`, `dtype`, `outputs` (token ids of each answer); with speculation
        `num_drafts` and `num_accepted_per_position`; with `keep_logits` what `_judge` returns.

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
        with task(f"verify: {name}", len(job["prompts"])) as progress, contextlib.suppress(EOFError):
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


def _answer(job: dict[str, Any], connection: Connection) -> None:
    """The body of the child process."""
    child.enter(job["log"])

    from tqdm.auto import tqdm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.v1.metrics.reader import Counter, Vector

    class Report(tqdm):
        """Sends the number of finished requests instead of drawing a bar."""

        def update(self, n: float | None = 1) -> bool | None:
            if "Processed" in (self.desc or ""):
                connection.send(("progress", n or 0))
            return None

    started = time.monotonic()
    llm = LLM(**job["engine"])
    ready = time.monotonic()
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            stop_token_ids=job["stop_token_ids"],
            detokenize=False,
            logprobs=KEPT_LOGITS if job["keep_logits"] else None,
        )
        for max_tokens in job["max_tokens"]
    ]
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=Report)
    result: dict[str, Any] = {
        "start_seconds": round(ready - started, 2),
        "seconds": round(time.monotonic() - ready, 2),
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        "outputs": [list(o.outputs[0].token_ids) for o in outputs],
    }
    if job["keep_logits"]:
        written = [[_logits(step) for step in o.outputs[0].logprobs or []] for o in outputs]
        result |= _judge(llm, job, result["outputs"], written)
    for metric in llm.get_metrics():
        if metric.name == DRAFTS and isinstance(metric, Counter):
            result["num_drafts"] = result.get("num_drafts", 0) + metric.value
        if metric.name == ACCEPTED and isinstance(metric, Vector):
            so_far = result.get("num_accepted_per_position", [0] * len(metric.values))
            result["num_accepted_per_position"] = [a + b for a, b in zip(so_far, metric.values, strict=True)]
    connection.send(("result", result))
    connection.close()


def _logits(step: Any) -> dict[int, float]:
    """vLLM's record of one token as logits by token id."""
    return {token: entry.logprob for token, entry in step.items()}


def _judge(
    llm: Any, job: dict[str, Any], outputs: list[list[int]], written: list[list[dict[int, float]]]
) -> dict[str, Any]:
    """The target's logits where other outputs diverge from its own, and its noise.

    Returns:
        `logits`: a list of request, position and logits by token id; `noise`: as `greedy.noise`.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    diverged = {(d.request, d.position) for o in job["others"].values() for d in divergences(outputs, o)}
    requests = dict.fromkeys(request for request, _ in sorted(diverged))
    requests |= dict.fromkeys(range(len(outputs)))
    chosen = list(requests)[:READ_AGAIN]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=KEPT_LOGITS, detokenize=False)
    texts = [TokensPrompt(prompt_token_ids=job["prompts"][r] + outputs[r][:-1]) for r in chosen]
    pairs = []
    for request, text in zip(chosen, llm.generate(texts, sampling, use_tqdm=False), strict=True):
        read = text.prompt_logprobs[len(job["prompts"][request]) :]
        pairs += [(w, _logits(step)) for w, step in zip(written[request], read, strict=False)]
    return {
        "logits": [[r, p, written[r][p]] for r, p in sorted(diverged) if p < len(written[r])],
        "noise": noise(pairs),
    }
