"""Publishing: immutable manifest versions over immutable parts, and the index derived from them.

A manifest names the parts a reader may see, with the sizes and checksums that everything below is checked
against. Adding, dropping and merging parts writes the next version; no data is rewritten. Two publishers at
once are safe: a version is created once, and who comes second starts again from what the first one wrote.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from awscrt.checksums import crc32c

from configs.contract import require_same
from configs.errors import StoreCorruptError, StoreError, StoreNotFoundError
from featurestore.layout import (
    CRC_BYTES,
    INDEX_FIELDS,
    SCHEMA,
    VERIFY_HINT,
    array_checksum,
    array_metadata,
    dump_json,
    group_metadata,
    object_path,
    part_arrays,
    seal,
    token_shards,
    unseal,
    unseal_group,
)
from featurestore.objects import Objects, open_objects
from featurestore.writer import committed_parts, read_root

__all__ = [
    "collect",
    "drop",
    "held_documents",
    "manifest_versions",
    "merge",
    "publish",
    "read_index",
    "read_manifest",
    "rebuild",
    "require_root",
]

Index = dict[str, np.ndarray]

LEFTOVER_SECONDS = 24 * 3600

# the only places a manifest may send a reader to; see docs/store.md
PART_PATH = re.compile(r"parts/([A-Za-z0-9_-]{1,120})(\.[0-9a-f]{8})?")
INDEX_PATH = re.compile(r"index/v\d{6,}(\.[0-9a-f]{8})?")


def require_root(objects: Objects) -> dict[str, Any]:
    """The store's root record, or StoreNotFoundError."""
    root = read_root(objects)
    if root is None:
        raise StoreNotFoundError(
            f"{objects.url} is not a feature store: it has no zarr.json",
            "check the path; `layer61 dump` makes a store",
        )
    return root


def manifest_name(version: int) -> str:
    return f"manifest/v{version:06d}.json"


def manifest_versions(objects: Objects) -> list[int]:
    """Versions published, ascending."""
    names = (re.fullmatch(r"manifest/v(\d+)\.json", name) for name, _ in objects.entries("manifest"))
    return sorted(int(match[1]) for match in names if match)


def read_manifest(objects: Objects, version: int | None = None) -> dict[str, Any]:
    """A manifest, the newest by default.

    Raises:
        StoreNotFoundError: nothing is published, or not that version.
        StoreCorruptError: it fails its checksum.
    """
    if version is None:
        versions = manifest_versions(objects)
        if not versions:
            raise StoreNotFoundError(
                f"{objects.url} has no published manifest",
                "`layer61 dump` publishes at its end; start it again to finish it",
            )
        version = versions[-1]
    try:
        data = objects.read(manifest_name(version))
    except FileNotFoundError:
        raise StoreNotFoundError(
            f"{objects.url} has no manifest version {version}",
            "a checkpoint goes on only with the store that it was trained on",
        ) from None
    manifest = unseal(data, manifest_name(version), objects.url)
    if manifest["version"] != version:
        raise StoreCorruptError(
            f"{manifest_name(version)} in {objects.url} says it is version {manifest['version']}",
            VERIFY_HINT.format(objects.url),
        )
    _check_places(manifest, objects.url)
    return manifest


def _check_places(manifest: dict[str, Any], url: str) -> None:
    """Refuse a manifest that names anything but parts and an index of its own store."""
    for entry in manifest["parts"]:
        match = PART_PATH.fullmatch(str(entry["path"]))
        if not match or match[1] != entry["name"]:
            raise _misplaced(f"part {entry['name']!r} at {entry['path']!r}", url)
    place = manifest["index"]
    if not INDEX_PATH.fullmatch(str(place["path"])):
        raise _misplaced(f"its index at {place['path']!r}", url)
    known = {"zarr.json"} | {
        n for field, _ in INDEX_FIELDS for n in (object_path(field), f"{field}/zarr.json")
    }
    for name in place["objects"]:
        if name not in known:
            raise _misplaced(f"{name!r} in its index", url)


def _misplaced(what: str, url: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"a manifest of {url} names {what}, which is no place in a store",
        "it was not written by this program: do not use the store before you know who changed it",
    )


def checked_object(objects: Objects, name: str, entry: dict[str, Any], what: str) -> bytes:
    """A small object whose size and crc32c must be those of `entry`."""
    try:
        data = objects.read(name)
    except FileNotFoundError:
        raise StoreCorruptError(f"{what}: {name} is missing", VERIFY_HINT.format(objects.url)) from None
    crc = crc32c(data) if name.endswith("zarr.json") else array_checksum(data)
    if len(data) != entry["bytes"] or crc != int(entry["crc32c"], 16):
        raise StoreCorruptError(
            f"{what}: {name} fails its checksum ({len(data)} bytes, {entry['bytes']} expected)",
            VERIFY_HINT.format(objects.url),
        )
    return data


def one_chunk(data: bytes, dtype: str) -> np.ndarray:
    """The values of an array stored as one uncompressed chunk."""
    return np.frombuffer(data, dtype, (len(data) - CRC_BYTES) // np.dtype(dtype).itemsize)


# ------------------------------------------------------------------ index


def read_index(objects: Objects, manifest: dict[str, Any]) -> Index:
    """The index of a manifest as numpy arrays; StoreCorruptError if it is missing or altered."""
    directory, entries = manifest["index"]["path"], manifest["index"]["objects"]
    index = {}
    for field, dtype in INDEX_FIELDS:
        name = object_path(field)
        data = checked_object(objects, f"{directory}/{name}", entries[name], f"index of {objects.url}")
        index[field] = one_chunk(data, dtype)
    return index


def write_index(objects: Objects, version: int, index: Index) -> dict[str, Any]:
    """Write the index arrays as one Zarr group; returns their place, sizes and checksums."""
    arrays = {
        field: array_metadata([len(index[field])], dtype, ["document"]) for field, dtype in INDEX_FIELDS
    }
    root = dump_json(group_metadata({"schema": SCHEMA}, arrays))
    directory = f"index/v{version:06d}"
    try:
        objects.write(f"{directory}/zarr.json", root, create=True)
    except FileExistsError:  # of a publisher that died or is about to lose; its index is left alone
        directory += f".{os.urandom(4).hex()}"
        objects.write(f"{directory}/zarr.json", root, create=True)
    entries = {"zarr.json": {"bytes": len(root), "crc32c": f"{crc32c(root):08x}"}}
    small: dict[str, bytes] = {}
    for field, dtype in INDEX_FIELDS:
        data = index[field].astype(dtype, copy=False).tobytes()
        crc = crc32c(data)
        data += crc.to_bytes(CRC_BYTES, "little")
        text = dump_json(arrays[field])
        for name, content, checksum in (
            (object_path(field), data, crc),
            (f"{field}/zarr.json", text, crc32c(text)),
        ):
            small[f"{directory}/{name}"] = content
            entries[name] = {"bytes": len(content), "crc32c": f"{checksum:08x}"}
    objects.put(small)
    objects.sync(directory)
    return {"path": directory, "objects": entries}


def part_entry(objects: Objects, name: str, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest entry and sealed record of a committed part."""
    try:
        data = objects.read(f"{path}/zarr.json")
    except FileNotFoundError:
        raise StoreCorruptError(
            f"part {name}: zarr.json is missing", VERIFY_HINT.format(objects.url)
        ) from None
    record = unseal_group(data, f"part {name}: zarr.json", objects.url)
    if data != dump_json(group_metadata(record, part_arrays(record))):
        raise StoreCorruptError(
            f"part {name}: zarr.json does not agree with its own record", VERIFY_HINT.format(objects.url)
        )
    sizes, shards = record["objects"], record.get("state_shards", 1)
    arrays = part_arrays(record)
    known = {object_path(a) for a in [*arrays, *(token_shards(record) if arrays else ())]}
    if name != record["name"] or sizes.keys() != known | {f"{a}/zarr.json" for a in arrays}:
        raise StoreCorruptError(
            f"part {name}: its record is of another part, or names objects that no part has",
            VERIFY_HINT.format(objects.url),
        )
    states = [s for s in token_shards(record) if s.startswith("hidden")] if sizes else []
    state_bytes = [sizes[object_path(s)]["bytes"] for s in states]
    entry: dict[str, Any] = {
        "name": name,
        "path": path,
        "tokens": record["tokens"],
        "documents": record["documents"],
        "states": record["states"],
        "hidden_size": record["hidden_size"],
        "bytes": sum(o["bytes"] for o in sizes.values()) + len(data),
        "compression": record["compression"],
        "chunk_tokens": record["chunk_tokens"],
        "hidden_bytes": sizes[object_path("hidden")]["bytes"] if sizes else 0,
        # where each state is an object of its own, their sizes
        **({"state_shards": shards, "state_bytes": state_bytes} if shards > 1 else {}),
        "meta_crc32c": f"{crc32c(data):08x}",
        "table_crc32c": sizes[object_path("chunk_crc32c")]["crc32c"] if sizes else "00000000",
    }
    if record.get("rejected"):
        entry["rejected"] = len(record["rejected"])
    return entry, record


def part_rows(objects: Objects, path: str, record: dict[str, Any]) -> Index:
    """The index rows of one part, all but `part`, with sources numbered as in the part."""
    count = record["documents"]
    if count == 0:
        return {field: np.zeros(0, dtype) for field, dtype in INDEX_FIELDS}
    what = f"part {record['name']}"
    values = {}
    for array, dtype in (("sample_offset", "<u8"), ("sample_uid", "<u8"), ("sample_crc32c", "<u4")):
        name = object_path(array)
        data = checked_object(objects, f"{path}/{name}", record["objects"][name], what)
        values[array] = one_chunk(data, dtype)
    held_out = np.zeros(count, np.uint8)
    held_out[record["held_out"]] = 1
    offset = values["sample_offset"]
    return {
        "uid": values["sample_uid"],
        "start": offset[:-1],
        "length": np.diff(offset).astype(np.uint32),
        "n_loss": np.array(record["n_loss"], np.uint32),
        "held_out": held_out,
        "source": np.array(record["sample_source"], np.uint32),
        "crc_before": values["sample_crc32c"][:-1],
        "crc_after": values["sample_crc32c"][1:],
    }


# ------------------------------------------------------------------ publishing


def publish(
    path: str | os.PathLike[str] | Objects,
    uids: np.ndarray | None = None,
    *,
    later: np.ndarray | None = None,
    only: bool = False,
) -> dict[str, Any]:
    """Make every committed part visible: write the next index and manifest version.

    Args:
        path: the store.
        uids: uint64 [N], the documents of an input: the manifest then says how many of them are there, and
            shows those that an earlier one left out.
        later: uint64, documents that may come of those and are not counted.
        only: leave every other document out of the index; its part stays as it is.

    Returns:
        The manifest now in force; the one that was, when nothing changed.

    Raises:
        StoreNotFoundError: not a store. ContractError, StoreError: a part does not belong to it.
    """
    wanted = None if uids is None else _Wanted(uids, uids if later is None else np.union1d(uids, later), only)
    return _publish(open_objects(path), wanted=wanted)


def held_documents(path: str | os.PathLike[str] | Objects) -> tuple[np.ndarray, dict[int, str]]:
    """What the committed parts of a store hold, published or not, shown or left out.

    Returns:
        uids of the documents, uint64 ascending; and those found bad, with the reason.
    """
    objects = open_objects(path)
    found: list[np.ndarray] = []
    rejected: dict[int, str] = {}
    known: set[str] = set()
    versions = manifest_versions(objects)
    if versions:
        manifest = read_manifest(objects, versions[-1])
        index = read_index(objects, manifest)
        found.append(index["uid"])
        shown = np.bincount(index["part"], minlength=len(manifest["parts"]))
        # all of such a part stands in the index; the others are asked themselves
        known = {
            e["name"]
            for e, n in zip(manifest["parts"], shown.tolist(), strict=True)
            if n == e["documents"] and not e.get("rejected")
        }
    with ThreadPoolExecutor(8) as pool:
        for uids, bad in pool.map(
            lambda item: _held_by(objects, *item), committed_parts(objects, sorted(known)).items()
        ):
            found.append(uids)
            rejected |= bad
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *found])), rejected


def _held_by(objects: Objects, name: str, path: str) -> tuple[np.ndarray, dict[int, str]]:
    record = part_entry(objects, name, path)[1]
    rejected = {int(uid): str(reason) for uid, reason in record.get("rejected", ())}
    return part_rows(objects, path, record)["uid"], rejected


def rebuild(path: str | os.PathLike[str] | Objects) -> dict[str, Any]:
    """Publish a new version whose index is derived from the parts alone, whatever the old one says."""
    return _publish(open_objects(path), rebuilt=True)


def drop(path: str | os.PathLike[str] | Objects, parts: Iterable[str]) -> dict[str, Any]:
    """Publish a version without the named parts; their data stays until `collect(dropped=True)`.

    Raises:
        StoreError: a name is not a part of the newest version.
    """
    objects, names = open_objects(path), {parts} if isinstance(parts, str) else set(parts)
    unknown = names - {entry["name"] for entry in read_manifest(objects)["parts"]}
    if unknown:
        raise StoreError(
            f"{objects.url} has no parts {', '.join(sorted(unknown))}", "see `layer61 store info`"
        )
    return _publish(objects, dropped=names)


def merge(path: str | os.PathLike[str] | Objects, others: Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """Add the published parts of other stores with the same contract, then publish.

    No data is rewritten: local parts are hard-linked (one file system), parts in the same bucket are copied
    by the server. A part that is there already is skipped; of documents with one uid the first part wins.

    Raises:
        ContractError: the stores are not of one contract.
        StoreError: two different parts have one name, or the data would have to be moved; nothing is added.
    """
    objects = open_objects(path)
    root = require_root(objects)
    sources = [open_objects(other) for other in others]
    for other in sources:
        what = f"stores {objects.url} and {other.url}"
        hint = "only stores of one contract can be merged"
        require_same(require_root(other)["contract"], root["contract"], what, hint=hint)
    have = committed_parts(objects)
    wanted: dict[str, tuple[Objects, dict[str, Any]]] = {}
    for other in sources:
        for entry in read_manifest(other)["parts"]:
            name = entry["name"]
            if name in have:
                _require_same_part(entry, other, part_entry(objects, name, have[name])[0], objects)
            elif name in wanted:
                _require_same_part(entry, other, wanted[name][1], wanted[name][0])
            else:
                wanted[name] = other, entry
    for name, (other, entry) in wanted.items():
        staging = f"parts/{name}.{os.urandom(4).hex()}"
        try:
            objects.copy_from(other, entry["path"], staging)
            objects.commit(staging, f"parts/{name}")
        except FileExistsError:  # of another merge at the same time
            objects.delete(staging)
            mine = part_entry(objects, name, committed_parts(objects)[name])[0]
            _require_same_part(entry, other, mine, objects)
        except BaseException:
            objects.delete(staging)
            raise
    return _publish(objects)


def _require_same_part(entry: dict[str, Any], where: Objects, twin: dict[str, Any], there: Objects) -> None:
    if entry["meta_crc32c"] != twin["meta_crc32c"]:
        raise StoreError(
            f"part {entry['name']} of {where.url} and that of {there.url} have one name and differ",
            "drop one of the two, or keep the stores apart",
        )


def collect(
    path: str | os.PathLike[str] | Objects,
    *,
    older_than_s: float = LEFTOVER_SECONDS,
    dropped: bool = False,
) -> list[str]:
    """Remove what no reader can see; returns the paths removed.

    Args:
        path: the store.
        older_than_s: leave leftovers of writers alone that changed more recently, in seconds.
        dropped: also remove parts that were dropped; readers of older manifest versions lose them.
    """
    objects = open_objects(path)
    require_root(objects)
    committed = committed_parts(objects)
    keep = {p.rsplit("/", 1)[-1] for p in committed.values()}
    versions, indexes = manifest_versions(objects), set()
    for version in versions:
        with contextlib.suppress(StoreCorruptError):
            indexes.add(read_manifest(objects, version)["index"]["path"].rsplit("/", 1)[-1])
    before = time.time() - older_than_s
    removed = []
    for prefix, live in (("parts", keep), ("index", indexes)):
        for directory in objects.directories(prefix):
            name = f"{prefix}/{directory}"
            if directory not in live and objects.modified(name) <= before:
                objects.delete(name)
                removed.append(name)
    if dropped and versions:
        names = read_manifest(objects)["dropped"]
        for name in names:
            if name in committed:
                objects.delete(f"commits/{name}")
                objects.delete(committed[name])
                removed.append(committed[name])
        if names:  # a part that is written again under such a name is a new one
            _publish(objects, forgotten=names)
    return removed


def _publish(
    objects: Objects,
    *,
    dropped: Iterable[str] = (),
    forgotten: Iterable[str] = (),
    gone: Iterable[str] = (),
    rebuilt: bool = False,
    wanted: "_Wanted | None" = None,
) -> dict[str, Any]:
    """Write the next version: `dropped` parts stay committed but unseen, `gone` parts no longer exist.

    `forgotten` names count as dropped no more; `wanted` is the input of a dump.
    """
    root = require_root(objects)
    for _ in range(100):
        change = _Change(set(dropped), set(forgotten), set(gone), rebuilt, wanted)
        result = _publish_once(objects, root, change)
        if result is not None:
            return result
    raise StoreError(f"{objects.url}: 100 other publishers came first", "publish from one process")


@dataclass(frozen=True, eq=False)
class _Wanted:
    """The documents of an input: those that are counted, all that are shown, and whether no others are."""

    counted: np.ndarray
    shown: np.ndarray
    only: bool


@dataclass(frozen=True, eq=False)
class _Change:
    dropped: set[str]
    forgotten: set[str]
    gone: set[str]
    rebuilt: bool
    wanted: _Wanted | None


def _publish_once(objects: Objects, root: dict[str, Any], change: _Change) -> dict[str, Any] | None:
    """The next version, the old one if nothing changed, None if another publisher came first."""
    versions = manifest_versions(objects)
    old = _newest_readable(objects, versions, change.rebuilt)
    old_parts = old["parts"] if old else []
    dropped = (set(old["dropped"]) if old else set()) - change.forgotten | change.dropped
    gone = dropped | change.gone
    kept = [] if change.rebuilt else [e for e in old_parts if e["name"] not in gone]
    found = committed_parts(objects, [e["name"] for e in kept])
    new = {name: path for name, path in found.items() if name not in dropped}
    wanted = change.wanted
    # its index only grows; but documents that stand in a part and in no index may be wanted now
    grows = not change.rebuilt and len(kept) == len(old_parts)
    hides = old is not None and (old["totals"]["duplicates"] > 0 or any(e.get("left_out") for e in kept))
    base = old if grows and not (wanted is not None and hides) else None
    if base and not new and dropped == set(base["dropped"]) and wanted is None:
        return base
    with ThreadPoolExecutor(8) as pool:
        added = _admit(pool, objects, root, new, old_parts)
        parts = kept + [entry for entry, _ in added]
        states, hidden_size = _common_shape(objects, parts)
        if base is None:
            records = pool.map(lambda e: part_entry(objects, e["name"], e["path"])[1], kept)
            added = [*zip(kept, records, strict=True), *added]
        before = {e["name"]: e.get("left_out") for e in old_parts}
        index, sources, parts = _join(pool, objects, base, added, parts, before, wanted)
    version = versions[-1] + 1 if versions else 1
    documents = len(index["uid"])
    counted = _counted(old, index, parts, wanted, objects)
    totals = {
        "parts": len(parts),
        "documents": documents,
        "tokens": int(index["length"].sum(dtype=np.int64)),
        "loss_tokens": int(index["n_loss"].sum(dtype=np.int64)),
        "bytes": sum(e["bytes"] for e in parts),
        "duplicates": sum(e["documents"] - _left_out_count(e) for e in parts) - documents,
    }
    still_dropped = sorted(dropped & (committed_parts(objects).keys() if dropped else set()))
    if (
        old
        and not change.rebuilt
        and (old["parts"], old["totals"], old["dropped"], old.get("input"))
        == (parts, totals, still_dropped, counted)
    ):
        return old
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "version": version,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "contract": root["contract"],
        "states": states,
        "hidden_size": hidden_size,
        "totals": totals,
        "sources": sources,
        "index": write_index(objects, version, index),
        "dropped": still_dropped,
        "parts": parts,
    }
    if counted is not None:
        record["input"] = counted
    manifest = seal(record)
    try:
        objects.write(manifest_name(version), dump_json(manifest), create=True)
    except FileExistsError:
        return None
    return manifest


def _counted(
    old: dict[str, Any] | None,
    index: Index,
    parts: list[dict[str, Any]],
    wanted: _Wanted | None,
    objects: Objects,
) -> dict[str, int] | None:
    """How many documents of the input are there; without the input, what was said before, less any losses."""
    if wanted is not None:
        uids = wanted.counted
        there = int(np.isin(uids, index["uid"]).sum())
        bad = [
            uid
            for e in parts
            if e.get("rejected")
            for uid, _ in part_entry(objects, e["name"], e["path"])[1]["rejected"]
        ]
        lost = np.setdiff1d(uids[np.isin(uids, np.array(bad, np.uint64))], index["uid"])
        return {"documents": len(uids), "there": there, "rejected": len(lost)}
    if old is None or "input" not in old:
        return None
    fewer = max(old["totals"]["documents"] - len(index["uid"]), 0)
    return {**old["input"], "there": max(old["input"]["there"] - fewer, 0)}


def _left_out_count(entry: dict[str, Any]) -> int:
    left_out = entry.get("left_out", [])
    return entry["documents"] if left_out == "all" else len(left_out)


def _admit(
    pool: ThreadPoolExecutor,
    objects: Objects,
    root: dict[str, Any],
    new: dict[str, str],
    old_parts: list[dict[str, Any]],
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Entries and records of `new` parts, checked against the contract, in the order of `old_parts`."""
    added = list(pool.map(lambda item: part_entry(objects, *item), new.items()))
    for entry, record in added:
        what = f"part {entry['name']} and store {objects.url}"
        require_same(record["contract"], root["contract"], what, hint=f"move {entry['path']} elsewhere")
    place = {e["name"]: i for i, e in enumerate(old_parts)}  # the order says which of two equal uids wins
    return sorted(added, key=lambda item: place.get(item[0]["name"], len(place)))


def _join(
    pool: ThreadPoolExecutor,
    objects: Objects,
    base: dict[str, Any] | None,
    added: list[tuple[dict[str, Any], dict[str, Any]]],
    parts: list[dict[str, Any]],
    before: dict[str, Any],
    wanted: _Wanted | None,
) -> tuple[Index, list[str], list[dict[str, Any]]]:
    """The index of `parts`: rows of manifest `base`, if any, then those of `added` parts.

    Args:
        pool, objects: to read with.
        base: manifest whose index holds all rows of its parts.
        added: entry and record of the other parts.
        parts: all of them, in the manifest's order.
        before: `left_out` of each part by name, as it stands in the manifest before.
        wanted: the documents of an input, if one is published.

    Returns:
        the index, the names of the sources, and the entries of the parts with what is left out of each.
    """
    rows = pool.map(lambda item: part_rows(objects, item[0]["path"], item[1]), added)
    pieces = [read_index(objects, base)] if base else []
    numbers = {name: i for i, name in enumerate(base["sources"])} if base else {}
    first = len(base["parts"]) if base else 0
    for number, (row, (_, record)) in enumerate(zip(rows, added, strict=True), start=first):
        codes = [numbers.setdefault(name, len(numbers)) for name in record["sources"]]
        row["source"] = np.array(codes, np.uint32)[row["source"]] if codes else row["source"]
        row["part"] = np.full(len(row["uid"]), number, np.uint32)
        pieces.append(row)
    joined = {
        field: np.concatenate([np.zeros(0, dtype)] + [p[field].astype(dtype, copy=False) for p in pieces])
        for field, dtype in INDEX_FIELDS
    }
    edges = np.searchsorted(joined["part"], np.arange(len(parts) + 1)).tolist()
    shown = np.ones(len(joined["uid"]), bool)
    if wanted is not None and wanted.only:
        shown = np.isin(joined["uid"], wanted.shown)
    else:
        for number in range(first, len(parts)):
            left_out = before.get(parts[number]["name"])
            if left_out:
                rows_of = shown[edges[number] : edges[number + 1]]
                rows_of[slice(None) if left_out == "all" else left_out] = False
        if wanted is not None:
            shown |= np.isin(joined["uid"], wanted.shown)
    parts = [_with_left_out(e, None if i >= first else e.get("left_out")) for i, e in enumerate(parts)]
    for number in np.unique(joined["part"][~shown]).tolist():
        span = slice(edges[number], edges[number + 1])
        entry = parts[number]
        # an index that has grown has every document of its parts when anything is newly left out of it
        gone = np.flatnonzero(~shown[span]).tolist()
        parts[number] = _with_left_out(entry, "all" if len(gone) == entry["documents"] else gone)
    joined = {field: values[shown] for field, values in joined.items()}
    _, first_rows = np.unique(joined["uid"], return_index=True)  # the first part wins
    keep = np.sort(first_rows)
    return {field: values[keep] for field, values in joined.items()}, list(numbers), parts


def _with_left_out(entry: dict[str, Any], left_out: Any) -> dict[str, Any]:
    """The entry of a part with the places of the documents that are not shown, or "all" of them."""
    bare = {k: v for k, v in entry.items() if k != "left_out"}
    return bare | ({"left_out": left_out} if left_out else {})


def _newest_readable(objects: Objects, versions: list[int], rebuilt: bool) -> dict[str, Any] | None:
    """The newest manifest; when rebuilding, the newest one that is whole."""
    for version in reversed(versions):
        try:
            return read_manifest(objects, version)
        except StoreCorruptError:
            if not rebuilt:
                raise
    return None


def _common_shape(objects: Objects, parts: list[dict[str, Any]]) -> tuple[int, int]:
    """States a token and their width, which all parts with documents share; zeros if there are none."""
    filled = [e for e in parts if e["documents"]]
    for entry in filled:
        if (entry["states"], entry["hidden_size"]) != (filled[0]["states"], filled[0]["hidden_size"]):
            raise StoreError(
                f"{objects.url}: part {entry['name']} holds {entry['states']} states of width"
                f" {entry['hidden_size']}, part {filled[0]['name']} {filled[0]['states']} of"
                f" {filled[0]['hidden_size']}",
                "move the part that does not belong out of parts/",
            )
    return (filled[0]["states"], filled[0]["hidden_size"]) if filled else (0, 0)
