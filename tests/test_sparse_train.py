"""Training and evaluating with sparse attention, decided once for all ranks, and training the indexer."""

import json
import sys

import pytest
import torch

from benchmarks import sparse as benchmark
from configs import run_dir as runs
from configs.errors import ConfigError, Layer61Error
from configs.load import freeze, load_config
from export.checkpoint import Checkpoint
from featurestore import open_store
from tests import rank_jobs
from tests.rank_jobs import run_job
from tests.stores import write_store
from train import evaluate, launch
from train.model import load_layer
from train.sparse import check_attention, decide, mean_keys


@pytest.fixture(scope="module")
def long_store(tmp_path_factory, sparse_checkpoint):
    """Documents of which some are longer than the target's index_topk, 64."""
    lengths = [24, 96, 24, 130, 40, 24, 24, 96] * 3
    return write_store(tmp_path_factory.mktemp("store") / "store", sparse_checkpoint, lengths=lengths)


@pytest.fixture
def settings(sparse_checkpoint, long_store, tmp_path):
    words = [f"target.path={sparse_checkpoint}", f"train.store={long_store}", f"run.dir={tmp_path / 'run'}"]
    words += ["train.dtype=float32", "train.tokens_per_rank=130", "train.max_steps=2", "train.warmup_steps=0"]
    return [*words, "train.evaluate_every=100", "train.learning_rate=1e-3"]


def rows(config):
    lines = [json.loads(line) for line in (config.run.dir / runs.METRICS).read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def moved(config, target):
    """Names of the layer's parameters that training has changed."""
    released = load_layer(target)
    found = load_layer(target, weights=runs.locate(config.run.dir, "last") / "weights")
    return {n for n, p in found.named_parameters() if not torch.equal(p, released.get_parameter(n))}


def test_two_ranks_of_which_one_has_nothing_long_train_as_one_rank_does(sparse_checkpoint):
    said = run_job(rank_jobs.sparse_ranks, sparse_checkpoint)
    found = {}
    for line in said.splitlines():
        if line.startswith("losses"):
            _, ranks, step, *values = line.split()
            found[int(ranks), int(step)] = [float(x) for x in values]
    assert len(found) == 4
    for step in range(2):
        assert found[2, step] == pytest.approx(found[1, step], rel=1e-5)
    # the steps did something
    assert found[1, 1][0] != found[1, 0][0]
    assert found[1, 1][1] != found[1, 0][1]


def test_attention_is_sparse_where_the_store_needs_it_and_a_checkpoint_says_so(
    settings, sparse_checkpoint, tmp_path
):
    config = load_config([], settings)
    launch.run(config)
    assert runs.read_meta(runs.locate(config.run.dir, "last"))["draft"]["attention"] == "sparse"
    assert "train/indexer_loss" not in rows(config)[0]
    assert not any("indexer" in name for name in moved(config, sparse_checkpoint))
    # of the same documents, another mask is another loss
    short = write_store(tmp_path / "short", sparse_checkpoint, lengths=[24] * 24)
    other = load_config([], [*settings, f"train.store={short}", f"run.dir={tmp_path / 'short-run'}"])
    launch.run(other)
    assert runs.read_meta(runs.locate(other.run.dir, "last"))["draft"]["attention"] == "dense"


def test_short_documents_train_alike_with_and_without_the_mask(sparse_checkpoint, settings, tmp_path):
    store = write_store(tmp_path / "short", sparse_checkpoint, lengths=[24, 60, 33] * 8)
    found = []
    for attention in ("dense", "sparse"):
        words = [f"train.store={store}", f"train.attention={attention}", f"run.dir={tmp_path / attention}"]
        config = load_config([], [*settings, *words])
        launch.run(config)
        found.append([row["train/loss"] for row in rows(config)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("indexer", ["warmup", "joint"])
def test_an_indexer_is_trained_alone_or_beside_the_layer_and_its_loss_falls(
    settings, sparse_checkpoint, indexer
):
    words = [f"train.indexer={indexer}", "train.indexer_learning_rate=3e-3", "train.max_steps=8"]
    config = load_config([], [*settings, *words])
    launch.run(config)
    losses = [row["train/indexer_loss"] for row in rows(config)]
    assert sum(losses[-3:]) < sum(losses[:3])
    changed = moved(config, sparse_checkpoint)
    trained = {n for n in changed if "indexer" in n}
    assert trained == {n for n in load_layer(sparse_checkpoint).state_dict() if "indexer" in n}
    assert (changed == trained) == (indexer == "warmup")
    found = evaluate.run(config)["selection"]
    assert {row["length"] for row in found["by_length"]} == {"1-128"}
    assert [row["step"] for row in found["by_length"]] == [1, 2, 3]
    assert all(1 <= row["acceptance_length"] <= 4 for row in found["by_length"])
    assert 0 < found["overlap"] < 1
    released = load_config([], [*settings, "evaluate.checkpoint=released"])
    assert evaluate.run(released)["selection"]["overlap"] == 1


def test_a_joint_indexer_takes_no_share_of_the_layers_gradient_clipping(settings, tmp_path):
    norms = []
    for indexer in ("frozen", "joint"):
        words = [f"train.indexer={indexer}", f"run.dir={tmp_path / indexer}", "train.max_steps=1"]
        config = load_config([], [*settings, *words])
        launch.run(config)
        norms.append(rows(config)[0]["train/grad_norm"])
    # the first step of both has the same layer, batch and mask
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_layers_trained_dense_and_sparse_are_measured_beside_one_another_and_join_the_summary(
    long_store, sparse_checkpoint, settings, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    freeze(load_config([], settings), "train", ("target", "train", "eagle3"))
    (run / runs.SUMMARY).write_text('{"seconds": 1}')
    monkeypatch.setattr(sys, "argv", ["sparse", str(run), "--seeds", "0", "--steps", "3"])
    benchmark.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((run / runs.SUMMARY).read_text()) == {"seconds": 1, "attention": found}
    ways = {name: found[name]["acceptance_length"] for name in ("released", "dense", "sparse", "joint")}
    assert all(1 <= x <= 4 for (x,) in ways.values())
    # trained from one start on the same batches, under another mask and with another indexer
    kept = [found[name]["mass_over_best"] for name in ("released", "dense", "sparse", "joint")]
    assert len({x for (x,) in kept}) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.attention=dense"], "longest document has 130 tokens"),
        (["train.tokens_per_rank=96"], "tokens_per_rank = 96 is less than the longest document"),
        (["train.indexer=joint", 'train.freeze=["self_attn."]'], "'self_attn.' covers the indexer"),
        (["train.indexer_learning_rate=1e-3"], "trains no indexer"),
    ],
)
def test_settings_that_do_not_fit_long_documents_are_refused(settings, words, said):
    config = load_config([], [*settings, *words])
    for verb in (launch.plan, launch.run):
        with pytest.raises(ConfigError) as caught:
            verb(config)
        assert said in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["train.attention=sparse"], {"index_topk": None}, "no index_topk"),
        (["train.indexer=warmup"], {"index_topk": None}, "no index_topk"),
        (["train.attention=sparse", "train.draft=eagle3"], {}, "an EAGLE-3 draft has none"),
        ([], {"index_n_heads": 4}, "index_n_heads = 4"),
        ([], {"index_share_for_mtp_iteration": True}, "index_share_for_mtp_iteration"),
        ([], {"indexer_rope_interleave": True}, "indexer_rope_interleave"),
    ],
)
def test_targets_whose_indexer_cannot_serve_are_refused(sparse_checkpoint, words, changes, said):
    model = Checkpoint(sparse_checkpoint).config | changes
    with pytest.raises(Layer61Error) as caught:
        check_attention(load_config([], words).train, model, 130)
    assert said in caught.value.message
    assert caught.value.hint


def test_a_warm_up_without_an_indexer_is_said_to_need_one(sparse_checkpoint, settings, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    model = {k: v for k, v in Checkpoint(sparse_checkpoint).config.items() if not k.startswith("index_")}
    (dense / "config.json").write_text(json.dumps(model | {"model_type": "deepseek_v3"}))
    with pytest.raises(ConfigError, match=r"train\.indexer = 'warmup' needs an indexer"):
        launch.plan(load_config([], [*settings, f"target.path={dense}", "train.indexer=warmup"]))


def test_few_keys_of_many_are_gathered_and_others_masked(sparse_checkpoint, long_store):
    model, store, train = (
        Checkpoint(sparse_checkpoint).config,
        open_store(long_store),
        load_config([], []).train,
    )
    # the longest answer is the second half of 130 tokens
    assert 60 < mean_keys(store) < 130
    cpu = torch.device("cpu")
    assert decide(train, model, store, cpu) == (True, None)
    assert decide(train, model | {"index_topk": 2}, store, cpu) == (True, "gather")
    assert decide(train, model | {"index_topk": 1000}, store, cpu) == (False, None)


def test_a_target_without_an_indexer_is_dense_at_any_length(sparse_checkpoint, long_store):
    model = Checkpoint(sparse_checkpoint).config | {"index_topk": None}
    longest = int(open_store(long_store).length.max())
    assert longest == 130
    assert not check_attention(load_config([], []).train, model, longest)
    # up to index_topk + 2 tokens the mask hides nothing from what is predicted
    model = Checkpoint(sparse_checkpoint).config
    assert not check_attention(load_config([], []).train, model, 66)
    assert check_attention(load_config([], []).train, model, 67)
