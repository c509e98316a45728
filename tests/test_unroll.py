"""The parallel unroll against the server's serial recursion, and its fast attention against the plain one."""

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.tiny.write import random_checkpoint
from tests.reference import Reference
from train.model import load_layer
from train.unroll import select, unroll

LENGTHS = (11, 7)
EXPERTS = 64


def packed(layer, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    ids = torch.randint(layer.dims.vocab_size, (T,), generator=generator)
    hidden = torch.randn(T, layer.dims.hidden_size, generator=generator)
    return ids, hidden, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def defined(lengths, num_steps):
    """Bool [S, T]: the rows of each step that predict a token of their document."""
    places = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.cat([torch.full((n,), n) for n in lengths])
    return torch.stack([places + s + 2 < ends for s in range(num_steps)])


@pytest.mark.parametrize("mask_position_0", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_unroll_equals_the_serial_recursion(tiny_checkpoint, num_steps, mask_position_0):
    layer, reference = load_layer(tiny_checkpoint), Reference(tiny_checkpoint)
    ids, hidden, cu = packed(layer, LENGTHS)
    with torch.no_grad():
        states = unroll(layer, ids, hidden, cu, num_steps, mask_position_0)
    assert states.shape == (num_steps, len(ids), layer.dims.hidden_size)
    compared = 0
    for a, b in itertools.pairwise(cu.tolist()):
        carried = reference.start(ids[a:b], hidden[a:b], mask_position_0)
        for place in range(b - a - 2):
            steps = min(num_steps, b - a - 2 - place)
            serial = reference.draft_from(ids[a:b], carried, place, steps)
            torch.testing.assert_close(states[:steps, a + place], serial, rtol=1e-5, atol=1e-5)
            compared += steps
    assert compared == int(defined(LENGTHS, num_steps).sum())


def gradients(layer, states, rows, hidden):
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(states[rows].shape, generator=generator).to(states.device)
    parameters = {name: p for name, p in layer.named_parameters() if "indexer" not in name}
    found = torch.autograd.grad((states[rows] * weights).sum(), [hidden, *parameters.values()])
    return dict(zip(["hidden", *parameters], found, strict=True))


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("chosen", ["all", "some"])
def test_documents_form_and_its_gradients_equal_the_plain_form(tiny_checkpoint, chosen):
    layer = load_layer(tiny_checkpoint)
    ids, hidden, cu = packed(layer, (9, 2, 1, 14, 5))
    hidden.requires_grad_()
    num_steps = 3
    rows = defined((9, 2, 1, 14, 5), num_steps)
    plain = unroll(layer, ids, hidden, cu, num_steps, attention="whole")
    if chosen == "all":
        fast = unroll(layer, ids, hidden, cu, num_steps, attention="documents")
    else:
        # anchors of two documents, none in the first: the rest of the rows is not computed
        anchors = torch.tensor([13, 14, 19, 27])
        fast = torch.zeros_like(plain)
        fast[:, anchors] = unroll(layer, ids, hidden, cu, num_steps, anchors=anchors)
        rows &= torch.isin(torch.arange(len(ids)), anchors)
    torch.testing.assert_close(fast[rows], plain[rows], rtol=1e-5, atol=1e-5)
    expected = gradients(layer, plain, rows, hidden)
    for name, grad in gradients(layer, fast, rows, hidden).items():
        assert relative_error(grad, expected[name]) < 1e-5, name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_form_equals_the_plain_form(tiny_checkpoint):
    layer = load_layer(tiny_checkpoint)
    ids, hidden, cu = packed(layer, (70, 130, 33))
    anchors = torch.arange(40, 200, 3)
    with torch.no_grad():
        plain = unroll(layer, ids, hidden, cu, 3, anchors=anchors, attention="whole")
        blocks = unroll(layer, ids, hidden, cu, 3, anchors=anchors, attention="blocks")
    rows = defined((70, 130, 33), 3)[:, anchors]
    torch.testing.assert_close(blocks[rows], plain[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward on CPU")
def test_blocks_form_and_its_gradients_equal_the_plain_form_on_cuda(tiny_checkpoint):
    layer = load_layer(tiny_checkpoint, device="cuda")
    ids, hidden, cu = (x.cuda() for x in packed(layer, (70, 130, 33)))
    hidden.requires_grad_()
    rows = defined((70, 130, 33), 3).cuda()
    plain = unroll(layer, ids, hidden, cu, 3, attention="whole")
    blocks = unroll(layer, ids, hidden, cu, 3, attention="blocks")
    assert relative_error(blocks[rows], plain[rows]) < 1e-3
    expected = gradients(layer, plain, rows, hidden)
    for name, grad in gradients(layer, blocks, rows, hidden).items():
        assert relative_error(grad, expected[name]) < 1e-2, name


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory, tiny_config):
    """A layer whose experts are most of it, as in the real one, with a few rows for each."""
    sizes = {
        "n_routed_experts": EXPERTS,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_experts_per_tok": 4,
    }
    directory = tmp_path_factory.mktemp("target") / "experts"
    return load_layer(random_checkpoint(directory, tiny_config.model_copy(update=sizes)))


def test_gradients_of_many_steps_and_micro_batches_equal_those_added_up(many_experts):
    layer = many_experts
    expected, found = [], []
    for form, grads in ((unroll.__wrapped__, expected), (unroll, found)):
        layer.zero_grad()
        for seed in range(2):
            ids, hidden, cu = packed(layer, LENGTHS, seed)
            form(layer, ids, hidden, cu, 4)[defined(LENGTHS, 4)].square().sum().backward()
        grads += [p.grad for n, p in layer.named_parameters() if "indexer" not in n]
    layer.zero_grad()
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


class Watch(TorchDispatchMode):
    """Counts sums of stacked gradients, and the bytes of the tensors that are made and not yet freed."""

    sums = bytes = most = 0

    def free(self, size):
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.sums += args[0].dim() == 3 and len(args[0]) == EXPERTS
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                storage = x.untyped_storage()
                known.add(storage.data_ptr())
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.bytes)
        return result


def test_backward_forms_one_gradient_of_the_experts_and_adds_none(many_experts):
    layer = many_experts

    def backward(form):
        layer.zero_grad()
        states = form(layer, *packed(layer, LENGTHS), 6)
        loss = states[defined(LENGTHS, 6)].square().sum()
        with Watch() as seen:
            loss.backward()
        return seen

    gradients = sum(p.numel() * 4 for n, p in layer.named_parameters() if "indexer" not in n)
    assert backward(unroll.__wrapped__).sums == 15, "five for each weight where each step forms its own"
    seen = backward(unroll)
    assert seen.sums == 0
    # all gradients are there at the end; beside them only rows
    assert gradients <= seen.most < 1.2 * gradients
    assert gradients <= seen.bytes


def test_undefined_rows_never_reach_defined_ones(tiny_checkpoint):
    layer = load_layer(tiny_checkpoint)
    ids, hidden, cu = packed(layer, LENGTHS)
    other = hidden.clone()
    # the state of a document's last token is joined with no token of its own
    other[cu[1:].long() - 1] = 1e4
    rows = defined(LENGTHS, 4)
    with torch.no_grad():
        a, b = unroll(layer, ids, hidden, cu, 4), unroll(layer, ids, other, cu, 4)
    torch.testing.assert_close(a[rows], b[rows], rtol=1e-5, atol=1e-5)


def test_select_applies_the_mask_to_the_predicted_token():
    #                     document 0          document 1 (too short)  document 2
    mask = torch.tensor([0, 0, 0, 1, 1, 0] + [1, 1] + [1, 1, 1, 0, 1], dtype=torch.bool)
    cu = torch.tensor([0, 6, 8, 13], dtype=torch.int32)
    scored = select(mask, cu, 2)
    # the first two tokens of a document are never predicted, its third one by step 0 only
    assert scored.tokens.tolist() == [3, 4, 10, 12]
    assert scored.valid.tolist() == [[True] * 4, [True, True, False, True]]
    anchors = scored.anchors[scored.place]
    assert anchors[0].tolist() == [1, 2, 8, 10]
    assert anchors[1][scored.valid[1]].tolist() == [0, 1, 9]
    assert scored.anchors.tolist() == [0, 1, 2, 8, 9, 10]
    assert scored.teacher.tolist() == [2, 3, 9, 11]
    states = torch.arange(12.0).view(2, 6, 1)
    assert scored.students(states)[0, :, 0].tolist() == [1, 2, 3, 5]
    assert scored.students(states)[1, :, 0][scored.valid[1]].tolist() == [6, 7, 10]
    nothing = select(torch.zeros(13, dtype=torch.bool), cu, 2)
    assert len(nothing.anchors) == len(nothing.tokens) == 0
