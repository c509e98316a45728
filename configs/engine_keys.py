"""Which keys vLLM and DeepSpeed know, from their source alone: importing either takes longer than a plan."""

import ast
import difflib
import functools
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import RunConfig

__all__ = ["check_keys"]

# which pass-through tables a verb hands on
TABLES = {
    "dump": ("dump.vllm",),
    "train": ("train.deepspeed",),
    "verify": ("verify.vllm",),
    "serve": ("serve.vllm",),
    "bench-serve": ("serve.vllm",),
}
# arguments of vLLM's LLM that are not those of its engine
LLM = frozenset({"swap_space", "mm_processor_kwargs", "pooler_config", "chat_template"})


def _source(package: str, file: str) -> Path | None:
    spec = find_spec(package)
    places = [Path(p) / file for p in (spec.submodule_search_locations or ())] if spec else []
    return next((p for p in places if p.is_file()), None)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _fields(tree: ast.Module, name: str) -> set[str]:
    """Annotated fields of a class, and the aliases of pydantic fields."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    found.add(field.target.id)
                    keywords = field.value.keywords if isinstance(field.value, ast.Call) else []
                    found |= {
                        k.value.value
                        for k in keywords
                        if k.arg == "alias"
                        and isinstance(k.value, ast.Constant)
                        and isinstance(k.value.value, str)
                    }
    return found


@functools.cache
def _vllm() -> frozenset[str]:
    path = _source("vllm", "engine/arg_utils.py")
    fields = _fields(_parse(path), "EngineArgs") if path else set()
    return frozenset(fields | LLM) if fields else frozenset()


@functools.cache
def _vllm_serve() -> frozenset[str]:
    """What `vllm serve` takes, its engine's arguments included."""
    found: set[str] = set()
    for file in ("engine/arg_utils.py", "entrypoints/launchers/cli_args.py"):
        if (path := _source("vllm", file)) is None:
            return frozenset()
        tree = _parse(path)
        for name in ("EngineArgs", "AsyncEngineArgs", "BaseFrontendArgs", "FrontendArgs"):
            found |= _fields(tree, name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value[:2] == "--":
                found.add(node.value[2:].replace("-", "_"))
    return frozenset(found)


@functools.cache
def _deepspeed() -> frozenset[str]:
    """Every word in the modules that read its configuration: more than the keys, but no misspelt one."""
    root = _source("deepspeed", "runtime/constants.py")
    if root is None:
        return frozenset()
    found: set[str] = set()
    for path in (*root.parent.parent.rglob("constants.py"), *root.parent.parent.rglob("config.py")):
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return frozenset(found)


@functools.cache
def _zero() -> frozenset[str]:
    path = _source("deepspeed", "runtime/zero/config.py")
    return frozenset(_fields(_parse(path), "DeepSpeedZeroConfig") if path else ())


def _check(table: str, given: Iterable[str], known: frozenset[str], whose: str) -> None:
    # without the package on this machine nothing can be said
    for name in given if known else ():
        if name.replace("-", "_") not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
            raise ConfigError(
                f"{table}.{name}: {whose} has no such setting",
                f"did you mean {table}.{near[0]}?" if near else f"see the documentation of {whose}",
            )


def check_keys(config: RunConfig, verb: str) -> None:
    """Refuse keys of a verb's pass-through tables that the installed engine does not know.

    Raises:
        ConfigError: names the key and the nearest known one.
    """
    for table in TABLES.get(verb, ()):
        section, key = table.split(".")
        given: Mapping[str, Any] = getattr(getattr(config, section), key)
        if not given:
            continue
        if key == "vllm":
            _check(table, given, _vllm_serve() if section == "serve" else _vllm(), "vLLM")
            continue
        _check(table, given, _deepspeed(), "DeepSpeed")
        zero = given.get("zero_optimization")
        if isinstance(zero, dict):
            _check(f"{table}.zero_optimization", zero, _zero(), "DeepSpeed")
