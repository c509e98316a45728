"""The forms of attention: causal over packed documents, and an anchor's over step 0's keys and its own.

    packed_causal_attention   every token to the places of its document up to its own
    packed_sparse_attention   the same, to those of them that the indexer chooses
    documents                 an unroll step, one document at a time
    blocks                    the same by flex attention, in linear memory
    whole                     the same, plain, over the whole batch at once: the reference

Legend: T tokens of all documents, A anchors, B documents, H heads, Q query and key width, C value width.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.indexer import Candidates, Index, Selection, choose, marked, scores

__all__ = [
    "Attend",
    "attend_dense",
    "attention_form",
    "packed_causal_attention",
    "packed_sparse_attention",
    "per_row",
]

Attend = Callable[[Tensor, tuple[Tensor, Tensor] | None], Tensor]
"""attend(q_AHQ, (k_AHQ, v_AHC) of the step, None at step 0) -> o_AHC; called once a step, in order."""
Diagonal = list[tuple[Tensor, Tensor]]

COMPILER: dict[str, Any] = {"cuda": "inductor"}
"""Backend of torch.compile for the `blocks` form by type of device; uncompiled where none is named."""
BLOCK = 128
"""Rows and keys of a block of flex attention."""
PIECE = 256
"""Rows of a piece of a document in the `documents` form; no piece scores keys beyond its last row's."""
GRAPHS = 64
"""Most graphs of one function, beyond which compiling raises: two for each number of draft steps."""


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


def packed_sparse_attention(
    q_THQ: Tensor, k_THQ: Tensor, v_THC: Tensor, index: Index, cu_seqlens: Tensor, scale: float, topk: int
) -> Tensor:
    """Attend within each document, to the best `topk` positions up to one's own; all but `index` as above.

    Args:
        index: the indexer's queries, keys and weights of the packed tokens.
        topk: positions a token attends to; in documents of no more tokens this is causal attention.
    """
    out = []
    lengths = cu_seqlens.diff().tolist()
    packed = (q_THQ, k_THQ, v_THC, index.q_AHI, index.k_TI, index.w_AH)
    for q, k, v, q_index, k_index, w in zip(*(x.split(lengths) for x in packed), strict=True):
        qh, kh, vh = (x.transpose(0, 1)[None] for x in (q, k, v))
        candidates = Candidates(k_index, torch.arange(len(q), device=q.device), topk)
        if candidates.all_kept:
            o = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale)
            out.append(o[0].transpose(0, 1))
            continue
        for rows in candidates.chunks():
            mask = marked(choose(candidates.scores(q_index, w, rows), topk), len(candidates))
            o = F.scaled_dot_product_attention(qh[:, :, rows], kh, vh, attn_mask=mask, scale=scale)
            out.append(o[0].transpose(0, 1))
    return torch.cat(out)


def _dot(q_AHQ: Tensor, k_AHQ: Tensor) -> Tensor:
    """Each query times its own key, [A, H], in float32 as the kernels and the server score."""
    return (q_AHQ.float() * k_AHQ.float()).sum(-1)


def attend_dense(
    q_AHQ: Tensor,
    k_THQ: Tensor,
    v_THC: Tensor,
    diagonal: Diagonal,
    *,
    visible_AT: Tensor,
    kept_AS: Tensor | None = None,
    scale: float,
) -> Tensor:
    """The plain form of one step's attention: every anchor against every visible place and its own diagonal.

    Args:
        q_AHQ: queries of the anchors.
        k_THQ, v_THC: keys and values of step 0.
        diagonal: keys [A, H, Q] and values [A, H, C] of steps 1..s.
        visible_AT: bool, True where the anchor sees the place.
        kept_AS: bool, True where it sees its own entry; everywhere by default.
        scale: factor of the logits.
    """
    T = len(k_THQ)
    q_HAQ = q_AHQ.transpose(0, 1)
    logits = [(q_HAQ @ k_THQ.permute(1, 2, 0)).float().masked_fill(~visible_AT, float("-inf"))]
    for r, (k, _) in enumerate(diagonal):
        own_HA1 = _dot(q_AHQ, k).transpose(0, 1)[..., None]
        logits.append(
            own_HA1 if kept_AS is None else own_HA1.masked_fill(~kept_AS[:, r, None], float("-inf"))
        )
    p = ((torch.cat(logits, -1) if diagonal else logits[0]) * scale).softmax(-1).to(v_THC.dtype)
    o_HAC = p[..., :T] @ v_THC.transpose(0, 1)
    for r, (_, v) in enumerate(diagonal):
        o_HAC = o_HAC + p[..., T + r, None] * v.transpose(0, 1)
    return o_HAC.transpose(0, 1)


class _Dense(torch.autograd.Function):
    """`attend_dense` piece by piece, in few passes over the scores; of them the weights are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q_AHQ: Tensor,
        k_THQ: Tensor,
        v_THC: Tensor,
        scale: float,
        pieces: list[tuple[slice, slice, Tensor]],
        *own: Tensor,
    ) -> Tensor:
        """Of each piece its rows, the keys that they may see, and what is added to their scores: float
        [a, J], of step 0's keys and of the own ones."""
        A, H, _ = q_AHQ.shape
        o_AHC = v_THC.new_empty(A, H, v_THC.shape[-1])
        weights: list[Tensor] = []
        for rows, keys, added_AJ in pieces:
            q, k, v = (x.transpose(0, 1).contiguous() for x in (q_AHQ[rows], k_THQ[keys], v_THC[keys]))
            J = k.shape[1]
            logits = added_AJ.new_empty(H, *added_AJ.shape)
            torch.add(added_AJ[:, :J], q @ k.mT, alpha=scale, out=logits[..., :J])
            for r, k_own in enumerate(own[::2]):
                score = _dot(q_AHQ[rows], k_own[rows]).t()
                torch.add(added_AJ[:, J + r], score, alpha=scale, out=logits[..., J + r])
            p = logits.softmax(-1).to(v.dtype)
            o_AHC[rows] = (p[..., :J] @ v).transpose(0, 1)
            for r, v_own in enumerate(own[1::2]):
                o_AHC[rows].addcmul_(p[..., J + r].t()[..., None], v_own[rows])
            weights.append(p)
        ctx.save_for_backward(q_AHQ, k_THQ, v_THC, *own, *weights)
        ctx.scale, ctx.num_own = scale, len(own)
        ctx.places = [(rows, keys) for rows, keys, _ in pieces]
        return o_AHC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AHC: Tensor) -> tuple[Tensor | None, ...]:
        q_AHQ, k_THQ, v_THC, *rest = ctx.saved_tensors
        own, weights = rest[: ctx.num_own], rest[ctx.num_own :]
        # a key is in several pieces
        wide = torch.promote_types(k_THQ.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q_AHQ), *(torch.zeros_like(x, dtype=wide) for x in (k_THQ, v_THC))
        d_own = [torch.empty_like(x) for x in own]
        for (rows, keys), p in zip(ctx.places, weights, strict=True):
            q, grad = q_AHQ[rows], grad_AHC[rows]
            k, v, grad_HAC = (x.transpose(0, 1).contiguous() for x in (k_THQ[keys], v_THC[keys], grad))
            J, d = k.shape[1], torch.empty_like(p)
            torch.bmm(grad_HAC, v.mT, out=d[..., :J])
            for r, v_own in enumerate(own[1::2]):
                d[..., J + r] = _dot(grad, v_own[rows]).t()
            d = torch.ops.aten._softmax_backward_data(d, p, -1, p.dtype).mul_(ctx.scale)
            dq[rows] = (d[..., :J] @ k).transpose(0, 1)
            dk[keys] += (d[..., :J].mT @ q.transpose(0, 1)).transpose(0, 1)
            dv[keys] += (p[..., :J].mT @ grad_HAC).transpose(0, 1)
            for r, k_own in enumerate(own[::2]):
                d_AH1, p_AH1 = (x[..., J + r].t()[..., None] for x in (d, p))
                dq[rows].addcmul_(d_AH1, k_own[rows])
                torch.mul(d_AH1, q, out=d_own[2 * r][rows])
                torch.mul(p_AH1, grad, out=d_own[2 * r + 1][rows])
        return dq, dk.to(k_THQ.dtype), dv.to(v_THC.dtype), None, None, *d_own


def _by_document(
    anchors: Tensor,
    cu_seqlens: Tensor,
    k_THQ: Tensor,
    v_THC: Tensor,
    scale: float,
    selection: Selection | None,
) -> Attend:
    """`attend_dense` document by document: memory grows with the longest document, not with the batch."""
    bounds = cu_seqlens.tolist()
    wide = torch.promote_types(k_THQ.dtype, torch.float32)
    edges = torch.searchsorted(anchors, cu_seqlens.long()).tolist()
    # of a piece: its document, its rows, the keys that it sees, and which row sees which
    pieces: list[tuple[int, slice, slice, Tensor]] = []
    for document, (first, last) in enumerate(itertools.pairwise(edges)):
        for a in range(first, last, PIECE):
            start, places = bounds[document], anchors[a : min(a + PIECE, last)] - bounds[document]
            # nobody looks beyond the last anchor
            end = int(places[-1]) + 1
            visible = torch.arange(end, device=anchors.device) <= places[:, None]
            pieces.append((document, slice(a, a + len(places)), slice(start, start + end), visible))
    diagonal: list[Tensor] = []

    def added(visible_AJ: Tensor) -> Tensor:
        return torch.zeros(visible_AJ.shape, dtype=wide, device=anchors.device).masked_fill_(
            ~visible_AJ, float("-inf")
        )

    def attend(q: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
        diagonal.extend(own or ())
        steps = len(diagonal) // 2
        seen: list[tuple[slice, slice, Tensor]] = []
        for document, rows, keys, visible in pieces:
            kept = F.pad(visible, (0, steps), value=True)
            if selection is not None and (places := selection.chosen[document]) is not None:
                mine, _, candidates = selection.documents[document]
                count, end = len(candidates.k_TI), keys.stop - keys.start
                bits = marked(places[rows.start - mine.start : rows.stop - mine.start], count + steps)
                kept = torch.cat((bits[:, :end], bits[:, count:]), -1)
            seen.append((rows, keys, added(kept)))
        return _Dense.apply(q, k_THQ, v_THC, scale, seen, *diagonal)

    return attend


def _whole(
    anchors: Tensor,
    cu_seqlens: Tensor,
    k_THQ: Tensor,
    v_THC: Tensor,
    scale: float,
    selection: Selection | None,
) -> Attend:
    """`attend_dense` over the whole batch at once, [A, T] in memory: the reference."""
    starts = per_row(cu_seqlens[:-1], cu_seqlens, len(k_THQ))
    row = torch.arange(len(k_THQ), device=anchors.device)
    visible = (row <= anchors[:, None]) & (row >= starts[anchors][:, None])
    diagonal: Diagonal = []
    own_index: list[Tensor] = []

    def attend(q: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
        if own is not None:
            diagonal.append(own)
        if selection is None:
            return attend_dense(q, k_THQ, v_THC, diagonal, visible_AT=visible, scale=scale)
        index = selection.index
        if own is not None:
            own_index.append(index.k_TI)
        found = scores(index.q_AHI, index.w_AH, selection.k_TI).masked_fill(~visible, float("-inf"))
        for k in own_index:
            score_A = ((index.q_AHI.float() * k[:, None].float()).sum(-1).relu() * index.w_AH).sum(-1)
            found = torch.cat((found, score_A[:, None]), -1)
        kept = marked(choose(found.detach(), selection.topk), found.shape[-1])
        seen = {"visible_AT": kept[:, : len(k_THQ)], "kept_AS": kept[:, len(k_THQ) :]}
        return attend_dense(q, k_THQ, v_THC, diagonal, **seen, scale=scale)

    return attend


def _merge(
    o_AHC: Tensor,
    lse_AH: Tensor,
    q_AHQ: Tensor,
    diagonal: Diagonal,
    scale: float,
    kept_AS: Tensor | None = None,
) -> Tensor:
    """Join attention over step 0's keys, its log-sum-exp beside it, with the diagonal; in float32."""
    own = [_dot(q_AHQ, k) * scale for k, _ in diagonal]
    if kept_AS is not None:
        own = [x.masked_fill(~kept_AS[:, r, None], float("-inf")) for r, x in enumerate(own)]
    logits = torch.stack([lse_AH, *own])
    weights = logits.softmax(0)[..., None]
    out = weights[0] * o_AHC.float()
    for w, (_, v) in zip(weights[1:], diagonal, strict=True):
        out = out + w * v.float()
    return out.to(o_AHC.dtype)


@functools.cache
def _compiled(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    if backend is None:
        return function
    # the compiler takes a second to import, which whoever compiles nothing need not wait for
    from torch._dynamo import config as dynamo_config
    from torch.fx.experimental import _config as fx_config

    # whatever cannot be compiled raises; eager flex attention would hold every score
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        # sizes that are equal by chance, as of heads and blocks, must not become a condition of the graph
        duck = fx_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        with duck, dynamo_config.patch(recompile_limit=GRAPHS):
            return compiled(*args, **kwargs)

    return run


def _rows_padded(x: Tensor, rows: int) -> Tensor:
    missing = rows - len(x)
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def _words(selection: Selection, rows: int, keys: int) -> tuple[Tensor, Tensor]:
    """What anchors keep: of step 0's keys, a bit each, int32 [rows, keys / 32]; of their own, bool [A, s]."""
    device = selection.anchors.device
    words = torch.full((rows, keys // 32), -1, dtype=torch.int32, device=device)
    own = len(selection.documents[0][2].own)
    kept = torch.ones(len(selection.anchors), own, dtype=torch.bool, device=device)
    shifts = torch.arange(32, device=device)
    for (mine, start, candidates), chosen in zip(selection.documents, selection.chosen, strict=True):
        if chosen is None:
            continue
        for part in candidates.chunks():
            bits = marked(chosen[part], len(candidates))
            count = len(candidates.k_TI)
            padded = F.pad(bits[:, :count], (start, keys - start - count))
            packed = (padded.unflatten(1, (-1, 32)).long() << shifts).sum(-1)
            place = slice(mine.start + part.start, mine.start + part.stop)
            # two's complement: the highest bit is the sign
            words[place] = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
            kept[place] = bits[:, count:]
    return words, kept


def _by_blocks(
    anchors: Tensor,
    cu_seqlens: Tensor,
    k_THQ: Tensor,
    v_THC: Tensor,
    scale: float,
    selection: Selection | None,
) -> Attend:
    """One fused kernel for step 0's keys; the diagonal joins through the log-sum-exp, in linear memory.

    Queries and keys are padded to whole blocks, at least two, and to more keys than queries, so that no batch
    has a shape that the compiler treats as a case of its own. Compiled are one graph with and one without
    gradients of the attention, and two of the merge for each number of steps. What the indexer leaves out
    loses its score, by a bit looked up, within the blocks that causality leaves.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    T, A = len(k_THQ), len(anchors)
    rows = max(-(-A // BLOCK), 2) * BLOCK
    keys = max(-(-T // BLOCK) * BLOCK, rows + BLOCK)
    # rows of padding see key 0
    starts = _rows_padded(per_row(cu_seqlens[:-1], cu_seqlens, T)[anchors], rows)
    ends = _rows_padded(anchors, rows)

    def visible(batch: Tensor, head: Tensor, a: Tensor, j: Tensor) -> Tensor:
        return (j >= starts[a]) & (j <= ends[a])

    mask = create_block_mask(visible, None, None, rows, keys, device=str(anchors.device))
    backend = COMPILER.get(anchors.device.type)
    flex, merge = _compiled(flex_attention, backend), _compiled(_merge, backend)
    k_1HTQ, v_1HTC = (_rows_padded(x, keys).transpose(0, 1)[None] for x in (k_THQ, v_THC))
    diagonal: Diagonal = []

    def attend(q: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
        q, score_mod, kept_AS = _rows_padded(q, rows), None, None
        if selection is not None:
            words, kept_AS = _words(selection, rows, keys)

            def score_mod(score: Tensor, b: Tensor, h: Tensor, a: Tensor, j: Tensor) -> Tensor:
                bit = (words[a, j // 32] >> (j % 32)) & 1
                return torch.where(bit == 1, score, float("-inf"))

        o, aux = flex(
            q.transpose(0, 1)[None],
            k_1HTQ,
            v_1HTC,
            score_mod=score_mod,
            block_mask=mask,
            scale=scale,
            # few queries would take another kernel, a graph of its own
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
            return_aux=AuxRequest(lse=True),
        )
        o_AHC, lse_AH = (x[0].transpose(0, 1)[:A] for x in (o, aux.lse))
        if own is None:
            return o_AHC
        diagonal.append(own)
        # a single row is a case of its own to the compiler, and nothing to gain
        join = merge if A > 1 else _merge
        return join(o_AHC, lse_AH, q[:A], diagonal, scale, *([] if kept_AS is None else [kept_AS]))

    return attend


def attention_form(
    name: str | None,
    anchors: Tensor,
    cu_seqlens: Tensor,
    k_THQ: Tensor,
    v_THC: Tensor,
    scale: float,
    selection: Selection | None = None,
) -> Attend:
    """The attention of an unroll's steps; by default `blocks` on CUDA and `documents` elsewhere.

    Args:
        name: `documents`, `blocks`, `whole` or None.
        anchors: rows that attend, ascending int64 [A].
        cu_seqlens: document boundaries, int32 [B+1].
        k_THQ, v_THC: keys and values of step 0.
        scale: factor of the logits.
        selection: which keys each step keeps, `Selection.step` before `attend`; all by default.
    """
    if name is None:
        name = "blocks" if anchors.device.type == "cuda" else "documents"
    form = {"documents": _by_document, "blocks": _by_blocks, "whole": _whole}[name]
    return form(anchors, cu_seqlens, k_THQ, v_THC, scale, selection)
