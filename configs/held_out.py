"""Which conversations are kept from training: a pure function of the conversation, the share and the seed.

A document's uid is 64 bits; the upper 32 are its *group*, a hash of the conversation as it stands in the
input and of nothing else. All documents of a conversation share a group, whatever answers them, so they are
held out together, by every stage. A training run records share and seed with which it began: what is called
held out in its directory from then on is what it was not trained on, or is refused.
"""

import hashlib
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from configs.errors import ConfigError
from configs.files import read_json
from configs.run_dir import HELD_OUT, committed, read_meta

__all__ = ["describe", "is_held_out", "read_record", "require_recorded", "uid_group"]

Uids = TypeVar("Uids", int, np.ndarray)


def uid_group(uid: Uids) -> Uids:
    """The upper 32 bits of uids, uint64 [N] or one int: the hash of the conversation."""
    return uid >> (np.uint64(32) if isinstance(uid, np.ndarray) else 32)


@overload
def is_held_out(group: int, share: float, seed: int) -> bool: ...
@overload
def is_held_out(group: np.ndarray, share: float, seed: int) -> np.ndarray: ...


def is_held_out(group: int | np.ndarray, share: float, seed: int) -> bool | np.ndarray:
    """Whether conversations are kept from training.

    Args:
        group: 32-bit hashes of conversations, uint64 [N] or one int.
        share: of all conversations, in [0, 1]. A larger share holds out the same ones and more.
        seed: another seed holds out others.

    Returns:
        bool [N], or one bool for an int.
    """
    groups = np.atleast_1d(np.asarray(group, np.uint64))
    key = _mix(np.array([seed % 2**64], np.uint64))
    # of 64 mixed bits the upper 32 are compared, so that a share of 1 holds out all
    found = (_mix(groups ^ key) >> np.uint64(32)).astype(np.float64) < share * 2.0**32
    return found if isinstance(group, np.ndarray) else bool(found[0])


def describe(uids: np.ndarray, share: float, seed: int) -> dict[str, Any]:
    """What a run records of its held-out set: the rule, and what it gave for these uids, uint64 [N]."""
    chosen = is_held_out(uid_group(uids), share, seed)
    held_out = np.sort(uids[chosen])
    return {
        "format": 1,
        "share": share,
        "seed": seed,
        "held_out_documents": len(held_out),
        "training_documents": len(uids) - len(held_out),
        "sha256": hashlib.sha256(held_out.astype("<u8").tobytes()).hexdigest(),
    }


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """`held_out.json` of a run, or what its newest checkpoint says; None where neither is there.

    Raises:
        ConfigError: it is damaged.
    """
    path = Path(run_dir) / HELD_OUT
    if not path.exists():
        whole = committed(run_dir)
        return read_meta(whole[-1]).get("held_out") if whole else None
    try:
        record = read_json(path)
        if record["format"] != 1 or not 0 <= record["share"] <= 1 or type(record["seed"]) is not int:
            raise ValueError("it is not of format 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = "it is not of format 1" if isinstance(error, KeyError | TypeError) else error
        raise ConfigError(
            f"cannot read {path}, which says what this run was not trained on: {why}",
            "remove it: each checkpoint says the same, and the newest one is asked then",
        ) from None
    return record


def require_recorded(run_dir: Path, uids: np.ndarray, share: float, seed: int) -> None:
    """Refuse settings that hold out other documents than the training in this run directory did.

    Args:
        run_dir: of the run.
        uids: of the documents at hand, uint64 [N].
        share, seed: `prompts.held_out` and `run.seed`.

    Raises:
        ConfigError: says how many of them each holds out, and how many the run was trained on.
    """
    record = read_record(run_dir)
    if record is None or (record["share"], record["seed"]) == (share, seed):
        return
    groups = uid_group(uids)
    mine, theirs = is_held_out(groups, share, seed), is_held_out(groups, record["share"], record["seed"])
    raise ConfigError(
        f"prompts.held_out = {share} and run.seed = {seed} hold out {mine.sum():,} of {len(uids):,}"
        f" documents, but the training in {run_dir} held out {theirs.sum():,}, with {record['share']} and"
        f" {record['seed']}: {(mine & ~theirs).sum():,} of yours are among those it trains on",
        f"set prompts.held_out={record['share']} run.seed={record['seed']}, or choose another run directory",
    )


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every bit of the input changes half of the output."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
