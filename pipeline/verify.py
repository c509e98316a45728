"""`layer61 verify`: serve target and drafts in vLLM, and measure what each draft is worth.

One engine after the other (`pipeline.measure`): the target alone, which keeps its logits, then one for each
draft, judged by these. What an engine measured is kept: another draft costs one engine. Acceptance comes from
vLLM's own counters. Greedy outputs with and without draft must be equal but for ties; `pipeline.greedy` says
how those are recognised.
"""

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from configs import run_dir
from configs.contract import target_contract
from configs.errors import InputError
from configs.files import read_json, sha256_file, sha256_json, write_json
from configs.held_out import is_held_out, require_recorded, uid_group
from configs.progress import console, log
from configs.provenance import vllm_version
from configs.schema import MOST_DRAFTS, RunConfig
from export.checkpoint import Checkpoint
from export.cost import draft_cost
from export.directory import weights_identity
from pipeline.comparison import acceptance_rows, cost_rows, table
from pipeline.conversations import input_exists
from pipeline.greedy import compare
from pipeline.measure import measure, read_logits
from pipeline.prompts import load_prompts
from pipeline.speculation import (
    CPU_ENGINE,
    draft_directory,
    draft_path,
    refuse_draft_name,
    require_draft,
    speculative_config,
    view_of,
)
from pipeline.view import make_view

__all__ = ["answer_room", "held_out", "plan", "ready", "run", "verify"]

PLAIN = "target alone"


def verify(
    target_dir: Path | str,
    drafts: Mapping[str, Path | str | None],
    prompts: Sequence[Sequence[int]],
    *,
    num_speculative_tokens: int = 3,
    max_tokens: int = 256,
    temperature: float = 0,
    vllm: dict[str, Any] | None = None,
    tensor_parallel_size: int = 1,
    view: Literal["auto", "native", "v3"] = "auto",
    work_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Serve a target alone and with each draft on prompts; measure acceptance and compare greedy outputs.

    Args:
        target_dir: the target checkpoint.
        drafts: by name the directory of a draft; None is the released layer.
        prompts: token ids, generation prompt included.
        num_speculative_tokens: draft tokens a step.
        max_tokens: most tokens of an answer; fewer where prompt and answer would exceed what can be served.
        temperature: where it is not 0, measure with it as well.
        vllm: further arguments of vLLM's engine.
        tensor_parallel_size: GPUs of an engine.
        view: serve V3.2 natively or as V3 (`pipeline.view`); `auto` takes the view where there is no GPU.
        work_dir: directory for logs and finished measurements, which a second call reuses; none are kept
            by default.

    Returns:
        `drafts`, by name: `acceptance_length` = 1 + accepted drafts a step, `acceptance_per_position`,
        `num_drafts`, `num_accepted_per_position`, `num_output_tokens`, `seconds`, `greedy` (as
        `greedy.compare`), and `sampled`: the same at `temperature`, or None; `kind`, `mtp` or `eagle3`, and
        what it costs, as `export.cost.draft_cost`; `plain`: speed, and the target's own `noise`;
        `num_prompts`, `view`, `versions`.

    Raises:
        InputError: a draft does not load beside this target, or a prompt is empty or too long.
        ContractError: a draft was made for another target.
        ConfigError: a draft's path would mislead vLLM.
        Layer61Error: vLLM failed.
    """
    target = Checkpoint(target_dir)
    directories = {name: None if draft is None else Path(draft) for name, draft in drafts.items()}
    view = view_of(view)
    for directory in directories.values():
        require_draft(target, directory, view, tensor_parallel_size)
    asked = [list(map(int, ids)) for ids in prompts]
    job = _job(asked, target.config, answer_room(asked, target.config, max_tokens, view))
    engine = _engine(job, target.config, tensor_parallel_size, vllm or {})
    identity = {
        "format": 2,
        "engine": engine,
        "job": job,
        "view": view,
        "target": target_contract(target.directory).model_dump(mode="json", exclude={"path"}),
        "versions": _versions(),
    }
    with contextlib.ExitStack() as stack:
        folder = _temporary(stack, "verify") if work_dir is None else Path(work_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        views = _temporary(stack, "views")

        def served(directory: Path, name: str) -> Path:
            return make_view(directory, views / name) if view == "v3" else directory

        base = {**engine, "model": str(served(target.directory, "target"))}
        plain, logits = _measure_plain(folder, identity, job, base)
        figures = {}
        for number, (name, directory) in enumerate(directories.items()):
            path = None if directory is None else served(directory, f"draft-{number}")
            speculative = speculative_config(path, num_speculative_tokens)
            made_from = {
                **identity,
                "draft": None if directory is None else _draft_identity(Checkpoint(directory)),
                "drafts": num_speculative_tokens,
                "temperature": temperature,
            }
            mine = {"engine": {**base, "speculative_config": speculative}, "logits": None}
            kept = folder / f"draft-{sha256_json(name)[:8]}.json"
            measured = _measured(name, kept, made_from, {**job, **mine, "temperature": temperature})
            figures[name] = {
                "kind": speculative["method"],
                **draft_cost(None if directory is None else Checkpoint(directory), target),
                **_figures(plain, measured, logits, num_speculative_tokens, temperature),
            }
    return {
        "drafts": figures,
        "plain": _speed(plain) | {"start_seconds": plain["start_seconds"], "noise": plain["noise"]},
        "num_prompts": len(asked),
        "view": view,
        "versions": _versions(),
    }


def _job(asked: list[list[int]], config: dict[str, Any], room: list[int]) -> dict[str, Any]:
    """What every engine has to answer."""
    eos = config.get("eos_token_id")
    stop = [eos] if isinstance(eos, int) else list(eos or [])
    return {"prompts": asked, "max_tokens": room, "stop_token_ids": stop}


def _engine(
    job: dict[str, Any], config: dict[str, Any], tensor_parallel_size: int, vllm: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of vLLM that all engines share, model and draft apart."""
    # the same with every number of drafts, so that the target's own run serves them all
    lengths = (len(ids) + most for ids, most in zip(job["prompts"], job["max_tokens"], strict=True))
    longest = max(lengths) + MOST_DRAFTS + 1
    return {
        **({} if torch.cuda.is_available() else CPU_ENGINE),
        "max_model_len": min(longest, config.get("max_position_embeddings", longest)),
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        **vllm,
        "tensor_parallel_size": tensor_parallel_size,
        "seed": 0,
    }


def _temporary(stack: contextlib.ExitStack, kind: str) -> Path:
    folder = tempfile.TemporaryDirectory(prefix=f"layer61-{kind}-", ignore_cleanup_errors=True)
    return Path(stack.enter_context(folder))


def _measure_plain(
    folder: Path, identity: dict[str, Any], job: dict[str, Any], base: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    """What the target alone says, and the file of its logits."""
    # of its own name: it is written before the measurement it belongs to, and kept with it
    logits = folder / f"plain.{sha256_json(identity)[:16]}.npz"
    own = {"engine": {**base, "logprobs_mode": "raw_logits"}, "logits": str(logits)}
    plain = _measured(PLAIN, folder / "plain.json", identity, {**job, **own, "temperature": 0})
    for older in set(folder.glob("plain.*.npz")) - {logits}:
        older.unlink()
    return plain, logits


def _figures(
    plain: dict[str, Any],
    measured: dict[str, Any],
    logits: Path,
    num_speculative_tokens: int,
    temperature: float,
) -> dict[str, Any]:
    """What one draft is worth, and whether its greedy output is the target's."""
    sampled = measured.get("sampled")
    return {
        **_acceptance(measured, num_speculative_tokens),
        "start_seconds": measured["start_seconds"],
        "sampled": sampled and {"temperature": temperature, **_acceptance(sampled, num_speculative_tokens)},
        "greedy": compare(
            plain["outputs"],
            measured["outputs"],
            read_logits(logits, plain["outputs"], measured["outputs"]),
            eps=torch.finfo(getattr(torch, plain["dtype"])).eps,
            largest_noise=plain["noise"]["largest"],
        ),
    }


def answer_room(prompts: list[list[int]], config: dict[str, Any], max_tokens: int, view: str) -> list[int]:
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


def _measured(name: str, path: Path, made_from: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """What an engine measures; taken from `path` where an earlier call kept it, made from the same things."""
    key = sha256_json(made_from)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = read_json(path)
        if kept["key"] == key:
            log("verify", f"{name}: already measured, taken from {path}")
            return kept["result"]
    result = measure(name, {**job, "log": str(path.with_suffix(".log"))})
    write_json(path, {"key": key, "result": result})
    return result


def _versions() -> dict[str, str]:
    return {"vllm": vllm_version(), "torch": torch.__version__}


def _draft_identity(draft: Checkpoint) -> Any:
    """What a draft is: its manifest's identity, or hashes of its files."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return read_json(draft.directory / run_dir.META)["identity"]
    files = sorted({draft.file(name) for name in draft.names})
    return {file: sha256_file(draft.directory / file) for file in ("config.json", *files)}


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
    }


def held_out(config: RunConfig, most: int | None) -> list[list[int]]:
    """Prompts of the first `most` held-out conversations, up to where the last answer begins."""
    documents = load_prompts(config.prompts, config.require_target()).documents
    share, seed = config.prompts.held_out, config.run.seed
    require_recorded(config.run.dir, documents.uids, share, seed)
    chosen = is_held_out(uid_group(documents.uids), share, seed)
    found = (documents[int(i)] for i in np.flatnonzero(chosen)[:most])
    return [d.input_ids[: d.spans[-1][0]].tolist() for d in found]


def plan(config: RunConfig) -> str:
    """One line: what `layer61 verify` will serve; by the settings alone where its input is not there yet.

    Raises:
        ConfigError: no target or no conversations are set, or the draft's path would mislead vLLM.
        InputError: the conversations or the tokenizer are unusable.
    """
    settings, target = config.verify, config.require_target()
    named = [draft_path(config, draft) for draft in settings.drafts]
    if "trained" in settings.drafts:
        refuse_draft_name(config, config.export_dir)
    waiting: list[Any] = [p for p in (target, *named) if p and not p.exists()]
    there = config.prompts.path is None or input_exists(config.prompts.path)
    number = "the"
    if target.exists() and there:
        prompts = held_out(config, settings.max_conversations)
        number = f"{len(prompts):,} ({sum(map(len, prompts)):,} prompt tokens)"
    return (
        f"serve {number} held-out conversations, at most {settings.max_tokens:,} tokens each, with"
        f" {settings.num_speculative_tokens} draft tokens a step: one vLLM engine for the target alone, one"
        f" for each draft ({', '.join(settings.drafts)})"
        + "".join(f"; not yet: there is no {path}" for path in waiting + [config.prompts.path] * (not there))
    )


def ready(config: RunConfig) -> None:
    """Refuse to start without conversations, or to serve another draft than `verify.checkpoint` says.

    Raises:
        InputError: there are no conversations or no export, it is of another checkpoint, or there is no
            such checkpoint.
    """
    held_out(config, config.verify.max_conversations)
    for draft in config.verify.drafts:
        if draft != "trained":
            draft_directory(config, draft)
    if "trained" not in config.verify.drafts:
        return
    out, which = config.export_dir, config.verify.checkpoint
    again = f"layer61 export export.checkpoint={which}"
    if not out.exists():
        raise InputError(f"there is no export at {out.absolute()}", f"run `{again}` with the same settings")
    if not (out / run_dir.META).is_file() or (which == "best" and not run_dir.committed(config.run.dir)):
        return
    wanted = run_dir.find_weights(config.run.dir, which, config.require_target(), verify=False)
    manifest = run_dir.read_export(out, verify=False)
    held = manifest["identity"]["weights"]
    here = "released" if which == "released" else weights_identity(Checkpoint(wanted, config={}))
    if held != here:
        raise InputError(
            f"{out.absolute()} holds {manifest.get('weights')}, verify.checkpoint = {which} is {wanted}",
            f"run `{again} export.replace=true` with the same settings, or set verify.checkpoint",
        )


def run(config: RunConfig) -> dict[str, Any]:
    """`layer61 verify`: measure on the held-out conversations and write `verify.json` in the run directory.

    Returns:
        As `verify`; `before` and `after` are the released layer and the trained draft, None where they were
        not asked for, `greedy` is the trained draft's.

    Raises:
        InputError: there is no export yet, or as `verify`.
    """
    ready(config)
    settings = config.verify
    result = verify(
        config.require_target(),
        {draft: draft_directory(config, draft) for draft in settings.drafts},
        held_out(config, settings.max_conversations),
        num_speculative_tokens=settings.num_speculative_tokens,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        vllm=settings.vllm,
        tensor_parallel_size=config.dump.tensor_parallel_size,
        view=config.dump.view,
        work_dir=config.run.dir / run_dir.VERIFY_WORK,
    )
    drafts = result["drafts"]
    result |= {"before": drafts.get("released"), "after": drafts.get("trained")}
    result["greedy"] = result["after"] and result["after"]["greedy"]
    write_json(config.run.dir / run_dir.VERIFICATION, result)
    console.print(table("Drafts beside one another", drafts, [acceptance_rows(drafts), cost_rows(drafts)]))
    own = result["plain"]["noise"]
    for name, figures in drafts.items():
        log("verify", f"{name}: {_said(figures)}")
        if sampled := figures["sampled"]:
            log("verify", f"{name}, temperature {sampled['temperature']:g}: {_said(sampled)}")
        greedy = figures["greedy"]
        log(
            "verify",
            f"greedy output, {name}: {greedy['equal']} of {greedy['requests']} equal, {greedy['ties']}"
            f" diverge at a tie, {greedy['different']} differ; rereading its own text, the target alone picks"
            f" another token at {own['flipped']:,} of {own['tokens']:,}",
        )
    return result


def _said(figures: dict[str, Any]) -> str:
    positions = ", ".join(f"{x:.1%}" for x in figures["acceptance_per_position"])
    return f"{figures['acceptance_length']:.3f} tokens a step, positions {positions}"
