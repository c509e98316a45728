"""The format, version 1: names, shapes, metadata documents and the checksums that tie them together.

docs/store.md describes the same bytes in prose. Nothing here touches a disk.

Shapes: T tokens and N documents of one part, S states of a token, D width of a state, C chunks.
"""

import json
import re
import sys
from typing import Any

from awscrt.checksums import crc32c

from configs.errors import StoreCorruptError, StoreError, StoreVersionError

__all__ = [
    "INDEX_FIELDS",
    "SCHEMA",
    "TOKEN_CHUNK",
    "array_checksum",
    "array_metadata",
    "check_name",
    "chunk_count",
    "chunk_stride",
    "dump_json",
    "group_metadata",
    "hidden_chunk_tokens",
    "object_path",
    "part_arrays",
    "seal",
    "shard_bytes",
    "token_shards",
    "unseal",
    "unseal_group",
]

if sys.byteorder != "little":  # every array is viewed in place
    raise ImportError("featurestore needs a little-endian machine")

SCHEMA = 1
CHUNK_BYTES = 1 << 20
MAX_CHUNK_TOKENS = 64
TOKEN_CHUNK = 1024  # tokens of one chunk of input_ids and loss_mask
CRC_BYTES = 4
ALIGNMENT = 64  # of uncompressed chunks in a shard: unaligned copies out of the page cache cost a fifth more

# name, numpy type: one row a document, in manifest order
INDEX_FIELDS = (
    ("uid", "uint64"),
    ("part", "uint32"),
    ("start", "uint64"),
    ("length", "uint32"),
    ("n_loss", "uint32"),
    ("held_out", "uint8"),
    ("source", "uint32"),
    ("crc_before", "uint32"),
    ("crc_after", "uint32"),
)

VERIFY_HINT = "run `layer61 store verify {}` for a full list; with --repair bad parts are taken out"


def check_name(name: str, what: str) -> str:
    """Return `name` if it may stand in a part name, else raise StoreError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,120}", name):
        raise StoreError(
            f"{what} {name!r} is not a usable name", "use 1 to 120 letters, digits, hyphens and underscores"
        )
    return name


def hidden_chunk_tokens(row_bytes: int) -> int:
    """Tokens of one chunk of `hidden`: a power of two, about 1 MB, at most 64."""
    tokens = MAX_CHUNK_TOKENS
    while tokens > 1 and tokens * row_bytes > CHUNK_BYTES:
        tokens //= 2
    return tokens


def chunk_count(rows: int, chunk_rows: int) -> int:
    """Chunks of a shard of `rows` rows, the padded last one included."""
    return -(-rows // chunk_rows)


def chunk_stride(chunk_bytes: int) -> int:
    """Distance of two uncompressed chunks: the data, its crc32c, and zeros up to the alignment."""
    return -(-(chunk_bytes + CRC_BYTES) // ALIGNMENT) * ALIGNMENT


def shard_bytes(rows: int, row_bytes: int, chunk_rows: int) -> int:
    """Size of an uncompressed shard object: chunks, then the index and its checksum."""
    chunks = chunk_count(rows, chunk_rows)
    return chunks * chunk_stride(chunk_rows * row_bytes) + chunks * 16 + CRC_BYTES


def object_path(array: str) -> str:
    """Path of a data object below its group: of an array that is one object, or of one state of `hidden`.

    State s of a part that holds each state in an object of its own is called `hidden.s`, the first `hidden`.
    """
    name, _, state = array.partition(".")
    return f"hidden/c/0/{state or 0}/0" if name == "hidden" else f"{array}/c/0"


def token_shards(record: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Bytes of a row and rows of a chunk of every sharded object, in the order of the checksum table.

    Args:
        record: of a part, or its entry in a manifest.
    """
    shards = record.get("state_shards", 1)
    row = record["states"] // shards * record["hidden_size"] * 2
    hidden = {f"hidden.{s}" if s else "hidden": (row, record["chunk_tokens"]) for s in range(shards)}
    return hidden | {"input_ids": (4, TOKEN_CHUNK), "loss_mask": (1, TOKEN_CHUNK)}


def array_checksum(data: bytes | memoryview) -> int | None:
    """crc32c of an array stored as one chunk, without its last four bytes; None if those say otherwise.

    The checksum of data that ends in its own crc32c is the same whatever the data are, so checksums that
    identify an object always leave the stored ones out.
    """
    crc = crc32c(memoryview(data)[:-CRC_BYTES])
    return crc if len(data) >= CRC_BYTES and crc == int.from_bytes(data[-CRC_BYTES:], "little") else None


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}
ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}


def array_metadata(
    shape: list[int],
    dtype: str,
    dimensions: list[str],
    chunk_rows: int | None = None,
    zstd: bool = False,
    shards: int = 1,
) -> dict[str, Any]:
    """The `zarr.json` of an array that is one object, or of one that is cut along its second axis.

    Args:
        shape: shape of the array; its first axis is cut into chunks.
        dtype: Zarr data type.
        dimensions: one name an axis.
        chunk_rows: rows of a chunk inside the one shard; None stores a single unsharded chunk.
        zstd: compress the chunks with zstd level 1.
        shards: objects into which the second axis is cut.
    """
    codecs: list[dict[str, Any]] = [BYTES, *([ZSTD] if zstd else []), CRC32C]
    outer = [max(shape[0], 1), *shape[1:]]  # an axis without elements still has a chunk size
    if chunk_rows is not None:
        outer[0] = chunk_count(shape[0], chunk_rows) * chunk_rows
        if shards > 1:
            outer[1] //= shards
        sharding = {
            "chunk_shape": [chunk_rows, *outer[1:]],
            "codecs": codecs,
            "index_codecs": [BYTES, CRC32C],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype == "bfloat16" else 0,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": dimensions,
    }


def part_arrays(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `zarr.json` of every array of a part, which all follow from the part's record."""
    T, N, chunk_tokens = record["tokens"], record["documents"], record["chunk_tokens"]
    if not N:
        return {}
    chunks = sum(chunk_count(T, rows) for _, rows in token_shards(record).values())
    zstd, shards = record["compression"] == "zstd", record.get("state_shards", 1)
    shape, axes = [T, record["states"], record["hidden_size"]], ["token", "state", "channel"]
    return {
        "hidden": array_metadata(shape, "bfloat16", axes, chunk_tokens, zstd, shards),
        "input_ids": array_metadata([T], "uint32", ["token"], TOKEN_CHUNK),
        "loss_mask": array_metadata([T], "uint8", ["token"], TOKEN_CHUNK),
        "sample_offset": array_metadata([N + 1], "uint64", ["offset"]),
        "sample_crc32c": array_metadata([N + 1], "uint32", ["offset"]),
        "sample_uid": array_metadata([N], "uint64", ["sample"]),
        "chunk_crc32c": array_metadata([chunks], "uint32", ["chunk"]),
    }


def group_metadata(record: dict[str, Any], arrays: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `zarr.json` of a group that carries `record` as its sealed `hidden_store` attribute."""
    document: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"hidden_store": seal(record)},
    }
    if arrays is not None:
        document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
    return document


def dump_json(value: Any) -> bytes:
    """The bytes of a JSON document as the store writes it; without a last newline, so that any cut shows."""
    return json.dumps(value, ensure_ascii=False).encode()


def _crc_of(record: dict[str, Any]) -> str:
    canonical = {k: v for k, v in record.items() if k != "crc32c"}
    return f"{crc32c(json.dumps(canonical, sort_keys=True, separators=(',', ':')).encode()):08x}"


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with a `crc32c` field over its canonical JSON form."""
    return {**record, "crc32c": _crc_of(record)}


def unseal(data: bytes, what: str, url: str) -> dict[str, Any]:
    """Parse a sealed JSON object and check it.

    Raises:
        StoreCorruptError: it is not JSON, or its checksum differs.
        StoreVersionError: it was written in a format newer than this program.
    """
    try:
        record = json.loads(data)
    except ValueError as error:
        raise StoreCorruptError(f"{what} in {url} is not JSON: {error}", VERIFY_HINT.format(url)) from None
    return _checked(record, what, url)


def unseal_group(data: bytes, what: str, url: str) -> dict[str, Any]:
    """The sealed `hidden_store` attribute of a group's `zarr.json`; raises as `unseal`."""
    try:
        record = json.loads(data)["attributes"]["hidden_store"]
    except (ValueError, KeyError, TypeError):
        raise StoreCorruptError(
            f"{what} in {url} is not the metadata of a feature store", VERIFY_HINT.format(url)
        ) from None
    return _checked(record, what, url)


def _checked(record: Any, what: str, url: str) -> dict[str, Any]:
    schema = record.get("schema") if isinstance(record, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise StoreVersionError(
            f"{what} in {url} has format {schema}; this program knows formats up to {SCHEMA}",
            "use a newer layer61 to read this store",
        )
    if not isinstance(record, dict) or record.get("crc32c") != _crc_of(record):
        raise StoreCorruptError(f"{what} in {url} fails its checksum", VERIFY_HINT.format(url))
    return record
