"""Speed and memory of the vocabulary loss, forward and backward.

    python -m benchmarks.head_loss [TOKENS,HIDDEN,VOCABULARY ...] [--loss kl ...] [--dtype bfloat16]

Beside it: its bare matrix products (two for the logits, one for the gradient) in the same chunks, whose share
of the time is the measure of everything else, and the plain form that holds all logits, where they fit. The
last line is a JSON object. Refuses to measure if the test or the comparison on this device fails.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import gate
from train.kernels.loss_ref import head_loss_reference
from train.loss import Loss, default_chunk, head_loss

Problem = tuple[int, int, int]
GPU: list[Problem] = [(8192, 7168, 129280), (32768, 7168, 129280), (3700, 7168, 129280)]
CPU: list[Problem] = [(2048, 256, 4096)]


def parse(text: str) -> Problem:
    """A problem of the command line. Raises ValueError if it is not three numbers."""
    T, D, V = map(int, text.split(","))
    return T, D, V


def contenders(
    problem: Problem, loss: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The loss, its matrix products alone, and the plain form if its logits take less than 40 GiB."""
    T, D, V = problem
    torch.manual_seed(0)
    student = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    teacher = (student.detach() + 0.5 * torch.randn(T, D, device=device)).to(dtype)
    head = (torch.randn(V, D, device=device) * 2 * D**-0.5).to(dtype)
    targets = torch.randint(V, (T,), device=device)
    weights = torch.rand(T, device=device)
    chunk = default_chunk(V, device)

    def ours() -> tuple[Tensor, ...]:
        result = head_loss(student, teacher, head, loss, weights, targets)
        return result.loss.detach(), result.overlap, torch.autograd.grad(result.loss, student)[0]

    def plain() -> tuple[Tensor, ...]:
        total, _, overlap, _ = head_loss_reference(student, teacher, head, loss, weights, targets)
        return total.detach(), overlap, torch.autograd.grad(total, student)[0]

    s, t = (
        torch.empty(chunk, V, dtype=dtype, device=device),
        torch.empty(chunk, V, dtype=dtype, device=device),
    )
    gradient = torch.empty_like(teacher)

    def products() -> None:
        with torch.no_grad():
            for a in range(0, T, chunk):
                n = min(chunk, T - a)
                torch.mm(student[a : a + n], head.t(), out=s[:n])
                torch.mm(teacher[a : a + n], head.t(), out=t[:n])
                torch.mm(s[:n], head, out=gradient[a : a + n])

    work: dict[str, Callable[[], object]] = {"layer61": ours, "its matrix products": products}
    if T * V * 4 * 6 < 40 << 30:
        work["all logits at once"] = plain
    return work


def measure(
    problem: Problem, loss: str, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, dict[str, float | None]]:
    """One row a contender."""
    small = contenders((min(problem[0], 512), *problem[1:]), loss, dtype, device)
    gate.require_equal("layer61", small["layer61"](), small["all logits at once"]())  # type: ignore[arg-type]
    del small
    work = contenders(problem, loss, dtype, device)
    seconds = gate.in_turn(work, rounds, device)
    T, D, V = problem
    rows: dict[str, dict[str, float | None]] = {}
    for name in seconds:
        took = statistics.median(seconds[name])
        peak = gate.peak_bytes(work[name], device)
        rows[name] = {
            "ms": round(took * 1e3, 3),
            "tflops": round(6 * T * D * V / took / 1e12, 4),
            "peak_gib": None if peak is None else round(peak / 2**30, 2),
            "times_layer61": round(gate.ratio(seconds[name], seconds["layer61"]), 3),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("problems", nargs="*", type=parse, help="TOKENS,HIDDEN,VOCABULARY")
    parser.add_argument("--loss", nargs="+", choices=get_args(Loss), default=["kl", "lk_lambda"])
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gate.require_green("test_head_loss.py")
    problems = arguments.problems or (GPU if device.type == "cuda" else CPU)
    dtypes = arguments.dtype or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
    measured = []
    for name in dtypes:
        for problem in problems:
            for loss in arguments.loss:
                rows = measure(problem, loss, getattr(torch, name), device, arguments.rounds)
                T, D, V = problem
                title = f"{name} {loss}: {T} tokens, hidden {D}, vocabulary {V}"
                table = Table("", "ms", "TFLOP/s", "peak GiB", "time / layer61's", title=title)
                for who, row in rows.items():
                    table.add_row(who, *("-" if v is None else f"{v:,}" for v in row.values()))
                Console().print(table)
                measured.append({"dtype": name, "problem": problem, "loss": loss, **rows})
    gate.finish(gate.describe(device) | {"rounds": arguments.rounds, "head_loss": measured})


if __name__ == "__main__":
    main()
