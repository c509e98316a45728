"""The EAGLE-3 layer and its unroll against the server's serial recursion."""

import itertools

import pytest
import torch

from configs.eagle3 import draft_config
from export.checkpoint import Checkpoint
from export.keymap import eagle3_keymap
from tests.reference_eagle3 import Eagle3Reference
from train.dims import Dims
from train.eagle3 import Eagle3Layer
from train.model import load_tables
from train.unroll import select, unroll

LENGTHS = (11, 7)
AUX = (2, 3, 5)


def random_layer(target, *, seed=0, **settings):
    """A layer with random weights, norms included, and the same weights by checkpoint name."""
    checkpoint = Checkpoint(target)
    config = draft_config(checkpoint.config, AUX, **settings)
    layer = Eagle3Layer(Dims.from_config(checkpoint.config), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
        parameter.data.normal_(0, fan_in**-0.5 if fan_in > 1 else 0.2, generator=generator)
        if fan_in == 1:
            parameter.data += 1
    load_tables(layer, checkpoint, dtype=torch.float32, device="cpu")
    state = layer.state_dict()
    return layer, {op.checkpoint[0]: state[op.training] for op in eagle3_keymap(config)}, config


def packed(layer, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    ids = torch.randint(layer.dims.vocab_size, (T,), generator=generator)
    aux = torch.randn(T, len(AUX), layer.dims.hidden_size, generator=generator)
    return ids, aux, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("fc_norm", [False, True])
@pytest.mark.parametrize("carry", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("attention", ["whole", "documents", "blocks"])
def test_unroll_equals_the_serial_recursion_at_each_of_four_steps(tiny_checkpoint, carry, fc_norm, attention):
    layer, tensors, config = random_layer(tiny_checkpoint, carry=carry, fc_norm=fc_norm)
    reference = Eagle3Reference(tiny_checkpoint, tensors, config)
    ids, aux, cu = packed(layer, LENGTHS)
    with torch.no_grad():
        states = unroll(layer, ids, aux, cu, 4, False, attention=attention)
    compared = [0] * 4
    for a, b in itertools.pairwise(cu.tolist()):
        first = reference.start(ids[a:b], aux[a:b])
        for place in range(b - a - 2):
            steps = min(4, b - a - 2 - place)
            wanted = reference.draft_from(ids[a:b], first, place, steps)
            for s in range(steps):
                assert (states[s, a + place] - wanted[s]).abs().max() < 1e-5, (s, place)
                compared[s] += 1
    assert compared == [14, 12, 10, 8]


def test_chosen_anchors_have_the_states_of_the_whole_unroll(tiny_checkpoint):
    layer, _, _ = random_layer(tiny_checkpoint)
    ids, aux, cu = packed(layer, LENGTHS)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[[4, 5, 6, 15]] = True
    scored = select(mask, cu, 4)
    with torch.no_grad():
        whole = unroll(layer, ids, aux, cu, 4, False)
        chosen = unroll(layer, ids, aux, cu, 4, False, anchors=scored.anchors)
    assert 0 < len(scored.anchors) < len(ids)
    assert (chosen - whole[:, scored.anchors]).abs().max() < 1e-5


def test_gradients_of_every_weight_equal_those_of_the_serial_recursion(tiny_checkpoint):
    layer, tensors, config = random_layer(tiny_checkpoint, fc_norm=True)
    tensors = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    reference = Eagle3Reference(tiny_checkpoint, tensors, config)
    ids, aux, cu = packed(layer, (9,))
    places = torch.arange(5)
    weights = torch.randn(3, 5, layer.dims.hidden_size, generator=torch.Generator().manual_seed(1))
    (unroll(layer, ids, aux, cu, 3, False, anchors=places) * weights).sum().backward()
    first = reference.start(ids, aux)
    wanted = torch.stack([reference.draft_from(ids, first, int(i), 3) for i in places], 1)
    (wanted * weights).sum().backward()
    parameters = dict(layer.named_parameters())
    for op in eagle3_keymap(config):
        found, grad = parameters[op.training].grad, tensors[op.checkpoint[0]].grad
        assert grad.abs().max() > 0
        assert (found - grad).norm() <= 1e-5 * grad.norm(), op.training


def test_the_key_map_names_each_tensor_of_the_layer_once(tiny_checkpoint):
    for settings in ({}, {"fc_norm": True}, {"draft_vocab_size": 100}, {"draft_vocab_size": 512}):
        layer, tensors, config = random_layer(tiny_checkpoint, **settings)
        assert {op.training: op.shape for op in eagle3_keymap(config)} == {
            name: tuple(x.shape) for name, x in layer.state_dict().items()
        }
        assert set(tensors) == {name for op in eagle3_keymap(config) for name in op.checkpoint}
