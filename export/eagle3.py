"""Write an EAGLE-3 draft as a directory that vLLM and sglang load: bfloat16, every tensor, nothing else.

    config.json          configs/eagle3.py
    model.safetensors    fc, fc_norm.*, layers.0.*, norm; lm_head, d2t, t2d of a draft with a head of its own
    README.md            what it is, how to serve it
    layer61.json         what it was made from, which makes a second run a no-op

Neither embedding nor the target's head is written: servers take the target's.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import run_dir
from configs.contract import require_trained_for, target_contract, vocabulary
from configs.eagle3 import IDS, recognise
from configs.errors import InputError
from configs.files import write_json
from configs.progress import log
from export.card import model_card
from export.check import check_eagle3, refuse_layers
from export.checkpoint import Checkpoint
from export.directory import copy_companions, save, weights_identity, write_once
from export.keymap import Op, account, eagle3_keymap

__all__ = ["export", "prune"]

Keep = Callable[[int], Tensor]


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


def export(
    weights_dir: Path | str,
    target_dir: Path | str,
    out_dir: Path | str,
    *,
    draft_vocab_size: int | None = None,
    keep: Keep | None = None,
    dry_run: bool = False,
    replace: bool = False,
) -> dict[str, Any]:
    """Write a draft's directory, published by one rename.

    Args:
        weights_dir: a training checkpoint, its `weights`, or another export.
        target_dir: the target checkpoint.
        out_dir: directory to write; an identical export in place is left as it is.
        draft_vocab_size: tokens to keep of a draft that was trained with all of them.
        keep: gives the ids of so many tokens, ascending int64 [N].
        dry_run: check by the headers, say what would be written, and stop.
        replace: put it in the place of another or a damaged export.

    Returns:
        `layer61.json` of the directory, with `directory` and `reused`.

    Raises:
        InputError: the draft is incomplete, not finite, of another architecture or pruned already.
        ContractError: it was trained for another target.
        ConfigError: a server would take its layer inputs from other layers.
    """
    directory, out = Path(weights_dir).absolute(), Path(out_dir).absolute()
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
    if draft_vocab_size is not None and config.get("draft_vocab_size") not in (
        None,
        draft_vocab_size,
        config["vocab_size"],
    ):
        raise InputError(
            f"{directory} can say {config['draft_vocab_size']:,} tokens, trained so;"
            f" export.draft_vocab_size = {draft_vocab_size:,} cannot choose others",
            "leave export.draft_vocab_size out, or train with eagle3.draft_vocab_size",
        )
    pruned = draft_vocab_size is not None and config.get("draft_vocab_size") != draft_vocab_size
    step = said.get("step")
    size = draft_vocab_size or config.get("draft_vocab_size") or config["vocab_size"]
    what = f"an EAGLE-3 draft{'' if step is None else f' of step {step:,}'}, {size:,} tokens, to {out}"
    if dry_run:
        log("export", what)
        return {"directory": str(out), "tensors": len(ops)}
    identity = {
        "format": 1,
        "kind": "eagle3",
        "target": target_contract(target.directory).model_dump(mode="json", exclude={"path"}),
        "weights": weights_identity(weights),
        "draft_vocab_size": draft_vocab_size,
    }
    manifest, reused = write_once(
        out,
        identity,
        lambda place: _fill(place, weights, target, config, ops, said, size if pruned else 0, keep),
        sources={"weights": weights.directory, "target": target.directory},
        replace=replace,
    )
    log("export", f"already done: {out} is this export; nothing to do" if reused else f"wrote {what}")
    return {**manifest, "directory": str(out), "reused": reused}


def _fill(
    place: Path,
    weights: Checkpoint,
    target: Checkpoint,
    config: dict[str, Any],
    ops: tuple[Op, ...],
    said: dict[str, Any],
    prune_to: int,
    keep: Keep | None,
) -> dict[str, Any]:
    """Write the files; returns what the manifest says of them."""
    tensors: dict[str, Tensor] = {}
    draft = dict(said.get("draft") or {})
    for op in ops:
        name = op.checkpoint[0]
        tensor = weights.get(name)
        if tensor.shape != op.shape:
            raise InputError(
                f"{weights.directory}: {name} has shape {tuple(tensor.shape)}, expected {op.shape}"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"{weights.directory}: {name} holds NaN or infinite values",
                "training diverged before this checkpoint; export an earlier one",
            )
        tensors[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    if prune_to:
        assert keep is not None
        kept = keep(prune_to)
        tensors = prune(tensors, target.get("lm_head.weight", dtype=torch.bfloat16), kept)
        config = {**config, "draft_vocab_size": prune_to}
        draft["vocabulary"] = vocabulary(kept.tolist()).model_dump(mode="json")
    file = "model.safetensors"
    entry = save(place / file, {name: tensor.contiguous() for name, tensor in tensors.items()})
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
        "files": {file: entry},
    }
    acceptance = (said.get("metrics") or {}).get("acceptance_length")
    (place / "README.md").write_text(model_card(manifest, acceptance, target.config), encoding="utf-8")
    return manifest
