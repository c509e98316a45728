"""Stage two: one loop over packed batches of stored states, ZeRO-3 underneath, resumable to the bit.

Legend: S draft steps, M predicted tokens.
"""

import contextlib
import math
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from configs.contract import require_same
from configs.errors import ConfigError, Layer61Error
from configs.files import write_json
from configs.held_out import describe, read_record
from configs.lock import hold
from configs.progress import log, task
from configs.run_dir import HELD_OUT, METRICS, WEIGHTS, clean, directory, verb_lock
from configs.schema import RunConfig, TrainConfig
from export.checkpoint import Checkpoint
from featurestore import FeatureStore, Loader
from train import checkpoint, zero
from train.batch import Packed, check_contract, held_out, open_split, pack, state_columns
from train.cost import model_flops, work
from train.draft import Draft
from train.evaluate import measure
from train.metrics import Laps, Metrics, Pace, detail, expert_load, means, open_sinks, sums
from train.plan import check_initial, initial_weights, total_steps
from train.sparse import decide
from train.start import Start, start
from train.unroll import Scored

__all__ = ["Stopped", "learning_rate", "train"]

# for a file to be seen on another machine
SHARED_PATIENCE_S = 20
# signals that end a run after a save
STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Training was asked to end by a signal and has saved a checkpoint; carries the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Note the first SIGINT or SIGTERM, for the loop to look at once a step; a second ends the process."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        for n in handlers:
            signal.signal(n, signal.SIG_DFL)

    handlers = {n: signal.signal(n, note) for n in STOPS}
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
    # ranks of a run that was just killed may not be gone yet
    hint = "wait for it, or choose another run.dir"
    return hold(verb_lock(run_dir, "train"), "another training", hint, patience_s=10)


def _require_shared(run_dir: Path, rank: int) -> None:
    """Refuse a run directory that is not the same one on all machines; all ranks call this.

    Raises:
        ConfigError: which rank does not see what rank 0 writes there.
    """
    name = f".shared.{secrets.token_hex(8)}.partial"
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        for old in run_dir.glob(".shared.*.partial"):
            old.unlink()
        (run_dir / name).touch()
    path = run_dir / zero.from_first(name)
    deadline = time.monotonic() + SHARED_PATIENCE_S
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    mine = [] if seen else [f"rank {rank} on {socket.gethostname()} ({run_dir.absolute()})"]
    blind = zero.collect(mine)
    if rank == 0:
        path.unlink()
    if blind:
        raise ConfigError(
            f"run.dir = {run_dir} is not one directory on all machines: what rank 0 writes there is not seen"
            f" by {', '.join(blind)}",
            "set run.dir to a path on a file system that all machines share",
        )


def learning_rate(train: TrainConfig, step: int, total: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total`: linear warm-up, then half a cosine."""
    # a short run must reach its peak as well
    warmup = min(train.warmup_steps, total // 2)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    least = train.min_learning_rate_ratio
    return train.learning_rate * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class _Run:
    """A training run between two steps.

    Attributes:
        plan: the kind of draft, and where it came from.
        metrics: writes on rank 0 only.
        schedule: optimizer steps in all, and what that number follows from.
        step: optimizer steps done.
        saved_step: steps done by the newest checkpoint.
        saved_at: when it was saved, or this process began to train, by `time.monotonic`.
        position: of the loader after `step`; the loader itself may be a batch ahead when a signal comes.
        evaluated: the evaluation after `step`; empty where there was none.
        split: what is held out, as recorded.
        skipped, in_a_row: steps so far without finite gradients, and how many the last ones of them are.
    """

    config: RunConfig
    loader: Loader
    engine: Any
    plan: Start
    metrics: Metrics
    schedule: dict[str, Any]
    step: int
    saved_step: int
    saved_at: float
    position: dict[str, Any]
    evaluated: dict[str, Any]
    split: dict[str, Any] | None
    skipped: int = 0
    in_a_row: int = 0

    @property
    def total(self) -> int:
        """Optimizer steps in all."""
        return self.schedule["total"]


def train(config: RunConfig) -> dict[str, Any] | None:
    """Train until the last step; go on from the newest whole checkpoint of the run directory.

    Returns:
        The summary on rank 0: steps, tokens, seconds, the last evaluation. None on other ranks.

    Raises:
        Stopped: after a clean save, on SIGINT or SIGTERM.
        ContractError: the store was dumped from another target.
        InputError, ConfigError, StoreError: the target, a checkpoint or the store is not usable.
    """
    config.require_target()
    torch.manual_seed(config.run.seed)
    rank, world = zero.init_distributed()
    try:
        _require_shared(config.run.dir, rank)
        with _alone_in(config.run.dir, rank == 0):
            run = _open(config, rank, world)
            # until here there is nothing to save
            with _signals() as caught:
                summary = _train(run, caught)
    finally:
        zero.shutdown()
    return summary if rank == 0 else None


def _train(run: _Run, caught: list[int]) -> dict[str, Any]:
    config, rank, world = run.config, run.loader.rank, run.loader.world_size
    settings = config.train
    device, dtype = zero.device(), zero.dtype_of(settings)
    if run.step == 0:
        _evaluate(run)
    pace, stop = Pace(world, dtype), 0
    with task("train", run.total, "steps", start=run.step) if rank == 0 else contextlib.nullcontext() as bar:
        while run.step < run.total:
            began = time.monotonic()
            batches = [
                pack(next(run.loader), dtype, device) for _ in range(settings.gradient_accumulation_steps)
            ]
            wait_s = time.monotonic() - began
            scored = [batch.scored(settings.num_steps) for batch in batches]
            counts_S, tokens, stop, due = _agree(batches, scored, caught, _is_due(run))
            if stop:
                break
            values, flops = _step(run, batches, scored, counts_S, tokens)
            values |= pace.add(tokens, flops, wait_s, time.monotonic() - began, run.total - run.step)
            values |= _count_skipped(run, batches, values)
            run.metrics.write(run.step, values)
            if bar is not None:
                bar.advance(1, detail(values, pace))
            _go_on(run)
            last = run.step == run.total
            run.evaluated = _evaluate(run) if last or run.step % settings.evaluate_every == 0 else {}
            # the last step has a checkpoint in any case: one shortly before it is not worth its time
            near = 4 * (run.total - run.step) < settings.checkpoint_every
            if last or due or (run.step % settings.checkpoint_every == 0 and not near):
                _save(run)
    run.loader.close()
    run.metrics.close()
    if stop:
        if run.saved_step != run.step:
            _save(run)
        raise Stopped(stop)
    return {
        "steps": run.step,
        "tokens": pace.tokens,
        "seconds": round(pace.seconds, 1),
        "tokens_per_second": round(pace.tokens / pace.seconds, 1) if pace.tokens else None,
        "acceptance_length": run.evaluated.get("acceptance_length"),
        "acceptance_per_position": run.evaluated.get("acceptance_per_position"),
        "checkpoints": str(directory(config.run.dir)),
    }


def _open(config: RunConfig, rank: int, world: int) -> _Run:
    """Store, target, loader and engine, as the newest whole checkpoint of the run directory left them."""
    settings, first = config.train, rank == 0
    store, target = open_split(config), Checkpoint(config.require_target())
    _check(config, store, target, first)
    if first:
        for change in clean(config.run.dir):
            log("train", change)
    saved = checkpoint.newest(config.run.dir)
    weights = initial_weights(config, verify=first) if saved is None else None
    attention = decide(settings, target.config, store, zero.device())
    plan = start(
        config,
        store,
        target,
        sparse=attention.sparse,
        weights=weights,
        saved=None if saved is None else saved.path / WEIGHTS,
    )
    if saved is not None:
        agreed, what = _contracts(store, plan), f"checkpoint {saved.path} and this run"
        held = {key: saved.meta.get(key) for key in agreed}
        require_same(held, agreed, what, hint="choose another run directory")
    threads, pin = settings.loader_threads, torch.cuda.is_available()
    states = state_columns(store.contract, plan.contract.aux_layers)
    loader = Loader(
        store,
        settings.tokens_per_rank,
        rank,
        world,
        config.run.seed,
        threads=threads,
        pin=pin,
        states=states,
    )

    # the layer is partitioned from its first byte on
    ds_config = zero.deepspeed_config(settings, num_parameters=sum(math.prod(op.shape) for op in plan.ops))
    if weights is not None:
        check_initial(weights, store)
    seed = config.run.seed
    layer = zero.build_layer(target, config.trained, ds_config, weights, begin=plan, seed=seed)
    draft = Draft(layer, settings, attention)
    engine = zero.initialize(draft, settings, ds_config)
    if saved is not None:
        saved = checkpoint.load(engine, saved)
        loader.load_state_dict(_next_pass(config, store, saved.meta["loader"]))
    split = _record_split(config, loader.store, saved, first)
    done, schedule = int(saved.meta["step"]) if saved else 0, _schedule(config, loader, saved)
    total = schedule["total"]
    kept = done if saved else -1
    sinks = open_sinks(config, kept) if first else []
    metrics = Metrics(config.run.dir / METRICS if first else None, kept, sinks)
    if first:
        came = f"going on from {saved.path}" if saved else f"from {weights or plan.origin}"
        log("train", f"{came}: {total - done:,} of {total:,} steps to do on {world} ranks, {settings.dtype}")
    evaluated = dict(saved.meta["metrics"]) if saved else {}
    skipped = saved.meta.get("skipped_steps", 0) if saved else 0
    position, now = loader.state_dict(), time.monotonic()
    return _Run(
        config, loader, engine, plan, metrics, schedule, done, done, now, position, evaluated, split, skipped
    )


def _check(config: RunConfig, store: FeatureStore, target: Checkpoint, first: bool) -> None:
    """Refuse a store that does not fit the target or the settings.

    Raises:
        ContractError, ConfigError: what differs.
    """
    if first:
        # the head is two gigabytes: one rank reads it
        check_contract(store, target.directory)
        if store.missing:
            log("train", f"warning: {store.missing}, `layer61 dump` adds them")


def _record_split(
    config: RunConfig, store: FeatureStore, saved: checkpoint.Saved | None, first: bool
) -> dict[str, Any] | None:
    """Decide at the first start what is held out, and record it; later what was recorded must still hold.

    Returns:
        The record; None in a run begun before there were any.

    Raises:
        ContractError: documents of that number are held out, but not those.
    """
    record = read_record(config.run.dir)
    if record is None:
        if saved is not None:
            return None
        record = describe(store.uid, config.prompts.held_out, config.run.seed)
        record["manifest"] = store.version
    if first:
        write_json(config.run.dir / HELD_OUT, record)
    if saved is not None and record["manifest"] == store.version:
        found = describe(store.uid, config.prompts.held_out, config.run.seed)
        what = f"{config.run.dir / HELD_OUT} and store {store.url}"
        require_same(
            {"sha256": found["sha256"]},
            {"sha256": record["sha256"]},
            what,
            hint="set train.store to the store this run began with",
        )
    return record


def _contracts(store: FeatureStore, plan: Start) -> dict[str, Any]:
    """What a checkpoint says of the states it was trained on, and how."""
    return {"contract": store.contract, "draft": plan.contract.model_dump(mode="json")}


def _next_pass(config: RunConfig, store: FeatureStore, state: dict[str, Any]) -> dict[str, Any]:
    """The loader's state to go on from: with `train.new_data` the start of a pass over the store as it is."""
    if not config.train.new_data or store.version == state["manifest"]:
        return state
    epoch = state["epoch"] + (state["consumed"] > 0)
    return state | {"manifest": store.version, "epoch": epoch, "consumed": 0}


def _schedule(config: RunConfig, loader: Loader, saved: checkpoint.Saved | None) -> dict[str, Any]:
    """How many steps there are in all, and what that follows from; a checkpoint keeps it.

    With another number of ranks or other documents a step is another share of a pass: the steps of the
    passes that are left are counted anew.
    """
    train, total = config.train, total_steps(config, loader.steps_per_epoch())
    ranks, version = loader.world_size, loader.store.version
    schedule = {"max_steps": train.max_steps, "epochs": train.epochs, "ranks": ranks, "manifest": version}
    if saved is None:
        return schedule | {"total": total}
    state = saved.meta["loader"]
    before = saved.meta.get("schedule") or {"ranks": saved.meta["ranks"], "manifest": state["manifest"]}
    if schedule.items() <= before.items():
        return before
    done = int(saved.meta["step"])
    if train.max_steps is None and (before["ranks"], before["manifest"]) != (ranks, version):
        documents = int((~loader.store.held_out).sum())
        passed = loader.position.epoch + loader.position.consumed / documents
        total = done + math.ceil(max(1 - passed / train.epochs, 0) * total)
    if loader.rank == 0 and before.get("total", total) != total:
        rates = [learning_rate(train, min(done, steps - 1), steps) for steps in (before["total"], total)]
        log(
            "train",
            f"{total:,} steps in all, {before['total']:,} until now: the learning rate falls over all of them"
            f" and goes on at {rates[1]:.2e}, where it stood at {rates[0]:.2e}",
        )
    return schedule | {"total": total}


def _is_due(run: _Run) -> bool:
    """Whether the time for a checkpoint has come; clocks differ, so rank 0 decides."""
    minutes = run.config.train.checkpoint_minutes
    past = time.monotonic() - run.saved_at
    return run.loader.rank == 0 and minutes is not None and past >= 60 * minutes


def _agree(
    batches: list[Packed], scored: list[Scored], caught: list[int], due: bool
) -> tuple[Tensor, int, int, bool]:
    """What the ranks have to agree on before a step.

    Returns:
        Over all ranks, the predictions of each draft step that count, int64 [S], and the tokens; then the
        signal by which one of them was asked to stop, or 0; then whether a checkpoint is due after the step.
    """
    counts_S = torch.stack([s.valid.sum(1) for s in scored]).sum(0)
    tokens, asked = sum(len(b.input_ids) for b in batches), [n in caught for n in STOPS]
    mine = counts_S.new_tensor([tokens, *map(int, asked), int(due)])
    agreed = zero.reduce(torch.cat([counts_S, mine]))
    tokens, *asked, dues = agreed[len(counts_S) :].tolist()
    stop = next((n for n, ranks in zip(STOPS, asked, strict=True) if ranks), 0)
    return agreed[: len(counts_S)], tokens, stop, bool(dues)


def _step(
    run: _Run, batches: list[Packed], scored: list[Scored], counts_S: Tensor, tokens: int
) -> tuple[dict[str, Any], float]:
    """One optimizer step; without finite gradients DeepSpeed leaves parameters and optimizer as they are.

    Returns:
        Its values for `metrics.jsonl` and its floating-point operations, the same on every rank.
    """
    settings, num_steps = run.config.train, len(counts_S)
    device = counts_S.device
    rate = learning_rate(settings, run.step, run.total)
    for group in run.engine.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    share_S = torch.tensor([settings.step_decay**s for s in range(num_steps)], dtype=torch.float64)
    share_S = (share_S / share_S.sum()).to(device)
    # DeepSpeed takes the mean over ranks and micro-batches; the loss is one over predictions
    weight_S = (share_S / counts_S.clamp(min=1) * run.loader.world_size * len(batches)).float()
    total = torch.zeros(2 + 2 * num_steps, dtype=torch.float64, device=device)
    sizes = torch.zeros(3, dtype=torch.float64, device=device)
    laps = Laps(device)
    for batch, rows in zip(batches, scored, strict=True):
        found = run.engine(batch, rows, rows.valid * weight_S[:, None])
        laps.end("forward")
        # neither loss has a gradient for the parameters of the other
        own = 0 if found.indexer is None else settings.indexer_loss_weight * found.indexer
        run.engine.backward(found.loss + own)
        laps.end("backward")
        run.engine.step()
        laps.end("optimizer")
        total += sums(found, rows.valid)
        sizes += work(batch.cu_seqlens, rows)
    draft, passes = run.engine.module, run.loader.world_size * len(batches)
    parts = (total, sizes, draft.take_expert_rows().to(device, torch.float64))
    total, sizes, rows_E = zero.reduce(torch.cat(parts)).split([len(part) for part in parts])
    run.step, run.position = run.step + 1, run.loader.state_dict()
    anchors, keys, predictions = map(int, sizes.tolist())
    values = means(total, counts_S, passes)
    if settings.indexer == "frozen":
        del values["train/indexer_loss"]
    values |= {"train/lr": rate, "train/grad_norm": float(run.engine.get_global_grad_norm())}
    values |= {"data/anchor_share": anchors / tokens} | expert_load(rows_E, passes * num_steps)
    values |= laps.values()
    # a warm-up trains beside dense attention
    attention = {} if settings.indexer == "warmup" else draft.attention._asdict()
    return values, model_flops(draft.layer, tokens, anchors, keys, predictions, num_steps, **attention)


def _count_skipped(run: _Run, batches: list[Packed], values: dict[str, Any]) -> dict[str, Any]:
    """Count the step just done if it was skipped, and log its documents; all ranks call this.

    Returns:
        What `metrics.jsonl` says of it.
    """
    if run.engine.was_step_applied() and math.isfinite(values["train/loss"]):
        run.in_a_row = 0
        return {"train/skipped_steps": run.skipped}
    run.skipped, run.in_a_row = run.skipped + 1, run.in_a_row + 1
    uids = sorted(zero.collect([uid for batch in batches for uid in batch.uids]))
    if run.loader.rank == 0:
        few = ", ".join(map(str, uids[:4])) + (f" and {len(uids) - 4:,} more" if len(uids) > 4 else "")
        log(
            "train",
            f"step {run.step:,} skipped, {run.in_a_row} in a row: loss {values['train/loss']:.4g}, gradients"
            f" not all finite; documents {few}; {METRICS} lists them",
        )
    return {"train/skipped_steps": run.skipped, "skipped_documents": uids}


def _go_on(run: _Run) -> None:
    """End a run that does nothing but skip its steps.

    Raises:
        Layer61Error: `train.max_skipped_steps` steps in a row were skipped.
    """
    if run.in_a_row >= run.config.train.max_skipped_steps:
        raise Layer61Error(
            f"{run.in_a_row} steps in a row had no finite gradients, the last one step {run.step}; the last"
            f" checkpoint is the one after step {run.saved_step}",
            f"{METRICS} names their documents: `layer61 store show STORE UID` shows one; lower"
            " train.learning_rate where no document stands out",
        )


def _evaluate(run: _Run) -> dict[str, Any]:
    """Acceptance on held-out documents, the same on every rank; nothing where the store has none."""
    store, config, loader = run.loader.store, run.config, run.loader
    if not store.held_out.any():
        return {}
    run.engine.eval()
    found = measure(
        run.engine,
        store,
        held_out(store, config.train.evaluate_documents),
        config.evaluate.num_speculative_tokens,
        aux_layers=run.plan.contract.aux_layers,
        tokens_per_batch=config.train.tokens_per_rank,
        dtype=zero.dtype_of(config.train),
        device=zero.device(),
        rank=loader.rank,
        world_size=loader.world_size,
        add_up=zero.reduce,
    )
    run.engine.train()
    length, shares = found["acceptance_length"], found["acceptance_per_position"]
    values = {f"evaluate/acceptance_{k + 1}": share for k, share in enumerate(shares)}
    run.metrics.write(run.step, {"evaluate/acceptance_length": length, **values})
    if run.loader.rank == 0:
        log("train", f"step {run.step:,}: acceptance length {length:.3f} on held-out documents")
    return found


def _save(run: _Run) -> None:
    """Save a checkpoint that goes on after `run.step`."""
    meta = _contracts(run.loader.store, run.plan) | {"loader": run.position, "metrics": run.evaluated}
    meta |= {"held_out": run.split, "skipped_steps": run.skipped, "schedule": run.schedule}
    keep = run.config.train.keep_checkpoints
    ops, folder = run.plan.ops, run.config.run.dir
    path = checkpoint.save(run.engine, ops, folder, run.step, meta, keep=keep, draft=run.plan.draft)
    run.saved_step, run.saved_at = run.step, time.monotonic()
    if run.loader.rank == 0:
        log("train", f"saved {path}")
