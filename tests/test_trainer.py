"""Training under ZeRO-3: the same result on any number of ranks, and after any way of being stopped."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs import run_dir as runs
from configs.errors import ConfigError, ContractError, InputError
from configs.load import load_config
from configs.schema import TrainConfig
from export.checkpoint import Checkpoint
from export.keymap import keymap
from pipeline.tiny.write import random_checkpoint
from tests import rank_jobs
from tests.rank_jobs import run_job, start_job
from tests.stores import write_store
from train import evaluate, launch
from train.model import load_layer
from train.trainer import learning_rate
from train.zero import deepspeed_config

ROOT = Path(__file__).parent.parent
STEPS = 18


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_checkpoint):
    # documents of one length fill the ranks alike, however many there are
    path = tmp_path_factory.mktemp("store") / "store"
    return write_store(path, tiny_checkpoint, lengths=[24] * 48)


@pytest.fixture(scope="module")
def settings(store, tiny_checkpoint):
    """Overrides of a short run."""
    return [
        f"target.path={tiny_checkpoint}",
        f"train.store={store}",
        "train.dtype=float32",
        "train.tokens_per_rank=48",
        f"train.max_steps={STEPS}",
        "train.checkpoint_every=6",
        "train.evaluate_every=6",
        "train.warmup_steps=2",
        "train.learning_rate=3e-3",
    ]


def start(run_dir, settings, *more):
    """The train verb; ranks that it starts are interpreters of their own."""
    return start_job(f"{run_dir}.log", rank_jobs.verb, ["train", *settings, f"run.dir={run_dir}", *more])


def said(run_dir):
    return Path(f"{run_dir}.log").read_text()


def losses(run_dir):
    """What each step computed, without timings."""
    steps = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        kept = {k: v for k, v in values.items() if k.startswith(("train/", "evaluate/"))}
        steps.setdefault(values["step"], {}).update(kept)
    return steps


def optimizer_states(run_dir):
    """Float32 masters and moments of the last checkpoint, a dict for each rank."""
    return [load_file(f) for f in sorted((runs.locate(run_dir, "last") / "state").iterdir())]


def assert_same_losses(a, b, tolerance=0.0):
    found, expected = losses(a), losses(b)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == (pytest.approx(values, rel=tolerance) if tolerance else values), step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, settings):
    """Two ranks of a launcher, nobody interfering."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_job(rank_jobs.train_together, 2, [*settings, f"run.dir={run_dir}"])
    return run_dir


def test_two_ranks_learn_and_leave_a_checkpoint_that_serves(undisturbed, settings, tiny_checkpoint):
    steps = losses(undisturbed)
    assert list(steps) == list(range(STEPS + 1))
    assert steps[STEPS]["train/loss"] < 0.8 * steps[1]["train/loss"]
    assert {s for s in steps if "evaluate/acceptance_length" in steps[s]} == {0, 6, 12, 18}
    assert steps[STEPS]["evaluate/acceptance_length"] > steps[0]["evaluate/acceptance_length"]
    # a step of two ranks is two times 48 tokens
    assert all(steps[s]["train/tokens"] == 96 for s in range(1, STEPS + 1))

    root = runs.directory(undisturbed)
    kept = [p.name for p in runs.committed(undisturbed)]
    best = runs.read_best(undisturbed)
    assert kept[-2:] == ["step_000012", "step_000018"]
    assert set(kept) <= {"step_000012", "step_000018", best["checkpoint"]}
    assert (root / "latest").read_text().strip() == "step_000018"
    assert best["acceptance_length"] == max(
        s.get("evaluate/acceptance_length", 0) for k, s in steps.items() if k
    )
    assert runs.locate(undisturbed, "best").name == best["checkpoint"]

    # everything under checkpoint names, the frozen parts as released
    weights = runs.locate(undisturbed, "last") / "weights"
    released, trained = (
        load_layer(tiny_checkpoint).state_dict(),
        load_layer(tiny_checkpoint, weights=weights).state_dict(),
    )
    frozen = {n for n in released if n.startswith(("self_attn.indexer.", "mlp.gate."))}
    for name, tensor in trained.items():
        same = torch.equal(tensor, released[name])
        assert same == (name in frozen), name
    stored = {n: t.dtype for f in weights.glob("*.safetensors") for n, t in load_file(f).items()}
    assert stored.keys() == {n for op in keymap(Checkpoint(tiny_checkpoint).config) for n in op.checkpoint}
    assert {n for n, dtype in stored.items() if dtype != torch.bfloat16} == {
        n for n in stored if n.endswith("e_score_correction_bias")
    }

    # the offline evaluator finds what training found, up to the rounding of the weights
    more = [f"run.dir={undisturbed}", "evaluate.max_documents=64", "evaluate.checkpoint=last"]
    found = evaluate.run(load_config([], [*settings, *more]))
    assert found["acceptance_length"] == pytest.approx(steps[STEPS]["evaluate/acceptance_length"], abs=0.1)


def test_killed_terminated_and_interrupted_runs_end_as_the_undisturbed_one(tmp_path, settings, undisturbed):
    run_dir = tmp_path / "run"

    def wait_until(happened):
        deadline = time.monotonic() + 120
        while not happened():
            assert process.is_alive(), said(run_dir)
            assert time.monotonic() < deadline, said(run_dir)
            time.sleep(0.02)

    def metrics():
        path = run_dir / "metrics.jsonl"
        return path.read_text() if path.exists() else ""

    # ranks of our own, stopped politely after a step or two
    process = start(run_dir, settings, "train.ranks=2")
    wait_until(lambda: '"step": 1,' in metrics())
    process.terminate()
    process.join(60)
    assert process.exitcode == 143, said(run_dir)
    stopped = runs.locate(run_dir, "last")

    # then killed without warning somewhere after the next checkpoint, its ranks with it
    process = start(run_dir, settings, "train.ranks=2")
    wait_until(lambda: runs.locate(run_dir, "last") != stopped)
    process.kill()
    process.join()
    # what a kill in the middle of a save leaves behind
    half = runs.directory(run_dir) / "step_000017"
    shutil.copytree(runs.locate(run_dir, "last"), half)
    next((half / "state").iterdir()).write_bytes(b"cut short")
    (runs.directory(run_dir) / ".step_000018.partial").mkdir()

    process = start(run_dir, settings, "train.ranks=2")
    process.join(120)
    assert process.exitcode == 0, said(run_dir)
    text = said(run_dir)
    assert f"going on from {stopped}" in text
    assert "step_000017/state/rank_" in text
    assert half.with_name("step_000017.damaged").is_dir()
    assert not list(runs.directory(run_dir).glob(".step_*"))
    assert_same_losses(run_dir, undisturbed)
    for mine, theirs in zip(optimizer_states(run_dir), optimizer_states(undisturbed), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    mine, theirs = (runs.read_commit(runs.locate(d, "last")) for d in (run_dir, undisturbed))
    assert {f: e for f, e in mine.items() if "/" in f} == {f: e for f, e in theirs.items() if "/" in f}


def test_one_rank_computes_what_two_do_and_takes_over_from_them(tmp_path, settings, undisturbed):
    one = [*settings, "train.gradient_accumulation_steps=2"]
    config = load_config([], [*one, f"run.dir={tmp_path / 'one'}"])
    result = launch.run(config)
    assert result["steps"] == STEPS
    assert result["tokens"] == 96 * STEPS
    assert_same_losses(tmp_path / "one", undisturbed, tolerance=1e-4)

    # from a checkpoint of two ranks
    shutil.copytree(undisturbed, tmp_path / "both")
    shutil.rmtree(runs.locate(tmp_path / "both", "last"))
    launch.run(load_config([], [*one, f"run.dir={tmp_path / 'both'}"]))
    assert_same_losses(tmp_path / "both", undisturbed, tolerance=1e-4)


def test_bfloat16_trains_with_float32_masters(tmp_path, settings):
    config = load_config([], [*settings, f"run.dir={tmp_path}", "train.dtype=bfloat16"])
    launch.run(config)
    steps = losses(tmp_path)
    assert steps[STEPS]["train/loss"] < 0.8 * steps[1]["train/loss"]
    (states,) = optimizer_states(tmp_path)
    assert {t.dtype for t in states.values()} == {torch.float32}


def test_a_store_of_another_target_is_refused_before_anything_is_written(
    tmp_path, settings, tiny_config, capfd
):
    other = random_checkpoint(tmp_path / "other", tiny_config, seed=1)
    config = load_config(
        [], [*settings, f"run.dir={tmp_path / 'run'}", f"target.path={other}", "train.ranks=2"]
    )
    # found by a rank, raised here
    with pytest.raises(ContractError, match="norm_and_head_sha256"):
        launch.run(config)
    assert not runs.directory(tmp_path / "run").exists()
    # the other rank, which waited for that one, adds no traceback
    assert "Traceback" not in capfd.readouterr().err


def test_settings_that_cannot_work_are_refused(tmp_path, settings):
    def run(*more):
        return launch.run(load_config([], [*settings, f"run.dir={tmp_path}", *more]))

    with pytest.raises(ConfigError, match="longest document"):
        run("train.tokens_per_rank=16")
    with pytest.raises(InputError, match="no checkpoint"):
        run("target.path=/nowhere")


def test_a_run_of_another_draft_does_not_go_on_from_a_checkpoint(undisturbed, settings, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "config.train.json").unlink()
    config = load_config([], [*settings, f"run.dir={run_dir}", "train.mask_position_0=false"])
    with pytest.raises(ContractError, match=r"draft.mask_position_0: True, not False"):
        launch.run(config)


def test_learning_rate_warms_up_and_decays_to_its_floor():
    train = TrainConfig(learning_rate=1.0, warmup_steps=10, min_learning_rate_ratio=0.1)
    rates = [learning_rate(train, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    # a run shorter than its warm-up still reaches the peak
    assert max(learning_rate(train, step, 8) for step in range(8)) == 1.0


def test_deepspeed_settings_pass_through_and_ours_stay():
    extra = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 77},
        "wall_clock_breakdown": True,
    }
    merged = deepspeed_config(TrainConfig(deepspeed=extra, gradient_accumulation_steps=4))
    assert merged["zero_optimization"]["reduce_bucket_size"] == 77
    assert merged["zero_optimization"]["stage"] == 3
    assert merged["wall_clock_breakdown"] is True
    assert merged["gradient_accumulation_steps"] == 4
    assert merged["bf16"] == {"enabled": True}


def test_plan_of_the_real_run_needs_no_model():
    plan = launch.plan(load_config([ROOT / "configs" / "deepseek-v3.2.toml"]))
    assert plan.trainable + plan.frozen == 11_624_027_648
    assert plan.tables == 2 * 129280 * 7168
    assert plan.steps is None
    assert "no store" in str(plan)
    assert 80 < sum(plan.memory_bytes.values()) / 2**30 < 92
