"""Stage two: one loop over packed batches of stored states, ZeRO-3 underneath, resumable to the bit.

Legend: S draft steps, M predicted tokens.
"""

import contextlib
import json
import math
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from configs.errors import ContractError, InputError, Layer61Error
from configs.files import atomic_write
from configs.lock import hold
from configs.progress import Task, log, task
from configs.run_dir import directory
from configs.schema import RunConfig, TrainConfig
from export.checkpoint import Checkpoint
from export.keymap import keymap
from featurestore import FeatureStore, Loader, open_store
from train import checkpoint, zero
from train.batch import check_contract, check_lengths, held_out, pack, state_column
from train.draft import Draft
from train.evaluate import measure
from train.plan import total_steps

__all__ = ["Stopped", "learning_rate", "train"]


class Stopped(BaseException):
    """Training was asked to end by a signal and has saved a checkpoint; carries the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Note the first SIGINT or SIGTERM instead of dying of it, and look once a step; a second one ends us."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        for n in handlers:
            signal.signal(n, signal.SIG_DFL)

    handlers = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _alone_in(run_dir: Path, first: bool) -> contextlib.AbstractContextManager[None]:
    """Hold the run directory: two trainings in one would overwrite each other's checkpoints.

    Raises:
        ConfigError: another training runs there.
    """
    if not first:
        return contextlib.nullcontext()
    # ranks of a run that was killed a moment ago may still be on their way out
    hint = "wait for it, or choose another run.dir"
    return hold(run_dir / ".train.lock", "another training", hint, patience_s=10)


def learning_rate(train: TrainConfig, step: int, total: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total`: linear warm-up, then half a cosine."""
    # a short run must reach its peak as well
    warmup = min(train.warmup_steps, total // 2)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    least = train.min_learning_rate_ratio
    return train.learning_rate * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))


def _steps_left(config: RunConfig, loader: Loader, saved: checkpoint.Saved | None) -> tuple[int, int]:
    """(steps done, steps in all).

    With another number of ranks a step holds another number of documents: what is left of the epochs is cut
    anew.
    """
    total = total_steps(config, loader.steps_per_epoch())
    if saved is None:
        return 0, total
    done = int(saved.meta["step"])
    if saved.meta["ranks"] != loader.world_size and config.train.max_steps is None:
        documents = int((~loader.store.held_out).sum())
        passed = loader.position.epoch + loader.position.consumed / documents
        left = max(1 - passed / config.train.epochs, 0)
        total = done + math.ceil(left * total)
    return done, total


class _Metrics:
    """`metrics.jsonl`: one JSON object a step; lines after the step a run goes on from are dropped."""

    def __init__(self, path: Path, done: int, first: bool) -> None:
        self.path = path if first else None
        if not first:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = []
        for line in lines:
            # a line cut short by a kill is the last one, and is written again
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= done:
                    kept.append(line + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **values}) + "\n")


def _memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def _check(config: RunConfig, store: FeatureStore, target: Checkpoint, first: bool) -> dict[str, Any]:
    """The contract under which the checkpoints of this run stand.

    Raises:
        ContractError, ConfigError: the store does not fit the target.
    """
    if first:
        # one reader is enough for two gigabytes of head
        check_contract(store, target.directory)
    check_lengths(store, target.config.get("index_topk") or 0)
    if config.train.mask_position_0 != store.contract["mask_position_0"]:
        raise ContractError(
            f"train.mask_position_0 = {config.train.mask_position_0}, but the store is for a server with"
            f" {store.contract['mask_position_0']}",
            "vLLM masks position 0",
        )
    return store.contract


def train(config: RunConfig) -> dict[str, Any] | None:
    """Train until the last step; go on from the newest whole checkpoint of the run directory.

    Returns:
        The summary on rank 0: steps, tokens, seconds, last and best evaluation. None on other ranks.

    Raises:
        Stopped: after a clean save, on SIGINT or SIGTERM.
        ContractError: the store was dumped from another target.
        InputError, ConfigError, StoreError: the target, a checkpoint or the store is not usable.
    """
    config.require_target()
    torch.manual_seed(config.run.seed)
    rank, world = zero.init_distributed()
    try:
        with _signals() as caught, _alone_in(config.run.dir, rank == 0):
            summary = _train(config, rank, world, caught)
    finally:
        zero.shutdown()
    return summary if rank == 0 else None


def _train(config: RunConfig, rank: int, world: int, caught: list[int]) -> dict[str, Any]:
    settings, first = config.train, rank == 0
    device, dtype = zero.device(), zero.dtype_of(settings)
    accumulation = settings.gradient_accumulation_steps

    store = open_store(config.train_store_path)
    target = Checkpoint(config.require_target())
    contract = _check(config, store, target, first)
    column = state_column(contract)
    ops = keymap(target.config)
    if first:
        checkpoint.clean(config.run.dir)
    saved = checkpoint.newest(config.run.dir)
    loader = Loader(
        store,
        settings.tokens_per_rank,
        rank,
        world,
        config.run.seed,
        threads=settings.loader_threads,
        pin=torch.cuda.is_available(),
    )
    if saved is not None:
        if saved.meta["contract"] != contract:
            raise InputError(
                f"checkpoint {saved.path} was trained from another store", "choose another run directory"
            )
        loader.load_state_dict(saved.meta["loader"])
    done, total = _steps_left(config, loader, saved)
    metrics = _Metrics(config.run.dir / "metrics.jsonl", done if saved else -1, first)

    # the layer, partitioned from the first byte on
    ds_config = zero.deepspeed_config(
        settings,
        num_parameters=sum(math.prod(op.shape) for op in ops),
        load_universal=saved is not None and saved.meta["ranks"] != world,
    )
    engine = zero.initialize(
        Draft(zero.build_layer(target, settings, ds_config), settings), settings, ds_config
    )
    if saved is not None:
        checkpoint.load(engine, saved)
    if first:
        came = f"going on from {saved.path}" if saved else "from the target's own layer"
        log("train", f"{came}: {total - done:,} of {total:,} steps to do on {world} ranks, {settings.dtype}")

    num_steps = settings.num_steps
    share_S = torch.tensor([settings.step_decay**s for s in range(num_steps)], dtype=torch.float64)
    share_S = (share_S / share_S.sum()).to(device)
    evaluated: dict[str, Any] = dict(saved.meta["metrics"]) if saved else {}

    # where the loader stands after the last whole step: it may be a batch ahead when a signal comes
    position = loader.state_dict()

    def evaluate(step: int) -> dict[str, Any]:
        """Acceptance on held-out documents, the same on every rank; nothing where the store has none."""
        if not store.held_out.any():
            return {}
        engine.eval()
        found = measure(
            engine,
            store,
            held_out(store, settings.evaluate_documents),
            config.evaluate.num_speculative_tokens,
            tokens_per_batch=settings.tokens_per_rank,
            dtype=dtype,
            device=device,
            rank=rank,
            world_size=world,
            add_up=zero.reduce,
        )
        engine.train()
        metrics.write(
            step,
            {
                "evaluate/acceptance_length": found["acceptance_length"],
                **{f"evaluate/acceptance_{k + 1}": a for k, a in enumerate(found["acceptance_per_position"])},
            },
        )
        if first:
            length = found["acceptance_length"]
            log("train", f"step {step:,}: acceptance length {length:.3f} on held-out documents")
        return found

    def save(step: int) -> None:
        meta = {"contract": contract, "loader": position, "metrics": evaluated}
        path = checkpoint.save(engine, ops, config.run.dir, step, meta, keep=settings.keep_checkpoints)
        if first:
            log("train", f"saved {path}")

    if saved is None:
        evaluate(0)
    tokens_done, started, waited = 0, time.monotonic(), 0.0
    step, on_disk = done, done
    with task("train", total, start=done) if first else contextlib.nullcontext() as bar:
        while step < total:
            began = time.monotonic()
            batches = [pack(next(loader), column, dtype, device) for _ in range(accumulation)]
            wait_s = time.monotonic() - began

            # how many predictions of each draft step count on all ranks, and whether one was asked to stop
            scored = [batch.scored(num_steps) for batch in batches]
            counts = torch.stack([s.valid.sum(1) for s in scored]).sum(0)
            tokens = sum(len(b.input_ids) for b in batches)
            agreed = zero.reduce(torch.cat([counts, counts.new_tensor([tokens, *_asked(caught)])]))
            counts, (tokens, interrupted, terminated) = agreed[:num_steps], agreed[num_steps:].tolist()
            if interrupted or terminated:
                break
            # DeepSpeed takes the mean over ranks and micro-batches; the loss is one over predictions
            weight_S = (share_S / counts.clamp(min=1) * world * accumulation).float()

            rate = learning_rate(settings, step, total)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            sums = torch.zeros(1 + 2 * num_steps, dtype=torch.float64, device=device)
            for batch, rows in zip(batches, scored, strict=True):
                weights_SM = rows.valid * weight_S[:, None]
                found = engine(batch, rows, weights_SM)
                engine.backward(found.loss)
                engine.step()
                sums += _sums(found.loss, found.agree, found.overlap, rows.valid)
            zero.reduce(sums)
            step, position = step + 1, loader.state_dict()
            values = _values(sums, counts, world * accumulation)
            if not math.isfinite(values["train/loss"]):
                raise Layer61Error(
                    f"the loss is {values['train/loss']} at step {step}",
                    "lower train.learning_rate; the same command goes on from the last checkpoint",
                )
            tokens_done, waited = tokens_done + tokens, waited + wait_s
            seconds = time.monotonic() - began
            values |= {
                "train/lr": rate,
                "train/grad_norm": float(engine.get_global_grad_norm()),
                "train/tokens": tokens,
                "perf/tok_s": tokens / seconds,
                "data/wait_frac": wait_s / seconds,
                "mem/peak_gib": _memory_gib(),
            }
            metrics.write(step, values)
            if bar is not None:
                _show(bar, values, num_steps, tokens_done / (time.monotonic() - started), waited, started)
            if step % settings.evaluate_every == 0 or step == total:
                evaluated = evaluate(step)
            elif evaluated:
                evaluated = {}
            if step % settings.checkpoint_every == 0 or step == total:
                save(step)
                on_disk = step
        else:
            interrupted = terminated = 0
    if interrupted or terminated:
        if on_disk != step:
            save(step)
        loader.close()
        raise Stopped(signal.SIGINT if interrupted else signal.SIGTERM)
    loader.close()
    seconds = time.monotonic() - started
    return {
        "steps": step,
        "tokens": tokens_done,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens_done / seconds, 1) if tokens_done else None,
        "acceptance_length": evaluated.get("acceptance_length"),
        "acceptance_per_position": evaluated.get("acceptance_per_position"),
        "checkpoints": str(directory(config.run.dir)),
    }


def _asked(caught: list[int]) -> tuple[int, int]:
    return int(signal.SIGINT in caught), int(signal.SIGTERM in caught)


def _sums(loss: Tensor, agree_SM: Tensor, overlap_SM: Tensor, valid_SM: Tensor) -> Tensor:
    """Weighted loss, then per step the number of agreeing predictions and the summed overlap, float64."""
    parts = [loss.detach().reshape(1), (agree_SM & valid_SM).sum(1), (overlap_SM * valid_SM).sum(1)]
    return torch.cat([part.double() for part in parts])


def _values(sums: Tensor, counts: Tensor, scale: int) -> dict[str, float]:
    """Means over all predictions of a step, by draft step from 1."""
    num_steps = len(counts)
    shares = sums[1:].view(2, num_steps) / counts.clamp(min=1)
    values = {"train/loss": float(sums[0]) / scale}
    values |= {f"train/top1_pos{s + 1}": float(shares[0, s]) for s in range(num_steps)}
    return values | {f"train/overlap_pos{s + 1}": float(shares[1, s]) for s in range(num_steps)}


def _show(
    bar: Task, values: dict[str, float], num_steps: int, tokens_s: float, waited: float, started: float
) -> None:
    top1 = " ".join(f"{values[f'train/top1_pos{s + 1}']:.3f}" for s in range(num_steps))
    bar.advance(
        1,
        f"loss {values['train/loss']:.4f} | top1 {top1} | lr {values['train/lr']:.1e}"
        f" | gnorm {values['train/grad_norm']:.2f} | {tokens_s:,.0f} tok/s"
        f" | data {waited / (time.monotonic() - started):.1%} | mem {values['mem/peak_gib']:.1f} GiB",
    )
