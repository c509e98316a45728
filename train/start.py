"""What a run trains, and where its first values come from: the released layer, or a new EAGLE-3 draft."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from configs import contract
from configs.contract import aux_layers
from configs.eagle3 import IDS, new_config, usual_layers
from configs.errors import ContractError, InputError
from configs.schema import RunConfig
from export.checkpoint import Checkpoint
from export.keymap import Op, draft_keymap
from featurestore import FeatureStore
from train.eagle3 import initial_tensors, maps
from train.model import eagle3_config, kept_in, layer_tensors
from train.vocabulary import describe, kept_tokens, stop_ids, token_counts

__all__ = ["Start", "check_weights", "released", "start", "stored_layers"]


@dataclass(frozen=True)
class Start:
    """The draft of a run.

    Attributes:
        draft: config.json of an EAGLE-3 draft; None for the target's MTP layer.
        ops: key map.
        contract: what checkpoints say of it.
        keep: its vocabulary, ascending int64 [N]; None for the target's.
    """

    draft: dict[str, Any] | None
    ops: tuple[Op, ...]
    contract: contract.Draft
    keep: Tensor | None

    @property
    def origin(self) -> str:
        """Where its first values come from, in words."""
        return "the released layer" if self.draft is None else "a random start"

    def tensors(
        self, target: Checkpoint, seed: int, weights: Path | None = None, *, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """The first values by training name, in the order of `ops`; from `weights` where they are given.

        Raises:
            InputError: `weights` are incomplete, or have a head of their own where the target's is to serve.
        """
        if weights is not None or self.draft is None:
            for name, tensor in layer_tensors(target, weights, dtype=dtype):
                if name == "own_head.weight" and self.contract.head == "target":
                    self._require_rows(tensor, target, str(weights))
                yield name, tensor
            return
        std = target.config.get("initializer_range") or 0.02
        yield from initial_tensors(self.ops, std, seed, dtype=dtype)
        # the head reads states of this scale, which a small learning rate takes thousands of steps to find
        yield "norm.weight", target.get("model.norm.weight", dtype=dtype)
        if self.draft.get("draft_vocab_size"):
            head_VD = target.get("lm_head.weight", dtype=dtype)
            yield "own_head.weight", head_VD if self.keep is None else head_VD[self.keep]
        if self.keep is not None:
            yield from maps(self.keep, target.config["vocab_size"]).items()

    def _require_rows(self, head_ND: Tensor, target: Checkpoint, weights: str) -> None:
        """Refuse a head that is not made of the target's rows. Raises InputError."""
        rows_ND = target.get("lm_head.weight")
        rows_ND = rows_ND if self.keep is None else rows_ND[self.keep]
        if not torch.equal(head_ND.bfloat16(), rows_ND.bfloat16()):
            raise InputError(
                f"train.init_from: {weights} has a head of its own, not rows of the target's",
                "set eagle3.head = 'trained' to go on with it",
            )


def released(target: dict[str, Any], mask_position_0: bool = True, *, sparse: bool = False) -> Start:
    """Training of the target's own MTP layer, from its config.json."""
    attention: Literal["dense", "sparse"] = "sparse" if sparse else "dense"
    said = contract.Draft(mask_position_0=mask_position_0, attention=attention)
    return Start(None, draft_keymap(target, None), said, None)


def stored_layers(store: FeatureStore, target: dict[str, Any]) -> list[int]:
    """Layers whose inputs a store holds.

    Raises:
        ContractError: it holds none.
    """
    layers = aux_layers(store.contract)
    if not layers:
        raise ContractError(
            f"the store {store.url} holds no layer inputs, from which an EAGLE-3 draft starts",
            f"dump into a new store with dump.aux_layers = {usual_layers(target)}",
        )
    return layers


def _settings(draft: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a draft of this config.json; whose rows a pruned head has it does not say."""
    size, whole = draft.get("draft_vocab_size"), draft["vocab_size"]
    pruned = bool(size) and size != whole
    return {
        "dump.aux_layers": list(draft[IDS]),
        "eagle3.intermediate_size": draft["intermediate_size"],
        "eagle3.carry": "post_norm" if draft.get("norm_output") else "pre_norm",
        "eagle3.fc_norm": bool(draft.get("fc_norm")),
        "eagle3.draft_vocab_size": size if pruned else None,
        "eagle3.head": None if pruned else "trained" if size else "target",
    }


def check_weights(weights: Path, target: Checkpoint, draft: dict[str, Any] | None) -> None:
    """Refuse weights of another draft than the settings describe.

    Args:
        weights: what `train.init_from` means.
        target: the target.
        draft: config.json of the draft to train; None for the MTP layer.

    Raises:
        InputError: says what has to be set.
    """
    held = eagle3_config(weights, target)
    if draft is None or held is None:
        if draft is not held:
            kinds = ("mtp", "an MTP layer"), ("eagle3", "an EAGLE-3 draft")
            setting, kind = kinds[held is not None]
            raise InputError(
                f"train.init_from: {weights} is {kind}, not what train.draft says",
                f"set train.draft = {setting}",
            )
        return
    wanted, found = _settings(draft), _settings(held)
    if differing := [key for key in wanted if wanted[key] != found[key]]:
        raise InputError(
            f"train.init_from: {weights} was made with "
            + ", ".join(f"{key} = {found[key]!r}, not {wanted[key]!r}" for key in differing),
            "set them so, or start from other weights"
            + ("; other layer inputs need another store" if "dump.aux_layers" in differing else ""),
        )


def start(
    config: RunConfig,
    store: FeatureStore,
    target: Checkpoint,
    *,
    sparse: bool = False,
    weights: Path | None = None,
    saved: Path | None = None,
) -> Start:
    """Settle what a run trains; all ranks call this.

    Args:
        config: the settings.
        store: the store.
        target: the target.
        sparse: with the indexer's attention.
        weights: what `train.init_from` means, for a run that begins.
        saved: the weights of the checkpoint that a run goes on from. Its vocabulary, or that of `weights`, is
            kept, whatever the store holds by now.

    Raises:
        ContractError: the store lacks the states that the draft needs.
        ConfigError: the settings do not fit the target.
        InputError: `weights` are of another draft.
    """
    if config.train.draft == "mtp":
        if weights is not None:
            check_weights(weights, target, None)
        return released(target.config, config.train.mask_position_0, sparse=sparse)
    layers = stored_layers(store, target.config)
    draft, settings = new_config(config, target.config, layers), config.eagle3
    if weights is not None:
        check_weights(weights, target, draft)
    keep = None
    if settings.draft_vocab_size is not None:
        made = saved or weights
        found = [None if made is None else kept_in(made, draft)]
        if found[0] is None and dist.get_rank() == 0:
            counts = token_counts(store, target.config["vocab_size"])
            size = settings.draft_vocab_size
            found = [kept_tokens(counts, size, stop_ids(target.config), "eagle3.draft_vocab_size")]
        dist.broadcast_object_list(found)
        keep = found[0]
    said = contract.Draft(
        kind="eagle3",
        carry=settings.carry,
        mask_position_0=False,
        aux_layers=tuple(layers),
        head=settings.head,
        vocabulary=describe(keep),
    )
    return Start(draft, draft_keymap(target.config, draft), said, keep)
