"""Writing: documents stream into one open part, which appears whole when it is committed.

Many writers may add parts to one store at the same time; they share nothing but the directory. A part being
written lies in a staging directory of its own; what a killed writer leaves there is ignored by every reader
and removed by `featurestore.collect`.
"""

import functools
import json
import operator
import os
import re
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any

import numpy as np
import torch
from awscrt.checksums import crc32c

from configs.contract import require_same
from configs.errors import InputError, PartExistsError, StoreCorruptError, StoreError, StoreNotFoundError
from featurestore.layout import (
    CRC_BYTES,
    SCHEMA,
    VERIFY_HINT,
    check_name,
    chunk_stride,
    dump_json,
    group_metadata,
    hidden_chunk_tokens,
    object_path,
    part_arrays,
    token_shards,
    unseal_group,
)
from featurestore.objects import Objects, Stream, open_objects

__all__ = ["StoreWriter", "committed_parts", "part_exists", "read_root"]

PART_BYTES = 1 << 30


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "numpy", "awscrt")}


class ShardWriter:
    """Streams rows into one Zarr shard object: chunks, each with its crc32c, then the index.

    Rows go from the caller's memory to the object without a copy: the checksum of an unfinished chunk is
    carried over to the next call. Compressed chunks are gathered first.
    """

    def __init__(
        self, stream: Stream, row_bytes: int, chunk_rows: int, compress: Callable | None = None
    ) -> None:
        self.stream, self.row_bytes = stream, row_bytes
        self.chunk_bytes = row_bytes * chunk_rows
        self.padding = bytes(chunk_stride(self.chunk_bytes) - self.chunk_bytes - CRC_BYTES)
        self.compress = compress
        self.filled = 0  # bytes of the open chunk
        self.crc = 0  # of the open chunk
        self.gathered = bytearray()  # the open chunk, if it is to be compressed
        self.index: list[tuple[int, int]] = []
        self.crcs: list[int] = []
        self.position = 0

    def append(self, rows: memoryview) -> None:
        """Add whole rows, given as bytes."""
        done = 0
        while done < len(rows):
            piece = rows[done : done + self.chunk_bytes - self.filled]
            done += len(piece)
            self.filled += len(piece)
            if self.compress:
                self.gathered += piece
            else:
                self.crc = crc32c(piece, self.crc)
            if self.filled < self.chunk_bytes:
                if not self.compress:
                    self.stream.write([piece])
                return
            if self.compress:
                self._finish_compressed()
            else:
                self._finish(piece, self.chunk_bytes, self.padding)

    def _finish(self, last: Any, length: int, padding: bytes) -> None:
        trailer = self.crc.to_bytes(CRC_BYTES, "little") + padding
        self.stream.write([last, trailer])
        self.index.append((self.position, length + CRC_BYTES))
        self.crcs.append(self.crc)
        self.position += length + len(trailer)
        self.filled = self.crc = 0

    def _finish_compressed(self) -> None:
        assert self.compress is not None
        data = self.compress(self.gathered)
        self.gathered = bytearray()
        self.crc = crc32c(data)
        self._finish(data, len(data), b"")

    def close(self) -> tuple[int, int]:
        """Pad the last chunk, write the index and close; returns the size and the checksum of the object.

        The checksum is the crc32c of those of the chunks, in order.
        """
        if self.filled:
            self.append(memoryview(bytes(self.chunk_bytes - self.filled)))
        index = np.array(self.index, "<u8").tobytes()
        index += crc32c(index).to_bytes(CRC_BYTES, "little")
        self.stream.write([index])
        self.stream.close()
        return self.position + len(index), crc32c(np.array(self.crcs, "<u4").tobytes())


class StoreWriter:
    """Appends documents to a store, one part at a time.

    The store is created if the path holds nothing. Opening checks the contract; nothing is written before
    that. Used as a context manager it commits at the end of the block and discards the open part when the
    block raises.

    Args:
        path: local path, or s3://, gs://, file:// or memory:// URL.
        contract: JSON object that says what the states are; equal in every part of a store.
        writer: name of this writer, part of its part names.
        run: name of this run, the first piece of the part names; random by default.
        part: exact name of the one part to write, for work that must be harmless to repeat.
        compression: `none` or `zstd` (level 1, `hidden` only).
        part_bytes: bytes of states after which a part is committed and the next begun; not with `part`.
        durable: wait for the disk before a part is committed; without it a part survives the death of the
            process, not that of the machine.

    Raises:
        ContractError: the store holds states made under another contract.
        PartExistsError: `part` is committed already.
        StoreError: the path cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        contract: dict[str, Any],
        writer: str = "w000",
        *,
        run: str | None = None,
        part: str | None = None,
        compression: str = "none",
        part_bytes: int = PART_BYTES,
        durable: bool = True,
    ) -> None:
        if compression not in ("none", "zstd"):
            raise InputError(f"compression {compression!r} is unknown", "use none or zstd")
        self.contract = json.loads(json.dumps(contract))
        self.compression, self.part_bytes = compression, part_bytes
        self.writer = check_name(writer, "writer")
        self.run = check_name(run or os.urandom(4).hex(), "run")
        self.exact = check_name(part, "part") if part is not None else None
        self._objects = open_objects(path, durable=durable)
        self.url = self._objects.url
        self._sequence = 0
        root = read_root(self._objects)
        if root is None and not self._objects.empty():
            root = read_root(self._objects)  # another writer may just have made it
            if root is None:
                raise StoreError(
                    f"{self.url} is neither empty nor a feature store", "choose a new or empty directory"
                )
        if root is not None:
            hint = "write to another store, or dump with the settings of this one"
            require_same(self.contract, root["contract"], f"this writer and store {self.url}", hint=hint)
            if self.exact and part_exists(self._objects, self.exact):
                raise _exists(self.exact, self.url)
        else:
            self._create_root()
        self._reset()

    def _create_root(self) -> None:
        record = {"schema": SCHEMA, "contract": self.contract}
        try:
            self._objects.write("zarr.json", dump_json(group_metadata(record)), create=True)
        except FileExistsError:  # another writer was first
            root = read_root(self._objects)
            assert root is not None
            require_same(
                self.contract, root["contract"], f"this writer and store {self.url}", hint="use another store"
            )

    def _reset(self) -> None:
        self._name = self.exact or ""
        self._staging: str | None = None
        self._shards: dict[str, ShardWriter] = {}
        self._uids: dict[int, None] = {}
        self._offsets = [0]
        self._crcs = [0]  # of the open chunk of `hidden` at the documents' edges; see docs/store.md
        self._n_loss: list[int] = []
        self._held_out: list[int] = []
        self._sources: dict[str, int] = {}
        self._sample_source: list[int] = []
        self._rejected: dict[int, str] = {}
        self._shape: tuple[int, int] | None = None  # states, hidden_size
        self._broken = False

    @property
    def documents(self) -> int:
        """Documents of the open part."""
        return len(self._n_loss)

    @property
    def tokens(self) -> int:
        """Tokens of the open part."""
        return self._offsets[-1]

    def append(
        self,
        uid: int,
        input_ids: Any,
        loss_mask: Any,
        hidden: Any,
        source: str = "",
        held_out: bool = False,
    ) -> None:
        """Add one document of T tokens to the open part.

        Args:
            uid: stable 64-bit number of the document, unique in the part.
            input_ids: integers [T] below 2**32, numpy or torch.
            loss_mask: [T], bool or 0/1; 1 where the token is one the target would have to produce.
            hidden: torch.bfloat16 [T, S, D] in host memory, or its bits as numpy uint16.
            source: where the document comes from, for totals by source.
            held_out: kept from training.

        Raises:
            InputError: shapes, dtypes or uid do not fit; the open part is unchanged.
            StoreError: writing failed; the open part is lost, committed parts are not.
        """
        if self._broken:
            raise self._lost()
        ids = _vector(input_ids, f"document {uid}: input_ids", np.uint32)
        mask = _vector(loss_mask, f"document {uid}: loss_mask", np.uint8)
        if mask.size and mask.max() > 1:
            raise InputError(f"document {uid}: loss_mask holds values other than 0 and 1")
        bits = _bits(hidden, f"document {uid}: hidden")
        if not (len(ids) == len(mask) == len(bits)):
            raise InputError(
                f"document {uid}: input_ids has {len(ids)} tokens, loss_mask {len(mask)}, hidden {len(bits)}"
            )
        if len(ids) == 0:
            raise InputError(f"document {uid} is empty", "leave documents without tokens out")
        try:
            uid = operator.index(uid)
            str(source).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(
                f"document {uid!r} of source {source!r}: {error}", "a uid is a whole number, a source is text"
            ) from None
        if not 0 <= uid < 1 << 64:
            raise InputError(f"uid {uid} is outside 0 to 2**64 - 1")
        if uid in self._uids:
            raise InputError(f"document {uid} is in this part already", "give every document its own uid")
        self._check_shape(uid, bits.shape[1:])
        try:
            if self._staging is None:
                self._begin(bits.shape[1:])
            states = self._state_shards()
            for shard, column in zip(states, np.split(bits, len(states), 1), strict=True):
                shard.append(np.ascontiguousarray(column).data.cast("B"))
            self._shards["input_ids"].append(ids.data.cast("B"))
            self._shards["loss_mask"].append(mask.data.cast("B"))
        except BaseException as error:
            self._broken = True
            self._say_lost(error)
            raise
        self._uids[uid] = None
        self._offsets.append(self._offsets[-1] + len(ids))
        self._crcs.append(self._state_shards()[-1].crc)
        self._n_loss.append(int(mask.sum(dtype=np.int64)))
        if held_out:
            self._held_out.append(len(self._n_loss) - 1)
        self._sample_source.append(self._sources.setdefault(str(source), len(self._sources)))
        if self.exact is None and sum(s.position for s in self._state_shards()) >= self.part_bytes:
            self.commit()

    def reject(self, uid: int, reason: str) -> None:
        """Note in the open part that a document was found bad and why, so that it is not taken again."""
        self._rejected[uid] = reason

    def _lost(self) -> StoreError:
        return StoreError(
            f"an earlier failure lost the open part of {self.url}", "write it again with a new writer"
        )

    def _say_lost(self, error: BaseException) -> None:
        if isinstance(error, StoreError):
            error.message += f"; part {self._name} is lost, with {self.documents:,} documents"

    def _check_shape(self, uid: int, shape: tuple[int, ...]) -> None:
        states = self.contract.get("states")
        target = self.contract.get("target")
        width = target.get("hidden_size") if isinstance(target, dict) else None
        expected = self._shape or (
            len(states) if isinstance(states, list) else shape[0],
            width if isinstance(width, int) else shape[1],
        )
        if tuple(shape) != tuple(expected):
            raise InputError(
                f"document {uid}: hidden has {shape[0]} states of width {shape[1]},"
                f" not {expected[0]} of width {expected[1]}",
                "every document of a store has the states its contract names",
            )

    def _begin(self, shape: tuple[int, ...]) -> None:
        self._shape = (shape[0], shape[1])
        self._name = self._next_name()
        self._staging = f"parts/{self._name}.{os.urandom(4).hex()}"
        # each state in an object of its own, so that one of them is read without the others
        self._layout = {"states": shape[0], "hidden_size": shape[1]}
        if (shards := self._split(shape[0])) > 1:
            self._layout["state_shards"] = shards
        self._layout["chunk_tokens"] = hidden_chunk_tokens(shape[0] // shards * shape[1] * 2)
        compress = None
        if self.compression == "zstd":
            from numcodecs import Zstd

            compress = Zstd(level=1).encode
        for array, (row_bytes, chunk) in token_shards(self._layout).items():
            stream = self._objects.stream(f"{self._staging}/{object_path(array)}")
            codec = compress if array.startswith("hidden") else None
            self._shards[array] = ShardWriter(stream, row_bytes, chunk, codec)

    def _split(self, states: int) -> int:
        """Objects into which the states of a token are divided."""
        return states

    def _state_shards(self) -> list[ShardWriter]:
        return [shard for array, shard in self._shards.items() if array.startswith("hidden")]

    def _next_name(self) -> str:
        if self.exact is not None:
            return self.exact
        while True:
            name = f"{self.run}-{self.writer}-{self._sequence:06d}"
            self._sequence += 1
            if not part_exists(self._objects, name):
                return name

    def commit(self) -> str | None:
        """Close the open part and make it exist; returns its name, None if there was nothing to commit.

        A writer with an exact part name commits a part even without documents, so that the work it stands for
        counts as done.

        Raises:
            PartExistsError: another writer committed a part of that name first; this one's is discarded.
            StoreError: writing failed, or something removed what was written; the open part is lost.
        """
        if self._broken:
            raise self._lost()
        if self._staging is None:
            if self.exact is None:
                return None
            self._staging = f"parts/{self._name}.{os.urandom(4).hex()}"
        try:
            self._write_metadata(self._staging)
            self._objects.commit(self._staging, f"parts/{self._name}")
        except FileExistsError:
            name, documents = self._name, self.documents
            self.discard()
            if self.exact is not None:
                raise _exists(name, self.url) from None
            raise PartExistsError(
                f"another writer committed part {name} of {self.url} first: {documents:,} documents are lost",
                "give every writer of a run its own name, and write these documents again",
            ) from None
        except BaseException as error:
            self._broken = True
            self._say_lost(error)
            raise
        name = self._name
        self._reset()
        return name

    def _write_metadata(self, staging: str) -> None:
        tokens, documents = self.tokens, self.documents
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "name": self._name,
            "tokens": tokens,
            "documents": documents,
            **(self._layout if documents else {"states": 0, "hidden_size": 0, "chunk_tokens": 0}),
            "compression": self.compression,
            "contract": self.contract,
            "provenance": {
                "run": self.run,
                "writer": self.writer,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": _versions(),
            },
            "objects": {},
            "n_loss": self._n_loss,
            "held_out": self._held_out,
            "sources": list(self._sources),
            "sample_source": self._sample_source,
        }
        if self._rejected:
            record["rejected"] = [[uid, reason] for uid, reason in self._rejected.items()]
        arrays, objects = part_arrays(record), record["objects"]
        small: dict[str, bytes] = {}
        table: list[int] = []
        for array, shard in self._shards.items():
            size, crc = shard.close()
            objects[object_path(array)] = {"bytes": size, "crc32c": f"{crc:08x}"}
            table += shard.crcs
        for array, values in {
            "sample_offset": np.array(self._offsets, "<u8"),
            "sample_crc32c": np.array(self._crcs, "<u4"),
            "sample_uid": np.fromiter(self._uids, "<u8", documents),
            "chunk_crc32c": np.array(table, "<u4"),
        }.items():
            if array not in arrays:  # a part without documents has none
                continue
            data = values.tobytes()
            crc = crc32c(data)
            data += crc.to_bytes(CRC_BYTES, "little")
            small[object_path(array)] = data
            objects[object_path(array)] = {"bytes": len(data), "crc32c": f"{crc:08x}"}
        for array, metadata in arrays.items():
            text = dump_json(metadata)
            small[f"{array}/zarr.json"] = text
            objects[f"{array}/zarr.json"] = {"bytes": len(text), "crc32c": f"{crc32c(text):08x}"}
        self._objects.put({f"{staging}/{name}": data for name, data in small.items()})
        there = dict(self._objects.entries(staging))
        gone = [name for name, entry in objects.items() if there.get(f"{staging}/{name}") != entry["bytes"]]
        if gone:
            raise StoreError(
                f"{self.url}: {staging}/{gone[0]} was removed or cut while it was being written",
                "another process cleaned up; write the part again",
            )
        self._objects.put({f"{staging}/zarr.json": dump_json(group_metadata(record, arrays))})

    def discard(self) -> None:
        """Throw the open part away."""
        staging = self._staging
        for shard in self._shards.values():
            shard.stream.abort()
        self._reset()
        if staging is not None:
            self._objects.delete(staging)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


def _vector(values: Any, name: str, dtype: Any) -> np.ndarray:
    array = values.numpy(force=True) if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {list(array.shape)}, not [T]")
    if array.dtype.kind not in "iub":
        raise InputError(f"{name} is {array.dtype}, not an integer type")
    limit = np.iinfo(dtype).max
    if array.size and (int(array.min()) < 0 or int(array.max()) > limit):
        raise InputError(f"{name} holds values outside 0 to {limit}")
    return np.ascontiguousarray(array, dtype)


def _bits(hidden: Any, name: str) -> np.ndarray:
    if isinstance(hidden, torch.Tensor):
        if hidden.dtype != torch.bfloat16:
            raise InputError(f"{name} is {hidden.dtype}, not torch.bfloat16")
        hidden = hidden.detach().cpu().contiguous().view(torch.uint16).numpy()
    array = np.asarray(hidden)
    if array.dtype != np.uint16:
        raise InputError(f"{name} is {array.dtype}, not torch.bfloat16 or numpy.uint16 bits")
    if array.ndim != 3 or 0 in array.shape[1:]:
        raise InputError(f"{name} has shape {list(array.shape)}, not [T, S, D]")
    return np.ascontiguousarray(array)


def _exists(name: str, url: str) -> PartExistsError:
    return PartExistsError(
        f"part {name} of {url} is committed already", "a part is written once; this work is done"
    )


def read_root(objects: Objects) -> dict[str, Any] | None:
    """The store's root record {schema, contract}; None if nothing is there.

    Raises:
        StoreNotFoundError: something else is there. StoreVersionError, StoreCorruptError: see `unseal`.
    """
    try:
        data = objects.read("zarr.json")
    except FileNotFoundError:
        return None
    try:
        is_store = "hidden_store" in json.loads(data)["attributes"]
    except (ValueError, KeyError, TypeError):
        is_store = False
    if not is_store:
        raise StoreNotFoundError(
            f"{objects.url} is not a feature store: its zarr.json is another group's", "check the path"
        )
    return unseal_group(data, "zarr.json", objects.url)


def part_exists(store: str | os.PathLike[str] | Objects, name: str) -> bool:
    """Whether a part of that name is committed."""
    objects = open_objects(store)
    if objects.exists(f"parts/{name}/zarr.json"):
        return True
    return objects.exists(f"commits/{name}")


def committed_parts(
    objects: Objects, known: Sequence[str] = (), bad: list[str] | None = None
) -> dict[str, str]:
    """Names and paths of the committed parts, in order of name.

    `parts/<name>` is committed when it holds `zarr.json`, `parts/<name>.<attempt>` when `commits/<name>` says
    so; names in `known` are taken to be committed without a look.

    Args:
        objects: the store.
        known: names to leave out.
        bad: takes the names of markers that do not name a part.

    Raises:
        StoreCorruptError: a marker does not name a part, and there is no `bad`.
    """
    skip = set(known)
    found = {}
    for directory in objects.directories("parts"):
        if "." not in directory and directory not in skip and objects.exists(f"parts/{directory}/zarr.json"):
            found[directory] = f"parts/{directory}"
    for marker, _ in objects.entries("commits"):
        name = marker.rsplit("/", 1)[-1]
        if "." in name or name in skip or name in found:
            continue
        path = objects.read(marker).decode(errors="replace")
        if re.fullmatch(rf"parts/{re.escape(name)}\.[0-9a-f]{{8}}", path):
            found[name] = path
        elif bad is not None:
            bad.append(name)
        else:
            raise StoreCorruptError(
                f"{marker} in {objects.url} does not name a part: {path!r}", VERIFY_HINT.format(objects.url)
            )
    return dict(sorted(found.items()))
