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
C value width, S steps, M predicted tokens.
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
    """The predictions of an unroll that count: students of all steps beside the one teacher they share.

    Attributes:
        anchors: rows of the packed batch to unroll, ascending int64 [A].
        tokens: rows of the predicted tokens, ascending int64 [M].
        place: index into `anchors` of the anchor that predicts a token at a step, int64 [S, M].
        valid: bool [S, M]; False where that anchor would lie before the document, and `place` means nothing.
    """

    anchors: Tensor
    tokens: Tensor
    place: Tensor
    valid: Tensor

    @property
    def teacher(self) -> Tensor:
        """Rows whose stored states give the target's distribution of `tokens`, [M]."""
        return self.tokens - 1

    def students(self, states_SAD: Tensor) -> Tensor:
        """Gather the predicting states, [S, M, D]."""
        steps = torch.arange(len(states_SAD), device=states_SAD.device)[:, None]
        return states_SAD[steps, self.place]


def _per_row(values_B: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """A value of each document, repeated for its rows, [T]."""
    return torch.repeat_interleave(values_B.long(), cu_seqlens.diff(), output_size=num_tokens)


def select(loss_mask: Tensor, cu_seqlens: Tensor, num_steps: int) -> Scored:
    """Find the masked-in tokens that some step of some anchor predicts, and those anchors.

    Anchor i predicts token i+s+2 at step s: a document's first two tokens are never predicted, and a document
    of fewer than s+3 tokens has no anchor at step s.

    Args:
        loss_mask: bool [T]; True where the token itself is wanted as a prediction.
        cu_seqlens: document boundaries, int32 [B+1].
        num_steps: draft steps S.
    """
    T = len(loss_mask)
    starts_T = _per_row(cu_seqlens[:-1], cu_seqlens, T)
    row = torch.arange(T, device=loss_mask.device)
    tokens = (loss_mask & (row >= starts_T + 2)).nonzero().flatten()
    anchors_SM = tokens - torch.arange(2, num_steps + 2, device=row.device)[:, None]
    valid = anchors_SM >= starts_T[tokens]
    anchors = anchors_SM[valid].unique()
    place = torch.searchsorted(anchors, anchors_SM).clamp(max=max(len(anchors) - 1, 0))
    return Scored(anchors, tokens, place, valid)


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
    starts = _per_row(cu_seqlens[:-1], cu_seqlens, num_tokens)
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
    starts = _per_row(cu_seqlens[:-1], cu_seqlens, num_tokens)[anchors]

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
    every = torch.arange(T, device=input_ids.device)
    positions = every - _per_row(cu_seqlens[:-1], cu_seqlens, T)
    if anchors is None:
        anchors = every
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
