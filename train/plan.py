"""What training will cost, from the settings and the target's config.json alone: no model, no GPU."""

import difflib
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from configs.contract import require_same
from configs.eagle3 import IDS, new_config, usual_layers
from configs.errors import ConfigError, InputError, StoreError, StoreNotFoundError
from configs.run_dir import META, directory, find_weights, read_meta
from configs.schema import RunConfig, TrainConfig
from configs.target import target_config
from export.check import refuse_name
from export.checkpoint import Checkpoint
from export.keymap import draft_keymap
from featurestore import FeatureStore, steps_per_epoch
from train.batch import open_split
from train.cost import activation_bytes
from train.sparse import DENSE, Sparse, check_attention, form_of, mean_keys
from train.start import check_weights, stored_layers
from train.vocabulary import kept_tokens, stop_ids

__all__ = [
    "Plan",
    "check_initial",
    "check_prefixes",
    "check_sinks",
    "initial_weights",
    "is_frozen",
    "learning_rate_factor",
    "plan",
    "total_steps",
]

GIB = 2**30
INDEXER = "self_attn.indexer."
# learning rate of the paper's warm-up of the indexer
WARMUP_RATE = 1e-3
# a buffer, never trained
BIAS = "e_score_correction_bias"
# buffers of a pruned EAGLE-3 draft, which count as nothing
MAPS = ("d2t", "t2d")
# CUDA context, NCCL buffers, fragmentation
OVERHEAD_BYTES = 5 * GIB
# elements of one gradient bucket; its buffer is allocated whole
REDUCE_BUCKET = 500_000_000
# elements that DeepSpeed updates at once
SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Plan:
    """Sizes of a training run; `str()` gives the lines for a person.

    Attributes:
        anchors: most anchors of a micro-batch, of at most `train.tokens_per_rank` tokens.
        trainable, frozen: parameters of the layer.
        tables: elements of embedding and head.
        ranks: ranks over which ZeRO partitions.
        memory_bytes: peak memory of a rank, by use.
        state_bytes: states of a token that training reads.
        tokens_per_step: most tokens of an optimizer step.
        documents, tokens: what the store holds for training; None where there is no store yet.
        checkpoint_bytes, kept: size of a checkpoint, and how many lie on the disk at most.
        steps: optimizer steps; None where they depend on a store that is not there.
        missing: in words, what the dump has still to do.
        attention: in words.
    """

    anchors: int
    trainable: int
    frozen: int
    tables: int
    ranks: int
    memory_bytes: dict[str, int]
    state_bytes: int
    tokens_per_step: int
    documents: int | None
    tokens: int | None
    steps: int | None
    store: str
    checkpoint_bytes: int
    kept: int
    missing: str = ""
    attention: str = "dense"

    def __str__(self) -> str:
        uses = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.memory_bytes.items() if size)
        total = sum(self.memory_bytes.values()) / GIB
        if self.documents is None:
            data = f"no store at {self.store} yet, so the number of steps is open"
        else:
            data = f"{self.documents:,} documents, {self.tokens:,} tokens in {self.store}"
            data += f"\n{self.missing}: `layer61 dump` adds them" if self.missing else ""
        steps = f"{self.steps or 0:,} steps of at most {self.tokens_per_step:,} tokens"
        if self.steps is None:
            steps = (
                f"about {100e6 / self.tokens_per_step:,.0f} steps of {self.tokens_per_step:,} tokens for each"
                " 100 million tokens"
            )
        return (
            f"{self.trainable:,} parameters trained, {self.frozen:,} of the layer frozen,"
            f" {self.tables:,} in the target's embedding and head\n"
            f"memory of each of {self.ranks} ranks: at most {total:.1f} GiB ({uses}),\n"
            f"with {self.anchors:,} anchors among the tokens of a micro-batch, attention {self.attention}\n"
            f"a checkpoint is {self.checkpoint_bytes / GIB:.1f} GiB; at most {self.kept} lie on the disk,"
            f" with the best and one being written: {self.kept * self.checkpoint_bytes / GIB:.1f} GiB\n"
            f"{data}\n"
            f"{self.state_bytes:,} bytes of states read for a token\n"
            f"{steps}"
        )


def is_frozen(name: str, train: TrainConfig) -> bool:
    """Whether a parameter of the layer keeps its released values."""
    if name.startswith(INDEXER):
        return train.indexer == "frozen"
    return train.indexer == "warmup" or name.startswith(train.freeze)


def learning_rate_factor(name: str, train: TrainConfig) -> float:
    """What the learning rate of a parameter of the layer is multiplied by; the longest prefix decides."""
    if name.startswith(INDEXER):
        usual = WARMUP_RATE if train.indexer == "warmup" else train.learning_rate
        return (train.indexer_learning_rate or usual) / train.learning_rate
    prefixes = [prefix for prefix in train.learning_rate_of if name.startswith(prefix)]
    return train.learning_rate_of[max(prefixes, key=len)] if prefixes else 1.0


def check_prefixes(names: Collection[str], train: TrainConfig) -> None:
    """Refuse name prefixes that would do nothing.

    Args:
        names: the layer's parameters.
        train: `freeze` and `learning_rate_of` are read; what `freeze` is by default may match nothing.

    Raises:
        ConfigError: a prefix fits no parameter, or all are frozen to which it would give another rate.
    """
    if train.indexer == "frozen" and train.indexer_learning_rate is not None:
        raise ConfigError(
            "train.indexer_learning_rate is set, and train.indexer = 'frozen' trains no indexer",
            "set train.indexer to warmup or joint, or leave the rate out",
        )
    if train.indexer != "frozen":
        for prefix in train.freeze:
            if prefix != INDEXER and (INDEXER.startswith(prefix) or prefix.startswith(INDEXER)):
                raise ConfigError(
                    f"train.freeze: {prefix!r} covers the indexer, which train.indexer ="
                    f" {train.indexer!r} trains",
                    "name what else begins so, or set train.indexer to frozen",
                )
    default = TrainConfig.model_fields["freeze"].default
    trained = [name for name in names if not is_frozen(name, train)]
    for key, prefixes, among in (
        ("train.freeze", [p for p in train.freeze if p not in default], names),
        ("train.learning_rate_of", list(train.learning_rate_of), trained),
    ):
        for prefix in prefixes:
            if any(name.startswith(prefix) for name in among):
                continue
            if any(name.startswith(prefix) for name in names):
                raise ConfigError(
                    f"{key}: all that begins with {prefix!r} is frozen",
                    "remove it, or a prefix of train.freeze",
                )
            parts = {name[: i + 1] for name in names for i, c in enumerate(name) if c == "."} | set(names)
            near = difflib.get_close_matches(prefix, sorted(parts), n=3, cutoff=0.4)
            raise ConfigError(
                f"{key}: no parameter of the layer begins with {prefix!r}",
                f"names are those of the checkpoint without its layer prefix, for example"
                f" {', '.join(near or ['self_attn.o_proj.weight', 'mlp.experts.'])}",
            )
    if not trained:
        raise ConfigError("train.freeze leaves nothing to train", "remove a prefix from train.freeze")


def check_sinks(train: TrainConfig) -> None:
    """Refuse to log where the package for it is missing.

    Raises:
        ConfigError: which setting needs which package.
    """
    wanted = {"tensorboard": train.tensorboard, "wandb": train.wandb_project is not None}
    for package, key in (("tensorboard", "tensorboard"), ("wandb", "wandb_project")):
        if wanted[package] and find_spec(package) is None:
            raise ConfigError(
                f"train.{key} needs the package {package}, which is not installed",
                f"pip install {package}, or leave the setting out",
            )


def num_ranks(train: TrainConfig) -> int:
    """Ranks of the run: as many as the launcher has started, else `train.ranks`.

    Raises:
        ConfigError: RANK is set without a number of ranks.
    """
    if "RANK" not in os.environ:
        return train.ranks
    size = os.environ.get("WORLD_SIZE", "")
    if not size.isdecimal():
        raise ConfigError(
            f"RANK is set, as a launcher does, and WORLD_SIZE is {size!r}, not the number of ranks",
            "start with torchrun or deepspeed, or unset RANK",
        )
    return int(size)


def initial_weights(config: RunConfig, *, verify: bool) -> Path | None:
    """Directory of the tensors that `train.init_from` means; None for the released layer.

    Args:
        config: the settings.
        verify: read a checkpoint's weights and compare them with their checksums.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
        ConfigError: it was trained on documents that this run would call held out.
    """
    source = config.train.init_from
    if source is None:
        return None
    place, which = (source, "best") if directory(source).is_dir() else (config.run.dir, str(source))
    weights = find_weights(place, which, config.require_target(), verify=verify)
    described = next((p for p in (weights, weights.parent) if (p / META).exists()), None)
    meta = read_meta(described) if described else {}
    split, share, seed = meta.get("held_out"), config.prompts.held_out, config.run.seed
    if split and (split["seed"] != seed or split["share"] < share):
        raise ConfigError(
            f"train.init_from = {source} was trained with prompts.held_out = {split['share']} and run.seed ="
            f" {split['seed']}; with {share} and {seed} it would be evaluated on documents it was trained on",
            f"set prompts.held_out={split['share']} run.seed={split['seed']}",
        )
    return weights


def check_initial(weights: Path, store: FeatureStore) -> None:
    """Refuse weights of which it is said that they were trained for another target than the store's.

    Raises:
        ContractError: which target differs.
    """
    described = next((p for p in (weights, weights.parent) if (p / META).exists()), None)
    found = (read_meta(described).get("contract") or {}) if described else {}
    keys = [key for key in ("target", "norm_and_head_sha256") if key in found]
    require_same(
        {key: found[key] for key in keys},
        {key: store.contract[key] for key in keys},
        f"weights {weights} and store {store.url}",
        hint="start from weights that were trained for this target",
    )


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `train.max_steps`, or enough for `train.epochs`."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    return max(math.ceil(train.epochs * steps_per_epoch / train.gradient_accumulation_steps), 1)


def _memory(
    config: RunConfig,
    model: dict[str, Any],
    draft: dict[str, Any] | None,
    trainable: int,
    frozen: int,
    tables: int,
    anchors: int,
    longest: int,
    sparse: Sparse,
) -> dict[str, int]:
    """Bytes of one rank at its peak, by use: what stays, and the largest of what comes and goes.

    Of the layer stay this rank's partitions and, gathered, all of it. Beyond that there are three peaks: at
    the end of the forward everything autograd keeps, and the loss; at the end of the backward the rows from
    which the gradients of the experts are formed, these gradients and a bucket; in the update a group of
    gradients in float32 and the layer gathered anew. Tokens count where step 0 projects them, anchors where
    a step of the unroll goes on.

    Args:
        config, model: the settings and the target's config.json.
        draft: the config.json of an EAGLE-3 draft.
        trainable, frozen, tables: elements of the layer, and of embedding and head.
        anchors: most anchors of a micro-batch.
        longest: tokens of the longest document.
        sparse: how attention is.
    """
    train, ranks = config.train, num_ranks(config.train)
    size = 2 if train.dtype == "bfloat16" else 4
    D, F, E = model["hidden_size"], model["moe_intermediate_size"], model["n_routed_experts"]
    states = 1
    if draft is not None:
        F, E, states = draft["intermediate_size"], 1, 1 + len(draft[IDS])
    on_gpu = size == 2
    forward, left = activation_bytes(
        model,
        draft,
        tokens=train.tokens_per_rank,
        anchors=anchors,
        steps=train.num_steps,
        size=size,
        longest=longest,
        sparse=sparse.sparse,
        form=sparse.form,
        indexer=train.indexer,
    )
    experts = 3 * E * F * D
    backward = left + (experts + min(REDUCE_BUCKET, trainable)) * size
    update = min(trainable // ranks, SUB_GROUP) * 4 + trainable * size
    peaks = {
        "activations and loss": forward,
        "gradients of the experts and their rows": backward,
        "update": update,
    }
    largest = max(peaks, key=lambda name: peaks[name])
    return {
        "partitions of parameters, master copies, moments and gradients": (
            (trainable * (size + 4 + 8 + 4) + frozen * size) // ranks
        ),
        "layer": (trainable + frozen) * size,
        "embedding and head": tables * size,
        largest: peaks[largest],
        "batches read ahead": 0 if on_gpu else 4 * train.tokens_per_rank * states * D * size,
        "runtime": OVERHEAD_BYTES if on_gpu else GIB // 2,
    }


def _most_anchors(config: RunConfig, store: FeatureStore) -> int:
    """Most anchors that documents of at most `train.tokens_per_rank` tokens together can have."""
    train, chosen = config.train, ~store.held_out
    length, wanted = store.length[chosen].astype(np.int64), store.n_loss[chosen].astype(np.int64)
    # each run of wanted tokens reaches back over as many places as there are steps; one run a document
    anchors = np.minimum(wanted + train.num_steps - 1, length)
    order = np.argsort(-anchors / length, kind="stable")
    filled = np.minimum(np.cumsum(length[order]), train.tokens_per_rank)
    share = (anchors / length)[order]
    return math.ceil(float((np.diff(filled, prepend=0) * share).sum()))


def plan(config: RunConfig) -> Plan:
    """Work out what `layer61 train` will do.

    Raises:
        ConfigError: `target.path` is not set, a setting would do nothing or needs a package that
            is missing, or vLLM would not load the export from where it will lie.
        InputError: config.json describes another architecture, or a file is in the place of the checkpoints.
        StoreError: there is a store and it cannot be read.
    """
    train = config.trained
    if (place := directory(config.run.dir)).exists() and not place.is_dir():
        raise InputError(f"{place} is a file; checkpoints go into a directory", "move it out of the way")
    if train.draft == "mtp":
        refuse_name(config.export_dir)  # now, not after the days that training takes
    model = target_config(config.require_target(), planning=True)
    store = _open(config)
    draft, layers = None, []
    if train.draft != "mtp":
        there = None if store is None else stored_layers(store, model)
        layers = there or list(config.dump.aux_layers) or usual_layers(model)
        draft = new_config(config, model, layers)
        if (size := config.eagle3.draft_vocab_size) is not None:
            # which tokens they are is counted later; how many there may be is known
            none = np.zeros(model["vocab_size"], np.int64)
            kept_tokens(none, size, stop_ids(model), "eagle3.draft_vocab_size")
    trainable = frozen = 0
    ops = draft_keymap(model, draft)
    check_sinks(train)
    weights = initial_weights(config, verify=False)
    if weights is not None and config.require_target().exists():
        check_weights(weights, Checkpoint(config.require_target()), draft)
    for op in ops:
        count = math.prod(op.shape)
        if op.training in MAPS:
            continue
        if op.training.endswith(BIAS) or is_frozen(op.training, train):
            frozen += count
        else:
            trainable += count
    tables = 2 * model["vocab_size"] * model["hidden_size"]
    data = _data(config, store)
    # without a store every token may be an anchor
    anchors = data.pop("anchors") or train.tokens_per_rank
    longest = data.pop("longest") or config.prompts.max_length
    keys = data.pop("keys") or longest - config.prompts.max_answer_tokens / 2
    sparse = DENSE
    if check_attention(train, model, longest):
        kind = "cuda" if train.dtype == "bfloat16" else "cpu"
        sparse = Sparse(True, form_of(keys, model["index_topk"], kind))
    # last: without an indexer a warm-up would be said to train nothing
    check_prefixes([op.training for op in ops if not op.training.endswith((BIAS, *MAPS))], train)
    return Plan(
        anchors=anchors,
        trainable=trainable,
        frozen=frozen,
        tables=tables,
        ranks=num_ranks(train),
        memory_bytes=_memory(config, model, draft, trainable, frozen, tables, anchors, longest, sparse),
        # bfloat16
        state_bytes=2 * (1 + len(layers)) * model["hidden_size"],
        attention=("gathered sparse" if sparse.form else "masked sparse") if sparse.sparse else "dense",
        tokens_per_step=train.tokens_per_rank * num_ranks(train) * train.gradient_accumulation_steps,
        # master weights and two moments; what is served, in bfloat16
        checkpoint_bytes=12 * trainable + 2 * (trainable + frozen),
        kept=train.keep_checkpoints + 2,
        **data,
    )


def _open(config: RunConfig) -> FeatureStore | None:
    """The store, None where there is none yet."""
    try:
        return open_split(config)
    except StoreNotFoundError:
        return None


def _data(config: RunConfig, store: FeatureStore | None) -> dict[str, Any]:
    """Documents, tokens and steps, as far as the store is there."""
    path, train = config.train_store_path, config.train
    if store is None:
        return {
            "anchors": None,
            "longest": None,
            "keys": None,
            "documents": None,
            "tokens": None,
            "steps": train.max_steps,
            "store": path,
        }
    chosen = ~store.held_out
    lengths = store.length[chosen]
    if not len(lengths):
        raise StoreError(
            f"{path} has no documents to train on", "lower prompts.held_out, or add conversations"
        )
    steps = steps_per_epoch(
        store.uid[chosen],
        lengths,
        tokens_per_rank=train.tokens_per_rank,
        world_size=num_ranks(train),
        seed=config.run.seed,
    )
    return {
        "anchors": _most_anchors(config, store),
        "longest": int(store.length.max()),
        "keys": mean_keys(store),
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "steps": total_steps(config, steps),
        "store": path,
        "missing": store.missing,
    }
