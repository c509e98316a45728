"""Speed of a training checkpoint beside the disk's own: `python -m benchmarks.checkpoint [--quick]`.

A layer of 300 million parameters (64 experts, made-up values) is saved by two ranks and loaded by three. In
the same round as many processes write the same number of bytes in one file each, with fsync, and read the
checkpoint's files with nothing done to them. Reading is cold: the page cache is told to forget the files
first. What the ranks send each other once the bytes are there, as after every step, is timed apart. Ratios
are medians over rounds.

Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.train import CONFIG
from configs.files import BLOCK, block_buffer
from configs.provenance import versions
from configs.schema import TrainConfig
from export.keymap import keymap
from train import checkpoint, zero
from train.dims import Dims
from train.mtp import MTPLayer

WRITERS, READERS = 2, 3
GOAL = 0.7


def sizes(quick: bool) -> dict[str, Any]:
    """config.json of a layer of about 300 million parameters, or 7 million."""
    hidden, width, experts = (256, 128, 64) if quick else (1024, 1408, 64)
    return CONFIG | {"hidden_size": hidden, "moe_intermediate_size": width, "n_routed_experts": experts}


class Held(nn.Module):
    """What DeepSpeed wraps; it never runs."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.layer = MTPLayer(Dims.from_config(config))


def build(config: dict[str, Any], fill: bool) -> Any:
    """An engine over the layer, its state made up."""
    settings = TrainConfig(freeze=())
    ds_config = zero.deepspeed_config(settings, num_parameters=1_000_000)
    with zero.deepspeed.zero.Init(config_dict_or_path=ds_config):
        module = Held(config)
    engine = zero.initialize(module, settings, ds_config)
    for part in zero.partitions(engine):
        for tensor in part.state.values():
            tensor.normal_() if fill else tensor.zero_()
    zero.take_over(engine, 100)
    return engine


def timed(act: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    began = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - began


def peak() -> int:
    """Most bytes this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(path: Path, rounds: list[dict[str, float]], grown: int) -> None:
    """Leave rank 0's times and the most that any rank grew by."""
    most = zero.reduce(torch.tensor([grown]), dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        path.write_text(json.dumps({"rounds": rounds, "grown": int(most)}))


def write(rank: int, world: int, port: int, folder: Path, config: dict[str, Any], rounds: int) -> None:
    """Save, and write as many bytes plainly."""
    join(rank, world, port)
    engine, ops, run = build(config, fill=True), keymap(config), folder / "run"
    meta = {"contract": {}, "loader": {}, "metrics": {}}
    data = torch.randint(256, (BLOCK,), dtype=torch.uint8).numpy().data
    found = []
    before = peak()
    for step in range(1, rounds + 1):
        ours = timed(lambda step=step: checkpoint.save(engine, ops, run, step, meta, keep=1))
        saved = run / "checkpoints" / f"step_{step:06d}"
        share = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()) // world

        def plain(share: int = share) -> None:
            with open(folder / f"plain.{rank}", "wb", buffering=0) as f:
                for start in range(0, share, BLOCK):
                    f.write(data[: share - start])
                os.fsync(f.fileno())

        raw = timed(plain)
        os.unlink(folder / f"plain.{rank}")
        found.append({"ours": ours, "raw": raw, "bytes": share * world})
    report(folder / "write.json", found, peak() - before)


def read(rank: int, world: int, port: int, folder: Path, config: dict[str, Any], rounds: int) -> None:
    """Load with another number of ranks, and read the files plainly."""
    join(rank, world, port)
    engine, run = build(config, fill=False), folder / "run"
    saved = checkpoint.newest(run)
    assert saved is not None
    files = [p for p in sorted(saved.path.rglob("*")) if p.is_file()]
    blocks = [(p, at) for p in files for at in range(0, p.stat().st_size, BLOCK)]
    mine = blocks[len(blocks) * rank // world : len(blocks) * (rank + 1) // world]

    def forget() -> None:
        if rank == 0:
            for path in files:
                with open(path, "rb") as f:
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()

    def plain() -> None:
        buffer = block_buffer()
        for path in dict.fromkeys(p for p, _ in mine):
            with open(path, "rb", buffering=0) as f:
                for at in (at for p, at in mine if p == path):
                    f.seek(at)
                    f.readinto(buffer)

    found = []
    before = peak()
    for _ in range(rounds):
        forget()
        loaded = timed(lambda: checkpoint.load(engine, saved))
        # at its end the ranks exchange the parameters, as after every step; nothing of that is reading
        exchange = timed(lambda: zero.take_over(engine, 100))
        forget()
        size = sum(p.stat().st_size for p in files)
        found.append({"ours": loaded - exchange, "raw": timed(plain), "exchange": exchange, "bytes": size})
    report(folder / "read.json", found, peak() - before)


def join(rank: int, world: int, port: int) -> None:
    """Enter the process group of this phase."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    zero.init_distributed()


def run(phase: Callable[..., None], world: int, *arguments: Any) -> None:
    """Start ranks of a phase and wait for them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(phase, (world, port, *arguments), nprocs=world, start_method="fork")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="7 million parameters: shows that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs"), help="where on the disk; removed afterwards"
    )
    arguments = parser.parse_args()
    config = sizes(arguments.quick)
    ops = keymap(config)
    numels = [torch.Size(op.shape).numel() for op in ops]
    arguments.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=arguments.dir))
    try:
        run(write, WRITERS, folder, config, arguments.rounds)
        run(read, READERS, folder, config, arguments.rounds)
        found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("write", "read")}
    finally:
        shutil.rmtree(folder)
    result: dict[str, Any] = {"parameters": sum(numels), "writers": WRITERS, "readers": READERS, "goal": GOAL}
    for name, phase in found.items():
        rounds = phase["rounds"]
        result[f"{name}_vs_raw"] = round(statistics.median(r["raw"] / r["ours"] for r in rounds), 2)
        for who in ("ours", "raw"):
            rates = [r["bytes"] / r[who] / 1e9 for r in rounds]
            result[f"{name}_{who}_gb_s"] = round(statistics.median(rates), 2)
        if "exchange" in rounds[0]:
            result["exchange_s"] = round(statistics.median(r["exchange"] for r in rounds), 2)
        # a parameter's float32 master is the largest thing a rank could hold beside its own state
        result[f"{name}_extra_parameters"] = round(phase["grown"] / (4 * max(numels)), 2)
    result["bytes"] = found["write"]["rounds"][0]["bytes"]
    for name in found:
        ours, raw, ratio, extra = (
            result[f"{name}_{key}"] for key in ("ours_gb_s", "raw_gb_s", "vs_raw", "extra_parameters")
        )
        print(
            f"{name:6}{ours:6.2f} GB/s, the disk {raw:6.2f} GB/s, ratio {ratio:.2f} (goal {GOAL}),"
            f" grew by {extra:.2f} of the largest parameter"
        )
    print(json.dumps(result | {"versions": versions()}))


if __name__ == "__main__":
    main()
