"""Dense causal attention over packed documents.

Legend: T tokens of all documents, H heads, Q query and key width, C value width, B documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["packed_causal_attention"]


def packed_causal_attention(
    q_THQ: Tensor, k_THQ: Tensor, v_THC: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """Attend within each document, to positions up to one's own.

    Args:
        q_THQ, k_THQ, v_THC: queries, keys and values of the packed tokens, one dtype.
        cu_seqlens: document boundaries, int32 [B+1], first 0, last T.
        scale: factor of the logits.

    Returns:
        [T, H, C] in the dtype of the values.
    """
    out = []
    lengths = cu_seqlens.diff().tolist()
    for q, k, v in zip(q_THQ.split(lengths), k_THQ.split(lengths), v_THC.split(lengths), strict=True):
        qh, kh, vh = (x.transpose(0, 1)[None] for x in (q, k, v))
        o = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale)
        out.append(o[0].transpose(0, 1))
    return torch.cat(out)
