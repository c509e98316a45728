"""Reading: a document, or a token range of it, in one range read per array, every chunk checked.

A chunk's crc32c is computed while the chunk is in cache and compared with the part's checksum table, which
the manifest vouches for: an altered byte, a swapped chunk or an object of another part cannot pass. Existence
and size are compared with the manifest when a part is opened, for stock Zarr readers return zeros for a
missing object.

Shapes: T tokens of a document, S states of a token, D width of a state.
"""

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from awscrt.checksums import crc32c

from configs.contract import store_contract
from configs.errors import StoreCorruptError, StoreError
from featurestore.layout import (
    CRC_BYTES,
    VERIFY_HINT,
    array_checksum,
    chunk_count,
    chunk_stride,
    object_path,
    shard_bytes,
    token_shards,
)
from featurestore.manifest import checked_object, one_chunk, read_index, read_manifest, require_root
from featurestore.objects import Objects, RangeFile, Window, open_objects

if TYPE_CHECKING:
    from featurestore.check import Problem

__all__ = ["Document", "FeatureStore", "open_store"]

OPEN_FILES = 384


@dataclass(frozen=True)
class Document:
    """One document, or the token range [start, start + T) of it.

    Attributes:
        uid: its 64-bit number.
        input_ids: int64 [T].
        loss_mask: bool [T]; True where the target would have to produce the token.
        hidden: torch.bfloat16 [T, S, D].
        source: where it came from.
        held_out: kept from training.
        start: first token of the range.
    """

    uid: int
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    hidden: torch.Tensor
    source: str
    held_out: bool
    start: int = 0


_scratch = threading.local()


def _scratch_bytes(size: int) -> memoryview:
    """Scratch memory of this thread, for rows beside those asked for."""
    held = getattr(_scratch, "view", None)
    if held is None or len(held) < size:
        held = _scratch.view = torch.empty(size, dtype=torch.uint8).numpy().data  # aligned, unlike bytearray
    return held


class Shard:
    """Rows of one sharded array of a part."""

    def __init__(
        self, file: RangeFile, part: str, array: str, url: str, rows: int, row_bytes: int, chunk_rows: int
    ) -> None:
        self.file, self.part, self.array, self.url = file, part, array, url
        self.rows, self.row_bytes, self.chunk_rows = rows, row_bytes, chunk_rows
        self.chunks = chunk_count(rows, chunk_rows)
        self.stride = chunk_stride(chunk_rows * row_bytes)
        self.crcs: list[int] = []
        self.index: np.ndarray | None = None  # of compressed chunks: offset and length, uint64 [C, 2]

    def corrupt(self, text: str) -> StoreCorruptError:
        return StoreCorruptError(
            f"part {self.part}: {object_path(self.array)}: {text}", VERIFY_HINT.format(self.url)
        )

    def read_index(self) -> np.ndarray:
        """The shard index: offset and length of every chunk, uint64 [C, 2]."""
        size = self.chunks * 16 + CRC_BYTES
        data = memoryview(bytearray(size))
        offset = self.file.size - size
        try:
            self.file.window(offset, size).readv([data], offset)
        except EOFError:
            raise self.corrupt("the shard index is cut off") from None
        if array_checksum(data) is None:
            raise self.corrupt("the shard index fails its checksum")
        return np.frombuffer(data, "<u8", self.chunks * 2).reshape(-1, 2)

    def span(self, start: int, stop: int, exact: bool = False) -> tuple[int, int]:
        """Offset and length of the bytes that `read` needs for rows [start, stop)."""
        first, last = start // self.chunk_rows, chunk_count(stop, self.chunk_rows)
        if self.index is not None:
            offset = int(self.index[first, 0])
            return offset, int(self.index[last - 1].sum()) - offset
        offset, end = first * self.stride, last * self.stride
        if exact:
            offset += start % self.chunk_rows * self.row_bytes
            if stop % self.chunk_rows:
                end = (last - 1) * self.stride + stop % self.chunk_rows * self.row_bytes
        return offset, end - offset

    def read(
        self,
        window: Window,
        start: int,
        stop: int,
        out: memoryview,
        edges: tuple[int, int] | None = None,
    ) -> None:
        """Copy rows [start, stop) into `out`, bytes; raises StoreCorruptError naming the chunk.

        Args:
            window: where the bytes of `span` are read from.
            start: first row.
            stop: row after the last.
            out: memory of just these rows.
            edges: crc32c of the rows of the first chunk before `start` and of those of the last one before
                `stop`; with them the rows of neighbouring documents need not be read for the check.
        """
        first, last = start // self.chunk_rows, chunk_count(stop, self.chunk_rows)
        size = self.chunk_rows * self.row_bytes
        chunk = first
        try:
            for chunk in range(first, last):
                low = max(start - chunk * self.chunk_rows, 0) * self.row_bytes
                high = min((stop - chunk * self.chunk_rows) * self.row_bytes, size)
                target, out = out[: high - low], out[high - low :]
                if self.index is not None:
                    self._read_compressed(window, chunk, low, high, target)
                elif edges is None:
                    spare = _scratch_bytes(size) if high - low < size else _scratch_bytes(0)
                    views = [spare[:low], target, spare[low : low + size - high]]
                    self._read_plain(window, chunk, 0, [v for v in views if len(v)], 0, None)
                else:
                    before = edges[0] if chunk == first else 0
                    self._read_plain(window, chunk, low, [target], before, edges[1] if high < size else None)
        except EOFError:
            raise self.corrupt(f"chunk {chunk}: the object is not as long as the manifest says") from None
        except FileNotFoundError:
            raise self.corrupt("the object is missing") from None
        except StoreError:
            raise
        except OSError as error:
            raise self.corrupt(f"chunk {chunk} cannot be read: {error.strerror}") from error

    def _read_plain(
        self, window: Window, chunk: int, low: int, views: list[memoryview], crc: int, expected: int | None
    ) -> None:
        """Fill `views` from byte `low` of a chunk; without `expected` they reach to the stored checksum."""
        trailer = memoryview(bytearray(0 if expected is not None else CRC_BYTES))
        window.readv([*views, trailer], chunk * self.stride + low)
        for view in views:
            crc = crc32c(view, crc)
        if expected is None:
            expected = self.crcs[chunk]
            if crc != int.from_bytes(trailer, "little"):
                raise self.corrupt(f"chunk {chunk} fails its checksum")
        if crc != expected:
            raise self.corrupt(f"chunk {chunk} fails its checksum")

    def _read_compressed(self, window: Window, chunk: int, low: int, high: int, target: memoryview) -> None:
        from numcodecs import Zstd

        assert self.index is not None
        offset, length = map(int, self.index[chunk])
        if not CRC_BYTES < length <= self.file.size or offset + length > self.file.size:
            raise self.corrupt(f"the shard index places chunk {chunk} outside the object")
        data = memoryview(bytearray(length))
        window.readv([data], offset)
        crc = crc32c(data[:-CRC_BYTES])
        if crc != self.crcs[chunk] or crc != int.from_bytes(data[-CRC_BYTES:], "little"):
            raise self.corrupt(f"chunk {chunk} fails its checksum")
        rows = memoryview(Zstd().decode(data[:-CRC_BYTES])).cast("B")
        target[:] = rows[low:high]

    def failing_chunks(self, advance: Callable[[float], None]) -> list[int]:
        """Chunks whose bytes, checksum or padding are not as written; reads everything but the index."""
        out = memoryview(torch.empty(self.chunk_rows * self.row_bytes, dtype=torch.uint8).numpy().data)
        padding = memoryview(bytearray(self.stride - len(out) - CRC_BYTES))
        failing = []
        for chunk in range(self.chunks):
            advance(self.file.size / self.chunks)
            first = chunk * self.chunk_rows
            stop = first + self.chunk_rows  # the rows beyond the last token are zeros and count as well
            try:
                offset, length = self.span(first, stop)
                window = self.file.window(offset, length)
                self.read(window, first, stop, out)
                if self.index is None and padding:
                    window.readv([padding], offset + length - len(padding))
            except (StoreCorruptError, EOFError, FileNotFoundError):
                failing.append(chunk)
                continue
            if any(padding) or (stop > self.rows and any(out[(self.rows - first) * self.row_bytes :])):
                failing.append(chunk)
        return failing

    def check_index(self) -> str | None:
        """What is wrong with the shard index that other readers use, None if nothing is."""
        compressed = self.index is not None
        try:
            index = self.read_index()
        except StoreCorruptError:
            return "the shard index fails its checksum"
        size = self.chunk_rows * self.row_bytes + CRC_BYTES
        lengths = index[:, 1].astype(np.int64) if compressed else np.full(self.chunks, size)
        steps = lengths if compressed else np.full(self.chunks, self.stride)
        offsets = np.cumsum(steps) - steps
        end = int(steps.sum()) + self.chunks * 16 + CRC_BYTES
        if np.array_equal(index, np.stack([offsets, lengths], 1)) and end == self.file.size:
            return None
        return "the shard index does not describe the chunks"


def open_shard(objects: Objects, entry: dict[str, Any], array: str) -> Shard:
    """Open one token array of a part by its manifest entry; its size must be the manifest's."""
    row_bytes, chunk_rows = token_shards(entry)[array]
    size = shard_bytes(entry["tokens"], row_bytes, chunk_rows)
    if states := array.startswith("hidden"):
        # compressed or not
        size = entry.get("state_bytes", [entry["hidden_bytes"]])[int(array.partition(".")[2] or 0)]
    try:
        file = objects.open(f"{entry['path']}/{object_path(array)}", size)
    except FileNotFoundError:
        raise StoreCorruptError(
            f"part {entry['name']}: {object_path(array)} is missing", VERIFY_HINT.format(objects.url)
        ) from None
    shard = Shard(file, entry["name"], array, objects.url, entry["tokens"], row_bytes, chunk_rows)
    if file.size != size:
        raise shard.corrupt(f"{file.size} bytes, {size} expected")
    if states and entry["compression"] != "none":
        shard.index = shard.read_index()
    return shard


def read_table(objects: Objects, entry: dict[str, Any]) -> dict[str, list[int]]:
    """Checksums of the chunks of each token array of a part."""
    shards = token_shards(entry)
    counts = [chunk_count(entry["tokens"], rows) for _, rows in shards.values()]
    expected = {"bytes": sum(counts) * 4 + CRC_BYTES, "crc32c": entry["table_crc32c"]}
    name = f"{entry['path']}/{object_path('chunk_crc32c')}"
    crcs = one_chunk(checked_object(objects, name, expected, f"part {entry['name']}"), "<u4").tolist()
    ends = np.cumsum([0, *counts]).tolist()
    return {array: crcs[ends[i] : ends[i + 1]] for i, array in enumerate(shards)}


def open_part(objects: Objects, entry: dict[str, Any]) -> dict[str, Shard]:
    """The token arrays of a part, ready to be read."""
    table = read_table(objects, entry)
    shards = {array: open_shard(objects, entry, array) for array in token_shards(entry)}
    for array, shard in shards.items():
        shard.crcs = table[array]
    return shards


class FeatureStore:
    """One manifest version of a store, readable from many threads.

    Attributes:
        url: where it is.
        manifest: the manifest as written.
        uid, length, n_loss, held_out: one entry a document (uint64, uint32, uint32, bool); what is held out
            was said by who wrote the store, until `holding_out` says otherwise.
    """

    def __init__(self, objects: Objects, manifest: dict[str, Any]) -> None:
        self.objects, self.manifest, self.url = objects, manifest, objects.url
        # reading around a document pays only if the store fits the page cache
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        objects.read_around = manifest["totals"]["bytes"] < memory / 2
        self._index = read_index(objects, manifest)
        self.uid = self._index["uid"]
        self.length = self._index["length"]
        self.n_loss = self._index["n_loss"]
        self.held_out = self._index["held_out"].view(bool)
        self._rule: Callable[[np.ndarray], np.ndarray] | None = None
        self._parts: OrderedDict[int, dict[str, Shard]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def contract(self) -> dict[str, Any]:
        """What the states are and which target they belong to."""
        return store_contract(self.manifest["contract"])

    @property
    def version(self) -> int:
        """Manifest version."""
        return self.manifest["version"]

    @property
    def missing(self) -> str:
        """In words, how many documents of the dump's input are not there; empty if none is known to be."""
        there = self.manifest.get("input")
        if there is None:
            return ""
        missing = there["documents"] - there["there"] - there["rejected"]
        if not missing:
            return ""
        return f"{missing:,} of the {there['documents']:,} documents of its input are not in {self.url} yet"

    @property
    def states(self) -> int:
        """States of a token (S)."""
        return self.manifest["states"]

    @property
    def hidden_size(self) -> int:
        """Width of a state (D)."""
        return self.manifest["hidden_size"]

    @cached_property
    def source(self) -> np.ndarray:
        """Source of every document, strings."""
        names = np.array(self.manifest["sources"] or [""], dtype=object)
        return names[self._index["source"]]

    def at(self, version: int) -> "FeatureStore":
        """This store at another manifest version."""
        if version == self.version:
            return self
        found = FeatureStore(self.objects, read_manifest(self.objects, version))
        return found if self._rule is None else found.holding_out(self._rule)

    def holding_out(self, rule: Callable[[np.ndarray], np.ndarray]) -> "FeatureStore":
        """This store with another held-out set, in all its versions.

        Args:
            rule: from uids, uint64 [N], whether each is held out, bool [N].
        """
        found = copy.copy(self)
        found._rule, found.held_out = rule, rule(self.uid)
        return found

    def __len__(self) -> int:
        return len(self.uid)

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Document:
        return self.read(i)

    def __repr__(self) -> str:
        return f"FeatureStore({self.url!r}, version={self.version}, documents={len(self)})"

    def read(
        self, i: int, start: int = 0, stop: int | None = None, states: Sequence[int] | None = None
    ) -> Document:
        """Document `i` of the manifest's order, or tokens [start, stop) of it.

        Args:
            i: number of the document.
            start, stop: the tokens.
            states: which states of a token to read, in which order; all of them by default. Where each lies
                in an object of its own, the others cost nothing.

        Raises:
            IndexError: no such document or range.
            StoreCorruptError: an object is missing, short or altered; names part, object and chunk.
        """
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        length = int(self.length[i])
        stop = length if stop is None else stop
        if not 0 <= start < stop <= length:
            raise IndexError(f"tokens {start} to {stop} of document {i}, which has {length}")
        ids = np.empty(stop - start, np.uint32)
        mask = np.empty(stop - start, np.uint8)
        count = self.states if states is None else len(states)
        hidden = torch.empty(count, stop - start, self.hidden_size, dtype=torch.bfloat16).transpose(0, 1)
        self.read_into(i, start, stop, ids, mask, hidden.view(torch.uint16).numpy(), states)
        return Document(
            uid=int(self.uid[i]),
            input_ids=torch.from_numpy(ids.astype(np.int64)),
            loss_mask=torch.from_numpy(mask.view(bool)),
            hidden=hidden,
            source=self.manifest["sources"][self._index["source"][i]],
            held_out=bool(self.held_out[i]),
            start=start,
        )

    def read_into(
        self,
        i: int,
        start: int,
        stop: int,
        ids: np.ndarray,
        mask: np.ndarray,
        hidden: np.ndarray,
        states: Sequence[int] | None = None,
    ) -> None:
        """Fill uint32 [T], uint8 [T] and uint16 [T, S, D] with tokens [start, stop); `states` as in `read`.

        Nothing is copied in memory where `hidden[:, s]` is C-contiguous.
        """
        index = self._index
        part = self._part(int(index["part"][i]))
        wanted = range(self.states) if states is None else states
        names = [name for name in part if name.startswith("hidden")]
        edges = None
        if start == 0 and stop == self.length[i] and part[names[-1]].index is None:
            edges = int(index["crc_before"][i]), int(index["crc_after"][i])
        first = int(index["start"][i])
        start, stop = first + start, first + stop
        # one object holds all states, or each has its own
        whole = len(names) < self.states
        chosen = names if whole and len(wanted) else [names[s] for s in wanted]
        shards = [part[name] for name in (*chosen, "input_ids", "loss_mask")]
        known = [edges if name == names[-1] else None for name in chosen] + [None, None]
        spans = [
            (shard.file, *shard.span(start, stop, exact=e is not None))
            for shard, e in zip(shards, known, strict=True)
        ]
        out = [hidden[:, column] for column in range(len(chosen))]
        if whole:
            out = [np.empty((stop - start, self.states, self.hidden_size), np.uint16)] if chosen else []
        # memory of one column that has the others between its rows
        rows = [x if x.flags.c_contiguous else np.empty(x.shape, x.dtype) for x in (*out, ids, mask)]
        for shard, window, filled, e in zip(shards, self.objects.windows(spans), rows, known, strict=True):
            shard.read(window, start, stop, filled.data.cast("B"), e)
        if whole:
            hidden[:] = rows[0][:, list(wanted)] if chosen else hidden
        else:
            for into, filled in zip(out, rows, strict=False):
                if into is not filled:
                    into[:] = filled

    def masked_in(self, number: int) -> np.ndarray:
        """Tokens of a part that the target would have to produce, held-out documents left out; uint32 [N].

        Reads the part's ids and mask at once, and no states.

        Args:
            number: of the part in the manifest.

        Raises:
            StoreCorruptError: an object is missing, short or altered.
        """
        tokens = self.manifest["parts"][number]["tokens"]
        part = self._part(number)
        ids, mask = np.empty(tokens, np.uint32), np.empty(tokens, np.uint8)
        shards = part["input_ids"], part["loss_mask"]
        windows = self.objects.windows([(shard.file, *shard.span(0, tokens)) for shard in shards])
        for shard, window, out in zip(shards, windows, (ids, mask), strict=True):
            shard.read(window, 0, tokens, out.data.cast("B"))
        wanted = np.zeros(tokens, bool)
        chosen = (self._index["part"] == number) & ~self.held_out
        for first, length in zip(self._index["start"][chosen], self.length[chosen], strict=True):
            wanted[int(first) : int(first) + int(length)] = True
        return ids[wanted & mask.view(bool)]

    def _part(self, number: int) -> dict[str, Shard]:
        with self._lock:
            part = self._parts.get(number)
            if part is not None:
                self._parts.move_to_end(number)
                return part
        part = open_part(self.objects, self.manifest["parts"][number])
        with self._lock:
            self._parts[number] = part
            while len(self._parts) * len(part) > OPEN_FILES and len(self._parts) > 1:
                self._parts.popitem(last=False)
        return part

    def verify(self) -> "list[Problem]":
        """Check every byte of this manifest version; returns what is wrong, nothing if all is well."""
        from featurestore.check import verify

        return verify(self).problems


def open_store(path: str | os.PathLike[str], version: int | None = None) -> FeatureStore:
    """Open a published store at its newest manifest version, or a given one.

    Raises:
        StoreNotFoundError: not a store, or nothing published.
        StoreVersionError: written in a newer format.
        StoreCorruptError: manifest or index are damaged.
    """
    objects = open_objects(path)
    require_root(objects)
    return FeatureStore(objects, read_manifest(objects, version))
