"""The forms of an unroll's attention against the plain one, and what the compiler makes of the fused one."""

import itertools
import random

import pytest
import torch
import torch.nn.attention.flex_attention as flex

from train import attention
from train.attention import attention_form
from train.indexer import Index, Selection

HEADS, QUERY, VALUE, STEPS = 2, 24, 16, 4
INDEX_HEADS, INDEX = 8, 12


def problem(lengths, num_anchors, grad, seed, dtype=torch.float32):
    """Anchors, boundaries, keys and values of step 0, queries of each step, and its own keys and values."""
    rng = torch.Generator().manual_seed(seed)
    T = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=rng).to(dtype).requires_grad_(grad)

    anchors = torch.randperm(T, generator=rng)[:num_anchors].sort().values
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    places = normal(T, HEADS, QUERY), normal(T, HEADS, VALUE)
    steps = [[normal(num_anchors, HEADS, w) for w in (QUERY, QUERY, VALUE)] for _ in range(STEPS)]
    return anchors, cu, *places, steps


def run(form, anchors, cu, k, v, steps, grad, topk=None):
    """What each step attends to, by random scores to the best `topk`, and the gradients of everything."""
    rng = torch.Generator().manual_seed(len(k))
    A, keys = len(anchors), torch.randn(len(k), INDEX, generator=rng)
    selection = Selection(anchors, cu, keys, topk) if topk else None
    out = []
    with torch.set_grad_enabled(grad):
        attend = attention_form(form, anchors, cu, k, v, 0.3, selection)
        for s, (q, *own) in enumerate(steps):
            if selection is not None:
                sizes = (A, INDEX_HEADS, INDEX), (A, INDEX), (A, INDEX_HEADS)
                selection.step(Index(*(torch.randn(size, generator=rng) for size in sizes)), own=s > 0)
            out.append(attend(q, own if s else None))
    if not grad:
        return out
    inputs = [k, v, *(x for s, step in enumerate(steps) for x in (step if s else step[:1]))]
    return [*out, *torch.autograd.grad(sum(o.square().sum() for o in out), inputs)]


def batches():
    """Batches as training and evaluation give them: of one token, of one anchor, with anchors everywhere."""
    generator = random.Random(0)
    for i in range(24):
        lengths = [3] if i % 5 == 4 else [generator.randint(20, 200) for _ in range(generator.randint(1, 9))]
        T = sum(lengths)
        yield lengths, generator.choice([T, max(T // 2, 1), 1, generator.randint(1, T)]), i % 3 != 0, i


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("topk", [None, 9])
def test_documents_form_and_its_gradients_equal_the_plain_ones_in_float32(monkeypatch, topk, dtype, bound):
    # documents of one piece, and of several
    monkeypatch.setattr(attention, "PIECE", 64)
    for batch in itertools.islice(batches(), 10):
        given = problem(*batch, dtype)
        anchors, cu, *tensors, steps = given
        k, v = (x.detach().float().requires_grad_(batch[2]) for x in tensors)
        wide = [[x.detach().float().requires_grad_(batch[2]) for x in step] for step in steps]
        found = run("documents", *given, grad=batch[2], topk=topk)
        expected = run("whole", anchors, cu, k, v, wide, grad=batch[2], topk=topk)
        # small gradients are differences of large numbers
        scale = max(b.norm().item() for b in expected) / 10
        for a, b in zip(found, expected, strict=True):
            assert (a.float() - b).norm() <= bound * max(b.norm().item(), scale)


@pytest.mark.parametrize("topk", [None, 9])
def test_compiled_form_equals_the_plain_one_in_a_few_graphs(monkeypatch, topk):
    """On CPU the graphs run as captured, with the plain backward that flex attention refuses outside one."""
    torch._dynamo.reset()
    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setitem(attention.COMPILER, "cpu", capture)
    for batch in itertools.islice(batches(), 24 if topk is None else 12):
        given = problem(*batch)
        found, expected = (run(form, *given, grad=batch[2], topk=topk) for form in ("blocks", "whole"))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
            # of a query with a single key the gradient is zero
            assert float((a - b).detach().norm()) < 1e-5 * max(float(b.detach().norm()), 1)
    # with and without gradients: one of the attention, one of the merge at each step but the first
    assert len(graphs) == 2 + 2 * (STEPS - 1)


def test_what_cannot_be_compiled_raises(monkeypatch):
    """Flex attention that runs uncompiled would hold every score of the batch."""
    torch._dynamo.reset()
    monkeypatch.setitem(attention.COMPILER, "cpu", "aot_eager")
    # a graph break, as flex attention's refusal of a backward on CPU is one
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run("blocks", *problem([40], 20, True, 0), grad=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", ["documents", "blocks"])
def test_own_keys_are_scored_in_float32(form):
    """Rounded to bfloat16, logits of 20 are off by up to 0.06, and so are the weights of the own keys."""
    anchors, cu, k, v, steps = problem([30, 20], 50, False, 0, torch.bfloat16)
    # keys of step 0 that score zero leave the weight to the own ones, whose logits are near 20 and each other
    k = torch.zeros_like(k)
    steps[1][1] = (steps[3][0].float() * 2.8).bfloat16()
    steps[2][1] = (steps[3][0].float() * 2.7).bfloat16()
    steps[3][1] = (steps[3][0].float() * 2.75).bfloat16()
    found = run(form, anchors, cu, k, v, steps, grad=False)[-1]
    wide = [[x.double() for x in step] for step in steps]
    logits = torch.stack([(wide[3][0] * own).sum(-1) * 0.3 for _, own, _ in wide[1:]])
    assert logits.median() > 15
    expected = (logits.softmax(0)[..., None] * torch.stack([value for *_, value in wide[1:]])).sum(0)
    assert float((found.double() - expected).norm() / expected.norm()) < 4e-3
