"""Measure tiles on a GPU of sm_90 and rewrite the entries of `train/kernels/tiles.py`.

    python -m benchmarks.tune [--kernel up_fwd ...] [--candidates]

Each kernel is timed alone, at the layer's real shape and on random values, with every candidate tile that
compiles without a spilled register and keeps its pipeline within the shared memory. The fastest goes into the
table if it beats the committed one by 1 %. `--candidates` only compiles and lists what would be
timed; it needs no GPU.
"""

import argparse
import functools
import itertools
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton.testing

from benchmarks import gate
from benchmarks.aot import SHARED_LIMIT, compile_call, loss_calls, moe_calls, operand_bytes
from train.kernels import moe_triton, tiles
from train.kernels.launch import Call, record, run, tile_for, use_tiles
from train.kernels.loss_triton import loss_rows
from train.kernels.routing import route
from train.kernels.tiles import Tile

D, F, E, K, V = 7168, 2048, 256, 8, 129280
TOKENS = {"short": 8192, "long": 32768}
PRODUCTS = ("up_fwd", "down_fwd", "down_bwd", "up_bwd", "weight_grad")
Table = dict[tuple[str, str], dict[str, Tile]]


def candidates(kernel: str) -> Iterator[Tile]:
    """Tiles worth compiling for a kernel."""
    if kernel in ("gather_sum", "loss_rows"):
        for n, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
            yield Tile(1, n, 1, 1, warps, 1)
        return
    sizes = itertools.product((64, 128, 256), (64, 128, 256), (32, 64), (4, 8, 16), (4, 8), (3, 4, 5))
    for m, n, k, group, warps, stages in sizes:
        if m * n > 128 * 256 or m * n < 64 * 128:
            continue
        if kernel == "up_fwd" and m * n > 128 * 128:
            continue  # it has two accumulators
        yield Tile(m, n, k, group, warps, stages, 16 if kernel == "down_bwd" else 0)


def kernel_name(call: Call) -> str:
    return call.kernel.fn.__name__.strip("_").removesuffix("_kernel")


@functools.cache
def sound(kernel: str, tile: Tile, tokens: int) -> bool:
    """Whether the compiler does with a tile what the table demands of all."""
    with use_tiles(**{kernel: tile}):
        if kernel == "loss_rows":
            calls = loss_calls("lk_lambda", 2048, D, V)
        else:
            calls = moe_calls(tokens, E, D, F, K)
    call = next(c for c in calls if kernel_name(c) == kernel)
    if tile.stages * operand_bytes(call) > SHARED_LIMIT:
        return False
    try:
        reading = compile_call(call)
    except Exception as error:  # the compiler refuses a tile in many ways; any of them rules it out
        print(f"  {tuple(tile)} does not compile: {str(error).splitlines()[0][:80]}")
        return False
    whole = reading.shared >= tile.stages * reading.operands
    return not reading.spilled and whole and reading.shared <= SHARED_LIMIT


class Problem:
    """A forward and backward on the GPU whose launches can be recorded with any tile."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=shape[-1] ** -0.5)

        self.x, self.dy = normal(tokens, D), normal(tokens, D)
        self.w1, self.w3, self.w2 = normal(E, F, D), normal(E, F, D), normal(E, D, F)
        self.weights = torch.rand(tokens, K, device=device)
        self.routing = route(torch.rand(tokens, E, device=device).topk(K, 1).indices, E)

    def call(self, kernel: str, tile: Tile) -> Call:
        """The launch of a kernel, its inputs filled with random values: the clock depends on them."""
        weights = (self.w1, self.w3, self.w2)
        with record() as calls, use_tiles(**{kernel: tile}):
            _, g, u = moe_triton.forward(self.x, self.weights, *weights, self.routing)
            *_, dg, _, _ = moe_triton.backward(
                self.dy, self.x, self.weights, *weights, g, u, self.routing, need_x=True, need_weights=True
            )
            moe_triton.weight_grad(dg, self.x, self.routing, transposed=False)
        call = next(c for c in calls if kernel_name(c) == kernel)
        for argument in call.arguments.values():
            tensor = getattr(argument, "base", argument)
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.dtype == torch.bfloat16:
                tensor.normal_(std=0.05)
        return call


def loss_call(tile: Tile, device: torch.device) -> Call:
    """The launch of the loss on one chunk of random logits."""
    s, t = (torch.randn(2048, V, device=device).bfloat16() for _ in range(2))
    ones = torch.ones(2048, device=device)
    agree = torch.empty(2048, dtype=torch.bool, device=device)
    with record() as calls, use_tiles(loss_rows=tile):
        loss_rows(s, t, "lk_lambda", ones, None, 1.0, ones.clone(), agree, ones.clone(), True)
    return calls[0]


def render(table: Table) -> str:
    """The table as it stands in tiles.py."""
    lines = ["TABLE: dict[tuple[str, str], dict[str, Tile]] = {"]
    for key, entries in table.items():
        lines.append("    (" + ", ".join(f'"{part}"' for part in key) + "): {")
        for kernel, tile in entries.items():
            values = list(tile)
            # defaults are left out
            while (
                values
                and len(values) > 6
                and values[-1] == Tile._field_defaults[Tile._fields[len(values) - 1]]
            ):
                values.pop()
            lines.append(f'        "{kernel}": Tile({", ".join(map(str, values))}),')
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def write(table: Table) -> None:
    """Replace the table in tiles.py, everything above it kept."""
    path = Path(tiles.__file__)
    text = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(r"^TABLE: .*\Z", lambda _: render(table), text, flags=re.M | re.S), encoding="utf-8"
    )


def milliseconds(kernel: str, tile: Tile, problem: Problem, device: torch.device) -> float:
    """Median time of a kernel alone with a tile, on the GPU."""
    call = loss_call(tile, device) if kernel == "loss_rows" else problem.call(kernel, tile)
    return statistics.median(
        triton.testing.do_bench(lambda: run(call), warmup=20, rep=100, return_mode="all")
    )


def tune(kernels: list[str], device: torch.device) -> Table:
    """The table measured anew."""
    table = {key: dict(entries) for key, entries in tiles.TABLE.items()}
    for shape, tokens in TOKENS.items():
        problem = Problem(tokens, device)
        for kernel in kernels:
            if kernel not in PRODUCTS and shape == "long":
                continue
            committed = tile_for(kernel, tokens * K / E)
            times: dict[Tile, float] = {}
            for tile in dict.fromkeys((committed, *candidates(kernel))):
                # the order of the programs changes nothing in their code
                if not sound(kernel, tile._replace(group=1), tokens):
                    continue
                times[tile] = milliseconds(kernel, tile, problem, device)
            best = min(times, key=times.__getitem__)
            if times[best] > 0.99 * times.get(committed, float("inf")):
                best = committed
            print(f"{shape} {kernel}: {times.get(committed)} -> {times[best]} ms with {tuple(best)}")
            table["sm90", shape if kernel in PRODUCTS else "any"][kernel] = best
        del problem
        torch.cuda.empty_cache()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    every = [*PRODUCTS, "gather_sum", "loss_rows"]
    parser.add_argument("--kernel", nargs="+", choices=every, default=every)
    parser.add_argument("--candidates", action="store_true", help="list the candidates that compile soundly")
    arguments = parser.parse_args()
    if arguments.candidates:
        for kernel in arguments.kernel:
            for tile in candidates(kernel):
                if sound(kernel, tile._replace(group=1), TOKENS["short"]):
                    print(kernel, tuple(tile), flush=True)
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        sys.exit("no GPU of compute capability 9.0: tiles can only be measured on what they are for")
    gate.require_green("test_moe.py")
    write(tune(arguments.kernel, torch.device("cuda")))
    print(f"rewrote {tiles.__file__}; run `make kernels-report test` before committing it")


if __name__ == "__main__":
    main()
