"""Packages import each other in one direction, and no stage drags in the engine of another."""

import ast
import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from configs.importing import importing

ROOT = Path(__file__).parent.parent
# what a package may import of the others; a module stands for everything below it
MAY_IMPORT = {
    "configs": set(),
    "featurestore": {"configs"},
    "export": {"configs"},
    "train": {
        "configs",
        "featurestore",
        *(f"export.{m}" for m in ("check", "checkpoint", "keymap", "stream")),
    },
    "pipeline": {"configs", "featurestore", "export"},
    "pipeline.tiny": {"configs", "export", "train"},
    "pipeline.cli": {"configs", "featurestore", "export", "train"},
}
# from the leaves up: a module imports only what stands before it
TRAIN = [
    *["kernels", "loss", "dims", "indexer", "attention", "gather", "index_loss"],
    *["blocks", "mtp", "eagle3", "model"],
    *["unroll", "batch", "sparse", "vocabulary", "start", "draft", "selection", "evaluate"],
    *["cost", "plan", "zero", "checkpoint", "metrics", "trainer", "rank", "launch"],
]


def below(module, parent):
    return module == parent or module.startswith(parent + ".")


@pytest.fixture(scope="module")
def imports():
    """Module -> the modules of ours that it imports, those inside functions too."""
    packages = [package for package in MAY_IMPORT if "." not in package]
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    }
    found = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} has a relative import"
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else node.module for name in whole}
        found[module] = names & files.keys()
    return found


def test_packages_import_each_other_in_one_direction_only(imports):
    wrong = []
    for module, names in imports.items():
        package = max((p for p in MAY_IMPORT if below(module, p)), key=len)
        allowed = MAY_IMPORT[package] | {module.partition(".")[0]}
        wrong += [f"{module} -> {name}" for name in names if not any(below(name, a) for a in allowed)]
    assert wrong == []


def test_modules_of_train_import_only_what_lies_below_them(imports):
    def place(module):
        return TRAIN.index(module.split(".")[1])

    inside = {
        m: [n for n in names if below(n, "train")] for m, names in imports.items() if m.startswith("train.")
    }
    assert {m.split(".")[1] for m in inside} == set(TRAIN)
    assert [f"{m} -> {n}" for m, names in inside.items() for n in names if place(n) > place(m)] == []


def test_the_only_import_circle_is_reader_and_check(imports):
    def reached(module):
        seen, todo = set(), [module]
        while todo:
            new = imports[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    in_a_circle = {module for module in imports if module in reached(module)}
    assert in_a_circle == {"featurestore.check", "featurestore.reader"}


# what is imported together, and what must not come with it
STAGES = {
    "configs.schema, configs.load, configs.contract, configs.errors": {"torch", "vllm", "deepspeed", "zarr"},
    "pipeline.cli": {"torch", "vllm", "deepspeed", "zarr", "transformers"},
    "featurestore": {"vllm", "deepspeed", "transformers", "train", "export", "pipeline"},
    "train.model, train.unroll, train.trainer, train.evaluate, train.launch": {"vllm", "pipeline"},
    "pipeline.capture.process, pipeline.dump, pipeline.capture.plugin": {"deepspeed", "train"},
    "export.nextn, export.fp8, export.keymap": {"vllm", "deepspeed", "train", "pipeline", "featurestore"},
}
# torch takes longest, and is imported once for all that may have it
EACH_IN_A_FORK = """
import gc, os, sys
gc.disable()
for modules in sys.argv[1:]:
    if modules == "torch":
        import torch
    elif os.fork() == 0:
        exec(f"import {modules}")
        print(modules, *sys.modules, sep="\\t", flush=True)
        os._exit(0)
    else:
        assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def loaded():
    """What is imported together -> the packages that are loaded then."""
    bare = [modules for modules, forbidden in STAGES.items() if "torch" in forbidden]
    words = [*bare, "torch", *(modules for modules in STAGES if modules not in bare)]
    done = subprocess.run([sys.executable, "-c", EACH_IN_A_FORK, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (line.split("\t") for line in done.stdout.splitlines())
    return {modules: {name.partition(".")[0] for name in names} for modules, *names in lines}


@pytest.mark.parametrize("modules", STAGES)
def test_importing_a_stage_leaves_the_others_alone(loaded, modules):
    assert loaded[modules] & STAGES[modules] == set()


def test_garbage_is_collected_after_imports_but_not_among_what_they_made(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text("kept = [[] for _ in range(1000)]")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        importlib.import_module("ast")
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
    with importing():
        importlib.import_module("made_up")
    assert gc.isenabled()
    assert gc.get_freeze_count() > before + 1000
    with pytest.raises(ModuleNotFoundError), importing():
        importlib.import_module("nowhere")
    assert gc.isenabled()
