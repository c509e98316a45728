"""The tiny target: a checkpoint with the names, config fields and tokenizer of DeepSeek-V3.2, at laptop size.

Sizes that servers fix stay real: kv_lora_rank 512 and qk_rope_head_dim 64 (vLLM's CPU attention kernel is
built for 576), the YaRN parameters (softmax scale), routed_scaling_factor. The rest shrinks by `[tiny]`.

Legend: D hidden_size, H heads, E experts, F expert width, V vocabulary, P nope, R rope, C value width of a
head, L kv_lora_rank, Q q_lora_rank.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.files import write_json
from configs.schema import TinyConfig
from pipeline.tokenizer import read_texts, train_tokenizer

__all__ = ["checkpoint_shapes", "random_checkpoint", "target_config", "write_checkpoint"]

KV_LORA_RANK, ROPE_HEAD_DIM = 512, 64


def target_config(tiny: TinyConfig) -> dict[str, Any]:
    """The config.json of the tiny target, with every field of the released deepseek_v32 one."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": tiny.first_k_dense_replace,
        "hidden_act": "silu",
        "hidden_size": tiny.hidden_size,
        "index_head_dim": tiny.index_head_dim,
        "index_n_heads": tiny.index_n_heads,
        "index_topk": tiny.index_topk,
        "initializer_range": 0.02,
        "intermediate_size": tiny.intermediate_size,
        "kv_lora_rank": KV_LORA_RANK,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v32",
        "moe_intermediate_size": tiny.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": tiny.n_group,
        "n_routed_experts": tiny.n_routed_experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": tiny.num_attention_heads,
        "num_experts_per_tok": tiny.num_experts_per_tok,
        "num_hidden_layers": tiny.num_hidden_layers,
        "num_key_value_heads": tiny.num_attention_heads,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": tiny.q_lora_rank,
        "qk_nope_head_dim": tiny.qk_nope_head_dim,
        "qk_rope_head_dim": ROPE_HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": tiny.topk_group,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": tiny.v_head_dim,
        "vocab_size": tiny.vocab_size,
    }


def checkpoint_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an unquantised checkpoint by its name, in the order it is written.

    Source: README_WEIGHTS of deepseek-ai/DeepSeek-V3; indexer names of deepseek-ai/DeepSeek-V3.2-Exp.
    """
    D, H, V = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    P, R, C = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    L, Q = config["kv_lora_rank"], config["q_lora_rank"]
    E, F = config["n_routed_experts"], config["moe_intermediate_size"]
    IH, ID = config["index_n_heads"], config["index_head_dim"]

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate_proj.weight": (width, D),
            f"{prefix}up_proj.weight": (width, D),
            f"{prefix}down_proj.weight": (D, width),
        }

    last = config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(last + 1):
        p = f"model.layers.{layer}."
        if layer == last:
            shapes |= {
                f"{p}embed_tokens.weight": (V, D),
                f"{p}enorm.weight": (D,),
                f"{p}hnorm.weight": (D,),
                f"{p}eh_proj.weight": (D, 2 * D),
            }
        shapes |= {
            f"{p}input_layernorm.weight": (D,),
            f"{p}self_attn.q_a_proj.weight": (Q, D),
            f"{p}self_attn.q_a_layernorm.weight": (Q,),
            f"{p}self_attn.q_b_proj.weight": (H * (P + R), Q),
            f"{p}self_attn.kv_a_proj_with_mqa.weight": (L + R, D),
            f"{p}self_attn.kv_a_layernorm.weight": (L,),
            f"{p}self_attn.kv_b_proj.weight": (H * (P + C), L),
            f"{p}self_attn.o_proj.weight": (D, H * C),
            f"{p}self_attn.indexer.wq_b.weight": (IH * ID, Q),
            f"{p}self_attn.indexer.wk.weight": (ID, D),
            f"{p}self_attn.indexer.k_norm.weight": (ID,),
            f"{p}self_attn.indexer.k_norm.bias": (ID,),
            f"{p}self_attn.indexer.weights_proj.weight": (IH, D),
            f"{p}post_attention_layernorm.weight": (D,),
        }
        if layer < config["first_k_dense_replace"]:
            shapes |= mlp(f"{p}mlp.", config["intermediate_size"])
        else:
            shapes |= {f"{p}mlp.gate.weight": (E, D), f"{p}mlp.gate.e_score_correction_bias": (E,)}
            for expert in range(E):
                shapes |= mlp(f"{p}mlp.experts.{expert}.", F)
            shapes |= mlp(f"{p}mlp.shared_experts.", F * config["n_shared_experts"])
        if layer == last:
            shapes |= {f"{p}shared_head.norm.weight": (D,), f"{p}shared_head.head.weight": (V, D)}
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def write_checkpoint(
    directory: Path, tiny: TinyConfig, tensors: dict[str, Tensor], record: dict[str, Any] | None = None
) -> None:
    """Write config.json, tokenizer and safetensors files, and publish the directory by one rename.

    Args:
        directory: the checkpoint; replaced as a whole where it exists.
        tiny: sizes, and the conversations that train the tokenizer.
        tensors: every tensor by its checkpoint name; stored as bfloat16, correction biases as float32.
        record: written as build.json.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
        InputError: the conversations cannot be read.
    """
    config = target_config(tiny)
    expected = checkpoint_shapes(config)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        wrong = sorted(dict(found.items() ^ expected.items()))
        raise ValueError(f"tensors do not fit the configuration: {wrong[:5]}")
    stored = {
        name: tensors[name]
        .detach()
        .to(torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)
        .clone(memory_format=torch.contiguous_format)
        for name in expected
    }
    directory = Path(directory).absolute()
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        train_tokenizer(read_texts(tiny.conversations), tiny.vocab_size, partial)
        write_json(partial / "config.json", config)
        write_json(
            partial / "generation_config.json",
            {"_from_model_config": True, "bos_token_id": 0, "do_sample": False, "eos_token_id": 1},
        )
        # as released, the MTP layer comes in a file of its own at the end
        mtp = f"model.layers.{config['num_hidden_layers']}."
        parts = [
            {n: t for n, t in stored.items() if not n.startswith(mtp)},
            {n: t for n, t in stored.items() if n.startswith(mtp)},
        ]
        weight_map: dict[str, str] = {}
        for i, part in enumerate(parts, 1):
            file = f"model-{i:05d}-of-{len(parts):06d}.safetensors"
            save_file(part, partial / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.numel() * t.element_size() for t in stored.values())
        write_json(
            partial / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        if record is not None:
            write_json(partial / "build.json", record)
        if directory.exists():
            shutil.rmtree(directory)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def random_checkpoint(directory: Path, tiny: TinyConfig, seed: int = 0) -> Path:
    """Write an untrained target with a tokenizer trained on `tiny.conversations`; returns `directory`.

    Matrices are normal with variance 1 / columns, so that activations, router scores and logits differ from
    token to token; norm weights and biases are spread as well, so that one left out changes the result.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            return 0.02 * noise
        if name.endswith("k_norm.bias"):
            return 0.1 * noise
        if len(shape) == 1:
            return 1 + 0.1 * noise
        return noise if "embed_tokens" in name else noise * shape[1] ** -0.5

    tensors = {name: draw(name, shape) for name, shape in checkpoint_shapes(target_config(tiny)).items()}
    mtp = f"model.layers.{tiny.num_hidden_layers}."
    tensors[f"{mtp}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{mtp}shared_head.head.weight"] = tensors["lm_head.weight"]
    write_checkpoint(directory, tiny, tensors)
    return Path(directory)
