"""What a run says of itself: `metrics.jsonl`, one JSON object a step, and the text beside the progress bar.

Legend: E experts, S draft steps, M predicted tokens, T tokens.
"""

import hashlib
import itertools
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.files import atomic_write
from configs.progress import count, log
from configs.run_dir import TENSORBOARD
from configs.schema import RunConfig
from train.cost import device_tflops
from train.loss import HeadLoss
from train.plan import check_sinks

__all__ = [
    "Laps",
    "Metrics",
    "Pace",
    "detail",
    "expert_load",
    "means",
    "open_sinks",
    "sums",
]


class Metrics:
    """`metrics.jsonl` of a run that goes on after step `done`: later lines are dropped, new ones appended.

    Lines that are not ours are moved to `metrics.jsonl.damaged`, never thrown away.

    Args:
        path: the file; None on ranks that write nothing.
        done: last step whose line stays; -1 for none.
        sinks: are told every line as well.
    """

    def __init__(self, path: Path | None, done: int, sinks: Sequence["Sink"] = ()) -> None:
        self.path, self.sinks = path, sinks
        if path is None:
            return
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept, damaged = [], []
        for place, line in enumerate(lines):
            step = _step_of(line)
            if step is not None and step <= done:
                kept.append(line.rstrip(b"\r\n") + b"\n")
            elif step is None and not (place == len(lines) - 1 and _is_cut(line)):
                damaged.append(line.rstrip(b"\r\n") + b"\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        if damaged:
            aside = path.with_name(path.name + ".damaged")
            earlier = aside.read_bytes() if aside.exists() else b""
            atomic_write(aside, earlier + b"".join(damaged))
            log("train", f"{count(len(damaged), 'line')} of {path} cannot be read, kept in {aside}")
        atomic_write(path, b"".join(kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; a number that is not finite becomes null, for which JSON has a word."""
        if self.path is not None:
            told = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in values.items()
            }
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **told}, allow_nan=False) + "\n")
            numbers = {key: value for key, value in told.items() if isinstance(value, (int, float))}
            for sink in self.sinks:
                sink.write(step, numbers)

    def close(self) -> None:
        """End the sinks."""
        for sink in self.sinks:
            sink.close()


class Sink(NamedTuple):
    """Another place for what `metrics.jsonl` says."""

    write: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def open_sinks(config: RunConfig, done: int) -> list[Sink]:
    """TensorBoard and Weights & Biases, as far as they are asked for; rank 0 only.

    Raises:
        ConfigError: the package is missing, or refuses.
    """
    train, run_dir, sinks = config.train, config.run.dir, []
    check_sinks(train)
    if train.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=done + 1)

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        sinks.append(Sink(write, writer.close))
    if train.wandb_project is not None:
        import wandb

        # one run directory is one run there, however often it is started
        name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        settings = config.model_dump(mode="json", include={"run", "target", "train"})
        try:
            run = wandb.init(
                project=train.wandb_project,
                name=run_dir.name,
                id=name,
                dir=str(run_dir),
                resume="allow",
                config=settings,
            )
        except Exception as error:
            raise ConfigError(
                f"Weights & Biases refuses the project {train.wandb_project!r}: {error}",
                "run `wandb login`, or set WANDB_MODE=offline",
            ) from error
        sinks.append(Sink(lambda step, values: run.log(values, step=step), run.finish))
    return sinks


def _step_of(line: bytes) -> int | None:
    """The step of a line of ours, None for any other."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int else None


def _is_cut(line: bytes) -> bool:
    """Whether a last line is one of ours that a kill cut short; its step is done again."""
    return line.startswith(b'{"step": ') and not line.endswith(b"\n")


@dataclass
class Pace:
    """Tokens trained on and seconds waited for data since this process began to train.

    Args:
        ranks: ranks that share the work.
        dtype: of the matrix products.
    """

    ranks: int
    dtype: torch.dtype
    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    tokens: int = 0
    waited: float = 0.0

    def add(self, tokens: int, flops: float, wait_s: float, step_s: float, left: int) -> dict[str, float]:
        """Count a step; returns its values for `metrics.jsonl`.

        Args:
            tokens, flops: of all ranks.
            wait_s: seconds of the step that went into waiting for data.
            step_s: seconds of the step.
            left: steps to do after it.
        """
        self.steps, self.tokens, self.waited = self.steps + 1, self.tokens + tokens, self.waited + wait_s
        values = {
            "train/tokens": tokens,
            "perf/tok_s": tokens / step_s,
            "perf/tflops_per_rank": flops / step_s / self.ranks / 1e12,
            "perf/seconds_left": self.seconds / self.steps * left,
            "data/wait_frac": wait_s / step_s,
            "mem/peak_gib": _memory_gib(),
        }
        rate = _device_tflops(self.dtype)
        return values | ({"perf/mfu": values["perf/tflops_per_rank"] / rate} if rate else {})

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


class Laps:
    """Seconds of the parts of a step. On a GPU they are read from events: the host goes on meanwhile.

    Args:
        device: on which the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, part: str) -> None:
        """A part ends here; it began where the one before ended."""
        self._marks.append((part, self._now()))

    def values(self) -> dict[str, float]:
        """Seconds of each part for `metrics.jsonl`, all its laps together; waits until they are over."""
        found: dict[str, float] = {}
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        for (_, before), (part, after) in itertools.pairwise(self._marks):
            seconds = before.elapsed_time(after) / 1000 if self._on_gpu else after - before
            found[f"perf/{part}_s"] = found.get(f"perf/{part}_s", 0.0) + seconds
        return found


def _device_tflops(dtype: torch.dtype) -> float | None:
    """What this device can do at most, where that is known: dense bfloat16 products, by its data sheet."""
    if dtype != torch.bfloat16 or not torch.cuda.is_available():
        return None
    return device_tflops(torch.cuda.get_device_name())


def _memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def expert_load(rows_E: Tensor, passes: int) -> dict[str, float]:
    """How evenly the router shares out its rows.

    Args:
        rows_E: rows sent to each expert by all passes.
        passes: draft steps times micro-batches times ranks.
    """
    if not len(rows_E):
        return {}  # a dense layer
    rows = rows_E.double()
    mean = float(rows.mean())
    return {
        "moe/rows_per_expert": mean / passes,
        "moe/max_over_mean": float(rows.max()) / mean if mean else 0.0,
        "moe/idle_experts": int((rows == 0).sum()),
    }


def sums(found: HeadLoss, valid_SM: Tensor) -> Tensor:
    """Weighted loss, the indexer's, then per draft step the agreeing predictions and the summed overlap.

    Returns:
        float64 [2 + 2 S]; adds up over micro-batches and ranks.
    """
    columns = [
        found.loss.detach().reshape(1),
        (found.loss * 0 if found.indexer is None else found.indexer).detach().reshape(1),
        (found.agree & valid_SM).sum(1),
        (found.overlap * valid_SM).sum(1),
    ]
    return torch.cat([column.double() for column in columns])


def means(sums: Tensor, counts_S: Tensor, scale: int) -> dict[str, float]:
    """Means over all predictions of an optimizer step, by draft step from 1.

    Args:
        sums: from `sums`, over all ranks and micro-batches.
        counts_S: predictions of each draft step.
        scale: ranks times micro-batches, by which the loss was scaled up.
    """
    num_steps = len(counts_S)
    shares = sums[2:].view(2, num_steps) / counts_S.clamp(min=1)
    values = {"train/loss": float(sums[0]) / scale, "train/indexer_loss": float(sums[1]) / scale}
    values |= {f"train/top1_pos{s + 1}": float(shares[0, s]) for s in range(num_steps)}
    return values | {f"train/overlap_pos{s + 1}": float(shares[1, s]) for s in range(num_steps)}


def detail(values: dict[str, Any], pace: Pace) -> str:
    """The text beside the progress bar, from the values of the step just done."""
    top1 = " ".join(f"{value:.3f}" for name, value in values.items() if name.startswith("train/top1_pos"))
    mfu = f" ({values['perf/mfu']:.0%} of the device)" if "perf/mfu" in values else ""
    experts = ""
    if "moe/max_over_mean" in values:
        experts = f" | experts max {values['moe/max_over_mean']:.1f}x, {values['moe/idle_experts']} idle"
    skipped = f" | skipped {values['train/skipped_steps']}" if values["train/skipped_steps"] else ""
    return (
        f"loss {values['train/loss']:.4f} | top1 {top1} | lr {values['train/lr']:.1e}"
        f" | gnorm {values['train/grad_norm']:.2f}{skipped} | {pace.tokens / pace.seconds:,.0f} tok/s{mfu}"
        f"{experts} | data {pace.waited / pace.seconds:.1%} | mem {values['mem/peak_gib']:.1f} GiB"
    )
