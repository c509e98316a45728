"""One packed batch through the unroll and the head: what training differentiates and evaluation counts.

Legend: T tokens, D hidden_size, S steps, M predicted tokens.
"""

from torch import Tensor, nn

from configs.schema import TrainConfig
from train.batch import Packed
from train.loss import HeadLoss, head_loss
from train.mtp import MTPLayer
from train.unroll import Scored, unroll

__all__ = ["Draft"]


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
