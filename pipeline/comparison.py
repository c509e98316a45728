"""Drafts beside one another: the rows that `verify`, `demo` and `report` show, one column a draft."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.progress import count

__all__ = ["acceptance_rows", "columns", "cost_rows", "table", "with_interval"]

Drafts = Mapping[str, Mapping[str, Any]]


def columns(drafts: Drafts) -> list[str]:
    """A heading for each draft: its name, or where it lies, and its kind."""
    kinds = {"mtp": "MTP", "eagle3": "EAGLE-3"}
    return [f"{Path(name).name}\n{kinds[found['kind']]}" for name, found in drafts.items()]


def with_interval(found: Mapping[str, Any]) -> str:
    """An acceptance length and its bounds."""
    bounds = "" if found["low"] is None else f" ({found['low']:.2f}-{found['high']:.2f})"
    return f"{found['acceptance_length']:.3f}{bounds}"


def acceptance_rows(drafts: Drafts) -> list[list[str]]:
    """Acceptance length by number of draft tokens, temperature, source and length; the share by position.

    A kind of text has a row where there are several, at the number of draft tokens that all figures have.
    """
    first, *_ = found = list(drafts.values())
    K = first["num_speculative_tokens"]
    rows = []
    for place, row in enumerate(first["by_num_steps"]):
        kind = "sampled" if row["temperature"] else "vLLM"
        name = f"length, {kind}, {count(row['num_steps'], 'draft token')}"
        rows.append([name, *(with_interval(draft["by_num_steps"][place]) for draft in found)])
    for kind, unit in (("source", ""), ("length", " tokens")):
        places = [
            place
            for place, row in enumerate(first[f"by_{kind}"])
            if (row["num_steps"], row["temperature"]) == (K, 0)
        ]
        for place in places if len(places) > 1 else []:
            name = f"{first[f'by_{kind}'][place][kind]}{unit}, {count(K, 'draft token')}"
            rows.append([name, *(with_interval(draft[f"by_{kind}"][place]) for draft in found)])
    shares = [draft["acceptance_per_position"] for draft in found]
    return rows + [
        [f"accepted at position {k + 1}", *(f"{one[k]:.1%}" for one in shares)]
        for k in range(max(map(len, shares)))
    ]


def cost_rows(drafts: Drafts) -> list[list[str]]:
    """What each draft costs a server (`export.cost`)."""

    def row(name: str, key: str, unit: str) -> list[str]:
        return [name, *(f"{draft[key] / 1e6:,.1f} {unit}" for draft in drafts.values())]

    return [
        row("parameters read a token", "parameters_read", "M"),
        row("of them in the head", "head_parameters_read", "M"),
        row("size of the draft", "bytes", "MB"),
    ]


def table(title: str, drafts: Drafts, sections: Sequence[Sequence[Sequence[str]]]) -> Table:
    """Sections of rows; those that are shorter than the header are filled with nothing."""
    made = Table(title=title, title_justify="left")
    made.add_column("acceptance on held-out text")
    for heading in columns(drafts):
        made.add_column(heading, justify="right", overflow="fold")
    for number, rows in enumerate(sections):
        if number:
            made.add_section()
        for row in rows:
            made.add_row(*row)
    return made
