"""What is said of the indexer's choice of keys, and that training the indexer makes it better."""

from types import SimpleNamespace

import pytest
import torch

from configs.schema import TrainConfig
from tests.reference_sparse import layer_of
from train.batch import pack
from train.draft import Draft
from train.selection import selection_drift
from train.sparse import Sparse

TOPK, LENGTH, STEPS = 16, 128, 2


def document(layer, *seeds):
    """Random documents of one length, the last half wanted."""
    generator = torch.Generator().manual_seed(seeds[0])
    T = LENGTH * len(seeds)
    given = SimpleNamespace(
        input_ids=torch.randint(layer.dims.vocab_size, (T,), generator=generator),
        hidden=torch.randn(T, 1, layer.dims.hidden_size, generator=generator),
        loss_mask=torch.arange(T) % LENGTH >= LENGTH // 2,
        cu_seqlens=torch.arange(len(seeds) + 1, dtype=torch.int32) * LENGTH,
        uids=(),
    )
    return pack(given, torch.float32, torch.device("cpu"))


def measured(layer, released=None):
    return selection_drift(layer, released, (document(layer, 1000 + i) for i in range(4)), STEPS)


def warmed_up(layer, steps):
    """Train nothing but the indexer beside dense attention."""
    draft = Draft(layer, TrainConfig(dtype="float32", indexer="warmup"), Sparse(True, None))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("indexer" in name)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(steps):
        batch = document(layer, 2 * step, 2 * step + 1)
        scored = batch.scored(STEPS)
        loss = draft(batch, scored, scored.valid.float() / scored.valid.sum()).indexer
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("steps", [60, pytest.param(400, marks=pytest.mark.engine)])
def test_warm_up_moves_the_choice_towards_where_attention_looks(sparse_checkpoint, steps):
    layer, untrained = (layer_of(sparse_checkpoint, TOPK) for _ in range(2))
    losses = warmed_up(layer, steps)
    found = measured(layer, untrained)
    assert sum(losses[-5:]) < sum(losses[:5])
    before, after = found["released_mass_over_best"], found["mass_over_best"]
    assert before < 0.3
    assert after > (0.6 if steps == 400 else before + 0.05)
    assert found["overlap"] < 0.9
    assert found["warning"] is None
    # the other way round it is a fall, and said to be one
    back = measured(untrained, layer)
    assert back["mass_over_best"] == pytest.approx(before)
    assert f"{before:.3f} of the best attention mass" in back["warning"]


def test_a_choice_is_weighed_by_attention_over_all_candidates(sparse_checkpoint):
    layer = layer_of(sparse_checkpoint, TOPK)
    batch = document(layer, 5)
    (first, *_) = selection_drift(layer, None, [batch], STEPS)["by_length"]
    attn, places = layer.self_attn, torch.arange(LENGTH)
    with torch.no_grad():
        _, x = layer.enter(batch.input_ids.roll(-1), batch.hidden, places == 0)
        made = attn.project(x, places)
        k, _ = attn.expand(made.latent_TL, made.k_pe_TR)
        index = attn.indexer(x, made.compressed_AN, places)
        unseen = places > places[:, None]
        a = torch.einsum("thd,jhd->htj", made.q_AHQ, k) * layer.dims.softmax_scale
        p = a.masked_fill(unseen, -torch.inf).softmax(-1).mean(0)
        scored = torch.einsum(
            "thj,th->tj", torch.einsum("thi,ji->thj", index.q_AHI, index.k_TI).relu(), index.w_AH
        )
        kept = scored.masked_fill(unseen, -torch.inf).topk(TOPK).indices
    # two places before the first wanted token to two before the last
    rows = slice(LENGTH // 2 - 2, LENGTH - 2)
    assert first["length"] == "1-128"
    assert first["queries"] == LENGTH // 2
    assert first["mass"] == pytest.approx(float(p.gather(1, kept)[rows].sum(-1).mean()), rel=1e-5)
    assert first["best"] == pytest.approx(float(p.topk(TOPK).values[rows].sum(-1).mean()), rel=1e-5)
    best = torch.zeros_like(p).scatter(1, p.topk(TOPK).indices, 1)
    assert first["recall"] == pytest.approx(float(best.gather(1, kept)[rows].mean()), rel=1e-5)
    assert first["overlap"] == 1
