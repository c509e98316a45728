"""Documents, not lines or blocks, are what is done: what a changed input captures, and what it publishes."""

import json
import random
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from configs import run_dir
from configs.errors import BadStatesError, CaptureError, StoreCorruptError, StoreError
from configs.load import load_config
from featurestore import StoreWriter, held_documents, open_store, publish, rebuild, verify
from featurestore.layout import dump_json, seal
from pipeline.capture import session
from pipeline.dump import plan, run
from pipeline.prompts import load_prompts
from tests.documents import CONTRACT, append, make, write
from tests.generated import GeneratedCapture
from tests.test_dump import changed, questions
from tests.test_dump import write as write_lines

COUNT, MANY = 96, 240


@pytest.fixture
def engine(monkeypatch):
    class Engine(GeneratedCapture):
        taken: ClassVar[list[int]] = []
        bad: ClassVar[set[int]] = set()

    monkeypatch.setattr(session, "Capture", Engine)
    monkeypatch.setattr(session, "FIRST_WAIT_S", 0.01)
    return Engine


@pytest.fixture
def config(tmp_path, tiny_checkpoint):
    file = write_lines(tmp_path / "c.jsonl", questions(COUNT))
    values = [f"run.dir={tmp_path / 'run'}", f"target.path={tiny_checkpoint}", f"prompts.path={file}"]
    values += ["prompts.max_length=128", "prompts.max_answer_tokens=32", "prompts.max_loop_share=1"]
    return load_config([], [*values, "dump.block_documents=16", "dump.view=v3", "dump.probe=false"])


def uids_of(config) -> list[int]:
    return load_prompts(config.prompts, config.target.path).documents.uids.tolist()


def set_lines(config, lines) -> None:
    write_lines(config.prompts.path, lines)


def test_an_inserted_line_captures_one_document_and_nothing_else_does_any(config, engine):
    lines = questions(MANY)
    set_lines(config, lines)
    first = run(config)
    assert (first["captured_documents"], first["kept_documents"]) == (MANY, 0)
    assert sorted(engine.taken) == sorted(uids_of(config))
    parts = {p["name"] for p in open_store(config.store_path).manifest["parts"]}
    for new in (
        [{"messages": [{"role": "user", "content": "And what is new?"}]}, *lines],  # on top
        lines[10:],  # ten removed
        random.Random(0).sample(lines, MANY),  # shuffled
    ):
        engine.taken.clear()
        set_lines(config, new)
        found = run(config)
        assert found["captured_documents"] == len(engine.taken) == (len(new) > MANY)
        assert found["kept_documents"] == min(len(new), MANY)
        assert json.loads((config.run.dir / "dump.json").read_text()) == found
        store = open_store(config.store_path)
        assert sorted(store.uid.tolist()) == sorted(uids_of(config))
        assert store.verify() == []
        assert parts <= {p["name"] for p in store.manifest["parts"]}
    for other in (
        changed(config, prompts__held_out=0.5),
        changed(config, dump__block_documents=7),
        changed(config, dump__worker="2/3"),
    ):
        engine.taken.clear()
        assert run(other)["captured_documents"] == len(engine.taken) == 0


def test_what_a_killed_run_was_writing_is_removed_though_its_parts_are_cut_anew(config, engine):
    run(config)
    lines = questions(COUNT + 20)
    set_lines(config, lines)
    engine.dies_at, engine.deaths = 1, 2
    with pytest.raises(CaptureError, match="the engine ended"):
        run(config)
    store = open_store(config.store_path)
    committed = {p["name"] for p in store.manifest["parts"]}
    (name,) = set(run_dir.begun_parts(config.run.dir, "1/1").read_text().split())
    assert name not in committed

    def leave(part: str) -> None:
        writer = StoreWriter(config.store_path, store.contract, part=part)
        states = np.zeros((3, *store[0].hidden.shape[1:]), np.uint16)
        writer.append(1, np.zeros(3, np.uint32), np.ones(3, np.uint8), states)

    leave(name)
    leave("ffffffffffffffff")  # of a machine that is still at it
    folder = Path(config.store_path) / "parts"
    assert len([p for p in folder.iterdir() if p.name.startswith(name)]) == 1
    set_lines(config, [{"messages": [{"role": "user", "content": "And what is new?"}]}, *lines])
    assert run(config)["captured_documents"] == 21
    there = {p.name.partition(".")[0] for p in folder.iterdir()}
    assert name not in there
    assert "ffffffffffffffff" in there
    store = open_store(config.store_path)
    assert committed <= there
    assert sorted(store.uid.tolist()) == sorted(uids_of(config))
    assert store.verify() == []
    assert not run_dir.begun_parts(config.run.dir, "1/1").exists()
    # and where nothing is left to do, as the input has become shorter
    leave(name)
    run_dir.begun_parts(config.run.dir, "1/1").write_text(f"{name}\n{min(committed)}\n")
    set_lines(config, lines[:10])
    assert run(config)["captured_documents"] == 0
    assert {p.name for p in folder.iterdir() if p.name.startswith(name)} == set()
    assert committed <= {p.name for p in folder.iterdir()}


def test_workers_do_their_own_documents_and_the_manifest_says_what_is_missing(config, engine):
    uids = uids_of(config)
    for k in (1, 2, 3):
        share = changed(config, dump__worker=f"{k}/3")
        todo = plan(share).mine
        found = run(share)
        assert found["captured_documents"] == todo > 0
        store = open_store(config.store_path)
        assert store.manifest["input"] == {"documents": COUNT, "there": len(store), "rejected": 0}
        missing = COUNT - len(store)
        assert found["missing_documents"] == missing
        said = f"{missing:,} of the {COUNT} documents of its input are not in" if missing else ""
        assert store.missing.startswith(said)
    assert sorted(open_store(config.store_path).uid.tolist()) == sorted(uids)
    assert open_store(config.store_path).missing == ""
    assert sorted(engine.taken) == sorted(uids)


def test_what_a_user_removed_is_gone_unless_all_is_published(config, engine):
    run(config)
    every = set(uids_of(config))
    set_lines(config, questions(COUNT)[5:])
    run(config)
    kept = set(uids_of(config))
    store = open_store(config.store_path)
    assert set(store.uid.tolist()) == kept
    assert store.manifest["totals"]["duplicates"] == 0
    # nor does it come back when the index is made anew, or parts are added by others
    for again in (rebuild, publish):
        again(config.store_path)
        assert set(open_store(config.store_path).uid.tolist()) == kept
    assert set(held_documents(config.store_path)[0].tolist()) == every
    # put back, it is there without being captured
    engine.taken.clear()
    set_lines(config, questions(COUNT))
    run(config)
    assert set(open_store(config.store_path).uid.tolist()) == every
    assert engine.taken == []
    set_lines(config, questions(COUNT)[5:])
    version = run(changed(config, dump__publish="all"))["manifest"]
    assert set(open_store(config.store_path).uid.tolist()) == every
    assert run(changed(config, dump__publish="all"))["manifest"] == version


def test_a_bad_document_is_rejected_with_its_reason_and_not_taken_again(config, engine):
    uids = uids_of(config)
    engine.bad = {uids[7]}
    found = run(config)
    assert (found["captured_documents"], found["rejected_documents"]) == (COUNT - 1, 1)
    assert open_store(config.store_path).missing == ""
    for _ in range(2):
        (reject,) = map(json.loads, (config.run.dir / "rejects.jsonl").read_text().splitlines())
        assert (reject["line"], reject["reason"]) == (8, "the state of token 1 is not finite")
        engine.taken.clear()
        assert run(config)["captured_documents"] == len(engine.taken) == 0


def test_an_engine_that_gives_nothing_good_stops_the_dump(config, engine):
    engine.bad = set(uids_of(config))
    with pytest.raises(BadStatesError, match="none of 96 documents came back whole"):
        run(config)


def test_an_engine_that_dies_is_replaced_and_one_that_keeps_dying_is_not(config, engine):
    engine.deaths = 1
    found = run(changed(config, dump__open_parts=3))
    assert found["captured_documents"] == COUNT
    assert sorted(open_store(config.store_path).uid.tolist()) == sorted(uids_of(config))
    engine.deaths, engine.dies_at = 99, 1
    other = changed(config, prompts__temperature=0.5, dump__open_parts=3)
    with pytest.raises(CaptureError, match=r"exit code -9"):
        run(other)


def test_a_store_that_is_away_for_a_while_costs_no_document(config, engine, monkeypatch):
    from featurestore import StoreWriter

    failures = iter([True, False, True, True])
    commit = StoreWriter.commit

    def unreliable(writer):
        if next(failures, False):
            raise StoreError("the bucket does not answer")
        return commit(writer)

    monkeypatch.setattr(StoreWriter, "commit", unreliable)
    monkeypatch.setattr(session, "FIRST_WAIT_S", 0.1)
    assert run(config)["captured_documents"] == COUNT
    store = open_store(config.store_path)
    assert sorted(store.uid.tolist()) == sorted(uids_of(config))
    assert store.verify() == []
    monkeypatch.setattr(session, "STORE_PATIENCE_S", 0.0)
    failures = iter([True] * 99)
    with pytest.raises(StoreError, match="the bucket does not answer"):
        run(changed(config, prompts__temperature=0.5))


def test_only_hides_documents_of_twins_as_well(tmp_path):
    """Two parts hold one document: when it is removed, neither brings it back."""
    write(tmp_path, [make(1, 10), make(2, 20)], part="a")
    write(tmp_path, [make(2, 20), make(3, 30)], part="b")
    assert publish(tmp_path)["totals"]["duplicates"] == 1
    kept = publish(tmp_path, np.array([1, 3, 9], np.uint64), only=True)
    assert kept["input"] == {"documents": 3, "there": 2, "rejected": 0}
    for again in (rebuild, publish):
        again(tmp_path)
        assert open_store(tmp_path).uid.tolist() == [1, 3]
        assert open_store(tmp_path).verify() == []
    assert publish(tmp_path, np.array([2], np.uint64))["totals"]["documents"] == 3


def test_documents_found_bad_are_noted_in_their_part(tmp_path):
    from featurestore import StoreWriter

    with StoreWriter(tmp_path, CONTRACT, part="a", durable=False) as writer:
        append(writer, make(1, 10))
        writer.reject(5, "not finite")
    publish(tmp_path)
    uids, rejected = held_documents(tmp_path)
    assert (uids.tolist(), rejected) == ([1], {5: "not finite"})
    assert publish(tmp_path, np.array([1, 5], np.uint64))["input"]["rejected"] == 1


@pytest.mark.parametrize("key", ["part", "index", "object"])
def test_a_manifest_that_points_outside_the_store_is_refused_before_anything_is_opened(tmp_path, key):
    store, other = tmp_path / "store", tmp_path / "other"
    for path in (store, other):
        write(path, [make(1, 10)], part="a")
        publish(path)
    file = store / "manifest" / "v000001.json"
    manifest = json.loads(file.read_text())
    if key == "part":
        manifest["parts"][0]["path"] = "../other/parts/a"
    elif key == "index":
        manifest["index"]["path"] = "../other/index/v000001"
    else:
        entry = manifest["index"]["objects"].pop("uid/c/0")
        manifest["index"]["objects"]["../../../other/index/v000001/uid/c/0"] = entry
    file.write_bytes(dump_json(seal(manifest)))
    with pytest.raises(StoreCorruptError, match="no place in a store"):
        open_store(store)
    before = sorted(str(p) for p in other.rglob("*"))
    report = verify(store, repair=True)
    assert any("no place in a store" in p.text for p in report.problems)
    assert sorted(str(p) for p in other.rglob("*")) == before
    assert open_store(store).uid.tolist() == [1]
