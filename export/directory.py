"""A directory that is written once: filled aside, published by a rename, with a manifest of what made it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.errors import InputError
from configs.files import read_json, write_json
from configs.run_dir import META

__all__ = ["copy_companions", "save", "write_once"]

# neither server reads a draft's own tokenizer, but tools that open the directory do
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja"),
    *("config.json", "generation_config.json", "configuration_*.py", "modeling_*.py", "LICENSE*"),
)


def write_once(
    directory: Path, identity: dict[str, Any], fill: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Make a directory, unless the same one is there already.

    Args:
        directory: where it will be.
        identity: what decides its bytes, as JSON.
        fill: writes the files into the directory it is given and returns what the manifest says of them.

    Returns:
        The manifest (`format`, `identity`, what `fill` returned, `files` with their sizes), and whether it
        was there already.

    Raises:
        InputError: `directory` holds something else, or a damaged one.
    """
    if (done := _finished(directory, identity)) is not None:
        return done, True
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = {"format": 1, "identity": identity, **fill(partial)}
        manifest["files"] = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
        write_json(partial / META, manifest)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest, False


def _finished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an identical export in place; None where there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    hint = f"remove {out}, or set export.dir to another directory"
    try:
        manifest = read_json(out / META)
        sizes, made_from = manifest["files"], manifest["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} exists and is not an export of this program", hint) from None
    damaged = [f for f, n in sizes.items() if not (out / f).is_file() or (out / f).stat().st_size != n]
    if damaged:
        raise InputError(
            f"the export at {out} is damaged: {', '.join(damaged[:3])} missing or cut short", hint
        )
    if made_from != identity:
        differing = sorted(k for k in identity if made_from.get(k) != identity[k])
        raise InputError(f"{out} holds another export: {', '.join(differing)} differ", hint)
    return manifest


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file and see it to disk."""
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def copy_companions(target: Path, directory: Path) -> None:
    """Copy the target's configuration, tokenizer and licence, but what is in `directory` already."""
    for pattern in COMPANIONS:
        for path in sorted(target.glob(pattern)):
            if path.is_file() and not (directory / path.name).exists():
                shutil.copyfile(path, directory / path.name)
