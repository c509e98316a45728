"""The directory of the tiny target: config.json, names and files of DeepSeek-V3.2, at laptop size.

Sizes that servers fix stay real: kv_lora_rank 512 and qk_rope_head_dim 64 (vLLM's CPU attention kernel is
built for 576), the YaRN parameters (softmax scale), routed_scaling_factor. The rest shrinks by `[tiny]`.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from configs.files import write_json
from configs.schema import TinyConfig
from export.keymap import layer_shapes
from pipeline.conversations import require_conversations
from pipeline.tiny.tokenizer import train_tokenizer

__all__ = ["checkpoint_shapes", "config_json", "random_checkpoint", "write_checkpoint"]

KV_LORA_RANK, ROPE_HEAD_DIM = 512, 64
# tensors that no layer has but the MTP layer
MTP_ONLY = ("embed_tokens.", "enorm.", "hnorm.", "eh_proj.", "shared_head.")


def config_json(tiny: TinyConfig) -> dict[str, Any]:
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

    Source: README_WEIGHTS of deepseek-ai/DeepSeek-V3; the layers' own names and shapes are the MTP layer's.
    """
    D, V, F = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    mtp = layer_shapes(config)
    mixture = {name: shape for name, shape in mtp.items() if not name.startswith(MTP_ONLY)}
    dense = {name: shape for name, shape in mixture.items() if not name.startswith("mlp.")}
    dense |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
    backbone = range(config["num_hidden_layers"])
    layers = [dense if i < config["first_k_dense_replace"] else mixture for i in backbone]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i, layer in enumerate([*layers, mtp]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def write_checkpoint(
    directory: Path,
    tiny: TinyConfig,
    tokenizer: PreTrainedTokenizerFast,
    tensors: dict[str, Tensor],
    record: dict[str, Any] | None = None,
) -> None:
    """Write config.json, tokenizer and safetensors files, and publish the directory by one rename.

    Args:
        directory: the checkpoint; replaced as a whole where it exists.
        tiny: sizes.
        tokenizer: from `train_tokenizer`.
        tensors: every tensor by its checkpoint name; stored as bfloat16, correction biases as float32.
        record: written as build.json.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    config = config_json(tiny)
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
        tokenizer.save_pretrained(str(partial), save_jinja_files=False)
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
        for file in set(weight_map.values()):  # safetensors makes them private
            shutil.copymode(partial / "model.safetensors.index.json", partial / file)
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

    tensors = {name: draw(name, shape) for name, shape in checkpoint_shapes(config_json(tiny)).items()}
    mtp = f"model.layers.{tiny.num_hidden_layers}."
    tensors[f"{mtp}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{mtp}shared_head.head.weight"] = tensors["lm_head.weight"]
    tokenizer = train_tokenizer(require_conversations(tiny.conversations), tiny.vocab_size)
    write_checkpoint(directory, tiny, tokenizer, tensors)
    return Path(directory)
