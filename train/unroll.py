"""The K-step unroll in the form that is served, for all anchors of a packed batch at once.

A server drafts serially: from the target's state of token i it joins token i+1 at position i, then its own
state and token i+2 at position i+1, and so on; the keys of its steps 1.. stay in the cache until the target
has accepted or refused them. With the tokens given (teacher forcing), anchor i at step s

    joins        token i+s+1 with the state carried from step s-1 (the target's state at s = 0), position i+s
    attends to   the keys of step 0 at places j <= i, and its own keys of steps 1..s: one entry of each, the
                 "diagonal"; entries of other anchors are never visible
    predicts     token i+s+2, with the state it carries on (after shared_head.norm)

so that one pass over all anchors gives what the server computes one anchor at a time.

    document      t0  t1  t2  t3  t4        anchor 1, step 0: state h1, token t2 at position 1, predicts t3
    step 0 keys   k0  k1  k2  k3            attends to k0 k1
    step 1 keys       d1  d2  d3            anchor 1, step 1: token t3 at position 2: k0 k1, its own d2

Only anchors whose predictions are wanted need queries, feed-forward and head; every place before an anchor
needs keys. `select` finds the anchors of a loss mask.

Legend: T tokens of all documents, A anchors, B documents, D hidden_size, H heads, Q query width,
C value width, S steps, N scored rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from train.model import MTPLayer

__all__ = ["Scored", "select", "unroll"]

# attend(q_AHQ, k_THQ, v_THC, [(k_AHQ, v_AHC) of steps 1..s]) -> o_AHC
Attend = Callable[[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]], Tensor]


@dataclass(frozen=True)
class Scored:
    """The rows of an unroll that predict a wanted token; every tensor int64.

    Attributes:
        anchors: rows of the packed batch to unroll, ascending [A].
        step: step of each scored row [N], ascending.
        place: index into `anchors` of each scored row [N].
        counts: scored rows of each step [S].
    """

    anchors: Tensor
    step: Tensor
    place: Tensor
    counts: Tensor

    def teacher(self) -> Tensor:
        """Row whose stored state gives the target's distribution of the predicted token, [N]."""
        return self.anchors[self.place] + self.step + 1

    def token(self) -> Tensor:
        """Row of the predicted token, [N]."""
        return self.teacher() + 1


def _ends(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Where the document of each row ends, int64 [T]."""
    cu = cu_seqlens.long()
    return torch.repeat_interleave(cu[1:], cu.diff(), output_size=num_tokens)


def select(loss_mask: Tensor, cu_seqlens: Tensor, num_steps: int) -> Scored:
    """Find the anchors that predict a masked-in token at some step, and those predictions.

    Args:
        loss_mask: bool [T]; True where the token itself is wanted as a prediction.
        cu_seqlens: document boundaries, int32 [B+1].
        num_steps: draft steps S.

    Returns:
        The rows; an anchor's step s counts iff token i+s+2 is masked in and lies in the same document, so
        that a document shorter than s+3 tokens has none.
    """
    T = len(loss_mask)
    row = torch.arange(T, device=loss_mask.device)
    token_ST = row + torch.arange(2, num_steps + 2, device=row.device)[:, None]
    inside_ST = token_ST < _ends(cu_seqlens, T)
    wanted_ST = inside_ST & loss_mask[token_ST.clamp(max=max(T - 1, 0))]
    anchors = wanted_ST.any(0).nonzero().flatten()
    step, place = wanted_ST[:, anchors].nonzero(as_tuple=True)
    return Scored(anchors, step, place, wanted_ST.sum(1))


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
            # nobody looks beyond the last anchor
            end = int(places[-1]) + 1
            visible = torch.arange(end, device=anchors.device) <= places[:, None]
            spans.append((a, b, start, start + end, visible))

    def attend(q: Tensor, k: Tensor, v: Tensor, diagonal: list[tuple[Tensor, Tensor]]) -> Tensor:
        parts = [
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
        return torch.cat(parts)

    return attend


def _whole(anchors: Tensor, cu_seqlens: Tensor, num_tokens: int, scale: float) -> Attend:
    """`attend_dense` over the whole batch at once, [A, T] in memory: the reference."""
    ends = _ends(cu_seqlens, num_tokens)
    row = torch.arange(num_tokens, device=anchors.device)
    visible = (row <= anchors[:, None]) & (ends == ends[anchors][:, None])
    return functools.partial(attend_dense, visible_AT=visible, scale=scale)


@functools.cache
def _flex(device_type: str) -> Callable[..., Any]:
    # eager flex attention materialises every score; only the compiled kernel is worth having
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def _by_blocks(anchors: Tensor, cu_seqlens: Tensor, num_tokens: int, scale: float) -> Attend:
    """One fused kernel for step 0's keys; the diagonal joins through the log-sum-exp, in linear memory."""
    cu = cu_seqlens.long()
    starts = torch.repeat_interleave(cu[:-1], cu.diff(), output_size=num_tokens)[anchors]

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


def unroll(
    layer: MTPLayer,
    input_ids: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    num_steps: int,
    mask_position_0: bool = True,
    *,
    anchors: Tensor | None = None,
    attention: str | None = None,
) -> Tensor:
    """Run the served recursion over packed documents, tokens given.

    Args:
        layer: the MTP layer.
        input_ids: int64 [T].
        hidden: the target's post-norm states, [T, D].
        cu_seqlens: document boundaries, int32 [B+1], first 0, last T.
        num_steps: draft steps S.
        mask_position_0: zero the embedding joined at position 0, as vLLM does.
        anchors: rows to unroll, ascending int64 [A]; by default all of them.
        attention: `documents` (plain, one document at a time), `blocks` (flex attention) or `whole` (plain,
            the reference); by default `blocks` on CUDA and `documents` elsewhere.

    Returns:
        states [S, A, D]: row i of step s is the carried (post-norm) state that predicts token i+s+2; rows
        without such a token in their document are undefined.

    Source: vLLM 0.32.0 `v1/spec_decode` proposing with an MTP layer; arXiv 2503.01840 trains EAGLE-3 so.
    """
    T = len(input_ids)
    cu = cu_seqlens.long()
    positions = torch.arange(T, device=input_ids.device)
    positions = positions - torch.repeat_interleave(cu[:-1], cu.diff(), output_size=T)
    if anchors is None:
        anchors = torch.arange(T, device=input_ids.device)
    scale = layer.dims.softmax_scale
    if attention is None:
        attention = "blocks" if input_ids.device.type == "cuda" else "documents"
    if attention == "documents":
        attend = _by_document(anchors, cu_seqlens, scale)
    elif attention == "blocks":
        attend = _by_blocks(anchors, cu_seqlens, T, scale)
    else:
        attend = _whole(anchors, cu_seqlens, T, scale)

    def tokens(rows: Tensor, s: int) -> Tensor:
        return input_ids[(rows + s + 1).clamp(max=T - 1)]

    # step 0: keys of every place, the rest for anchors alone
    every = torch.arange(T, device=input_ids.device)
    x_TD = layer.combine(tokens(every, 0), hidden, positions == 0 if mask_position_0 else None)
    q_THQ, k_THQ, v_THC = layer.self_attn.project(layer.input_layernorm(x_TD), positions)
    all_rows = len(anchors) == T
    x_AD, q_AHQ = (x_TD, q_THQ) if all_rows else (x_TD[anchors], q_THQ[anchors])
    diagonal: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []
    for s in range(num_steps):
        if s:
            x_AD = layer.combine(tokens(anchors, s), states[-1])
            q_AHQ, k, v = layer.self_attn.project(layer.input_layernorm(x_AD), positions[anchors] + s)
            diagonal.append((k, v))
        x_AD = x_AD + layer.self_attn.output(attend(q_AHQ, k_THQ, v_THC, diagonal))
        x_AD = x_AD + layer.mlp(layer.post_attention_layernorm(x_AD))
        states.append(layer.shared_head.norm(x_AD))
    return torch.stack(states)
