"""Objects of a bucket, through obstore; imported only for a store that lies in one."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import obstore
import obstore.store
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from configs.errors import StoreError

__all__ = ["RemoteObjects"]

PIECE = 8 << 20  # bytes of one range request; longer ranges are fetched in parallel
THREADS = 16
TRIES = 6
NETWORK_HINT = "check the network and the endpoint, then start the same command again"


@functools.cache
def _memory_store(name: str) -> Any:
    """One store a name and process, so that writer and reader see the same objects."""
    return obstore.store.MemoryStore()


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
        self.objects, self.name = objects, name
        self._writer = obstore.open_writer(
            objects.store, objects.key(name), buffer_size=PIECE, max_concurrency=4
        )

    def write(self, buffers: Sequence[Any]) -> None:
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
                        "max_retries": TRIES,
                        "backoff": {"init_backoff": timedelta(milliseconds=50)},
                        "retry_timeout": timedelta(seconds=120),
                    },
                    client_options={"timeout": timedelta(seconds=120), "allow_http": True},
                )
        except (BaseError, ValueError) as error:
            raise StoreError(f"cannot use {url}: {_first_line(error)}", "check the URL") from error
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="store-range")

    def key(self, name: str) -> str:
        return self._prefix + name

    @contextlib.contextmanager
    def explained(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except (NotFoundError, FileNotFoundError):
            raise FileNotFoundError(f"{self.url}/{name}") from None
        except (AlreadyExistsError, PreconditionError):
            raise FileExistsError(f"{self.url}/{name}") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreError(
                f"cannot {doing} {self.url}/{name}: {_first_line(error)}", "check the credentials"
            ) from error
        except (BaseError, OSError) as error:
            # asked where there are no others, which only a machine of that cloud answers
            if "169.254.169.254" in str(error) or "metadata.google" in str(error):
                raise StoreError(
                    f"cannot {doing} {self.url}/{name}: no credentials for {self.bucket} were found",
                    "set the variables that the service asks for, as AWS_ACCESS_KEY_ID and"
                    " AWS_SECRET_ACCESS_KEY for s3, GOOGLE_APPLICATION_CREDENTIALS for gs",
                ) from error
            raise StoreError(
                f"cannot {doing} {self.url}/{name}: {_first_line(error)}", NETWORK_HINT
            ) from error

    def _retried(self, doing: str, name: str, call: Callable[[], Any]) -> Any:
        """`call` with retries for what the HTTP layer does not retry itself, such as a truncated answer."""
        for attempt in range(TRIES):
            try:
                with self.explained(doing, name):
                    return call()
            except StoreError:
                if attempt == TRIES - 1:
                    raise
                time.sleep(0.05 * 2**attempt)
        raise AssertionError("unreachable")

    def fetch(self, name: str, offset: int, length: int, size: int) -> memoryview:
        """Bytes [offset, offset + length) of an object; EOFError if it is not `size` bytes long."""

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
                raise StoreError(f"{self.url}/{name}: {len(data)} of {length} bytes arrived", NETWORK_HINT)
            return data.cast("B")

        return self._retried("read", name, get)

    def read(self, name: str) -> bytes:
        return self._retried("read", name, lambda: bytes(obstore.get(self.store, self.key(name)).bytes()))

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
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

        def ask(file: RemoteFile, start: int, end: int) -> "tuple[int, Future[memoryview]]":
            return start, self.pool.submit(self.fetch, file.name, start, min(PIECE, end - start), file.size)

        return [
            RemoteWindow(
                [ask(file, start, offset + length) for start in range(offset, offset + length, PIECE)]
            )
            for file, offset, length in spans
        ]

    def _size(self, name: str) -> int:
        return self._retried("read", name, lambda: obstore.head(self.store, self.key(name))["size"])

    def exists(self, name: str) -> bool:
        try:
            self._size(name)
        except FileNotFoundError:
            return False
        return True

    def _metas(self, prefix: str) -> list[Any]:
        def collect() -> list[Any]:
            return [meta for batch in obstore.list(self.store, self.key(prefix)) for meta in batch]

        return self._retried("list", prefix, collect)

    def empty(self) -> bool:
        return not self._metas("")

    def entries(self, prefix: str) -> list[tuple[str, int]]:
        cut = len(self._prefix)
        return sorted((meta["path"][cut:], meta["size"]) for meta in self._metas(prefix))

    def directories(self, prefix: str) -> list[str]:
        found = self._retried(
            "list", prefix, lambda: obstore.list_with_delimiter(self.store, self.key(prefix))
        )
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, prefix: str) -> None:
        paths = [meta["path"] for meta in self._metas(prefix)] or [self.key(prefix)]
        # metadata first: what is left of a delete that is cut short does not look committed
        paths.sort(key=lambda p: not p.endswith("/zarr.json"))
        with self.explained("delete", prefix), contextlib.suppress(FileNotFoundError):
            obstore.delete(self.store, paths)

    def modified(self, prefix: str) -> float:
        return max((m["last_modified"].timestamp() for m in self._metas(prefix)), default=0.0)

    def commit(self, staging: str, final: str) -> None:
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

    def move(self, prefix: str, to: str) -> None:
        """Rename every object below `prefix`, the group's own metadata first: it is no part from then on."""
        names = [name for name, _ in self.entries(prefix)]
        for name in sorted(names, key=lambda n: n != f"{prefix}/zarr.json"):
            with self.explained("move", name):
                obstore.rename(self.store, self.key(name), self.key(to + name[len(prefix) :]))

    def copy_from(self, other: Any, prefix: str, to: str) -> None:
        """Server-side copy of every object below `prefix` of a store in the same bucket."""
        if not isinstance(other, RemoteObjects) or other.bucket != self.bucket:
            raise StoreError(
                f"cannot merge {other.url} into {self.url} without moving its data",
                "copy it into that bucket first",
            )
        names = [name for name, _ in other.entries(prefix)]
        for name in sorted(names, key=lambda n: n.endswith("/zarr.json")):
            with self.explained("copy", name):
                obstore.copy(self.store, other.key(name), self.key(to + name[len(prefix) :]))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
