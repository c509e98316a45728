"""Whatever ends a verb, the processes of its engine end with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.files import write_json
from pipeline import child

# the last that an engine says before it serves
STARTED = "init engine"
LOGS = {"dump": "engine.1-of-1.log", "verify": "verify/*.log", "serve": "serve/server.log"}


@pytest.fixture(scope="module")
def draft(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # not for the process that `answer` runs in
    from export import nextn
    from tests.test_verify import layer_of

    folder = tmp_path_factory.mktemp("children")
    nextn.export(layer_of(tiny_checkpoint, folder / "weights"), tiny_checkpoint, folder / "nextn")
    return folder / "nextn"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def answer(log: str, out: str) -> None:
    """Body of a process."""
    child.enter(log)
    Path(out).write_text("done")


def test_an_interrupt_never_reaches_a_process_that_is_being_started(tmp_path: Path) -> None:
    """As a terminal sends it, to all that it has started; who started the process decides."""
    process = child.start(answer, (str(tmp_path / "log"), str(tmp_path / "out")), "child", {})
    assert process.pid is not None
    for wait_s in (0.0, 0.3, 0.3):
        time.sleep(wait_s)
        os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "out").read_text() == "done"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


@pytest.mark.engine
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("verb", LOGS)
def test_no_process_is_left(verb, ranks, number, draft, tiny_checkpoint, conversations_file, tmp_path):
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "target": {"path": str(tiny_checkpoint)},
        "prompts": {"path": str(conversations_file), "held_out": 0.99},
        "dump": {"tensor_parallel_size": ranks, "view": "v3"},
        "export": {"dir": str(draft)},
        "serve": {"port": free_port()},
    }
    write_json(tmp_path / "config.json", settings)
    command = [sys.executable, "-m", "pipeline", verb, str(tmp_path / "config.json")]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    seen: set[psutil.Process] = set()
    try:
        while not any(STARTED in log.read_text() for log in (tmp_path / "run").glob(LOGS[verb])):
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
            seen |= descendants(process.pid)
        seen |= descendants(process.pid)
        assert len(seen) > ranks
        process.send_signal(number)
        asked = time.monotonic()
        code = process.wait(15)
        _, alive = psutil.wait_procs(seen, timeout=15 - (time.monotonic() - asked))
        left = [f"{p.pid} {' '.join(p.cmdline())}" for p in alive if p.status() != psutil.STATUS_ZOMBIE]
        assert left == []
        assert code == (-number if number == signal.SIGKILL else 128 + number)
    finally:
        for one in (psutil.Process(process.pid) if process.poll() is None else None, *seen):
            if one is not None and one.is_running():
                one.kill()
        process.wait()
