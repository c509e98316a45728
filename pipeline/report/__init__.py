"""`layer61 report`: one self-contained HTML page about a run; no scripts, nothing fetched."""

from pathlib import Path

from configs import run_dir
from configs.files import atomic_write
from pipeline.report.page import page
from pipeline.report.results import read
from pipeline.report.sections import SECTIONS, head

__all__ = ["write"]


def write(run: Path) -> Path:
    """Write `RUN/report.html` from what the run directory holds so far.

    Raises:
        InputError: the directory is missing, nothing in it was made by this program, or a file is damaged.
    """
    results = read(run)
    sections = [(anchor, title, make(results)) for anchor, title, make in SECTIONS]
    path = run / run_dir.REPORT
    atomic_write(path, page(f"layer61: {run.resolve().name}", head(results), sections))
    return path
