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

from dataclasses import dataclass

import torch
from torch import Tensor

from train.attention import attention_form, per_row
from train.blocks import Projected
from train.eagle3 import Eagle3Layer
from train.gather import absorbed, gather_form
from train.index_loss import Watch
from train.indexer import Index, Selection
from train.kernels.moe import weight_gradients_once
from train.mtp import MTPLayer

__all__ = ["Scored", "select", "unroll"]


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
        first_S1 = torch.arange(len(states_SAD), device=states_SAD.device)[:, None] * states_SAD.shape[1]
        # indexing would sort in its backward
        rows = states_SAD.flatten(0, 1).index_select(0, (self.place + first_S1).flatten())
        return rows.unflatten(0, self.place.shape)


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
    starts_T = per_row(cu_seqlens[:-1], cu_seqlens, T)
    row = torch.arange(T, device=loss_mask.device)
    tokens = (loss_mask & (row >= starts_T + 2)).nonzero().flatten()
    anchors_SM = tokens - torch.arange(2, num_steps + 2, device=row.device)[:, None]
    valid = anchors_SM >= starts_T[tokens]
    anchors = anchors_SM[valid].unique()
    place = torch.searchsorted(anchors, anchors_SM).clamp(max=max(len(anchors) - 1, 0))
    return Scored(anchors, tokens, place, valid)


def _index(
    layer: MTPLayer | Eagle3Layer,
    x_TD: Tensor,
    made: Projected,
    positions_T: Tensor,
    rows_A: Tensor | None,
    learns: bool,
) -> Index:
    """The layer's indexer, whose loss is its own: none reaches the layer through its inputs."""
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        return layer.self_attn.indexer(x_TD.detach(), made.compressed_AN.detach(), positions_T, rows_A)


@weight_gradients_once()
def unroll(
    layer: MTPLayer | Eagle3Layer,
    input_ids: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    num_steps: int,
    mask_position_0: bool = True,
    *,
    sparse: bool = False,
    anchors: Tensor | None = None,
    attention: str | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Run the served recursion over packed documents, tokens given.

    Args:
        layer: the MTP layer, or an EAGLE-3 layer.
        input_ids: int64 [T].
        hidden: the target's stored states, as `layer.start` takes them: post-norm [T, D], or layer inputs
            [T, K, D].
        cu_seqlens: document boundaries, int32 [B+1], first 0, last T.
        num_steps: draft steps S.
        mask_position_0: zero the embedding joined at position 0, as vLLM does.
        sparse: attend to the keys that the layer's indexer chooses, as served; without, to all of them, which
            is the same in documents of at most `index_topk` + 2 tokens.
        anchors: rows to unroll, ascending int64 [A]; by default all of them.
        attention: `documents` (plain, one document at a time), `blocks` (flex attention), `whole` (plain, the
            reference) or, where it is sparse, `gather` (over latents); by default `blocks` on CUDA and
            `documents` elsewhere. The same on all ranks: they run the same modules in the same order.
        watch: is told each step's choices, as `IndexLoss` is; the indexer gets no other gradient.

    Returns:
        states [S, A, D]: row i of step s is the carried (post-norm) state that predicts token i+s+2; rows
        without such a token in their document are undefined. The gradients of stacked experts are formed once
        for all steps.

    Source: vLLM 0.32.0 `v1/spec_decode` proposing with an MTP layer; arXiv 2503.01840 trains EAGLE-3 so.
    """
    T = len(input_ids)
    every = torch.arange(T, device=input_ids.device)
    positions = every - per_row(cu_seqlens[:-1], cu_seqlens, T)
    if anchors is None:
        anchors = every

    def tokens(rows: Tensor, s: int) -> Tensor:
        return input_ids[(rows + s + 1).clamp(max=T - 1)]

    # step 0: keys of every place, the rest for anchors alone
    masked = positions == 0 if mask_position_0 else None
    carried = layer.start(hidden)
    attn, scale, asked = layer.self_attn, layer.dims.softmax_scale, None if len(anchors) == T else anchors
    x_TD, attended_TD = layer.enter(tokens(every, 0), carried, masked)
    indexed = sparse or watch is not None
    # dense, queries are made of all tokens at once, as they were before there was an indexer, to the bit
    made = attn.project(attended_TD, positions, asked if indexed else None)
    selection = None
    if indexed:
        index = _index(layer, attended_TD, made, positions, asked, watch is not None)
        keeps = sparse or (watch is not None and watch.over == "kept")
        topk = layer.dims.index_topk if keeps else T + num_steps
        selection = Selection(anchors, cu_seqlens, index.k_TI, topk)
    x_AD, q_AHQ = (x_TD, made.q_AHQ) if asked is None else (x_TD.index_select(0, anchors), made.q_AHQ)
    if asked is not None and not indexed:
        q_AHQ = q_AHQ.index_select(0, anchors)
    if attention == "gather":
        if not sparse or selection is None:
            raise ValueError("attention: found 'gather' with dense attention, expected sparse=True")
        attend = gather_form(made.latent_TL, made.k_pe_TR, attn.up(x_TD), scale, selection)
    else:
        chosen = selection if sparse else None
        k_THQ, v_THC = attn.expand(made.latent_TL, made.k_pe_TR)
        attend = attention_form(attention, anchors, cu_seqlens, k_THQ, v_THC, scale, chosen)
    if watch is not None:
        with torch.no_grad():
            up_LHW = attn.up(x_TD)
        entries_TX = torch.cat((made.latent_TL, made.k_pe_TR), -1).detach()
    own: tuple[Tensor, Tensor] | None = None
    states: list[Tensor] = []
    for s in range(num_steps):
        if s:
            x_AD, attended_AD = layer.enter(tokens(anchors, s), carried)
            made = attn.project(attended_AD, positions[anchors] + s)
            q_AHQ, own = made.q_AHQ, (made.latent_TL, made.k_pe_TR)
            if indexed:
                index = _index(layer, attended_AD, made, positions[anchors] + s, None, watch is not None)
        if selection is not None:
            selection.step(index, own=s > 0)
            if watch is not None:
                q_AHX = absorbed(q_AHQ.detach(), up_LHW, entries_TX.shape[1])
                watch.add(selection, q_AHX, entries_TX, own and torch.cat(own, -1), scale)
        if own is not None and attention != "gather":
            own = attn.expand(*own)
        x_AD = x_AD + attn.output(attend(q_AHQ, own))
        x_AD = x_AD + layer.mlp(layer.post_attention_layernorm(x_AD))
        state_AD, carried = layer.leave(x_AD)
        states.append(state_AD)
    return torch.stack(states)
