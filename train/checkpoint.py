"""Training checkpoints: written aside, committed last, published by rename (layout: configs/run_dir.py).

DeepSpeed's own `latest` may name a checkpoint whose other ranks never finished writing. Here a checkpoint
exists from the moment its directory has its name: every file is complete by then.

Legend: E experts.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import InputError, Layer61Error
from configs.files import atomic_write, write_json
from configs.progress import log
from configs.run_dir import BEST, COMMIT, LATEST, META, committed, directory, read_best, read_meta, tag
from export.checkpoint import INDEX
from export.keymap import Op
from train.mtp import MTPLayer
from train.zero import gathered

__all__ = ["Saved", "clean", "load", "newest", "save"]

# tensors of one safetensors file; rank 0 holds as much at once
FILE_BYTES = 4 << 30
DEEPSPEED = "deepspeed"
WEIGHTS = "weights"


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint to go on from."""

    path: Path
    meta: dict[str, Any]


def newest(run_dir: Path) -> Saved | None:
    """The newest whole checkpoint of a run, the same one on every rank."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        whole = committed(run_dir)
        found = [whole[-1]] if whole else [None]
    # ranks look at the shared file system at different moments
    dist.broadcast_object_list(found)
    return Saved(found[0], read_meta(found[0])) if found[0] else None


def clean(run_dir: Path) -> None:
    """Remove what an interrupted save left behind; rank 0 only."""
    root = directory(run_dir)
    whole = {p.name for p in committed(run_dir)}
    for path in root.glob("*"):
        if path.name.endswith(".partial") or (path.name.startswith("step_") and path.name not in whole):
            log("train", f"removing {path}, which is not a whole checkpoint")
            shutil.rmtree(path)


def _tensors(layer: MTPLayer, ops: tuple[Op, ...]) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor of the layer by checkpoint name, whole on rank 0 and None elsewhere; one at a time."""
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    first = dist.get_rank() == 0
    for op in ops:
        if op.training in buffers:
            whole: Tensor | None = buffers[op.training].cpu()
        else:
            parameter = parameters[op.training]
            with gathered([parameter]):
                # what is served is bfloat16
                whole = parameter.detach().to("cpu", torch.bfloat16) if first else None
        if not first or whole is None:
            yield op.checkpoint[0], None
            continue
        for name, tensor in zip(op.checkpoint, op.to_checkpoint(whole), strict=True):
            yield name, tensor.clone()


def _write_weights(layer: MTPLayer, ops: tuple[Op, ...], path: Path) -> None:
    """Write the layer as safetensors files and their index; all ranks call this, rank 0 writes."""
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        file = f"layer-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(held, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in _tensors(layer, ops):
        if tensor is None:
            continue
        held[name] = tensor.contiguous()
        total += tensor.nbytes
        if sum(t.nbytes for t in held.values()) >= FILE_BYTES:
            flush()
    if dist.get_rank() == 0:
        if held:
            flush()
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(path / INDEX, index)


def save(
    engine: Any, ops: tuple[Op, ...], run_dir: Path, step: int, meta: dict[str, Any], *, keep: int
) -> Path:
    """Write, commit and publish a checkpoint; all ranks call this.

    Args:
        engine: the DeepSpeed engine; its module has the layer as `layer`.
        ops: key map of the target.
        run_dir: directory of the run.
        step: optimizer steps done.
        meta: `layer61.json` without `format`, `step` and `ranks`; `metrics.acceptance_length` decides on the
            best checkpoint.
        keep: newest checkpoints to keep beside the best.

    Returns:
        The checkpoint.
    """
    root, name = directory(run_dir), tag(step)
    final, partial = root / name, root / f".{name}.partial"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / WEIGHTS).mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=DEEPSPEED, save_latest=False)
    _write_weights(engine.module.layer, ops, partial / WEIGHTS)
    dist.barrier()
    if first:
        meta = {"format": 1, "step": step, "ranks": dist.get_world_size(), **meta}
        write_json(partial / META, meta)
        files = {
            str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()
        }
        write_json(partial / COMMIT, {"format": 1, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        atomic_write(root / LATEST, name + "\n")
        _rank_best(run_dir, name, meta["metrics"].get("acceptance_length"))
        _forget(run_dir, keep)
    dist.barrier()
    return final


def _rank_best(run_dir: Path, name: str, score: float | None) -> None:
    best = read_best(run_dir)
    alive = {p.name for p in committed(run_dir)}
    if score is not None and (
        best is None or best["checkpoint"] not in alive or score > best["acceptance_length"]
    ):
        write_json(directory(run_dir) / BEST, {"format": 1, "checkpoint": name, "acceptance_length": score})


def _forget(run_dir: Path, keep: int) -> None:
    best = read_best(run_dir)
    for path in committed(run_dir)[:-keep]:
        if best is None or path.name != best["checkpoint"]:
            # without its commit it is no checkpoint, however far the removal gets
            (path / COMMIT).unlink()
            shutil.rmtree(path)


@contextlib.contextmanager
def _universal(saved: Saved) -> Iterator[Path]:
    """The checkpoint in DeepSpeed's universal form, which any number of ranks loads; removed afterwards."""
    first = dist.get_rank() == 0
    place: list[Any] = [None]
    if first:
        place = [tempfile.mkdtemp(prefix=".universal-", suffix=".partial", dir=saved.path.parent)]
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(saved.path / DEEPSPEED), "--output_folder", f"{place[0]}/universal"]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(place[0])
            raise Layer61Error(
                f"{saved.path} could not be converted for another number of ranks:"
                f" {done.stderr.strip()[-500:]}",
                f"continue with the {saved.meta['ranks']} ranks that saved it",
            )
    dist.broadcast_object_list(place)
    try:
        yield Path(place[0])
        dist.barrier()
    finally:
        if first:
            shutil.rmtree(place[0], ignore_errors=True)


def load(engine: Any, saved: Saved) -> None:
    """Restore parameters and optimizer of a fresh engine, exactly; all ranks call this.

    The engine must have been made with `load_universal` iff the checkpoint was saved by another number of
    ranks.

    Raises:
        InputError: DeepSpeed does not accept the files.
    """
    if saved.meta["ranks"] == dist.get_world_size():
        _load(engine, saved.path, DEEPSPEED)
        return
    with _universal(saved) as folder:
        _load(engine, folder, "universal")
    # DeepSpeed gives every group of parameters the same step tensor, which AdamW then counts up several times
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _load(engine: Any, folder: Path, name: str) -> None:
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=name)
    except (RuntimeError, KeyError, AssertionError, OSError, EOFError, ValueError, UnpicklingError) as error:
        raise InputError(
            f"{folder} does not fit this run: {error}", "remove the checkpoint to go on from the one before"
        ) from error
    if path is None:
        raise InputError(f"{folder} holds no DeepSpeed checkpoint", "remove it to go on from the one before")
