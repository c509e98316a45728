"""One self-contained HTML page about a run: figures and tables of what was measured; no scripts, no links."""

import contextlib
import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from configs import run_dir
from configs.errors import InputError
from configs.files import atomic_write, read_json

__all__ = ["write"]

T = TypeVar("T")

RESULTS = (run_dir.METRICS, run_dir.VERIFICATION, run_dir.SERVING, run_dir.SUMMARY, run_dir.EVALUATIONS)

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; margin: 1rem 0 } svg { max-width: 100%; height: auto }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #d0d7de }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums }
"""


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; what is no metric, as a line cut short by a kill, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def _from(path: Path, make: Callable[[Path], T]) -> T:
    """What is made of a file. Raises InputError, which names it, where it is not as we write it."""
    try:
        return make(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged: {type(error).__name__}: {error}",
            "move it out of the way: the stage that wrote it writes it again",
        ) from error


def _evaluation(path: Path) -> dict[str, Any]:
    found = read_json(path)
    found["acceptance_length"] += 0.0
    found["acceptance_per_position"] = [share + 0.0 for share in found["acceptance_per_position"]]
    return found


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    text = out.getvalue()
    return text[text.index("<svg") :]


def _axes(title: str, x: str, y: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2))
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _curves(
    rows: list[dict[str, Any]], title: str, y: str, names: dict[str, str], percent: bool = False
) -> str:
    """One figure of some metrics over optimizer steps; empty where none of them was recorded."""
    axes = _axes(title, "optimizer step", y)
    drawn = False
    for name, label in names.items():
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
            drawn = True
    if not drawn:
        return ""
    if percent:
        axes.yaxis.set_major_formatter("{x:.0%}")
    if len(names) > 1:
        axes.legend(frameon=False)
    return _svg(axes.figure)


def _bars(before: list[float], after: list[float]) -> str:
    axes = _axes("Acceptance on held-out conversations, served in vLLM", "draft position", "accepted")
    places = range(1, len(before) + 1)
    axes.bar([p - 0.2 for p in places], before, 0.38, label="released", color="#8c959f")
    axes.bar([p + 0.2 for p in places], after, 0.38, label="trained", color="#0969da")
    axes.set_xticks(list(places))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False)
    return _svg(axes.figure)


def _table(header: list[str], rows: list[list[Any]]) -> str:
    def line(tag: str, cells: list[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


def _served(path: Path) -> str:
    served = read_json(path)
    before, after = served.get("before"), served.get("after")
    if not before or not after:
        return ""
    rows = [["acceptance length", f"{before['acceptance_length']:.3f}", f"{after['acceptance_length']:.3f}"]]
    pairs = zip(before["acceptance_per_position"], after["acceptance_per_position"], strict=True)
    rows += [[f"accepted at position {k + 1}", f"{a:.1%}", f"{b:.1%}"] for k, (a, b) in enumerate(pairs)]
    return _bars(before["acceptance_per_position"], after["acceptance_per_position"]) + _table(
        ["served in vLLM", "released", "trained"], rows
    )


def _acceptance(run: Path) -> str:
    """Served acceptance, released and trained, beside the offline evaluator's figures where there are any."""
    parts = []
    evaluations = sorted(run.glob(run_dir.EVALUATIONS))
    offline = {p.name.split(".")[1]: _from(p, _evaluation) for p in evaluations}
    if (run / run_dir.VERIFICATION).exists():
        parts.append(_from(run / run_dir.VERIFICATION, _served))
    if offline:
        rows = [
            [
                name,
                f"{x['acceptance_length']:.3f}",
                " ".join(f"{a:.1%}" for a in x["acceptance_per_position"]),
            ]
            for name, x in offline.items()
        ]
        parts.append(_table(["offline evaluator", "acceptance length", "by position"], rows))
    by_source = [
        [name, x["source"], f"{x['documents']:,}", f"{x['acceptance_length']:.3f}"]
        for name, found in offline.items()
        for x in found.get("by_source", [])
        if (x["num_steps"], x["temperature"]) == (len(found["acceptance_per_position"]), 0)
    ]
    if by_source:
        parts.append(_table(["offline evaluator", "source", "documents", "acceptance length"], by_source))
    return "".join(parts)


def _serving(run: Path) -> str:
    """Speed over HTTP, a row for each draft and concurrency."""
    if not (run / run_dir.SERVING).exists():
        return ""
    rows = [
        [
            f"{r['draft']}, {r['concurrency']} at a time",
            f"{r['output_tokens_per_second']:,.1f}",
            f"{r['mean_ms_per_token']:.1f}",
            f"{r['acceptance_length']:.2f}" if "acceptance_length" in r else "",
            f"{r['ratio']:.2f}",
        ]
        for r in _from(run / run_dir.SERVING, lambda path: read_json(path)["runs"])
    ]
    return _table(["draft", "tokens a second", "ms a token", "acceptance length", "to the first"], rows)


def _loop_shares(path: Path) -> dict[str, Any]:
    return read_json(path).get("loop_share_by_source") or {}


def _loops(run: Path) -> str:
    """How much of the answers goes round in circles, by source, of each worker's dump."""
    rows = [
        [source, f"{share:.1%}"]
        for path in sorted(run.glob(run_dir.DUMPS))
        for source, share in _from(path, _loop_shares).items()
        if share is not None
    ]
    return _table(["source", "tokens of answers in loops"], rows) if rows else ""


def _summary(path: Path) -> dict[str, Any]:
    summary = read_json(path)
    _stages(summary)
    dict(summary["versions"])
    return summary


def _stages(summary: dict[str, Any]) -> str:
    rows = [
        [n, f"{s['seconds']:.0f} s", f"{s['bytes'] / 2**20:,.1f} MiB"] for n, s in summary["stages"].items()
    ]
    rows.append(["peak memory", f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB", ""])
    return _table(["stage", "time", "on disk"], rows)


def write(run: Path) -> Path:
    """Write `RUN/report.html` from what the run directory holds so far.

    Raises:
        InputError: the directory is missing, nothing in it was made by this program, or a file is damaged.
    """
    known = (*RESULTS, run_dir.SETTINGS)
    if not any(found for pattern in known for found in run.glob(pattern)):
        raise InputError(f"{run} is not a run directory: it holds none of {', '.join(known)}", "name RUN=...")
    rows = _read_metrics(run / run_dir.METRICS)
    steps = sorted({name.rpartition("pos")[2] for row in rows for name in row if "top1_pos" in name})
    positions = sorted(
        {n.rpartition("_")[2] for row in rows for n in row if n.startswith("evaluate/acceptance_")}
    )
    summary = _from(run / run_dir.SUMMARY, _summary) if (run / run_dir.SUMMARY).exists() else None
    sections = [
        ("Acceptance", _acceptance(run)),
        ("The target's answers", _loops(run)),
        (
            "Training",
            _curves(rows, "Loss", "loss", {"train/loss": "loss"})
            + _curves(
                rows,
                "Draft and target agree on the most likely token",
                "of predictions",
                {f"train/top1_pos{s}": f"draft step {s}" for s in steps},
                percent=True,
            )
            + _curves(
                rows,
                "Acceptance length on held-out documents, offline",
                "tokens a step",
                {"evaluate/acceptance_length": "acceptance length"},
            )
            + _curves(
                rows,
                "Acceptance by position on held-out documents, offline",
                "accepted",
                {f"evaluate/acceptance_{p}": f"position {p}" for p in positions if p.isdigit()},
                percent=True,
            )
            + _curves(rows, "Speed", "tokens a second", {"perf/tok_s": "tokens a second"})
            + _curves(rows, "Waiting for the store", "of a step", {"data/wait_frac": "share"}, percent=True),
        ),
        ("Over HTTP", _serving(run)),
        ("Stages", _stages(summary) if summary else ""),
        (
            "Versions",
            _table(["package", "version"], [*map(list, summary["versions"].items())]) if summary else "",
        ),
        (
            "Settings",
            "".join(
                f"<h3>{html.escape(p.name)}</h3><pre>{html.escape(p.read_text(encoding='utf-8'))}</pre>"
                for p in sorted(run.glob(run_dir.SETTINGS))
            ),
        ),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(run.name)}</title>"
    page += f"<style>{STYLE}</style><h1>layer61: {html.escape(str(run))}</h1>{body}</html>\n"
    atomic_write(run / run_dir.REPORT, page)
    return run / run_dir.REPORT
