"""Sparse attention in the unroll: against transformers' layer run serially, and form against form."""

import itertools
from dataclasses import replace

import pytest
import torch

from benchmarks import attention as benchmark
from tests.reference_sparse import Serial, layer_of
from tests.test_unroll import defined, gradients, packed, relative_error
from train.gather import GATHERED
from train.indexer import HELD, Selection, choose
from train.unroll import unroll

LENGTHS = (100, 173)
STEPS = 4


@pytest.fixture
def own_kept(monkeypatch):
    """Counts, over the steps that follow, of own entries that anchors kept and left out."""
    counts = {"kept": 0, "left out": 0}
    step = Selection.step

    def watch(self, index, *, own):
        step(self, index, own=own)
        for (_, _, candidates), chosen in zip(self.documents, self.chosen, strict=True):
            if own and chosen is not None:
                kept = int((chosen >= len(candidates.k_TI)).sum())
                counts["kept"] += kept
                counts["left out"] += len(chosen) * len(candidates.own) - kept

    monkeypatch.setattr(Selection, "step", watch)
    return counts


@pytest.mark.parametrize("topk", [16, 7])
def test_sparse_unroll_equals_transformers_layer_run_token_by_token(sparse_checkpoint, topk, own_kept):
    layer = layer_of(sparse_checkpoint, topk)
    serial = Serial(layer, sparse_checkpoint, topk)
    ids, hidden, cu = packed(layer, LENGTHS)
    with torch.no_grad():
        states = unroll(layer, ids, hidden, cu, STEPS, sparse=True)
        assert own_kept["kept"] > 50
        assert own_kept["left out"] > 50
        dense = unroll(layer, ids, hidden, cu, STEPS)
        for a, b in itertools.pairwise(cu.tolist()):
            last = b - a - 2 - STEPS
            for place in [*range(0, last, last // 9), last]:
                expected = serial.draft_from(ids[a:b], hidden[a:b], place, STEPS)
                torch.testing.assert_close(states[:, a + place], expected, rtol=1e-5, atol=1e-5)
            # the mask matters: without it the last place is another state altogether
            assert relative_error(dense[:, a + last], expected) > 0.1


@pytest.mark.parametrize("chosen", ["all", "some"])
@pytest.mark.parametrize("form", ["documents", "gather"])
def test_sparse_forms_and_their_gradients_equal_the_plain_form(sparse_checkpoint, form, chosen, monkeypatch):
    # several chunks of scores and of gathered latents
    monkeypatch.setitem(HELD, "cpu", 1 << 11)
    monkeypatch.setitem(GATHERED, "cpu", 1 << 16)
    layer = layer_of(sparse_checkpoint, 16)
    lengths = (100, 9, 60)
    ids, hidden, cu = packed(layer, lengths)
    hidden.requires_grad_()
    rows = defined(lengths, 3)
    plain = unroll(layer, ids, hidden, cu, 3, attention="whole", sparse=True)
    anchors = None if chosen == "all" else torch.tensor([3, 40, 41, 90, 120, 150])
    found = unroll(layer, ids, hidden, cu, 3, attention=form, sparse=True, anchors=anchors)
    if anchors is not None:
        found = torch.zeros_like(plain).index_copy(1, anchors, found)
        rows &= torch.isin(torch.arange(len(ids)), anchors)
    torch.testing.assert_close(found[rows], plain[rows], rtol=1e-5, atol=1e-5)
    expected = gradients(layer, plain, rows, hidden)
    for name, grad in gradients(layer, found, rows, hidden).items():
        assert relative_error(grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize("form", ["documents", "whole"])
def test_documents_up_to_index_topk_are_dense_to_the_bit(sparse_checkpoint, form):
    layer = layer_of(sparse_checkpoint, 40)
    # the last step of the last anchor has two candidates less than its document has tokens
    ids, hidden, cu = packed(layer, (42, 7, 30))
    rows = defined((42, 7, 30), 3)
    with torch.no_grad():
        dense = unroll(layer, ids, hidden, cu, 3, attention=form)
        sparse = unroll(layer, ids, hidden, cu, 3, attention=form, sparse=True)
    assert torch.equal(dense[rows], sparse[rows])


def test_a_document_alone_and_packed_keeps_the_same_keys(sparse_checkpoint):
    layer = layer_of(sparse_checkpoint, 16)
    ids, hidden, cu = packed(layer, (50, 80, 20))
    with torch.no_grad():
        whole = unroll(layer, ids, hidden, cu, 3, sparse=True)[:, 50:130]
        one = torch.tensor([0, 80], dtype=torch.int32)
        alone = unroll(layer, ids[50:130], hidden[50:130], one, 3, sparse=True)
    rows = defined((80,), 3)
    torch.testing.assert_close(alone[rows], whole[rows], rtol=1e-5, atol=1e-5)


def test_equal_scores_go_to_the_later_place():
    inf = float("inf")
    scores = torch.tensor(
        [[0.0, -1.0, -0.0, 2.0, 0.0], [-2.0, -1.0, -1.0, -inf, -inf], [-inf, 3.0, 3.0, 3.0, 1.0]]
    )
    assert choose(scores, 3).tolist() == [[3, 4, 2], [2, 1, 0], [3, 2, 1]]
    assert choose(scores, 4)[1].tolist() == [2, 1, 0, -1]


def test_gathering_holds_nothing_that_grows_with_anchors_times_keys():
    device, anchors, lengths = torch.device("cpu"), 1024, (1024, 4096)
    small = replace(benchmark.SMALL, index_topk=128)
    peaks = {}
    for length in lengths:
        work = benchmark.forms(small, length, anchors, torch.float32, device)
        for form in ("gather", "documents"):
            peaks[form, length] = benchmark.peak(work[form], device)
    # of the keys that came, one float32 for each anchor
    one = 4 * anchors * (lengths[1] - lengths[0])
    assert peaks["documents", lengths[1]] - peaks["documents", lengths[0]] > 2 * one
    assert peaks["gather", lengths[1]] - peaks["gather", lengths[0]] < one
