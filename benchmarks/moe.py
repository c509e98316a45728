"""Speed of the routed experts, forward and backward, beside every peer that is installed.

    python -m benchmarks.moe [TOKENS,HIDDEN,INTERMEDIATE,EXPERTS,TOPK[,SKEW] ...] [--dtype bfloat16]

Without a problem: on a GPU the layer's own shapes (256 experts with 8,192 and 32,768 tokens, a slice of 32
experts with 65,536 rows, and 3,700 tokens, a micro-batch of anchors, with a skewed router); on CPU the tiny
model's and 64 experts with 512 tokens, in float32 and bfloat16. A skew is the standard deviation of the
experts' own scores, where that of a token's is 1; 0 spreads the rows evenly.

Contenders take turns, so that a busy machine slows all of them; figures are medians, ratios are medians of
the ratios within a round. Refuses to measure if the test or the comparison on this device fails. The last
line is a JSON object.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import gate
from train.kernels.moe import default_backend, moe
from train.kernels.moe_ref import moe_reference

Step = Callable[[], tuple[Tensor, ...]]


class Problem(NamedTuple):
    """Sizes of a problem."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    topk: int
    skew: float = 0.0


GPU = [
    Problem(8192, 7168, 2048, 256, 8),
    Problem(32768, 7168, 2048, 256, 8),
    Problem(65536, 7168, 2048, 32, 1),
    Problem(3700, 7168, 2048, 256, 8, 0.5),
]
CPU = [Problem(2048, 256, 128, 16, 4), Problem(512, 256, 128, 64, 8)]


def parse(text: str) -> Problem:
    """A problem of the command line. Raises ValueError if it is not five numbers or six."""
    T, D, F, E, K, *skew = text.split(",")
    return Problem(int(T), int(D), int(F), int(E), int(K), *map(float, skew))


def choices(problem: Problem, device: torch.device) -> Tensor:
    """Experts of each token, int64 [tokens, topk]; with a skew some experts are chosen more often."""
    torch.manual_seed(0)
    scores = torch.randn(problem.tokens, problem.experts, device=device)
    scores += problem.skew * torch.randn(problem.experts, device=device)
    return scores.topk(problem.topk, 1).indices


def tensors(problem: Problem, dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
    """Inputs of a problem, its rows spread over the experts as its skew says."""
    T, D, F, E, K, _ = problem
    ids = choices(problem, device)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=shape[-1] ** -0.5)

    return SimpleNamespace(
        x=normal(T, D).requires_grad_(),
        ids=ids,
        weights=torch.rand(T, K, device=device).requires_grad_(),
        w1=normal(E, F, D).requires_grad_(),
        w3=normal(E, F, D).requires_grad_(),
        w2=normal(E, D, F).requires_grad_(),
        dy=normal(T, D),
    )


def contenders(t: SimpleNamespace, device: torch.device) -> dict[str, Step]:
    """A forward and backward of each; returns y and the gradients of x, weights, w1, w3, w2."""
    inputs = (t.x, t.weights, t.w1, t.w3, t.w2)

    def step(function: Callable[..., Tensor], **options: Any) -> Step:
        def run() -> tuple[Tensor, ...]:
            y = function(t.x, t.ids, t.weights, t.w1, t.w3, t.w2, **options)
            return y.detach(), *torch.autograd.grad(y, inputs, t.dy)

        return run

    best = default_backend(t.x, t.w1)
    work = {"layer61": step(moe), "loop": step(moe_reference)}
    for backend in ("torch", "grouped_mm"):
        if backend != best:
            work[backend] = step(moe, backend=backend)

    # one stacked parameter for gate and up, as the peers hold it; built once, and only if there are any
    gate_up = t.w2
    if find_spec("transformers") or find_spec("liger_kernel"):
        gate_up = torch.cat((t.w1.detach(), t.w3.detach()), 1).requires_grad_()
    peer_inputs = (t.x, t.weights, gate_up, t.w2)

    def peer(function: Callable[[], Tensor]) -> Step:
        def run() -> tuple[Tensor, ...]:
            y = function()
            dx, dweights, dgate_up, dw2 = torch.autograd.grad(y, peer_inputs, t.dy)
            return y.detach(), dx, dweights, *dgate_up.chunk(2, 1), dw2

        return run

    try:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
    except ImportError:
        print("transformers is not installed; left out")
        implementations = []
    else:
        implementations = ["eager", "grouped_mm"]
    for implementation in implementations:
        E, F, D = t.w1.shape
        config = DeepseekV3Config(n_routed_experts=E, moe_intermediate_size=F, hidden_size=D)
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = DeepseekV3Experts(config)
        experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(t.w2)
        # plain tensors in place of the parameters, so that the gradients arrive where all others do
        del experts.gate_up_proj, experts.down_proj
        experts.gate_up_proj, experts.down_proj = gate_up, t.w2
        work[f"transformers {implementation}"] = peer(partial(experts, t.x, t.ids, t.weights))
    if device.type == "cuda":
        try:
            from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
        except ImportError:
            print("liger_kernel is not installed; left out")
        else:
            ids32 = t.ids.int()
            work["liger"] = peer(lambda: LigerFusedMoEFunction.apply(t.x, gate_up, t.w2, ids32, t.weights))
    return work


def check(problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
    """Every contender against the loop in the same dtype, with few tokens and few experts."""
    T, D, F, E, K, skew = problem
    small = tensors(Problem(min(T, 512), D, F, min(E, 16), min(K, 8), skew), dtype, device)
    work = contenders(small, device)
    expected = work["loop"]()
    for name, step in work.items():
        gate.require_equal(name, step(), expected)


def measure(
    problem: Problem, dtype: torch.dtype, device: torch.device, rounds: int, rate: float
) -> dict[str, dict[str, float | None]]:
    """One row a contender."""
    check(problem, dtype, device)
    T, D, F, _, K, _ = problem
    work: dict[str, Step] = contenders(tensors(problem, dtype, device), device)
    seconds = gate.in_turn(work, rounds, device)
    teraflop = 18 * T * K * D * F / 1e12
    rows: dict[str, dict[str, float | None]] = {}
    for name in seconds:
        took = statistics.median(seconds[name])
        peak = gate.peak_bytes(work[name], device)
        rows[name] = {
            "ms": round(took * 1e3, 3),
            "tflops": round(teraflop / took, 4),
            "share_of_matrix_rate": round(teraflop / took / rate, 4),
            "peak_gib": None if peak is None else round(peak / 2**30, 2),
            "times_layer61": round(gate.ratio(seconds[name], seconds["layer61"]), 3),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "problems", nargs="*", type=parse, help="TOKENS,HIDDEN,INTERMEDIATE,EXPERTS,TOPK[,SKEW]"
    )
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gate.require_green("test_moe.py")
    problems = arguments.problems or (GPU if device.type == "cuda" else CPU)
    dtypes = arguments.dtype or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
    result: dict[str, object] = gate.describe(device) | {"rounds": arguments.rounds}
    measured = []
    for name in dtypes:
        dtype = getattr(torch, name)
        rate = gate.matrix_rate(device, dtype)
        for problem in problems:
            rows = measure(problem, dtype, device, arguments.rounds, rate)
            T, D, F, E, K, skew = problem
            title = (
                f"{name}: {T} tokens, {D} x {F}, {E} experts, top {K}, skew {skew};"
                f" a large product: {rate:.3g} TFLOP/s"
            )
            table = Table("", "ms", "TFLOP/s", "share", "peak GiB", "time / layer61's", title=title)
            for who, row in rows.items():
                table.add_row(who, *("-" if v is None else f"{v:,}" for v in row.values()))
            Console().print(table)
            measured.append({"dtype": name, "problem": problem, "matrix_tflops": round(rate, 3), **rows})
    gate.finish(result | {"moe": measured})


if __name__ == "__main__":
    main()
