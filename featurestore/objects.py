"""Where objects lie: a local directory, or an object store through obstore.

Both backends have the same methods. `write` publishes an object atomically and durably, and with `create`
only if it is new; `put` and `stream` write objects that nothing refers to yet, durable after `sync` or
`commit`. Names are relative to the store and use `/`. A missing object raises FileNotFoundError, a
create-only write of an existing one FileExistsError, everything else a StoreError.
"""

import contextlib
import ctypes
import errno
import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from configs.errors import StoreCorruptError, StoreError

__all__ = ["Objects", "RangeFile", "Stream", "Window", "open_objects"]

Buffer = Any  # bytes, bytearray or a memoryview of bytes

NOWAIT = getattr(os, "RWF_NOWAIT", 0)
WRITE_BEHIND = 16 << 20  # bytes after which a file being written is pushed towards the disk
PARTIAL = ".partial"
REMOTE_PIECE = 8 << 20  # bytes of one range request; longer ranges are fetched in parallel
REMOTE_THREADS = 16
REMOTE_TRIES = 6


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

    def write(self, buffers: Sequence[Buffer]) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class Objects(Protocol):
    """The objects of one store."""

    url: str
    read_around: bool
    """Whether a local file may be read beyond what is asked for, in large pages; else exactly that."""

    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes, *, create: bool = False) -> None: ...
    def put(self, objects: Mapping[str, bytes]) -> None: ...
    def stream(self, name: str) -> Stream: ...
    def sync(self, prefix: str) -> None: ...
    def open(self, name: str, size: int | None = None) -> RangeFile: ...
    def windows(self, spans: Sequence[tuple[Any, int, int]]) -> Sequence[Window]: ...
    def exists(self, name: str) -> bool: ...
    def empty(self) -> bool: ...
    def entries(self, prefix: str) -> list[tuple[str, int]]: ...
    def directories(self, prefix: str) -> list[str]: ...
    def delete(self, prefix: str) -> None: ...
    def modified(self, prefix: str) -> float: ...
    def commit(self, staging: str, final: str) -> str: ...
    def move(self, prefix: str, to: str) -> None: ...
    def copy_from(self, other: "Objects", prefix: str, to: str) -> None: ...


def open_objects(url: str | os.PathLike[str] | Objects, *, durable: bool = True) -> Objects:
    """Objects of a path, `file://`, `memory://`, `s3://`, `gs://` or `az://` URL; creates nothing."""
    if not isinstance(url, str | os.PathLike):
        return url
    text = os.fspath(url)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc or parts.fragment or parts.query:
            raise StoreError(f"{text} is not a usable file URL", "file:///absolute/path is, or just the path")
        return LocalObjects(unquote(parts.path), durable)
    if not scheme:
        return LocalObjects(text, durable)
    return RemoteObjects(text)


# ------------------------------------------------------------------ local


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
        """Reads pieces straight from the file; asks for the whole span at once if it is not in memory."""
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
    def __init__(self, path: str, durable: bool) -> None:
        self.path, self.durable = path, durable
        with _explained("write", path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.written = self.started = 0

    def write(self, buffers: Sequence[Buffer]) -> None:
        data = [memoryview(b).cast("B") for b in buffers]
        with _explained("write", self.path):
            while data:  # a write may be short
                n = os.writev(self.fd, data[:1000])
                self.written += n
                while data and n >= len(data[0]):
                    n -= len(data.pop(0))
                if n:
                    data[0] = data[0][n:]
        if self.durable and self.written - self.started >= WRITE_BEHIND:
            _start_writing(self.fd, self.started, self.written - self.started)
            self.started = self.written

    def close(self) -> None:
        if self.fd >= 0 and self.durable:
            _start_writing(self.fd, self.started, self.written - self.started)
        self.abort()

    def abort(self) -> None:
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
        return LocalStream(self._path(name), self.durable)

    def put(self, objects: Mapping[str, bytes]) -> None:
        for name, data in objects.items():
            stream = self.stream(name)
            try:
                stream.write([data])
            finally:
                stream.close()

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
        """Whether nothing is there yet."""
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

    def commit(self, staging: str, final: str) -> str:
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
                return self.commit(staging, final)
        if self.durable:
            _sync(os.path.dirname(target))
            _sync(self.root)
        return final

    def move(self, prefix: str, to: str) -> None:
        """Rename a directory."""
        with _explained("move", self._path(prefix)):
            os.makedirs(os.path.dirname(self._path(to)), exist_ok=True)
            os.rename(self._path(prefix), self._path(to))

    def copy_from(self, other: Objects, prefix: str, to: str) -> None:
        """Link every object below `prefix` of another local store to `to` here; no data is copied."""
        if not isinstance(other, LocalObjects):
            raise StoreError(f"cannot merge {other.url} into {self.url} without copying it", "copy it first")
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


# ------------------------------------------------------------------ object stores


@functools.cache
def _memory_store(name: str) -> Any:
    from obstore.store import MemoryStore

    return MemoryStore()  # one a name and process, so that writer and reader see the same objects


class RemoteWindow:
    """Spans on their way; the first read waits for them and raises what went wrong."""

    def __init__(self, pieces: "list[tuple[int, Future[memoryview]]]") -> None:
        self.pieces = pieces

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        pieces = [(start, task.result()) for start, task in self.pieces]
        for view in buffers:
            done = 0
            while done < len(view):
                inside = (p for p in pieces if p[0] <= offset < p[0] + len(p[1]))
                start, data = next(inside, (0, None))
                if data is None:
                    raise EOFError
                part = data[offset - start : offset - start + len(view) - done]
                view[done : done + len(part)] = part
                done += len(part)
                offset += len(part)


class RemoteFile:
    def __init__(self, objects: "RemoteObjects", name: str, size: int) -> None:
        self.objects, self.name, self.size = objects, name, size

    def window(self, offset: int, length: int) -> RemoteWindow:
        return self.objects.windows([(self, offset, length)])[0]

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.window(offset, sum(map(len, buffers))).readv(buffers, offset)


class RemoteStream:
    """A multipart upload; the object appears when it is closed."""

    def __init__(self, objects: "RemoteObjects", name: str) -> None:
        import obstore

        self.objects, self.name = objects, name
        self._writer = obstore.open_writer(
            objects.store, objects.key(name), buffer_size=REMOTE_PIECE, max_concurrency=4
        )

    def write(self, buffers: Sequence[Buffer]) -> None:
        with self.objects.explained("write", self.name):
            for data in buffers:
                self._writer.write(memoryview(data).cast("B"))

    def close(self) -> None:
        with self.objects.explained("write", self.name):
            self._writer.close()

    def abort(self) -> None:
        del self._writer


class RemoteObjects:
    """Objects behind obstore; credentials and endpoint come from the environment (AWS_*, GOOGLE_* ...)."""

    def __init__(self, url: str) -> None:
        from datetime import timedelta

        import obstore.store
        from obstore.exceptions import BaseError

        self.url = url.rstrip("/")
        self.read_around = False
        parts = urlsplit(self.url)
        self.bucket = f"{parts.scheme}://{parts.netloc}"
        path = parts.path.strip("/")
        self._prefix = f"{path}/" if path else ""
        try:
            if parts.scheme == "memory":
                self.store: Any = _memory_store(parts.netloc)
            else:
                self.store = obstore.store.from_url(
                    self.bucket,
                    retry_config={
                        "max_retries": REMOTE_TRIES,
                        "backoff": {"init_backoff": timedelta(milliseconds=50)},
                        "retry_timeout": timedelta(seconds=120),
                    },
                    client_options={"timeout": timedelta(seconds=120), "allow_http": True},
                )
        except (BaseError, ValueError) as error:
            raise StoreError(f"cannot use {url}: {_first_line(error)}", "check the URL") from error
        self.pool = ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="store-range")

    def key(self, name: str) -> str:
        return self._prefix + name

    @contextlib.contextmanager
    def explained(self, doing: str, name: str) -> Iterator[None]:
        from obstore import exceptions as x

        try:
            yield
        except (x.NotFoundError, FileNotFoundError):
            raise FileNotFoundError(f"{self.url}/{name}") from None
        except (x.AlreadyExistsError, x.PreconditionError):
            raise FileExistsError(f"{self.url}/{name}") from None
        except (x.PermissionDeniedError, x.UnauthenticatedError) as error:
            raise StoreError(
                f"cannot {doing} {self.url}/{name}: {_first_line(error)}", "check the credentials"
            ) from error
        except (x.BaseError, OSError) as error:
            raise StoreError(f"cannot {doing} {self.url}/{name}: {_first_line(error)}") from error

    def _retried(self, doing: str, name: str, call: Callable[[], Any]) -> Any:
        """`call` with retries for what the HTTP layer does not retry itself, such as a truncated answer."""
        for attempt in range(REMOTE_TRIES):
            try:
                with self.explained(doing, name):
                    return call()
            except StoreCorruptError:
                raise
            except StoreError:
                if attempt == REMOTE_TRIES - 1:
                    raise
                time.sleep(0.05 * 2**attempt)
        raise AssertionError("unreachable")

    def fetch(self, name: str, offset: int, length: int, size: int) -> memoryview:
        """Bytes [offset, offset + length) of an object; EOFError if it is not `size` bytes long."""
        import obstore
        from obstore.exceptions import BaseError

        def get() -> memoryview:
            try:
                answer = obstore.get(self.store, self.key(name), options={"range": (offset, offset + length)})
            except BaseError:
                with contextlib.suppress(BaseError):
                    if obstore.head(self.store, self.key(name))["size"] != size:
                        raise EOFError from None
                raise
            if answer.meta["size"] != size:
                raise EOFError
            data = memoryview(answer.bytes())
            if len(data) != length:
                raise StoreError(f"{self.url}/{name}: {len(data)} of {length} bytes arrived")
            return data.cast("B")

        return self._retried("read", name, get)

    def read(self, name: str) -> bytes:
        import obstore

        return self._retried("read", name, lambda: bytes(obstore.get(self.store, self.key(name)).bytes()))

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        import obstore

        with self.explained("write", name):
            obstore.put(
                self.store,
                self.key(name),
                data,
                mode="create" if create else "overwrite",
                use_multipart=False,
            )

    def put(self, objects: Mapping[str, bytes]) -> None:
        list(self.pool.map(self.write, objects.keys(), objects.values()))

    def sync(self, prefix: str) -> None:
        """Nothing to do: an object store answers when an object is safe."""

    def stream(self, name: str) -> RemoteStream:
        return RemoteStream(self, name)

    def open(self, name: str, size: int | None = None) -> RemoteFile:
        return RemoteFile(self, name, self._size(name) if size is None else size)

    def windows(self, spans: Sequence[tuple[RemoteFile, int, int]]) -> list[RemoteWindow]:
        """Fetch spans of several objects at the same time, each in one request or several in parallel."""
        tasks = [
            [
                (
                    start,
                    self.pool.submit(self.fetch, file.name, start, min(REMOTE_PIECE, end - start), file.size),
                )
                for start in range(offset, end, REMOTE_PIECE)
            ]
            for file, offset, end in ((file, offset, offset + length) for file, offset, length in spans)
        ]
        return [RemoteWindow(pieces) for pieces in tasks]

    def _size(self, name: str) -> int:
        import obstore

        return self._retried("read", name, lambda: obstore.head(self.store, self.key(name))["size"])

    def exists(self, name: str) -> bool:
        try:
            self._size(name)
        except FileNotFoundError:
            return False
        return True

    def _metas(self, prefix: str) -> list[Any]:
        import obstore

        def collect() -> list[Any]:
            return [meta for batch in obstore.list(self.store, self.key(prefix)) for meta in batch]

        return self._retried("list", prefix, collect)

    def empty(self) -> bool:
        """Whether nothing is there yet."""
        return not self._metas("")

    def entries(self, prefix: str) -> list[tuple[str, int]]:
        cut = len(self._prefix)
        return sorted((meta["path"][cut:], meta["size"]) for meta in self._metas(prefix))

    def directories(self, prefix: str) -> list[str]:
        import obstore

        found = self._retried(
            "list", prefix, lambda: obstore.list_with_delimiter(self.store, self.key(prefix))
        )
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, prefix: str) -> None:
        import obstore

        paths = [meta["path"] for meta in self._metas(prefix)] or [self.key(prefix)]
        # metadata first: what is left of a delete that is cut short does not look committed
        paths.sort(key=lambda p: not p.endswith("/zarr.json"))
        with self.explained("delete", prefix), contextlib.suppress(FileNotFoundError):
            obstore.delete(self.store, paths)

    def modified(self, prefix: str) -> float:
        return max((m["last_modified"].timestamp() for m in self._metas(prefix)), default=0.0)

    def commit(self, staging: str, final: str) -> str:
        """Name a finished directory by a create-only marker; FileExistsError if the name is taken."""
        if self.exists(f"{final}/zarr.json"):
            raise FileExistsError(final)
        marker = f"commits/{final.rsplit('/', 1)[-1]}"
        try:
            self.write(marker, staging.encode(), create=True)
        except FileExistsError:
            # ours, if the answer to the first try was lost and it was tried again
            if self.read(marker) != staging.encode():
                raise
        return staging

    def move(self, prefix: str, to: str) -> None:
        """Rename every object below `prefix`, the group's own metadata first: it is no part from then on."""
        import obstore

        names = [name for name, _ in self.entries(prefix)]
        for name in sorted(names, key=lambda n: n != f"{prefix}/zarr.json"):
            with self.explained("move", name):
                obstore.rename(self.store, self.key(name), self.key(to + name[len(prefix) :]))

    def copy_from(self, other: Objects, prefix: str, to: str) -> None:
        """Server-side copy of every object below `prefix` of a store in the same bucket."""
        import obstore

        if not isinstance(other, RemoteObjects) or other.bucket != self.bucket:
            raise StoreError(
                f"cannot merge {other.url} into {self.url} without moving its data", "copy it first"
            )
        names = [name for name, _ in other.entries(prefix)]
        for name in sorted(names, key=lambda n: n.endswith("/zarr.json")):
            with self.explained("copy", name):
                obstore.copy(self.store, other.key(name), self.key(to + name[len(prefix) :]))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
