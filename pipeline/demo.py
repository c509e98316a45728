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
from configs.errors import InputError, Layer61Error
from configs.files import read_json, write_json
from configs.load import freeze, load_config
from configs.progress import console, log, say
from configs.provenance import collect
from configs.schema import RunConfig

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


def _table(summary: dict[str, Any], config: RunConfig) -> Table:
    table = Table(title="Draft layer: released and trained", title_justify="left")
    table.add_column("held-out conversations")
    table.add_column("released", justify="right")
    table.add_column("trained", justify="right")
    before, after = summary["before"], summary["after"]
    drafts = config.verify.num_speculative_tokens
    rows = [(f"acceptance length, {drafts} drafts, vLLM", "acceptance_length")]
    rows.append(("acceptance length, offline", "offline_acceptance_length"))
    for name, key in rows:
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}")
    for k, pair in enumerate(
        zip(before["acceptance_per_position"], after["acceptance_per_position"], strict=True)
    ):
        table.add_row(f"acceptance at position {k + 1}", *(f"{x:.1%}" for x in pair))
    table.add_section()
    if summary["loop_share"] is not None:
        table.add_row("target's answers that are loops", f"{summary['loop_share']:.1%} of tokens", "")
        table.add_section()
    for stage, cost in summary["stages"].items():
        table.add_row(stage, f"{cost['seconds']:.0f} s", f"{cost['bytes'] / 2**20:,.1f} MiB")
    table.add_section()
    table.add_row(
        "whole run", f"{summary['seconds']:.0f} s", f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB RAM"
    )
    return table


def run(files: Sequence[str], overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """Target, dump, train, evaluate, export, verify; then `RUN/summary.json` and a table.

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
        "evaluate": run_dir.evaluation(folder, "best"),
        "export": config.export_dir,
        "verify": folder / run_dir.VERIFICATION,
    }
    stages: dict[str, dict[str, float]] = {}
    results: dict[str, dict[str, Any]] = {}
    with PeakMemory() as memory:
        for verb, place in places.items():
            began = time.monotonic()
            if verb == "evaluate":
                for checkpoint in ("released", "best"):
                    wanted = [*overrides, f"evaluate.checkpoint={checkpoint}"]
                    results[checkpoint] = _stage(verb, files, wanted)
            else:
                results[verb] = _stage(verb, files, overrides)
            size = _size_bytes(place) if place.is_dir() else place.stat().st_size if place.exists() else 0
            stages[verb] = {"seconds": round(time.monotonic() - began, 1), "bytes": size}
    earlier = _earlier(folder / run_dir.SUMMARY)
    # a stage that found its work done keeps the time it took to do it
    for verb, cost in stages.items():
        cost["seconds"] = max(cost["seconds"], earlier.get("stages", {}).get(verb, {}).get("seconds", 0))
    served = results["verify"]
    keys = ("acceptance_length", "acceptance_per_position")
    summary = {
        "before": {k: served["before"][k] for k in keys}
        | {"offline_acceptance_length": results["released"]["acceptance_length"]},
        "after": {k: served["after"][k] for k in keys}
        | {"offline_acceptance_length": results["best"]["acceptance_length"]},
        "greedy": served["greedy"],
        "stages": stages,
        "seconds": round(sum(cost["seconds"] for cost in stages.values()), 1),
        "peak_rss_bytes": max(memory.peak_bytes, earlier.get("peak_rss_bytes", 0)),
        # None where this start captured nothing
        "loop_share": _first(results["dump"].get("loop_share"), earlier.get("loop_share")),
        **collect(),
    }
    write_json(folder / run_dir.SUMMARY, summary)
    console.print(_table(summary, config))
    greedy = served["greedy"]
    say(
        f"greedy output with the draft: {greedy['equal']} of {greedy['requests']} equal to plain decoding,"
        f" {greedy['ties']} diverge at a tie (within the target's own rounding), {greedy['different']} differ"
    )
    for verb, place in places.items():
        say(f"{verb:<9} {place}")
    say(f"summary   {folder / run_dir.SUMMARY}")
    return 0
