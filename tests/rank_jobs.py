"""What several ranks do together in a test: `python -m tests.rank_jobs JOB ARGUMENT...` forks them."""

import contextlib
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch

from configs.schema import TrainConfig
from export.checkpoint import Checkpoint
from export.keymap import keymap
from train import checkpoint, zero
from train.draft import Draft

META = {"contract": {}, "loader": {}, "metrics": {}}


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


def hand_overs(target: str, folder: str, *route: str) -> None:
    """Save by the first number of ranks, then load and save by the next one, and so on."""
    before = None
    for leg, ranks in enumerate(route):
        after = Path(folder) / f"{leg}"
        together(int(ranks), lambda b=before, a=after: hand_over(Path(target), b, a))
        before = after


def together(count: int, act) -> None:
    """Run something on so many ranks, forked from this process, which has imported everything."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(count):
        if not (pid := os.fork()):
            signal.alarm(120)
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{count}"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
            try:
                act()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ranks.append(pid)
    failed = 0
    for _ in range(count):
        _, status = os.wait()
        failed |= status
        if failed:
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    if failed:
        raise SystemExit(f"a rank ended with {failed}")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
