"""Where each token's rows lie once they are sorted by expert.

    sorted by expert     row:      0 1 2 | 3 4 | | 5 6 7        offsets = [0, 3, 5, 5, 8]
    (stable)             order:    flat slot t * K + k of each row; its token is order // K
                         inverse:  row of each flat slot, so that inverse[order[row]] = row

Legend: T tokens, E experts, K experts a token, N = T * K rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Routing", "route"]


class Routing(NamedTuple):
    """Where each token's rows lie once they are sorted by expert."""

    order: Tensor
    """int64 [N]: flat slot t * K + k of each sorted row."""
    inverse: Tensor
    """int64 [N]: sorted row of each flat slot."""
    offsets: Tensor
    """int64 [E + 1]: first sorted row of each expert; the last is N."""
    token: Tensor
    """int64 [N]: token of each sorted row, order // K."""


def route(topk_ids: Tensor, num_experts: int) -> Routing:
    """Sort the slots of all tokens by expert, stably. No host synchronisation.

    Args:
        topk_ids: int [T, K], each in [0, E).
        num_experts: E.

    Returns:
        The routing. Ids out of range leave their rows outside every expert, never out of bounds.
    """
    flat = topk_ids.reshape(-1)
    experts, order = torch.sort(flat, stable=True)
    row = torch.arange(len(flat), device=flat.device)
    inverse = torch.empty_like(order).scatter_(0, order, row)
    # bincount would synchronise; the sorted ids give the same counts by search
    bounds = torch.arange(num_experts + 1, device=flat.device, dtype=experts.dtype)
    return Routing(order, inverse, torch.searchsorted(experts, bounds), order // topk_ids.shape[1])
