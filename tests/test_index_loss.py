"""The indexer's own loss: value and gradients in chunks; no loss reaches the parameters of the other."""

import pytest
import torch
import torch.nn.functional as F

from tests.live_bytes import LiveBytes
from tests.reference_sparse import layer_of
from tests.test_unroll import packed, relative_error
from train.gather import GATHERED
from train.index_loss import IndexLoss
from train.indexer import HELD
from train.unroll import unroll

LENGTHS, STEPS = (40, 5, 61), 3


def learning(layer):
    return {name: p for name, p in layer.named_parameters() if "indexer" in name}


def plainly(layer, ids, hidden, cu, weights_SA, topk):
    """The same loss of all rows, [heads, T, T] in memory; `topk` None is over all candidates."""
    attn, dims = layer.self_attn, layer.dims
    T = len(ids)
    row = torch.arange(T)
    start = torch.repeat_interleave(cu[:-1].long(), cu.diff().long())
    seen = (row <= row[:, None]) & (row >= start[:, None])
    carried, total = hidden, 0
    keys, index_keys = [], []
    states = unroll(layer, ids, hidden, cu, STEPS, sparse=topk is not None).detach()
    for s in range(STEPS):
        masked = (row - start == 0) if s == 0 else None
        _, x = layer.enter(ids[(row + s + 1).clamp(max=T - 1)], carried, masked)
        x = x.detach()
        made = attn.project(x, row - start + s)
        k, _ = attn.expand(made.latent_TL, made.k_pe_TR)
        index = attn.indexer(x, made.compressed_AN.detach(), row - start + s)
        keys.append(k)
        index_keys.append(index.k_TI)
        a = torch.einsum("thd,jhd->htj", made.q_AHQ, keys[0])
        found = torch.einsum(
            "thj,th->tj", F.relu(torch.einsum("thi,ji->thj", index.q_AHI, index_keys[0])), index.w_AH
        )
        for k, i in zip(keys[1:], index_keys[1:], strict=True):
            a = torch.cat((a, torch.einsum("thd,thd->ht", made.q_AHQ, k)[..., None]), -1)
            own = torch.einsum("th,th->t", F.relu(torch.einsum("thi,ti->th", index.q_AHI, i)), index.w_AH)
            found = torch.cat((found, own[:, None]), -1)
        kept = torch.cat((seen, torch.ones(T, s, dtype=torch.bool)), -1)
        if topk is not None:
            best = found.masked_fill(~kept, -torch.inf).topk(min(topk, found.shape[-1]), -1).indices
            kept &= torch.zeros_like(kept).scatter(-1, best, True)
        p = (a * dims.softmax_scale).masked_fill(~kept, -torch.inf).softmax(-1).mean(0).detach()
        log_q = found.masked_fill(~kept, -torch.inf).log_softmax(-1)
        rows = torch.where(kept, p * (p.clamp_min(1e-30).log() - log_q), 0).sum(-1)
        total = total + (rows * weights_SA[s]).sum()
        carried = states[s]
    return total


@pytest.mark.parametrize("over", ["all", "kept"])
def test_loss_in_chunks_and_its_gradients_equal_the_whole_formula(sparse_checkpoint, over, monkeypatch):
    monkeypatch.setitem(HELD, "cpu", 1 << 9)
    monkeypatch.setitem(GATHERED, "cpu", 1 << 15)
    layer = layer_of(sparse_checkpoint, 12)
    ids, hidden, cu = packed(layer, LENGTHS)
    weights_SA = torch.rand(STEPS, len(ids), generator=torch.Generator().manual_seed(1))
    index_loss = IndexLoss(weights_SA, over)
    unroll(layer, ids, hidden, cu, STEPS, sparse=over == "kept", watch=index_loss)
    expected = plainly(layer, ids, hidden, cu, weights_SA, 12 if over == "kept" else None)
    torch.testing.assert_close(index_loss.loss, expected, rtol=1e-5, atol=1e-5)
    parameters = learning(layer)
    found = torch.autograd.grad(index_loss.loss, parameters.values())
    whole = torch.autograd.grad(expected, parameters.values())
    for name, a, b in zip(parameters, found, whole, strict=True):
        assert float(b.norm()) > 0
        assert relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("form", ["documents", "gather"])
def test_neither_loss_reaches_the_parameters_of_the_other(sparse_checkpoint, form):
    layer = layer_of(sparse_checkpoint, 12)
    ids, hidden, cu = packed(layer, LENGTHS)
    hidden.requires_grad_()
    index_loss = IndexLoss(torch.ones(STEPS, len(ids)), "kept")
    states = unroll(layer, ids, hidden, cu, STEPS, sparse=True, attention=form, watch=index_loss)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    own = torch.autograd.grad(index_loss.loss, [hidden, *parameters], allow_unused=True, retain_graph=True)
    assert own[0] is None
    assert {n for n, g in zip(names, own[1:], strict=True) if g is not None} == set(learning(layer))
    main = torch.autograd.grad(states.sum(), parameters, allow_unused=True)
    assert {n for n, g in zip(names, main, strict=True) if g is None} == set(learning(layer))


@pytest.mark.parametrize("over", ["all", "kept"])
def test_memory_of_the_loss_grows_with_tokens_and_not_with_their_square(sparse_checkpoint, over, monkeypatch):
    monkeypatch.setitem(HELD, "cpu", 1 << 14)
    monkeypatch.setitem(GATHERED, "cpu", 1 << 14)
    layer = layer_of(sparse_checkpoint, 12).requires_grad_(False)
    for parameter in learning(layer).values():
        parameter.requires_grad_()
    peaks = []
    for length in (256, 512):
        ids, hidden, cu = packed(layer, (length,))
        with LiveBytes() as live:
            index_loss = IndexLoss(torch.ones(2, length), over)
            # the layer's own attention is gathered: it holds no row of all keys either
            form = {"sparse": True, "attention": "gather"}
            unroll(layer, ids, hidden, cu, 2, watch=index_loss, **form)
            index_loss.loss.backward()
        peaks.append(live.peak)
    # the scores of one head would be four times as many
    assert peaks[1] < 2.1 * peaks[0]


def test_what_a_row_of_weight_0_holds_plays_no_part(sparse_checkpoint):
    layer = layer_of(sparse_checkpoint, 12)
    ids, hidden, cu = packed(layer, LENGTHS)
    # the last rows of a document are joined with tokens of the next one
    ends = torch.cat([cu[1:].long() - 1, cu[1:].long() - 2, cu[1:].long() - 3])
    weights_SA = torch.ones(STEPS, len(ids)).index_fill(1, ends, 0)
    losses = []
    for states in (hidden, hidden.index_fill(0, cu[1:].long() - 1, 1e4)):
        losses.append(IndexLoss(weights_SA, "kept"))
        unroll(layer, ids, states, cu, STEPS, sparse=True, watch=losses[-1])
    torch.testing.assert_close(losses[1].loss, losses[0].loss, rtol=1e-5, atol=1e-5)
