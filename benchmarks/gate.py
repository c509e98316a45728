"""What a kernel benchmark needs before and around the measuring: a green test, a clock, the device's rate."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.provenance import versions

ROOT = Path(__file__).parent.parent


# plugins may need packages that the kernels do not
KERNEL_TESTS: dict[str, Any] = {
    "cwd": ROOT,
    "env": os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    "text": True,
}
"""How `subprocess` is to start a command of `kernel_tests`."""


def kernel_tests(*arguments: str) -> list[str]:
    """A command that runs tests of tests/kernels, without the fixtures of all the others."""
    folder = ROOT / "tests" / "kernels"
    paths = [str(folder / a) if a.startswith("test_") else a for a in arguments]
    return [sys.executable, "-m", "pytest", "-q", f"--confcutdir={folder}", *paths]


def require_green(test: str) -> None:
    """Run a test file of tests/kernels; exit with its output if it fails."""
    print(f"running {test} first ...", flush=True)
    command = kernel_tests("-x", test)
    run = subprocess.run(command, **KERNEL_TESTS, capture_output=True, check=False)
    if run.returncode:
        said = f"{run.stdout}{run.stderr}(pytest ended with {run.returncode})"
        sys.exit(f"{said}\n{test} is red: nothing is measured until it is green")


def require_equal(name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Exit if a contender's results on this device differ from the reference by more than 2 %."""
    for i, (got, right) in enumerate(zip(results, expected, strict=True)):
        right = right.double()
        ratio = (got.double() - right).norm() / (right.norm() + 1e-30)
        if not ratio < 0.02:
            sys.exit(f"{name}: result {i} is off by {float(ratio):.3f} of its size; nothing is measured")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """One run, the device waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(
    work: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contender, the contenders taking turns; two rounds of warming up are left out.

    A contender that runs out of memory is left out.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 2):
        for name in list(taken):
            try:
                second = seconds(work[name], device)
            except torch.OutOfMemoryError:
                print(f"{name} needs more memory than there is; left out")
                del taken[name]
                continue
            if number >= 2:
                taken[name].append(second)
    return taken


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Most memory above what was there before; None on CPU, where torch does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """TFLOP/s of the best of several square products, of large ones where no size is given."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, device) for _ in range(10))
    return 2 * size**3 / best / 1e12


def describe(device: torch.device) -> dict[str, object]:
    """Device, versions and commit, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"device": name, "threads": torch.get_num_threads(), "commit": commit, **versions()}


def finish(result: dict[str, object]) -> None:
    """Print the JSON object that ends a benchmark."""
    print(json.dumps(result))
