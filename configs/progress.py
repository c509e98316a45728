"""One progress display for every long step: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

__all__ = ["Task", "console", "count", "log", "say", "task"]

# data goes to stdout, everything said to a person goes to stderr
console = Console(stderr=True, highlight=False)


def say(text: str, **style: Any) -> None:
    """Print text to a person as it is; the terminal wraps it, a log does not."""
    console.print(text, markup=False, soft_wrap=True, **style)


def log(stage: str, text: str) -> None:
    """Print one self-contained line: time, stage, text."""
    say(f"{time.strftime('%H:%M:%S')} {stage:<8} | {text}")


def count(number: float, one: str, several: str = "") -> str:
    """A number and its noun: `1 block`, `2 blocks`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


class Task:
    """A running step; `advance` is cheap enough for every item and safe from any thread."""

    def __init__(self, stage: str, total: float, unit: str, bar: Progress | None) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, 0.0
        self._bar = bar
        self._id = bar.add_task(stage, total=total, detail="", count=self._count()) if bar else None
        self._started = self._said = time.monotonic()
        # what was done by then: before the first item comes the start of an engine, or compilation
        self._first: tuple[float, float] | None = None
        self._next_tenth = 1

    def _count(self) -> str:
        if self.unit == "bytes":
            return f"{self.done / 1e6:,.0f}/{self.total / 1e6:,.0f} MB"
        return f"{self.done:,.0f}/{self.total:,.0f} {self.unit}".strip()

    def _left(self, now: float) -> str:
        """Seconds left at the pace since the first item; empty where there is no pace yet."""
        if self._first is None or self.done <= self._first[1]:
            return ""
        pace = (now - self._first[0]) / (self.done - self._first[1])
        return f", {pace * (self.total - self.done):.0f} s left"

    def advance(self, amount: float = 1, detail: str = "") -> None:
        """Add `amount` to the work done; `detail` is the short text after the bar or on the line."""
        self.done += amount
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, completed=self.done, detail=detail, count=self._count())
            return
        now = time.monotonic()
        tenth = self.done / self.total * 10 if self.total else 10
        due = tenth >= self._next_tenth and now - self._said >= 2
        if due or now - self._said >= 60 or (self.done >= self.total and self._next_tenth <= 10):
            self._next_tenth, self._said = int(tenth) + 1, now
            text = f"{self._count()} | {now - self._started:.0f} s{self._left(now)}"
            log(self.stage, f"{text} | {detail}" if detail else text)
        if self._first is None:
            self._first = (now, self.done)


def _columns() -> list[Any]:
    """What a bar shows; where the terminal is narrow the detail is cut, and nothing else."""
    fixed, rest = Column(no_wrap=True), Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return [
        TextColumn("{task.description}", markup=False, table_column=fixed),
        BarColumn(bar_width=12),
        TaskProgressColumn(table_column=fixed),
        TextColumn("{task.fields[count]}", markup=False, table_column=fixed),
        TimeRemainingColumn(compact=True, table_column=fixed),
        TextColumn("{task.fields[detail]}", markup=False, table_column=rest),
    ]


@contextmanager
def task(stage: str, total: float, unit: str = "", start: float = 0) -> Iterator[Task]:
    """Show a step.

    Args:
        stage: its name.
        total: all there is to do, `start` included.
        unit: what is counted, in the plural; `bytes` are shown as MB.
        start: done by an earlier run.
    """
    if not sys.stderr.isatty():
        step = Task(stage, total, unit, None)
        step.done = start
        step._next_tenth = int(start / total * 10) + 1 if total else 1
        yield step
        return
    with Progress(*_columns(), console=console, expand=True) as bar:
        step = Task(stage, total, unit, bar)
        step.done = start
        bar.update(step._id, completed=start, count=step._count())  # type: ignore[arg-type]
        yield step
