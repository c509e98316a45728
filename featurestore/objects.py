"""Where objects lie: what a store asks of a directory (local.py) and of a bucket (remote.py).

Names are relative to the store and use `/`. A missing object raises FileNotFoundError, a create-only write of
an existing one FileExistsError, everything else a StoreError.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from configs.errors import StoreError
from featurestore.local import LocalObjects

__all__ = ["Objects", "RangeFile", "Stream", "Window", "open_objects"]


class Window(Protocol):
    """A readable span of one object."""

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers` in order from absolute `offset`; EOFError if the object ends before that."""


class RangeFile(Window, Protocol):
    """An open object."""

    size: int

    def window(self, offset: int, length: int) -> Window:
        """A span about to be read in pieces; a remote object is asked for it once."""


class Stream(Protocol):
    """An object being written."""

    def write(self, buffers: Sequence[Any]) -> None:
        """Append `buffers` in order: bytes, bytearrays or memoryviews."""

    def close(self) -> None:
        """Finish the object."""

    def abort(self) -> None:
        """Stop writing; what was written is left for `delete`."""


class Objects(Protocol):
    """The objects of one store."""

    url: str
    read_around: bool
    """Whether a local file may be read beyond what is asked for, in large pages; else exactly that."""

    def read(self, name: str) -> bytes:
        """All bytes of an object."""

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        """Publish an object, atomically and durably; with `create` only if it is new."""

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Write objects that nothing refers to yet; durable after `sync` or `commit`."""

    def stream(self, name: str) -> Stream:
        """Write one such object piece by piece."""

    def sync(self, prefix: str) -> None:
        """Wait until everything below `prefix` is durable."""

    def open(self, name: str, size: int | None = None) -> RangeFile:
        """Open an object for reading; `size`, where known, saves a bucket a request."""

    def windows(self, spans: Sequence[tuple[Any, int, int]]) -> Sequence[Window]:
        """Spans (open object, offset, length) about to be read, all asked for at the same time."""

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""

    def empty(self) -> bool:
        """Whether nothing is there yet."""

    def entries(self, prefix: str) -> list[tuple[str, int]]:
        """Name and size in bytes of every object below `prefix`, in order of name."""

    def directories(self, prefix: str) -> list[str]:
        """Names of the directories directly below `prefix`, in order; none if it does not exist."""

    def delete(self, prefix: str) -> None:
        """Remove an object, or everything below `prefix`; what is gone already is no error."""

    def modified(self, prefix: str) -> float:
        """Newest change below `prefix`, in seconds since the epoch."""

    def commit(self, staging: str, final: str) -> None:
        """Make a finished directory the part `final`, all at once; FileExistsError if the name is taken."""

    def move(self, prefix: str, to: str) -> None:
        """Rename everything below `prefix`."""

    def copy_from(self, other: "Objects", prefix: str, to: str) -> None:
        """Add what another store has below `prefix` as `to`, without moving its data through here."""


def open_objects(url: str | os.PathLike[str] | Objects, *, durable: bool = True) -> Objects:
    """Objects of a path, `file://`, `memory://`, `s3://`, `gs://` or `az://` URL; creates nothing."""
    if not isinstance(url, str | os.PathLike):
        return url
    text = os.fspath(url)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc or parts.fragment or parts.query:
            raise StoreError(
                f"{text} is not a usable file URL", "write file:///absolute/path, or just the path"
            )
        return LocalObjects(unquote(parts.path), durable)
    if not scheme:
        return LocalObjects(text, durable)
    from featurestore.remote import RemoteObjects

    return RemoteObjects(text)
