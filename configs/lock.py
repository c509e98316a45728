"""One process at a time in a run directory."""

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError
from configs.progress import log

__all__ = ["hold"]

# what NFS and Lustre say where locks are not mounted
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def hold(path: Path, what: str, hint: str, *, patience_s: float = 0) -> Iterator[None]:
    """Hold a lock file; it is free again when this process ends, however that goes.

    On a file system without locks a message is all there is.

    Args:
        path: the file, made where it is missing.
        what: who else would hold it, for the message.
        hint: what to do then.
        patience_s: how long to wait for it.

    Raises:
        ConfigError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"{what} is running in {path.parent}", hint) from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                log("lock", f"the file system of {path.parent} has no locks: start nothing twice there")
                break
        yield
