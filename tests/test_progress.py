"""Progress as a person sees it: on a terminal of 80 columns, and as lines in a log."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from configs.progress import task

DETAIL = (
    "loss 0.6531 | top1 0.501 0.402 0.333 | lr 3.0e-05 | gnorm 0.52 | 12,345 tok/s | data 0.1% | mem 1.0 GiB"
)
SCRIPT = f"""
import time
from configs.progress import log, task
with task("train", 12, "steps") as bar:
    for _ in range(12):
        bar.advance(1, {DETAIL!r})
        time.sleep(0.12)
    log("train", "a line " + "of some length " * 8 + "[end]")
"""


def on_a_terminal(columns: int) -> list[str]:
    """What a terminal of this width is told, line by line, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 65536):
            said += piece
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_a_bar_fits_80_columns_and_cuts_the_detail_first():
    lines = [line for line in on_a_terminal(80) if line.startswith("train")]
    assert len(lines) > 3
    assert max(map(len, lines)) <= 80
    assert any("50%" in line and "6/12 steps" in line and "loss" in line for line in lines)
    assert any(re.search(r"\d:\d\d", line) for line in lines)
    assert "100%" in lines[-1]
    assert "12/12 steps" in lines[-1]
    assert all("mem" not in line for line in lines)
    assert any("mem 1.0 GiB" in line for line in on_a_terminal(200))


def test_a_message_beside_a_bar_is_left_whole():
    assert any("of some length [end]" in line for line in on_a_terminal(80))


def test_lines_of_a_log_say_the_unit_the_total_and_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("configs.progress.time.monotonic", lambda: now[0])
    with task("dump", 1000, "documents", start=200) as step:
        now[0] += 60  # an engine starts
        step.advance(10)
        for _ in range(79):
            now[0] += 1
            step.advance(10, "5 tokens/s")
    said = capsys.readouterr().err
    first, second, *_ = said.splitlines()
    # before there is a pace nothing is said of what is left
    assert "210/1,000 documents | 60 s" in first
    assert "left" not in first
    # 70 items of a second each, not counting the start
    assert "300/1,000 documents | 69 s, 70 s left | 5 tokens/s" in second
    assert "1,000/1,000 documents | 139 s, 0 s left" in said


def test_bytes_are_shown_as_megabytes(capsys):
    with task("export", 12_000_000, "bytes") as step:
        step.advance(12_000_000)
    assert "12/12 MB" in capsys.readouterr().err
