"""Verification of every byte of a store, and repair by taking bad parts out.

The manifest vouches for each part's metadata, that for each object, and the checksum table for each chunk; a
flipped bit, a cut, missing or foreign object anywhere below a store is found and named.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from awscrt.checksums import crc32c
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from configs.errors import StoreCorruptError, StoreError, StoreNotFoundError, StoreVersionError
from configs.progress import count, task
from featurestore.layout import SCHEMA, dump_json, group_metadata, object_path, token_shards
from featurestore.manifest import (
    _publish,
    checked_object,
    manifest_versions,
    part_entry,
    part_rows,
    read_index,
    read_manifest,
)
from featurestore.objects import Objects, open_objects
from featurestore.reader import FeatureStore, open_shard, read_table
from featurestore.writer import committed_parts, read_root

__all__ = ["Problem", "Report", "render_report", "verify"]

CHECKED_FIELDS = ("start", "length", "n_loss", "held_out", "crc_before", "crc_after")


@dataclass(frozen=True)
class Problem:
    """Something wrong; `part` is empty for the store's own metadata."""

    part: str
    object: str
    text: str

    def __str__(self) -> str:
        place = f"part {self.part}: {self.object}" if self.part else self.object
        return f"{place}: {self.text}"


@dataclass
class Report:
    """What `verify` looked at and found."""

    url: str
    version: int | None = None
    parts: int = 0
    documents: int = 0
    bytes: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    published: int | None = None


def verify(
    store: FeatureStore | str | os.PathLike[str], *, repair: bool = False, threads: int | None = None
) -> Report:
    """Read and check every byte of a store: metadata, index, and all objects of all parts.

    Args:
        store: an open store, of which its manifest version is checked, or a path, of which the newest version
            and the parts committed since are.
        repair: move bad parts to `quarantine/` and publish a version without them; rebuild a bad index.
        threads: parts checked at the same time; the number of processors by default.

    Raises:
        StoreNotFoundError: not a store. StoreVersionError: written in a newer format.
    """
    started = time.perf_counter()
    objects = store.objects if isinstance(store, FeatureStore) else open_objects(store)
    report = Report(objects.url)
    root, manifest = _metadata(objects, store, report)
    entries = list(manifest["parts"]) if manifest else []
    report.version = manifest["version"] if manifest else None
    rows = _index_rows(objects, manifest, report) if manifest else {}
    markers: dict[str, str | None] = {}
    if not isinstance(store, FeatureStore):
        unnamed: list[str] = []
        committed = committed_parts(objects, bad=unnamed)
        markers = _markers(entries, committed, unnamed, report)
        entries += _unpublished(objects, entries, committed, manifest, report)
    threads = threads or os.cpu_count() or 1
    with (
        task("verify", sum(e["bytes"] for e in entries), "bytes") as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        checks = [
            pool.submit(_check_part, objects, entry, rows.get(number), progress.advance)
            for number, entry in enumerate(entries)
        ]
        for check in as_completed(checks):
            check.exception()
        for check in checks:
            report.problems += check.result()
    report.parts = len(entries)
    report.documents = sum(e["documents"] for e in entries)
    report.bytes = sum(e["bytes"] for e in entries)
    if repair and report.problems:
        _repair(objects, root, manifest, entries, markers, report)
    report.seconds = time.perf_counter() - started
    return report


def _metadata(
    objects: Objects, store: FeatureStore | str | os.PathLike[str], report: Report
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Root record and manifest to check against, as far as they are whole."""
    versions = manifest_versions(objects)
    root = None
    try:
        root = read_root(objects)
        if root is None:
            if not versions:
                raise StoreNotFoundError(
                    f"{objects.url} is not a feature store: it has no zarr.json",
                    "check the path; `layer61 dump` makes a store",
                )
            report.problems.append(Problem("", "zarr.json", "is missing"))
    except StoreVersionError:
        raise
    except (StoreCorruptError, StoreNotFoundError) as error:
        if not versions:
            raise
        report.problems.append(Problem("", "zarr.json", error.message))
    wanted = [store.version] if isinstance(store, FeatureStore) else reversed(versions)
    for version in wanted:
        try:
            return root, read_manifest(objects, version)
        except (StoreCorruptError, StoreNotFoundError) as error:
            report.problems.append(Problem("", f"manifest/v{version:06d}.json", error.message))
    if isinstance(store, FeatureStore):
        return root, store.manifest
    return root, None


def _index_rows(
    objects: Objects, manifest: dict[str, Any], report: Report
) -> dict[int, dict[str, np.ndarray]]:
    """The index cut into the rows of each part; every object of it is checked."""
    place = manifest["index"]["path"]
    for name, entry in manifest["index"]["objects"].items():
        try:
            checked_object(objects, f"{place}/{name}", entry, "index")
        except StoreError as error:
            report.problems.append(Problem("", f"{place}/{name}", error.message))
    if any(p.object.startswith("index/") for p in report.problems):
        return {}
    index = read_index(objects, manifest)
    order = np.argsort(index["part"], kind="stable")
    edges = np.searchsorted(index["part"][order], np.arange(len(manifest["parts"]) + 1))
    return {
        number: {name: values[order[edges[number] : edges[number + 1]]] for name, values in index.items()}
        for number in range(len(manifest["parts"]))
    }


def _markers(
    entries: list[dict[str, Any]], committed: dict[str, str], unnamed: list[str], report: Report
) -> dict[str, str | None]:
    """What `commits/<name>` ought to hold where it does not, by part name; None where it names no part.

    Only object stores have them: where a directory can be renamed, its name is the commit.
    """
    named = {e["name"]: e["path"] for e in entries if "." in e["path"]}
    wrong: dict[str, str | None] = dict.fromkeys(unnamed)
    wrong |= {name: path for name, path in named.items() if committed.get(name) != path}
    for name, path in wrong.items():
        text = f"does not name {path}" if path else "does not name a part"
        report.problems.append(Problem("", f"commits/{name}", text))
    return wrong


def _unpublished(
    objects: Objects,
    entries: list[dict[str, Any]],
    committed: dict[str, str],
    manifest: dict[str, Any] | None,
    report: Report,
) -> list[dict[str, Any]]:
    known = {e["name"] for e in entries} | set(manifest["dropped"] if manifest else ())
    found = []
    for name, path in committed.items():
        if name in known:
            continue
        try:
            found.append(part_entry(objects, name, path)[0])
        except StoreVersionError:
            raise
        except StoreError as error:
            report.problems.append(Problem(name, "zarr.json", error.message))
    return found


def _check_part(
    objects: Objects,
    entry: dict[str, Any],
    rows: dict[str, np.ndarray] | None,
    advance: Callable[[float], None],
) -> list[Problem]:
    name, path = entry["name"], entry["path"]
    problems: list[Problem] = []

    def bad(what: str, text: str) -> None:
        problems.append(Problem(name, what, text))

    try:
        data = objects.read(f"{path}/zarr.json")
    except FileNotFoundError:
        bad("zarr.json", "is missing")
        return problems
    advance(len(data))
    if f"{crc32c(data):08x}" != entry["meta_crc32c"]:
        bad("zarr.json", "fails its checksum")
        return problems
    try:
        record = part_entry(objects, name, path)[1]
    except StoreVersionError:
        raise
    except StoreError as error:
        bad("zarr.json", error.message)
        return problems
    shard_objects = {object_path(array): array for array in token_shards(record)}
    sizes = {found[len(path) + 1 :]: size for found, size in objects.entries(path)}
    for extra in sorted(sizes.keys() - record["objects"].keys() - {"zarr.json"}):
        bad(extra, "does not belong to the part")
    for object_, expected in record["objects"].items():
        if object_ not in sizes:
            bad(object_, "is missing")
        elif sizes[object_] != expected["bytes"]:
            bad(object_, f"{sizes[object_]} bytes, {expected['bytes']} expected")
        elif object_ not in shard_objects:
            advance(expected["bytes"])
            try:
                checked_object(objects, f"{path}/{object_}", expected, f"part {name}")
            except StoreCorruptError:
                bad(object_, "fails its checksum")
    if record["documents"] and not any(p.object == object_path("chunk_crc32c") for p in problems):
        table = read_table(objects, entry)
        for object_, array in shard_objects.items():
            if not any(p.object == object_ for p in problems):
                text = _check_shard(objects, entry, array, table[array], advance)
                if text:
                    bad(object_, text)
    if not problems and rows is not None:
        _check_rows(objects, path, record, rows, bad)
    return problems


def _check_shard(
    objects: Objects, entry: dict[str, Any], array: str, crcs: list[int], advance: Callable[[float], None]
) -> str | None:
    """What is wrong with a shard of the right size, None if nothing is."""
    try:
        shard = open_shard(objects, entry, array)
    except StoreCorruptError:
        return "the shard index fails its checksum"
    shard.crcs = crcs
    failing = shard.failing_chunks(advance)
    if failing:
        shown = ", ".join(map(str, failing[:8])) + (" ..." if len(failing) > 8 else "")
        return f"fails its checksum in chunk {shown}"
    return shard.check_index()


def _check_rows(
    objects: Objects,
    path: str,
    record: dict[str, Any],
    rows: dict[str, np.ndarray],
    bad: Callable[[str, str], None],
) -> None:
    """The index must say of every document what the part says; one with an earlier twin is not in it."""
    mine = part_rows(objects, path, record)
    place = {int(uid): i for i, uid in enumerate(mine["uid"])}
    if len(place) != record["documents"]:
        bad("sample_uid/c/0", "holds a uid twice")
    if len(mine["uid"]) and int(mine["start"][-1] + mine["length"][-1]) != record["tokens"]:
        bad("sample_offset/c/0", "does not end at the last token")
    for i, uid in enumerate(rows["uid"].tolist()):
        j = place.get(uid)
        if j is None or any(rows[f][i] != mine[f][j] for f in CHECKED_FIELDS):
            bad("index", f"document {uid} differs from the part")


def _repair(
    objects: Objects,
    root: dict[str, Any] | None,
    manifest: dict[str, Any] | None,
    entries: list[dict[str, Any]],
    markers: dict[str, str | None],
    report: Report,
) -> None:
    for name, path in markers.items():
        if path is None:
            objects.delete(f"commits/{name}")
        else:
            objects.write(f"commits/{name}", path.encode())
    paths = committed_parts(objects) | {e["name"]: e["path"] for e in entries}
    if root is None:
        if manifest is None:
            raise StoreError(
                f"{objects.url}: neither zarr.json nor a manifest is readable", "restore one from a copy"
            )
        record = {"schema": SCHEMA, "contract": manifest["contract"]}
        objects.write("zarr.json", dump_json(group_metadata(record)))
    for name in sorted({p.part for p in report.problems if p.part}):
        token = os.urandom(4).hex()
        if objects.entries(paths[name]):
            objects.move(paths[name], f"quarantine/{name}.{token}")
        objects.delete(f"commits/{name}")
        report.quarantined.append(name)
    report.published = _publish(objects, gone=report.quarantined, rebuilt=True)["version"]


def render_report(report: Report) -> RenderableType:
    """A report for a person."""
    gib = report.bytes / 2**30
    version = f"manifest {report.version}" if report.version else "nothing published"
    head = (
        f"{report.url}: {version}, {count(report.parts, 'part')}, {count(report.documents, 'document')},"
        f" {gib:.2f} GiB checked in {report.seconds:.1f} s"
    )
    if not report.problems:
        return Text(f"{head}: every byte is as written")
    table = Table("part", "object", "problem", box=None)
    for problem in report.problems:
        table.add_row(problem.part or "-", problem.object, problem.text)
    if report.published:
        foot = f"published manifest {report.published}"
        if report.quarantined:
            names = ", ".join(report.quarantined)
            foot += f" without {names}, now in quarantine/; `layer61 dump` writes those documents again"
    else:
        foot = "hint: --repair takes the bad parts out and publishes a manifest without them"
    return Group(Text(f"{head}; problems found: {len(report.problems)}"), table, Text(foot))
