"""Speed of a training step beside the same layer of transformers: `python -m benchmarks.train [--quick]`.

Both train a tiny MTP layer (hidden 256, 4 heads, 16 experts of width 128, 4 a token, and a shared one;
vocabulary 2,048) on 8 documents of 256 tokens with 3 draft steps, soft targets and AdamW. Ours runs the
served unroll; the other runs `DeepseekV3DecoderLayer` once a step over its own states, with plain logits.
One warm-up step, then rounds in turn; figures are medians, the ratio is the median of the ratios within a
round.

Then the backward of a 6-step unroll at 64 experts (hidden 512, experts of width 256, 8 a token, 4 documents
of 24 tokens, fp32), which forms one gradient of each stacked weight, beside the same unroll with a gradient
at every step, added up by autograd.

Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RotaryEmbedding,
)

from configs.provenance import versions
from configs.schema import TrainConfig
from train.batch import Packed
from train.dims import Dims
from train.draft import Draft
from train.mtp import MTPLayer
from train.unroll import unroll

DOCUMENTS, LENGTH, STEPS = 8, 256, 3
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "intermediate_size": 640,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 192,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}


def initialize(module: nn.Module) -> None:
    """Small random values everywhere, so that both sides do ordinary arithmetic."""
    for p in module.parameters():
        nn.init.ones_(p) if p.dim() == 1 else nn.init.normal_(p, std=p.shape[-1] ** -0.5)


class Transformers(nn.Module):
    """The peer: transformers' decoder layer as an MTP layer, one causal pass a draft step."""

    def __init__(self, embed: Tensor, head: Tensor) -> None:
        super().__init__()
        config = DeepseekV3Config(**{k: v for k, v in CONFIG.items() if k != "model_type"})
        config._attn_implementation = "sdpa"
        D = config.hidden_size
        self.layer = DeepseekV3DecoderLayer(config, 1)
        self.rotary = DeepseekV3RotaryEmbedding(config)
        self.enorm, self.hnorm, self.norm = nn.RMSNorm(D), nn.RMSNorm(D), nn.RMSNorm(D)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.register_buffer("embed", embed)
        self.register_buffer("head", head)

    def forward(self, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        teacher = F.linear(hidden_BTD, self.head).log_softmax(-1)
        state, total = hidden_BTD, hidden_BTD.new_zeros((), dtype=torch.float32)
        for s in range(STEPS):
            n = LENGTH - s - 1
            e = F.embedding(ids_BT[:, s + 1 :], self.embed)
            x = self.eh_proj(torch.cat((self.enorm(e), self.hnorm(state[:, :n])), -1))
            positions = torch.arange(s, s + n)[None]
            out = self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions))
            state = self.norm(out[0] if isinstance(out, tuple) else out)
            student = F.linear(state[:, : n - 1], self.head).float().log_softmax(-1)
            target = teacher[:, s + 1 : s + n].float()
            total = total + F.kl_div(student, target, log_target=True, reduction="sum")
        return total / (DOCUMENTS * LENGTH)


def make_step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """One optimizer step; returns its loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step


def contenders(dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Both sides on the same tokens, states, embedding and head."""
    torch.manual_seed(0)
    D, V = CONFIG["hidden_size"], CONFIG["vocab_size"]
    embed, head = torch.randn(V, D, dtype=dtype), torch.randn(V, D, dtype=dtype) * D**-0.5
    ids, hidden = torch.randint(V, (DOCUMENTS, LENGTH)), torch.randn(DOCUMENTS, LENGTH, D, dtype=dtype)
    layer = layer_of(CONFIG, dtype, embed)
    layer.lm_head = head
    draft = Draft(layer, TrainConfig(num_steps=STEPS))
    batch = Packed(
        ids.flatten(),
        torch.ones(DOCUMENTS * LENGTH, dtype=torch.bool),
        torch.arange(0, DOCUMENTS * LENGTH + 1, LENGTH, dtype=torch.int32),
        hidden.flatten(0, 1),
        hidden.flatten(0, 1),
    )
    rows = batch.scored(STEPS)
    weights = rows.valid / (DOCUMENTS * LENGTH)
    peer = Transformers(embed, head)
    initialize(peer)
    peer.to(dtype)
    return {
        "layer61": make_step(draft, lambda: draft(batch, rows, weights.float()).loss),
        "transformers": make_step(peer, lambda: peer(ids, hidden)),
    }


def layer_of(config: dict, dtype: torch.dtype, embed: Tensor) -> MTPLayer:
    """A layer of small random values."""
    layer = MTPLayer(Dims.from_config(config))
    initialize(layer)
    layer.to(dtype)
    layer.mlp.gate.e_score_correction_bias = torch.zeros(config["n_routed_experts"])
    layer.embed_tokens = embed
    return layer


def backwards() -> dict[str, Callable[[], float]]:
    """Seconds of a backward with one gradient of the experts for all steps, and with one at every step."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "n_routed_experts": 64,
        "num_experts_per_tok": 8,
        "topk_group": 4,
    }
    layer = layer_of(CONFIG | sizes, torch.float32, torch.randn(CONFIG["vocab_size"], 512))
    bounds = torch.arange(0, 97, 24, dtype=torch.int32)
    ids, hidden = torch.randint(CONFIG["vocab_size"], (96,)), torch.randn(96, 512)

    def timed(form: Callable[..., Tensor]) -> Callable[[], float]:
        def run() -> float:
            layer.zero_grad()
            total = form(layer, ids, hidden, bounds, 6).square().sum()
            began = time.perf_counter()
            total.backward()
            return time.perf_counter() - began

        return run

    # without its decorator, each call of the experts forms its own gradients
    return {"once": timed(unroll), "every step": timed(unroll.__wrapped__)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 15")
    rounds = 5 if parser.parse_args().quick else 15
    result: dict[str, object] = {"threads": torch.get_num_threads(), "rounds": rounds, **versions()}
    table = Table("dtype", "layer61 tokens/s", "transformers tokens/s", "ratio", title="Training step, CPU")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        steps = contenders(dtype)
        seconds: dict[str, list[float]] = {who: [] for who in steps}
        for number in range(rounds + 1):
            for who, step in steps.items():
                began = time.perf_counter()
                step()
                if number:
                    seconds[who].append(time.perf_counter() - began)
        speed = {who: DOCUMENTS * LENGTH / statistics.median(s) for who, s in seconds.items()}
        ratio = statistics.median(
            b / a for a, b in zip(seconds["layer61"], seconds["transformers"], strict=True)
        )
        table.add_row(name, *(f"{speed[who]:,.0f}" for who in ("layer61", "transformers")), f"{ratio:.2f}")
        result |= {
            f"{name}_tokens_per_s": round(speed["layer61"]),
            f"{name}_vs_transformers": round(ratio, 3),
        }
    Console().print(table)
    forms = backwards()
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, run in forms.items():
            second = run()
            if number:
                taken[name].append(second)
    once, each = (statistics.median(taken[name]) * 1e3 for name in ("once", "every step"))
    ratio = statistics.median(b / a for a, b in zip(taken["once"], taken["every step"], strict=True))
    print(
        f"backward of 6 steps, 64 experts: {once:.0f} ms; a gradient every step: {each:.0f} ms ({ratio:.2f})"
    )
    result |= {"backward_ms": round(once, 1), "backward_vs_every_step": round(ratio, 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
