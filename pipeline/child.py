"""Processes of engines: how one starts, what it does first, and how it ends with everything it started.

vLLM starts processes of its own: a worker for each tensor rank, an engine core behind its HTTP server. Not
all of them notice that their parent is gone, and one that is left keeps its GPU's memory. So an engine's
process leads a process group, and whoever ends it ends the group.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["SERVED", "end", "enter", "last_error", "share_cores", "start"]

# what is asked to end in vain is killed after this time
GRACE_SECONDS = 5.0
# what outlives the process that led it has less
REST_SECONDS = 2.0


# the environment of an engine that serves: no plugin but ours, which leaves the model classes as they are
SERVED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "layer61"}
# what vLLM leaves in shared memory when it is killed is cleaned up, with this warning
QUIET = {"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}


def start(
    target: Callable[..., None], args: tuple[Any, ...], name: str, environment: dict[str, str]
) -> BaseProcess:
    """Start a process that calls `enter` first.

    Args:
        target: what it runs, with `args`.
        name: of the process.
        environment: variables to set there before any of our code runs; what the user has set wins.
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, name=name)
    # started with the first process, it would unblock what is blocked below
    resource_tracker.ensure_running()
    # a terminal's interrupt reaches the new process too until it has entered: it inherits what is blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with _environment(QUIET | environment):
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return process


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, for processes started inside."""
    added = {k: v for k, v in values.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def enter(log: str, *, append: bool = False) -> None:
    """Send all output of this child process to a log, lead a group, end with the process that started it.

    An interrupt from the terminal does not reach the group: who started it decides.

    Args:
        log: file; standard output of the parent carries results and nothing else.
        append: keep what the log holds.
    """
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
    output = os.open(log, flags, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setpgrp()
    # one that came before is forgotten
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        _end_group(os.getpid(), GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def share_cores(ranks: int) -> dict[str, str]:
    """Environment of tensor ranks where there is no GPU: vLLM would bind each to a NUMA node of its own."""
    if ranks == 1 or torch.cuda.is_available():
        return {}
    cores = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cores)}


def last_error(path: Path) -> str:
    """The last line of an engine's log that names an exception."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    named = [line for line in lines if "Error: " in line or line.rstrip().endswith("Error")]
    return (named or lines or ["its log is empty"])[-1].strip()


def end(process: BaseProcess, *, wait_s: float = 0, grace_s: float = GRACE_SECONDS) -> None:
    """End a process that called `enter`, and everything it started.

    Args:
        process: it may have ended already.
        wait_s: time it has to end by itself.
        grace_s: time it has to end when it was asked to.
    """
    # not reaped yet, its number stays its own
    if not wait([process.sentinel], wait_s):
        process.terminate()
        wait([process.sentinel], grace_s)
    assert process.pid is not None
    _end_group(process.pid, REST_SECONDS)
    process.kill()
    process.join()


def _end_group(group: int, grace_s: float) -> None:
    """Ask every other process of the group to end, and kill those that do not within the time."""
    for process in _members(group):
        _send(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while (left := _members(group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        _send(process, signal.SIGKILL)


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _members(group: int) -> list[psutil.Process]:
    """Processes of the group that run, but for this one, and for those that clean up after all others."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and os.getpgid(process.pid) == group:
                tracker = any("multiprocessing.resource_tracker" in word for word in process.cmdline())
                if not tracker and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
