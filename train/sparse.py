"""Whether the attention of a run is sparse, and in which form: decided once from its store, for all ranks.

Every rank must run the same modules in the same order, whatever the documents of its batch: one that left out
the indexer because its documents are short would wait for the others forever.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import device

from configs.errors import ConfigError
from configs.schema import TrainConfig
from featurestore import FeatureStore

__all__ = ["DENSE", "Sparse", "check_attention", "decide", "form_of", "mean_keys"]

# index heads from which on no two candidates of a row scored alike (random weights); with 4, one row in
# twenty has a tie at exactly 0, which each server resolves in its own way
LEAST_HEADS = 8
# how many times index_topk keys an anchor sees on average, from which on gathering what it keeps takes less
# time than masking the rest, by type of device: benchmarks/attention.py on CPU; on CUDA by arithmetic alone
GATHER_FROM = {"cpu": 20, "cuda": 7}


class Sparse(NamedTuple):
    """How a run attends.

    Attributes:
        sparse: by the indexer, as served; else to every key.
        form: of the unroll's attention; None for the device's default.
    """

    sparse: bool
    form: str | None


DENSE = Sparse(False, None)


def check_attention(train: TrainConfig, model: Mapping[str, Any], longest: int) -> bool:
    """Whether attention is sparse.

    The last token of a document of T tokens is predicted from T - 2 candidates at most, so dense and sparse
    are one function up to index_topk + 2 tokens.

    Args:
        train: `draft`, `attention` and `indexer` are read.
        model: the target's config.json.
        longest: tokens of the longest document.

    Raises:
        ConfigError: the target's indexer cannot do what the settings or the documents need.
    """
    topk = model.get("index_topk") or 0
    wanted = train.attention == "sparse" or train.indexer != "frozen"
    key = (
        "train.attention = 'sparse'" if train.attention == "sparse" else f"train.indexer = {train.indexer!r}"
    )
    if train.draft != "mtp" or not topk:
        if wanted:
            why = "an EAGLE-3 draft" if train.draft != "mtp" else "the target's config.json (no index_topk)"
            raise ConfigError(f"{key} needs an indexer, and {why} has none", "leave the setting out")
        # dense at any length
        return False
    if model.get("index_share_for_mtp_iteration"):
        raise ConfigError(
            "the target's config.json sets index_share_for_mtp_iteration: its server chooses keys at the"
            " first draft step only, never among a draft's own; here each step chooses anew, as DeepSeek-V3.2"
            " is served by default",
            "serve and train with index_share_for_mtp_iteration = false",
        )
    differs = longest > topk + 2
    if train.attention == "dense" and differs:
        raise ConfigError(
            f"train.attention = 'dense', and the longest document has {longest:,} tokens: beyond index_topk ="
            f" {topk:,} the target and its draft are served with sparse attention",
            f"set train.attention to auto, or dump with prompts.max_length = {topk} or less",
        )
    sparse = train.attention == "sparse" or (train.attention == "auto" and differs)
    if sparse and model["index_n_heads"] < LEAST_HEADS:
        raise ConfigError(
            f"the target has index_n_heads = {model['index_n_heads']}: many keys of such an indexer score"
            f" alike, and which of them a server keeps is chance; expected {LEAST_HEADS} or more",
            f"dump with prompts.max_length = {topk} or less, or build a target with more index heads",
        )
    if sparse and model.get("indexer_rope_interleave"):
        raise ConfigError(
            "the target's config.json sets indexer_rope_interleave; the indexer here rotates half against"
            " half, as DeepSeek-V3.2 does",
            f"dump with prompts.max_length = {topk} or less",
        )
    return sparse


def mean_keys(store: FeatureStore) -> float:
    """Keys that the anchors of a store see on average: answers stand at the ends of documents."""
    length, wanted = store.length.astype(np.float64), store.n_loss.astype(np.float64)
    return float(((length - wanted / 2) * wanted).sum() / max(wanted.sum(), 1))


def form_of(keys: float, topk: int, kind: str) -> str | None:
    """The form of sparse attention where anchors see so many keys; None for the default of the device."""
    return "gather" if keys >= GATHER_FROM[kind] * topk else None


def decide(train: TrainConfig, model: Mapping[str, Any], store: FeatureStore, where: device) -> Sparse:
    """How a run over a store attends; of all its documents, so that training and evaluation agree.

    Raises:
        ConfigError: as `check_attention`.
    """
    if not check_attention(train, model, int(store.length.max(initial=0))):
        return DENSE
    return Sparse(True, form_of(mean_keys(store), model["index_topk"], where.type))
