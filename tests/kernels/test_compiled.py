"""Machine code of every kernel at the real shapes of the tile table, compiled without a GPU.

A spilled register or a lost pipeline stage costs more than any wrong constant in the table, and both can be
read off the compiler's output.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tune
from benchmarks.aot import SHARED_LIMIT
from train.kernels import tiles
from train.kernels.tiles import TABLE, Tile

GATHERING = {"up_fwd", "down_bwd", "weight_grad"}


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    """What `make kernels-report` prints; in a process of its own, for here Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels_report"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    return json.loads(printed.stdout.splitlines()[-1])["kernels"]


def label(row: dict[str, Any]) -> str:
    return " ".join(str(row[k]) for k in ("shape", "kernel", "tile"))


def test_every_tile_of_the_table_is_compiled(kernels: list[dict[str, Any]]) -> None:
    compiled = {(row["kernel"], tuple(row["tile"])) for row in kernels}
    for (place, _), entries in TABLE.items():
        assert place == "interpreter" or set(entries.items()) <= compiled


def test_no_kernel_spills_registers(kernels: list[dict[str, Any]]) -> None:
    assert [label(row) for row in kernels if row["spilled"]] == []


def test_every_kernel_fits_the_shared_memory(kernels: list[dict[str, Any]]) -> None:
    assert [label(row) for row in kernels if row["shared"] > SHARED_LIMIT] == []


def test_every_product_keeps_its_pipeline(kernels: list[dict[str, Any]]) -> None:
    """Each stage holds the tiles of all operands: less would mean that one of them is not loaded ahead."""
    for row in kernels:
        if row["kernel"] in ("gather_sum", "loss_rows"):
            assert row["shared"] < 1024
            continue
        tile = Tile(*row["tile"])
        # barriers of the bulk copies
        assert 0 <= row["shared"] - tile.stages * row["operands"] <= 256, label(row)


def test_products_use_the_instructions_of_sm_90(kernels: list[dict[str, Any]]) -> None:
    for row in kernels:
        if row["kernel"] not in ("gather_sum", "loss_rows"):
            assert row["mma"] > 0, label(row)
            assert row["tma"] > 0, label(row)
            # what TMA brings needs no pointer copies; gathered rows do
            assert (row["async_copies"] > 0) == (row["kernel"] in GATHERING), label(row)


def test_the_tuner_writes_the_table_back_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise tuning one kernel would disturb the entries of the others."""
    copy = tmp_path / "tiles.py"
    copy.write_text(Path(tiles.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tiles, "__file__", str(copy))
    tune.write(TABLE)
    monkeypatch.undo()
    assert copy.read_text(encoding="utf-8") == Path(tiles.__file__).read_text(encoding="utf-8")
