"""A DeepSeek-V3 target, which vLLM serves with its generic class: from conversations to an EAGLE-3 draft."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import run_dir
from configs.load import load_config
from export import draft
from export.check import check_eagle3
from export.checkpoint import INDEX, Checkpoint
from featurestore import open_store
from pipeline import dump
from pipeline.capture.probe import check_states
from pipeline.tiny.write import random_checkpoint
from tests.test_capture import spread_router
from train import launch

pytestmark = pytest.mark.engine

COUNT, ANSWER, AUX = 16, 12, [2, 3]


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_config):
    """A checkpoint of the older kind: no indexer in its configuration, and no such tensor in its files."""
    folder = tmp_path_factory.mktemp("v3")
    config = tiny_config.model_copy(update={"num_hidden_layers": 4})
    made = spread_router(random_checkpoint(folder / "tiny", config), folder / "target")
    for file in made.glob("*.safetensors"):
        tensors = {name: x for name, x in load_file(file).items() if ".indexer." not in name}
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((made / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if ".indexer." not in n}
    (made / INDEX).write_text(json.dumps(index))
    return made


@pytest.fixture(scope="module")
def config(tmp_path_factory, target):
    folder = tmp_path_factory.mktemp("run")
    with open(folder / "c.jsonl", "w") as lines:
        for i in range(COUNT):
            asked = [{"role": "user", "content": f"What is {i} + 5?"}, {"role": "assistant", "content": "?"}]
            lines.write(json.dumps({"messages": asked}) + "\n")
    values = {"run.dir": folder / "run", "target.path": target, "prompts.path": folder / "c.jsonl"}
    values |= {"prompts.max_length": 128, "prompts.max_answer_tokens": ANSWER, "prompts.held_out": 0.3}
    values |= {"prompts.max_loop_share": 1, "dump.aux_layers": AUX, "train.draft": "eagle3"}
    values |= {"train.dtype": "float32", "train.max_steps": 3, "train.tokens_per_rank": 256}
    values |= {"train.learning_rate": 1e-2, "train.warmup_steps": 1}
    return load_config([], [f"{key}={value}" for key, value in values.items()])


def test_a_v3_target_is_dumped_and_its_eagle3_draft_trained_and_exported(config, target):
    from transformers import DeepseekV3ForCausalLM

    assert not any("indexer" in name for name in Checkpoint(target).names)
    dump.run(config)
    store = open_store(config.store_path)
    assert len(store) == COUNT
    assert store.contract["engine"]["view"] == "native"
    assert [state["layer"] for state in store.contract["states"]] == [*AUX, 4]
    model = DeepseekV3ForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    found, wanted = [], []
    for document in store:
        with torch.no_grad():
            states = model.model(document.input_ids[None], output_hidden_states=True)
        inputs = [states.hidden_states[k][0] for k in AUX]
        wanted.append(torch.stack([*inputs, states.last_hidden_state[0]], 1).bfloat16())
        found.append(document.hidden)
    bits = [torch.cat(x).view(torch.uint16).numpy() for x in (found, wanted)]
    check_states(np.ascontiguousarray(bits[0]), bits[1], "the engine's log")

    launch.run(config)
    losses = [json.loads(line) for line in (config.run.dir / run_dir.METRICS).read_text().splitlines()]
    losses = [line["train/loss"] for line in losses if "train/loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]

    said = draft.plan(config)
    made = draft.run(config)
    assert check_eagle3(config.export_dir, target) == {"vllm": [], "sglang": []}
    assert made["aux_layers"] == AUX
    assert f"{made['tensors']} tensors, {made['bytes'] / 1e9:,.3f} GB" in said
    assert "more than one GPU" not in (config.export_dir / "README.md").read_text()
