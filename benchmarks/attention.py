"""Time and memory of sparse attention by form: `python -m benchmarks.attention [--lengths 2048 ...]`.

One step of the unroll over one document, forward and backward, with all its tokens as anchors and with the
last 2,048: dense attention, the plain form with the indexer's mask (`documents`), flex attention with packed
bits (`blocks`, on a GPU), and latents gathered (`gather`); beside them the indexer's choice alone, which all
but the first need. On a GPU at the sizes of DeepSeek-V3.2, on a CPU at small ones, where keys kept are a
quarter of the shortest document as there. Compared with the plain form first. The arithmetic at V3.2's sizes
comes after it; the last line is a JSON object.

Legend: T tokens, A anchors, H heads, Q query width, C value width, L kv_lora_rank, R rope, K keys kept.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import gate
from configs.files import read_json
from configs.target import RELEASED
from tests.live_bytes import LiveBytes
from train.attention import attention_form
from train.blocks import Attention
from train.dims import Dims
from train.gather import gather_form
from train.indexer import Index, Selection

MIB, GIB = 2**20, 2**30
# of the plain form's scores, in float32; beyond, it is left out
MOST_SCORES = GIB
FEW = 2048
REAL = Dims.from_config(read_json(RELEASED))
SMALL = replace(
    REAL,
    hidden_size=64,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    index_n_heads=8,
    index_head_dim=16,
    index_topk=512,
)


class Flops(NamedTuple):
    """Operations of one step's matrix products, forward and backward; the indexer's forward alone."""

    dense: float
    gather: float
    index: float


def flops(dims: Dims, tokens: int, anchors: int) -> Flops:
    """By form, of the last `anchors` of a document; a backward is two and a half forwards."""
    visible = sum(range(tokens - anchors + 1, tokens + 1))
    kept = sum(min(n, dims.index_topk) for n in range(tokens - anchors + 1, tokens + 1))
    heads, L, R = dims.num_attention_heads, dims.kv_lora_rank, dims.qk_rope_head_dim
    both = dims.qk_nope_head_dim + dims.v_head_dim
    expand = 2 * tokens * L * heads * both
    absorb = 2 * anchors * L * heads * both
    return Flops(
        3.5 * (2 * visible * heads * (both + R) + expand),
        3.5 * (2 * kept * heads * (2 * L + R) + absorb),
        2 * visible * dims.index_n_heads * dims.index_head_dim,
    )


def forms(
    dims: Dims, tokens: int, anchors: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """What each form does in a step: from latents, queries and index to the output and all gradients."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    H, R, width = dims.num_attention_heads, dims.qk_rope_head_dim, dims.index_head_dim
    layer = Attention(dims).to(device, dtype).requires_grad_(False)
    layer.kv_b_proj.weight.requires_grad_()
    rows = torch.arange(tokens - anchors, tokens, device=device)
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    latent, k_pe = normal(tokens, dims.kv_lora_rank).requires_grad_(), normal(tokens, R).requires_grad_()
    q = normal(anchors, H, dims.qk_nope_head_dim + R).requires_grad_()
    heads = dims.index_n_heads
    index = Index(normal(anchors, heads, width), normal(tokens, width), normal(anchors, heads).float())
    weight = normal(anchors, H, dims.v_head_dim)
    inputs = (q, latent, k_pe, layer.kv_b_proj.weight)

    def chosen() -> Selection:
        selection = Selection(rows, bounds, index.k_TI, dims.index_topk)
        selection.step(index, own=False)
        return selection

    selection = chosen()

    def expanded(name: str, which: Selection | None) -> tuple[Tensor, ...]:
        k, v = layer.expand(latent, k_pe)
        out = attention_form(name, rows, bounds, k, v, dims.softmax_scale, which)(q, None)
        return out.detach(), *torch.autograd.grad(out, inputs, weight)

    def gathered() -> tuple[Tensor, ...]:
        out = gather_form(latent, k_pe, layer.up(latent), dims.softmax_scale, selection)(q, None)
        return out.detach(), *torch.autograd.grad(out, inputs, weight)

    def choice() -> tuple[Tensor, ...]:
        return tuple(c for c in chosen().chosen if c is not None)

    found = {"choice": choice, "gather": gathered}
    if device.type == "cuda":
        found |= {"dense": lambda: expanded("blocks", None), "blocks": lambda: expanded("blocks", selection)}
    if 4 * H * anchors * tokens <= MOST_SCORES:
        found["documents"] = lambda: expanded("documents", selection)
        found.setdefault("dense", lambda: expanded("documents", None))
    return found


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes above what was there before."""
    found = gate.peak_bytes(work, device)
    if found is not None:
        return found
    with LiveBytes() as live:
        work()
    return live.peak


def measure(
    dims: Dims, tokens: int, anchors: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds, peak bytes and arithmetic of each form."""
    work = forms(dims, tokens, anchors, dtype, device)
    if "documents" in work:
        for name in sorted(work.keys() & {"gather", "blocks"}):
            gate.require_equal(name, work[name](), work["documents"]())
    seconds = {name: [gate.seconds(run, device) for _ in range(rounds + 1)][1:] for name, run in work.items()}
    counted = flops(dims, tokens, anchors)
    by_form = {"choice": counted.index, "gather": counted.gather}
    return {
        name: {
            "seconds": statistics.median(taken),
            "peak_bytes": peak(work[name], device),
            "flops": by_form.get(name, counted.dense),
        }
        for name, taken in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    dims = REAL if gpu else SMALL
    console = Console()
    result: dict[str, Any] = {**gate.describe(device), "topk": dims.index_topk, "steps": []}
    table = Table("tokens", "anchors", "form", "seconds", "GFLOP", "GFLOP/s", "peak MiB")
    for tokens in args.lengths:
        for anchors in sorted({tokens, min(tokens, FEW)}, reverse=True):
            found = measure(dims, tokens, anchors, dtype, device, args.rounds)
            result["steps"].append({"tokens": tokens, "anchors": anchors, **found})
            for name, row in found.items():
                gflop = row["flops"] / 1e9
                cells = f"{row['seconds']:.3f}", f"{gflop:,.1f}", f"{gflop / row['seconds']:,.1f}"
                table.add_row(f"{tokens:,}", f"{anchors:,}", name, *cells, f"{row['peak_bytes'] / MIB:,.0f}")
    console.print(table)
    real = Table("tokens", "anchors", "dense TFLOP", "gather TFLOP", "index TFLOP", "k and v GiB", "bits MiB")
    real.title = "a step at the sizes of DeepSeek-V3.2, by arithmetic"
    expanded = REAL.num_attention_heads * (REAL.qk_nope_head_dim + REAL.qk_rope_head_dim + REAL.v_head_dim)
    for tokens in (8192, 16384, 32768, 65536):
        for anchors in (tokens, FEW):
            counts = [f"{x / 1e12:,.1f}" for x in flops(REAL, tokens, anchors)]
            memory = f"{2 * tokens * expanded / GIB:.1f}", f"{anchors * tokens / 8 / MIB:,.0f}"
            real.add_row(f"{tokens:,}", f"{anchors:,}", *counts, *memory)
    console.print(real)
    gate.finish(result)


if __name__ == "__main__":
    main()
