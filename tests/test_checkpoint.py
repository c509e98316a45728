"""Checkpoints: any number of ranks reads them, every damage is found, nothing of a user's is lost."""

import json
import os
import resource
import shutil

import pytest

from configs import run_dir as runs
from configs.errors import InputError, Layer61Error
from export.checkpoint import Checkpoint
from export.keymap import keymap
from featurestore import open_store
from featurestore.order import epoch_order
from tests import rank_jobs
from tests.rank_jobs import run_job
from tests.stores import write_store
from train import checkpoint, zero


def test_any_number_of_ranks_takes_over_the_optimizer_bit_for_bit(tmp_path, tiny_checkpoint):
    run_job(rank_jobs.hand_overs, tiny_checkpoint, tmp_path, 2, 1, 4, 3, 2)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    """An engine of this process alone with made-up state."""
    zero.init_distributed()
    engine, _ = rank_jobs.build(tiny_checkpoint)
    rank_jobs.fill(engine)
    yield engine
    zero.shutdown()


@pytest.fixture
def save(engine, tiny_checkpoint, tmp_path):
    """Save a checkpoint of a run in `tmp_path`, evaluated or not."""
    ops = keymap(Checkpoint(tiny_checkpoint).config)

    def act(step, score=None, keep=9):
        metrics = {} if score is None else {"acceptance_length": score}
        meta = {"contract": {}, "loader": {"step": step}, "metrics": metrics}
        return checkpoint.save(engine, ops, tmp_path, step, meta, keep=keep)

    return act


def flip(path, at):
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 4]))


def names(run_dir):
    return sorted(p.name for p in runs.directory(run_dir).iterdir())


def test_a_flipped_byte_in_any_file_is_found_and_the_checkpoint_before_is_taken(
    engine, save, tmp_path, capsys
):
    before, last = save(1), save(2)
    files = sorted(str(p.relative_to(last)) for p in last.rglob("*") if p.is_file())
    assert files == [
        "COMMIT.json",
        "layer61.json",
        "state/rank_0000.safetensors",
        "weights/layer-00001.safetensors",
        "weights/model.safetensors.index.json",
    ]
    intact = tmp_path / "intact"
    shutil.copytree(last, intact)
    for number, file in enumerate(files):
        size = (last / file).stat().st_size
        flip(last / file, [1, size // 2, size - 2][number % 3])
        said = runs.clean(tmp_path)
        saved = checkpoint.newest(tmp_path)
        if not said:
            assert saved.path == last, file
            saved = checkpoint.load(engine, saved)
            rank_jobs.check(engine)
            said = [capsys.readouterr().err]
        assert str(last / file) in said[0]
        assert "step_000002.damaged" in said[0]
        assert saved.path == before
        assert saved.meta["loader"] == {"step": 1}
        # nothing of it is lost
        last.with_name("step_000002.damaged").rename(tmp_path / f"{number}")
        shutil.copytree(intact, last)
    assert checkpoint.load(engine, checkpoint.newest(tmp_path)).path == last


def test_the_last_checkpoint_being_damaged_is_an_error(engine, save, tmp_path):
    flip(save(3) / "state" / "rank_0000.safetensors", 5000)
    with pytest.raises(InputError, match=r"rank_0000.safetensors is damaged.*kept as step_000003.damaged"):
        checkpoint.load(engine, checkpoint.newest(tmp_path))


def test_weights_that_are_damaged_are_neither_evaluated_nor_exported(save, tmp_path, tiny_checkpoint):
    path = save(4)
    for name in ("last", "step_000004", str(path), str(path / "weights")):
        assert runs.find_weights(tmp_path, name, tiny_checkpoint) == path / "weights"
    flip(path / "weights" / "layer-00001.safetensors", 40_000)
    for name in ("last", "step_000004", str(path), str(path / "weights")):
        with pytest.raises(InputError, match=r"layer-00001.safetensors is damaged"):
            runs.find_weights(tmp_path, name, tiny_checkpoint)


def test_only_what_an_interrupted_save_left_is_removed(save, tmp_path):
    save(5)
    root = runs.directory(tmp_path)
    shutil.copytree(root / "step_000005", root / "step_000005-mine")
    (root / "step_8.tar").write_text("a user's")
    (root / "step_000009").write_text("a user's file")
    (root / "notes.partial").mkdir()
    shutil.copytree(root / "step_000005", root / "step_000007")
    (root / "step_000007" / "COMMIT.json").unlink()
    (root / ".step_000006.partial").mkdir()
    (root / ".latest.123.partial").touch()
    said = runs.clean(tmp_path)
    assert names(tmp_path) == sorted(
        ["latest", "notes.partial", "step_000005", "step_000005-mine", "step_000007.damaged"]
        + ["step_000009", "step_8.tar"]
    )
    assert len(said) == 3
    assert (root / "step_000007.damaged" / "weights" / "layer-00001.safetensors").is_file()
    assert runs.clean(tmp_path) == []
    assert [p.name for p in runs.committed(tmp_path)] == ["step_000005"]


def test_the_best_stays_and_a_best_that_is_gone_is_an_error_that_lists_the_rest(save, tmp_path):
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        runs.locate(tmp_path, "best")
    assert save(1) == runs.locate(tmp_path, "best")  # nothing was evaluated
    for step, score in ((2, 2.5), (3, 2.0), (4, 2.5), (5, 2.1)):
        save(step, score, keep=2)
    assert [p.name for p in runs.committed(tmp_path)] == ["step_000002", "step_000004", "step_000005"]
    assert runs.locate(tmp_path, "best").name == "step_000002"
    best = runs.directory(tmp_path) / "best.json"
    for garbage in ("5", "{", '{"checkpoint": "step_000004"}', '{"checkpoint": 4, "acceptance_length": 2}'):
        best.write_text(garbage)
        with pytest.raises(InputError, match=r"best.json is missing or damaged") as error:
            runs.locate(tmp_path, "best")
        assert "last (step_000005)" in error.value.hint
        assert "step_000002, step_000004, step_000005" in error.value.hint
        # training goes on and writes it again
        save(5, 2.1)
        assert runs.locate(tmp_path, "best").name == "step_000002"
        shutil.rmtree(runs.directory(tmp_path) / "step_000005.damaged")
    (runs.directory(tmp_path) / "step_000002" / "COMMIT.json").unlink()
    with pytest.raises(InputError, match="names step_000002, which is missing or not whole"):
        runs.locate(tmp_path, "best")
    for wrong in ("lst", "step_000099", "/nowhere"):
        with pytest.raises(InputError) as error:
            runs.find_weights(tmp_path, wrong, tmp_path)
        assert "last (step_000005)" in error.value.hint


def test_files_have_the_mode_of_a_users_files(save, tmp_path):
    old = os.umask(0o027)
    try:
        path = save(1)
    finally:
        os.umask(old)
    assert {oct(p.stat().st_mode & 0o777) for p in path.rglob("*") if p.is_file()} == {"0o640"}


def test_a_checkpoint_of_format_1_serves_but_is_not_gone_on_from(save, tmp_path, tiny_checkpoint):
    path = save(1)
    meta = json.loads((path / "layer61.json").read_text())
    (path / "layer61.json").write_text(json.dumps(meta | {"format": 1}))
    sizes = {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if p.name != "COMMIT.json"}
    files = {name: size for name, size in sizes.items() if (path / name).is_file()}
    (path / "COMMIT.json").write_text(json.dumps({"format": 1, "files": files}))
    assert runs.find_weights(tmp_path, "best", tiny_checkpoint) == path / "weights"
    with pytest.raises(InputError, match="earlier version"):
        checkpoint.newest(tmp_path)


def test_a_full_disk_is_one_clear_error_and_leaves_the_checkpoint_before(engine, save, tmp_path):
    save(1)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(Layer61Error, match=r"cannot save step 2 .* takes 0.00\d GB") as error:
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "goes on from the last checkpoint" in error.value.hint
    assert names(tmp_path) == ["latest", "step_000001"]
    assert checkpoint.load(engine, checkpoint.newest(tmp_path)).path.name == "step_000001"
    rank_jobs.check(engine)


def test_losses_and_gradient_norms_agree_at_1_2_and_4_ranks(tmp_path, tiny_checkpoint):
    # documents of one length fill the ranks alike, however many there are
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[24] * 64)
    ways = ("1x4", "2x2", "4x1")
    run_job(rank_jobs.losses, tiny_checkpoint, store, tmp_path, *ways)
    one, *others = ([json.loads(x) for x in (tmp_path / w / "metrics.jsonl").open()] for w in ways)
    steps = [row for row in one if "train/loss" in row]
    # clipping is at 0.1
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert all(row["train/grad_norm"] > 0.1 for row in steps)
    for other in others:
        for mine, theirs in zip(steps, (row for row in other if "train/loss" in row), strict=True):
            for key in ("train/loss", "train/grad_norm"):
                assert theirs[key] == pytest.approx(mine[key], rel=1e-6), (key, mine["step"])


def test_other_numbers_of_ranks_go_on_with_the_same_documents_in_the_same_order(tmp_path, tiny_checkpoint):
    lengths = [12 + 5 * (n % 7) for n in range(24)]
    path = write_store(tmp_path / "store", tiny_checkpoint, lengths=lengths)
    # each leg begins from the checkpoint of the one before
    run = tmp_path / "run"
    run_job(rank_jobs.note_documents, tiny_checkpoint, path, run, "2x2", "4x4", "3x7")
    # of each leg the steps of each rank
    legs = [[json.loads(p.read_text()) for p in sorted(run.glob(f"read.{n}.*.json"))] for n in range(3)]
    assert [(len(leg), len(leg[0])) for leg in legs] == [(2, 2), (4, 2), (3, 3)]
    store = open_store(path)
    uids = store.uid[~store.held_out]
    order = [int(uids[n]) for epoch in (0, 1) for n in epoch_order(uids, 0, epoch)]
    at = 0
    for leg in legs:
        for parts in zip(*leg, strict=True):
            step = [uid for part in parts for uid in part]
            assert sorted(step) == sorted(order[at : at + len(step)])
            assert all(parts)
            at += len(step)
    assert at > len(uids)  # the order of the next pass included


def test_a_kill_at_any_moment_of_saving_ends_in_the_same_weights(tmp_path, tiny_checkpoint):
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[24] * 64)
    settings = [f"target.path={tiny_checkpoint}", f"train.store={store}", "train.dtype=float32"]
    # saving is most of what such a run does
    settings += ["train.tokens_per_rank=48", "train.max_steps=24", "train.checkpoint_every=1"]
    settings += ["train.evaluate_every=100"]

    kills = int(os.environ.get("LAYER61_KILLS", "3"))
    said = run_job(rank_jobs.kill_while_saving, settings, tmp_path, kills)
    assert int(said.split("killed ")[-1]) >= min(kills, 2)
    mine, theirs = (runs.read_commit(runs.locate(tmp_path / d, "last")) for d in ("killed", "whole"))
    assert {f: e for f, e in mine.items() if "/" in f} == {f: e for f, e in theirs.items() if "/" in f}
