"""A directory that is written once: filled aside, published by a rename, with a manifest of what made it."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError
from configs.files import checksum, explain_full_disk, fsync_directory, sha256_json, write_json
from configs.run_dir import COMMIT, META, WEIGHTS, read_commit, read_export
from export.checkpoint import Checkpoint
from export.stream import write_tensors

__all__ = ["copy_companions", "require_free", "save", "weights_identity", "write_once"]

# neither server reads a draft's own tokenizer, but tools that open the directory do
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja"),
    *("config.json", "generation_config.json", "configuration_*.py", "modeling_*.py", "LICENSE*"),
)


def write_once(
    directory: Path,
    identity: dict[str, Any],
    fill: Callable[[Path], dict[str, Any]],
    *,
    sources: Mapping[str, Path],
    replace: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Make a directory, unless the same one is there already, with the right bytes.

    Args:
        directory: where it will be.
        identity: what decides its bytes, as JSON; with `weights`.
        fill: writes the files into the directory it is given and returns what the manifest says of them;
            entries of `files` that it returns are not computed again.
        sources: directories of the `weights` and of the `target`, as `fill` notes them.
        replace: put it in the place of another or a damaged export.

    Returns:
        The manifest (`format`, `identity`, what `fill` returned, `files` with sizes and checksums, `sha256`
        of all this), and whether it was there already.

    Raises:
        InputError: `directory` holds something else, or a damaged export.
        Layer61Error: the disk is full; what was in `directory` is untouched.
    """
    if (done := require_free(directory, identity, sources, replace=replace, verify=True)) is not None:
        return done, True
    partial, old = (directory.with_name(f".{directory.name}.{word}") for word in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    kept = "what was there is untouched" if directory.exists() else "nothing else is lost"
    try:
        with explain_full_disk("the export", directory, kept):
            partial.mkdir(parents=True)
            manifest = {"format": 1, "identity": identity, **fill(partial)}
            noted = manifest.pop("files", {})
            manifest["files"] = {p.name: noted.get(p.name) or _entry(p) for p in sorted(partial.iterdir())}
            manifest["sha256"] = sha256_json(manifest)
            write_json(partial / META, manifest)
            fsync_directory(partial)
        if replace and directory.exists():
            os.rename(directory, old)
        os.rename(partial, directory)
        fsync_directory(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest, False


def _entry(path: Path) -> dict[str, Any] | int:
    # what a link leads to is the target's
    return path.stat().st_size if path.is_symlink() else checksum(path)


def require_free(
    out: Path,
    identity: Mapping[str, Any],
    sources: Mapping[str, Path],
    *,
    replace: bool = False,
    verify: bool = False,
) -> dict[str, Any] | None:
    """See whether an export can be written to a place.

    Args:
        out: where it will be.
        identity: as `write_once`; what is left out of it is not compared.
        sources: as `write_once`.
        replace: another or a damaged export there does not matter.
        verify: read the bytes of an identical one.

    Returns:
        The manifest of an identical export that is there; None where there is nothing yet, or what is there
        will be replaced.

    Raises:
        InputError: the place holds something else, or a damaged export.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    elsewhere = "set export.dir to a directory that does not exist yet"
    if not (out / META).is_file():
        raise InputError(f"{out} exists and is not an export of this program", elsewhere)
    again = f"export.replace=true writes it anew; or {elsewhere}"
    try:
        manifest = read_export(out, verify=False)
    except InputError as error:
        # it cannot be told any more whose it is
        raise InputError(error.message, f"move {out} out of the way, or {elsewhere}") from None
    made_from = manifest["identity"]
    if replace and (others := sorted({p.name for p in out.iterdir()} - {*manifest["files"], META})):
        raise InputError(
            f"{out} holds what no export wrote: {', '.join(others)}",
            f"move it out of the way before {out} is replaced, or {elsewhere}",
        )
    if differing := [k for k in identity if made_from.get(k) != identity[k]]:
        if replace:
            return None
        said = [_difference(k, made_from.get(k), identity[k], manifest, sources) for k in differing]
        raise InputError(f"{out} holds another export: {'; '.join(said)}", again)
    if verify:
        try:
            read_export(out)
        except InputError as error:
            if replace:
                return None
            raise InputError(f"the export at {out} is damaged: {error.message}", again) from None
    return manifest


def _difference(
    key: str, there: Any, asked: Any, manifest: Mapping[str, Any], sources: Mapping[str, Path]
) -> str:
    """How an export that is there differs from the one asked for in an entry of their identities."""
    if key not in sources:
        return f"{key} was {there!r}, asked for is {asked!r}"
    step = manifest.get("step")
    step = f" (step {step:,})" if key == "weights" and step is not None else ""
    of = "are those of" if key == "weights" else "is"
    said = f"its {key} {of} {manifest.get(key)}{step}, asked for {of} {sources[key]}"
    if not isinstance(there, dict) or not isinstance(asked, dict):
        return said
    names = [name for name in sorted(there.keys() | asked.keys()) if there.get(name) != asked.get(name)]
    found = [f"{name} {_short(there.get(name))}, asked for {_short(asked.get(name))}" for name in names[:3]]
    return f"{said}: {', '.join(found)}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _short(value: Any) -> str:
    """A value, or the beginning of a digest."""
    return "nothing" if value is None else str(value)[:12]


def weights_identity(weights: Checkpoint) -> dict[str, str]:
    """A hash of each file of tensors; those of a checkpoint of ours are not read for it."""
    files, folder = sorted({weights.file(name) for name in weights.names}), weights.directory
    noted: dict[str, Any] = {}
    if folder.name == WEIGHTS and (folder.parent / COMMIT).is_file():
        noted = read_commit(folder.parent)
    entries = {file: noted.get(f"{WEIGHTS}/{file}") for file in files}
    return {
        file: sha256_json(entry if isinstance(entry, dict) else checksum(folder / file))
        for file, entry in entries.items()
    }


def save(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write a safetensors file and see it to disk. Returns its size and checksums."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_tensors(path, shapes, tensors.values())


def copy_companions(target: Path, directory: Path) -> None:
    """Copy the target's configuration, tokenizer and licence, but what is in `directory` already."""
    for pattern in COMPANIONS:
        for path in sorted(target.glob(pattern)):
            if path.is_file() and not (directory / path.name).exists():
                shutil.copyfile(path, directory / path.name)
