"""Export: names, shapes, dtypes and bits of what is written, and what the servers' loaders make of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from configs.contract import Draft
from configs.errors import ConfigError, ContractError, InputError
from configs.schema import RunConfig
from export import directory, fp8, nextn
from export import draft as verb
from export.check import check, sglang_parameter, vllm_parameter
from export.checkpoint import INDEX, Checkpoint, mtp_prefix
from export.keymap import DROPPED, account, is_quantized, keymap, layer_shapes, to_training
from tests.reference import to_checkpoint
from tests.stores import contract_of

LAYER = "model.layers.2."
DRAFT = Draft(mask_position_0=False).model_dump(mode="json")


def layer_names(checkpoint: Checkpoint) -> set[str]:
    return {n for n in checkpoint.mtp_names() if not n.endswith(DROPPED)}


@pytest.fixture
def fp8_checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """The tiny target as DeepSeek would release it: float8 blocks with power-of-two scales."""
    return quantized_copy(tiny_checkpoint, tmp_path / "fp8")


def quantized_copy(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    checkpoint = Checkpoint(source)
    weight_map = {}
    for file in sorted({checkpoint.file(n) for n in checkpoint.names}):
        tensors = {}
        for name in (n for n in checkpoint.names if checkpoint.file(n) == file):
            w = checkpoint.get(name)
            if is_quantized(name):
                w8, scale = fp8.quantize(w)
                tensors |= {name: w8, f"{name.removesuffix('weight')}weight_scale_inv": scale}
            else:
                tensors[name] = w
        save_file(tensors, out / file)
        weight_map |= dict.fromkeys(tensors, file)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**checkpoint.config, "quantization_config": nextn.FP8_CONFIG}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture
def trained(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Trained weights as the trainer leaves them: all but the frozen tensors changed, contract beside."""
    return trained_copy(tiny_checkpoint, tmp_path / "step_000007")


def trained_copy(
    target: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None
) -> Path:
    checkpoint = Checkpoint(target)
    generator = torch.Generator().manual_seed(1)

    def changed(name: str, w: torch.Tensor) -> torch.Tensor:
        if "indexer" in name or "mlp.gate" in name:
            return w
        return w + (0.05 * torch.randn(w.shape, generator=generator)).to(w.dtype)

    (out / "weights").mkdir(parents=True)
    tensors = {}
    for name in sorted(layer_names(checkpoint)):
        if not name.endswith("weight_scale_inv"):
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            tensors[name] = (change or changed)(name, checkpoint.get(name, dtype=dtype))
    save_file(tensors, out / "weights/model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (out / "weights" / INDEX).write_text(json.dumps(index))
    meta = {"format": 1, "contract": contract_of(target), "draft": DRAFT, "step": 7}
    (out / "layer61.json").write_text(json.dumps(meta))
    return out


# float8 blocks


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    exponent=st.integers(-20, 20),
    power_of_two=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fp8_error_stays_within_half_a_step(rows, columns, exponent, power_of_two, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    w8, scale = fp8.quantize(w, power_of_two=power_of_two)
    assert w8.dtype == torch.float8_e4m3fn
    assert w8.shape == w.shape
    assert scale.dtype == torch.float32
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    back = fp8.dequantize(w8, scale)
    step = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    # half a step of three mantissa bits, or of the smallest subnormal; one float32 rounding on top
    assert ((back - w).abs() <= torch.maximum(w.abs() / 16, step / 1024) * (1 + 1e-6)).all()
    again, scale_again = fp8.quantize(back, power_of_two=power_of_two)
    torch.testing.assert_close(
        fp8.dequantize(again, scale_again), back, rtol=1e-6 * (not power_of_two), atol=0
    )
    if power_of_two:
        assert (torch.frexp(scale)[0] == 0.5).all()
        assert torch.equal(back.bfloat16().float(), back)


def test_fp8_block_maximum_is_exact_at_the_edges_of_a_binade():
    for amax in (448.0, 448.0 * 2**-9, 449.0, 224.0, 1e-4, 3e38):
        w = torch.full((130, 5), amax)
        w8, scale = fp8.quantize(w)
        assert w8.float().abs().max() <= 448
        assert scale[0, 0] >= amax / 448 * (1 - 2**-20)
        assert scale[0, 0] < 2 * max(amax, 1e-4) / 448


def test_fp8_zero_block_stays_zero_and_neighbours_do_not_matter():
    w = torch.zeros(256, 256)
    w[128:, 128:] = 5.0
    w8, scale = fp8.quantize(w)
    assert torch.equal(fp8.dequantize(w8, scale)[:128], w[:128])
    assert scale.isfinite().all()
    assert (scale > 0).all()
    alone, scale_alone = fp8.quantize(w[128:, 128:])
    assert torch.equal(w8[128:, 128:].float(), alone.float())
    assert scale[1, 1] == scale_alone[0, 0]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_fp8_refuses_what_is_not_finite(bad):
    w = torch.ones(3, 3)
    w[1, 1] = bad
    with pytest.raises(InputError, match="1 of 9"):
        fp8.quantize(w)


def test_fp8_refuses_scales_of_another_shape():
    with pytest.raises(InputError, match="do not fit"):
        fp8.dequantize(torch.zeros(576, 64).to(torch.float8_e4m3fn), torch.ones(4, 1))


# checkpoints


def test_checkpoint_reads_values_and_bits(tiny_checkpoint, fp8_checkpoint):
    plain, quantized = Checkpoint(tiny_checkpoint), Checkpoint(fp8_checkpoint)
    name = LAYER + "self_attn.kv_a_proj_with_mqa.weight"
    w = plain.get(name)
    assert (w.dtype, tuple(w.shape)) == (plain.dtype(name), plain.shape(name)) == (torch.bfloat16, (576, 64))
    assert quantized.get(name, raw=True).dtype == torch.float8_e4m3fn
    assert quantized.shape(quantized.scale_name(name)) == (5, 1)
    torch.testing.assert_close(quantized.get(name), w.float(), rtol=1 / 16, atol=1e-3)
    assert quantized.get(name, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(InputError, match="no tensor nothing"):
        plain.get("nothing")


def test_checkpoint_notices_an_index_that_lies(tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"][LAYER + "enorm.weight"]
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"has no tensor model\.norm\.weight, though the index says so"):
        Checkpoint(copy).get("model.norm.weight")
    (copy / INDEX).write_text("{")
    with pytest.raises(InputError, match="is not an index"):
        Checkpoint(copy)


# names


def test_keymap_is_invertible_and_covers_the_released_layer(tiny_checkpoint):
    checkpoint = Checkpoint(tiny_checkpoint)
    ops = keymap(checkpoint.config)
    names = checkpoint.mtp_names()
    module = dict(to_training(ops, names, checkpoint.get))
    assert module["mlp.experts.w1"].shape == (8, 32, 64)
    assert module["mlp.experts.w2"].shape == (8, 64, 32)
    back = to_checkpoint(ops, module)
    assert back.keys() == layer_names(checkpoint)
    for name, tensor in back.items():
        assert torch.equal(tensor, checkpoint.get(name)), name
    assert set(names) == {mtp_prefix(checkpoint.config) + n for n in layer_shapes(checkpoint.config)}


def test_keymap_accounts_for_every_tensor(tiny_checkpoint):
    checkpoint = Checkpoint(tiny_checkpoint)
    ops = keymap(checkpoint.config)
    names = list(checkpoint.mtp_names())
    with pytest.raises(InputError, match=r"1 missing: model\.layers\.2\.enorm\.weight"):
        dict(to_training(ops, [n for n in names if not n.endswith("enorm.weight")], checkpoint.get))
    with pytest.raises(InputError, match=r"1 unexpected: model\.layers\.2\.extra"):
        dict(to_training(ops, [*names, "model.layers.2.extra"], checkpoint.get))
    with pytest.raises(InputError, match="repeated"):
        account(["a", "a"], ["a"], "it")
    with pytest.raises(InputError, match=r"o_proj\.weight has shape \(64,\), the configuration says"):
        dict(to_training(ops, names, lambda n: checkpoint.get(n)[0] if "o_proj" in n else checkpoint.get(n)))


def test_a_v3_layer_has_no_indexer(tiny_checkpoint):
    config = {**Checkpoint(tiny_checkpoint).config}
    v32 = layer_shapes(config)
    del config["index_topk"]
    assert set(v32) - set(layer_shapes(config)) == {n for n in v32 if "indexer" in n}


def test_real_sizes_count_the_released_tensors():
    config = {
        **{"hidden_size": 7168, "vocab_size": 129280, "num_attention_heads": 128, "num_hidden_layers": 61},
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128},
        **{"v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048},
        **{"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128},
    }
    names = [n for n in layer_shapes(config) if n not in DROPPED]
    assert len(names) == 791
    assert len(names) + sum(map(is_quantized, names)) == 1569
    assert sum(torch.Size(layer_shapes(config)[n]).numel() for n in names) == pytest.approx(
        11.624e9, rel=1e-3
    )


# what is written


def test_released_layer_round_trips_bit_for_bit(tiny_checkpoint, tmp_path):
    result = nextn.export(tiny_checkpoint, tiny_checkpoint, tmp_path / "nextn", file_bytes=20_000)
    target, draft = Checkpoint(tiny_checkpoint), Checkpoint(tmp_path / "nextn")
    assert set(draft.names) == layer_names(target)
    for name in draft.names:
        assert draft.dtype(name) == target.dtype(name)
        assert torch.equal(draft.get(name), target.get(name))
    assert (tmp_path / "nextn/config.json").read_bytes() == (tiny_checkpoint / "config.json").read_bytes()
    assert (tmp_path / "nextn/tokenizer.json").read_bytes() == (
        tiny_checkpoint / "tokenizer.json"
    ).read_bytes()
    files = sorted(p.name for p in (tmp_path / "nextn").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert result["servers"] == ["vllm", "sglang"]
    assert result["unchanged"] == result["tensors"] == len(draft.names)
    index = json.loads((tmp_path / "nextn" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(draft.get(n).nbytes for n in draft.names)


def test_released_fp8_layer_keeps_its_bits(fp8_checkpoint, tmp_path):
    nextn.export(fp8_checkpoint, fp8_checkpoint, tmp_path / "nextn")
    target, draft = Checkpoint(fp8_checkpoint), Checkpoint(tmp_path / "nextn")
    assert set(draft.names) == layer_names(target)
    for name in draft.names:
        a, b = draft.get(name, raw=True), target.get(name, raw=True)
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b)


def test_trained_weights_take_the_dtypes_of_the_target(fp8_checkpoint, tmp_path):
    run = trained_copy(fp8_checkpoint, tmp_path / "step_000007")
    result = nextn.export(run, fp8_checkpoint, tmp_path / "nextn")
    assert result["step"] == 7
    assert result["contract"] == contract_of(fp8_checkpoint)
    assert result["draft"] == DRAFT
    ours, target, draft = (
        Checkpoint(run / "weights", config={"num_hidden_layers": 2}),
        Checkpoint(fp8_checkpoint),
        Checkpoint(tmp_path / "nextn"),
    )
    assert set(draft.names) == layer_names(target)
    for name in ours.names:
        assert draft.dtype(name) == target.dtype(name), name
        error = (draft.get(name).float() - ours.get(name).float()).abs()
        bound = ours.get(name).float().abs() / 16 + 1e-4 if is_quantized(name) else 0 * error
        assert (error <= bound).all(), name
        if "indexer" in name or "mlp.gate" in name:  # frozen, so the released bits
            assert torch.equal(
                draft.get(name, raw=True).view(torch.uint8), target.get(name, raw=True).view(torch.uint8)
            )
    kinds = result["fp8_errors"]
    assert kinds["mlp.experts.*.gate_proj.weight"]["tensors"] == 8
    assert all(0 < e["worst_relative_rms"] < 2**-4 for e in kinds.values())
    assert not any("indexer" in kind for kind in kinds)


def test_a_trained_indexer_takes_the_dtypes_of_the_targets(fp8_checkpoint, tmp_path):
    def moved(name, w):
        return w * 1.1 if "indexer" in name else w

    run = trained_copy(fp8_checkpoint, tmp_path / "step_000007", moved)
    result = nextn.export(run, fp8_checkpoint, tmp_path / "nextn")
    target, draft = Checkpoint(fp8_checkpoint), Checkpoint(tmp_path / "nextn")
    names = [n for n in draft.names if "indexer" in n and not n.endswith("weight_scale_inv")]
    assert len(names) == 5
    for name in names:
        assert draft.dtype(name) == target.dtype(name), name
        released, found = target.get(name).float(), draft.get(name).float()
        assert float((found - 1.1 * released).norm() / (released.norm() + 1e-9)) < 0.05, name
    assert {"self_attn.indexer.wq_b.weight", "self_attn.indexer.wk.weight"} <= result["fp8_errors"].keys()


def test_unquantised_draft_of_an_fp8_target_is_for_sglang_only(fp8_checkpoint, tmp_path):
    result = nextn.export(fp8_checkpoint, fp8_checkpoint, tmp_path / "nextn", quantization="none")
    assert result["servers"] == ["sglang"]
    draft = Checkpoint(tmp_path / "nextn")
    assert "quantization_config" not in draft.config
    assert {draft.dtype(n) for n in draft.names} == {torch.bfloat16, torch.float32}
    assert not any("scale" in n for n in draft.names)


def test_fp8_draft_of_a_bf16_target(tiny_checkpoint, tmp_path):
    result = nextn.export(tiny_checkpoint, tiny_checkpoint, tmp_path / "nextn", quantization="fp8")
    assert result["servers"] == ["sglang"]
    draft = Checkpoint(tmp_path / "nextn")
    assert draft.quantization == nextn.FP8_CONFIG
    assert sum(n.endswith("weight_scale_inv") for n in draft.names) == sum(map(is_quantized, draft.names))


def test_sglang_legacy_layout(trained, tiny_checkpoint, tmp_path):
    result = nextn.export(trained, tiny_checkpoint, tmp_path / "legacy", layout="sglang-legacy")
    assert result["servers"] == ["sglang"]
    draft = Checkpoint(tmp_path / "legacy")
    assert draft.config["num_hidden_layers"] == 1
    assert draft.config["architectures"] == ["DeepseekV3ForCausalLMNextN"]
    ours = load_file(trained / "weights/model.safetensors")
    assert set(draft.names) == {n.replace(LAYER, "model.layers.0.") for n in ours}
    for name, tensor in ours.items():
        assert torch.equal(draft.get(name.replace(LAYER, "model.layers.0.")), tensor)


@pytest.mark.parametrize("one_file", [False, True])
def test_stitched_layout_is_the_target_with_another_layer(trained, tiny_checkpoint, tmp_path, one_file):
    source = tiny_checkpoint
    if one_file:
        source = tmp_path / "one"
        shutil.copytree(tiny_checkpoint, source)
        checkpoint = Checkpoint(tiny_checkpoint)
        tensors = {n: checkpoint.get(n) for n in checkpoint.names}
        for path in [*source.glob("*.safetensors"), source / INDEX]:
            path.unlink()
        save_file(tensors, source / "model.safetensors")
        (trained / "layer61.json").unlink()  # its contract names the index of the other copy
    before = {p.name: p.stat().st_mtime_ns for p in source.iterdir()}
    result = nextn.export(trained, source, tmp_path / "stitched", layout="stitched")
    assert {p.name: p.stat().st_mtime_ns for p in source.iterdir()} == before
    assert result["servers"] == ["vllm", "sglang"]
    target, whole = Checkpoint(source), Checkpoint(tmp_path / "stitched")
    assert set(whole.names) == set(target.names)
    ours = load_file(trained / "weights/model.safetensors")
    for name in target.names:
        assert torch.equal(whole.get(name), ours.get(name, target.get(name))), name
    # servers read whole files: no file may hold a second, stale copy
    held = [n for p in (tmp_path / "stitched").glob("*.safetensors") for n in load_file(p)]
    assert sorted(held) == sorted(whole.names)
    assert not one_file or not (tmp_path / "stitched/model.safetensors").exists()


def test_stitched_refuses_another_quantisation(tiny_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="stitched"):
        nextn.export(tiny_checkpoint, tiny_checkpoint, tmp_path / "x", layout="stitched", quantization="fp8")


def test_a_second_run_does_nothing_and_another_export_is_refused(trained, tiny_checkpoint, tmp_path):
    out = tmp_path / "nextn"
    first = nextn.export(trained, tiny_checkpoint, out)
    assert not first["reused"]
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    second = nextn.export(trained / "weights", tiny_checkpoint, out)
    assert second == {**first, "reused": True}
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(
        InputError, match=r"another export: its weights are those of .*step_000007.*\(step 7\)"
    ):
        nextn.export(tiny_checkpoint, tiny_checkpoint, out)
    with pytest.raises(InputError, match="another export: layout was 'nextn'"):
        nextn.export(trained, tiny_checkpoint, out, layout="sglang-legacy")
    file = next(out.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"damaged: .*{file.name}"):
        nextn.export(trained, tiny_checkpoint, out)
    assert not list(tmp_path.glob(".*.partial"))


def test_an_interrupted_export_leaves_nothing_in_place(trained, tiny_checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "nextn"
    saved = directory.write_tensors
    calls = []

    def die_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return saved(*args, **kwargs)

    monkeypatch.setattr(directory, "write_tensors", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        nextn.export(trained, tiny_checkpoint, out, file_bytes=20_000)
    assert not out.exists()
    (tmp_path / ".nextn.partial").mkdir()  # what SIGKILL would leave
    (tmp_path / ".nextn.partial/stale.safetensors").write_bytes(b"")
    monkeypatch.undo()
    nextn.export(trained, tiny_checkpoint, out, file_bytes=20_000)
    assert not (out / "stale.safetensors").exists()


def test_plan_states_sizes_and_writes_nothing(trained, tiny_checkpoint, tmp_path):
    planned = nextn.prepare(trained, tiny_checkpoint, tmp_path / "nextn").num_bytes
    assert not (tmp_path / "nextn").exists()
    done = nextn.export(trained, tiny_checkpoint, tmp_path / "nextn")
    assert planned == done["bytes"]
    weights = sum(p.stat().st_size for p in (tmp_path / "nextn").glob("*.safetensors"))
    assert planned <= weights < planned + 100_000


def test_the_verb_finds_the_checkpoint(trained, tiny_checkpoint, tmp_path):
    run = tmp_path / "run"
    values = {"run": {"dir": run}, "target": {"path": tiny_checkpoint}, "export": {"checkpoint": "last"}}
    config = RunConfig.model_validate(values)
    assert "not yet" in verb.plan(config)
    with pytest.raises(InputError, match="no whole checkpoint"):
        verb.run(config)
    step = run / "checkpoints/step_000007"
    shutil.copytree(trained, step)
    shutil.copytree(trained, run / "checkpoints/step_000009")  # killed before its commit
    files = {str(p.relative_to(step)): p.stat().st_size for p in step.rglob("*") if p.is_file()}
    (step / "COMMIT.json").write_text(json.dumps({"format": 1, "files": files}))
    assert "the layer of step 7 as nextn" in verb.plan(config)
    assert verb.run(config)["directory"] == str(run / "nextn")
    values["export"] = {"checkpoint": "released", "dir": tmp_path / "other"}
    assert "the released layer as nextn" in verb.plan(RunConfig.model_validate(values))


def test_the_plan_of_the_real_run_needs_no_model(tmp_path):
    config = RunConfig.model_validate({"target": {"path": tmp_path / "DeepSeek-V3.2"}})
    assert "fp8: 1,569 tensors, 11.73" in verb.plan(config)


# bad input


def test_paths_that_mislead_vllm_are_refused(trained, tiny_checkpoint, tmp_path):
    for name in ("my-Eagle-draft/nextn", "x/dflash", "dspark-1"):
        with pytest.raises(ConfigError, match="speculative method"):
            nextn.export(trained, tiny_checkpoint, tmp_path / name)


def test_missing_and_foreign_checkpoints(trained, tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        nextn.export(tmp_path / "none", tiny_checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match=r"no config\.json"):
        nextn.export(trained, trained / "weights", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        nextn.export(tmp_path / "empty", tiny_checkpoint, tmp_path / "out")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not an export"):
        nextn.export(trained, tiny_checkpoint, tmp_path / "occupied")

    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 50000}))
    with pytest.raises(ContractError, match=r"target\.config_sha256"):
        nextn.export(trained, other, tmp_path / "out")


def test_a_target_without_its_mtp_layer(trained, tiny_checkpoint, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, bare)
    index = json.loads((bare / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.startswith(LAYER)}
    (bare / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="has no MTP layer"):
        nextn.export(trained, bare, tmp_path / "out")


def test_damaged_files_are_named(trained, tiny_checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    last = sorted(broken.glob("*.safetensors"))[-1]
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"{last.name} is not a complete safetensors file"):
        nextn.export(tiny_checkpoint, broken, tmp_path / "out")
    last.unlink()
    with pytest.raises(InputError, match=f"missing, 1: {last.name}"):
        nextn.export(tiny_checkpoint, broken, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, w: w * float("nan") if n.endswith("eh_proj.weight") else w, "eh_proj.weight holds NaN"),
        (lambda n, w: w[:-1] if n.endswith("o_proj.weight") else w, r"o_proj.weight has shape \(63, 64\)"),
    ],
)
def test_bad_weights(tiny_checkpoint, tmp_path, change, message):
    run = trained_copy(tiny_checkpoint, tmp_path / "step_000001", lambda n, w: change(n, w).contiguous())
    with pytest.raises(InputError, match=message):
        nextn.export(run, tiny_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# loader rules


def test_loader_rules_name_what_is_wrong(trained, tiny_checkpoint, fp8_checkpoint, tmp_path):
    out = tmp_path / "nextn"
    nextn.export(trained, tiny_checkpoint, out)
    assert check(out, tiny_checkpoint) == {"vllm": [], "sglang": []}
    assert "fp8" in check(out, fp8_checkpoint)["vllm"][0]
    path = out / "model-00001-of-00001.safetensors"
    tensors = load_file(path)
    (out / INDEX).unlink()
    save_file({n: t for n, t in tensors.items() if "enorm" not in n}, path)
    assert "1 tensors missing: enorm.weight" in check(out, tiny_checkpoint)["vllm"][0]
    save_file({**tensors, LAYER + "self_attn.typo.weight": torch.zeros(1)}, path)
    assert all("does not have" in found[0] for found in check(out, tiny_checkpoint).values())


def test_loader_rules_by_example():
    v32 = {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}
    block = "model.layers.61.mtp_block."
    assert vllm_parameter("model.layers.61.mlp.experts.3.up_proj.weight", v32) == (
        f"{block}mlp.experts.w13_weight",
        "3.w3",
    )
    assert vllm_parameter("model.layers.61.self_attn.kv_a_proj_with_mqa.weight", v32) == (
        f"{block}self_attn.fused_qkv_a_proj.weight",
        "1",
    )
    assert vllm_parameter("model.layers.61.eh_proj.weight", v32) == ("model.layers.61.eh_proj.weight", "")
    assert vllm_parameter("model.layers.60.self_attn.o_proj.weight", v32) is None
    assert sglang_parameter("model.layers.61.enorm.weight", v32) == "model.enorm.weight"
    assert sglang_parameter("model.layers.61.mlp.gate.weight", v32) == "model.decoder.mlp.gate.weight"
    assert sglang_parameter("model.layers.61.shared_head.head.weight", v32) is None
    legacy = {**v32, "num_hidden_layers": 1}
    assert sglang_parameter("model.layers.0.mlp.gate.weight", legacy) == "model.decoder.mlp.gate.weight"
    assert vllm_parameter("model.layers.0.mlp.gate.weight", v32) is None
