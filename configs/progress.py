"""One progress display for every long step: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["Task", "console", "log", "task"]

# data goes to stdout, everything said to a person goes to stderr
console = Console(stderr=True, highlight=False, soft_wrap=True)


def log(stage: str, text: str) -> None:
    """Print one self-contained line: time, stage, text."""
    console.print(f"{time.strftime('%H:%M:%S')} {stage:<8} | {text}", markup=False)


class Task:
    """A running step; `advance` is cheap enough for every item and safe from any thread."""

    def __init__(self, stage: str, total: float, bar: Progress | None) -> None:
        self.stage, self.total, self.done = stage, total, 0.0
        self._bar = bar
        self._id = bar.add_task(stage, total=total, detail="") if bar else None
        self._started = self._said = time.monotonic()
        self._next_tenth = 1

    def advance(self, amount: float = 1, detail: str = "") -> None:
        """Add `amount` to the work done; `detail` is the short text after the bar or on the line."""
        self.done += amount
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, completed=self.done, detail=detail)
            return
        now = time.monotonic()
        tenth = self.done / self.total * 10 if self.total else 10
        due = tenth >= self._next_tenth and now - self._said >= 2
        if due or now - self._said >= 60 or (self.done >= self.total and self._next_tenth <= 10):
            self._next_tenth, self._said = int(tenth) + 1, now
            elapsed = now - self._started
            left = elapsed / self.done * (self.total - self.done) if self.done else 0
            text = f"{self.done:,.0f}/{self.total:,.0f} | {elapsed:.0f} s, {left:.0f} s left"
            log(self.stage, f"{text} | {detail}" if detail else text)


@contextmanager
def task(stage: str, total: float, start: float = 0) -> Iterator[Task]:
    """Show a step of `total` units, `start` of them done by an earlier run."""
    if not sys.stderr.isatty():
        step = Task(stage, total, None)
        step.done = start
        step._next_tenth = int(start / total * 10) + 1 if total else 1
        yield step
        return
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=console) as bar:
        step = Task(stage, total, bar)
        step.advance(start)
        yield step
