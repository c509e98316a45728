"""`layer61 verify`: serve target and draft in vLLM, and measure what the draft is worth.

Three engines run one after the other, each in a process of its own so that its memory is returned:

    before     with the target's own MTP layer
    after      with the exported draft
    plain      the target alone

Acceptance comes from vLLM's own counters. Greedy outputs with and without draft must be equal but for ties;
`pipeline.greedy` says how those are recognised.
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from configs import run_dir
from configs.contract import require_same, target_contract
from configs.errors import ConfigError, InputError, Layer61Error
from configs.files import read_json, sha256_file, sha256_json, write_json
from configs.progress import log, task
from configs.provenance import vllm_version
from configs.schema import RunConfig
from export.check import check, refuse_name
from export.checkpoint import Checkpoint
from export.directory import MANIFEST
from pipeline import child
from pipeline.greedy import compare, noise, partings
from pipeline.prompts import load_prompts
from pipeline.view import make_view

__all__ = ["plan", "run", "verify"]

NAMES = {"plain": "target alone", "before": "target's own layer", "after": "exported draft"}
# largest logits kept of a token; the most that vLLM returns by default
KEPT_LOGITS = 20
# requests the target reads again to measure its own rounding
READ_AGAIN = 64
CPU_KV_CACHE_BYTES = 1 << 30
DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"


def _serve(job: dict[str, Any], connection: Connection) -> None:
    """Run one engine over all prompts; the body of the child process."""
    child.enter(job["log"])
    if job["engine"]["tensor_parallel_size"] == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # the model classes as vLLM ships them, without the capture's
    os.environ.setdefault("VLLM_PLUGINS", "")

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
    """The target's logits where other outputs part from its own, and its noise.

    Returns:
        `logits`: a list of request, position and logits by token id; `noise`: as `greedy.noise`.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parted = {(p.request, p.position) for o in job["others"].values() for p in partings(outputs, o)}
    requests = dict.fromkeys(request for request, _ in sorted(parted))
    requests |= dict.fromkeys(range(len(outputs)))
    chosen = list(requests)[:READ_AGAIN]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=KEPT_LOGITS, detokenize=False)
    texts = [TokensPrompt(prompt_token_ids=job["prompts"][r] + outputs[r][:-1]) for r in chosen]
    pairs = []
    for request, text in zip(chosen, llm.generate(texts, sampling, use_tqdm=False), strict=True):
        read = text.prompt_logprobs[len(job["prompts"][request]) :]
        pairs += [(w, _logits(step)) for w, step in zip(written[request], read, strict=False)]
    return {
        "logits": [[r, p, written[r][p]] for r, p in sorted(parted) if p < len(written[r])],
        "noise": noise(pairs),
    }


def _run_engine(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run `_serve` in a fresh process and return its result.

    Raises:
        Layer61Error: the engine failed; names its log.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(job, theirs), name=f"layer61-{name}")
    result: dict[str, Any] | None = None
    log("verify", f"{NAMES[name]}: starting vLLM, log in {job['log']}")
    process.start()
    theirs.close()
    try:
        with task(f"verify {name}", len(job["prompts"])) as progress, contextlib.suppress(EOFError):
            while result is None:
                kind, value = ours.recv()
                if kind == "progress":
                    progress.advance(value)
                else:
                    result = value
    finally:
        if result is None:
            process.terminate()
        process.join()
    if result is None:
        raise Layer61Error(
            f"vLLM failed while serving the {NAMES[name]}: {_last_error(Path(job['log']))}",
            f"the whole story is in {job['log']}",
        )
    return result


def _last_error(path: Path) -> str:
    """The last line of an engine's log that names an exception."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    named = [line for line in lines if "Error: " in line or line.rstrip().endswith("Error")]
    return (named or lines or ["it ended without a word"])[-1].strip()


def _acceptance(result: dict[str, Any], num_speculative_tokens: int) -> dict[str, Any]:
    """Figures of one speculative run from the engine's counters."""
    drafts = result["num_drafts"]
    accepted = result["num_accepted_per_position"]
    if not drafts:
        raise InputError(
            "vLLM drafted nothing: every answer ended within one token",
            "raise verify.max_tokens or use other conversations",
        )
    return {
        "acceptance_length": 1 + sum(accepted) / drafts,
        "acceptance_per_position": [a / drafts for a in accepted],
        "num_drafts": drafts,
        "num_accepted_per_position": accepted,
        "num_speculative_tokens": num_speculative_tokens,
    } | _speed(result)


def _speed(result: dict[str, Any]) -> dict[str, Any]:
    tokens = sum(map(len, result["outputs"]))
    return {
        "num_output_tokens": tokens,
        "seconds": result["seconds"],
        "start_seconds": result["start_seconds"],
    }


def _compare_targets(target: Checkpoint, draft: Checkpoint) -> None:
    """Check that a draft that says for which target it was made was made for this one.

    Raises:
        ContractError: it was made for another one.
    """
    try:
        made_for = read_json(draft.directory / MANIFEST)["identity"]["target"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    require_same(
        {"target": made_for},
        {"target": target_contract(target.directory).model_dump(mode="json")},
        f"draft {draft.directory} and target {target.directory}",
        hint="set export.dir to the draft of this target, or target.path to the draft's",
    )


def _draft_identity(draft: Checkpoint) -> Any:
    """What a draft is: its manifest's identity, or hashes of its files."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return read_json(draft.directory / MANIFEST)["identity"]
    files = sorted({draft.file(name) for name in draft.names})
    return {file: sha256_file(draft.directory / file) for file in ("config.json", *files)}


@contextlib.contextmanager
def _views(target: Path, draft: Path, view: Literal["native", "v3"]) -> Iterator[tuple[Path, Path]]:
    """The directories to serve: the given ones, or V3 views of them in a temporary place."""
    if view == "native":
        yield target, draft
        return
    folder = Path(tempfile.mkdtemp(prefix="layer61-views-"))
    try:
        yield make_view(target, folder / "target"), make_view(draft, folder / "draft")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verify(
    target_dir: Path | str,
    draft_dir: Path | str,
    prompts: Sequence[Sequence[int]],
    *,
    num_speculative_tokens: int = 3,
    max_tokens: int = 256,
    vllm: dict[str, Any] | None = None,
    tensor_parallel_size: int = 1,
    compare_released: bool = True,
    limit: int | None = None,
    view: Literal["auto", "native", "v3"] = "auto",
    work_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Serve target and draft on prompts and measure acceptance before and after training.

    Args:
        target_dir: the target checkpoint.
        draft_dir: an exported draft directory.
        prompts: token ids, generation prompt included.
        num_speculative_tokens: draft tokens a step.
        max_tokens: most tokens of an answer; fewer where prompt and answer would exceed what can be served.
        vllm: further arguments of vLLM's engine.
        tensor_parallel_size: GPUs of an engine.
        compare_released: also serve the target alone and with its own layer.
        limit: use the first so many prompts.
        view: serve V3.2 natively or as V3 (`pipeline.view`); `auto` takes the view where there is no GPU.
        work_dir: directory for logs and finished measurements, which a second call reuses; none are kept
            by default.

    Returns:
        `before` and `after` (None and absent comparisons without `compare_released`): `acceptance_length`
        = 1 + accepted drafts a step, `acceptance_per_position`, `num_drafts`, `num_accepted_per_position`,
        `num_output_tokens`, `seconds`; `plain`: speed, and the target's own `noise`; `greedy`: as
        `greedy.compare` for `after`, and `greedy_before` for `before`; `versions`.

    Raises:
        InputError: the draft does not load beside this target, or a prompt is empty or too long.
        ContractError: the draft was made for another target.
        ConfigError: the draft's path would mislead vLLM.
        Layer61Error: vLLM failed.
    """
    target, draft = Checkpoint(target_dir), Checkpoint(draft_dir)
    target.mtp_names()
    refuse_name(draft.directory)
    if problems := check(draft.directory, target.directory)["vllm"]:
        raise InputError(
            f"{draft.directory} is no vLLM draft for {target.directory}: {problems[0]}",
            "export it again for this target, layout nextn, quantisation auto",
        )
    _compare_targets(target, draft)
    prompts = [list(map(int, ids)) for ids in prompts][:limit]
    chosen = ("native" if torch.cuda.is_available() else "v3") if view == "auto" else view
    room = _check_prompts(prompts, target.config, max_tokens, chosen)
    vllm = dict(vllm or {})
    if not torch.cuda.is_available():
        vllm = {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES} | vllm
    engine = {
        "max_model_len": max(map(sum, zip(map(len, prompts), room, strict=True)))
        + num_speculative_tokens
        + 1,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        **vllm,
        "tensor_parallel_size": tensor_parallel_size,
        "seed": 0,
    }
    folder = Path(work_dir) if work_dir is not None else Path(tempfile.mkdtemp(prefix="layer61-verify-"))
    folder.mkdir(parents=True, exist_ok=True)
    eos = target.config.get("eos_token_id")
    job = {
        "prompts": prompts,
        "max_tokens": room,
        "stop_token_ids": [eos] if isinstance(eos, int) else list(eos or []),
    }
    identity = {
        "format": 1,
        "engine": engine,
        "job": job,
        "view": chosen,
        "target": target_contract(target.directory).model_dump(mode="json", exclude={"path"}),
        "versions": _versions(),
    }
    results: dict[str, dict[str, Any]] = {}
    try:
        with _views(target.directory, draft.directory, chosen) as (target_path, draft_path):
            for name in ("before", "after", "plain") if compare_released else ("after",):
                speculative = {"method": "mtp", "num_speculative_tokens": num_speculative_tokens}
                mine: dict[str, Any] = {"model": str(target_path), "speculative_config": speculative}
                made_from: dict[str, Any] = {**identity, "name": name, "drafts": num_speculative_tokens}
                others = {}
                if name == "plain":
                    mine = {"model": str(target_path), "logprobs_mode": "raw_logits"}
                    others = {other: result["outputs"] for other, result in results.items()}
                    made_from |= {"drafts": 0, "others": others}
                if name == "after":
                    speculative["model"] = str(draft_path)
                    made_from["draft"] = _draft_identity(draft)
                kept = folder / f"{name}.json"
                results[name] = _reuse(kept, sha256_json(made_from)) or _measure(
                    name,
                    {
                        **job,
                        "engine": {**engine, **mine},
                        "keep_logits": name == "plain",
                        "others": others,
                        "log": str(folder.absolute() / f"{name}.log"),
                    },
                    kept,
                    sha256_json(made_from),
                )
    finally:
        if work_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    after = _acceptance(results["after"], num_speculative_tokens)
    summary: dict[str, Any] = {"before": None, "after": after, "plain": None, "greedy": None}
    if compare_released:
        plain = results["plain"]
        summary["before"] = _acceptance(results["before"], num_speculative_tokens)
        summary["plain"] = _speed(plain) | {"noise": plain["noise"]}
        logits = {(r, p): {int(t): x for t, x in known.items()} for r, p, known in plain["logits"]}
        for name, key in (("after", "greedy"), ("before", "greedy_before")):
            summary[key] = compare(
                plain["outputs"],
                results[name]["outputs"],
                logits,
                eps=torch.finfo(getattr(torch, plain["dtype"])).eps,
                largest_noise=plain["noise"]["largest"],
            )
    return summary | {"num_prompts": len(prompts), "view": chosen, "versions": _versions()}


def _versions() -> dict[str, str]:
    return {"vllm": vllm_version(), "torch": torch.__version__}


def _check_prompts(prompts: list[list[int]], config: dict[str, Any], max_tokens: int, view: str) -> list[int]:
    """Most tokens of each answer: `max_tokens`, or what is left below the length that can be served.

    Raises:
        InputError: there is no prompt, one is empty, has an unknown token, or leaves no room for two more.
    """
    if not prompts:
        raise InputError("there is no held-out conversation to serve", "raise prompts.held_out")
    bound = config.get("max_position_embeddings", sys.maxsize)
    if view == "v3":
        bound = min(bound, config.get("index_topk") or sys.maxsize)
    room = []
    for number, ids in enumerate(prompts):
        if not ids or min(ids) < 0 or max(ids) >= config["vocab_size"]:
            raise InputError(f"prompt {number} is empty or has token ids beyond the target's vocabulary")
        room.append(min(max_tokens, bound - len(ids)))
        if room[-1] < 2:
            raise InputError(
                f"prompt {number} has {len(ids):,} tokens, {bound:,} with its answer can be served"
                + (" where the V3 view equals sparse attention" if view == "v3" else ""),
                "lower prompts.max_length",
            )
    return room


def _reuse(path: Path, key: str) -> dict[str, Any] | None:
    """A finished measurement of an earlier call, if it was made from the same things."""
    try:
        kept = read_json(path)
        if kept["key"] != key:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    log("verify", f"{NAMES[path.stem]}: already measured, taken from {path}")
    return kept["result"]


def _measure(name: str, job: dict[str, Any], path: Path, key: str) -> dict[str, Any]:
    result = _run_engine(name, job)
    write_json(path, {"key": key, "result": result})
    tokens = sum(map(len, result["outputs"]))
    log("verify", f"{NAMES[name]}: {tokens:,} tokens in {result['seconds']:.1f} s")
    return result


def _held_out(config: RunConfig) -> list[list[int]]:
    """Prompts of the held-out conversations, up to where the last answer begins."""
    assert config.target.path is not None
    documents = load_prompts(config.prompts, config.target.path, config.run.seed).documents
    prompts = [d.input_ids[: d.spans[-1][0]].tolist() for d in documents if d.held_out]
    return prompts[: config.verify.max_conversations]


def plan(config: RunConfig) -> str:
    """One line: what `layer61 verify` will serve; by the settings alone where its input is not there yet.

    Raises:
        ConfigError: no target or no conversations are set, or the draft's path would mislead vLLM.
        InputError: the conversations or the tokenizer are unusable.
    """
    refuse_name(config.export_dir)
    if config.target.path is None:
        raise ConfigError("target.path is not set", "set it to the directory of the target checkpoint")
    waiting = [
        p for p in (config.target.path, config.export_dir, config.prompts.path) if p and not p.exists()
    ]
    number = "the"
    if config.target.path not in waiting and config.prompts.path not in waiting:
        prompts = _held_out(config)
        number = f"{len(prompts):,} ({sum(map(len, prompts)):,} prompt tokens)"
    settings = config.verify
    engines = "three vLLM engines in turn" if settings.compare_released else "one vLLM engine"
    return (
        f"serve {number} held-out conversations, at most {settings.max_tokens:,} tokens each, with"
        f" {settings.num_speculative_tokens} draft tokens a step: {engines}, draft {config.export_dir}"
        + "".join(f"; not yet: there is no {path}" for path in waiting)
    )


def run(config: RunConfig) -> dict[str, Any]:
    """`layer61 verify`: measure on the held-out conversations and write `verify.json` in the run directory.

    Raises:
        InputError: there is no export yet, or as `verify`.
    """
    if config.target.path is None:
        raise ConfigError("target.path is not set", "set it to the directory of the target checkpoint")
    if not config.export_dir.exists():
        raise InputError(
            f"there is no export at {config.export_dir}", "run `layer61 export` with the same settings first"
        )
    settings = config.verify
    result = verify(
        config.target.path,
        config.export_dir,
        _held_out(config),
        num_speculative_tokens=settings.num_speculative_tokens,
        max_tokens=settings.max_tokens,
        vllm=settings.vllm,
        tensor_parallel_size=config.dump.tensor_parallel_size,
        compare_released=settings.compare_released,
        view=config.dump.view,
        work_dir=config.run.dir / run_dir.VERIFY_WORK,
    )
    write_json(config.run.dir / run_dir.VERIFICATION, result)
    for name in ("before", "after"):
        if figures := result[name]:
            positions = ", ".join(f"{x:.1%}" for x in figures["acceptance_per_position"])
            log(
                "verify",
                f"{NAMES[name]}: {figures['acceptance_length']:.3f} tokens a step, positions {positions}",
            )
    if greedy := result["greedy"]:
        own = result["plain"]["noise"]
        log(
            "verify",
            f"greedy output with the draft: {greedy['equal']} of {greedy['requests']} equal,"
            f" {greedy['ties']} part at a tie, {greedy['different']} differ; the outputs part at"
            f" {len(greedy['parted']):,} of {greedy['tokens']:,} tokens, the target alone changes its mind at"
            f" {own['flipped']:,} of {own['tokens']:,} when it reads its own text in one pass",
        )
    return result
