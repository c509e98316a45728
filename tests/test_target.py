"""The tiny target: released names and shapes, a tokenizer with its chat format, training and its cache."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoConfig, AutoTokenizer, DeepseekV3ForCausalLM, DeepseekV32ForCausalLM

from configs.errors import InputError
from configs.files import read_json
from configs.schema import TinyConfig
from pipeline.conversations import require_conversations
from pipeline.tiny.backbone import load_backbone
from pipeline.tiny.target import build_target, dry_run
from pipeline.tiny.tokenizer import SPECIAL_TOKENS, train_tokenizer
from pipeline.tiny.write import checkpoint_shapes, config_json, random_checkpoint

# config.json of the released DeepSeek-V3.2, sizes that define the shapes of its tensors
RELEASED = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "vocab_size": 129280,
}


def headers(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor, read from the files the index names."""
    index = read_json(directory / "model.safetensors.index.json")
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(directory / file, framework="pt") as f:
            part = f.get_slice(name)
            found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def packed(lengths: list[int], vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, vocab, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return ids, positions, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def test_shapes_at_released_sizes_are_the_released_ones() -> None:
    shapes = checkpoint_shapes(RELEASED)
    layer = {
        n.removeprefix("model.layers.61."): s for n, s in shapes.items() if n.startswith("model.layers.61.")
    }
    # 768 matrices of experts and 23 others in the MTP layer with its indexer, embedding and head copies aside
    assert len(layer) - 2 == 791
    assert layer["eh_proj.weight"] == (7168, 14336)
    assert layer["self_attn.q_b_proj.weight"] == (24576, 1536)
    assert layer["self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert layer["self_attn.kv_b_proj.weight"] == (32768, 512)
    assert layer["self_attn.o_proj.weight"] == (7168, 16384)
    assert layer["self_attn.indexer.wq_b.weight"] == (8192, 1536)
    assert layer["self_attn.indexer.weights_proj.weight"] == (64, 7168)
    assert layer["mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert layer["shared_head.head.weight"] == layer["embed_tokens.weight"] == (129280, 7168)
    parameters = sum(torch.Size(s).numel() for s in layer.values()) - 2 * 129280 * 7168
    assert round(parameters / 1e9, 3) == 11.624


def test_checkpoint_holds_exactly_these_tensors(tiny_checkpoint: Path, tiny_config: TinyConfig) -> None:
    config = read_json(tiny_checkpoint / "config.json")
    assert config == config_json(tiny_config)
    expected = {
        name: (shape, "F32" if name.endswith("e_score_correction_bias") else "BF16")
        for name, shape in checkpoint_shapes(config).items()
    }
    assert headers(tiny_checkpoint) == expected
    index = read_json(tiny_checkpoint / "model.safetensors.index.json")
    sizes = {"F32": 4, "BF16": 2}
    assert index["metadata"]["total_size"] == sum(
        torch.Size(shape).numel() * sizes[dtype] for shape, dtype in expected.values()
    )


def test_a_server_of_another_user_can_read_every_file(tiny_checkpoint: Path) -> None:
    assert len({path.stat().st_mode for path in tiny_checkpoint.iterdir()}) == 1


def test_config_has_the_released_fields(tiny_checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    assert (config.model_type, config.architectures) == ("deepseek_v32", ["DeepseekV32ForCausalLM"])
    assert config.kv_lora_rank + config.qk_rope_head_dim == 576
    assert config.num_nextn_predict_layers == 1
    raw = read_json(tiny_checkpoint / "config.json")
    assert raw["topk_method"] == "noaux_tc"
    assert raw["rope_scaling"]["mscale_all_dim"] == raw["rope_scaling"]["mscale"] == 1.0
    assert "quantization_config" not in raw


def test_mtp_layer_has_copies_of_embedding_and_head(tiny_checkpoint: Path) -> None:
    index = read_json(tiny_checkpoint / "model.safetensors.index.json")["weight_map"]

    def get(name: str) -> torch.Tensor:
        with safe_open(tiny_checkpoint / index[name], framework="pt") as f:
            return f.get_tensor(name)

    assert torch.equal(get("model.layers.2.embed_tokens.weight"), get("model.embed_tokens.weight"))
    assert torch.equal(get("model.layers.2.shared_head.head.weight"), get("lm_head.weight"))


@pytest.mark.parametrize("kind", [DeepseekV32ForCausalLM, DeepseekV3ForCausalLM])
def test_transformers_computes_the_same_logits(kind: Any, tiny_checkpoint: Path) -> None:
    config = kind.config_class.from_pretrained(tiny_checkpoint)
    model, info = kind.from_pretrained(
        tiny_checkpoint, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    ignored = ("model.layers.2.",) if kind is DeepseekV32ForCausalLM else ("model.layers.2.", ".indexer.")
    assert [k for k in info["unexpected_keys"] if not any(p in k for p in ignored)] == []
    backbone = load_backbone(tiny_checkpoint)
    lengths = [37, 5, 1, 22]
    ids, positions, cu_seqlens = packed(lengths, config.vocab_size)
    with torch.no_grad():
        ours = backbone.lm_head(backbone.states(ids, positions, cu_seqlens))
        theirs = torch.cat([model(part[None]).logits[0] for part in ids.split(lengths)])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_losses_are_the_plain_ones(tiny_checkpoint: Path) -> None:
    """Packing changes nothing: each document alone, with its own cross-entropy, gives the same means."""
    backbone = load_backbone(tiny_checkpoint)
    lengths = [9, 1, 2, 3, 14]
    ids, positions, cu_seqlens = packed(lengths, 512)
    main, second, right = backbone(ids, positions, cu_seqlens)
    first_rows, second_rows, wanted, after = [], [], [], []
    for part in ids.split(lengths):
        alone = torch.tensor([0, len(part)], dtype=torch.int32)
        at = torch.arange(len(part))
        states = backbone.states(part, at, alone)
        drafted = backbone.draft(part, states, at, alone)
        first_rows.append(backbone.lm_head(states[:-1]))
        wanted.append(part[1:])
        second_rows.append(backbone.lm_head(drafted[: max(len(part) - 2, 0)]))
        after.append(part[2:])
    logits, target = torch.cat(second_rows), torch.cat(after)
    torch.testing.assert_close(
        main, torch.nn.functional.cross_entropy(torch.cat(first_rows), torch.cat(wanted))
    )
    torch.testing.assert_close(second, torch.nn.functional.cross_entropy(logits, target))
    assert right.item() == pytest.approx((logits.argmax(-1) == target).float().mean().item())


def test_draft_is_the_trained_layer(tiny_checkpoint: Path) -> None:
    """The joint training runs the MTP layer exactly as `train.model` does, position 0 masked."""
    from train.blocks import DecoderLayer
    from train.model import load_layer

    backbone, layer = load_backbone(tiny_checkpoint), load_layer(tiny_checkpoint)
    ids, positions, cu_seqlens = packed([11, 6], 512)
    with torch.no_grad():
        states = backbone.states(ids, positions, cu_seqlens)
        ours = backbone.draft(ids, states, positions, cu_seqlens)
        x, _ = layer.enter(ids.roll(-1), states, positions == 0)
        theirs = layer.leave(DecoderLayer.forward(layer, x, positions, cu_seqlens))[0]
    torch.testing.assert_close(ours, theirs)


def test_tokenizer_round_trips_any_text(tiny_checkpoint: Path, conversations: list[dict]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    texts = [m["content"] for c in conversations for m in c["messages"]]
    for text in [*texts, "\x00\t\r\n  \u200b👩‍👩‍👧 12345 ÿ", "<think>a</think>b"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 512


def test_template_writes_what_the_engine_would(tiny_checkpoint: Path, conversations: list[dict]) -> None:
    """vLLM encodes V3.2's messages in code; the Jinja template gives the same text, thinking or not."""
    encoding = pytest.importorskip("vllm.tokenizers.deepseek_v32_encoding")
    template: Any = AutoTokenizer.from_pretrained(tiny_checkpoint).apply_chat_template
    for conversation in conversations:
        messages = conversation["messages"]
        plain = []
        for m in messages:
            reasoning, mark, content = m["content"].rpartition("</think>")
            plain.append(
                {**m, "content": content, "reasoning": reasoning.removeprefix("<think>")} if mark else m
            )
        mode = "thinking" if plain[-1].get("reasoning") else "chat"
        assert template(messages, tokenize=False) == encoding.encode_messages(plain, thinking_mode=mode)
        prompt = template(
            messages[:-1], tokenize=False, add_generation_prompt=True, thinking=mode == "thinking"
        )
        assert prompt == encoding.encode_messages(plain[:-1], thinking_mode=mode)
        whole = template(messages, tokenize=False)
        assert whole.startswith(prompt.removesuffix("<think>"))


def test_tokenizer_training_is_repeatable(conversations_file: Path) -> None:
    conversations = require_conversations(conversations_file)
    first, second = (train_tokenizer(conversations, 400).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> tuple[Path, TinyConfig]:
    """A target trained for a few seconds on six conversations."""
    tiny = tiny_config.model_copy(
        update={"train_tokens": 60_000, "sequence_length": 600, "learning_rate": 4e-3}
    )
    return build_target(tmp_path_factory.mktemp("trained") / "target", tiny, seed=3), tiny


def test_training_learns_text_and_drafts(trained: tuple[Path, TinyConfig]) -> None:
    directory, tiny = trained
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = DeepseekV32ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    messages = list(require_conversations(tiny.conversations)[1].messages)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(out[:-1]) == messages[-1]["content"]
    assert read_json(directory / "build.json")["measured"]["mtp_accuracy"] > 0.8


def test_training_moves_the_correction_bias_only_by_load(trained: tuple[Path, TinyConfig]) -> None:
    backbone = load_backbone(trained[0])
    assert len(backbone.gates()) == 2
    for gate in backbone.gates():
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert gate.e_score_correction_bias.abs().max() > 0


def test_a_complete_build_is_reused(trained: tuple[Path, TinyConfig], capsys: pytest.CaptureFixture) -> None:
    directory, tiny = trained
    before = {f.name: f.stat().st_mtime_ns for f in directory.iterdir()}
    assert build_target(directory, tiny, seed=3) == directory
    assert {f.name: f.stat().st_mtime_ns for f in directory.iterdir()} == before
    assert "kept" in capsys.readouterr().err


def test_other_settings_build_again(tmp_path: Path, tiny_config: TinyConfig) -> None:
    tiny = tiny_config.model_copy(update={"train_tokens": 1200, "sequence_length": 600})
    directory = build_target(tmp_path / "target", tiny, seed=0)
    first = read_json(directory / "build.json")["key"]
    build_target(directory, tiny, seed=1)
    assert read_json(directory / "build.json")["key"] != first
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_foreign_directory_is_left_alone(tmp_path: Path, tiny_config: TinyConfig) -> None:
    random_checkpoint(tmp_path / "other", tiny_config)
    before = sorted(f.name for f in (tmp_path / "other").iterdir())
    with pytest.raises(InputError, match="not a target built here"):
        build_target(tmp_path / "other", tiny_config)
    assert sorted(f.name for f in (tmp_path / "other").iterdir()) == before


def _build(directory: Path, tiny: TinyConfig, stepped: Any) -> None:
    register_optimizer_step_post_hook(lambda *_: stepped.set())
    build_target(directory, tiny)


def test_a_killed_build_leaves_nothing(tmp_path: Path, tiny_config: TinyConfig) -> None:
    tiny = tiny_config.model_copy(update={"train_tokens": 10_000_000})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    stepped = context.Event()
    process = context.Process(target=_build, args=(tmp_path / "target", tiny, stepped))
    process.start()
    assert stepped.wait(120)
    assert process.is_alive()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(tmp_path.iterdir()) == []


def test_bad_conversations_are_named_with_their_line(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "c.jsonl"
    for bad in ("{", '{"messages": []}', '{"messages": [{"role": "tool", "content": "x"}]}', "[]"):
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(InputError, match=r"c\.jsonl:2: ") as caught:
            require_conversations(path)
        assert caught.value.hint
    with pytest.raises(InputError, match="cannot read"):
        require_conversations(tmp_path / "missing.jsonl")
    path.write_text("")
    with pytest.raises(InputError, match="holds no conversation"):
        require_conversations(path)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for sizes in (
        {"n_group": 3},
        {"topk_group": 5},
        {"num_experts_per_tok": 9},
        {"first_k_dense_replace": 4},
    ):
        with pytest.raises(ValueError, match=next(iter(sizes))):
            TinyConfig(**sizes)


def test_dry_run_states_the_size(tiny_config: TinyConfig) -> None:
    line = dry_run(tiny_config)
    assert "\n" not in line
    assert "M parameters" in line
