"""Atomic writes, content hashes and checksums: everything on disk is published last, by rename.

A hash (sha256) says what a thing is. A checksum says whether it is still what was written: crc32c, as in the
feature store, ten times as fast, and one for each block, so that a reader of a part need not read the rest.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import InputError, Layer61Error

__all__ = [
    "BLOCK",
    "Checksum",
    "atomic_write",
    "block_buffer",
    "check_block",
    "check_size",
    "checksum",
    "explain_full_disk",
    "fsync_directory",
    "read_blocks",
    "read_json",
    "sha256_file",
    "sha256_json",
    "verify_files",
    "write_json",
]

# bytes under one checksum
BLOCK = 16 << 20


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` beside `path`, fsync, and rename over it; a reader sees the old bytes or the new ones."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as indented JSON with a final newline, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises OSError or ValueError, which the caller turns into its own message."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON form (sorted keys, no spaces) of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Checksum:
    """Size of a file and crc32c of each of its blocks, counted up while it is written or read."""

    def __init__(self) -> None:
        self.size = 0
        self._done: list[str] = []
        self._crc = 0

    def update(self, data: memoryview) -> None:
        """Go over the next bytes of the file."""
        # 40 ms that commands which check nothing need not wait for
        from awscrt.checksums import crc32c

        while data:
            piece = data[: BLOCK - self.size % BLOCK]
            self._crc = crc32c(piece, self._crc)
            self.size += len(piece)
            data = data[len(piece) :]
            if self.size % BLOCK == 0:
                self._done.append(f"{self._crc:08x}")
                self._crc = 0

    def entry(self) -> dict[str, Any]:
        """{"bytes", "crc32c": 8 hex digits a block}, as a list of files keeps it."""
        last = [f"{self._crc:08x}"] if self.size % BLOCK else []
        return {"bytes": self.size, "crc32c": "".join(self._done + last)}


def block_buffer() -> memoryview:
    """Memory for one block; it begins at a page, into which the system copies twice as fast as elsewhere."""
    return memoryview(mmap.mmap(-1, BLOCK))


def read_blocks(file: BinaryIO) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each block of a file; the bytes are valid until the next one is asked for."""
    buffer = block_buffer()
    for index in itertools.count():
        # the disk fetches the next block while this one is looked at
        os.posix_fadvise(file.fileno(), (index + 1) * BLOCK, BLOCK, os.POSIX_FADV_WILLNEED)
        count = 0
        while count < BLOCK and (more := file.readinto(buffer[count:])):  # type: ignore[attr-defined]
            count += more
        if not count:
            return
        yield index, buffer[:count]


def checksum(path: Path) -> dict[str, Any]:
    """The entry of a file on disk."""
    found = Checksum()
    with open(path, "rb", buffering=0) as f:
        for _, block in read_blocks(f):
            found.update(block)
    return found.entry()


def check_size(path: Path, entry: Mapping[str, Any] | int) -> None:
    """Raises InputError if a file is missing or has another size than its entry says."""
    size = entry["bytes"] if isinstance(entry, Mapping) else entry
    if not path.is_file():
        raise InputError(f"{path} is missing")
    if path.stat().st_size != size:
        raise InputError(f"{path} is damaged: it has {path.stat().st_size:,} bytes, expected {size:,}")


def check_block(path: Path, entry: Mapping[str, Any], index: int, data: memoryview) -> None:
    """Compare a block of a file with its checksum.

    Raises:
        InputError: other bytes than were written.
    """
    checksum = Checksum()
    checksum.update(data)
    if checksum.entry()["crc32c"] != entry["crc32c"][8 * index : 8 * index + 8]:
        start = index * BLOCK
        raise InputError(f"{path} is damaged: bytes {start:,} to {start + len(data):,} fail their checksum")


def verify_files(directory: Path, files: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Read files and compare them with what was noted when they were written.

    Args:
        directory: where they lie.
        files: name to size and checksums (`Checksum.entry`), or to a size alone where no more was noted.
        names: which of them; all by default.

    Raises:
        InputError: one is missing, has another size or other bytes; names it.
    """
    for name in files if names is None else names:
        path, entry = Path(directory) / name, files[name]
        check_size(path, entry)
        if isinstance(entry, Mapping):
            with open(path, "rb", buffering=0) as f:
                for index, block in read_blocks(f):
                    check_block(path, entry, index, block)


@contextlib.contextmanager
def explain_full_disk(what: str, path: Path, kept: str) -> Iterator[None]:
    """Turn "no space" while something is written into a message that says what is free and what is kept.

    Args:
        what: what is written, for "no space for ...".
        path: where; parents that are missing do not matter.
        kept: what is not lost, for the hint.

    Raises:
        Layer61Error: the disk, the quota or the largest size of a file is reached.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        place = Path(path).absolute()
        while not place.is_dir():
            place = place.parent
        free = shutil.disk_usage(place).free
        raise Layer61Error(
            f"no space for {what} in {path}: {error.strerror}",
            f"{free:,} bytes are free there; make room and start again: {kept}",
        ) from None


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
