"""Training checkpoints: every rank writes its share, a commit comes last, a rename publishes it.

The layout is that of configs/run_dir.py. A rank's file of optimizer state holds its slice of each flattened
parameter; `layer61.json` says which slice that is, so that any number of ranks reads just what it needs. Each
16 MiB of every file have a checksum, compared as they are read.

Legend: E experts.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import ConfigError, InputError, Layer61Error, describe, revive
from configs.files import (
    BLOCK,
    atomic_write,
    block_buffer,
    check_block,
    checksum,
    fsync_directory,
    verify_files,
    write_json,
)
from configs.progress import log
from configs.run_dir import (
    BEST,
    LATEST,
    META,
    WEIGHTS,
    committed,
    directory,
    partial,
    read_best,
    read_commit,
    read_meta,
    score,
    set_aside,
    tag,
    write_commit,
)
from export.checkpoint import INDEX
from export.keymap import Op
from export.stream import write_tensors
from train.model import Layer
from train.zero import Partition, gathered, optimizer_step, partitions, take_over

__all__ = ["Saved", "load", "newest", "save"]

STATE = "state"
KEYS = ("master", "exp_avg", "exp_avg_sq")
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint to go on from."""

    path: Path
    meta: dict[str, Any]


def _together(act: Callable[[], T]) -> list[T]:
    """Do something on every rank; what one of them cannot do is an error on all, once all are done.

    Returns:
        What each rank found.
    """
    try:
        mine: tuple[Any, Any] = (act(), None)
    except Layer61Error as error:
        mine = (None, describe(error))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for _, problem in everyone:
        if problem:
            raise revive(problem)
    return [found for found, _ in everyone]


def newest(run_dir: Path) -> Saved | None:
    """The newest whole checkpoint of a run, the same one on every rank.

    Raises:
        InputError: an earlier version of this program wrote it.
    """

    def find() -> Saved | None:
        whole = committed(run_dir) if dist.get_rank() == 0 else []
        if not whole:
            return None
        meta = read_meta(whole[-1])
        if meta["format"] == 1:
            raise InputError(
                f"{whole[-1]} was saved by an earlier version, whose optimizer state is not read any more",
                "train in another run.dir; evaluate and export still take its weights",
            )
        return Saved(whole[-1], meta)

    # ranks look at the shared file system at different moments
    return _together(find)[0]


def _share(ops: tuple[Op, ...], rank: int) -> dict[str, list[int]]:
    """Which of its tensors in the checkpoint a rank writes, by the name of the op."""
    world, n = dist.get_world_size(), 0
    mine: dict[str, list[int]] = {}
    for op in ops:
        mine[op.training] = [i for i in range(len(op.checkpoint)) if (n + i) % world == rank]
        n += len(op.checkpoint)
    return mine


def _weights_file(rank: int) -> str:
    return f"{WEIGHTS}/layer-{rank + 1:05d}.safetensors"


def _state_file(rank: int) -> str:
    return f"{STATE}/rank_{rank:04d}.safetensors"


def _weights(layer: Layer, ops: tuple[Op, ...], mine: dict[str, list[int]]) -> Iterator[Tensor]:
    """This rank's share of the layer, one tensor at a time; every rank must run it to its end."""
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    for op in ops:
        if op.training in buffers:
            yield from (buffers[op.training] for _ in mine[op.training])
            continue
        with gathered([parameters[op.training]]):
            whole = op.to_checkpoint(parameters[op.training].detach())
            # what is served is bfloat16
            yield from (whole[i].to("cpu", torch.bfloat16) for i in mine[op.training])


def _write_weights(layer: Layer, ops: tuple[Op, ...], path: Path) -> dict[str, Any]:
    """Write this rank's share of the layer; returns the entry of its file."""
    rank, buffers = dist.get_rank(), dict(layer.named_buffers())
    mine = _share(ops, rank)
    shapes = {
        op.checkpoint[i]: (
            buffers[op.training].dtype if op.training in buffers else torch.bfloat16,
            op.shape if len(op.checkpoint) == 1 else op.shape[1:],
        )
        for op in ops
        for i in mine[op.training]
    }
    tensors = _weights(layer, ops, mine)
    try:
        return {_weights_file(rank): write_tensors(path / _weights_file(rank), shapes, tensors)}
    finally:
        # the other ranks gather with this one, whatever has become of its file
        for _ in tensors:
            pass


def _write_state(parts: list[Partition], path: Path) -> dict[str, Any]:
    """Write this rank's part of the optimizer state; returns the entry of its file."""
    file = _state_file(dist.get_rank())
    tensors = {f"{part.name}.{key}": part.state[key] for part in parts for key in KEYS}
    shapes = {name: (torch.float32, (tensor.numel(),)) for name, tensor in tensors.items()}
    return {file: write_tensors(path / file, shapes, iter(tensors.values()))}


def save(
    engine: Any,
    ops: tuple[Op, ...],
    run_dir: Path,
    step: int,
    meta: dict[str, Any],
    *,
    keep: int,
    draft: dict[str, Any] | None = None,
) -> Path:
    """Write, commit and publish a checkpoint; all ranks call this.

    Args:
        engine: the DeepSpeed engine; its module has the layer as `layer`.
        ops: key map of the target.
        run_dir: directory of the run.
        step: optimizer steps done.
        meta: `layer61.json` without what this function knows; `metrics.acceptance_length` decides on the best
            checkpoint.
        keep: newest checkpoints to keep beside the best.
        draft: config.json of an EAGLE-3 draft, by which its weights are recognised.

    Returns:
        The checkpoint.

    Raises:
        Layer61Error: the disk is full or not writable, on any rank. Earlier checkpoints are untouched and
            nothing is left of this one.
    """
    final = directory(run_dir) / tag(step)
    path, first = partial(final), dist.get_rank() == 0
    parts = partitions(engine)
    needed = 2 * sum(torch.Size(op.shape).numel() for op in ops) + 12 * sum(p.numel for p in parts)

    def attempt(act: Callable[[], T]) -> list[T]:
        def explained() -> T:
            try:
                return act()
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                raise Layer61Error(
                    f"cannot save step {step:,} in {final.parent}: {error.strerror}; a checkpoint takes"
                    f" {needed / 1e9:,.3f} GB, {shutil.disk_usage(run_dir).free / 1e9:,.3f} GB are free",
                    f"{'make room' if full else 'check the path and its permissions'}, then start again: the"
                    " same command goes on from the last checkpoint",
                ) from None

        return _together(explained)

    def prepare() -> None:
        if first:
            shutil.rmtree(path, ignore_errors=True)
            (path / WEIGHTS).mkdir(parents=True)
            (path / STATE).mkdir()

    def write() -> dict[str, Any]:
        try:
            files = _write_state(parts, path)
        finally:
            weights = _write_weights(engine.module.layer, ops, path)
        return {"files": files | weights, "slices": {p.name: [p.start, p.stop] for p in parts}}

    try:
        attempt(prepare)
        written = attempt(write)
        state = {
            "optimizer_step": optimizer_step(engine),
            "numel": {part.name: part.numel for part in parts},
            "files": {_state_file(rank): found["slices"] for rank, found in enumerate(written)},
        }
        files = {name: entry for found in written for name, entry in found["files"].items()}
        whole = {"format": 2, "step": step, "ranks": dist.get_world_size(), **meta, "state": state}
        attempt(lambda: _publish(path, final, whole, ops, files, keep, draft) if first else None)
    except Layer61Error:
        if first:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return final


def _publish(
    path: Path,
    final: Path,
    meta: dict[str, Any],
    ops: tuple[Op, ...],
    files: dict[str, Any],
    keep: int,
    draft: dict[str, Any] | None,
) -> None:
    """Commit what all ranks have written and give it its name; then see which checkpoints stay."""
    owner = {
        op.checkpoint[i]: Path(_weights_file(rank)).name
        for rank in range(meta["ranks"])
        for op in ops
        for i in _share(ops, rank)[op.training]
    }
    size = sum(entry["bytes"] for name, entry in files.items() if name.startswith(f"{WEIGHTS}/"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(owner.items()))}
    write_json(path / WEIGHTS / INDEX, index)
    write_json(path / META, meta)
    names = [f"{WEIGHTS}/{INDEX}", META]
    if draft is not None:
        names.append(f"{WEIGHTS}/config.json")
        write_json(path / names[-1], draft)
    small = {name: checksum(path / name) for name in names}
    write_commit(path, dict(sorted((files | small).items())))
    for folder in (path / WEIGHTS, path / STATE, path):
        fsync_directory(folder)
    if final.exists():
        log(
            "train", f"{final} is in the way of the checkpoint of that step; it is kept as {set_aside(final)}"
        )
    os.rename(path, final)
    fsync_directory(final.parent)
    atomic_write(final.parent / LATEST, final.name + "\n")
    _rank_best(final.parent.parent)
    _forget(final.parent.parent, keep)


def _rank_best(run_dir: Path) -> None:
    """Write `best.json`: the first of those with the highest acceptance; the best is always kept."""
    scores = {p.name: found for p in committed(run_dir) if (found := score(p)) is not None}
    if scores:
        name = max(scores, key=lambda name: scores[name])
        best = {"format": 1, "checkpoint": name, "acceptance_length": scores[name]}
        if best != read_best(run_dir):
            write_json(directory(run_dir) / BEST, best)


def _forget(run_dir: Path, keep: int) -> None:
    best = read_best(run_dir)
    for path in committed(run_dir)[:-keep]:
        if best is None or path.name != best["checkpoint"]:
            # half removed, it must not look like one that was damaged
            path.rename(partial(path))
            shutil.rmtree(partial(path))


def load(engine: Any, saved: Saved) -> Saved:
    """Restore parameters and optimizer of a fresh engine, exactly; all ranks call this.

    A checkpoint with a damaged file is set aside, and the one before it is taken.

    Args:
        engine: the DeepSpeed engine; its module has the layer as `layer`.
        saved: from `newest`.

    Returns:
        The checkpoint that was loaded.

    Raises:
        ConfigError: this run trains other parameters.
        InputError: it is damaged, and there is no other one.
        Layer61Error: a file cannot be read.
    """

    def read() -> None:
        try:
            _read(engine, saved)
        except OSError as error:
            raise Layer61Error(f"cannot read {saved.path}: {error}") from None

    try:
        _together(read)
    except InputError as error:
        if dist.get_rank() == 0:
            aside = set_aside(saved.path)
            log("train", f"{error.message}; the checkpoint is kept as {aside}, the one before it is taken")
        before = newest(saved.path.parent.parent)
        if before is None:
            raise InputError(
                f"{error.message}; it was the last checkpoint and is kept as {saved.path.name}.damaged",
                "the same command now starts from the beginning",
            ) from None
        return load(engine, before)
    take_over(engine, saved.meta["state"]["optimizer_step"])
    return saved


def _read(engine: Any, saved: Saved) -> None:
    """Fill this rank's partitions from the files that have some of them, and check its share of the rest.

    Raises:
        InputError: a file is damaged, or does not hold what the layer needs.
    """
    files, state = read_commit(saved.path), saved.meta["state"]
    parts = {part.name: part for part in partitions(engine)}
    if {name: part.numel for name, part in parts.items()} != state["numel"]:
        raise ConfigError(
            f"{saved.path} holds the state of other parameters than train.freeze leaves to train",
            "choose another run.dir",
        )
    filled = dict.fromkeys(parts, 0)
    for file, slices in state["files"].items():
        wanted = {}
        for name, (start, stop) in slices.items():
            part = parts[name]
            begin, end = max(start, part.start), min(stop, part.stop)
            if begin < end:
                filled[name] += end - begin
                for key in KEYS:
                    here = part.state[key][begin - part.start : end - part.start]
                    wanted[f"{name}.{key}"] = (begin - start, here)
        if wanted:
            _read_slices(saved.path / file, files[file], wanted)
    if short := [name for name, part in parts.items() if filled[name] != part.stop - part.start]:
        raise InputError(f"{saved.path} lacks a part of the state of {short[0]}")
    others = [name for name in files if name not in state["files"]]
    verify_files(saved.path, files, others[dist.get_rank() :: dist.get_world_size()])


def _read_slices(path: Path, entry: dict[str, Any], wanted: dict[str, tuple[int, Tensor]]) -> None:
    """Read slices of flat float32 tensors from a safetensors file, block by block, each checked.

    Args:
        path: the file.
        entry: its size and checksums.
        wanted: first element and destination, float32 [n] on any device, by tensor name.

    Raises:
        InputError: a block fails its checksum, or a tensor is not there.
    """
    buffer = block_buffer()
    with open(path, "rb", buffering=0) as f:

        def block(index: int) -> memoryview:
            f.seek(index * BLOCK)
            # the disk fetches the next one while this one is checked and copied
            os.posix_fadvise(f.fileno(), (index + 1) * BLOCK, BLOCK, os.POSIX_FADV_WILLNEED)
            piece = buffer[: min(BLOCK, entry["bytes"] - index * BLOCK)]
            count = 0
            while count < len(piece):
                count += f.readinto(piece[count:])
            check_block(path, entry, index, piece)
            return piece

        # the header of a rank's file is far shorter than a block
        head = block(0)
        length = 8 + int.from_bytes(head[:8], "little")
        header = json.loads(bytes(head[8:length]))
        places = []
        for name, (first, out) in wanted.items():
            begin = length + header[name]["data_offsets"][0] + 4 * first
            places.append((begin, begin + 4 * len(out), out))
        for index in range(-(-entry["bytes"] // BLOCK)):
            start, stop = index * BLOCK, (index + 1) * BLOCK
            here = [place for place in places if place[0] < stop and place[1] > start]
            if not here:
                continue
            data = torch.frombuffer(block(index), dtype=torch.uint8)
            for begin, end, out in here:
                low, high = max(begin, start), min(end, stop)
                piece = data[low - start : high - start].view(torch.float32)
                out[(low - begin) // 4 : (high - begin) // 4].copy_(piece)
