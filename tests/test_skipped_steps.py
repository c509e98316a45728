"""Steps without finite gradients: skipped, said, counted, and the end of a run that does nothing else."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs import run_dir as runs
from configs.errors import Layer61Error
from configs.load import load_config
from featurestore import open_store
from tests.stores import write_store
from train import launch
from train.draft import Draft
from train.metrics import Metrics

DOCUMENTS = 24


def settings(tmp_path, target, store, *more):
    return load_config(
        [],
        [
            f"run.dir={tmp_path / 'run'}",
            f"target.path={target}",
            f"train.store={store}",
            "train.tokens_per_rank=48",
            "train.max_steps=10",
            "train.checkpoint_every=1",
            "train.evaluate_every=100",
            "train.warmup_steps=2",
            "train.learning_rate=1e-3",
            "train.freeze=[]",
            *more,
        ],
    )


def rows(config):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (config.run.dir / runs.METRICS).read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return {row["step"]: row for row in lines if "train/loss" in row}


def weights(path):
    found = {}
    for file in (path / "weights").glob("*.safetensors"):
        found |= load_file(file)
    assert found
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_checkpoint):
    """Documents of which one, or all, have states that are not numbers."""
    root = tmp_path_factory.mktemp("stores")
    lengths = [24] * DOCUMENTS
    one = write_store(root / "one", tiny_checkpoint, lengths=lengths, not_a_number={5})
    every = write_store(root / "every", tiny_checkpoint, lengths=lengths, not_a_number=set(range(DOCUMENTS)))
    return one, every


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_document_that_is_not_finite_costs_its_step_alone_and_is_named(
    tmp_path, tiny_checkpoint, stores, dtype, capsys
):
    config = settings(tmp_path, tiny_checkpoint, stores[0], f"train.dtype={dtype}")
    assert launch.run(config)["steps"] == 10
    found = rows(config)
    (bad,) = (row for row in found.values() if row.get("skipped_documents"))
    uid = int(open_store(stores[0]).uid[5])
    assert uid in bad["skipped_documents"]
    assert bad["train/loss"] is None
    counts = [row["train/skipped_steps"] for row in found.values()]
    assert counts == [int(step >= bad["step"]) for step in found]
    assert f"step {bad['step']} skipped, 1 in a row" in " ".join(capsys.readouterr().err.split())
    assert all(t.isfinite().all() for t in weights(runs.locate(config.run.dir, "last")).values())
    assert found[10]["train/loss"] < found[1]["train/loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_that_are_not_finite_under_a_finite_loss_are_no_success(
    tmp_path, tiny_checkpoint, tmp_path_factory, dtype, monkeypatch
):
    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    forward, calls = Draft.forward, []

    def poisoned(self, batch, scored, weights_SM, **options):
        found = forward(self, batch, scored, weights_SM, **options)
        calls.append(self.training)
        return found._replace(loss=Poisoned.apply(found.loss)) if sum(calls) > 4 else found

    monkeypatch.setattr(Draft, "forward", poisoned)
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[24] * DOCUMENTS)
    config = settings(
        tmp_path,
        tiny_checkpoint,
        store,
        f"train.dtype={dtype}",
        "train.max_skipped_steps=3",
        "train.keep_checkpoints=9",
    )
    with pytest.raises(Layer61Error, match="3 steps in a row had no finite gradients") as caught:
        launch.run(config)
    assert caught.value.exit_code == 1
    found = rows(config)
    assert list(found) == list(range(1, 8))
    assert [row["train/skipped_steps"] for row in found.values()] == [0, 0, 0, 0, 1, 2, 3]
    assert all(np.isfinite(row["train/loss"]) for row in found.values())
    assert [bool(row.get("skipped_documents")) for row in found.values()] == [False] * 4 + [True] * 3
    # the newest checkpoint holds what the last good step left
    saved = {path.name: weights(path) for path in runs.committed(config.run.dir)}
    assert list(saved) == [f"step_{step:06d}" for step in range(1, 7)]
    good, last = saved["step_000004"], saved["step_000006"]
    assert all(torch.equal(tensor, last[name]) for name, tensor in good.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in saved["step_000003"].items())


def test_a_run_of_skipped_steps_ends_with_exit_code_1(tmp_path, tiny_checkpoint, stores):
    config = settings(tmp_path, tiny_checkpoint, stores[1], "train.max_skipped_steps=2")
    with pytest.raises(Layer61Error, match="2 steps in a row") as caught:
        launch.run(config)
    assert caught.value.exit_code == 1
    assert sorted(rows(config)) == [1, 2]


def test_lines_of_the_metrics_that_cannot_be_read_are_kept_aside(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    ours = [b'{"step": 1, "train/loss": 2.0}\n', b'{"step": 2, "train/loss": 1.5}\n']
    junk = [b"5\n", b"\xff\x00\xfe garbage\n", b'{"no": "step"}\n', b'{"step": "7"}\n']
    path.write_bytes(ours[0] + junk[0] + junk[1] + ours[1] + junk[2] + junk[3] + b'{"step": 3, "tra')
    metrics = Metrics(path, 2)
    assert path.read_bytes() == b"".join(ours)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(junk)
    assert "4 lines" in " ".join(capsys.readouterr().err.split())
    metrics.write(3, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 0.5})
    last = path.read_text().splitlines()[-1]
    assert json.loads(last) == {"step": 3, "train/loss": None, "train/grad_norm": None, "train/lr": 0.5}
    # a second start adds to what is aside
    with open(path, "ab") as f:
        f.write(b"more\n")
    Metrics(path, 3)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(junk) + b"more\n"
