"""The program for a borrowed GPU runs where nothing is installed but what it says it needs."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
NEEDED = ("torch", "triton", "numpy", "safetensors", "rich", "pytest")


def required(names: tuple[str, ...]) -> dict[str, Path]:
    """Top-level entries of some packages, and of all they need themselves, in site-packages."""
    found: dict[str, Path] = {}
    queue, seen = list(names), set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            assert name not in NEEDED
            continue
        for file in package.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__"):
                found[top] = Path(package.locate_file(top))
        for text in package.requires or ():
            needs = Requirement(text)
            if needs.marker is None or needs.marker.evaluate({"extra": ""}):
                queue.append(needs.name)
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds those packages alone."""
    place = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    [site] = place.glob("lib/python*/site-packages")
    for name, path in required(NEEDED).items():
        if not (site / name).exists():
            (site / name).symlink_to(path)
    return place / "bin" / "python"


def rehearse(python: Path, *arguments: str) -> tuple[int, dict[str, dict], str]:
    """Exit code, the line of each part by its name, and what went to stderr."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [python, "-m", "benchmarks.gpu", "--tiny", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=550
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {line["part"]: line for line in lines}, done.stderr


def test_every_part_runs_with_nothing_else_installed(bare: Path) -> None:
    for absent in ("pydantic", "deepspeed", "vllm", "zarr", "obstore", "awscrt", "transformers"):
        assert subprocess.run([bare, "-c", f"import {absent}"], capture_output=True).returncode
    code, parts, said = rehearse(bare)
    assert code == 0, said
    assert list(parts) == ["machine", "kernels", "layer", "moe", "loss", "attention", "tune"]
    # the tests of the kernels ran, and passed
    tests = {row["tests"]: row for row in parts["kernels"]["measured"] if "tests" in row}
    assert tests.keys() == {"test_moe.py", "test_head_loss.py"}
    assert all(row["passed"] and "passed" in row["said"][0] for row in tests.values())
    # a training step, with an anchor at every place that has a prediction, and with fewer
    steps = [row for row in parts["layer"]["measured"] if "case" in row]
    assert steps[0]["anchors"] > steps[1]["anchors"] > 0
    assert all(row["ms"].keys() == {"forward", "loss", "backward"} for row in steps)
    assert all(row["gradient_norm"] > 0 for row in steps)
    for part, contenders in (("moe", {"layer61", "loop"}), ("loss", {"layer61"}), ("attention", {"flex"})):
        assert [row for row in parts[part]["measured"] if contenders <= row.keys()], part
    # tiles are compiled, and none is timed where there is no GPU
    assert [row["sound"] for row in parts["tune"]["measured"]] == [1, 1]
    assert all(row["fastest"] == [] for row in parts["tune"]["measured"])


def test_a_part_that_is_cut_off_says_so_and_the_others_go_on(bare: Path) -> None:
    code, parts, _ = rehearse(bare, "moe", "loss", "--budget", "moe=0.2")
    assert code == 1
    assert parts["moe"]["error"] == "cut off after 0.2 s"
    assert "error" not in parts["loss"]
    assert parts["loss"]["measured"]
