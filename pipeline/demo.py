"""Every stage in turn, each a process of its own exactly as a user starts it, and the table at the end."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from configs import run_dir
from configs.engine_keys import check_keys
from configs.errors import ConfigError, InputError, Layer61Error
from configs.files import read_json, write_json
from configs.load import freeze, load_config
from configs.progress import console, count, log, say
from configs.provenance import collect
from configs.schema import RunConfig
from configs.target import target_config
from pipeline.capture.settings import choose_view
from pipeline.comparison import acceptance_rows, cost_rows, table, with_interval

__all__ = ["run"]


class PeakMemory:
    """Largest memory of this process and all below it, sampled; shared pages are counted once (PSS)."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self._interval_s):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


@contextmanager
def _child(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    except BaseException:
        # the stage saves what it has when it is asked to end
        process.terminate()
        process.wait()
        raise


def _stage(verb: str, files: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Run one verb and return the JSON object it prints.

    Raises:
        Layer61Error: the verb failed; its own message is already on the screen.
    """
    command = [sys.executable, "-m", "pipeline", verb, *files, *overrides]
    command += [] if verb == "target" else ["--json"]
    log("demo", f"layer61 {verb}")
    with _child(command) as process:
        out, _ = process.communicate()
    if process.returncode:
        raise Layer61Error(
            f"layer61 {verb} ended with exit code {process.returncode}",
            "the same command continues from here",
        )
    return json.loads(out) if out.strip() else {}


def _size_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _earlier(path: Path) -> dict[str, Any]:
    """The summary of an earlier run of the same stages, empty where there is none."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((v for v in values if v is not None), None)


def _table(summary: dict[str, Any]) -> Table:
    drafts = {"released": summary["before"], "trained": summary["after"]}
    if (pruned := summary.get("pruned")) is not None:
        drafts[f"{pruned['draft_vocab_size']:,} tokens"] = pruned
    shares = [draft["offline"]["acceptance_per_position"] for draft in drafts.values()]
    offline = [with_interval(draft["offline"]) for draft in drafts.values()]
    sections = [[[f"length, offline, {count(len(shares[0]), 'draft token')}", *offline]]]
    if summary["not_served"]:
        rows = enumerate(zip(*shares, strict=True), 1)
        sections.append([[f"accepted at position {k}", *(f"{x:.1%}" for x in row)] for k, row in rows])
    else:
        sections += [acceptance_rows(drafts), cost_rows(drafts)]
    if summary["loop_share"] is not None:
        sections.append([["answers that are loops", f"{summary['loop_share']:.2%}"]])
    stages = summary["stages"].items()
    sections.append([[n, f"{c['seconds']:.0f} s", f"{c['bytes'] / 2**20:,.1f} MiB"] for n, c in stages])
    peak = f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB RAM"
    sections.append([["whole run", f"{summary['seconds']:.0f} s", peak]])
    return table("Draft layer: released and trained", drafts, sections)


def _not_served(config: RunConfig) -> str:
    """Why vLLM cannot serve the target here as it is; empty where it can."""
    dump = config.dump.model_copy(update={"engine": "vllm", "view": "auto"})
    try:
        choose_view(config.model_copy(update={"dump": dump}), target_config(config.require_target()))
    except ConfigError as error:
        return f"vLLM has no sparse attention without a GPU, and {error.message}"
    return ""


def _pruned(config: RunConfig) -> tuple[int, Path] | None:
    """Size and place of a second export that the demo makes of an EAGLE-3 draft: a quarter of the tokens."""
    trained = config.eagle3.draft_vocab_size or config.export.draft_vocab_size
    if config.train.draft != "eagle3" or trained is not None:
        return None
    size = config.tiny.vocab_size // 4
    return size, config.export_dir.with_name(f"{config.export_dir.name}-{size}")


def run(files: Sequence[str], overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """Target, dump, train, export, evaluate, verify; then `RUN/summary.json` and a table.

    Of an EAGLE-3 draft a second export that can say a quarter of the tokens is measured beside the first.
    What vLLM cannot serve here is not verified: the summary says why, and has no figures of a server.

    Args:
        files: configuration files, as on the command line.
        overrides: `section.key=value` settings, as on the command line.
        dry_run: let each stage say what it would do, as far as its input is there already.
    """
    config = load_config(files, overrides)
    folder = config.run.dir
    if dry_run:
        from pipeline import dump
        from pipeline.tiny import target

        for verb, sections in (
            ("dump", ("target", "prompts", "dump")),
            ("train", ("target", "train", "eagle3")),
        ):
            freeze(config, verb, sections, write=False)
            check_keys(config, verb)
        # what a stage makes is not there for the next one
        planned = dump.plan(config)
        for verb, lines in (("target", target.dry_run(config.tiny)), ("dump", str(planned))):
            for line in lines.splitlines():
                log(verb, line)
        if planned.missing and config.require_target().exists():
            raise InputError(planned.missing, "the run would stop here")
        log("demo", "then train, evaluate, export and verify from what the dump wrote")
        return 0
    places = {
        "target": config.require_target(),
        "dump": Path(config.store_path),
        "train": run_dir.directory(folder),
        "export": config.export_dir,
        "evaluate": run_dir.evaluation(folder, "best"),
        "verify": folder / run_dir.VERIFICATION,
    }
    # what each stage is started with beside the settings, once for each list
    starts: dict[str, list[list[str]]] = {verb: [[]] for verb in places}
    starts["evaluate"] = [["evaluate.checkpoint=released"], ["evaluate.checkpoint=best"]]
    if (pruned := _pruned(config)) is not None:
        tokens, directory = pruned
        quoted = json.dumps(str(directory))
        starts["export"].append([f"export.draft_vocab_size={tokens}", f"export.dir={quoted}"])
        starts["evaluate"].append([f"evaluate.checkpoint={quoted}"])
        starts["verify"] = [[f"verify.drafts={json.dumps([*config.verify.drafts, str(directory)])}"]]
    stages: dict[str, dict[str, float]] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    skipped = ""
    with PeakMemory() as memory:
        for verb, place in places.items():
            if verb == "verify" and (skipped := _not_served(config)):
                log("demo", f"verify is left out: {skipped}")
                continue
            began = time.monotonic()
            results[verb] = [_stage(verb, files, [*overrides, *more]) for more in starts[verb]]
            size = _size_bytes(place) if place.is_dir() else place.stat().st_size if place.exists() else 0
            stages[verb] = {"seconds": round(time.monotonic() - began, 1), "bytes": size}
    earlier = _earlier(folder / run_dir.SUMMARY)
    # a stage that found its work done keeps the time it took to do it
    for verb, cost in stages.items():
        cost["seconds"] = max(cost["seconds"], earlier.get("stages", {}).get(verb, {}).get("seconds", 0))
    served: dict[str, Any] = results["verify"][0] if "verify" in results else {}
    figures = [served.get("before", {}), served.get("after", {})]
    figures += [served.get("drafts", {}).get(str(pruned[1]), {})] if pruned is not None else []
    keys = [
        "acceptance_length",
        "low",
        "high",
        "acceptance_per_position",
        "num_speculative_tokens",
        "sampled",
    ]
    keys += ["by_num_steps", "by_source", "by_length", "recommendation", "kind"]
    keys += ["parameters_read", "head_parameters_read", "bytes"]
    before, after, *third = (
        {k: found.get(k) for k in keys}
        | ({} if found else {"kind": config.train.draft})
        | {"offline_acceptance_length": offline["acceptance_length"]}
        | {"offline": {k: offline[k] for k in keys[:4]}}
        for found, offline in zip(figures, results["evaluate"], strict=True)
    )
    summary = {
        "before": before,
        "after": after,
        **({"pruned": third[0] | {"draft_vocab_size": pruned[0]}} if pruned is not None else {}),
        "greedy": served.get("greedy"),
        "not_served": skipped,
        "stages": stages,
        "seconds": round(sum(cost["seconds"] for cost in stages.values()), 1),
        "peak_rss_bytes": max(memory.peak_bytes, earlier.get("peak_rss_bytes", 0)),
        # None where this start captured nothing
        "loop_share": _first(results["dump"][0].get("loop_share"), earlier.get("loop_share")),
        **collect(),
    }
    write_json(folder / run_dir.SUMMARY, summary)
    console.print(_table(summary))
    if (greedy := summary["greedy"]) is not None:
        same = f"{greedy['equal']} of {greedy['requests']} equal to plain decoding"
        ties = f"{greedy['ties']} diverge at a tie (within the target's own rounding)"
        say(f"greedy output with the draft: {same}, {ties}, {greedy['different']} differ")
        say(served["recommendation"])
    for verb in stages:
        say(f"{verb:<9} {places[verb]}")
    say(f"summary   {folder / run_dir.SUMMARY}")
    return 0
