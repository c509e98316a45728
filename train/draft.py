"""One packed batch through the unroll and the head: what training differentiates and evaluation counts.

Legend: T tokens, D hidden_size, S steps, M predicted tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import ContractError
from configs.schema import TrainConfig
from train.loss import HeadLoss, head_loss
from train.model import MTPLayer
from train.unroll import Scored, select, unroll

__all__ = ["Draft", "Packed", "pack", "state_column"]


class Packed(NamedTuple):
    """Documents of one rank's micro-batch, on the device that computes.

    Attributes:
        input_ids: int64 [T].
        loss_mask: bool [T].
        cu_seqlens: int32 [B+1].
        hidden: the target's post-norm states, [T, D].
    """

    input_ids: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    hidden: Tensor

    def scored(self, num_steps: int) -> Scored:
        """The predictions of this batch that count.

        A batch without any has one that is not valid: every rank must run every module, and none may be
        left without a gradient.
        """
        found = select(self.loss_mask, self.cu_seqlens, num_steps)
        if len(found.tokens):
            return found
        zero = self.input_ids.new_zeros(1)
        place = zero.expand(num_steps, 1)
        return Scored(zero, zero, place, place.bool())


def state_column(contract: dict[str, Any]) -> int:
    """Which of a token's stored states is the post-norm one.

    Raises:
        ContractError: the store holds none.
    """
    sites = [state["site"] for state in contract["states"]]
    if "post_norm" not in sites:
        raise ContractError(
            f"the store holds states of {', '.join(sites)}, not post_norm",
            "dump post-norm states to train from",
        )
    return sites.index("post_norm")


def pack(batch: Any, column: int, dtype: torch.dtype, device: torch.device) -> Packed:
    """Copy a loader's batch to the device; its buffers may be reused afterwards.

    Args:
        batch: `featurestore.Batch`; one without documents becomes three tokens that nobody wants predicted.
        column: from `state_column`.
        dtype: dtype of the layer.
        device: where the layer is.
    """
    if len(batch.input_ids) == 0:
        width = batch.hidden.shape[-1]
        return Packed(
            torch.zeros(3, dtype=torch.int64, device=device),
            torch.zeros(3, dtype=torch.bool, device=device),
            torch.tensor([0, 3], dtype=torch.int32, device=device),
            torch.ones(3, width, dtype=dtype, device=device),
        )

    def copy(x: Tensor, to: torch.dtype | None = None) -> Tensor:
        # blocking: the loader reads into these buffers again as soon as its next batch is asked for
        return x.to(device=device, dtype=to, copy=True)

    return Packed(
        copy(batch.input_ids),
        copy(batch.loss_mask),
        copy(batch.cu_seqlens),
        copy(batch.hidden[:, column], dtype),
    )


class Draft(nn.Module):
    """The layer, its unroll and its loss in one forward, which is what DeepSpeed wraps.

    Args:
        layer: the MTP layer with its frozen tables.
        train: loss, temperature and position mask are read from it.
    """

    def __init__(self, layer: MTPLayer, train: TrainConfig) -> None:
        super().__init__()
        self.layer = layer
        self.train_config = train

    def forward(self, batch: Packed, scored: Scored, weights_SM: Tensor) -> HeadLoss:
        """Unroll the anchors and compare every scored prediction with the target's.

        Args:
            batch: the documents.
            scored: from `batch.scored`; its number of steps is the unroll's.
            weights_SM: float32 weight of each prediction; those that are not valid must weigh 0.
        """
        config = self.train_config
        states = unroll(
            self.layer,
            batch.input_ids,
            batch.hidden,
            batch.cu_seqlens,
            len(scored.place),
            config.mask_position_0,
            anchors=scored.anchors,
        )
        return head_loss(
            scored.students(states),
            batch.hidden[scored.teacher],
            self.layer.lm_head,
            loss=config.loss,
            weights=weights_SM,
            targets=batch.input_ids[scored.tokens],
            temperature=config.temperature,
        )
