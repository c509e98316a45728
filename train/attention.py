"""The forms of attention: causal over packed documents, and an anchor's over step 0's keys and its own.

    packed_causal_attention   every token to the places of its document up to its own
    documents                 an unroll step, plain, one document at a time
    blocks                    the same by flex attention, in linear memory
    whole                     the same, plain, over the whole batch at once: the reference

Legend: T tokens of all documents, A anchors, B documents, H heads, Q query and key width, C value width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

__all__ = ["Attend", "attend_dense", "attention_form", "packed_causal_attention", "per_row"]

# attend(q_AHQ, k_THQ, v_THC, [(k_AHQ, v_AHC) of steps 1..s]) -> o_AHC
Attend = Callable[[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]], Tensor]


def per_row(values_B: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """A value of each document, repeated for its rows, [T]."""
    return torch.repeat_interleave(values_B.long(), cu_seqlens.diff(), output_size=num_tokens)


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


def attend_dense(
    q_AHQ: Tensor,
    k_THQ: Tensor,
    v_THC: Tensor,
    diagonal: list[tuple[Tensor, Tensor]],
    *,
    visible_AT: Tensor,
    scale: float,
) -> Tensor:
    """The plain form of one step's attention: every anchor against every visible place and its own diagonal.

    Args:
        q_AHQ: queries of the anchors.
        k_THQ, v_THC: keys and values of step 0.
        diagonal: keys [A, H, Q] and values [A, H, C] of steps 1..s.
        visible_AT: bool, True where the anchor sees the place.
        scale: factor of the logits.
    """
    T = len(k_THQ)
    q_HAQ = q_AHQ.transpose(0, 1)
    logits = [(q_HAQ @ k_THQ.permute(1, 2, 0)).float().masked_fill(~visible_AT, float("-inf"))]
    logits += [(q_HAQ * k.transpose(0, 1)).sum(-1, keepdim=True).float() for k, _ in diagonal]
    p = ((torch.cat(logits, -1) if diagonal else logits[0]) * scale).softmax(-1).to(v_THC.dtype)
    o_HAC = p[..., :T] @ v_THC.transpose(0, 1)
    for r, (_, v) in enumerate(diagonal):
        o_HAC = o_HAC + p[..., T + r, None] * v.transpose(0, 1)
    return o_HAC.transpose(0, 1)


def _by_document(anchors: Tensor, cu_seqlens: Tensor, scale: float) -> Attend:
    """`attend_dense` document by document: memory grows with the longest document, not with the batch."""
    bounds = cu_seqlens.tolist()
    counts = torch.searchsorted(anchors, cu_seqlens.long()).tolist()
    spans = []
    for a, b, start in zip(counts, counts[1:], bounds, strict=False):
        if b > a:
            places = anchors[a:b] - start
            # no anchor sees beyond the last one
            end = int(places[-1]) + 1
            visible = torch.arange(end, device=anchors.device) <= places[:, None]
            spans.append((a, b, start, start + end, visible))

    def attend(q: Tensor, k: Tensor, v: Tensor, diagonal: list[tuple[Tensor, Tensor]]) -> Tensor:
        outputs = [
            attend_dense(
                q[a:b],
                k[start:end],
                v[start:end],
                [(dk[a:b], dv[a:b]) for dk, dv in diagonal],
                visible_AT=visible,
                scale=scale,
            )
            for a, b, start, end, visible in spans
        ]
        return torch.cat(outputs)

    return attend


def _whole(anchors: Tensor, cu_seqlens: Tensor, num_tokens: int, scale: float) -> Attend:
    """`attend_dense` over the whole batch at once, [A, T] in memory: the reference."""
    starts = per_row(cu_seqlens[:-1], cu_seqlens, num_tokens)
    row = torch.arange(num_tokens, device=anchors.device)
    visible = (row <= anchors[:, None]) & (row >= starts[anchors][:, None])
    return functools.partial(attend_dense, visible_AT=visible, scale=scale)


@functools.cache
def _flex(device_type: str) -> Callable[..., Any]:
    # eager flex attention materialises every score; only the compiled kernel is worth having
    kernel: Any = flex_attention
    return torch.compile(kernel, dynamic=True) if device_type == "cuda" else kernel


def _by_blocks(anchors: Tensor, cu_seqlens: Tensor, num_tokens: int, scale: float) -> Attend:
    """One fused kernel for step 0's keys; the diagonal joins through the log-sum-exp, in linear memory."""
    starts = per_row(cu_seqlens[:-1], cu_seqlens, num_tokens)[anchors]

    def visible(batch: Tensor, head: Tensor, a: Tensor, j: Tensor) -> Tensor:
        return (j >= starts[a]) & (j <= anchors[a])

    mask = create_block_mask(visible, None, None, len(anchors), num_tokens, device=str(anchors.device))

    def attend(q: Tensor, k: Tensor, v: Tensor, diagonal: list[tuple[Tensor, Tensor]]) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        kernel = _flex(q.device.type)
        o, aux = kernel(*heads_first, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
        o_AHC = o[0].transpose(0, 1)
        if not diagonal:
            return o_AHC
        lse_AH = [aux.lse[0].transpose(0, 1)] + [(q * dk).sum(-1).float() * scale for dk, _ in diagonal]
        weights = torch.stack(lse_AH).softmax(0).to(v.dtype)[..., None]
        o_AHC = weights[0] * o_AHC
        for w, (_, dv) in zip(weights[1:], diagonal, strict=True):
            o_AHC = o_AHC + w * dv
        return o_AHC

    return attend


def attention_form(
    name: str | None, anchors: Tensor, cu_seqlens: Tensor, num_tokens: int, scale: float
) -> Attend:
    """The attention of an unroll's steps; by default `blocks` on CUDA and `documents` elsewhere.

    Args:
        name: `documents`, `blocks`, `whole` or None.
        anchors: rows that attend, ascending int64 [A].
        cu_seqlens: document boundaries, int32 [B+1].
        num_tokens: T.
        scale: factor of the logits.
    """
    if name is None:
        name = "blocks" if anchors.device.type == "cuda" else "documents"
    if name == "documents":
        return _by_document(anchors, cu_seqlens, scale)
    form = {"blocks": _by_blocks, "whole": _whole}[name]
    return form(anchors, cu_seqlens, num_tokens, scale)
