"""Training of the tiny target: backbone and MTP layer jointly, on packed conversations."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from configs.progress import task
from configs.schema import TinyConfig
from pipeline.tiny.backbone import Backbone
from train.blocks import Gate

__all__ = ["train"]

BIAS_STEP = 0.002
# instructions that multiply bfloat16; without them it is slower than float32
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


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
    packed = batches(documents, tiny.sequence_length, generator)
    last: list[tuple[float, float, float]] = []
    started = time.monotonic()
    with task("target", steps * tiny.sequence_length, "tokens") as progress:
        for step in range(steps):
            scale = min(1, (step + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = tiny.learning_rate * scale
            main, second, right = backbone(*next(packed))
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


def batches(
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
