"""What several ranks do together in a test, forked from a process that has imported what they need."""

import functools
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.distributed.run
import torch.multiprocessing as mp

from configs import run_dir as runs
from configs.load import load_config
from configs.schema import TrainConfig
from export.checkpoint import Checkpoint
from export.keymap import keymap
from pipeline.__main__ import main
from train import checkpoint, trainer, zero
from train.batch import Packed, pack
from train.draft import Draft
from train.sparse import Sparse

META = {"contract": {}, "loader": {}, "metrics": {}}


def start_job(file: str | Path, job: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a job in a process of its own, which appends what it and its ranks print to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    process = context.Process(target=_printing, args=(str(file), job, *arguments))
    process.start()
    return process


def run_job(job: Callable[..., None], *arguments: object) -> str:
    """Run a job in a process of its own; returns what its ranks printed."""
    with tempfile.NamedTemporaryFile() as said:
        process = start_job(said.name, job, *arguments)
        process.join(300)
        process.kill()
        text = said.read().decode()
    assert process.exitcode == 0, text
    return text


def _printing(file: str, job: Callable[..., None], *arguments: object) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    job(*arguments)


def verb(words: list[str], *, ignored: Collection[signal.Signals] = ()) -> NoReturn:
    """What `python -m pipeline` does, some signals ignored from the start as a shell may have it."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(main(words))


def torchrun(words: list[str], environment: dict[str, str]) -> None:
    """What `torchrun` does, which starts interpreters of its own."""
    os.environ |= environment
    torch.distributed.run.main(words)


def train_together(count: int, words: list[str]) -> None:
    """The train verb on so many ranks of one launcher."""

    def act() -> None:
        assert main(["train", *words]) == 0

    together(count, act)


def build(target: Path):
    """An engine over the target's own layer, every parameter divided, and its key map."""
    settings = TrainConfig(dtype="bfloat16")
    config = zero.deepspeed_config(settings)
    layer = zero.build_layer(Checkpoint(target), settings, config)
    return zero.initialize(Draft(layer, settings), settings, config), keymap(Checkpoint(target).config)


def expected(part: zero.Partition, key: str) -> torch.Tensor:
    """A made-up value of a whole flattened parameter or moment, the same for whoever asks."""
    seed = sum(part.name.encode()) * 7 + len(part.name) + len(key)
    return torch.randn(part.numel, generator=torch.Generator().manual_seed(seed))


def fill(engine) -> None:
    for part in zero.partitions(engine):
        for key, mine in part.state.items():
            mine.copy_(expected(part, key)[part.start : part.stop])
    zero.take_over(engine, 41)


def check(engine) -> None:
    parts = zero.partitions(engine)
    assert zero.optimizer_step(engine) == 41
    for part in parts:
        for key, mine in part.state.items():
            assert torch.equal(mine, expected(part, key)[part.start : part.stop]), (part.name, key)
    whole = dict(engine.module.layer.named_parameters())
    for part in parts:
        with zero.gathered([whole[part.name]]):
            found = whole[part.name].detach().flatten()
            assert torch.equal(found, expected(part, "master").bfloat16()), part.name


def hand_over(target: Path, before: Path | None, after: Path) -> None:
    """Save made-up state, or what another number of ranks has saved, once it is what it has to be."""
    zero.init_distributed()
    engine, ops = build(target)
    if before is None:
        fill(engine)
    else:
        saved = checkpoint.newest(before)
        assert checkpoint.load(engine, saved).path == saved.path
        check(engine)
    checkpoint.save(engine, ops, after, 7, META, keep=1)


def hand_overs(target: Path, folder: Path, *route: int) -> None:
    """Save by the first number of ranks, then load and save by the next one, and so on."""
    before = None
    for leg, ranks in enumerate(route):
        after = folder / f"{leg}"
        together(ranks, lambda b=before, a=after: hand_over(target, b, a))
        before = after


def count_gathers(target: Path, store: Path, folder: Path) -> None:
    """Elements that two ranks gather in the layer, and from each micro-batch of a training to the next."""

    def act() -> None:
        total, found = [0], []
        gather = dist.all_gather_into_tensor

        def counting(*, output_tensor, **others):
            total[0] += output_tensor.numel()
            return gather(output_tensor=output_tensor, **others)

        dist.all_gather_into_tensor = counting
        initialize = zero.initialize

        def watched(*args):
            engine = initialize(*args)
            step = engine.step

            def stepping():
                step()
                found.append(total[0])
                total[0] = 0

            engine.step = stepping
            found.append(sum(2 * p.partition_numel() for p in engine.module.parameters()))
            total[0] = 0
            return engine

        zero.initialize = watched
        settings = [f"target.path={target}", f"train.store={store}", f"run.dir={folder}", "train.max_steps=4"]
        settings += [
            "train.gradient_accumulation_steps=2",
            "train.evaluate_every=2",
            "train.checkpoint_every=3",
        ]
        trainer.train(load_config([], settings + ["train.tokens_per_rank=48"]))
        if os.environ["RANK"] == "0":
            print("gathered", *found)

    together(2, act)


def losses(target: Path, store: Path, folder: Path, *ways: str) -> None:
    """Train on the same global batches by so many ranks times micro-batches."""
    for way in ways:
        ranks, micro_batches = map(int, way.split("x"))
        settings = [f"target.path={target}", f"train.store={store}", f"run.dir={folder}/{way}"]
        settings += ["train.max_steps=6", "train.dtype=float32", "train.tokens_per_rank=48"]
        settings += [f"train.gradient_accumulation_steps={micro_batches}", "train.warmup_steps=1"]
        settings += ["train.gradient_clipping=0.1", "train.learning_rate=1e-3"]
        together(ranks, lambda s=settings: trainer.train(load_config([], s)))


def sparse_ranks(target: Path) -> None:
    """Losses of sparse steps on four batches, by one rank and by two, one of which has nothing long.

    The two gather what they keep, the one masks the rest.
    """
    lengths = ((100,), (20, 30), (90, 70), ())

    def act(ranks: int) -> None:
        rank, _ = zero.init_distributed()
        settings = TrainConfig(
            dtype="float32",
            indexer="joint",
            num_steps=2,
            learning_rate=1e-3,
            gradient_accumulation_steps=len(lengths) // ranks,
            # every module is gathered and let go of each time it runs
            deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        )
        config = zero.deepspeed_config(settings, num_parameters=1000)
        layer = zero.build_layer(Checkpoint(target), settings, config)
        engine = zero.initialize(
            Draft(layer, settings, Sparse(True, None if ranks == 1 else "gather")), settings, config
        )
        for step in range(2):
            total = torch.zeros(2, dtype=torch.float64)
            for mine in lengths[rank::ranks]:
                batch = made_up(layer, mine)
                scored = batch.scored(settings.num_steps)
                found = engine(batch, scored, scored.valid.float() / 100)
                engine.backward(found.loss + found.indexer)
                engine.step()
                total += torch.stack([found.loss.detach(), found.indexer.detach()])
            total = zero.reduce(total)
            if rank == 0:
                print("losses", ranks, step, *total.tolist())
        zero.shutdown()

    for ranks in (1, 2):
        together(ranks, lambda r=ranks: act(r))


def made_up(layer, lengths: tuple[int, ...]) -> Packed:
    """Random documents, the last half of each wanted; of no lengths, what a rank without documents gets."""
    generator = torch.Generator().manual_seed(sum(lengths))
    T = sum(lengths)
    ids = torch.randint(layer.dims.vocab_size, (T,), generator=generator)
    hidden = torch.randn(T, 1, layer.dims.hidden_size, generator=generator)
    mask = torch.cat([torch.arange(n) >= n // 2 for n in lengths] or [torch.zeros(0, dtype=torch.bool)])
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    given = SimpleNamespace(input_ids=ids, hidden=hidden, loss_mask=mask, cu_seqlens=bounds, uids=())
    return pack(given, torch.float32, torch.device("cpu"))


def note_documents(target: Path, store: Path, folder: Path, *legs: str) -> None:
    """Train on so many ranks up to a step (`RANKSxSTEP`), then go on with the next way.

    `read.LEG.RANK.json` holds the documents of each step.
    """

    def act(leg: int, settings: list[str]) -> None:
        steps, pack = [], trainer.pack

        def noting(batch, *others):
            steps.append(list(batch.uids))
            return pack(batch, *others)

        trainer.pack = noting
        trainer.train(load_config([], settings))
        (folder / f"read.{leg}.{os.environ['RANK']}.json").write_text(json.dumps(steps))

    for leg, (ranks, last) in enumerate(map(int, way.split("x")) for way in legs):
        settings = [f"target.path={target}", f"train.store={store}", f"run.dir={folder}"]
        settings += ["train.dtype=float32", "train.tokens_per_rank=48", "train.evaluate_every=100"]
        together(ranks, functools.partial(act, leg, [*settings, f"train.max_steps={last}"]))


def kill_while_saving(settings: list[str], folder: Path, kills: int) -> None:
    """Train into `whole`, and into `killed` by so many runs that are killed while they save, and a last one.

    Prints how many runs were killed before their end.
    """
    chance, killed = random.Random(61), 0

    def start(name: str):
        words = ["train", *settings, f"run.dir={folder}/{name}"]
        process = multiprocessing.get_context("fork").Process(target=verb, args=(words,))
        process.start()
        return process

    def finish(name: str) -> None:
        process = start(name)
        process.join(120)
        assert process.exitcode == 0

    finish("whole")
    run = runs.directory(folder / "killed")
    for _ in range(kills):
        before = sorted(p.name for p in run.glob("*")) if run.exists() else []
        process = start("killed")
        # until the first save has begun, then a little longer
        while process.is_alive() and sorted(p.name for p in run.glob("*")) == before:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.3))
        killed += process.is_alive()
        process.kill()
        process.join()
    finish("killed")
    print("killed", killed)


def together(count: int, act) -> None:
    """Run something on so many ranks, forked from this process, which has imported everything."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def rank(number: int) -> None:
        os.environ |= {"RANK": f"{number}", "LOCAL_RANK": f"{number}", "WORLD_SIZE": f"{count}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        act()
        sys.stdout.flush()

    mp.start_processes(rank, nprocs=count, start_method="fork")
