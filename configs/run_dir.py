"""The names in a run directory; which checkpoints are whole. Reads names and sizes, never a tensor.

RUN/
  config.VERB.json     settings under which a verb was first started; later starts are compared with them
  store/               the feature store (docs/store.md)
  dump.json            dump: what the last start captured, kept and rejected; dump.2-of-8.json of that worker
  rejects.jsonl        dump: conversations left out, and why
  probe.npz            dump: one document's states at the first start of an engine
  engine.1-of-1.log    dump: what the engine of that worker prints; engine.1-of-1.ray-2.log over Ray
  engine.check-vllm.log  dump --check: what that engine prints, and its view.check-vllm
  view.1-of-1/         dump: the target without sparse attention, as links, for that worker's engine
  held_out.json        train: share and seed of the held-out set, decided at its first start, and its size
  metrics.jsonl        train: one line a step
  metrics.jsonl.damaged  train: lines of metrics.jsonl that could not be read at a later start
  tensorboard/         train: the same for TensorBoard, with train.tensorboard
  wandb/               train: the same as Weights & Biases keeps it, with train.wandb_project
  checkpoints/
    latest             name of the newest checkpoint, one line, replaced by rename
    best.json          {"format": 1, "checkpoint": name, "acceptance_length"} by offline acceptance
    step_000200/
      COMMIT.json      written last: {"format": 2, "files": {name: {"bytes", "crc32c"}}, "files_sha256"}
      layer61.json     {"format": 2, "step", "ranks", "contract", "draft", "loader", "metrics", "state"}
      weights/         the layer under its checkpoint names: a safetensors file a rank and their index
      state/           master weights and moments, float32: a safetensors file a rank
    .step_000200.partial   being written or removed; an interrupted one is removed at the next start
    step_000200.damaged    not whole, or with damaged bytes, and therefore out of the way; never removed
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

import itertools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.contract import split_draft
from configs.errors import InputError
from configs.files import check_size, read_json, sha256_json, verify_files, write_json

__all__ = [
    "BEST",
    "COMMIT",
    "DUMPS",
    "EVALUATIONS",
    "EXPORT",
    "HELD_OUT",
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
    "begun_parts",
    "clean",
    "committed",
    "directory",
    "dump_figures",
    "dump_lock",
    "engine_log",
    "evaluation",
    "find_weights",
    "locate",
    "partial",
    "read_best",
    "read_commit",
    "read_export",
    "read_meta",
    "score",
    "set_aside",
    "settings",
    "tag",
    "verb_lock",
    "view",
    "write_commit",
]

STORE = "store"
REJECTS = "rejects.jsonl"
PROBE = "probe.npz"
HELD_OUT = "held_out.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SETTINGS = "config.*.json"
EVALUATIONS = "evaluate.*.json"
DUMPS = "dump*.json"
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
TAG = re.compile(r"^step_\d{6,}$")
# what only a save of ours can leave behind
PARTIAL = re.compile(r"^\.(step_\d{6,}|(best\.json|latest)\.\d+)\.partial$")


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


def dump_figures(run_dir: Path, worker: str) -> Path:
    """What the last dump of `dump.worker` k/n captured, kept and rejected."""
    return Path(run_dir) / ("dump.json" if worker == "1/1" else f"dump.{worker.replace('/', '-of-')}.json")


def dump_lock(run_dir: Path, worker: str) -> Path:
    """Held by the dump of `dump.worker` k/n while it runs an engine."""
    return Path(run_dir) / f"dump.{worker.replace('/', '-of-')}.lock"


def begun_parts(run_dir: Path, worker: str) -> Path:
    """Names of the parts that the dump of `dump.worker` k/n has begun, one a line, until it ends well."""
    return Path(run_dir) / f"dump.{worker.replace('/', '-of-')}.parts"


def verb_lock(run_dir: Path, verb: str) -> Path:
    """Held by a verb while it works in the run directory."""
    return Path(run_dir) / f".{verb}.lock"


def directory(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def tag(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def partial(path: Path) -> Path:
    """Where a checkpoint is while it is written or removed."""
    return path.with_name(f".{path.name}.partial")


def write_commit(path: Path, files: Mapping[str, Any]) -> None:
    """Make a directory of finished files a checkpoint; `files` as `configs.files.verify_files` takes them."""
    write_json(path / COMMIT, {"format": 2, "files": files, "files_sha256": sha256_json(files)})


def read_commit(path: Path) -> dict[str, Any]:
    """The files of a whole checkpoint, as `configs.files.verify_files` takes them.

    Sizes are compared, and the bytes of `layer61.json`; those of the large files are left to who reads them.

    Raises:
        InputError: a file is missing or has another size, or the commit itself is missing or damaged.
    """
    try:
        commit = read_json(path / COMMIT)
        files = dict(commit["files"])
        # of format 1 nothing but sizes was noted
        if commit["format"] != 1 and commit["files_sha256"] != sha256_json(files):
            raise ValueError("its list of files fails its checksum")
    except FileNotFoundError:
        raise InputError(f"{path} has no {COMMIT}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / COMMIT} is damaged: {error}") from None
    for name, entry in files.items():
        check_size(path / name, entry)
    verify_files(path, files, [META] if META in files else [])
    return files


def _is_whole(path: Path) -> bool:
    try:
        read_commit(path)
    except (OSError, InputError):
        return False
    return True


def _steps(run_dir: Path) -> list[Path]:
    """Directories with a checkpoint's name, oldest first."""
    root = directory(run_dir)
    found = [p for p in root.iterdir() if TAG.match(p.name) and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def committed(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first; half-made and damaged ones do not count."""
    return [p for p in _steps(run_dir) if _is_whole(p)]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is none any more; nothing of it is lost."""
    taken = (path.with_name(f"{path.name}.damaged{n}") for n in itertools.chain([""], itertools.count(2)))
    aside = next(p for p in taken if not p.exists())
    path.rename(aside)
    return aside


def clean(run_dir: Path) -> list[str]:
    """Remove what an interrupted save left behind and set damaged checkpoints aside.

    Only names that a save alone can have made are removed; all else in the directory is somebody's.

    Returns:
        A message for each change.
    """
    said, root = [], directory(run_dir)
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if PARTIAL.match(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            said.append(f"removed {path}, which an interrupted save left behind")
    for path in _steps(run_dir):
        try:
            read_commit(path)
        except InputError as error:
            said.append(f"{error.message}; the checkpoint is kept as {set_aside(path)}")
    return said


def _available(run_dir: Path) -> str:
    """For a hint: what can be named instead."""
    whole, best = [p.name for p in committed(run_dir)], read_best(run_dir)
    if not whole:
        return f"run layer61 train first, with run.dir={run_dir}"
    named = f", best ({best['checkpoint']})" if best and best["checkpoint"] in whole else ""
    return f"there are: last ({whole[-1]}){named}, {', '.join(whole)}; released is the target's own layer"


def locate(run_dir: Path, which: str) -> Path:
    """Find a checkpoint of a run by `last`, `best`, its name (`step_000200`) or path.

    `best` is the newest one where no checkpoint was evaluated.

    Raises:
        InputError: there is no such checkpoint, or it is not whole.
    """
    root = directory(run_dir)
    if which not in ("last", "best"):
        path = root / which if TAG.match(which) else Path(which)
        if not path.exists():
            raise InputError(f"there is no checkpoint {path}", _available(run_dir))
        try:
            read_commit(path)
        except InputError as error:
            raise InputError(f"{path} is no whole checkpoint: {error.message}", _available(run_dir)) from None
        return path
    whole = committed(run_dir)
    if not whole:
        raise InputError(f"{root} holds no whole checkpoint", _available(run_dir))
    if which == "last":
        return whole[-1]
    if not (root / BEST).exists() and all(score(p) is None for p in whole):
        return whole[-1]
    best = read_best(run_dir)
    if best is None:
        raise InputError(
            f"{root / BEST} is missing or damaged, so the best checkpoint is not known", _available(run_dir)
        )
    if root / best["checkpoint"] not in whole:
        raise InputError(
            f"{root / BEST} names {best['checkpoint']}, which is missing or not whole", _available(run_dir)
        )
    return root / best["checkpoint"]


def find_weights(run_dir: Path, which: str, target: Path, *, verify: bool = True) -> Path:
    """Directory of the tensors that `evaluate.checkpoint` or `export.checkpoint` means.

    Args:
        run_dir: the run whose checkpoints `best`, `last` and names mean.
        which: `best`, `last`, `released`, a checkpoint, or any directory of tensors with checkpoint names.
        target: the target, which holds the released layer.
        verify: read a checkpoint's weights and compare them with their checksums.

    Raises:
        InputError: as `locate`, or a file of the weights is damaged.
    """
    if which == "released":
        return target
    if not which.strip():
        raise InputError("the name of the checkpoint is empty", _available(run_dir))
    path = Path(which)
    if path.name == WEIGHTS and (path.parent / COMMIT).exists():
        path = path.parent
    if which in ("last", "best") or TAG.match(which) or (path / COMMIT).exists():
        path = locate(run_dir, which if path == Path(which) else str(path))
        if verify:
            files = read_commit(path)
            verify_files(path, files, [name for name in files if name.startswith(f"{WEIGHTS}/")])
        return path / WEIGHTS
    if not path.is_dir():
        raise InputError(
            f"there is no checkpoint {which} and no directory {path.absolute()}", _available(run_dir)
        )
    if verify and (path / META).is_file():
        read_export(path)
    return path


def read_export(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """`layer61.json` of an export.

    Args:
        path: the directory.
        verify: read its files and compare them with their checksums.

    Raises:
        InputError: it is no export of this program, or a file is missing or damaged.
    """
    try:
        manifest = read_json(path / META)
        files, _ = dict(manifest["files"]), manifest["identity"]["weights"]
        noted = manifest.get("sha256")
    except FileNotFoundError:
        raise InputError(f"{path} is no export: it has no {META}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / META} is damaged: {error}") from None
    # earlier ones hold sizes alone
    if noted is not None and noted != sha256_json({k: v for k, v in manifest.items() if k != "sha256"}):
        raise InputError(f"{path / META} is damaged: it fails its checksum")
    if verify:
        verify_files(path, files)
    return manifest


def score(path: Path) -> float | None:
    """Offline acceptance length of a whole checkpoint; None where it was not evaluated."""
    return read_meta(path)["metrics"].get("acceptance_length")


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """`best.json` of a run; None where it is missing or damaged."""
    try:
        best = read_json(directory(run_dir) / BEST)
        return best if isinstance(best["checkpoint"], str) and best["acceptance_length"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_meta(path: Path) -> dict[str, Any]:
    """Parse `layer61.json` of a checkpoint or an export; an older one is brought to today's form.

    Raises:
        InputError: missing, malformed, or of another format.
    """
    try:
        meta = read_json(path / META)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path / META}: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") not in (1, 2):
        raise InputError(
            f"{path / META} is of no known format", "it was written by another version of this program"
        )
    return split_draft(meta)
