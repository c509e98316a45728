"""What a training run says of itself, its groups of parameters, and settings that would do nothing."""

import json
import sys

import pytest
import torch

from configs import run_dir as runs
from configs.errors import ConfigError
from configs.load import load_config
from tests.stores import write_store
from train import launch
from train.batch import Packed
from train.cost import device_tflops, model_flops, work
from train.dims import Dims
from train.model import load_layer


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_checkpoint):
    store = write_store(tmp_path_factory.mktemp("store") / "store", tiny_checkpoint, lengths=[24] * 24)
    return [
        f"target.path={tiny_checkpoint}",
        f"train.store={store}",
        "train.dtype=float32",
        "train.tokens_per_rank=48",
        "train.max_steps=4",
        "train.warmup_steps=1",
        "train.evaluate_every=100",
        "train.learning_rate=1e-3",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings):
    """A run in which the experts hardly move and everything else decays."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    more = ['train.learning_rate_of={"mlp." = 1.0, "mlp.experts." = 1e-9}', "train.weight_decay=0.1"]
    launch.run(load_config([], [*settings, *more, f"run.dir={run_dir}"]))
    return run_dir


def rows(run_dir):
    lines = [json.loads(line) for line in (run_dir / runs.METRICS).read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def test_every_step_tells_the_load_of_the_experts_and_the_work_done(trained):
    for number, row in enumerate(rows(trained), 1):
        # two documents of 24 tokens; the answer is the last half, and three steps reach back from it
        assert row["train/tokens"] == 48
        assert row["data/anchor_share"] == pytest.approx(2 * (12 + 2) / 48)
        # 28 anchors, two experts each of eight
        assert row["moe/rows_per_expert"] == pytest.approx(28 * 2 / 8)
        assert 1 <= row["moe/max_over_mean"] <= 8
        assert 0 <= row["moe/idle_experts"] < 8
        assert row["train/skipped_steps"] == 0
        assert row["train/grad_norm"] > 0
        assert row["perf/tflops_per_rank"] > 0
        parts = [row[f"perf/{part}_s"] for part in ("forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert sum(parts) <= row["train/tokens"] / row["perf/tok_s"] * (1 - row["data/wait_frac"])
        assert (row["perf/seconds_left"] == 0) == (number == 4)


def test_operations_counted_are_those_of_the_products(tiny_checkpoint):
    dims = Dims.from_config(json.loads((tiny_checkpoint / "config.json").read_text()))
    layer = load_layer(tiny_checkpoint)
    active = sum(
        p.numel() * (dims.num_experts_per_tok / dims.n_routed_experts if p.dim() == 3 else 1)
        for name, p in layer.named_parameters()
        if p.dim() > 1 and "indexer" not in name
    )
    # one step with every token an anchor: each weight once forward, twice backward
    assert model_flops(layer, 100, 100, 0, 0, 1) == 6 * 100 * active
    # a student and the teacher through the head, the gradient of the student's states
    assert model_flops(layer, 0, 0, 0, 10, 1) == 10 * 3 * 2 * dims.vocab_size * dims.hidden_size
    scores = dims.num_attention_heads * (dims.qk_nope_head_dim + dims.qk_rope_head_dim + dims.v_head_dim)
    assert model_flops(layer, 0, 0, 7, 0, 2) == 2 * 6 * 7 * scores
    # sparse: every key is scored once, forward; gathered, one anchor reads no more latents than it keeps
    index = 2 * dims.index_n_heads * dims.index_head_dim
    assert model_flops(layer, 0, 0, 7, 0, 2, sparse=True) == pytest.approx(2 * 7 * (6 * scores + index))
    read = dims.num_attention_heads * (2 * dims.kv_lora_rank + dims.qk_rope_head_dim)
    few, many = (model_flops(layer, 0, 1, n, 0, 1, sparse=True, form="gather") for n in (4096, 8192))
    assert many - few == pytest.approx(4096 * index)
    none = model_flops(layer, 0, 1, 0, 0, 1, sparse=True, form="gather")
    assert few - none == pytest.approx(4096 * index + 6 * dims.index_topk * read)

    mask = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    states = torch.zeros(8, 4)
    batch = Packed(torch.zeros(8, dtype=torch.int64), mask, bounds, states, states)
    # anchors 1, 2 and 5 at places 1, 2 and 0 of their documents
    assert work(batch.cu_seqlens, batch.scored(1)).tolist() == [3, 2 + 3 + 1, 3]


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA H200", 989.5), ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA A100-SXM4-80GB", 312.0)]
    + [("NVIDIA H20", None), ("NVIDIA H100 PCIe", None), ("AMD Instinct MI300X", None)],
)
def test_utilisation_is_told_where_the_rate_of_the_device_is_known(name, rate):
    assert device_tflops(name) == rate


def test_a_factor_of_the_learning_rate_reaches_its_parameters_and_norms_do_not_decay(
    trained, settings, tiny_checkpoint, tmp_path
):
    weights = runs.locate(trained, "last") / "weights"
    released, found = load_layer(tiny_checkpoint), load_layer(tiny_checkpoint, weights=weights)
    moved = {name: not torch.equal(p, released.get_parameter(name)) for name, p in found.named_parameters()}
    frozen = {name for name in moved if "indexer" in name or name == "mlp.gate.weight"}
    assert {name for name, does in moved.items() if not does} == frozen | {
        f"mlp.experts.{w}" for w in ("w1", "w3", "w2")
    }
    # where a norm and a matrix get no gradient to speak of, the decay alone is left
    more = ["train.weight_decay=1.0", "train.learning_rate=0.1", "train.gradient_clipping=1e-30"]
    more += ["train.freeze=['mlp.', 'eh_proj']", "train.max_steps=1", "train.warmup_steps=0"]
    launch.run(load_config([], [*settings, *more, f"run.dir={tmp_path / 'run'}"]))
    found = load_layer(tiny_checkpoint, weights=runs.locate(tmp_path / "run", "last") / "weights")
    torch.testing.assert_close(found.enorm.weight, released.enorm.weight)
    decayed = released.self_attn.o_proj.weight * 0.9
    torch.testing.assert_close(found.self_attn.o_proj.weight, decayed, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('train.freeze=["nonsense."]', "train.freeze: no parameter of the layer begins with 'nonsense.'"),
        ('train.learning_rate_of={"mlp.expert." = 2.0}', "begins with 'mlp.expert.'"),
        ('train.learning_rate_of={"mlp.gate." = 2.0}', "all that begins with 'mlp.gate.' is frozen"),
        ('train.freeze=["self_attn.", "mlp.", "e", "h", "input", "post", "shared"]', "nothing to train"),
        ("train.wandb_project=demo", "train.wandb_project needs the package wandb"),
        ("train.tensorboard=true", "train.tensorboard needs the package tensorboard"),
    ],
)
def test_settings_that_do_nothing_are_refused_when_planning_and_when_training(
    settings, tmp_path, setting, said, monkeypatch
):
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr("train.plan.find_spec", lambda name: None)
    config = load_config([], [*settings, setting, f"run.dir={tmp_path / 'run'}"])
    for verb in (launch.plan, launch.run):
        with pytest.raises(ConfigError) as caught:
            verb(config)
        assert said in caught.value.message
        assert caught.value.hint
    if "mlp.expert" in setting:
        assert "mlp.experts." in caught.value.hint


def test_what_is_frozen_by_default_may_be_missing_from_a_target(settings, tmp_path):
    config = load_config(
        [], [*settings, 'train.freeze=["self_attn.indexer."]', f"run.dir={tmp_path / 'run'}"]
    )
    assert launch.plan(config).trainable > launch.plan(load_config([], settings)).trainable


def test_tensorboard_gets_every_number(settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    launch.run(load_config([], [*settings, "train.tensorboard=true", f"run.dir={tmp_path / 'run'}"]))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    told = [event.value for event in events.Scalars("train/loss")]
    assert told == pytest.approx([row["train/loss"] for row in rows(tmp_path / "run")])


def test_weights_and_biases_gets_a_run(settings, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    launch.run(load_config([], [*settings, "train.wandb_project=demo", f"run.dir={tmp_path / 'run'}"]))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
