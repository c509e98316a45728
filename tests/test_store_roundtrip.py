"""What is written is what is read: over shapes, parts, versions, codecs and the operations on whole parts."""

import json
import resource
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featurestore
from configs.errors import (
    ContractError,
    InputError,
    PartExistsError,
    StoreCorruptError,
    StoreError,
    StoreNotFoundError,
    StoreVersionError,
)
from featurestore import Loader, StoreWriter, local, open_store, part_exists, publish
from featurestore.layout import dump_json, group_metadata
from featurestore.manifest import read_index
from featurestore.objects import open_objects
from tests.documents import CONTRACT, append, assert_same, make, same_bits, write


@st.composite
def stores(draw: st.DrawFn) -> tuple[list[list[int]], int, int, str]:
    """Lengths of the documents of each part, states, width, compression."""
    lengths = st.lists(
        st.one_of(st.just(1), st.integers(1, 200), st.sampled_from([63, 64, 65, 128])), max_size=6
    )
    parts = draw(st.lists(lengths, max_size=3))
    return parts, draw(st.integers(1, 4)), draw(st.sampled_from([1, 8, 33, 64])), draw(codecs)


codecs = st.sampled_from(["none", "zstd"])


@given(stores(), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_documents_and_any_range_come_back(tmp_path_factory, drawn, data) -> None:
    parts, states, width, compression = drawn
    path = tmp_path_factory.mktemp("store") / "s"
    made = []
    for number, lengths in enumerate(parts):
        documents = [make(number * 100 + i, n, states, width) for i, n in enumerate(lengths)]
        write(path, documents, part=f"p{number}", compression=compression)
        made += documents
    if not parts:
        StoreWriter(path, CONTRACT)
    publish(open_objects(path, durable=False))
    store = open_store(path)
    assert len(store) == len(made)
    for i, document in enumerate(made):
        assert_same(store[i], document)
        length = len(document.input_ids)
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start + 1, length))
        assert_same(store.read(i, start, stop), document, start, stop)
    assert store.length.tolist() == [len(d.input_ids) for d in made]
    assert store.n_loss.tolist() == [int(d.loss_mask.sum()) for d in made]
    assert store.source.tolist() == [d.source for d in made]
    assert store.held_out.tolist() == [d.held_out for d in made]
    assert store.verify() == []
    shutil.rmtree(path)


def test_long_document_at_real_width(tmp_path) -> None:
    document = make(1, 1100, 1, 7168)
    write(tmp_path, [make(0, 70, 1, 7168), document])
    publish(tmp_path)
    store = open_store(tmp_path)
    assert_same(store[1], document)
    assert_same(store.read(1, 999, 1001), document, 999, 1001)
    assert store.manifest["parts"][0]["chunk_tokens"] == 64


def test_appending_later_leaves_old_versions_readable(tmp_path) -> None:
    write(tmp_path, [make(1, 10)], part="a")
    first = publish(tmp_path)
    write(tmp_path, [make(2, 20)], part="b", compression="zstd")
    assert len(open_store(tmp_path)) == 1
    second = publish(tmp_path)
    assert (first["version"], second["version"]) == (1, 2)
    store = open_store(tmp_path)
    assert [d.uid for d in store] == [1, 2]
    assert [d.uid for d in store.at(1)] == [1]
    assert [d.uid for d in open_store(tmp_path, version=1)] == [1]


def test_publishing_without_news_makes_no_version(tmp_path) -> None:
    write(tmp_path, [make(1, 10)])
    first = publish(tmp_path)
    files = sorted(p for p in tmp_path.rglob("*"))
    assert publish(tmp_path) == first
    assert sorted(p for p in tmp_path.rglob("*")) == files


def test_drop_hides_parts_and_stays_dropped(tmp_path) -> None:
    for name, uid in (("a", 1), ("b", 2), ("c", 3)):
        write(tmp_path, [make(uid, 10 * uid)], part=name)
    publish(tmp_path)
    featurestore.drop(tmp_path, ["b"])
    assert open_store(tmp_path).uid.tolist() == [1, 3]
    write(tmp_path, [make(4, 5)], part="d")
    publish(tmp_path)
    store = open_store(tmp_path)
    assert store.uid.tolist() == [1, 3, 4]
    for document in store:
        assert_same(document, make(document.uid, len(document.input_ids)))
    assert featurestore.info(tmp_path)["dropped"] == ["b"]
    with pytest.raises(StoreError, match="no parts x"):
        featurestore.drop(tmp_path, ["x"])
    featurestore.collect(tmp_path, dropped=True)
    assert not (tmp_path / "parts/b").exists()
    assert featurestore.verify(tmp_path).problems == []


def test_first_part_wins_and_its_twin_returns_when_it_is_dropped(tmp_path) -> None:
    write(tmp_path, [make(1, 10), make(2, 10)], part="a")
    write(tmp_path, [make(2, 30), make(3, 10)], part="b")
    manifest = publish(tmp_path)
    store = open_store(tmp_path)
    assert store.uid.tolist() == [1, 2, 3]
    assert store.length.tolist() == [10, 10, 10]
    assert manifest["totals"]["duplicates"] == 1
    featurestore.drop(tmp_path, ["a"])
    store = open_store(tmp_path)
    assert dict(zip(store.uid.tolist(), store.length.tolist(), strict=True)) == {2: 30, 3: 10}


def test_rebuilt_index_equals_the_grown_one(tmp_path) -> None:
    for number in range(4):
        write(tmp_path, [make(10 * number + i, 5 + i) for i in range(4)], part=f"p{9 - number}")
        publish(tmp_path)
    grown = open_store(tmp_path)
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(StoreError, match="missing"):
        open_store(tmp_path)
    featurestore.rebuild(tmp_path)
    rebuilt = open_store(tmp_path)
    for name, values in read_index(rebuilt.objects, rebuilt.manifest).items():
        assert np.array_equal(values, grown._index[name]), name
    assert rebuilt.source.tolist() == grown.source.tolist()


def test_merge_links_the_parts_of_other_stores(tmp_path) -> None:
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write(a, [make(1, 10)], part="a")
    write(b, [make(2, 20), make(1, 99)], part="b", compression="zstd")
    write(c, [], part="empty")
    for path in (a, b, c):
        publish(path)
    featurestore.merge(a, [b, c])
    store = open_store(a)
    assert store.uid.tolist() == [1, 2]
    assert_same(store[0], make(1, 10))
    assert_same(store[1], make(2, 20))
    inode = (a / "parts/b/hidden/c/0/0/0").stat().st_ino
    assert inode == (b / "parts/b/hidden/c/0/0/0").stat().st_ino
    assert featurestore.merge(a, [b])["version"] == store.version
    shutil.rmtree(b)
    assert featurestore.verify(a).problems == []
    other = tmp_path / "other"
    with StoreWriter(other, {**CONTRACT, "dtype": "float8"}) as writer:
        append(writer, make(5, 5))
    publish(other)
    with pytest.raises(ContractError, match="dtype: 'float8', not 'bfloat16'"):
        featurestore.merge(a, [other])


def test_merge_refuses_two_parts_of_one_name(tmp_path) -> None:
    for name, uid in (("a", 1), ("b", 2)):
        write(tmp_path / name, [make(uid, 10)], part="block")
        publish(tmp_path / name)
    with pytest.raises(StoreError, match=r"part block of .* have one name and differ"):
        featurestore.merge(tmp_path / "a", [tmp_path / "b"])
    assert open_store(tmp_path / "a").uid.tolist() == [1]
    assert featurestore.verify(tmp_path / "a").problems == []


def test_a_dropped_and_collected_part_can_be_written_again(tmp_path) -> None:
    write(tmp_path, [make(1, 10)], part="a")
    write(tmp_path, [make(2, 10)], part="b")
    publish(tmp_path)
    featurestore.drop(tmp_path, "b")
    assert featurestore.collect(tmp_path, dropped=True) == ["parts/b"]
    write(tmp_path, [make(3, 10)], part="b")
    publish(tmp_path)
    assert sorted(open_store(tmp_path).uid.tolist()) == [1, 3]
    assert featurestore.collect(tmp_path, dropped=True) == []
    assert_same(open_store(tmp_path)[1], make(3, 10))


def test_a_part_that_lost_its_metadata_can_be_written_again(tmp_path) -> None:
    write(tmp_path, [make(1, 10)], part="a")
    (tmp_path / "parts" / "a" / "zarr.json").unlink()
    assert not part_exists(tmp_path, "a")
    write(tmp_path, [make(1, 10)], part="a")
    publish(tmp_path)
    assert_same(open_store(tmp_path)[0], make(1, 10))
    assert len(featurestore.collect(tmp_path, older_than_s=-1)) == 1


def test_a_part_is_not_committed_without_what_was_written(tmp_path) -> None:
    writer = StoreWriter(tmp_path, CONTRACT, part="a", durable=False)
    append(writer, make(1, 200))
    assert len(featurestore.collect(tmp_path, older_than_s=-1)) == 1
    with pytest.raises(StoreError, match=r"was removed or cut while it was being written; part a is lost"):
        writer.commit()
    assert not part_exists(tmp_path, "a")
    assert publish(tmp_path)["totals"]["documents"] == 0


def test_two_writers_of_one_name_say_whose_documents_are_lost(tmp_path) -> None:
    first, second = (StoreWriter(tmp_path, CONTRACT, "w", run="r", durable=False) for _ in range(2))
    append(first, make(1, 10))
    append(second, make(2, 10))
    first.commit()
    with pytest.raises(
        PartExistsError, match=r"committed part .* first: 1 documents are lost\nhint: give every"
    ):
        second.commit()


@pytest.mark.parametrize("uid", [1.9, "7", None, -1, 1 << 64])
def test_a_uid_is_a_whole_number(tmp_path, uid) -> None:
    with StoreWriter(tmp_path, CONTRACT, durable=False) as writer:
        with pytest.raises(InputError, match="uid"):
            writer.append(uid, [1], [1], np.zeros((1, 1, 32), np.uint16))
        with pytest.raises(InputError, match="source"):
            writer.append(1, [1], [1], np.zeros((1, 1, 32), np.uint16), source="x\ud83d")
        append(writer, make(1, 10))
    publish(tmp_path)
    assert_same(open_store(tmp_path)[0], make(1, 10))


def test_parts_roll_over_and_are_named_in_order(tmp_path) -> None:
    with StoreWriter(tmp_path, CONTRACT, writer="w7", run="run1", part_bytes=10_000, durable=False) as writer:
        for uid in range(10):
            append(writer, make(uid, 70))
    manifest = publish(tmp_path)
    assert [e["name"] for e in manifest["parts"]] == [
        f"run1-w7-{i:06d}" for i in range(len(manifest["parts"]))
    ]
    assert len(manifest["parts"]) > 2
    with StoreWriter(tmp_path, CONTRACT, writer="w7", run="run1") as writer:  # starts again after the last
        append(writer, make(99, 3))
    assert publish(tmp_path)["totals"]["documents"] == 11


def test_a_named_part_is_written_once(tmp_path) -> None:
    assert not part_exists(tmp_path, "block-1")
    first, second = (StoreWriter(tmp_path, CONTRACT, part="block-1", durable=False) for _ in range(2))
    append(first, make(1, 10))
    append(second, make(2, 10))
    assert first.commit() == "block-1"
    assert part_exists(tmp_path, "block-1")
    with pytest.raises(PartExistsError, match="block-1"):
        second.commit()
    with pytest.raises(PartExistsError, match="committed already"):
        StoreWriter(tmp_path, CONTRACT, part="block-1")
    publish(tmp_path)
    assert open_store(tmp_path).uid.tolist() == [1]
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["block-1"]


def test_leftovers_are_ignored_replaced_and_collected(tmp_path) -> None:
    abandoned = StoreWriter(tmp_path, CONTRACT, part="block-1", durable=False)
    append(abandoned, make(1, 200))
    del abandoned  # as if killed
    write(tmp_path, [make(1, 200)], part="block-1")
    publish(tmp_path)
    assert len(list((tmp_path / "parts").iterdir())) == 2
    assert featurestore.collect(tmp_path) == []  # younger than a day
    assert len(featurestore.collect(tmp_path, older_than_s=0)) == 1
    assert_same(open_store(tmp_path)[0], make(1, 200))


def test_a_block_that_raises_discards_its_part(tmp_path) -> None:
    def fail() -> None:
        with StoreWriter(tmp_path, CONTRACT) as writer:
            append(writer, make(1, 10))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "parts").iterdir()) == []


@pytest.mark.parametrize("direct", [local.DIRECT, 0], ids=["past the page cache", "where that is refused"])
def test_files_of_any_length_hold_what_was_written(tmp_path, monkeypatch, direct) -> None:
    monkeypatch.setattr(local, "DIRECT", direct)
    full = local.BUFFER_BYTES
    data = np.random.default_rng(0).integers(0, 256, 3 * full, np.uint8).tobytes()
    objects = open_objects(tmp_path)
    for length in (0, 1, full - 1, full, full + 1, 2 * full, 2 * full + 4096, 2 * full + 5000):
        stream = objects.stream(f"{length}")
        for start in range(0, length, 300_007):
            stream.write([data[start : min(start + 300_007, length)]])
        stream.close()
        assert (tmp_path / f"{length}").read_bytes() == data[:length]


def test_a_file_that_outgrows_the_disk_fails_by_name(tmp_path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer, wide = StoreWriter(tmp_path, CONTRACT, part="a"), make(1, 4000)

    def fill() -> None:
        for uid in range(40):
            append(writer, replace(wide, uid=uid))
        writer.commit()

    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(StoreError, match="File too large; part a is lost"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.discard()
    assert not part_exists(tmp_path, "a")


def test_writing_holds_one_chunk_in_memory(tmp_path) -> None:
    document = make(0, 2000, 1, 1024)
    with StoreWriter(tmp_path, CONTRACT, durable=False) as writer:
        append(writer, document)
        tracemalloc.start()
        for uid in range(1, 6):
            writer.append(uid, document.input_ids, document.loss_mask, document.hidden)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 500_000 < document.hidden.nbytes


def test_numpy_bits_are_taken_as_bfloat16(tmp_path) -> None:
    document = make(3, 9, 2, 16)
    with StoreWriter(tmp_path, CONTRACT) as writer:
        bits = document.hidden.view(torch.uint16).numpy()
        mask = document.loss_mask.numpy().astype(np.int64)
        writer.append(3, document.input_ids.numpy(), mask, bits, source=document.source)
    publish(tmp_path)
    assert_same(open_store(tmp_path)[0], document)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.zeros(9, dtype=torch.int64)}, "input_ids has 9 tokens"),
        ({"loss_mask": torch.zeros(11, dtype=torch.bool)}, "loss_mask 11"),
        ({"loss_mask": torch.full((10,), 2)}, "other than 0 and 1"),
        ({"hidden": torch.zeros(10, 1, 32)}, "float32, not torch.bfloat16"),
        ({"hidden": torch.zeros(10, 32, dtype=torch.bfloat16)}, r"\[T, S, D\]"),
        ({"hidden": torch.zeros(10, 1, 31, dtype=torch.bfloat16)}, "width 31, not 1 of width 32"),
        ({"hidden": torch.zeros(10, 2, 32, dtype=torch.bfloat16)}, "2 states of width 32, not 1"),
        ({"input_ids": torch.full((10,), -1)}, "outside 0 to 4294967295"),
        ({"input_ids": torch.zeros(10)}, "not an integer type"),
        ({"uid": 1}, "in this part already"),
        ({"uid": -1}, "outside 0 to"),
        ({"uid": 1 << 64}, "outside 0 to"),
    ],
)
def test_wrong_documents_are_refused_and_leave_the_part_whole(tmp_path, changes, message) -> None:
    good = make(2, 10)
    arguments = {
        "uid": 2,
        "input_ids": good.input_ids,
        "loss_mask": good.loss_mask,
        "hidden": good.hidden,
        "source": good.source,
    }
    with StoreWriter(tmp_path, CONTRACT, durable=False) as writer:
        append(writer, make(1, 70))
        with pytest.raises(InputError, match=message):
            writer.append(**{**arguments, **changes})
        writer.append(**arguments)
    publish(tmp_path)
    store = open_store(tmp_path)
    assert_same(store[0], make(1, 70))
    assert_same(store[1], good)
    assert store.verify() == []


def test_width_of_the_first_document_follows_the_contract(tmp_path) -> None:
    contract = {**CONTRACT, "states": [{"site": "post_norm", "layer": 61}], "target": {"hidden_size": 64}}
    writer = StoreWriter(tmp_path, contract)
    with pytest.raises(InputError, match="1 states of width 32, not 1 of width 64"):
        append(writer, make(1, 10))
    assert not (tmp_path / "parts").exists()


def test_another_contract_is_refused_before_anything_is_written(tmp_path) -> None:
    write(tmp_path, [make(1, 10)])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ContractError, match="dtype: 'float8', not 'bfloat16'"):
        StoreWriter(tmp_path, {**CONTRACT, "dtype": "float8"})
    StoreWriter(tmp_path, {**CONTRACT, "target": {**CONTRACT["target"], "path": "/elsewhere"}})
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_store_is_named(tmp_path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"has no zarr\.json"):
        open_store(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="neither empty nor a feature store"):
        StoreWriter(tmp_path, CONTRACT)
    with pytest.raises(StoreError, match="Not a directory"):
        StoreWriter(tmp_path / "file", CONTRACT)
    other = tmp_path / "zarr"
    other.mkdir()
    (other / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    for use in (open_store, publish, lambda p: StoreWriter(p, CONTRACT), featurestore.verify):
        with pytest.raises(StoreNotFoundError, match="is not a feature store"):
            use(other)
    StoreWriter(tmp_path / "new", CONTRACT)
    with pytest.raises(StoreNotFoundError, match="no published manifest"):
        open_store(tmp_path / "new")


def test_a_newer_format_is_refused(tmp_path) -> None:
    write(tmp_path, [make(1, 10)])
    publish(tmp_path)
    (tmp_path / "zarr.json").write_bytes(dump_json(group_metadata({"schema": 2, "contract": {}})))
    for use in (open_store, publish, lambda p: StoreWriter(p, CONTRACT), featurestore.verify):
        with pytest.raises(StoreVersionError, match="format 2"):
            use(tmp_path)


def test_a_path_without_permission_is_named(tmp_path, monkeypatch) -> None:
    import os

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path, [make(1, 10)])
    publish(tmp_path)
    monkeypatch.setattr(os, "makedirs", refuse)  # the tests may run as root, whom nothing is forbidden
    with pytest.raises(StoreError, match=r"Permission denied\nhint: check the permissions"):
        StoreWriter(tmp_path / "new", CONTRACT)


def test_a_full_disk_loses_only_the_open_part(tmp_path, monkeypatch) -> None:
    import os

    write(tmp_path, [make(1, 10)], part="a")
    writer = StoreWriter(tmp_path, CONTRACT, part="b", durable=False)
    append(writer, make(2, 10))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(
            StoreError, match=r"part b is lost, with 1 documents\nhint: [\d,]+ bytes are free"
        ):
            append(writer, make(3, 10))
    with pytest.raises(StoreError, match="an earlier failure lost the open part"):
        append(writer, make(4, 10))
    with pytest.raises(StoreError, match="an earlier failure lost the open part"):
        writer.commit()
    publish(tmp_path)
    assert open_store(tmp_path).uid.tolist() == [1]
    write(tmp_path, [make(2, 10)], part="b")
    assert publish(tmp_path)["totals"]["documents"] == 2


def test_reading_outside_is_an_index_error(tmp_path) -> None:
    write(tmp_path, [make(1, 10)])
    publish(tmp_path)
    store = open_store(tmp_path)
    assert_same(store[-1], make(1, 10))
    for call in (lambda: store[1], lambda: store.read(0, 5, 11), lambda: store.read(0, 3, 3)):
        with pytest.raises(IndexError):
            call()


def test_info_and_show_describe_the_store(tmp_path) -> None:
    made = [make(uid, 1 << uid, 2, 64) for uid in range(8)]
    write(tmp_path, made[:4], part="a")
    write(tmp_path, made[4:], part="b", compression="zstd")
    publish(tmp_path)
    write(tmp_path, [make(50, 3, 2, 64)], part="c")
    found = featurestore.info(tmp_path)
    assert found["totals"]["tokens"] == sum(len(d.input_ids) for d in made)
    assert found["totals"]["loss_tokens"] == sum(int(d.loss_mask.sum()) for d in made)
    assert [row["documents"] for row in found["lengths"]] == [1] * 8
    assert sum(s["tokens"] for s in found["sources"].values()) == found["totals"]["tokens"]
    assert found["held_out"]["documents"] == sum(d.held_out for d in made)
    assert found["unpublished"] == ["c"]
    assert found["compression"] == {"none": 1, "zstd": 1}
    assert 7.9 < found["entropy"]["exponent_bits"] <= 8  # random bits
    assert found["contract"] == CONTRACT

    shown = featurestore.show(tmp_path, 3, lambda ids: chr(97 + ids[0] % 26))
    assert shown["uid"] == 3
    assert [row["id"] for row in shown["rows"]] == made[3].input_ids.tolist()
    assert [row["loss"] for row in shown["rows"]] == made[3].loss_mask.tolist()
    assert len(shown["norms"]) == 2
    from rich.console import Console

    console = Console(record=True, width=200)
    console.print(featurestore.render_info(found), featurestore.render_show(shown))
    text = console.export_text()
    assert "source-1" in text
    assert "".join(row["text"] for row in shown["rows"]) in text
    with pytest.raises(StoreError, match="no document 999"):
        featurestore.show(tmp_path, 999)


def test_show_joins_characters_that_are_cut_over_tokens(tmp_path) -> None:
    text = "größe 日本語 🙂 \ufffd ok"
    data = text.encode()

    def decode(token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    with StoreWriter(tmp_path, CONTRACT, durable=False) as writer:
        writer.append(1, list(data), [1] * len(data), np.zeros((len(data), 1, 32), np.uint16))
    publish(tmp_path)
    assert "".join(row["text"] for row in featurestore.show(tmp_path, 1, decode)["rows"]) == text


def test_what_a_store_holds_is_no_markup(tmp_path, capsys) -> None:
    from pipeline.__main__ import main

    with StoreWriter(tmp_path / "s[b]", CONTRACT, durable=False) as writer:
        for uid, source in enumerate(("[red]data", "a:star:b", "[/foo]x")):
            writer.append(uid, [1], [1], np.zeros((1, 1, 32), np.uint16), source=source)
    publish(tmp_path / "s[b]")
    for words in ([], ["--json"]):
        assert main(["store", "info", str(tmp_path / "s[b]"), *words]) == 0
        # a long path is folded in its cell
        out = "".join(capsys.readouterr().out.split())
        assert all(source in out for source in ("[red]data", "a:star:b", "[/foo]x", "s[b]")), out


def test_exponent_entropy_of_one_exponent(tmp_path: Path) -> None:
    hidden = torch.rand(50, 1, 64).clamp(0, 0.999).add(1).bfloat16().clamp(1, 1.9921875)
    with StoreWriter(tmp_path, CONTRACT) as writer:
        writer.append(1, torch.zeros(50, dtype=torch.int64), torch.ones(50, dtype=torch.bool), hidden)
    publish(tmp_path)
    entropy = featurestore.info(tmp_path)["entropy"]
    assert entropy["exponent_bits"] == 0
    assert 6.5 < entropy["sign_mantissa_bits"] <= 7


class OneObject(StoreWriter):
    """Writes as stores were written before each state had an object of its own."""

    def _split(self, states: int) -> int:
        return 1


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("writer", [StoreWriter, OneObject])
def test_chosen_states_are_read_alone_and_in_the_order_asked_for(tmp_path, writer, compression) -> None:
    made = [make(uid, length, 4) for uid, length in ((1, 70), (2, 300), (3, 5))]
    with writer(tmp_path, CONTRACT, durable=False, compression=compression) as open_part:
        for document in made:
            append(open_part, document)
    publish(tmp_path)
    store = open_store(tmp_path)
    assert store.verify() == []
    for i, document in enumerate(made):
        assert_same(store[i], document)
        assert_same(store.read(i, 1, 4), document, 1, 4)
        for states in ([3], [2, 0], [0, 1, 2, 3], []):
            found = store.read(i, states=states)
            assert same_bits(found.hidden, document.hidden[:, states])
            assert torch.equal(found.input_ids, document.input_ids)
    with Loader(store, 512, states=[3, 1], split="all", epochs=1) as loader:
        for batch in loader:
            ends = batch.cu_seqlens.tolist()
            for uid, a, b in zip(batch.uids, ends[:-1], ends[1:], strict=True):
                assert same_bits(batch.hidden[a:b], made[uid - 1].hidden[:, [3, 1]])


def test_a_state_is_read_without_the_bytes_of_the_others(tmp_path) -> None:
    document = make(1, 300, 4)
    write(tmp_path, [document])
    publish(tmp_path)
    for state in range(3):
        (path,) = tmp_path.glob(f"parts/*/hidden/c/0/{state}/0")
        path.write_bytes(bytes(path.stat().st_size))
    store = open_store(tmp_path)
    assert same_bits(store.read(0, states=[3]).hidden, document.hidden[:, [3]])
    with pytest.raises(StoreCorruptError, match="hidden/c/0/0/0: chunk 0 fails its checksum"):
        store[0]
