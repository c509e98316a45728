"""`layer61 verify`: serve target and draft in vLLM, and measure what the draft is worth.

Three engines run one after the other (`pipeline.measure`):

    before     with the released layer
    after      with the trained draft
    plain      the target alone

Acceptance comes from vLLM's own counters. Greedy outputs with and without draft must be equal but for ties;
`pipeline.greedy` says how those are recognised.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from configs import run_dir
from configs.contract import target_contract
from configs.errors import InputError
from configs.files import read_json, sha256_file, sha256_json, write_json
from configs.held_out import is_held_out, require_recorded, uid_group
from configs.progress import log
from configs.provenance import vllm_version
from configs.schema import RunConfig
from export.check import refuse_name
from export.checkpoint import Checkpoint
from export.directory import weights_identity
from pipeline.conversations import input_exists
from pipeline.greedy import compare
from pipeline.measure import measure
from pipeline.prompts import load_prompts
from pipeline.speculation import CPU_ENGINE, require_draft, speculative_config, view_of
from pipeline.view import make_view

__all__ = ["plan", "ready", "run", "verify"]

NAMES = {"plain": "target alone", "before": "released layer", "after": "trained draft"}


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
    view: Literal["auto", "native", "v3"] = "auto",
    work_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Serve target and draft on prompts; measure acceptance with the released layer and the trained draft.

    Args:
        target_dir: the target checkpoint.
        draft_dir: an exported draft directory.
        prompts: token ids, generation prompt included.
        num_speculative_tokens: draft tokens a step.
        max_tokens: most tokens of an answer; fewer where prompt and answer would exceed what can be served.
        vllm: further arguments of vLLM's engine.
        tensor_parallel_size: GPUs of an engine.
        compare_released: also serve the target with the released layer and alone.
        view: serve V3.2 natively or as V3 (`pipeline.view`); `auto` takes the view where there is no GPU.
        work_dir: directory for logs and finished measurements, which a second call reuses; none are kept
            by default.

    Returns:
        `before` (released layer) and `after` (trained draft): `acceptance_length` = 1 + accepted drafts a
        step, `acceptance_per_position`, `num_drafts`, `num_accepted_per_position`, `num_output_tokens`,
        `seconds`; `plain`: speed, and the target's own `noise`; `greedy`: as `greedy.compare` for `after`,
        and `greedy_before` for `before`; `versions`. Without `compare_released`, `after` alone is not None.

    Raises:
        InputError: the draft does not load beside this target, or a prompt is empty or too long.
        ContractError: the draft was made for another target.
        ConfigError: the draft's path would mislead vLLM.
        Layer61Error: vLLM failed.
    """
    target, draft = Checkpoint(target_dir), Checkpoint(draft_dir)
    view = view_of(view)
    job = _check(target, draft, [list(map(int, ids)) for ids in prompts], max_tokens, view)
    longest = max(len(ids) + room for ids, room in zip(job["prompts"], job["max_tokens"], strict=True))
    engine = {
        **({} if torch.cuda.is_available() else CPU_ENGINE),
        "max_model_len": longest + num_speculative_tokens + 1,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        **(vllm or {}),
        "tensor_parallel_size": tensor_parallel_size,
        "seed": 0,
    }
    names = ("before", "after", "plain") if compare_released else ("after",)
    with contextlib.ExitStack() as stack:
        if work_dir is None:
            work_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="layer61-verify-"))
        folder = Path(work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        results = _measure_in_turn(names, target, draft, job, engine, num_speculative_tokens, view, folder)
    found = {"num_prompts": len(prompts), "view": view, "versions": _versions()}
    return _summary(results, num_speculative_tokens) | found


def _check(
    target: Checkpoint, draft: Checkpoint, prompts: list[list[int]], max_tokens: int, view: str
) -> dict[str, Any]:
    """Refuse what cannot be served together; what every engine has to answer.

    Raises:
        as `verify`.
    """
    require_draft(target, draft.directory)
    room = _check_prompts(prompts, target.config, max_tokens, view)
    eos = target.config.get("eos_token_id")
    stop = [eos] if isinstance(eos, int) else list(eos or [])
    return {"prompts": prompts, "max_tokens": room, "stop_token_ids": stop}


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


def _measure_in_turn(
    names: Sequence[str],
    target: Checkpoint,
    draft: Checkpoint,
    job: dict[str, Any],
    engine: dict[str, Any],
    num_speculative_tokens: int,
    view: Literal["native", "v3"],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """What each engine measures, by its name; `folder` keeps it for a later call."""
    identity = {
        "format": 1,
        "engine": engine,
        "job": job,
        "view": view,
        "target": target_contract(target.directory).model_dump(mode="json", exclude={"path"}),
        "versions": _versions(),
    }
    results: dict[str, dict[str, Any]] = {}
    with _views(target.directory, draft.directory, view) as (target_path, draft_path):
        for name in names:
            own_draft = draft_path if name == "after" else None
            speculative = speculative_config(own_draft, num_speculative_tokens)
            mine: dict[str, Any] = {"model": str(target_path), "speculative_config": speculative}
            made_from: dict[str, Any] = {**identity, "name": name, "drafts": num_speculative_tokens}
            others = {}
            if name == "plain":
                mine = {"model": str(target_path), "logprobs_mode": "raw_logits"}
                others = {other: result["outputs"] for other, result in results.items()}
                made_from |= {"drafts": 0, "others": others}
            if name == "after":
                made_from["draft"] = _draft_identity(draft)
            kept, key = folder / f"{name}.json", sha256_json(made_from)
            if (earlier := _reuse(kept, key)) is not None:
                results[name] = earlier
                continue
            log_file = str(folder.absolute() / f"{name}.log")
            own = {"engine": engine | mine, "keep_logits": name == "plain", "others": others, "log": log_file}
            results[name] = measure(NAMES[name], job | own)
            write_json(kept, {"key": key, "result": results[name]})
    return results


@contextlib.contextmanager
def _views(target: Path, draft: Path, view: Literal["native", "v3"]) -> Iterator[tuple[Path, Path]]:
    """The directories to serve: the given ones, or V3 views of them in a temporary place."""
    if view == "native":
        yield target, draft
        return
    with tempfile.TemporaryDirectory(prefix="layer61-views-", ignore_cleanup_errors=True) as folder:
        yield make_view(target, Path(folder) / "target"), make_view(draft, Path(folder) / "draft")


def _versions() -> dict[str, str]:
    return {"vllm": vllm_version(), "torch": torch.__version__}


def _draft_identity(draft: Checkpoint) -> Any:
    """What a draft is: its manifest's identity, or hashes of its files."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return read_json(draft.directory / run_dir.META)["identity"]
    files = sorted({draft.file(name) for name in draft.names})
    return {file: sha256_file(draft.directory / file) for file in ("config.json", *files)}


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


def _summary(results: dict[str, dict[str, Any]], num_speculative_tokens: int) -> dict[str, Any]:
    """Acceptance, speed and the comparison of outputs, from what the engines measured."""
    after = _acceptance(results["after"], num_speculative_tokens)
    summary: dict[str, Any] = {"before": None, "after": after, "plain": None, "greedy": None}
    if plain := results.get("plain"):
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
    return summary


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


def _held_out(config: RunConfig) -> list[list[int]]:
    """Prompts of the held-out conversations, up to where the last answer begins."""
    documents = load_prompts(config.prompts, config.require_target()).documents
    share, seed = config.prompts.held_out, config.run.seed
    require_recorded(config.run.dir, documents.uids, share, seed)
    chosen = is_held_out(uid_group(documents.uids), share, seed)
    found = (documents[int(i)] for i in np.flatnonzero(chosen))
    prompts = [d.input_ids[: d.spans[-1][0]].tolist() for d in found]
    return prompts[: config.verify.max_conversations]


def plan(config: RunConfig) -> str:
    """One line: what `layer61 verify` will serve; by the settings alone where its input is not there yet.

    Raises:
        ConfigError: no target or no conversations are set, or the draft's path would mislead vLLM.
        InputError: the conversations or the tokenizer are unusable.
    """
    refuse_name(config.export_dir)
    target = config.require_target()
    waiting = [p for p in (target, config.export_dir) if not p.exists()]
    there = config.prompts.path is None or input_exists(config.prompts.path)
    number = "the"
    if target.exists() and there:
        prompts = _held_out(config)
        number = f"{len(prompts):,} ({sum(map(len, prompts)):,} prompt tokens)"
    settings = config.verify
    engines = "three vLLM engines in turn" if settings.compare_released else "one vLLM engine"
    return (
        f"serve {number} held-out conversations, at most {settings.max_tokens:,} tokens each, with"
        f" {settings.num_speculative_tokens} draft tokens a step: {engines}, draft {config.export_dir}"
        + "".join(f"; not yet: there is no {path}" for path in waiting + [config.prompts.path] * (not there))
    )


def ready(config: RunConfig) -> None:
    """Refuse to serve another draft than `verify.checkpoint` says.

    Raises:
        InputError: there is no export, it is of another checkpoint, or there is no such checkpoint.
    """
    out, which = config.export_dir, config.verify.checkpoint
    again = f"layer61 export export.checkpoint={which}"
    if not out.exists():
        raise InputError(f"there is no export at {out.absolute()}", f"run `{again}` with the same settings")
    if not (out / run_dir.META).is_file() or (which == "best" and not run_dir.committed(config.run.dir)):
        return
    wanted = run_dir.find_weights(config.run.dir, which, config.require_target(), verify=False)
    manifest = run_dir.read_export(out, verify=False)
    if manifest["identity"].get("format") != 2:
        return  # its hashes are of another kind
    held = manifest["identity"]["weights"]
    here = "released" if which == "released" else weights_identity(Checkpoint(wanted, config={}))
    if held != here:
        raise InputError(
            f"{out.absolute()} holds {manifest.get('weights')}, verify.checkpoint = {which} is {wanted}",
            f"run `{again} export.replace=true` with the same settings, or set verify.checkpoint",
        )


def run(config: RunConfig) -> dict[str, Any]:
    """`layer61 verify`: measure on the held-out conversations and write `verify.json` in the run directory.

    Raises:
        InputError: there is no export yet, or as `verify`.
    """
    target = config.require_target()
    ready(config)
    settings = config.verify
    result = verify(
        target,
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
            length = f"{figures['acceptance_length']:.3f} tokens a step"
            log("verify", f"{NAMES[name]}: {length}, positions {positions}")
    if greedy := result["greedy"]:
        own = result["plain"]["noise"]
        log(
            "verify",
            f"greedy output with the draft: {greedy['equal']} of {greedy['requests']} equal, {greedy['ties']}"
            f" diverge at a tie, {greedy['different']} differ; rereading its own text, the target alone picks"
            f" another token at {own['flipped']:,} of {own['tokens']:,}",
        )
    return result
