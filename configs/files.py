"""Atomic writes and content hashes: everything on disk is published last, by rename."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["atomic_write", "read_json", "sha256_file", "sha256_json", "write_json"]


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
