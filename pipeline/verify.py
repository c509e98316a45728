"""`layer61 verify`: serve target and drafts in vLLM, and measure what each draft is worth.

One engine after the other (`pipeline.measure`): the target alone, which keeps its logits, then one for each
draft, judged by these. What an engine measured is kept: another draft costs one engine. Acceptance comes from
what vLLM counts for each request, at two numbers of draft tokens; `pipeline.replay` gives the others. Greedy
outputs with and without draft must be equal but for ties; `pipeline.greedy` says how those are recognised.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from configs import run_dir
from configs.acceptance import ACCEPTED, TRIED, acceptance_length, share_accepted, tables
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
from pipeline.prompts import Document, load_prompts
from pipeline.replay import recommend, served_counts, speedups
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

__all__ = [
    "answer_room",
    "engine_arguments",
    "held_out",
    "job_of",
    "plan",
    "ready",
    "run",
    "speculating",
    "verify",
]

PLAIN = "target alone"
# answers shown token by token
SAMPLES = 4


def verify(
    target_dir: Path | str,
    drafts: Mapping[str, Path | str | None],
    prompts: Sequence[Sequence[int]],
    *,
    sources: Sequence[str] | None = None,
    num_speculative_tokens: int = 3,
    num_steps_max: int = 1,
    max_tokens: int = 256,
    temperature: float = 0,
    top_p: float = 1,
    marked: int = 0,
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
        sources: of each prompt; all of one by default.
        num_speculative_tokens: draft tokens a step, of all figures but the lists.
        num_steps_max: number up to which the lists go, if it is more than that.
        max_tokens: most tokens of an answer; fewer where prompt and answer would exceed what can be served.
        temperature: where it is not 0, measure with it as well.
        top_p: of the answers sampled then.
        marked: greedy answers whose tokens are told apart.
        vllm: further arguments of vLLM's engine.
        tensor_parallel_size: GPUs of an engine.
        view: serve V3.2 natively or as V3 (`pipeline.view`); `auto` takes the view where there is no GPU.
        work_dir: directory for logs and finished measurements, which a second call reuses; none are kept
            by default.

    Returns:
        `drafts`, by name: at temperature 0 `acceptance_length` = 1 + accepted drafts a step with `low` and
        `high`, `acceptance_per_position`, `num_drafts`, `num_accepted_per_position`, `num_output_tokens`,
        `greedy` (as `greedy.compare`); `sampled`: the same at `temperature`, or None; the lists of
        `configs.acceptance.tables`, `speedup` and `recommendation` (`pipeline.replay`); `marks`: of the first
        answers (kind, token id) in their order, `accepted`, `rejected` (not part of it) or `own`;
        `start_seconds`; `kind`, `mtp` or `eagle3`, and what it costs, as `export.cost.draft_cost`. `plain`:
        `start_seconds`, `step_seconds` by the number of requests at a time, and the target's own `noise`.
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
    job = job_of(asked, target.config, answer_room(asked, target.config, max_tokens, view))
    job["top_p"] = top_p
    engine = engine_arguments(job, target.config, tensor_parallel_size, vllm or {})
    identity = {
        "format": 3,
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
        kinds = np.array(sources or [""] * len(asked), dtype=object)
        figures = {}
        rounds = sorted({num_speculative_tokens, max(num_speculative_tokens, num_steps_max)})
        for number, (name, directory) in enumerate(directories.items()):
            path = None if directory is None else served(directory, f"draft-{number}")
            mine: dict[str, Any] = {
                "engine": {**base, **speculating(path, rounds[-1])},
                "logits": None,
                "rounds": rounds,
                "temperature": temperature,
                "marked": min(marked, len(asked)),
            }
            made_from = {
                **identity,
                "draft": None if directory is None else _draft_identity(Checkpoint(directory)),
                **{key: mine[key] for key in ("rounds", "temperature", "marked")},
            }
            kept = folder / f"draft-{sha256_json(name)[:8]}.json"
            measured = _measured(name, kept, made_from, {**job, **mine})
            figures[name] = {
                "kind": mine["engine"]["speculative_config"]["method"],
                **draft_cost(None if directory is None else Checkpoint(directory), target),
                **_figures(name, plain, measured, logits, asked, kinds, temperature),
            }
    return {
        "drafts": figures,
        "plain": {
            "start_seconds": plain["start_seconds"],
            "step_seconds": plain["step_seconds"]["0"],
            "noise": plain["noise"],
        },
        "num_prompts": len(asked),
        "view": view,
        "versions": _versions(),
    }


def job_of(asked: list[list[int]], config: dict[str, Any], room: list[int]) -> dict[str, Any]:
    """What every engine has to answer."""
    eos = config.get("eos_token_id")
    stop = [eos] if isinstance(eos, int) else list(eos or [])
    return {"prompts": asked, "max_tokens": room, "stop_token_ids": stop}


def engine_arguments(
    job: dict[str, Any], config: dict[str, Any], tensor_parallel_size: int, vllm: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of vLLM that all engines share, model and draft apart."""
    # the same with every number of drafts, so that the target's own run serves them all
    lengths = (len(ids) + most for ids, most in zip(job["prompts"], job["max_tokens"], strict=True))
    longest = max(lengths) + MOST_DRAFTS + 1
    return {
        **({} if torch.cuda.is_available() else CPU_ENGINE),
        "max_model_len": min(longest, config.get("max_position_embeddings", longest)),
        "skip_tokenizer_init": True,
        # the scheduler then sees each draft
        "async_scheduling": False,
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
    own: dict[str, Any] = {"engine": {**base, "logprobs_mode": "raw_logits"}, "logits": str(logits)}
    own |= {"rounds": [0], "temperature": 0, "marked": 0}
    plain = _measured(PLAIN, folder / "plain.json", identity, {**job, **own})
    for older in set(folder.glob("plain.*.npz")) - {logits}:
        older.unlink()
    return plain, logits


def speculating(draft: Path | None, num_steps_max: int) -> dict[str, Any]:
    """Arguments of vLLM for an engine that drafts up to so many tokens and tells what each request took."""
    speculative = speculative_config(draft, num_steps_max)
    # a table by the number of requests, which each round fills in
    speculative["num_speculative_tokens_per_batch_size"] = [[1, 1, num_steps_max]]
    return {"speculative_config": speculative, "per_request_spec_decode_metrics": "detailed"}


def _figures(
    name: str,
    plain: dict[str, Any],
    measured: dict[str, Any],
    logits: Path,
    prompts: list[list[int]],
    sources: np.ndarray,
    temperature: float,
) -> dict[str, Any]:
    """What one draft is worth, and whether its greedy output is the target's."""
    first, last = measured["rounds"][0], measured["rounds"][-1]
    K = first["num_steps"]
    kinds = {0: "greedy"} | ({temperature: "sampled"} if first["sampled"] else {})
    counts = [
        served_counts({r["num_steps"]: r[kind] for r in (first, last)}, last["num_steps"])
        for kind in kinds.values()
    ]
    plain_outputs, outputs = plain["rounds"][0]["greedy"]["outputs"], first["greedy"]["outputs"]
    tokens = np.array([len(answer) for answer in outputs])
    lengths = [len(ids) + len(answer) for ids, answer in zip(prompts, plain_outputs, strict=True)]
    lists = tables(np.stack(counts, 1), list(kinds), tokens, sources, lengths)
    bounds = {
        row["temperature"]: {key: row[key] for key in ("low", "high")}
        for row in lists["by_num_steps"]
        if row["num_steps"] == K
    }
    sampled = first["sampled"]
    served_at = temperature if sampled else 0
    rows = [row for row in lists["by_num_steps"] if row["temperature"] == served_at]
    speedup = speedups(rows, plain["step_seconds"]["0"], measured["step_seconds"])
    return {
        **_acceptance(counts[0], first["greedy"], K),
        **bounds[0],
        "start_seconds": measured["start_seconds"],
        "sampled": sampled
        and {"temperature": temperature, **_acceptance(counts[1], sampled, K), **bounds[temperature]},
        "greedy": compare(
            plain_outputs,
            outputs,
            read_logits(logits, plain_outputs, outputs),
            eps=torch.finfo(getattr(torch, plain["dtype"])).eps,
            largest_noise=plain["noise"]["largest"],
        ),
        **lists,
        "speedup": speedup,
        "recommendation": recommend(name, speedup, served_at),
        "marks": [
            _marks(*answer)
            for answer in zip(outputs, first["greedy"]["accepted"], first["greedy"]["drafts"], strict=False)
        ],
    }


def _marks(output: list[int], accepted: list[int], drafts: list[list[int]]) -> list[tuple[str, int]]:
    """The tokens of an answer: `accepted` drafts, the target's `own` and before it the `rejected` draft."""
    found, at = [("own", token) for token in output[:1]], 1
    for number, draft in zip(accepted, drafts, strict=True):
        # what vLLM accepts behind the end of the answer is not in it
        found += [("accepted", token) for token in output[at : at + number]]
        at += number
        if at < len(output):
            # an engine that schedules ahead does not know its drafts: below 0
            found += [("rejected", token) for token in draft[number : number + 1] if token >= 0]
            found.append(("own", output[at]))
            at += 1
    return found


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


def _acceptance(counts: np.ndarray, result: dict[str, Any], num_speculative_tokens: int) -> dict[str, Any]:
    """Figures of one speculative run from what `served_counts` says of it, [N, K, 2, S]."""
    served = counts.sum(0)[num_speculative_tokens - 1, :, :num_speculative_tokens]
    drafts = int(served[TRIED, 0])
    if not drafts:
        raise InputError(
            "vLLM drafted nothing: every answer ended within one token",
            "raise verify.max_tokens or use other conversations",
        )
    return {
        "acceptance_length": float(acceptance_length(served)),
        "acceptance_per_position": share_accepted(served).tolist(),
        "num_drafts": drafts,
        "num_accepted_per_position": served[ACCEPTED].astype(int).tolist(),
        "num_speculative_tokens": num_speculative_tokens,
        "num_output_tokens": sum(map(len, result["outputs"])),
    }


def held_out(config: RunConfig, most: int | None) -> list[list[int]]:
    """Prompts of the first `most` held-out conversations, up to where the last answer begins."""
    return [_prompt(document) for document in _held_out(config, most)]


def _held_out(config: RunConfig, most: int | None) -> list[Document]:
    documents = load_prompts(config.prompts, config.require_target()).documents
    share, seed = config.prompts.held_out, config.run.seed
    require_recorded(config.run.dir, documents.uids, share, seed)
    chosen = is_held_out(uid_group(documents.uids), share, seed)
    return [documents[int(i)] for i in np.flatnonzero(chosen)[:most]]


def _prompt(document: Document) -> list[int]:
    return document.input_ids[: document.spans[-1][0]].tolist()


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
    number, more = "the", ""
    if settings.num_steps_max > settings.num_speculative_tokens:
        more = f" and {settings.num_steps_max}"
    if target.exists() and there:
        prompts = held_out(config, settings.max_conversations)
        number = f"{len(prompts):,} ({sum(map(len, prompts)):,} prompt tokens)"
    return (
        f"serve {number} held-out conversations, at most {settings.max_tokens:,} tokens each, with"
        f" {settings.num_speculative_tokens}{more} draft tokens a step: one vLLM engine for the target alone,"
        f" one for each draft ({', '.join(settings.drafts)})"
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
        not asked for, `greedy` is the trained draft's, `recommendation` too, or the first draft's; `samples`:
        a few answers as text in place of `marks` (docs/run-directory.md).

    Raises:
        InputError: there is no export yet, or as `verify`.
    """
    ready(config)
    settings = config.verify
    documents = _held_out(config, settings.max_conversations)
    result = verify(
        config.require_target(),
        {draft: draft_directory(config, draft) for draft in settings.drafts},
        [_prompt(document) for document in documents],
        sources=[document.source for document in documents],
        num_speculative_tokens=settings.num_speculative_tokens,
        num_steps_max=settings.num_steps_max,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=config.prompts.top_p,
        marked=SAMPLES,
        vllm=settings.vllm,
        tensor_parallel_size=config.dump.tensor_parallel_size,
        view=config.dump.view,
        work_dir=config.run.dir / run_dir.VERIFY_WORK,
    )
    drafts = result["drafts"]
    result = {"format": 2, **result, "samples": _samples(config.require_target(), documents, drafts)}
    result |= {"before": drafts.get("released"), "after": drafts.get("trained")}
    result["greedy"] = result["after"] and result["after"]["greedy"]
    result["recommendation"] = (result["after"] or next(iter(drafts.values())))["recommendation"]
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
        log("verify", figures["recommendation"])
    return result


def _samples(
    target: Path, documents: list[Document], drafts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The first answers as text, token by token; takes `marks` out of the drafts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(target))

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def pieces(marks: list[tuple[str, int]]) -> Iterator[dict[str, str]]:
        taken, shown = list[int](), ""
        for kind, token in marks:
            whole = text([*taken, token])
            # a letter that only the next token completes is shown with that
            piece = "" if whole.endswith("\ufffd") else whole[len(shown) :]
            yield {"text": piece, "kind": kind}
            if kind != "rejected":
                taken, shown = [*taken, token], shown + piece

    marks = {name: figures.pop("marks") for name, figures in drafts.items()}
    return [
        {
            "uid": str(document.uid),
            "source": document.source,
            "prompt": text(_prompt(document)),
            "drafts": {name: list(pieces(answers[number])) for name, answers in marks.items()},
        }
        for number, document in enumerate(documents[:SAMPLES])
    ]


def _said(figures: dict[str, Any]) -> str:
    positions = ", ".join(f"{x:.1%}" for x in figures["acceptance_per_position"])
    bounds = "" if figures["low"] is None else f" ({figures['low']:.3f} to {figures['high']:.3f})"
    return f"{figures['acceptance_length']:.3f}{bounds} tokens a step, positions {positions}"
