"""The layer against a second, serial implementation, and what loading refuses."""

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from configs.files import read_json
from configs.target import RELEASED
from export.checkpoint import Checkpoint
from export.keymap import DROPPED, keymap, layer_shapes
from tests.reference import Reference, to_checkpoint
from train.dims import Dims
from train.model import load_layer
from train.mtp import MTPLayer


def packed(config, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config["vocab_size"], (sum(lengths),), generator=generator)
    hidden = torch.randn(sum(lengths), config["hidden_size"], generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids, hidden, cu_seqlens


@pytest.mark.parametrize("mask_position_0", [True, False])
def test_packed_documents_equal_the_serial_reference(tiny_checkpoint, mask_position_0):
    reference, layer = Reference(tiny_checkpoint), load_layer(tiny_checkpoint)
    lengths = [13, 1, 6]
    ids, hidden, cu_seqlens = packed(reference.c, [n + 1 for n in lengths])
    # place i joins token i+1; the last token of a document has no successor
    places = torch.cat([torch.arange(a, b - 1) for a, b in itertools.pairwise(cu_seqlens)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    masked = (positions == 0) if mask_position_0 else None
    with torch.no_grad():
        boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
        e = layer.embed_tokens[ids[places + 1]]
        if masked is not None:
            e = e.masked_fill(masked[:, None], 0)
        ours = layer(e, hidden[places], positions, boundaries).split(lengths)
    for document, (a, b) in enumerate(itertools.pairwise(cu_seqlens)):
        theirs = reference.start(ids[a:b], hidden[a:b], mask_position_0)
        torch.testing.assert_close(ours[document], theirs, rtol=1e-5, atol=1e-5)


def test_every_tensor_of_the_checkpoint_is_in_the_module_and_back(tiny_checkpoint):
    checkpoint, layer = Checkpoint(tiny_checkpoint), load_layer(tiny_checkpoint)
    state = layer.state_dict()
    written = to_checkpoint(keymap(checkpoint.config), state)
    frozen = ("embed_tokens.weight", "shared_head.head.weight")
    assert written.keys() == {n for n in checkpoint.mtp_names() if not n.endswith(frozen)}
    for name, tensor in written.items():
        assert torch.equal(tensor, checkpoint.get(name, dtype=tensor.dtype)), name
    assert layer.mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert not any("embed" in name or "head.w" in name for name in state)


def test_softmax_scale_and_frequencies_of_the_released_model():
    config = read_json(RELEASED)
    dims = Dims.from_config(config)
    assert dims.softmax_scale == pytest.approx(0.135234, abs=5e-7)
    frequencies = dims.inv_freq()
    assert frequencies[0] == 1  # fast pairs keep their frequency, slow ones are stretched by the factor
    assert frequencies[-1] == pytest.approx(10000 ** -(62 / 64) / 40)
    with torch.device("meta"):
        layer = MTPLayer(dims)
    # 11.62 billion: experts, attention, indexer, eh_proj, shared expert, router weight and norms
    shapes = layer_shapes(config)
    counted = sum(math.prod(s) for n, s in shapes.items() if n not in DROPPED and "e_score" not in n)
    assert sum(p.numel() for p in layer.parameters()) == counted
    for change, words in (
        ({"model_type": "llama"}, "llama"),
        ({"rope_scaling": {**config["rope_scaling"], "mscale_all_dim": None}}, "mscale_all_dim"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"q_lora_rank": None}, "q_lora_rank"),
    ):
        with pytest.raises(InputError, match=words):
            Dims.from_config({**config, **change})


def edited(source, directory, edit):
    """A copy of a checkpoint with its tensors passed through `edit`, as one file without an index."""
    directory.mkdir()
    tensors = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    save_file(edit(tensors), directory / "model.safetensors")
    shutil.copy(source / "config.json", directory)
    return directory


def test_incomplete_layers_are_refused(tiny_checkpoint, tmp_path):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    prefix = f"model.layers.{config['num_hidden_layers']}."
    without = edited(
        tiny_checkpoint, tmp_path / "a", lambda t: {k: v for k, v in t.items() if prefix not in k}
    )
    with pytest.raises(InputError, match="MTP"):
        load_layer(without)
    lost = prefix + "mlp.experts.3.up_proj.weight"
    gap = edited(tiny_checkpoint, tmp_path / "b", lambda t: {k: v for k, v in t.items() if k != lost})
    with pytest.raises(InputError, match=r"experts\.3\.up_proj"):
        load_layer(gap)
    narrow = edited(
        tiny_checkpoint,
        tmp_path / "c",
        lambda t: {**t, prefix + "enorm.weight": t[prefix + "enorm.weight"][1:].clone()},
    )
    with pytest.raises(InputError, match=r"enorm\.weight has shape"):
        load_layer(narrow)
    with pytest.raises(InputError, match="no such directory"):
        load_layer(tmp_path / "nowhere")
