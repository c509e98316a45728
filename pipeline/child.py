"""The first steps of an engine's process."""

import multiprocessing
import os
import signal
import threading

__all__ = ["enter"]


def enter(log: str, *, append: bool = False) -> None:
    """Send all output of this child process to a log, and end with the process that started it.

    Args:
        log: file; standard output of the parent carries results and nothing else.
        append: keep what the log holds.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC))
    os.dup2(output, 1)
    os.dup2(output, 2)
    # an interrupt from the terminal reaches the whole group; the parent decides what to do
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
