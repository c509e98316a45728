"""A rank that `launch` has started: what it does first, and how its end is told."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from configs.importing import importing

__all__ = ["PARENT", "main"]

# set by `launch` in the ranks it starts
PARENT = "LAYER61_PARENT"


def _die_with(parent: int) -> None:
    """Ask the kernel to end this rank when the process that started it is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SystemExit(1)


def _quit(number: int, _frame: FrameType | None) -> None:
    # before the first step there is nothing to save
    os._exit(128 + number)


def main(folder: Path) -> int:
    """One rank started by `launch.run`, which has blocked the signals that end it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    _die_with(int(os.environ[PARENT]))
    rank = int(os.environ["RANK"])
    with importing():
        from configs.errors import Layer61Error, describe
        from configs.files import write_json
        from configs.load import load_config
        from train.trainer import Stopped, train

    try:
        result = train(load_config([folder / "config.json"]))
    except Stopped as stopped:
        code = 128 + stopped.number
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        write_json(folder / f"error.{rank}.json", describe(error))
        code = error.exit_code if isinstance(error, Layer61Error) else 1
    else:
        if rank == 0:
            write_json(folder / "result.json", result)
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    # other ranks may be gone already, and the process group's threads would wait for them
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
