"""`python -m pipeline` and the console script `layer61`: quiet when interrupted, from the first import on."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

__all__ = ["main"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A termination signal; carries its number to the exit code."""

    def __init__(self, number: int) -> None:
        self.number = number


def _say(number: int) -> int:
    """Say how this ends. Returns the exit code."""
    # a second signal has nothing more to say
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    # of the ranks of a machine one says it
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{word}; the same command continues from what is saved\n")
        sys.stderr.flush()
    return 128 + number


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    while frame is not None:
        # an import that is broken off says so in many ways, and there is nothing to save yet
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(_say(number))
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; 130 or 143 after a signal, also where the shell ignores it."""
    # read when OpenMP is loaded, here and in child processes: threads that wait in a busy loop slow all down
    # tenfold where something else wants a core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        for number in SIGNALS:
            signal.signal(number, _raise)
        from configs.importing import importing

        with importing():
            from pipeline import cli

        return cli.run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return _say(signal.SIGINT)
    except Interrupted as signalled:
        return _say(signalled.number)


def script() -> NoReturn:
    """`main` as a process: what ends it from now on ends it without a word."""
    code = main()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if "deepspeed" in sys.modules:
        # threads of a process group that are still at work would abort the interpreter's own end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    script()
