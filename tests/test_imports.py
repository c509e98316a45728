"""The stages meet only in files: what one of them imports never drags in another's engine."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (
            "configs.schema, configs.load, configs.contract, configs.errors",
            {"torch", "vllm", "deepspeed", "zarr"},
        ),
        ("pipeline.cli", {"torch", "vllm", "deepspeed", "zarr", "transformers"}),
        ("featurestore", {"vllm", "deepspeed", "transformers", "train", "export", "pipeline"}),
        ("train.model, train.unroll, train.trainer, train.evaluate, train.launch", {"vllm", "pipeline"}),
        ("pipeline.capture.process, pipeline.dump, pipeline.capture.plugin", {"deepspeed", "train"}),
        (
            "export.nextn, export.fp8, export.keymap",
            {"vllm", "deepspeed", "train", "pipeline", "featurestore"},
        ),
    ],
)
def test_importing_a_stage_leaves_the_others_alone(modules, forbidden):
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded & forbidden == set()
