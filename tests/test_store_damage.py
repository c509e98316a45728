"""Damage of any kind to any object is found: never zeros, never another document in its place."""

import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import featurestore
from configs.errors import StoreCorruptError, StoreError
from featurestore import open_store, publish
from tests.documents import assert_same, make, write

PART_A = [make(uid, length, 2, 64) for uid, length in enumerate([1, 130, 64, 7, 200])]
PART_B = [make(uid, length, 2, 64) for uid, length in enumerate([90, 3, 80], start=10)]
BY_UID = {d.uid: d for d in PART_A + PART_B}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "store"
    write(path, PART_A, part="a")
    write(path, PART_B, part="b", compression="zstd")
    publish(path)
    return path


@contextmanager
def damaged(path: Path, data: bytes | None) -> Iterator[None]:
    """The file holds `data`, or is gone, for as long as the block runs."""
    original = path.read_bytes()
    try:
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        yield
    finally:
        path.write_bytes(original)


def damages(original: bytes, flips: int, seed: int) -> Iterator[tuple[str, bytes | None]]:
    """Kinds of damage: flipped bits at random places, cuts, growth, emptiness, absence."""
    choose = random.Random(seed)
    for _ in range(flips):
        bit = choose.randrange(len(original) * 8)
        changed = bytearray(original)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(changed)
    yield "cut", original[: choose.randrange(1, len(original))]
    yield "one byte short", original[:-1]
    yield "longer", original + b"\0"
    yield "empty", b""
    yield "gone", None


def part_objects(path: Path) -> list[Path]:
    return sorted(p for p in (path / "parts").rglob("*") if p.is_file())


def test_verify_finds_all_damage_to_a_part(whole) -> None:
    cases = 0
    assert featurestore.verify(whole).problems == []
    for seed, file in enumerate(part_objects(whole)):
        part, object_ = file.relative_to(whole / "parts").as_posix().split("/", 1)
        for kind, data in damages(file.read_bytes(), 12, seed):
            with damaged(file, data):
                problems = featurestore.verify(whole).problems
            assert [(p.part, p.object) for p in problems] == [(part, object_)], (file, kind)
            cases += 1
    assert cases > 400
    assert featurestore.verify(whole).problems == []


def test_a_stray_object_is_found(whole) -> None:
    stray = whole / "parts/a/hidden/c/0/0/1"
    stray.write_bytes(b"x")
    assert [str(p) for p in open_store(whole).verify()] == [
        "part a: hidden/c/0/0/1: does not belong to the part"
    ]
    stray.unlink()


def test_reading_never_returns_anything_else(whole) -> None:
    """Either a document's own bits or an error that names part, object and what to run."""
    raised = 0
    for seed, file in enumerate(part_objects(whole)):
        part, object_ = file.relative_to(whole / "parts").as_posix().split("/", 1)
        read_by_us = "/c/" in object_ and not object_.startswith("sample_")
        for kind, data in damages(file.read_bytes(), 12, seed + 1000):
            with damaged(file, data):
                errors = []
                store = open_store(whole)
                for i, uid in enumerate(store.uid.tolist()):
                    try:
                        assert_same(store[i], BY_UID[uid])
                    except StoreCorruptError as error:
                        errors.append(str(error))
            if read_by_us and not kind.startswith("bit"):
                assert errors, (file, kind)
            for error in errors:
                assert f"part {part}: {object_}" in error or f"part {part}: parts/{part}/{object_}" in error
                assert f"`layer61 store verify {whole}`" in error
            raised += len(errors)
    assert raised > 200


def test_every_flip_in_chunk_data_raises_and_names_the_chunk(whole) -> None:
    file = whole / "parts/a/hidden/c/0/0/0"
    original, choose = file.read_bytes(), random.Random(5)
    store = open_store(whole)
    starts = [0]
    for document in PART_A:
        starts.append(starts[-1] + len(document.input_ids))
    for _ in range(100):
        document = choose.randrange(len(PART_A))
        token = choose.randrange(starts[document], starts[document + 1])
        chunk, row = divmod(token, 64)
        stride = -(-(64 * 128 + 4) // 64) * 64
        changed = bytearray(original)
        changed[chunk * stride + row * 128 + choose.randrange(128)] ^= 1 << choose.randrange(8)
        with (
            damaged(file, bytes(changed)),
            pytest.raises(StoreCorruptError, match=rf"hidden/c/0/0/0: chunk {chunk} fails its checksum"),
        ):
            store[document]
        assert_same(store[document], PART_A[document])


def test_swapped_chunks_and_swapped_shards_are_found(tmp_path) -> None:
    write(tmp_path, [make(1, 128, 1, 64)], part="a")
    write(tmp_path, [make(2, 128, 1, 64)], part="b")
    publish(tmp_path)
    file, other = (tmp_path / f"parts/{p}/hidden/c/0/0/0" for p in "ab")
    original = file.read_bytes()
    stride = 64 * 128 + 64
    swapped = original[stride : 2 * stride] + original[:stride] + original[2 * stride :]
    for data in (swapped, other.read_bytes()):  # each chunk agrees with its own checksum
        assert len(data) == len(original)
        with damaged(file, data):
            with pytest.raises(StoreCorruptError, match="chunk 0 fails its checksum"):
                open_store(tmp_path)[0]
            assert open_store(tmp_path).verify()


def test_damage_to_root_manifest_and_index_is_found(whole) -> None:
    cases = 0
    files = [whole / "zarr.json", *(whole / "manifest").iterdir()]
    files += [p for p in (whole / "index").rglob("*") if p.is_file()]
    for seed, file in enumerate(files):
        for kind, data in damages(file.read_bytes(), 12, seed):
            if file.parent == whole and data is not None and kind.startswith(("bit", "longer")):
                bit = int(kind[4:]) if kind.startswith("bit") else 0
                sealed = re.search(rb'"hidden_store": .*}', file.read_bytes())
                assert sealed is not None
                if not sealed.start() + 16 <= bit // 8 < sealed.end() - 2:
                    continue  # outside the record: Zarr's own fields and white space
            with damaged(file, data):
                try:
                    report = featurestore.verify(whole)
                    found = report.problems or report.version is None  # or plainly nothing published
                except StoreError as error:  # nothing is left that says it is a store
                    found = [error]
                assert found, (file, kind)
                cases += 1
    assert cases > 200


def test_repair_takes_bad_parts_out_and_they_can_be_made_again(whole, tmp_path) -> None:
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    file = path / "parts/a/loss_mask/c/0"
    file.write_bytes(file.read_bytes()[:-3])
    report = featurestore.verify(path, repair=True)
    assert report.quarantined == ["a"]
    assert report.published == 2
    assert open_store(path).uid.tolist() == [d.uid for d in PART_B]
    assert featurestore.verify(path).problems == []
    assert [p.name.split(".")[0] for p in (path / "quarantine").iterdir()] == ["a"]
    write(path, PART_A, part="a")
    publish(path)
    store = open_store(path)
    assert sorted(store.uid.tolist()) == sorted(BY_UID)
    for document in store:
        assert_same(document, BY_UID[document.uid])


@pytest.mark.parametrize("victim", ["zarr.json", "manifest/v000001.json", "index/v000001/uid/c/0"])
@pytest.mark.parametrize("kind", ["gone", "cut"])
def test_repair_makes_metadata_again_from_the_parts(whole, tmp_path, victim, kind) -> None:
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    data = (path / victim).read_bytes()
    (path / victim).unlink()
    if kind == "cut":
        (path / victim).write_bytes(data[: len(data) // 2])
    report = featurestore.verify(path, repair=True)
    if victim.startswith("manifest") and kind == "gone":
        assert report.problems == []  # nothing published yet is no damage
        publish(path)
    else:
        assert report.problems
    store = open_store(path)
    for document in store:
        assert_same(document, BY_UID[document.uid])
    assert len(store) == len(BY_UID)
    from rich.console import Console

    console = Console(record=True, width=120)
    console.print(featurestore.render_report(report))
    assert "problem" in console.export_text() or not report.problems


def test_damage_beside_the_record_of_a_part_is_never_adopted(tmp_path) -> None:
    write(tmp_path, [make(1, 10)], part="a")
    metadata = tmp_path / "parts" / "a" / "zarr.json"
    text = metadata.read_text()
    bad = text.replace('"loss_mask": {"zarr_format": 3, "node_type": "array", "shape": [10]', "X")
    metadata.write_text(
        bad.replace("X", '"loss_mask": {"zarr_format": 3, "node_type": "array", "shape": [11]')
    )
    assert metadata.read_text() != text
    with pytest.raises(StoreCorruptError, match=r"part a: zarr\.json"):
        publish(tmp_path)
    assert [(p.part, p.object) for p in featurestore.verify(tmp_path).problems] == [("a", "zarr.json")]


def test_what_cannot_be_listed_is_not_missing(whole, monkeypatch) -> None:
    """One directory that cannot be read must not cost a healthy part."""
    import os

    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("hidden"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match=r"cannot list .*Permission denied"):
        featurestore.verify(whole, repair=True)
    monkeypatch.undo()
    assert featurestore.verify(whole).problems == []


def test_a_sector_that_cannot_be_read_is_named(whole, monkeypatch) -> None:
    import os

    preadv = os.preadv

    def broken(fd: int, buffers: list, offset: int, *flags: int) -> int:
        if len(buffers[0]) > 1000:
            raise OSError(5, "Input/output error")
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", broken)
    store = open_store(whole)
    longest = int(store.length.argmax())
    with pytest.raises(
        StoreCorruptError, match=r"part .*hidden.*chunk \d+ cannot be read: Input/output error"
    ):
        store[longest]


def test_verify_names_the_bad_chunk(whole) -> None:
    file = whole / "parts/b/hidden/c/0/0/0"
    changed = bytearray(file.read_bytes())
    changed[100] ^= 4
    with damaged(file, bytes(changed)):
        assert [str(p) for p in open_store(whole).verify()] == [
            "part b: hidden/c/0/0/0: fails its checksum in chunk 0"
        ]


def test_a_whole_document_does_not_depend_on_its_neighbours(tmp_path) -> None:
    """Of three documents in a chunk one is damaged: it alone fails, and range reads that need the chunk."""
    made = [make(uid, 15, 1, 64) for uid in range(3)]
    write(tmp_path, made)
    publish(tmp_path)
    (file,) = tmp_path.glob("parts/*/hidden/c/0/0/0")
    changed = bytearray(file.read_bytes())
    changed[20 * 128] ^= 16
    file.write_bytes(changed)
    store = open_store(tmp_path)
    assert_same(store[0], made[0])
    assert_same(store[2], made[2])
    with pytest.raises(StoreCorruptError, match="chunk 0 fails its checksum"):
        store[1]
    with pytest.raises(StoreCorruptError, match="chunk 0 fails its checksum"):
        store.read(0, 0, 5)
