"""Drafts beside one another: the rows that `verify`, `demo` and `report` show, one column a draft."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.progress import count

__all__ = ["acceptance_rows", "columns", "cost_rows", "table"]

Drafts = Mapping[str, Mapping[str, Any]]


def columns(drafts: Drafts) -> list[str]:
    """A heading for each draft: its name, or where it lies, and its kind."""
    kinds = {"mtp": "MTP", "eagle3": "EAGLE-3"}
    return [f"{Path(name).name}\n{kinds[found['kind']]}" for name, found in drafts.items()]


def acceptance_rows(drafts: Drafts) -> list[list[str]]:
    """Acceptance length by the number of draft tokens, and the share accepted at each position.

    With fewer draft tokens than were served: as if the others had not been looked at, at the same places.
    """
    found = [draft["acceptance_per_position"] for draft in drafts.values()]
    served = max(map(len, found))
    rows = []
    for k in range(1, served + 1):
        name = f"length, vLLM, {count(k, 'draft token')}"
        rows.append([name, *(f"{1 + sum(shares[:k]):.3f}" for shares in found)])
    return rows + [
        [f"accepted at position {k + 1}", *(f"{shares[k]:.1%}" for shares in found)] for k in range(served)
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
