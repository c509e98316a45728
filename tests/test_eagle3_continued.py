"""Drafts that other programs wrote: what training goes on from, and what it refuses, saying why.

The directories are like those of TorchSpec (`tools/convert_to_hf.py`, `models/draft/deepseek_eagle.py`) and
SpecForge (`modeling/draft`): names with `midlayer`, a copy of the embedding, an own head of all tokens, and
layers counted by their outputs.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import run_dir as runs
from configs.errors import InputError
from configs.load import load_config
from export.checkpoint import Checkpoint
from tests.stores import write_store
from tests.test_eagle3_export import KEEP, write_draft
from train import launch
from train.model import load_layer

AUX = (2, 3)


@pytest.fixture(scope="module")
def target(four_layers):
    return four_layers


@pytest.fixture(scope="module")
def settings(tmp_path_factory, target):
    store = write_store(tmp_path_factory.mktemp("store") / "s", target, lengths=[24] * 16, aux_layers=AUX)
    words = [f"target.path={target}", f"train.store={store}", "train.draft=eagle3", "train.dtype=float32"]
    return [*words, "train.tokens_per_rank=96", "train.max_steps=1", "train.learning_rate=1e-9"]


def like_torchspec(folder, target, change=lambda tensors, config: None, **sizes):
    """Random weights as TorchSpec exports them; `change` may alter tensors and configuration."""
    write_draft(folder, target, **(sizes or {"draft_vocab_size": 512}))
    tensors = load_file(folder / "model.safetensors")
    written = {name.replace("layers.0.", "midlayer."): x for name, x in tensors.items()}
    written["embed_tokens.weight"] = Checkpoint(target).get("model.embed_tokens.weight")
    config = json.loads((folder / "config.json").read_text())
    for key in ("eagle_aux_hidden_state_layer_ids", "n_routed_experts"):
        del config[key]
    # outputs of these layers, which are the inputs of 2 and 3
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2], "use_aux_hidden_state": True}
    config |= {"model_type": "kimi_k2", "_torchspec_version": "0.1.0"}
    change(written, config)
    save_file(written, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def go_on(tmp_path, settings, weights, *more):
    words = [*settings, f"run.dir={tmp_path / 'run'}", f"train.init_from={weights}", *more]
    config = load_config([], words)
    return launch.plan(config), launch.run(config)


def test_training_goes_on_from_an_export_of_torchspec(tmp_path, settings, target):
    weights = like_torchspec(tmp_path / "theirs", target)
    go_on(tmp_path, settings, weights, "eagle3.head=trained")
    theirs = load_file(weights / "model.safetensors")
    ours = Checkpoint(runs.locate(tmp_path / "run", "last") / "weights")
    assert ours.config["eagle_aux_hidden_state_layer_ids"] == list(AUX)
    for name, tensor in theirs.items():
        if name != "embed_tokens.weight":
            assert torch.equal(ours.get(name.replace("midlayer.", "layers.0.")), tensor), name


def test_training_keeps_the_tokens_of_a_pruned_draft(tmp_path, settings, target):
    size = len(KEEP)
    weights = like_torchspec(tmp_path / "theirs", target, draft_vocab_size=size)
    go_on(tmp_path, settings, weights, f"eagle3.draft_vocab_size={size}")
    last = runs.locate(tmp_path / "run", "last")
    assert torch.equal(Checkpoint(last / "weights").get("d2t") + torch.arange(size), KEEP)
    # more documents change how often tokens stand in the answers, not what a run has begun with
    run = launch.run(
        load_config(
            [],
            [
                *settings,
                f"run.dir={tmp_path / 'run'}",
                f"train.init_from={weights}",
                f"eagle3.draft_vocab_size={size}",
                "train.max_steps=2",
            ],
        )
    )
    assert run["steps"] == 2


def test_maps_of_all_tokens_are_left_out(tmp_path, target):
    def add(tensors, config):
        tensors |= {"d2t": torch.zeros(512, dtype=torch.int64), "t2d": torch.ones(512, dtype=torch.bool)}

    layer = load_layer(target, weights=like_torchspec(tmp_path / "theirs", target, add))
    assert layer.keep is None
    assert layer.own_head is not None
    assert layer.aux_layers == AUX


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], r"eagle3.head = 'trained', not 'target'"),
        (["eagle3.head=trained", "eagle3.carry=post_norm"], r"eagle3.carry = 'pre_norm', not 'post_norm'"),
        (["eagle3.head=trained", "eagle3.intermediate_size=64"], r"intermediate_size = 128, not 64"),
        (["eagle3.head=trained", "train.draft=mtp"], r"is an EAGLE-3 draft, not what train.draft says"),
    ],
)
def test_settings_that_are_not_those_of_the_weights_are_named(tmp_path, settings, target, words, said):
    weights = like_torchspec(tmp_path / "theirs", target)
    if "train.draft=mtp" in words:
        words = ["train.draft=mtp"]
    with pytest.raises(InputError, match=said):
        launch.plan(load_config([], [*settings, f"run.dir={tmp_path}", f"train.init_from={weights}", *words]))


def test_rows_that_are_not_the_targets_are_not_frozen_as_if_they_were(tmp_path, settings, target):
    size = len(KEEP)

    def trained(tensors, config):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2

    weights = like_torchspec(tmp_path / "theirs", target, trained, draft_vocab_size=size)
    with pytest.raises(InputError, match=r"a head of its own, not rows of the target's") as caught:
        go_on(tmp_path, settings, weights, f"eagle3.draft_vocab_size={size}")
    assert "eagle3.head = 'trained'" in caught.value.hint


def changed(**config):
    return lambda tensors, said: said.update(config)


def ids(*layers):
    return changed(eagle_config={"eagle_aux_hidden_state_layer_ids": list(layers)})


REFUSED = {
    "SpecForge's name for latent attention": (
        changed(architectures=["DeepseekV3ForCausalLMEagle3"], model_type="deepseek_v3"),
        r"says it is DeepseekV3ForCausalLMEagle3, expected Eagle3DeepseekV2ForCausalLM",
    ),
    "SpecForge's draft of the Llama shape": (
        changed(architectures=["LlamaForCausalLMEagle3"], model_type="llama"),
        r"says it is LlamaForCausalLMEagle3",
    ),
    "layers of another target": (
        ids(1, 29, 57),
        r"inputs of layers \[1, 29, 57\], not ascending from 1 to 3",
    ),
    "layers in another order": (ids(3, 2), r"inputs of layers \[3, 2\]"),
    "no layers": (changed(eagle_config={}), r"has no eagle_aux_hidden_state_layer_ids"),
    "another rotation": (changed(rope_scaling=None, rope_parameters=None), r"rope_type None, not 'yarn'"),
    "another base": (changed(rope_theta=5e4), r"rope_theta 50000.0, not 10000"),
    "no rotation": (changed(mla_use_nope=True), r"mla_use_nope is set"),
    "another residual": (changed(norm_before_residual=True), r"norm_before_residual is set"),
    "another width": (changed(hidden_size=128), r"hidden_size 128, not 64"),
    "a vocabulary without maps": (changed(draft_vocab_size=100), r"has no d2t that says which"),
    "an embedding of its own": (
        lambda tensors, config: tensors.update({"embed_tokens.weight": tensors["embed_tokens.weight"] + 1}),
        r"has an embedding of its own",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_computes_something_else_is_refused(tmp_path, target, what):
    change, said = REFUSED[what]
    with pytest.raises(InputError, match=said):
        load_layer(target, weights=like_torchspec(tmp_path / "theirs", target, change))


@pytest.mark.parametrize(
    ("d2t", "said"),
    [
        (KEEP, r"d2t does not hold offsets: target ids from 1 to 599"),
        (torch.zeros(len(KEEP), dtype=torch.int64), r"t2d and d2t keep different tokens"),
        (KEEP[:-1] - torch.arange(len(KEEP) - 1), r"d2t has 100 entries, draft_vocab_size is 101"),
    ],
)
def test_maps_that_do_not_fit_are_refused(tmp_path, target, d2t, said):
    weights = like_torchspec(
        tmp_path / "theirs", target, lambda t, c: t.update(d2t=d2t), draft_vocab_size=len(KEEP)
    )
    with pytest.raises(InputError, match=said):
        load_layer(target, weights=weights)
