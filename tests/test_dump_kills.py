"""A dump with several open parts, killed at random moments: each document is there once, as if undisturbed.

`LAYER61_KILLS=20 python -m pytest tests/test_dump_kills.py` kills more often.
"""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from configs.load import load_config
from configs.schema import RunConfig
from featurestore import open_store
from tests.test_dump import changed, command, finish, parts_of, questions
from tests.test_dump import write as write_lines

pytestmark = pytest.mark.engine

KILLS = int(os.environ.get("LAYER61_KILLS", "2"))
COUNT = 240
# one rounding to bf16 moves a value by at most 2**-8 of itself; the engine computes in float32
ROUNDING = 2**-7


@pytest.fixture
def config(tmp_path, tiny_checkpoint) -> RunConfig:
    file = write_lines(tmp_path / "c.jsonl", questions(COUNT))
    values = [f"run.dir={tmp_path / 'run'}", f"target.path={tiny_checkpoint}", f"prompts.path={file}"]
    values += ["prompts.max_length=128", "prompts.max_answer_tokens=48", "prompts.max_loop_share=1"]
    values += ["dump.block_documents=8", "dump.view=v3", "dump.open_parts=3"]
    return load_config([], [*values, 'dump.vllm.dtype="float32"', "dump.vllm.max_num_seqs=16"])


def kill_at_a_random_moment(config: RunConfig, run_dir: Path, moment: random.Random) -> bool:
    """Start a dump and kill it, or its engine, some time after the engine was ready; whether it still ran."""
    with subprocess.Popen(command(config, run_dir), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "the engine is ready" in line:
                break
        time.sleep(moment.uniform(0, 0.6))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        running = process.poll() is None
        process.kill()
        psutil.wait_procs(children, timeout=30)
    return running


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_killed_at_random_moments_with_open_parts_every_document_is_there_once(config, tmp_path, temperature):
    config = changed(config, prompts__temperature=temperature)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(config, whole)
    moment = random.Random(int(temperature))
    kills = sum(kill_at_a_random_moment(config, killed, moment) for _ in range(KILLS))
    assert kills > 0
    before = parts_of(killed)
    result = finish(config, killed)
    assert result["kept_documents"] + result["captured_documents"] == COUNT
    assert before.items() <= parts_of(killed).items()
    a, b = open_store(whole / "store"), open_store(killed / "store")
    assert len(a) == len(b) == b.manifest["totals"]["documents"] == COUNT
    assert b.manifest["totals"]["duplicates"] == 0
    assert b.verify() == []
    place = {int(uid): i for i, uid in enumerate(b.uid)}
    for i in range(COUNT):
        left = a[i]
        right = b[place[left.uid]]
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.loss_mask, right.loss_mask)
        error = (left.hidden.float() - right.hidden.float()).norm(dim=-1)
        assert (error / left.hidden.float().norm(dim=-1)).max() < ROUNDING
    print(json.dumps({"kills": kills, "parts_before_the_end": len(before)}))
