"""Write an EAGLE-3 draft as a directory that vLLM and sglang load: bfloat16, every tensor, nothing else.

    config.json          configs/eagle3.py
    model.safetensors    fc, fc_norm.*, layers.0.*, norm; lm_head, d2t, t2d of a draft with a head of its own
    README.md            what it is, how to serve it
    layer61.json         what it was made from, which makes a second run a no-op

Neither embedding nor the target's head is written: servers take the target's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import run_dir
from configs.contract import require_trained_for, target_contract, vocabulary
from configs.eagle3 import IDS, recognise, refuse_layers
from configs.errors import ConfigError, InputError
from configs.files import write_json
from configs.progress import log
from export.card import model_card
from export.check import check_eagle3
from export.checkpoint import Checkpoint
from export.directory import copy_companions, require_free, save, weights_identity, write_once
from export.keymap import Op, account, eagle3_keymap

__all__ = ["Plan", "check_place", "describe", "export", "prepare", "prune"]

Keep = Callable[[int], Tensor]
FILE = "model.safetensors"


def prune(tensors: Mapping[str, Tensor], head_VD: Tensor, keep_N: Tensor) -> dict[str, Tensor]:
    """The tensors of a draft that can say the tokens `keep_N` alone.

    Args:
        tensors: by checkpoint name, of a draft with all tokens of the target.
        head_VD: the target's head, for a draft without one.
        keep_N: target ids to keep, ascending int64.
    """
    t2d = torch.zeros(len(head_VD), dtype=torch.bool)
    t2d[keep_N] = True
    head = tensors.get("lm_head.weight", head_VD)[keep_N].to(torch.bfloat16)
    d2t = keep_N - torch.arange(len(keep_N))
    return {**tensors, "lm_head.weight": head.contiguous(), "d2t": d2t, "t2d": t2d}


def describe(config: Mapping[str, Any], out: Path, step: int | None = None) -> str:
    """One line about an export: its files and their sizes.

    Args:
        config: config.json as it will be written.
        out: the directory.
        step: of the checkpoint it is made from.
    """
    sizes = [math.prod(op.shape) * _dtype(op).itemsize for op in eagle3_keymap(config)]
    tokens = config.get("draft_vocab_size") or config["vocab_size"]
    of_step = "" if step is None else f" of step {step:,}"
    return (
        f"an EAGLE-3 draft{of_step} that can say {tokens:,} tokens, to {out}:"
        f" {FILE} ({len(sizes)} tensors, {sum(sizes) / 1e9:,.3f} GB in bfloat16), config.json, README.md,"
        f" {run_dir.META} and the target's tokenizer"
    )


def _dtype(op: Op) -> torch.dtype:
    return {"d2t": torch.int64, "t2d": torch.bool}.get(op.training, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """An export to be.

    Attributes:
        weights, target: the checkpoints.
        directory: where it will be.
        trained: config.json of the weights.
        config: the one to write.
        said: `layer61.json` of the weights, empty where there is none.
        draft_vocab_size: as asked for.
        prune_to: tokens to keep of a draft with all of them; 0 where it stays as it is.
    """

    weights: Checkpoint
    target: Checkpoint
    directory: Path
    trained: dict[str, Any]
    config: dict[str, Any]
    said: dict[str, Any]
    draft_vocab_size: int | None
    prune_to: int

    def describe(self) -> str:
        return describe(self.config, self.directory, self.said.get("step"))

    @property
    def sources(self) -> dict[str, Path]:
        return {"weights": self.weights.directory, "target": self.target.directory}

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the directory."""
        return {
            "format": 1,
            "kind": "eagle3",
            "target": target_contract(self.target.directory).model_dump(mode="json", exclude={"path"}),
            "weights": weights_identity(self.weights),
            "draft_vocab_size": self.draft_vocab_size,
        }


def prepare(
    weights_dir: Path | str,
    target_dir: Path | str,
    out_dir: Path | str,
    *,
    draft_vocab_size: int | None = None,
) -> Plan:
    """See by headers alone what an export would be; arguments and errors as `export`."""
    directory = Path(weights_dir).absolute()
    target = Checkpoint(target_dir)
    if (directory / run_dir.WEIGHTS).is_dir():
        directory = directory / run_dir.WEIGHTS
    config = recognise(directory, target.config)
    if config is None:
        raise InputError(f"{directory} is no EAGLE-3 draft", "set train.draft = mtp to export an MTP layer")
    refuse_layers(config[IDS])
    weights = Checkpoint(directory)
    places = [p for p in (directory, directory.parent) if (p / run_dir.META).is_file()]
    said = run_dir.read_meta(places[0]) if places else {}
    require_trained_for(said.get("contract"), target.directory, f"weights {weights.directory}")
    ops = eagle3_keymap(config)
    account(weights.names, [op.checkpoint[0] for op in ops], str(directory))
    for op in ops:
        if weights.shape(op.checkpoint[0]) != op.shape:
            raise InputError(
                f"{weights.directory}: {op.checkpoint[0]} has shape {weights.shape(op.checkpoint[0])},"
                f" expected {op.shape}"
            )
    size, whole = config.get("draft_vocab_size"), config["vocab_size"]
    if draft_vocab_size is not None and size not in (None, draft_vocab_size, whole):
        raise InputError(
            f"{directory} can say {size:,} tokens, trained so;"
            f" export.draft_vocab_size = {draft_vocab_size:,} cannot choose others",
            "leave export.draft_vocab_size out, or train with eagle3.draft_vocab_size",
        )
    if draft_vocab_size is not None and draft_vocab_size >= whole:
        raise ConfigError(
            f"export.draft_vocab_size = {draft_vocab_size:,}: the target has {whole:,} tokens",
            "leave export.draft_vocab_size out to keep them all",
        )
    prune_to = draft_vocab_size if draft_vocab_size is not None and size != draft_vocab_size else 0
    written = {**config, "draft_vocab_size": prune_to} if prune_to else config
    return Plan(weights, target, Path(out_dir).absolute(), config, written, said, draft_vocab_size, prune_to)


def check_place(plan: Plan, *, replace: bool) -> None:
    """What `export` would refuse about the directory, found without reading a tensor."""
    folder = plan.weights.directory
    ours = folder.name == run_dir.WEIGHTS and (folder.parent / run_dir.COMMIT).is_file()
    identity = plan.identity() if ours else {"kind": "eagle3"}
    require_free(plan.directory, identity, plan.sources, replace=replace)


def export(
    weights_dir: Path | str,
    target_dir: Path | str,
    out_dir: Path | str,
    *,
    draft_vocab_size: int | None = None,
    keep: Keep | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Write a draft's directory, published by one rename.

    Args:
        weights_dir: a training checkpoint, its `weights`, or another export.
        target_dir: the target checkpoint.
        out_dir: directory to write; an identical export in place is left as it is.
        draft_vocab_size: tokens to keep of a draft that was trained with all of them.
        keep: gives the ids of so many tokens, ascending int64 [N].
        replace: put it in the place of another or a damaged export.

    Returns:
        `layer61.json` of the directory, with `directory` and `reused`.

    Raises:
        InputError: the draft is incomplete, not finite, of another architecture or pruned already.
        ContractError: it was trained for another target.
        ConfigError: a server would take its layer inputs from other layers, or there are not so many tokens.
    """
    planned = prepare(weights_dir, target_dir, out_dir, draft_vocab_size=draft_vocab_size)
    manifest, reused = write_once(
        planned.directory,
        planned.identity(),
        lambda place: _fill(place, planned, keep),
        sources=planned.sources,
        replace=replace,
    )
    out = planned.directory
    log(
        "export",
        f"already done: {out} is this export; nothing to do" if reused else f"wrote {planned.describe()}",
    )
    return {**manifest, "directory": str(out), "reused": reused}


def _fill(place: Path, plan: Plan, keep: Keep | None) -> dict[str, Any]:
    """Write the files; returns what the manifest says of them."""
    weights, target, config, said = plan.weights, plan.target, plan.config, plan.said
    tensors: dict[str, Tensor] = {}
    draft = dict(said.get("draft") or {})
    for op in eagle3_keymap(plan.trained):
        name = op.checkpoint[0]
        tensor = weights.get(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"{weights.directory}: {name} holds NaN or infinite values",
                "training diverged before this checkpoint; export an earlier one",
            )
        tensors[name] = tensor.to(_dtype(op))
    if plan.prune_to:
        assert keep is not None
        kept = keep(plan.prune_to)
        tensors = prune(tensors, target.get("lm_head.weight", dtype=torch.bfloat16), kept)
        draft["vocabulary"] = vocabulary(kept.tolist()).model_dump(mode="json")
    entry = save(place / FILE, {name: tensor.contiguous() for name, tensor in tensors.items()})
    write_json(place / "config.json", config)
    copy_companions(target.directory, place)
    problems = check_eagle3(place, target.directory)
    servers = [server for server, found in problems.items() if not found]
    if len(servers) < len(problems):
        raise InputError(f"not every server would load the export: {problems}")
    manifest = {
        "kind": "eagle3",
        "contract": said.get("contract"),
        "draft": draft or None,
        "aux_layers": config[IDS],
        "draft_vocab_size": config.get("draft_vocab_size") or config["vocab_size"],
        "step": said.get("step"),
        "weights": str(weights.directory),
        "target": str(target.directory),
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "servers": servers,
        "files": {FILE: entry},
    }
    # of the draft with all tokens, where some are left out here
    metrics = {} if plan.prune_to else said.get("metrics") or {}
    (place / "README.md").write_text(model_card(manifest, metrics, target.config), encoding="utf-8")
    return manifest
