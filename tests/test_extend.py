"""Going on with a run: more steps, more passes, more data, or from an earlier run's weights."""

import json

import pytest
import torch

from configs import run_dir as runs
from configs.errors import ConfigError, ContractError, InputError
from configs.load import freeze, load_config
from featurestore import StoreWriter, open_store, publish
from pipeline.tiny.write import random_checkpoint
from tests.stores import write_store
from train import launch
from train.model import load_layer
from train.trainer import learning_rate


@pytest.fixture
def settings(tmp_path, tiny_checkpoint):
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[24] * 16)
    return [
        f"target.path={tiny_checkpoint}",
        f"train.store={store}",
        f"run.dir={tmp_path / 'run'}",
        "train.dtype=float32",
        "train.tokens_per_rank=48",
        "train.warmup_steps=2",
        "train.learning_rate=1e-3",
        "train.evaluate_every=100",
    ]


def train(words):
    config = load_config([], words)
    freeze(config, "train", ("target", "train"))
    launch.run(config)
    lines = [json.loads(line) for line in (config.run.dir / runs.METRICS).read_text().splitlines()]
    return config, {line["step"]: line for line in lines if "train/loss" in line}


def test_more_steps_go_on_with_the_rate_of_the_longer_schedule_and_say_so(settings, capsys):
    train([*settings, "train.max_steps=4"])
    capsys.readouterr()
    config, rows = train([*settings, "train.max_steps=8"])
    assert sorted(rows) == list(range(1, 9))
    for step, row in rows.items():
        total = 4 if step <= 4 else 8
        assert row["train/lr"] == pytest.approx(learning_rate(config.train, step - 1, total))
    said = " ".join(capsys.readouterr().err.split())
    before, after = (learning_rate(config.train, step, total) for step, total in ((3, 4), (4, 8)))
    assert "8 steps in all, 4 until now" in said
    assert f"goes on at {after:.2e}, where it stood at {before:.2e}" in said


def test_more_passes_and_then_more_data_are_one_setting_each(settings, tmp_path, tiny_checkpoint):
    # 14 documents to train on, two a step
    _, rows = train([*settings, "train.epochs=1"])
    assert sorted(rows) == list(range(1, 8))
    config, rows = train([*settings, "train.epochs=2"])
    assert sorted(rows) == list(range(1, 15))

    old = open_store(tmp_path / "store")
    more = write_store(tmp_path / "more", tiny_checkpoint, lengths=[24] * 16, seed=1, first_uid=1000)
    added = open_store(more)
    with StoreWriter(str(tmp_path / "store"), old.contract) as writer:
        for document in added:
            ids, mask = (
                document.input_ids.numpy().astype("uint32"),
                document.loss_mask.numpy().astype("uint8"),
            )
            writer.append(document.uid, ids, mask, document.hidden, source="test")
    publish(str(tmp_path / "store"))
    # without being asked a run stays with what it began with
    _, rows = train([*settings, "train.epochs=3"])
    assert sorted(rows) == list(range(1, 22))
    config, rows = train([*settings, "train.epochs=4", "train.new_data=true"])
    # one more pass, over 28 documents
    assert sorted(rows) == list(range(1, 36))
    meta = runs.read_meta(runs.locate(config.run.dir, "last"))
    assert meta["loader"]["manifest"] == open_store(tmp_path / "store").version
    # and another start finds nothing left to do
    _, rows = train([*settings, "train.epochs=4", "train.new_data=true"])
    assert sorted(rows) == list(range(1, 36))


@pytest.mark.parametrize("kind", ["run", "checkpoint", "weights"])
def test_a_run_starts_from_an_earlier_ones_weights(settings, tmp_path, tiny_checkpoint, kind):
    first, _ = train([*settings, "train.max_steps=4"])
    best = runs.locate(first.run.dir, "best")
    source = {"run": first.run.dir, "checkpoint": best, "weights": best / runs.WEIGHTS}[kind]
    again = [*settings, f"run.dir={tmp_path / 'again'}", f"train.init_from={source}", "train.max_steps=1"]
    # a step of no size, so that what is saved is what it began with
    second, rows = train([*again, "train.learning_rate=1e-30", "train.warmup_steps=0"])
    assert sorted(rows) == [1]
    trained, begun = (
        load_layer(tiny_checkpoint, weights=runs.locate(run.run.dir, "last") / runs.WEIGHTS).state_dict()
        for run in (first, second)
    )
    assert all(torch.equal(begun[name], tensor) for name, tensor in trained.items())
    released = load_layer(tiny_checkpoint).eh_proj.weight
    assert not torch.equal(trained["eh_proj.weight"], released)


def test_weights_that_do_not_fit_a_run_are_refused_when_planning_or_before_the_first_step(
    settings, tmp_path, tiny_config
):
    first, _ = train([*settings, "train.max_steps=1"])
    again = [*settings, f"run.dir={tmp_path / 'again'}"]

    def refused(*words):
        return launch.plan(load_config([], [*again, *words]))

    with pytest.raises(InputError, match="nowhere"):
        refused("train.init_from=nowhere")
    # its training documents would be evaluated on
    for other in ("run.seed=1", "prompts.held_out=0.5"):
        with pytest.raises(ConfigError, match="documents it was trained on"):
            refused(f"train.init_from={first.run.dir}", other)
    assert refused(f"train.init_from={first.run.dir}", "prompts.held_out=0.01").trainable
    other = random_checkpoint(tmp_path / "target", tiny_config, seed=1)
    store = write_store(tmp_path / "other", other, lengths=[24] * 16)
    words = [*again, f"target.path={other}", f"train.store={store}", f"train.init_from={first.run.dir}"]
    with pytest.raises(ContractError, match="norm_and_head_sha256"):
        launch.run(load_config([], words))
