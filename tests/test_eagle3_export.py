"""The exported EAGLE-3 directory: exact both ways, pruned before or after alike, refused when wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.eagle3 import ARCHITECTURE, draft_config
from configs.errors import ConfigError, InputError
from configs.files import write_json
from configs.load import load_config
from export import draft
from export.check import check_eagle3
from export.checkpoint import Checkpoint
from export.eagle3 import export
from export.keymap import eagle3_keymap
from pipeline.speculation import require_draft
from train import launch
from train.model import load_layer

AUX = (2, 3)
KEEP = torch.tensor([1, *range(4, 500, 5)])


@pytest.fixture(scope="module")
def target(four_layers):
    return four_layers


def write_draft(folder, target, **settings):
    """Random weights of a draft as a checkpoint's `weights` hold them."""
    config = draft_config(Checkpoint(target).config, AUX, **settings)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for op in eagle3_keymap(config):
        std = op.shape[-1] ** -0.5 if len(op.shape) > 1 else 0.1
        tensor = torch.randn(op.shape, generator=generator) * std + (len(op.shape) == 1)
        tensors[op.checkpoint[0]] = tensor.bfloat16()
    if "d2t" in tensors:
        tensors["lm_head.weight"] = Checkpoint(target).get("lm_head.weight")[KEEP].bfloat16()
        tensors["d2t"] = KEEP - torch.arange(len(KEEP))
        tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill_(0, KEEP, True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_directory_holds_every_tensor_and_says_what_servers_read(tmp_path, target):
    weights = write_draft(tmp_path / "weights", target, fc_norm=True, carry="post_norm")
    made = export(weights, target, tmp_path / "out")
    assert made["servers"] == ["vllm", "sglang"]
    trained, found = load_file(weights / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["model_type"] == "deepseek_v2"
    assert said["eagle_aux_hidden_state_layer_ids"] == [2, 3]
    assert said["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [2, 3], "use_aux_hidden_state": True}
    assert (said["fc_norm"], said["norm_output"]) == (True, True)
    for absent in ("draft_vocab_size", "num_nextn_predict_layers", "index_topk", "quantization_config"):
        assert absent not in said
    card = (tmp_path / "out/README.md").read_text()
    assert '"method": "eagle3"' in card
    assert "--speculative-algorithm EAGLE3" in card
    assert "On more than one GPU, vLLM 0.32.0 hands a draft of DeepSeek-V3.2" in card
    assert "| acceptance length, offline, held-out answers | not measured |" in card
    assert export(weights, target, tmp_path / "out")["reused"]


def test_pruning_before_or_after_training_gives_the_same_rows(tmp_path, target):
    whole = write_draft(tmp_path / "whole", target)
    before = write_draft(tmp_path / "before", target, draft_vocab_size=len(KEEP))
    export(before, target, tmp_path / "a")
    export(whole, target, tmp_path / "b", draft_vocab_size=len(KEEP), keep=lambda size: KEEP)
    a, b = (load_file(tmp_path / f"{x}/model.safetensors") for x in "ab")
    for name in ("lm_head.weight", "d2t", "t2d"):
        assert torch.equal(a[name], b[name])
    configs = [json.loads((tmp_path / f"{x}/config.json").read_text()) for x in "ab"]
    assert configs[0] == configs[1]
    layer = load_layer(target, weights=tmp_path / "b")
    assert torch.equal(layer.keep, KEEP)
    with pytest.raises(InputError, match="trained so"):
        export(before, target, tmp_path / "c", draft_vocab_size=7, keep=lambda size: KEEP[:7])


def damaged(folder, source, change):
    """A copy of an export with its tensors and configuration changed by a function."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_a_server_would_not_notice_is_refused(tmp_path, target):
    weights = write_draft(tmp_path / "weights", target, draft_vocab_size=len(KEEP))
    good = tmp_path / "good"
    export(weights, target, good)
    assert check_eagle3(good, target) == {"vllm": [], "sglang": []}
    cases = {
        "missing: layers.0.hidden_norm.weight": lambda t, c: t.pop("layers.0.hidden_norm.weight"),
        "missing: d2t": lambda t, c: t.pop("d2t"),
        "does not have: embed_tokens.weight": lambda t, c: t.update({"embed_tokens.weight": torch.ones(2)}),
        "d2t does not hold offsets": lambda t, c: t.update(d2t=KEEP.clone()),
        "keep different tokens": lambda t, c: t.update(t2d=t["t2d"].roll(1)),
        "has shape": lambda t, c: t.update({"norm.weight": torch.ones(3).bfloat16()}),
        "num_nextn_predict_layers": lambda t, c: c.update(num_nextn_predict_layers=1),
    }
    for number, (message, change) in enumerate(cases.items()):
        found = check_eagle3(damaged(tmp_path / str(number), good, change), target)
        assert any(message in text for text in found["vllm"]), (message, found)
        assert any(message in text for text in found["sglang"]), (message, found)
    found = check_eagle3(
        damaged(tmp_path / "v3", good, lambda t, c: c.update(model_type="deepseek_v3")), target
    )
    assert "MTP layer" in found["vllm"][0]
    assert found["sglang"] == []


def test_a_draft_that_is_not_finite_is_not_exported(tmp_path, target):
    weights = write_draft(tmp_path / "weights", target)
    tensors = load_file(weights / "model.safetensors")
    tensors["fc.weight"][0, 0] = float("nan")
    save_file(tensors, weights / "model.safetensors")
    with pytest.raises(InputError, match=r"fc.weight holds NaN"):
        export(weights, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plans_of_the_real_run_say_what_is_read_what_it_needs_and_what_is_written(tmp_path):
    """On a machine without the target: the states of a token, memory of one GPU, files and their sizes."""
    real = Path(__file__).parent.parent / "configs/deepseek-v3.2-eagle3.toml"
    settings = [f"run.dir={tmp_path / 'run'}", f"target.path={tmp_path / 'absent'}"]
    config = load_config([real], settings)
    plan = launch.plan(config)
    assert (plan.trainable, plan.frozen, plan.ranks) == (752_777_216, 0, 1)
    assert "57,344 bytes of states read for a token" in str(plan)
    assert 30 < sum(plan.memory_bytes.values()) / 2**30 < 45
    said = draft.plan(config)
    assert "129,280 tokens" in said
    assert "model.safetensors (15 tensors, 1.506 GB in bfloat16), config.json, README.md" in said
    assert "not yet: there is no target" in said
    pruned = draft.plan(load_config([real], [*settings, "export.draft_vocab_size=32_000"]))
    # a head of 32,000 rows in two bytes, maps of eight and one
    assert f"32,000 tokens, to {tmp_path}" in pruned
    assert "18 tensors, 1.965 GB" in pruned


def test_a_dry_run_says_what_the_export_then_writes_and_refuses_what_it_would(tmp_path, target):
    weights = write_draft(tmp_path / "weights", target)
    words = ["train.draft=eagle3", f"run.dir={tmp_path / 'run'}", f"target.path={target}"]
    words += [f"export.checkpoint={weights}", f"export.dir={tmp_path / 'out'}"]
    said = draft.plan(load_config([], words))
    made = draft.run(load_config([], words))
    assert f"({made['tensors']} tensors, {made['bytes'] / 1e9:,.3f} GB" in said
    with pytest.raises(ConfigError, match="the target has 512 tokens"):
        draft.plan(load_config([], [*words, "export.draft_vocab_size=512"]))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes").touch()
    with pytest.raises(InputError, match="not an export of this program"):
        draft.plan(load_config([], [*words, f"export.dir={tmp_path / 'taken'}"]))


def test_the_card_says_what_was_measured_of_these_tensors_alone(tmp_path, target):
    """A pruned export is another draft than the one that was evaluated."""
    weights = write_draft(tmp_path / "step/weights", target)
    measured = {"acceptance_length": 2.345, "acceptance_per_position": [0.7, 0.4, 0.245]}
    write_json(tmp_path / "step/layer61.json", {"format": 2, "step": 7, "metrics": measured})
    export(weights, target, tmp_path / "whole")
    export(weights, target, tmp_path / "pruned", draft_vocab_size=len(KEEP), keep=lambda size: KEEP)
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("whole", "pruned")}
    assert "held-out answers | 2.345 with 3 draft tokens a step |" in cards["whole"]
    assert "held-out answers | not measured |" in cards["pruned"]


def test_a_draft_of_v32_on_several_gpus_is_warned_of_in_vllm(tmp_path, target, capsys):
    export(write_draft(tmp_path / "weights", target), target, tmp_path / "out")
    capsys.readouterr()
    for view, ranks in (("native", 1), ("v3", 8)):
        require_draft(Checkpoint(target), tmp_path / "out", view, ranks)
    assert "warning" not in capsys.readouterr().err
    require_draft(Checkpoint(target), tmp_path / "out", "native", 8)
    assert "does not sum the layer inputs of DeepSeek-V3.2 over its 8 GPUs" in capsys.readouterr().err


def test_a_draft_of_another_architecture_is_not_taken_for_an_mtp_layer(tmp_path, target):
    weights = write_draft(tmp_path / "weights", target)
    config = json.loads((weights / "config.json").read_text())
    write_json(weights / "config.json", config | {"architectures": ["LlamaForCausalLMEagle3"]})
    with pytest.raises(InputError, match="says it is LlamaForCausalLMEagle3"):
        require_draft(Checkpoint(target), weights, "v3", 1)
    for names in ("DeepseekV32ForCausalLM", ARCHITECTURE, 5):
        write_json(weights / "config.json", config | {"architectures": names})
        with pytest.raises(InputError, match=r"has architectures = .*, expected a list of names"):
            require_draft(Checkpoint(target), weights, "v3", 1)
