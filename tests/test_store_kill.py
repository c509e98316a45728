"""Writers killed at random moments: what is published is whole, what is not is ignored."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import featurestore
from configs.errors import PartExistsError
from featurestore import StoreWriter, open_store, part_exists, publish
from tests.documents import CONTRACT, append, assert_same, make

BLOCKS = 150
DOCUMENTS = 6
WORKERS = 4
KILLS = 24


def block_documents(block: int) -> list:
    return [make(block * DOCUMENTS + i, 40 + 37 * i, 1, 256) for i in range(DOCUMENTS)]


def work(path: Path, seed: int) -> None:
    """Do every block that is not there yet, in an order of its own: two workers may meet at one block."""
    for block in random.Random(seed).sample(range(BLOCKS), BLOCKS):
        name = f"block-{block:04d}"
        if part_exists(path, name):
            continue
        try:
            with StoreWriter(path, CONTRACT, part=name) as writer:
                for document in block_documents(block):
                    append(writer, document)
                    time.sleep(0.003)
        except PartExistsError:
            continue


def test_killed_writers_lose_nothing_published(tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["featurestore", "tests.documents"])
    random_ = random.Random(0)
    seed = iter(range(10_000))

    def start() -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(tmp_path, next(seed)))
        process.start()
        return process

    workers = [start() for _ in range(WORKERS)]
    deadline = time.monotonic() + 60
    while not (tmp_path / "zarr.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kills = 0
    while kills < KILLS and not all(part_exists(tmp_path, f"block-{b:04d}") for b in range(BLOCKS)):
        time.sleep(random_.uniform(0.0, 0.04))
        victim = random_.randrange(WORKERS)
        if workers[victim].is_alive():
            os.kill(workers[victim].pid, signal.SIGKILL)  # type: ignore[arg-type]
            kills += 1
        workers[victim].join()
        workers[victim] = start()
        if kills % 8 == 0:
            publish(tmp_path)
            check(tmp_path)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert kills >= 20
    publish(tmp_path)
    assert check(tmp_path) == BLOCKS * DOCUMENTS
    leftovers = [p.name for p in (tmp_path / "parts").iterdir() if "." in p.name]
    assert leftovers, "no kill fell into a part being written"
    assert featurestore.verify(tmp_path).problems == []
    assert len(featurestore.collect(tmp_path, older_than_s=0)) == len(leftovers)
    assert len(list((tmp_path / "parts").iterdir())) == BLOCKS
    assert featurestore.verify(tmp_path).problems == []


def check(path: Path) -> int:
    """Every published document is bit-identical and there once; returns their number."""
    store = open_store(path)
    expected = {d.uid: d for b in {int(u) // DOCUMENTS for u in store.uid} for d in block_documents(b)}
    seen = set()
    for document in store:
        assert_same(document, expected[document.uid])
        assert document.uid not in seen
        seen.add(document.uid)
    return len(seen)


def publish_once(path: Path) -> int:
    return publish(path)["version"]


def test_publishers_at_once_agree(tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["featurestore", "tests.documents"])
    for number in range(4):
        with StoreWriter(tmp_path, CONTRACT, part=f"p{number}", durable=False) as writer:
            append(writer, make(number, 10))
    with context.Pool(4) as pool:
        versions = pool.map(publish_once, [tmp_path] * 8)
    assert set(versions) == {1}
    assert sorted(open_store(tmp_path).uid.tolist()) == [0, 1, 2, 3]
