"""The names in a run directory; which checkpoints are whole. Reads names and sizes, never a tensor.

RUN/
  config.VERB.json     settings under which a verb was first started; later starts are compared with them
  store/               the feature store (docs/store.md)
  rejects.jsonl        dump: conversations left out, and why
  probe.npz            dump: one document's states at the first start of an engine
  engine.1-of-1.log    dump: what the engine of that worker prints
  view.1-of-1/         dump: the target without sparse attention, as links, for that worker's engine
  metrics.jsonl        train: one line a step
  metrics.jsonl.damaged  train: lines of metrics.jsonl that could not be read at a later start
  tensorboard/         train: the same for TensorBoard, with train.tensorboard
  wandb/               train: the same as Weights & Biases keeps it, with train.wandb_project
  checkpoints/
    latest             name of the newest checkpoint, one line, replaced by rename
    best.json          {"format": 1, "checkpoint": name, "acceptance_length"} by offline acceptance
    step_000200/
      COMMIT.json      written last: {"format": 1, "files": {name: bytes}}
      layer61.json     {"format": 1, "step", "ranks", "contract", "draft", "loader", "metrics"}
      weights/         the layer under its checkpoint names: safetensors files and their index
      deepspeed/       partitions of parameters and optimizer, one pair of files a rank
  evaluate.NAME.json   evaluate: offline acceptance of the checkpoint of that name, or `released`
  nextn/               export: what servers load; its layer61.json says what it was made from
  verify/              verify: a log and a finished measurement of each engine
  verify.json          verify: the result
  serve/               serve, bench-serve: what the servers print, and the views that they serve
  serving.json         bench-serve: the result
  summary.json         demo: the figures of its table
  report.html          report
  .ranks/              train: settings for the ranks of this machine, their result or errors
  *.lock               one process of a verb at a time; dump.1-of-1.lock one of that worker
"""

import re
from pathlib import Path
from typing import Any

from configs.contract import split_draft
from configs.errors import InputError
from configs.files import read_json

__all__ = [
    "BEST",
    "COMMIT",
    "EVALUATIONS",
    "EXPORT",
    "LATEST",
    "META",
    "METRICS",
    "PROBE",
    "RANKS",
    "REJECTS",
    "REPORT",
    "SERVE_WORK",
    "SERVING",
    "SETTINGS",
    "STORE",
    "SUMMARY",
    "TENSORBOARD",
    "VERIFICATION",
    "VERIFY_WORK",
    "WEIGHTS",
    "committed",
    "directory",
    "dump_lock",
    "engine_log",
    "evaluation",
    "find_weights",
    "locate",
    "read_best",
    "read_meta",
    "settings",
    "tag",
    "verb_lock",
    "view",
]

STORE = "store"
REJECTS = "rejects.jsonl"
PROBE = "probe.npz"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SETTINGS = "config.*.json"
EVALUATIONS = "evaluate.*.json"
EXPORT = {"mtp": "nextn", "eagle3": "eagle3"}  # export: the draft, by kind
VERIFICATION = "verify.json"
VERIFY_WORK = "verify"
SERVE_WORK = "serve"
SERVING = "serving.json"
SUMMARY = "summary.json"
REPORT = "report.html"
RANKS = ".ranks"

BEST = "best.json"
COMMIT = "COMMIT.json"
LATEST = "latest"
META = "layer61.json"
WEIGHTS = "weights"
TAG = re.compile(r"^step_(\d{6,})$")


def settings(run_dir: Path, verb: str) -> Path:
    """The settings under which a verb was first started."""
    return Path(run_dir) / SETTINGS.replace("*", verb)


def evaluation(run_dir: Path, name: str) -> Path:
    """Offline figures of a checkpoint, `released`, `best` or another name."""
    return Path(run_dir) / EVALUATIONS.replace("*", name)


def engine_log(run_dir: Path, worker: str) -> Path:
    """What the capture engine of `dump.worker` k/n prints."""
    return Path(run_dir) / f"engine.{worker.replace('/', '-of-')}.log"


def view(run_dir: Path, worker: str) -> Path:
    """The V3 view that the capture engine of `dump.worker` k/n serves."""
    return Path(run_dir) / f"view.{worker.replace('/', '-of-')}"


def dump_lock(run_dir: Path, worker: str) -> Path:
    """Held by the dump of `dump.worker` k/n while it runs an engine."""
    return Path(run_dir) / f"dump.{worker.replace('/', '-of-')}.lock"


def verb_lock(run_dir: Path, verb: str) -> Path:
    """Held by a verb while it works in the run directory."""
    return Path(run_dir) / f".{verb}.lock"


def directory(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def tag(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def _is_whole(path: Path) -> bool:
    try:
        commit = read_json(path / COMMIT)
        return commit["format"] == 1 and all(
            (path / name).stat().st_size == size for name, size in commit["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def committed(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first; half-made and damaged ones do not count."""
    root = directory(run_dir)
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if TAG.match(p.name) and p.is_dir() and _is_whole(p)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def locate(run_dir: Path, which: str) -> Path:
    """Find a checkpoint of a run by `last`, `best` or path.

    `best` is the newest one where no checkpoint was evaluated.

    Raises:
        InputError: there is no such checkpoint, or it is not whole.
    """
    if which not in ("last", "best"):
        path = Path(which)
        if not _is_whole(path):
            raise InputError(
                f"{path} is not a whole checkpoint: {COMMIT} is missing or does not fit the files",
                "name a directory like RUN/checkpoints/step_000200, or use best or last",
            )
        return path
    whole = committed(run_dir)
    if not whole:
        raise InputError(
            f"{directory(run_dir)} holds no whole checkpoint",
            f"run layer61 train first, with run.dir={run_dir}",
        )
    best = read_best(run_dir) if which == "best" else None
    return next((p for p in whole if best and p.name == best["checkpoint"]), whole[-1])


def find_weights(run_dir: Path, which: str, target: Path) -> Path:
    """Directory of the tensors that `evaluate.checkpoint` or `export.checkpoint` means.

    Args:
        run_dir: the run whose checkpoints `best` and `last` mean.
        which: `best`, `last`, `released`, a checkpoint, or any directory of tensors with checkpoint names.
        target: the target, which holds the released layer.

    Raises:
        InputError: as `locate`.
    """
    if which == "released":
        return target
    if which in ("last", "best") or (Path(which) / COMMIT).exists():
        return locate(run_dir, which) / WEIGHTS
    return Path(which)


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """`best.json` of a run; None where no checkpoint was evaluated yet."""
    try:
        best = read_json(directory(run_dir) / BEST)
    except (OSError, ValueError):
        return None
    return best if isinstance(best, dict) and "checkpoint" in best else None


def read_meta(path: Path) -> dict[str, Any]:
    """Parse `layer61.json` of a checkpoint or an export; an older one is brought to today's form.

    Raises:
        InputError: missing, malformed, or of another format.
    """
    try:
        meta = read_json(path / META)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path / META}: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != 1:
        raise InputError(
            f"{path / META} is not of format 1", "it was written by another version of this program"
        )
    return split_draft(meta)
