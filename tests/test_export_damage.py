"""Exports that are damaged, in the way or too large: named, never removed, never taken as whole."""

import contextlib
import json
import os
import re
import resource
import stat
from pathlib import Path

import pytest

from configs.errors import ConfigError, InputError, Layer61Error
from configs.load import load_config
from configs.run_dir import find_weights, read_export
from export import draft, nextn
from export.checkpoint import Checkpoint
from pipeline.speculation import require_draft
from pipeline.view import make_view
from tests.test_export import trained_copy


@pytest.fixture
def trained(tmp_path, tiny_checkpoint):
    return trained_copy(tiny_checkpoint, tmp_path / "step_000007")


@contextlib.contextmanager
def largest_file(size):
    """No file grows beyond `size` bytes: to a writer the same as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(path: Path, place: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "config.json", "tokenizer.json"])
def test_one_changed_byte_of_an_export_is_noticed_by_all_who_read_it(
    trained, tiny_checkpoint, tmp_path, name
):
    out = tmp_path / "nextn"
    first = nextn.export(trained, tiny_checkpoint, out)
    assert name in first["files"]
    flip(out / name)
    with pytest.raises(InputError, match=f"damaged: .*{name}") as caught:
        nextn.export(trained, tiny_checkpoint, out)
    assert "export.replace=true" in caught.value.hint
    with pytest.raises(InputError, match=name):
        find_weights(tmp_path, str(out), tiny_checkpoint)
    with pytest.raises(InputError, match=name):
        require_draft(Checkpoint(tiny_checkpoint), out)
    again = nextn.export(trained, tiny_checkpoint, out, replace=True)
    assert again == first
    assert read_export(out)["identity"] == first["identity"]
    assert not list(tmp_path.glob(".nextn*"))


def test_a_changed_manifest_is_noticed_and_nobody_is_told_to_remove_it(trained, tiny_checkpoint, tmp_path):
    out = tmp_path / "nextn"
    nextn.export(trained, tiny_checkpoint, out)
    text = (out / "layer61.json").read_text()
    for damage in (text.replace('"step": 7', '"step": 8'), "{}", text[:100]):
        (out / "layer61.json").write_text(damage)
        with pytest.raises(InputError, match=r"layer61.json is damaged") as caught:
            nextn.export(trained, tiny_checkpoint, out, replace=True)
        assert "remove" not in caught.value.hint
        with pytest.raises(InputError, match=r"layer61.json is damaged"):
            require_draft(Checkpoint(tiny_checkpoint), out)


def test_another_checkpoint_takes_the_place_only_when_told_to(trained, tiny_checkpoint, tmp_path):
    out = tmp_path / "nextn"
    nextn.export(tiny_checkpoint, tiny_checkpoint, out)
    there = re.escape(f"its weights are those of {tiny_checkpoint}, asked for are those of {trained}")
    with pytest.raises(InputError, match=there) as caught:
        nextn.export(trained, tiny_checkpoint, out)
    assert "export.replace=true" in caught.value.hint
    assert read_export(out)["step"] is None
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds what no export wrote: notes.txt"):
        nextn.export(trained, tiny_checkpoint, out, replace=True)
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    nextn.export(trained, tiny_checkpoint, out, replace=True)
    assert read_export(out)["step"] == 7
    # the same checkpoint trained again: which file, and both digests
    other = trained_copy(tiny_checkpoint, tmp_path / "step_000009")
    flip(next(other.rglob("*.safetensors")))
    digests = r"step_000007.*\(step 7\), asked for are those of .*step_000009.*: \S*safetensors [0-9a-f]{12},"
    with pytest.raises(InputError, match=digests + r" asked for [0-9a-f]{12}\n"):
        nextn.export(other, tiny_checkpoint, out)


@pytest.mark.parametrize("replace", [False, True])
def test_no_directory_of_the_users_is_written_over_or_named_for_removal(
    trained, tiny_checkpoint, tmp_path, replace
):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an export of this program") as caught:
        nextn.export(trained, tiny_checkpoint, mine, replace=replace)
    assert "remove" not in caught.value.hint
    assert [p.name for p in mine.iterdir()] == ["notes.txt"]
    before = sorted(p.name for p in tiny_checkpoint.iterdir())
    with pytest.raises(ConfigError, match="is the target itself") as caught:
        nextn.export(trained, tiny_checkpoint, tiny_checkpoint, replace=replace)
    assert "remove" not in caught.value.hint
    assert sorted(p.name for p in tiny_checkpoint.iterdir()) == before


def test_the_plan_refuses_what_the_run_would(trained, tiny_checkpoint, tmp_path):
    def config(**export):
        words = [f"export.{key}={value}" for key, value in export.items()]
        return load_config([], [f"target.path={tiny_checkpoint}", f"run.dir={tmp_path / 'run'}", *words])

    draft.run(config(checkpoint="released"))
    assert "released layer" in draft.plan(config(checkpoint="released"))
    with pytest.raises(InputError, match="layout was 'nextn', asked for is 'sglang-legacy'"):
        draft.plan(config(checkpoint="released", layout="sglang-legacy"))
    draft.plan(config(checkpoint="released", layout="sglang-legacy", replace="true"))
    with pytest.raises(ConfigError, match="the target itself"):
        draft.plan(config(checkpoint="released", dir=tiny_checkpoint))


def test_a_full_disk_leaves_the_export_before_and_nothing_half_made(trained, tiny_checkpoint, tmp_path):
    out = tmp_path / "nextn"
    nextn.export(tiny_checkpoint, tiny_checkpoint, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for place, replace in ((out, True), (tmp_path / "other", False)):
        with largest_file(60_000), pytest.raises(Layer61Error, match="no space for the export") as caught:
            nextn.export(trained, tiny_checkpoint, place, replace=replace)
        assert "bytes are free there; make room" in caught.value.hint
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nextn", "step_000007"]


def test_a_full_disk_leaves_the_view_before(tiny_checkpoint, tmp_path):
    view = make_view(tiny_checkpoint, tmp_path / "view")
    before = sorted(p.name for p in view.iterdir())
    with largest_file(1000), pytest.raises(Layer61Error, match="no space for a view"):
        make_view(tiny_checkpoint, view)
    assert sorted(p.name for p in view.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["view"]


def test_every_file_of_an_export_and_a_view_has_the_mode_of_the_umask(trained, tiny_checkpoint, tmp_path):
    before = os.umask(0o027)
    try:
        out = Path(nextn.export(trained, tiny_checkpoint, tmp_path / "nextn")["directory"])
        view = make_view(out, tmp_path / "view")
    finally:
        os.umask(before)
    files = [p for p in (*out.iterdir(), *view.iterdir()) if not p.is_symlink()]
    assert len(files) > 5
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o640}


def test_an_export_of_before_there_were_checksums_is_still_read(trained, tiny_checkpoint, tmp_path):
    out = tmp_path / "nextn"
    nextn.export(trained, tiny_checkpoint, out)
    manifest = json.loads((out / "layer61.json").read_text())
    del manifest["sha256"]
    manifest["files"] = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    (out / "layer61.json").write_text(json.dumps(manifest))
    require_draft(Checkpoint(tiny_checkpoint), out)
