"""Starting training: in this process, as one rank of a launcher, or in ranks started here."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from configs import run_dir
from configs.errors import Layer61Error, revive
from configs.files import read_json, write_json
from configs.importing import importing
from configs.lock import hold
from configs.schema import RunConfig
from train.plan import plan
from train.rank import PARENT

__all__ = ["plan", "run"]

GRACE_SECONDS = 20


def _free_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(config: RunConfig) -> dict[str, Any] | None:
    """Train, in this process or in `train.ranks` processes started here.

    Under torchrun or the deepspeed launcher (RANK is set) this process is one of theirs. After SIGINT or
    SIGTERM a checkpoint is saved and the signal is raised again, so that the exit code is 130 or 143.

    Returns:
        The summary of the run on rank 0, None on other ranks.

    Raises:
        Layer61Error: training failed; the error of a rank started here is raised here.
    """
    if "RANK" in os.environ or config.train.ranks == 1:
        with importing():
            from train.trainer import Stopped, train

        try:
            return train(config)
        except Stopped as stopped:
            _end_by(stopped.number)
    hint = "wait for it, or choose another run.dir"
    with hold(run_dir.verb_lock(config.run.dir, "launch"), "another training", hint):
        return _run_ranks(config, config.run.dir / run_dir.RANKS)


def _end_by(number: int) -> NoReturn:
    """End as if by a signal; a shell may have told this process to ignore SIGINT."""
    if number != signal.SIGINT:
        signal.raise_signal(number)
    raise KeyboardInterrupt


def _run_ranks(config: RunConfig, folder: Path) -> dict[str, Any]:
    ranks = config.train.ranks
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    write_json(folder / "config.json", config.model_dump(mode="json"))
    environment = dict(os.environ)
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), PARENT: str(os.getpid())}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    # as torchrun does: ranks would fight for the cores
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    processes: list[subprocess.Popen[bytes]] = []
    caught: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    handlers = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        # a rank takes signals from the moment on at which it knows what to do with them
        signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
        for rank in range(ranks):
            command = [sys.executable, "-m", "train.rank", str(folder)]
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # in a session of its own: the terminal's signal would reach it a second time
            processes += [subprocess.Popen(command, env=own, start_new_session=True)]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
        codes = _wait(processes)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    failed = [(rank, code) for rank, code in codes if code]
    described = _described(folder, failed)
    # an error with a traceback is most often that of a rank waiting for one that is gone
    known = next((found for found in described if not found["trace"]), None)
    if known:
        raise revive(known)
    if caught and (not failed or 128 + caught[0] in dict(failed).values()):
        _end_by(caught[0])
    if failed:
        if described:
            sys.stderr.write(described[0]["trace"])
        rank, code = failed[0]
        how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
        raise Layer61Error(f"rank {rank} {how}", "the same command continues from the last checkpoint")
    return read_json(folder / "result.json")


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Wait for all ranks; once one has failed the others, which wait for it, are ended.

    Returns:
        (rank, exit code) in the order in which the ranks ended.
    """
    ended: list[tuple[int, int]] = []
    deadline = float("inf")
    while len(ended) < len(processes):
        for rank, process in enumerate(processes):
            code = process.poll()
            if code is not None and rank not in dict(ended):
                # killed by a signal counts as a shell counts it
                code = code if code >= 0 else 128 - code
                ended.append((rank, code))
                if code and deadline == float("inf"):
                    deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        # a rank that failed by itself has written its error: no need to wait for the others
        elif any(0 < code < 128 for _, code in ended):
            deadline = min(deadline, time.monotonic() + 1)
        time.sleep(0.05)
    return ended


def _described(folder: Path, failed: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The errors that ranks have written down, in the order in which they ended."""
    described = []
    for rank, _ in failed:
        with contextlib.suppress(OSError, ValueError):
            described.append(read_json(folder / f"error.{rank}.json"))
    return described
