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
from configs.eagle3 import draft_config
from configs.errors import ContractError, InputError
from configs.schema import RunConfig
from export.check import refuse_layers
from export.checkpoint import Checkpoint
from export.keymap import Op, draft_keymap
from featurestore import FeatureStore
from train.eagle3 import initial_tensors
from train.model import eagle3_config, layer_tensors
from train.vocabulary import describe, kept_tokens, maps, stop_ids, token_counts

__all__ = ["Start", "new_config", "released", "start"]


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
            InputError: `weights` hold another draft than the settings describe.
        """
        if weights is not None and draft_keymap(target.config, eagle3_config(weights, target)) != self.ops:
            raise InputError(
                f"train.init_from: {weights} holds another kind or other sizes of draft than this run trains",
                "set train.draft and [eagle3] to those of the weights",
            )
        if weights is not None or self.draft is None:
            yield from layer_tensors(target, weights, dtype=dtype)
            return
        std = target.config.get("initializer_range") or 0.02
        yield from initial_tensors(self.ops, std, seed, dtype=dtype)
        if self.draft.get("draft_vocab_size"):
            head_VD = target.get("lm_head.weight", dtype=dtype)
            yield "own_head.weight", head_VD if self.keep is None else head_VD[self.keep]
        if self.keep is not None:
            yield from maps(self.keep, target.config["vocab_size"]).items()


def new_config(config: RunConfig, target: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The config.json of the draft that `[eagle3]` describes, with the inputs of these layers.

    Raises:
        ConfigError: a server would shift the layers.
    """
    refuse_layers(layers)
    settings = config.eagle3
    size = settings.draft_vocab_size
    if size is None and settings.head == "trained":
        size = target["vocab_size"]
    return draft_config(
        target,
        layers,
        intermediate_size=settings.intermediate_size,
        carry=settings.carry,
        fc_norm=settings.fc_norm,
        draft_vocab_size=size,
    )


def released(target: dict[str, Any], mask_position_0: bool = True, *, sparse: bool = False) -> Start:
    """Training of the target's own MTP layer, from its config.json."""
    attention: Literal["dense", "sparse"] = "sparse" if sparse else "dense"
    said = contract.Draft(mask_position_0=mask_position_0, attention=attention)
    return Start(None, draft_keymap(target, None), said, None)


def start(config: RunConfig, store: FeatureStore, target: Checkpoint, *, sparse: bool = False) -> Start:
    """Settle what a run trains, with sparse attention or not; all ranks call this.

    Raises:
        ContractError: the store lacks the states that the draft needs.
        ConfigError: the settings do not fit the target.
    """
    if config.train.draft == "mtp":
        return released(target.config, config.train.mask_position_0, sparse=sparse)
    layers = aux_layers(store.contract)
    if not layers:
        count = target.config["num_hidden_layers"]
        usual = [2, count // 2, count - 3] if count > 8 else [count - 2, count - 1]
        raise ContractError(
            f"the store {store.url} holds no layer inputs, from which an EAGLE-3 draft starts",
            f"dump into a new store with dump.aux_layers = {usual}",
        )
    draft, settings = new_config(config, target.config, layers), config.eagle3
    keep = None
    if settings.draft_vocab_size is not None:
        found: list[Any] = [None]
        if dist.get_rank() == 0:
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
