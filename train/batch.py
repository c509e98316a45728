"""One packed batch on the device, which documents are held out, and whether a store fits the target.

Legend: T tokens, D hidden_size, B documents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.contract import Target, norm_and_head_sha256, require_same, target_contract
from configs.errors import ConfigError, ContractError
from configs.held_out import is_held_out, read_record, require_recorded, uid_group
from configs.run_dir import committed
from configs.schema import RunConfig
from featurestore import FeatureStore, open_store
from train.unroll import Scored, select

__all__ = ["Packed", "check_contract", "held_out", "open_split", "pack", "state_columns"]


class Packed(NamedTuple):
    """Documents of one rank's micro-batch, on the device that computes.

    Attributes:
        input_ids: int64 [T].
        loss_mask: bool [T].
        cu_seqlens: int32 [B+1].
        hidden: the target's post-norm states, [T, D].
        start: what the draft starts from: the same, or layer inputs [T, K, D].
        uids: of the documents.
    """

    input_ids: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    hidden: Tensor
    start: Tensor
    uids: tuple[int, ...] = ()

    def scored(self, num_steps: int) -> Scored:
        """The predictions of this batch that count.

        If nothing is scored, one invalid prediction stands in: every rank must run every module and every
        parameter must get a gradient.
        """
        found = select(self.loss_mask, self.cu_seqlens, num_steps)
        if len(found.tokens):
            return found
        zero = self.input_ids.new_zeros(1)
        place = zero.expand(num_steps, 1)
        return Scored(zero, zero, place, place.bool())


def state_columns(contract: dict[str, Any], aux_layers: Sequence[int] = ()) -> list[int]:
    """Which of a token's stored states a draft needs: the post-norm one, then the inputs of `aux_layers`.

    Raises:
        ContractError: the store does not hold them all.
    """
    stored = [(state["site"], state["layer"]) for state in contract["states"]]
    sites = [site for site, _ in stored]
    if "post_norm" not in sites:
        raise ContractError(
            f"the store holds states of {', '.join(sites)}, not post_norm",
            "dump post-norm states to train from",
        )
    missing = [k for k in aux_layers if ("layer_input", k) not in stored]
    if missing:
        held = [k for site, k in stored if site == "layer_input"]
        raise ContractError(
            f"the draft starts from the inputs of layers {list(aux_layers)},"
            f" the store holds {held or 'none'}",
            f"dump with dump.aux_layers = {list(aux_layers)}",
        )
    return [sites.index("post_norm"), *(stored.index(("layer_input", k)) for k in aux_layers)]


def pack(batch: Any, dtype: torch.dtype, device: torch.device) -> Packed:
    """Copy a loader's batch to the device; its buffers may be reused afterwards.

    Args:
        batch: `featurestore.Batch` of the states that `state_columns` names, in that order; an empty one
            becomes one document of three tokens, all masked out.
        dtype: dtype of the layer.
        device: where the layer is.
    """
    if len(batch.input_ids) == 0:
        ones = torch.ones(3, *batch.hidden.shape[1:], dtype=dtype, device=device)
        return Packed(
            torch.zeros(3, dtype=torch.int64, device=device),
            torch.zeros(3, dtype=torch.bool, device=device),
            torch.tensor([0, 3], dtype=torch.int32, device=device),
            ones[:, 0],
            ones[:, 1:] if ones.shape[1] > 1 else ones[:, 0],
        )

    def copy(x: Tensor, to: torch.dtype | None = None) -> Tensor:
        # blocking: asking the loader for its next batch overwrites these buffers
        return x.to(device=device, dtype=to, copy=True)

    hidden = copy(batch.hidden[:, 0], dtype)
    return Packed(
        copy(batch.input_ids),
        copy(batch.loss_mask),
        copy(batch.cu_seqlens),
        hidden,
        copy(batch.hidden[:, 1:], dtype) if batch.hidden.shape[1] > 1 else hidden,
        tuple(batch.uids),
    )


def check_contract(store: FeatureStore, directory: Path) -> Target:
    """Check that a store was dumped from a target, as far as the target's files can say.

    Raises:
        ContractError: names every field that differs.
        InputError: the target is incomplete.
    """
    target = target_contract(directory)
    found = store.contract
    what = f"store {store.url} and target {directory}"
    hint = "set target.path to the checkpoint the store was dumped from, or dump again"
    require_same(
        {"target": found["target"], "norm_and_head_sha256": found["norm_and_head_sha256"]},
        {
            "target": target.model_dump(mode="json"),
            "norm_and_head_sha256": norm_and_head_sha256(directory),
        },
        what,
        hint=hint,
    )
    if store.hidden_size != target.hidden_size:
        sizes = f"hidden_size {store.hidden_size} and {target.hidden_size}"
        raise ContractError(f"{what} do not belong together: {sizes}", hint)
    return target


def open_split(config: RunConfig) -> FeatureStore:
    """The store of a run, with what the run holds out: by its settings, which must be those it began with.

    Checkpoints of a run that recorded nothing were trained on what the store's own split said.

    Raises:
        StoreError: there is no store, or it cannot be read.
        ConfigError: the settings hold out other documents than the run's training did.
    """
    share, seed = config.prompts.held_out, config.run.seed
    store = open_store(config.train_store_path)
    require_recorded(config.run.dir, store.uid, share, seed)
    if read_record(config.run.dir) is None and committed(config.run.dir):
        return store
    return store.holding_out(lambda uids: is_held_out(uid_group(uids), share, seed))


def held_out(store: FeatureStore, limit: int | None) -> np.ndarray:
    """Numbers of the held-out documents to evaluate, in the order of their uid so that a limit is fair.

    Raises:
        ConfigError: the store has none.
    """
    documents = np.flatnonzero(store.held_out)
    if not len(documents):
        raise ConfigError(
            f"{store.url} has no held-out documents to evaluate on",
            "set prompts.held_out above 0 before training",
        )
    return documents[np.argsort(store.uid[documents], kind="stable")][:limit]
