"""A dump over Ray: where engines go, and that a cluster of two nodes survives the death of engines."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from configs.errors import ConfigError
from configs.files import write_json
from configs.load import load_config
from configs.schema import RunConfig
from featurestore import open_store
from pipeline.dump import run
from pipeline.ray_dump import Place, places

COUNT, BLOCK = 48, 4


@pytest.fixture
def config(tmp_path, tiny_checkpoint) -> RunConfig:
    file = tmp_path / "c.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i * i % 7}?"},
                {"role": "assistant", "content": "-"},
            ]
        }
        for i in range(COUNT)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_config(
        [],
        [
            f"run.dir={tmp_path / 'run'}",
            f"target.path={tiny_checkpoint}",
            f"prompts.path={file}",
            "prompts.max_length=128",
            "prompts.max_answer_tokens=32",
            f"dump.block_documents={BLOCK}",
            "dump.view=v3",
            "dump.ray=true",
        ],
    )


def test_an_engine_keeps_to_one_node_where_one_has_the_gpus():
    assert places({"a": 8, "b": 8}, 8) == [Place(8)] * 2
    assert places({"a": 8, "b": 8}, 4) == [Place(4)] * 4
    # what is left of a node that is not divided evenly stays idle
    assert places({"a": 8, "b": 4, "c": 0}, 3) == [Place(3)] * 3


def test_an_engine_spans_nodes_only_where_none_has_the_gpus():
    assert places({"a": 4, "b": 4}, 8) == [Place(8, spans=True)]
    assert places({"a": 8, "b": 8, "c": 8, "d": 8}, 16) == [Place(16, spans=True)] * 2
    with pytest.raises(ConfigError, match=r"has 8 GPUs, and an engine takes .* = 16"):
        places({"a": 4, "b": 4}, 16)


def test_a_cluster_without_gpus_holds_one_engine_a_node():
    assert places({"a": 0, "b": 0}, 8) == [Place(0, "a"), Place(0, "b")]


def test_a_dump_over_ray_without_ray_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(ConfigError, match="Ray is not installed"):
        run(config)


@pytest.fixture
def two_nodes(monkeypatch) -> Iterator[None]:
    """A cluster of two nodes on this machine, each with a core and what Ray takes for a GPU."""
    pytest.importorskip("ray", reason="make setup-ray adds it")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100_000_000}
    found = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        found.add_node(**node)
        found.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", found.address)
        yield
    finally:
        found.shutdown()


def start(config: RunConfig, run_dir: Path, ray: bool) -> subprocess.Popen[str]:
    values = config.model_dump(mode="json", exclude_defaults=True)
    values["dump"]["ray"] = ray
    file = run_dir.with_suffix(".json")
    # as a user would name it: relative to where the command is given, not to where an actor runs
    write_json(file, values | {"run": {"dir": run_dir.name}})
    command = [sys.executable, "-m", "pipeline", "dump", str(file)]
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        command,
        cwd=run_dir.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def actors() -> list[psutil.Process]:
    """Processes of the cluster that hold an engine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::EngineActor"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def committed(run_dir: Path) -> list[str]:
    names = [path.parent.name for path in (run_dir / "store" / "parts").glob("*/zarr.json")]
    return [name for name in names if "." not in name]


def content(run_dir: Path) -> dict[int, tuple]:
    store = open_store(run_dir / "store")
    assert store.verify() == []
    documents = [store[i] for i in range(len(store))]
    return {
        d.uid: (d.input_ids.tolist(), d.loss_mask.tolist(), d.hidden.view(torch.uint16).numpy().tobytes())
        for d in documents
    }


@pytest.mark.engine
def test_engines_that_die_are_replaced_and_the_store_is_that_of_one_machine(config, tmp_path, two_nodes):
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    with start(config, spread, ray=True) as process:
        try:
            while len(committed(spread)) < 2:
                assert process.poll() is None, process.stderr.read()[-3000:]
                time.sleep(0.05)
            held = actors()
            assert len(held) == 2, "one engine a node"
            # both, so that the rest is done by those that take their places
            engines = [process for actor in held for process in actor.children(recursive=True)]
            for actor in held:
                actor.kill()
            _, alive = psutil.wait_procs(engines, timeout=60)
            assert not alive, "an engine outlives its actor"
            before = len(committed(spread))
            _, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, err[-3000:]
    said = " ".join(err.split())
    assert "2 engines on 2 nodes, each takes a GPU of one node" in said
    assert before < COUNT // BLOCK
    assert all(f"engine {number} is lost (ActorDiedError" in said for number in (1, 2))
    assert said.count("is ready after") >= 3
    assert len(list(spread.glob("engine*.ray-*.log"))) == 2

    with start(config, alone, ray=False) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert content(spread) == content(alone)
    assert len(content(alone)) == COUNT
    figures = [json.loads((place / "dump.json").read_text()) for place in (alone, spread)]
    for figure in ("documents", "tokens", "loss_tokens", "bytes"):
        assert figures[0][figure] == figures[1][figure]
    # nothing is left of the parts that the dead were writing
    assert {p.name for p in (spread / "store/parts").iterdir()} == set(committed(spread))
    assert not list(spread.glob(".seen*"))
    assert not list((spread / "store").glob(".seen*"))
    assert not actors()
