"""One packed batch through the unroll and the head: what training differentiates and evaluation counts.

Legend: T tokens, D hidden_size, E experts, S steps, M predicted tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import TrainConfig
from train.batch import Packed
from train.blocks import MoE
from train.eagle3 import Eagle3Layer
from train.index_loss import IndexLoss
from train.loss import HeadLoss, head_loss
from train.model import Layer
from train.sparse import DENSE, Sparse
from train.unroll import Scored, unroll

__all__ = ["Draft"]


class Draft(nn.Module):
    """The layer, its unroll and its loss in one forward, which is what DeepSpeed wraps.

    Args:
        layer: the MTP layer or an EAGLE-3 one, with its frozen tables.
        train: loss, temperature, position mask and the training of the indexer are read from it.
        attention: whether it is sparse, and in which form.
    """

    def __init__(self, layer: Layer, train: TrainConfig, attention: Sparse = DENSE) -> None:
        super().__init__()
        self.layer, self.attention = layer, attention
        self.train_config = train
        # rows of training that the router sent to each expert, int64 [E], since they were last taken
        routed = isinstance(layer.mlp, MoE)
        self._rows_E = torch.zeros(layer.dims.n_routed_experts if routed else 0, dtype=torch.int64)
        if routed:
            layer.mlp.get_submodule("gate").register_forward_hook(self._count_rows)

    def _count_rows(self, _gate: nn.Module, _args: tuple[Tensor], chosen: tuple[Tensor, Tensor]) -> None:
        if self.training:
            ids = chosen[0].detach().flatten()
            # bincount would wait for the device
            self._rows_E = self._rows_E.to(ids.device).scatter_add_(0, ids, torch.ones_like(ids))

    def take_expert_rows(self) -> Tensor:
        """Rows sent to each expert, all draft steps added up, since the last call; int64 [E]."""
        taken, self._rows_E = self._rows_E, torch.zeros_like(self._rows_E)
        return taken

    def forward(self, batch: Packed, scored: Scored, weights_SM: Tensor, *, hits: bool = False) -> HeadLoss:
        """Unroll the anchors and compare every scored prediction with the target's.

        Args:
            batch: the documents.
            scored: from `batch.scored`; its number of steps is the unroll's.
            weights_SM: float32 weight of each prediction; those that are not valid must weigh 0.
            hits: compare what is predicted with the text's own token too.
        """
        config = self.train_config
        sparse, index_loss = self.attention.sparse, None
        if self.training and torch.is_grad_enabled() and config.indexer != "frozen":
            # each prediction is one anchor's at one step
            weights_SA = weights_SM.new_zeros(len(weights_SM), len(scored.anchors))
            weights_SA.scatter_add_(1, scored.place, weights_SM)
            index_loss = IndexLoss(weights_SA, "all" if config.indexer == "warmup" else "kept")
            sparse = sparse and config.indexer != "warmup"
        states = unroll(
            self.layer,
            batch.input_ids,
            batch.start,
            batch.cu_seqlens,
            len(scored.place),
            self.layer.masks_position_0 and config.mask_position_0,
            sparse=sparse,
            anchors=scored.anchors,
            attention=self.attention.form if sparse else None,
            watch=index_loss,
        )
        compared = scored.students(states), batch.hidden[scored.teacher], self.layer.lm_head
        options: dict[str, Any] = {
            "loss": config.loss,
            "weights": weights_SM,
            "targets": batch.input_ids[scored.tokens],
            "temperature": config.temperature,
            "hits": hits,
        }
        if isinstance(self.layer, Eagle3Layer) and self.layer.own_head is not None:
            return HeadLoss(*self.layer.own_head(*compared, keep=self.layer.keep, **options))
        found = head_loss(*compared, **options)
        return found if index_loss is None else found._replace(indexer=index_loss.loss)
