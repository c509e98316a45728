"""`layer61 bench-serve`: what a draft is worth over HTTP, by vLLM's own serving benchmark.

One server after the other, each asked the same held-out conversations at one concurrency after the other.
"""

import asyncio
import json
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from configs import run_dir
from configs.errors import InputError, Layer61Error
from configs.files import read_json, write_json
from configs.progress import log
from configs.provenance import collect
from configs.schema import RunConfig
from configs.target import target_config
from pipeline import child
from pipeline.serve import arguments, running, served_name, url
from pipeline.speculation import draft_directory, draft_path, view_of
from pipeline.verify import answer_room, held_out

__all__ = ["plan", "ready", "run"]

# names of vLLM's benchmark and ours
KEPT = {
    "output_throughput": "output_tokens_per_second",
    "mean_tpot_ms": "mean_ms_per_token",
    "median_tpot_ms": "median_ms_per_token",
    "mean_ttft_ms": "mean_ms_to_first_token",
    "duration": "seconds",
    "total_output_tokens": "num_output_tokens",
    "spec_decode_acceptance_length": "acceptance_length",
    "spec_decode_per_position_acceptance_rates": "acceptance_per_position",
}


def _bench(words: list[str], log_file: str) -> None:
    """Body of the benchmark's process: `vllm bench serve`."""
    child.enter(log_file, append=True)
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    asyncio.run(main_async(parser.parse_args(words)))


def _write_prompts(config: RunConfig, path: Path) -> int:
    """Write the held-out conversations as text with the room of each answer; their number.

    Raises:
        InputError: there are none, or none is the same after it was text.
    """
    from transformers import AutoTokenizer

    target = config.require_target()
    prompts = held_out(config, config.serve.bench_conversations)
    view = view_of(config.dump.view)
    room = answer_room(prompts, target_config(target), config.serve.bench_max_tokens, view)
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    lines = []
    for ids, most in zip(prompts, room, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            lines.append(json.dumps({"prompt": text, "output_tokens": most}) + "\n")
    if not lines:
        raise InputError("no held-out conversation gives the same tokens when it is sent as text")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _measure(config: RunConfig, number: int, concurrency: int, folder: Path) -> dict[str, Any]:
    """Ask the running server all prompts, `concurrency` at a time."""
    result, log_file = folder / "bench.json", folder / "bench.log"
    result.unlink(missing_ok=True)
    target = config.require_target()
    options = {
        "backend": "openai",
        "base-url": url(config),
        "endpoint": "/v1/completions",
        "model": served_name(config),
        "tokenizer": target,
        "dataset-name": "custom",
        "dataset-path": folder / "prompts.jsonl",
        "custom-output-len": -1,
        "num-prompts": number,
        "num-warmups": min(number, concurrency),
        "max-concurrency": concurrency,
        "temperature": 0,
        # the text holds the marks of the chat already
        "extra-body": json.dumps({"add_special_tokens": False}),
        "result-dir": folder,
        "result-filename": result.name,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--skip-chat-template", "--disable-shuffle", "--disable-tqdm", "--save-result"]
    process = child.start(_bench, (words, str(log_file.absolute())), "layer61-bench", child.SERVED)
    try:
        wait([process.sentinel])
    finally:
        child.end(process)
    found = read_json(result) if result.exists() else {}
    if found.get("completed") != number:
        why = child.last_error(log_file) if not found else f"{found['completed']} of {number} were answered"
        raise Layer61Error(f"vLLM's serving benchmark failed: {why}", f"see {log_file}")
    return {ours: found[theirs] for theirs, ours in KEPT.items() if theirs in found}


def plan(config: RunConfig) -> str:
    """One line: what `layer61 bench-serve` will do. Raises ConfigError where no target is set."""
    config.require_target()
    drafts = config.serve.bench_drafts
    missing = [p for d in drafts if (p := draft_path(config, d)) is not None and not p.exists()]
    return (
        f"one server for each of {', '.join(drafts)}, the held-out conversations with"
        f" {' '.join(map(str, config.serve.bench_concurrency))} requests at a time"
        + "".join(f"; not yet: there is no {path}" for path in missing)
    )


def ready(config: RunConfig) -> None:
    """Raises what `run` would: InputError where there are no conversations, or no draft."""
    held_out(config, 1)
    for draft in config.serve.bench_drafts:
        draft_directory(config, draft)


def run(config: RunConfig) -> dict[str, Any]:
    """`layer61 bench-serve`: measure, and write `serving.json` in the run directory.

    Returns:
        `runs`: for each draft and concurrency tokens a second, milliseconds a token, acceptance, and `ratio`,
        the tokens a second over those of the first draft at this concurrency; `num_prompts`, `max_tokens`.

    Raises:
        InputError: there is no draft or no held-out conversation.
        Layer61Error: a server or the benchmark failed; names its log.
    """
    folder = config.run.dir / run_dir.SERVE_WORK
    number = _write_prompts(config, folder / "prompts.jsonl")
    runs: list[dict[str, Any]] = []
    for draft in config.serve.bench_drafts:
        words = arguments(config, draft)
        log("bench", f"{draft}: starting vLLM, log in {folder / 'server.log'}")
        with running(config, words, folder / "server.log"):
            for concurrency in config.serve.bench_concurrency:
                found = _measure(config, number, concurrency, folder)
                first = next((r for r in runs if r["concurrency"] == concurrency), found)
                ratio = found["output_tokens_per_second"] / first["output_tokens_per_second"]
                runs.append({"draft": draft, "concurrency": concurrency, "ratio": ratio, **found})
                length, first_name = found.get("acceptance_length"), config.serve.bench_drafts[0]
                log(
                    "bench",
                    f"{draft}, {concurrency} at a time: {found['output_tokens_per_second']:,.1f} tokens/s,"
                    f" {found['mean_ms_per_token']:.1f} ms a token, {ratio:.2f} x {first_name}"
                    + (f", acceptance length {length:.2f}" if length else ""),
                )
    result = {"format": 1, "num_prompts": number, "max_tokens": config.serve.bench_max_tokens, "runs": runs}
    write_json(config.run.dir / run_dir.SERVING, result | collect())
    return result
