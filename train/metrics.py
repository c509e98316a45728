"""What a run says of itself: `metrics.jsonl`, one JSON object a step, and the text beside the progress bar.

Legend: S draft steps, M predicted tokens.
"""

import json
import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.files import atomic_write
from configs.progress import log
from train.loss import HeadLoss

__all__ = ["Metrics", "Pace", "detail", "means", "sums"]


class Metrics:
    """`metrics.jsonl` of a run that goes on after step `done`: later lines are dropped, new ones appended.

    Lines that are not ours are moved to `metrics.jsonl.damaged`, never thrown away.

    Args:
        path: the file; None on ranks that write nothing.
        done: last step whose line stays; -1 for none.
    """

    def __init__(self, path: Path | None, done: int) -> None:
        self.path = path
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
            log("train", f"{len(damaged):,} lines of {path} cannot be read; they are kept in {aside}")
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
    """Tokens trained on and seconds waited for data since this process began to train."""

    started: float = field(default_factory=time.monotonic)
    tokens: int = 0
    waited: float = 0.0

    def add(self, tokens: int, wait_s: float, step_s: float) -> dict[str, float]:
        """Count a step of `step_s` seconds; returns its values for `metrics.jsonl`."""
        self.tokens, self.waited = self.tokens + tokens, self.waited + wait_s
        return {
            "train/tokens": tokens,
            "perf/tok_s": tokens / step_s,
            "data/wait_frac": wait_s / step_s,
            "mem/peak_gib": _memory_gib(),
        }

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


def _memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def sums(found: HeadLoss, valid_SM: Tensor) -> Tensor:
    """Weighted loss, then per draft step the number of agreeing predictions and the summed overlap.

    Returns:
        float64 [1 + 2 S]; adds up over micro-batches and ranks.
    """
    columns = [
        found.loss.detach().reshape(1),
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
    shares = sums[1:].view(2, num_steps) / counts_S.clamp(min=1)
    values = {"train/loss": float(sums[0]) / scale}
    values |= {f"train/top1_pos{s + 1}": float(shares[0, s]) for s in range(num_steps)}
    return values | {f"train/overlap_pos{s + 1}": float(shares[1, s]) for s in range(num_steps)}


def detail(values: dict[str, float], pace: Pace) -> str:
    """The text beside the progress bar, from the values of the step just done."""
    top1 = " ".join(f"{value:.3f}" for name, value in values.items() if name.startswith("train/top1_pos"))
    return (
        f"loss {values['train/loss']:.4f} | top1 {top1} | lr {values['train/lr']:.1e}"
        f" | gnorm {values['train/grad_norm']:.2f} | {pace.tokens / pace.seconds:,.0f} tok/s"
        f" | data {pace.waited / pace.seconds:.1%} | mem {values['mem/peak_gib']:.1f} GiB"
    )
