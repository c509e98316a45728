"""Speed of the feature store beside what it replaces, on one disk: `python -m benchmarks.store [--quick]`.

Documents of 200 to 4,000 tokens of 7,168 bf16 values, read in random order into one reused packed buffer. All
contenders run in this process, in rounds of random order; a figure is the median over the rounds of the ratio
within a round. Bits are compared before anything is timed. Reads called warm are of pages that came from the
disk, read once by the contender itself, as in a second epoch; pages left in the cache by a fresh write are
larger and favour memory maps. Loader passes are of pages as the writer left them.

Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import zarr
from rich.console import Console
from rich.table import Table

import featurestore.dtype  # noqa: F401  registers bfloat16 with zarr
from featurestore import FeatureStore, Loader, StoreWriter, open_store, publish
from featurestore.order import epoch_order, plan

WIDTH = 7168
BUFFER_TOKENS = 16_384
GOALS = {
    "read_vs_memmap_warm": (">=", 0.8),
    "read_vs_memmap_cold": (">=", 1.0),
    "read_vs_torch_load": (">=", 1.5),
    "read_vs_zarr": (">=", 3.0),
    "loader_2_threads": (">=", 1.3),
    "state_of_4_vs_only_state": (">=", 0.8),
    "packing_fill": (">=", 0.95),
    "plan_ms_64_ranks": ("<", 20.0),
    "order_s_5m": ("<", 5.0),
    "write_vs_raw": (">=", 0.6),
    "write_vs_torch_save": (">=", 1.3),
    "durable_write_4_threads_vs_raw": (">=", 0.85),
    "loader_cpu_s_per_gb": ("<=", 0.16),
}

Contender = Callable[[Sequence[int]], None]


def draw_lengths(count: int, seed: int) -> np.ndarray:
    """Tokens of chat documents: log-normal, mean about 1,100, 200 to 4,000."""
    return np.clip(np.random.default_rng(seed).lognormal(6.75, 0.75, count), 200, 4000).astype(np.int64)


class Data:
    """The documents in memory, and on disk in every form that is compared."""

    def __init__(self, root: Path, tokens: int) -> None:
        self.root = root
        lengths = draw_lengths(1000, 1)
        self.lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
        self.count, self.tokens = len(self.lengths), int(self.lengths.sum())
        self.gb = self.tokens * WIDTH * 2 / 1e9
        generator = torch.Generator().manual_seed(0)
        self.hidden = [
            torch.empty(n, 1, WIDTH, dtype=torch.bfloat16).normal_(generator=generator)
            for n in self.lengths.tolist()
        ]
        self.ids = [torch.randint(0, 129_280, (n,), generator=generator) for n in self.lengths.tolist()]
        self.mask = [ids % 3 > 0 for ids in self.ids]
        self.offset = np.concatenate([[0], np.cumsum(self.lengths)])
        self.raw, self.files, self.store = root / "raw.bin", root / "files", root / "store"

    def write_raw(self, path: Path, fsync: bool) -> None:
        with open(path, "wb", buffering=0) as f:
            for hidden in self.hidden:
                view = hidden.view(torch.uint8).numpy().reshape(-1).data
                while len(view):
                    view = view[f.write(view) :]
            if fsync:
                os.fsync(f.fileno())

    def write_files(self, root: Path, fsync: bool) -> None:
        root.mkdir(parents=True)
        for i in range(self.count):
            document = {"input_ids": self.ids[i], "loss_mask": self.mask[i], "hidden": self.hidden[i]}
            with open(root / f"{i}.pt", "wb") as f:
                torch.save(document, f)
                if fsync:
                    f.flush()
                    os.fsync(f.fileno())

    def write_store(self, root: Path, fsync: bool, writers: int = 1) -> None:
        def write(number: int) -> None:
            with StoreWriter(root, {"format": 1}, writer=f"w{number}", run="bench", durable=fsync) as writer:
                for i in range(number, self.count, writers):
                    writer.append(i, self.ids[i], self.mask[i], self.hidden[i])

        if writers == 1:
            write(0)
        else:
            with ThreadPoolExecutor(writers) as pool:
                list(pool.map(write, range(writers)))


class Readers:
    """Every contender reads documents, in a given order, one after the other into the same packed buffer."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.hidden = torch.zeros(BUFFER_TOKENS, 1, WIDTH, dtype=torch.bfloat16)
        self.bits = self.hidden.view(torch.uint16).numpy()
        self.ids = np.zeros(BUFFER_TOKENS, np.uint32)
        self.mask = np.zeros(BUFFER_TOKENS, np.uint8)
        self.seen: Callable[[int, int, int], None] | None = None  # document, first row, last row

    def _rows(self, order: Sequence[int]):  # type: ignore[no-untyped-def]
        row = 0
        for i in order:
            n = int(self.data.lengths[i])
            row = 0 if row + n > BUFFER_TOKENS else row
            yield i, row, row + n
            if self.seen:
                self.seen(i, row, row + n)
            row += n

    def memmap(self, order: Sequence[int]) -> None:
        source = np.memmap(self.data.raw, np.uint16, mode="r").reshape(-1, 1, WIDTH)
        for i, a, b in self._rows(order):
            np.copyto(self.bits[a:b], source[self.data.offset[i] : self.data.offset[i + 1]])

    def torch_load(self, order: Sequence[int]) -> None:
        for i, a, b in self._rows(order):
            document = torch.load(self.data.files / f"{i}.pt", weights_only=True)
            self.hidden[a:b] = document["hidden"]

    def zarr_python(self, order: Sequence[int]) -> None:
        (part,) = (self.data.store / "parts").iterdir()
        source = zarr.open_array(part / "hidden", mode="r")
        for i, a, b in self._rows(order):
            self.bits[a:b] = source[int(self.data.offset[i]) : int(self.data.offset[i + 1])]

    def ours(self, order: Sequence[int]) -> None:
        store = open_store(self.data.store)
        for i, a, b in self._rows(order):
            store.read_into(i, 0, b - a, self.ids[a:b], self.mask[a:b], self.bits[a:b])

    def check(self, contender: Contender) -> None:
        """Assert that a contender delivers every bit."""
        checked = set()

        def compare(i: int, a: int, b: int) -> None:
            expected = self.data.hidden[i].view(torch.uint16).numpy()
            if not np.array_equal(self.bits[a:b], expected):
                raise AssertionError(f"{contender.__name__}: document {i} differs")
            if contender == self.ours and not (
                np.array_equal(self.ids[a:b], self.data.ids[i].numpy())
                and np.array_equal(self.mask[a:b].view(bool), self.data.mask[i].numpy())
            ):
                raise AssertionError(f"document {i}: ids or mask differ")
            checked.add(i)

        self.bits[:] = 0
        self.seen = compare
        contender(np.random.default_rng(7).permutation(self.data.count).tolist())
        self.seen = None
        assert len(checked) == self.data.count


def drop_cache(path: Path) -> None:
    """Take a file, or all files below a directory, out of the page cache."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Rounds:
    """Seconds and processor seconds of contenders in interleaved rounds.

    Args:
        limit_s: begin no further round after so many seconds, but never fewer than three rounds.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.seconds: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def run(
        self,
        rounds: int,
        contenders: dict[str, Callable[[int], None]],
        before: Callable[[str], None] | None = None,
        after: Callable[[str], None] | None = None,
    ) -> None:
        started = time.perf_counter()
        for round_ in range(rounds):
            if round_ >= 3 and time.perf_counter() - started > self.limit_s:
                break
            for name in np.random.default_rng(round_).permutation(list(contenders)).tolist():
                if before:
                    before(name)
                wall, cpu = time.perf_counter(), time.process_time()
                contenders[name](round_)
                self.seconds.setdefault(name, []).append(time.perf_counter() - wall)
                self.cpu.setdefault(name, []).append(time.process_time() - cpu)
                if after:
                    after(name)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """How many times faster `name` is than `other`: the median of the rounds."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)


def bench_reads(data: Data, rounds: int, table: Table) -> dict[str, float]:
    readers = Readers(data)
    contenders: dict[str, Contender] = {
        "np.memmap copy": readers.memmap,
        "torch.load a file": readers.torch_load,
        "zarr-python": readers.zarr_python,
        "store, verified": readers.ours,
    }
    places = {
        "np.memmap copy": data.raw,
        "torch.load a file": data.files,
        "zarr-python": data.store,
        "store, verified": data.store,
    }
    for contender in contenders.values():
        readers.check(contender)
    orders = [np.random.default_rng(r).permutation(data.count).tolist() for r in range(rounds + 8)]

    def timed(contender: Contender) -> Callable[[int], None]:
        return lambda round_: contender(orders[round_])

    cold = Rounds(rounds)
    timed_all = {name: timed(contender) for name, contender in contenders.items()}
    some = {name: timed_all[name] for name in ("np.memmap copy", "torch.load a file", "store, verified")}
    cold.run(max(3, rounds // 2), some, before=lambda name: drop_cache(places[name]))
    for name in ("np.memmap copy", "torch.load a file", "store, verified"):
        drop_cache(places[name])
        contenders[name](orders[-1])  # back into the cache, each in its own way
    warm = Rounds(rounds)
    warm.run(rounds, timed_all)
    for label, result in (("warm", warm), ("cold", cold)):
        for name in result.seconds:
            table.add_row(
                f"read {label}: {name}",
                f"{data.gb / result.median(name):.2f}",
                f"{statistics.median(result.cpu[name]) / data.gb:.3f}",
                f"{result.ratio(name, 'np.memmap copy'):.2f} x memmap",
            )
    return {
        "read_vs_memmap_warm": warm.ratio("store, verified", "np.memmap copy"),
        "read_vs_memmap_cold": cold.ratio("store, verified", "np.memmap copy"),
        "read_vs_torch_load": warm.ratio("store, verified", "torch.load a file"),
        "read_vs_zarr": warm.ratio("store, verified", "zarr-python"),
        "read_vs_torch_load_cold": cold.ratio("store, verified", "torch.load a file"),
    }


def bench_loader(data: Data, rounds: int, table: Table) -> dict[str, float]:
    """Whole passes from an empty pipeline to its end, so that nothing is read outside the measured time.

    Runs before anything is dropped from the page cache: on the pages as the writer left them.
    """
    store = open_store(data.store)
    passes = max(2, round(4.0 / data.gb))  # long enough that filling and draining count for little
    loaders = {
        f"loader, {n} thread": Loader(store, 8192, threads=n, split="all", epochs=passes) for n in (1, 2)
    }

    def run(name: str) -> Callable[[int], None]:
        def run(_: int) -> None:
            loader, tokens = loaders[name], 0
            loader.load_state_dict({**loader.state_dict(), "epoch": 0, "consumed": 0})
            for batch in loader:
                tokens += len(batch.input_ids)
            assert tokens == passes * data.tokens

        return run

    for name in loaders:
        run(name)(0)  # allocates the buffers
    result = Rounds(rounds)
    result.run(rounds, {name: run(name) for name in loaders})
    gb = passes * data.gb
    cpu = {name: statistics.median(result.cpu[name]) / gb for name in loaders}
    for name, loader in loaders.items():
        table.add_row(name, f"{gb / result.median(name):.2f}", f"{cpu[name]:.3f}", "")
        loader.close()
    return {
        "loader_2_threads": result.ratio("loader, 2 thread", "loader, 1 thread"),
        "loader_cpu_s_per_gb": cpu["loader, 2 thread"],
    }


def bench_states(data: Data, rounds: int, table: Table) -> dict[str, float]:
    """The last of four stored states beside a store of that state alone: useful bytes a second."""
    root, count = data.root / "four", data.count // 2
    with StoreWriter(root, {"format": 1}, run="bench", durable=False) as writer:
        for i in range(count):
            # the others hold something else, so that a wrong column shows
            others = data.hidden[i].roll(1, 2).expand(-1, 3, -1)
            writer.append(i, data.ids[i], data.mask[i], torch.cat([others, data.hidden[i]], 1))
    publish(root)
    four, one = open_store(root), open_store(data.store)
    for i in range(count):
        assert torch.equal(four.read(i, states=[3]).hidden, data.hidden[i])
    readers = Readers(data)

    def run(store: FeatureStore, states: list[int]) -> Callable[[int], None]:
        def run(round_: int) -> None:
            for i, a, b in readers._rows(np.random.default_rng(round_).permutation(count).tolist()):
                store.read_into(i, 0, b - a, readers.ids[a:b], readers.mask[a:b], readers.bits[a:b], states)

        return run

    contenders = {"state 3 of 4": run(four, [3]), "the only state": run(one, [0])}
    for contender in contenders.values():
        contender(0)
    result = Rounds(rounds)
    result.run(rounds, contenders)
    gb = int(data.lengths[:count].sum()) * WIDTH * 2 / 1e9
    for name in contenders:
        cpu = statistics.median(result.cpu[name]) / gb
        table.add_row(f"read warm: {name}", f"{gb / result.median(name):.2f}", f"{cpu:.3f}", "")
    remove(root)
    return {"state_of_4_vs_only_state": result.ratio("state 3 of 4", "the only state")}


def bench_plan(table: Table) -> dict[str, float]:
    lengths = draw_lengths(20_000, 3)
    uid = np.random.default_rng(4).integers(0, 2**63, len(lengths), dtype=np.uint64)
    steps = list(plan(uid, lengths, tokens_per_rank=8192, world_size=8, seed=0, epochs=1))[:-1]
    fill = sum(int(lengths[b].sum()) for s in steps for b in s.bins) / (len(steps) * 8 * 8192)
    lengths, spent = draw_lengths(200_000, 5), []
    uid = np.random.default_rng(6).integers(0, 2**63, len(lengths), dtype=np.uint64)
    many = plan(uid, lengths, tokens_per_rank=BUFFER_TOKENS, world_size=64, seed=0)
    next(many)  # orders the epoch
    for _ in range(60):
        start = time.perf_counter()
        next(many)
        spent.append((time.perf_counter() - start) * 1e3)
    uid = np.random.default_rng(8).integers(0, 2**63, 5_000_000, dtype=np.uint64)
    start = time.perf_counter()
    epoch_order(uid, 0, 0)
    order = time.perf_counter() - start
    table.add_row("packing, 8 ranks x 8,192: fill", f"{fill:.3f}", "", "")
    table.add_row(
        "planning a step of 64 ranks, ms", f"{statistics.median(spent):.2f}", "", f"max {max(spent):.2f}"
    )
    table.add_row("order of 5 million documents, s", f"{order:.2f}", "", "")
    return {"packing_fill": fill, "plan_ms_64_ranks": statistics.median(spent), "order_s_5m": order}


def bench_writes(data: Data, rounds: int, table: Table) -> dict[str, float]:
    out = data.root / "out"
    values: dict[str, float] = {}
    for label, fsync in (("", False), (", fsync", True)):
        contenders: dict[str, Callable[[int], None]] = {
            "raw write": lambda _, f=fsync: data.write_raw(out, f),  # type: ignore[misc]
            "torch.save a file": lambda _, f=fsync: data.write_files(out, f),  # type: ignore[misc]
            "store, 1 thread": lambda _, f=fsync: data.write_store(out, f),  # type: ignore[misc]
        }
        if fsync:
            contenders["store, 4 threads"] = lambda _: data.write_store(out, True, writers=4)
        result = Rounds(rounds)
        # what others left to be written is out of the way first
        result.run(rounds, contenders, before=lambda _: os.sync(), after=lambda _: remove(out))
        for name in contenders:
            table.add_row(
                f"write{label}: {name}",
                f"{data.gb / result.median(name):.2f}",
                f"{statistics.median(result.cpu[name]) / data.gb:.3f}",
                f"{result.ratio(name, 'raw write'):.2f} x raw",
            )
        key = "_fsync" if fsync else "_cached"
        values[f"write_vs_raw{key}"] = result.ratio("store, 1 thread", "raw write")
        values[f"write_vs_torch_save{key}"] = result.ratio("store, 1 thread", "torch.save a file")
        if fsync:
            values["durable_write_4_threads_vs_raw"] = result.ratio("store, 4 threads", "raw write")
    for name in ("write_vs_raw", "write_vs_torch_save"):
        values[name] = min(values[f"{name}_cached"], values[f"{name}_fsync"])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds: under 55 seconds")
    parser.add_argument("--dir", type=Path, default=Path("runs/bench-store"), help="where to write (< 2 GB)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    root = arguments.dir / str(os.getpid())
    root.mkdir(parents=True)
    try:
        data = Data(root, 16_000 if arguments.quick else 28_000)
        rounds = 7 if arguments.quick else 15  # and about as many seconds for each comparison
        data.write_raw(data.raw, True)
        data.write_files(data.files, True)
        data.write_store(data.store, True)
        publish(data.store)
        table = Table("", "GB/s", "CPU s/GB", "", title=f"{data.count} documents, {data.gb:.2f} GB a form")
        values = bench_loader(data, rounds, table)
        values |= bench_reads(data, rounds, table)
        remove(data.files)
        values |= bench_states(data, rounds, table)
        values |= bench_writes(data, rounds, table)
        values |= bench_plan(table)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    console = Console()
    console.print(table)
    goals = Table("", "measured", "goal", "")
    for name, (sign, goal) in GOALS.items():
        met = values[name] >= goal if sign == ">=" else values[name] <= goal
        goals.add_row(name, f"{values[name]:.3f}", f"{sign} {goal}", "met" if met else "MISSED")
    console.print(goals)
    values["seconds"] = time.perf_counter() - started
    print(json.dumps({name: round(value, 4) for name, value in values.items()}))


if __name__ == "__main__":
    main()
