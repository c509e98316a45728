"""The tiny target: a checkpoint with the names, config fields and tokenizer of DeepSeek-V3.2, at laptop size.

Sizes that servers fix stay real: kv_lora_rank 512 and qk_rope_head_dim 64 (vLLM's CPU attention kernel is
built for 576), the YaRN parameters (softmax scale), routed_scaling_factor. The rest shrinks by `[tiny]`.

Legend: D hidden_size, H heads, E experts, F expert width, V vocabulary, P nope, R rope, C value width of a
head, L kv_lora_rank, Q q_lora_rank.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from configs.errors import InputError
from configs.files import read_json, sha256_file, sha256_json, write_json
from configs.progress import log, task
from configs.schema import PromptsConfig, TinyConfig
from pipeline.prompts import held_out_lines
from pipeline.tiny.backbone import Backbone
from pipeline.tiny.tokenizer import read_conversations, train_tokenizer
from train.blocks import Gate
from train.dims import Dims

__all__ = [
    "build_target",
    "checkpoint_shapes",
    "dry_run",
    "random_checkpoint",
    "target_config",
    "write_checkpoint",
]

KV_LORA_RANK, ROPE_HEAD_DIM = 512, 64
# part of the cache key: raise it when the same settings would give another target
BUILD = 1
BIAS_STEP = 0.002
# instructions that multiply bfloat16; without them it is slower than float32
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


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
        if record is not None:
            write_json(partial / "build.json", record)
        if directory.exists():
            shutil.rmtree(directory)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def pack(
    documents: list[Tensor], budget: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield packed batches of whole documents for ever, one shuffled pass after another.

    Args:
        documents: token ids of each, int64.
        budget: tokens of a batch; the document that reaches it is cut there.

    Yields:
        input_ids int64 [budget], positions int64 [budget] (place in the document), cu_seqlens int32 [B+1].
    """
    batch: list[Tensor] = []
    room = budget
    while True:
        for i in torch.randperm(len(documents), generator=generator).tolist():
            document = documents[i][:room]
            batch.append(document)
            room -= len(document)
            if room == 0:
                lengths = torch.tensor([0] + [len(d) for d in batch], dtype=torch.int32)
                positions = torch.cat([torch.arange(len(d)) for d in batch])
                yield torch.cat(batch), positions, lengths.cumsum(0, dtype=torch.int32)
                batch, room = [], budget


def initialize(backbone: Backbone, generator: torch.Generator) -> None:
    """Normal matrices of variance 1 / columns; what is added to the residual stream starts smaller."""
    depth = (2 * len(backbone.layers)) ** -0.5
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if p.dim() == 1:
                continue
            added = name.endswith(("o_proj.weight", "down_proj.weight", "experts.w2"))
            std = 0.5 if name == "embed_tokens.weight" else p.shape[-1] ** -0.5 * (depth if added else 1)
            p.normal_(0, std, generator=generator)


def train(backbone: Backbone, documents: list[Tensor], tiny: TinyConfig, seed: int) -> dict[str, float]:
    """Train backbone and MTP layer jointly, as DeepSeek-V3 was: next token + weight x token after next.

    The linear maps run in bfloat16 where the CPU can, the rest in float32. The router's correction bias takes
    no gradient: after each step it moves by `BIAS_STEP` towards an even load (arXiv 2412.19437, section
    2.1.2), and rests in the last tenth.

    Returns:
        losses (nats) and share of right MTP predictions, means over the last tenth, and the seconds taken.
    """
    generator = torch.Generator().manual_seed(seed)
    initialize(backbone, generator)
    if any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16):
        backbone.use_bfloat16()
    parameters = list(backbone.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=tiny.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    steps = max(1, tiny.train_tokens // tiny.sequence_length)
    warm = max(1, steps // 20)

    loads: dict[Gate, Tensor] = {}

    def count(gate: Gate, _: Any, output: tuple[Tensor, Tensor]) -> None:
        loads[gate] = torch.bincount(output[0].flatten(), minlength=tiny.n_routed_experts).float()

    hooks = [gate.register_forward_hook(count) for gate in backbone.gates()]
    batches = pack(documents, tiny.sequence_length, generator)
    last: list[tuple[float, float, float]] = []
    started = time.monotonic()
    with task("target", steps * tiny.sequence_length) as progress:
        for step in range(steps):
            scale = min(1, (step + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = tiny.learning_rate * scale
            main, second, right = backbone(*next(batches))
            (main + tiny.mtp_loss_weight * second).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step < steps * 0.9 - 1:
                for gate, load in loads.items():
                    gate.e_score_correction_bias += BIAS_STEP * (load.mean() - load).sign()
            else:
                last.append((main.item(), second.item(), right.item()))
            progress.advance(tiny.sequence_length, f"loss {main.item():.3f}, mtp {second.item():.3f}")
    for hook in hooks:
        hook.remove()
    means = [sum(column) / len(column) for column in zip(*last, strict=True)]
    return {
        "loss": means[0],
        "mtp_loss": means[1],
        "mtp_accuracy": means[2],
        "seconds": time.monotonic() - started,
    }


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
    tokenizer = train_tokenizer(read_conversations(tiny.conversations), tiny.vocab_size)
    write_checkpoint(directory, tiny, tokenizer, tensors)
    return Path(directory)


def build_key(tiny: TinyConfig, seed: int, unseen: set[int]) -> str:
    """Hash of everything the target follows from: settings, conversations, seed and this code's version.

    Args:
        tiny, seed: the settings.
        unseen: lines of the conversations that it is not trained on.
    """
    if not tiny.conversations.is_file():
        raise InputError(
            f"tiny.conversations: no file {tiny.conversations}",
            hint="run `python -m data.make_conversations`, or name a JSONL file of conversations",
        )
    settings = tiny.model_dump(mode="json", exclude={"conversations"})
    made_from = {"build": BUILD, "tiny": settings, "conversations": sha256_file(tiny.conversations)}
    return sha256_json({**made_from, "seed": seed, "unseen": sorted(unseen)})


def dry_run(tiny: TinyConfig) -> str:
    """One line: the size of the target and of its training."""
    shapes = checkpoint_shapes(target_config(tiny))
    copies = (f"layers.{tiny.num_hidden_layers}.embed_tokens.weight", "shared_head.head.weight")
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(copies))
    size = sum(math.prod(shape) for shape in shapes.values()) * 2
    return (
        f"target of {parameters / 1e6:.1f} M parameters ({size / 1e6:.0f} MB), {tiny.num_hidden_layers}"
        f" layers and the MTP layer, {tiny.vocab_size:,} tokens in the vocabulary; trains on"
        f" {tiny.train_tokens:,} tokens of {tiny.conversations}"
    )


def build_target(
    directory: Path, tiny: TinyConfig, seed: int = 0, prompts: PromptsConfig | None = None
) -> Path:
    """Train the tiny target in `directory`, or keep the one there if it was built from the same things.

    Conversations that `prompts` holds out are kept from this training as well: a target and an MTP layer that
    know them by heart would make the released layer look better on them than on anything else.

    The directory appears in one rename when all is done, so an interrupted build leaves nothing behind.

    Returns:
        `directory`.

    Raises:
        InputError: the conversations cannot be used, or `directory` holds something this did not build.
    """
    directory = Path(directory)
    unseen: set[int] = set()
    if (
        prompts is not None
        and prompts.path is not None
        and prompts.path.resolve() == tiny.conversations.resolve()
    ):
        unseen = held_out_lines(prompts, seed)
    key = build_key(tiny, seed, unseen)
    if directory.exists() and any(directory.iterdir()):
        try:
            built = read_json(directory / "build.json")["key"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{directory} exists and is not a target built here (it has no build.json)",
                hint="name another directory, or remove this one",
            ) from None
        if built == key:
            log("target", f"{directory} is built from the same settings and conversations: kept")
            return directory
        log("target", f"{directory} was built from other settings or conversations: building it again")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent):
        pass  # where nothing can be written that shows now, not after the training
    conversations = read_conversations(tiny.conversations)
    tokenizer = train_tokenizer(conversations, tiny.vocab_size)
    conversations = [c for line, c in enumerate(conversations, 1) if line not in unseen]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    documents = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    total = sum(map(len, documents))
    log("target", f"{len(documents):,} conversations, {total:,} tokens, {len(tokenizer):,} in the vocabulary")
    config = target_config(tiny)
    backbone = Backbone(Dims.from_config(config))
    measured = train(backbone, documents, tiny, seed)
    log("target", json.dumps({k: round(v, 4) for k, v in measured.items()}))
    record = {"format": 1, "key": key, "documents": len(documents), "tokens": total, "measured": measured}
    write_checkpoint(directory, tiny, tokenizer, dict(backbone.checkpoint_tensors()), record)
    return directory
