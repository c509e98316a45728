"""Slow reference of the routed experts: one loop over the experts, gradients by autograd.

Legend: T tokens, D model width, F expert width, E experts, K experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["moe_reference"]


def moe_reference(
    x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor
) -> Tensor:
    """y[t] = sum over k of weight[t, k] * w2[e] (silu(w1[e] x[t]) * (w3[e] x[t])) with e = ids[t, k].

    Args:
        x_TD: tokens [T, D].
        topk_ids_TK: int [T, K], each in [0, E).
        topk_weights_TK: float [T, K].
        w1_EFD, w3_EFD: gate and up projections [E, F, D].
        w2_EDF: down projections [E, D, F].

    Returns:
        [T, D] in the dtype of `x_TD`; differentiable in all but the ids. The sum over the experts of a token
        is taken in float32 (float64 for float64 input), everything else in the dtype of `x_TD`.

    Source: arXiv 2412.19437, equation 12 without the shared expert.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    # unbound once: indexing a parameter per expert would give each expert a gradient of the whole stack
    for e, (w1, w3, w2) in enumerate(zip(w1_EFD.unbind(), w3_EFD.unbind(), w2_EDF.unbind(), strict=True)):
        token, slot = torch.where(topk_ids_TK == e)
        # experts without tokens take part too: their gradients are then zeros, not missing
        rows = x_TD[token]
        out = F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)
        y_TD = y_TD.index_add(0, token, out.to(wide) * topk_weights_TK[token, slot, None].to(wide))
    return y_TD.to(x_TD.dtype)
