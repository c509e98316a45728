"""What a run directory holds, as the report needs it; what an older run lacks is absent, not an error."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from configs import run_dir
from configs.errors import InputError
from configs.files import read_json

__all__ = ["Acceptance", "Draft", "Results", "last_part", "read"]

T = TypeVar("T")

SELECTION = ("queries", "mass_over_best", "released_mass_over_best", "recall", "overlap")
RESULTS = (run_dir.METRICS, run_dir.VERIFICATION, run_dir.SERVING, run_dir.SUMMARY, run_dir.EVALUATIONS)


@dataclass(frozen=True)
class Acceptance:
    """Acceptance length with K draft tokens; `low` and `high` where an interval was measured.

    Attributes:
        num_steps: K.
        temperature: of the target; 0 is greedy.
        length: tokens a step, the target's own included.
        low, high: bounds of the interval, or None.
        group: source or length bucket, empty for all.
        documents, tokens: what it was measured on, or None.
    """

    num_steps: int
    temperature: float
    length: float
    low: float | None = None
    high: float | None = None
    group: str = ""
    documents: int | None = None
    tokens: int | None = None

    @property
    def point(self) -> tuple[float, ...]:
        """(value,) or (value, low, high)."""
        return (self.length,) if self.low is None or self.high is None else (self.length, self.low, self.high)


@dataclass(frozen=True)
class Draft:
    """What was measured of one draft, by the server or offline."""

    name: str
    positions: list[float]
    by_num_steps: list[Acceptance]
    by_source: list[Acceptance]
    by_length: list[Acceptance]
    found: dict[str, Any]

    def at(self, num_steps: int, temperature: float) -> Acceptance | None:
        """The measurement with K draft tokens."""
        wanted = (num_steps, temperature)
        return next((a for a in self.by_num_steps if (a.num_steps, a.temperature) == wanted), None)


@dataclass
class Results:
    """Everything of a run that the report shows."""

    run: Path
    served: dict[str, Draft] = field(default_factory=dict)
    offline: dict[str, Draft] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    dumps: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    rejects: Counter[str] = field(default_factory=Counter)
    settings: dict[str, str] = field(default_factory=dict)


def last_part(path: Any) -> str:
    """The last part of a path: a report is shown to others."""
    return str(path).rstrip("/").rsplit("/", 1)[-1]


def _from(path: Path, make: Callable[[dict[str, Any]], T]) -> T:
    """What is made of a JSON file. Raises InputError, which names it, where it is not as we write it."""
    try:
        return make(dict(read_json(path)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged: {type(error).__name__}: {error}",
            "move it out of the way: the stage that wrote it writes it again",
        ) from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; what is none, as a line cut short by a kill, is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def _acceptance(row: dict[str, Any], group: str, num_steps: int, temperature: float = 0.0) -> Acceptance:
    low, high = row.get("low"), row.get("high")
    return Acceptance(
        int(row.get("num_steps", num_steps)),
        float(row.get("temperature", temperature)),
        float(row["acceptance_length"]),
        None if low is None else float(low),
        None if high is None else float(high),
        group,
        row.get("documents"),
        row.get("tokens"),
    )


def _groups(found: dict[str, Any], key: str, name: str, num_steps: int) -> list[Acceptance]:
    rows = found.get(key) or []
    if isinstance(rows, dict):  # before there were intervals
        rows = [{name: group, **row} for group, row in rows.items()]
    return [_acceptance(row, str(row[name]), num_steps) for row in rows]


def _draft(name: str, found: dict[str, Any]) -> Draft:
    """One draft's figures; without a table by K, its shares by position give one."""
    positions = [float(share) for share in found["acceptance_per_position"]]
    num_steps = len(positions)
    rows = [_acceptance(row, "", num_steps) for row in found.get("by_num_steps") or []]
    if not rows:
        float(found["acceptance_length"])
        rows = [Acceptance(k + 1, 0.0, 1 + sum(positions[: k + 1])) for k in range(num_steps)]
        if sampled := found.get("sampled"):
            shares = sampled["acceptance_per_position"]
            rows += [
                Acceptance(k + 1, float(sampled["temperature"]), 1 + sum(shares[: k + 1]))
                for k in range(len(shares))
            ]
    for row in found.get("speedup") or []:
        float(row["speedup"]), int(row["num_steps"]), int(row["concurrency"])
    for row in (found.get("selection") or {}).get("by_length", []):
        row["length"], *(float(row[key]) for key in SELECTION), int(row["step"])
    by_source = _groups(found, "by_source", "source", num_steps)
    return Draft(name, positions, rows, by_source, _groups(found, "by_length", "length", num_steps), found)


def _verification(found: dict[str, Any]) -> dict[str, Any]:
    drafts = found.get("drafts")
    if drafts is None:  # of an earlier version
        drafts = {"released": found["before"], "trained": found["after"]}
    for sample in found.get("samples") or []:
        str(sample["prompt"]), *(t["text"] + t["kind"] for one in sample["drafts"].values() for t in one)
    names = _short_names(drafts)
    made = {names[name]: _draft(names[name], one) for name, one in drafts.items() if one is not None}
    samples = [
        sample | {"drafts": {names.get(name, name): tokens for name, tokens in sample["drafts"].items()}}
        for sample in found.get("samples") or []
    ]
    return found | {"drafts": made, "samples": samples}


def _short_names(drafts: Iterable[str]) -> dict[str, str]:
    """Of a draft that is a directory, its name; where two have the same, all of it."""
    short = Counter(last_part(name) for name in set(drafts))
    return {name: last_part(name) if short[last_part(name)] == 1 else name for name in drafts}


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    for stage in found["stages"].values():
        float(stage["seconds"]), int(stage["bytes"])
    int(found["peak_rss_bytes"]), dict(found["versions"])
    return found


def _held_out(found: dict[str, Any]) -> dict[str, Any]:
    return {key: int(found[key]) for key in ("held_out_documents", "training_documents")}


def _serving(found: dict[str, Any]) -> dict[str, Any]:
    for row in found["runs"]:
        for key in ("output_tokens_per_second", "mean_ms_per_token", "ratio", "concurrency"):
            float(row[key])
    names = _short_names([row["draft"] for row in found["runs"]])
    return found | {"runs": [row | {"draft": names[row["draft"]]} for row in found["runs"]]}


def _kind(reason: str) -> str:
    """A reason without the numbers that make each its own."""
    return re.sub(r"\d[\d,]*(\.\d+)?", "…", reason)


def read(run: Path) -> Results:
    """Read a run directory.

    Raises:
        InputError: the directory is missing, nothing in it was made by this program, or a file is damaged.
    """
    known = (*RESULTS, run_dir.SETTINGS, run_dir.DUMPS)
    if not any(found for pattern in known for found in run.glob(pattern)):
        raise InputError(f"{run} is not a run directory: it holds none of {', '.join(known)}", "name RUN=...")
    found = Results(run)
    if (path := run / run_dir.VERIFICATION).exists():
        found.verification = _from(path, _verification)
        found.served = found.verification["drafts"]
    for path in sorted(run.glob(run_dir.EVALUATIONS)):
        name = path.name.removeprefix("evaluate.").removesuffix(".json")
        found.offline[name] = _from(path, partial(_draft, name))
    if (path := run / run_dir.SERVING).exists():
        found.serving = _from(path, _serving)
    if (path := run / run_dir.SUMMARY).exists():
        found.summary = _from(path, _summary)
    # what was there before stands first in every figure
    found.offline = dict(sorted(found.offline.items(), key=lambda one: one[0] != "released"))
    found.metrics = [row for row in _lines(run / run_dir.METRICS) if isinstance(row.get("step"), int)]
    found.dumps = {path.name: _from(path, dict) for path in sorted(run.glob(run_dir.DUMPS))}
    if (path := run / run_dir.HELD_OUT).exists():
        found.held_out = _from(path, _held_out)
    found.rejects = Counter(_kind(str(row.get("reason"))) for row in _lines(run / run_dir.REJECTS))
    found.settings = {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(run.glob(run_dir.SETTINGS))
    }
    return found
