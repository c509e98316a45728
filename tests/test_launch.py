"""Starting training: on several machines under a launcher, and stopping it at any moment."""

import errno
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import run_dir as runs
from configs.errors import ConfigError
from configs.load import load_config
from configs.lock import hold
from tests import rank_jobs
from tests.rank_jobs import start_job
from tests.stores import write_store
from train import launch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_checkpoint):
    # documents of one length fill the ranks alike, however many there are
    store = write_store(tmp_path_factory.mktemp("store") / "store", tiny_checkpoint, lengths=[24] * 48)
    return [
        f"target.path={tiny_checkpoint}",
        f"train.store={store}",
        "train.dtype=float32",
        "train.max_steps=6",
        "train.warmup_steps=2",
        "train.learning_rate=3e-3",
        "train.evaluate_every=3",
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def on_two_machines(folder, per_node, *words):
    """The train verb under torchrun, once for each machine; words for each, then its process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for node, mine in enumerate(words):
        said = folder / f"{node}.log"
        command = ["--nnodes=2", f"--node-rank={node}", f"--nproc-per-node={per_node}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "pipeline", "train", *mine]
        started.append((start_job(said, rank_jobs.torchrun, command, environment()), said))
    for process, _ in started:
        process.join(300)
        process.kill()
    return [process.exitcode for process, _ in started], [said.read_text() for _, said in started]


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / runs.METRICS).read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_two_machines_of_two_ranks_compute_what_one_process_does(tmp_path, settings):
    one = ["train.tokens_per_rank=48", "train.gradient_accumulation_steps=2"]
    launch.run(load_config([], [*settings, *one, f"run.dir={tmp_path / 'one'}"]))
    words = [*settings, "train.tokens_per_rank=24", f"run.dir={tmp_path / 'four'}"]
    codes, said = on_two_machines(tmp_path, 2, words, words)
    assert codes == [0, 0], said
    # what is planned is what the launcher has started
    assert "memory of each of 4 ranks" in said[0]
    assert "at most 96 tokens" in said[0]
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    meta = runs.read_meta(runs.locate(tmp_path / "four", "last"))
    assert (meta["step"], meta["ranks"]) == (6, 4)


def test_machines_that_do_not_share_the_run_directory_are_told_so(tmp_path, settings):
    words = [[*settings, f"run.dir={tmp_path / name}"] for name in ("here", "there")]
    codes, said = on_two_machines(tmp_path, 1, *words)
    assert 0 not in codes
    text = " ".join(said[0].split())
    assert "is not one directory on all machines" in text
    assert f"rank 1 on {socket.gethostname()}" in text
    assert "Traceback (most recent call last)" not in said[0].partition("torch/distributed")[0]
    assert not runs.directory(tmp_path / "here").exists()


def test_the_plan_counts_the_ranks_of_the_launcher(settings, monkeypatch):
    config = load_config([], [*settings, "train.ranks=2"])
    monkeypatch.delenv("RANK", raising=False)
    assert launch.plan(config).ranks == 2
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch.plan(config).ranks == 16


def test_a_file_system_without_locks_is_said_and_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "lock", "another training", "wait"):
        assert "has no locks" in " ".join(capsys.readouterr().err.split())
    monkeypatch.undo()
    with (
        hold(tmp_path / "lock", "another training", "wait"),
        pytest.raises(ConfigError, match="another training is running"),
        hold(tmp_path / "lock", "another training", "wait"),
    ):
        pass


def signalled_while_it_starts(words, log, after_s, number):
    """Exit code of an interpreter that gets a signal some time after it was started."""
    with open(log, "wb") as output:
        command = [sys.executable, "-m", "pipeline", *words]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output)
    time.sleep(after_s)
    process.send_signal(number)
    return process.wait(120)


@pytest.mark.parametrize(
    ("after_s", "ranks", "number", "ignored"),
    [
        (1.5, 2, signal.SIGINT, False),
        (3.0, 2, signal.SIGINT, True),
        (5.0, 2, signal.SIGTERM, False),
        (4.0, 1, signal.SIGINT, False),
    ],
)
def test_a_signal_at_any_moment_ends_training_quietly(tmp_path, settings, after_s, ranks, number, ignored):
    log, words = tmp_path / "log", ["train", *settings, "train.max_steps=1000000", f"train.ranks={ranks}"]
    words += [f"run.dir={tmp_path / 'run'}"]
    if ranks == 1:
        code = signalled_while_it_starts(words, log, after_s, number)
    else:
        process = start_job(log, functools.partial(rank_jobs.verb, words, ignored=[number] * ignored))
        while not (tmp_path / "run" / runs.RANKS).exists():
            time.sleep(0.05)
            assert process.is_alive(), log.read_text()
        time.sleep(after_s)
        os.kill(process.pid, number)
        process.join(120)
        code = process.exitcode
    said = log.read_text()
    assert code == 128 + number, said
    assert "Traceback" not in said, said
    assert ("interrupted" if number == signal.SIGINT else "terminated") in said.splitlines()[-1]
