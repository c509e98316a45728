"""Objects of a directory: written beside their name and renamed, synced before they count as committed."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import StoreError

__all__ = ["LocalObjects"]

NOWAIT = getattr(os, "RWF_NOWAIT", 0)
DIRECT = getattr(os, "O_DIRECT", 0)
BUFFER_BYTES = 4 << 20  # of a file being written, which has two
BLOCK_BYTES = 4096  # what is written past the page cache begins and ends at multiples of it
PARTIAL = ".partial"


@contextlib.contextmanager
def _explained(doing: str, path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = path
            while not os.path.isdir(place):
                place = os.path.dirname(place)
            free = shutil.disk_usage(place).free
            hint = f"{free:,} bytes are free there; make room and start again: committed parts are untouched"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "check the permissions of that path, or choose another one"
        elif error.errno == errno.ENOTDIR:
            hint = "a store is a directory"
        raise StoreError(f"cannot {doing} {path}: {error.strerror}", hint) from error


@functools.cache
def _sync_file_range() -> Any:
    function = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def _start_writing(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write a range to disk, so that the commit waits less; only a hint."""
    function = _sync_file_range()
    if function is not None and length:
        function(fd, offset, length, 2)  # SYNC_FILE_RANGE_WRITE


def _memory() -> np.ndarray:
    """A buffer that begins with a page."""
    memory = mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _walk(path: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that raises what it cannot list; directories that are gone by then are left out."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    with _explained("list", path):
        yield from os.walk(path, onerror=refuse)


def _temporary(file: str) -> bool:
    """Whether a file is one that `write` has yet to name; another process may remove it at any moment."""
    return file.startswith(".") and file.endswith(PARTIAL)


class LocalFile:
    """An open file; its descriptor closes with the last reference, so that a cache may drop it while read."""

    def __init__(self, path: str, read_around: bool = True) -> None:
        self.fd, self.read_around = -1, read_around
        with _explained("read", path):
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self.fd).st_size
            advice = os.POSIX_FADV_SEQUENTIAL if read_around else os.POSIX_FADV_RANDOM
            os.posix_fadvise(self.fd, 0, 0, advice)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def window(self, offset: int, length: int) -> "LocalFile":
        """Pieces are read straight from the file; has the kernel fetch the whole span if it is not cached."""
        if not self.read_around:
            try:
                os.preadv(self.fd, [bytearray(1)], offset + length // 2, NOWAIT)
            except BlockingIOError:
                os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)
            except OSError:  # a file system without such reads
                pass
        return self

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        want = sum(map(len, buffers))
        found = os.preadv(self.fd, buffers, offset)
        while found != want:  # interrupted, or at the end of the file
            rest, skip = [], found
            for view in buffers:
                if skip < len(view):
                    rest.append(view[skip:])
                skip = max(0, skip - len(view))
            n = os.preadv(self.fd, rest, offset + found)
            if n <= 0:
                raise EOFError
            found += n


class LocalStream:
    """A file being written; a durable one goes to the disk past the page cache, a buffer at a time.

    A dump is larger than memory: its pages would be filled, written and thrown away, which takes a processor
    three times as long as the copy into a buffer, and all that was left of them would be waited for at the
    commit. While one buffer is on its way the next is filled. What does not fill one, and file systems that
    refuse, go through the page cache.

    Args:
        path: of the file, which must not be there.
        pool: a thread that writes buffers; None where nothing need be durable.
    """

    def __init__(self, path: str, pool: ThreadPoolExecutor | None) -> None:
        self.path, self.pool = path, pool
        with _explained("write", path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.buffer: np.ndarray | None = None if pool is None else _memory()
        self.spare: np.ndarray | None = None
        self.filled = self.written = 0
        self.direct: bool | None = None  # not tried yet
        self.pending: Future[None] | None = None

    def write(self, buffers: Sequence[Any]) -> None:
        data = [memoryview(b).cast("B") for b in buffers]
        with _explained("write", self.path):
            if self.buffer is None:
                self._write(data)
                return
            for piece in data:
                done = 0
                while done < len(piece):
                    part = piece[done : done + BUFFER_BYTES - self.filled]
                    self.buffer[self.filled : self.filled + len(part)] = part
                    done += len(part)
                    self.filled += len(part)
                    if self.filled == BUFFER_BYTES:
                        self._swap()

    def _swap(self) -> None:
        """Have the full buffer written, and go on with the other."""
        assert self.pool is not None
        assert self.buffer is not None
        if self.direct is None:
            self._set_direct(bool(DIRECT))
        self._wait()
        self.pending = self.pool.submit(self._empty, self.buffer.data)
        self.buffer, self.spare = _memory() if self.spare is None else self.spare, self.buffer
        self.filled = 0

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _empty(self, rest: memoryview) -> None:
        """Write a buffer, directly as far as whole blocks go."""
        if self.direct:
            whole = len(rest) - len(rest) % BLOCK_BYTES
            found = 0
            try:
                found = os.write(self.fd, rest[:whole])
                self.written += found
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            rest = rest[found:]
            if rest:  # the end, or a file system with larger blocks
                self._set_direct(False)
        start = self.written
        self._write([rest])
        _start_writing(self.fd, start, self.written - start)

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | DIRECT if direct else flags & ~DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            direct = False
        self.direct = direct

    def _write(self, data: list[memoryview]) -> None:
        data = [piece for piece in data if piece]
        while data:  # a write may be short
            n = os.writev(self.fd, data[:1000])
            self.written += n
            while data and n >= len(data[0]):
                n -= len(data.pop(0))
            if n:
                data[0] = data[0][n:]

    def close(self) -> None:
        with _explained("write", self.path):
            self._wait()
            if self.buffer is not None and self.filled:
                self._empty(self.buffer.data[: self.filled])
        self.abort()

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._wait()
        self.buffer = self.spare = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class LocalObjects:
    def __init__(self, root: str, durable: bool = True) -> None:
        self.root = os.path.abspath(root)
        self.url = str(root)
        self.durable = durable
        self.read_around = True

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def read(self, name: str) -> bytes:
        with _explained("read", self._path(name)):
            return Path(self._path(name)).read_bytes()

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        path = self._path(name)
        directory, base = os.path.split(path)
        partial = os.path.join(directory, f".{base}.{os.urandom(4).hex()}{PARTIAL}")
        with _explained("write", path):
            os.makedirs(directory, exist_ok=True)
            try:
                with open(partial, "wb") as f:
                    f.write(data)
                    f.flush()
                    if self.durable:
                        os.fsync(f.fileno())
                if create:
                    os.link(partial, path)
                else:
                    os.replace(partial, path)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
            if self.durable:
                _sync(directory)

    def stream(self, name: str) -> LocalStream:
        return LocalStream(self._path(name), self._pool if self.durable else None)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="layer61-disk")

    def put(self, objects: Mapping[str, bytes]) -> None:
        for name, data in objects.items():
            stream = self.stream(name)
            try:
                stream.write([data])
                stream.close()
            finally:
                stream.abort()

    def sync(self, prefix: str) -> None:
        """Wait until everything below `prefix` is on disk; in parallel, so that a journal commits once."""
        if not self.durable:
            return
        paths = []
        for directory, _, files in _walk(self._path(prefix)):
            paths += [os.path.join(directory, file) for file in files if not _temporary(file)] + [directory]
        with _explained("write", self._path(prefix)), ThreadPoolExecutor(len(paths)) as pool:
            list(pool.map(_sync, paths))

    def open(self, name: str, size: int | None = None) -> LocalFile:
        return LocalFile(self._path(name), self.read_around)

    def windows(self, spans: Sequence[tuple[LocalFile, int, int]]) -> list[LocalFile]:
        return [file.window(offset, length) for file, offset, length in spans]

    def exists(self, name: str) -> bool:
        with _explained("look at", self._path(name)):
            try:
                os.stat(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def empty(self) -> bool:
        with _explained("list", self.root):
            try:
                return all(name.startswith(".") for name in os.listdir(self.root))
            except FileNotFoundError:
                return True

    def entries(self, prefix: str) -> list[tuple[str, int]]:
        found = []
        for directory, _, files in _walk(self._path(prefix)):
            for file in (file for file in files if not _temporary(file)):
                path = os.path.join(directory, file)
                with contextlib.suppress(FileNotFoundError):
                    found.append((os.path.relpath(path, self.root), os.path.getsize(path)))
        return sorted(found)

    def directories(self, prefix: str) -> list[str]:
        path = self._path(prefix)
        with _explained("list", path):
            try:
                with os.scandir(path) as entries:
                    return sorted(e.name for e in entries if e.is_dir())
            except FileNotFoundError:
                return []

    def delete(self, prefix: str) -> None:
        path = self._path(prefix)
        with _explained("delete", path):
            if os.path.isdir(path):
                # out of sight first: a delete that is cut short leaves nothing that looks committed
                gone = f"{path}.{os.urandom(4).hex()}.deleted"
                with contextlib.suppress(FileNotFoundError):  # someone else was faster
                    os.rename(path, gone)
                    shutil.rmtree(gone)
            elif os.path.exists(path):
                os.unlink(path)

    def modified(self, prefix: str) -> float:
        """Newest change below `prefix`, in seconds since the epoch; infinite if it is gone."""
        try:
            times = [os.stat(self._path(prefix)).st_mtime]
        except FileNotFoundError:
            return math.inf
        for directory, names, files in _walk(self._path(prefix)):
            for name in [*names, *files]:
                with contextlib.suppress(FileNotFoundError):
                    times.append(os.stat(os.path.join(directory, name)).st_mtime)
        return max(times)

    def commit(self, staging: str, final: str) -> None:
        """Move a finished directory to its name, all at once; FileExistsError if the name is taken."""
        source, target = self._path(staging), self._path(final)
        self.sync(staging)
        with _explained("commit", target):
            try:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.rename(source, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if os.path.exists(os.path.join(target, "zarr.json")):
                    raise FileExistsError(target) from None
                # a part that lost its metadata is none; out of the way, where `collect` finds it
                os.rename(target, f"{target}.{os.urandom(4).hex()}")
                self.commit(staging, final)
        if self.durable:
            _sync(os.path.dirname(target))
            _sync(self.root)

    def move(self, prefix: str, to: str) -> None:
        with _explained("move", self._path(prefix)):
            os.makedirs(os.path.dirname(self._path(to)), exist_ok=True)
            os.rename(self._path(prefix), self._path(to))

    def copy_from(self, other: Any, prefix: str, to: str) -> None:
        """Link every object below `prefix` of another local store to `to` here; no data is copied."""
        if not isinstance(other, LocalObjects):
            raise StoreError(
                f"cannot merge {other.url} into {self.url} without copying it", "copy it beside that first"
            )
        try:
            for name, _ in other.entries(prefix):
                target = self._path(to + name[len(prefix) :])
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.link(other._path(name), target)
        except OSError as error:
            raise StoreError(
                f"cannot link {other.url}/{prefix} into {self.url}: {error.strerror}",
                "both stores must lie on one file system; copy one beside the other first",
            ) from error
