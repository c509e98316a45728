"""Registers, spills and shared memory of every kernel of the tile table, compiled without a GPU.

    python -m benchmarks.kernels_report [--jobs 2]

Compiles each launch of a forward and backward at the layer's real shape (hidden 7168, experts of 2048, 256 of
them, 8 a token, vocabulary 129280) for sm_90. The last line is a JSON
object.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from benchmarks.aot import Reading, compile_call, loss_calls, moe_calls
from train.kernels.launch import Call

D, F, E, K, V = 7168, 2048, 256, 8, 129280
TOKENS = {"short": 8192, "long": 32768}
"""Tokens that fall into each shape class of the table."""


def variant(call: Call) -> str:
    """Which of the forms of a kernel a launch takes; empty where there is one."""
    transposed = call.arguments.get("TRANSPOSED")
    return "" if transposed is None else "w2" if transposed else "w1 w3"


def calls() -> Iterator[tuple[str, Call]]:
    """Shape class and launch of every distinct kernel."""
    seen = set()
    for shape, tokens in TOKENS.items():
        for call in moe_calls(tokens, E, D, F, K):
            # the two gather_sums and the weight gradients of w1 and w3 are one kernel each
            key = (call.kernel.fn.__name__, call.tile, variant(call))
            if key not in seen:
                seen.add(key)
                yield shape, call
    for loss in ("kl", "ce", "lk_lambda"):
        for call in loss_calls(loss, 2048, D, V):
            yield loss, call


def read(index: int) -> Reading:
    """Compile one of `calls`; by its place, for a launch does not travel between processes."""
    return compile_call(list(calls())[index][1])


def report(jobs: int) -> list[dict]:
    """One row for each kernel."""
    names = [{"shape": shape, "variant": variant(call)} for shape, call in calls()]
    with ProcessPoolExecutor(jobs) as pool:
        readings = list(pool.map(read, range(len(names))))
    return [{**name, **reading._asdict()} for name, reading in zip(names, readings, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    rows = report(parser.parse_args().jobs)
    columns = (
        "shape", "kernel", "variant", "tile", "registers", "spilled", "shared", "operands", "mma", "tma",
        "async_copies",
    )  # fmt: skip
    table = [
        columns,
        *(tuple("x".join(map(str, r[c][:6])) if c == "tile" else str(r[c]) for c in columns) for r in rows),
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print(" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    print("tile: m x n x k x group x warps x stages; shared, operands, spilled in bytes")
    print(json.dumps({"kernels": rows}))


if __name__ == "__main__":
    main()
