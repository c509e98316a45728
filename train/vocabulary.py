"""The tokens of a pruned draft: those that the store's answers need most.

Legend: V vocabulary, N tokens kept.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import contract
from configs.errors import ConfigError
from configs.progress import task
from configs.schema import RunConfig
from configs.target import target_config
from featurestore import FeatureStore
from train.batch import open_split

__all__ = ["choose", "describe", "kept_tokens", "stop_ids", "token_counts"]


def token_counts(store: FeatureStore, vocab_size: int) -> np.ndarray:
    """How often each token stands in the answers of the training documents, int64 [V]; reads no states."""
    counts = np.zeros(vocab_size, np.int64)
    parts = len(store.manifest["parts"])
    with task("vocabulary", parts, "parts") as bar:
        for number in range(parts):
            counts += np.bincount(store.masked_in(number), minlength=vocab_size)
            bar.advance(1)
    return counts


def kept_tokens(counts: np.ndarray, size: int, stop_ids: Iterable[int], key: str) -> Tensor:
    """The token ids to keep, ascending int64 [N]: the most frequent, the lower one of equals, and the stops.

    Args:
        counts: from `token_counts`.
        size: tokens to keep.
        stop_ids: tokens that are kept however rare they are.
        key: the setting that asks, for the message.

    Raises:
        ConfigError: there are not more tokens than that, or fewer asked for than there are stops.
    """
    if size >= len(counts):
        raise ConfigError(
            f"{key} = {size:,}: the target has {len(counts):,} tokens", f"leave {key} out to keep them all"
        )
    first = list(dict.fromkeys(stop_ids))
    if len(first) > size:
        raise ConfigError(f"{key} = {size:,} leaves no room for the {len(first)} stop tokens")
    weighed = counts.astype(np.float64)
    weighed[first] = np.inf
    # the sort is stable: of equal counts the lower id comes first
    return torch.from_numpy(np.sort(np.argsort(-weighed, kind="stable")[:size]).astype(np.int64))


def stop_ids(target: dict[str, Any]) -> list[int]:
    """Tokens that end an answer, by config.json of the target."""
    eos = target.get("eos_token_id")
    return [eos] if isinstance(eos, int) else list(eos or [])


def choose(config: RunConfig, size: int) -> Tensor:
    """What `export.draft_vocab_size` keeps, by the store that the draft was trained from.

    Raises:
        ConfigError: as `kept_tokens`. StoreNotFoundError: there is no store.
    """
    target = target_config(config.require_target())
    counts = token_counts(open_split(config), target["vocab_size"])
    return kept_tokens(counts, size, stop_ids(target), "export.draft_vocab_size")


def describe(keep_N: Tensor | None) -> contract.Vocabulary | None:
    """What a draft's contract says of its tokens."""
    return None if keep_N is None else contract.vocabulary(keep_N.tolist())
