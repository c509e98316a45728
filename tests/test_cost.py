"""What a draft costs a server, against sums done by hand."""

import json

import pytest
import torch
from safetensors.torch import save_file

from configs.eagle3 import draft_config
from configs.files import write_json
from configs.target import RELEASED
from export.checkpoint import Checkpoint
from export.cost import draft_cost, parameters_read
from export.keymap import eagle3_keymap, layer_shapes
from pipeline.comparison import acceptance_rows, columns, cost_rows
from pipeline.tiny.write import random_checkpoint

V32 = json.loads(RELEASED.read_text())
# of DeepSeek-V3.2: queries, keys and values with their latents, output
ATTENTION = 24_576 * 1_536 + 32_768 * 512 + 7_168 * 16_384 + 1_536 + 512


def test_a_token_goes_through_eight_of_the_256_experts_of_layer_61():
    projections = 7_168 * (1_536 + 576)
    indexer = 8_192 * 1_536 + 128 * 7_168 + 2 * 128 + 64 * 7_168
    expert = 3 * 2_048 * 7_168
    router = 256 * 7_168 + 256
    by_hand = 2 * 7_168 * 7_168 + projections + ATTENTION + indexer + router + 9 * expert + 5 * 7_168
    shapes = {f"model.layers.61.{name}": shape for name, shape in layer_shapes(V32).items()}
    assert parameters_read(shapes, V32) == by_hand
    assert round(by_hand / 1e9, 2) == 0.70


@pytest.mark.parametrize("size", [None, 32_000])
def test_a_token_goes_through_all_of_an_eagle3_draft_but_its_maps_and_its_head(size):
    by_hand = 3 * 7_168 * 7_168 + 2 * 7_168 * (1_536 + 576) + ATTENTION + 3 * 18_432 * 7_168 + 4 * 7_168
    draft = draft_config(V32, (2, 30, 58), draft_vocab_size=size)
    shapes = {op.checkpoint[0]: op.shape for op in eagle3_keymap(draft)}
    assert parameters_read(shapes, V32) == by_hand
    assert round(by_hand / 1e6, 1) == 752.8


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_config):
    config = tiny_config.model_copy(update={"num_hidden_layers": 4})
    return random_checkpoint(tmp_path_factory.mktemp("target") / "tiny", config)


def empty_draft(folder, target, **settings):
    config = draft_config(Checkpoint(target).config, (2, 3), **settings)
    tensors = {op.checkpoint[0]: torch.zeros(op.shape, dtype=torch.bfloat16) for op in eagle3_keymap(config)}
    if "d2t" in tensors:
        tensors |= {"d2t": tensors["d2t"].long(), "t2d": tensors["t2d"].bool()}
    folder.mkdir()
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_head_that_is_read_is_the_targets_or_the_drafts_own(tmp_path, target):
    tables = Checkpoint(target)
    V, D = tables.shape("lm_head.weight")
    whole = draft_cost(Checkpoint(empty_draft(tmp_path / "whole", target)), tables)
    pruned = draft_cost(Checkpoint(empty_draft(tmp_path / "pruned", target, draft_vocab_size=100)), tables)
    assert (whole["head_parameters_read"], pruned["head_parameters_read"]) == (V * D, 100 * D)
    assert whole["parameters_read"] - pruned["parameters_read"] == (V - 100) * D
    # two bytes a row's value, eight and one for the maps
    assert pruned["bytes"] - whole["bytes"] == 2 * 100 * D + 8 * 100 + V
    assert whole["bytes"] == 2 * (whole["parameters_read"] - V * D)


def test_the_released_layer_is_counted_in_the_target(target):
    tables = Checkpoint(target)
    found = draft_cost(None, tables)
    config = tables.config
    experts = 3 * config["moe_intermediate_size"] * config["hidden_size"] * config["n_routed_experts"]
    shapes = {n: tables.shape(n) for n in tables.mtp_names()}
    tables_of_its_own = 2 * config["vocab_size"] * config["hidden_size"]
    everything = sum(torch.Size(shape).numel() for shape in shapes.values()) - tables_of_its_own
    idle = (
        experts * (config["n_routed_experts"] - config["num_experts_per_tok"]) // config["n_routed_experts"]
    )
    assert found["parameters_read"] == everything - idle + found["head_parameters_read"]


def lengths(one, two):
    first = {"num_steps": 1, "temperature": 0, "acceptance_length": one, "low": None, "high": None}
    second = {"num_steps": 2, "temperature": 0, "acceptance_length": two, "low": two - 0.1, "high": two + 0.1}
    sources = [second | {"source": "docs", "documents": 1}, second | {"source": "web", "documents": 3}]
    return {
        "num_speculative_tokens": 2,
        "by_num_steps": [first, second],
        "by_source": sources,
        "by_length": [second | {"length": "1-128", "documents": 4}],
    }


def test_the_table_shows_a_column_for_each_draft():
    cost = {"parameters_read": 1_679_500_000, "head_parameters_read": 926_700_000, "bytes": 1_505_600_000}
    drafts = {
        "released": {"kind": "mtp", "acceptance_per_position": [0.8, 0.5], **lengths(1.8, 2.3), **cost},
        "runs/a/eagle3-1024": {
            "kind": "eagle3",
            "acceptance_per_position": [0.6, 0.25],
            **lengths(1.6, 1.85),
            **cost,
        },
    }
    assert columns(drafts) == ["released\nMTP", "eagle3-1024\nEAGLE-3"]
    assert acceptance_rows(drafts) == [
        ["length, vLLM, 1 draft token", "1.800", "1.600"],
        ["length, vLLM, 2 draft tokens", "2.300 (2.20-2.40)", "1.850 (1.75-1.95)"],
        ["docs, 2 draft tokens", "2.300 (2.20-2.40)", "1.850 (1.75-1.95)"],
        ["web, 2 draft tokens", "2.300 (2.20-2.40)", "1.850 (1.75-1.95)"],
        ["accepted at position 1", "80.0%", "60.0%"],
        ["accepted at position 2", "50.0%", "25.0%"],
    ]
    assert cost_rows(drafts)[0] == ["parameters read a token", "1,679.5 M", "1,679.5 M"]
    assert cost_rows(drafts)[2] == ["size of the draft", "1,505.6 MB", "1,505.6 MB"]
