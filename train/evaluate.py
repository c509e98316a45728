"""Offline acceptance: how many of a draft's tokens the target would take, from stored states alone.

A server drafts K tokens after each token it knows, keeps those that equal the target's greedy ones up to the
first that does not, and goes on after the token that the target gives there. `tally` repeats this walk over
the answers of held-out documents, so that its acceptance length is the one a server measures; beside it
stands the mean over all anchors, which weighs hard places less than a server does.

Legend: T tokens, S = K draft steps, M predicted tokens.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import run_dir
from configs.errors import StoreNotFoundError
from configs.files import write_json
from configs.progress import task
from configs.schema import RunConfig
from featurestore import FeatureStore
from train.batch import Packed, check_contract, check_lengths, held_out, open_split, pack, state_columns
from train.draft import Draft
from train.loss import HeadLoss
from train.model import load_layer
from train.unroll import Scored

__all__ = ["Tally", "measure", "plan", "ready", "run", "tally"]


class Tally(NamedTuple):
    """Counts that add up over documents; every entry float64, [S] but for the scalars.

    Attributes:
        at_risk: drafts of the walk that reached each step: all earlier steps accepted, the target's token
            here known.
        accepted: those accepted at the step as well.
        any_at_risk, any_accepted: the same over all anchors instead of the walk's.
        overlap: sum over anchors of the product of min(p, q) sums up to each step, anchors with all K steps.
        anchors: number of those anchors.
        tokens: answer tokens.
        documents: documents.
    """

    at_risk: np.ndarray
    accepted: np.ndarray
    any_at_risk: np.ndarray
    any_accepted: np.ndarray
    overlap: np.ndarray
    anchors: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray

    @classmethod
    def zeros(cls, num_steps: int) -> "Tally":
        """Nothing counted yet."""
        return cls(*(np.zeros(num_steps) for _ in range(5)), *(np.zeros(1) for _ in range(3)))

    def plus(self, other: "Tally") -> "Tally":
        """The counts of both."""
        return Tally(*map(np.add, self, other))

    def result(self) -> dict[str, Any]:
        """Acceptance as a JSON object.

        The share accepted through step k is the product of the shares at each step of those still alive:
        near the end of an answer a draft's last targets are unknown, and it counts for the steps it has.
        """
        through = np.cumprod(self.accepted / np.maximum(self.at_risk, 1))
        alike = np.cumprod(self.any_accepted / np.maximum(self.any_at_risk, 1))
        overlap = self.overlap / np.maximum(self.anchors, 1)
        return {
            "acceptance_length": float(1 + through.sum()),
            "acceptance_per_position": through.tolist(),
            "all_anchors_acceptance_length": float(1 + alike.sum()),
            "all_anchors_acceptance_per_position": alike.tolist(),
            "overlap_acceptance_length": float(1 + overlap.sum()),
            "documents": int(self.documents[0]),
            "tokens": int(self.tokens[0]),
            "drafts": int(self.at_risk[0]),
        }


def _answers(mask: np.ndarray, start: int, end: int) -> list[tuple[int, int]]:
    """Runs [a, b) of masked-in tokens in rows [start, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[start:end].astype(np.int8), [0]]))) + start
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def tally(agree_SM: Tensor, overlap_SM: Tensor, scored: Scored, batch: Packed) -> list[Tally]:
    """Count the drafts of every answer of a batch, document by document.

    The token at row m is known, the anchor is m - 1, and step s predicts row m + 1 + s. A server's first
    draft of an answer comes after its first token, the next one after what was accepted and one token more.

    Args:
        agree_SM: bool, draft and target have the same arg-max.
        overlap_SM: float32, sum of min(p, q).
        scored: the predictions, by token.
        batch: the documents.
    """
    num_steps = len(agree_SM)
    T = len(batch.input_ids)
    mask = batch.loss_mask.cpu().numpy()
    rows = scored.tokens.cpu().numpy()
    agree = np.zeros((num_steps, T), bool)
    overlap = np.zeros((num_steps, T))
    agree[:, rows] = (agree_SM & scored.valid).cpu().numpy()
    overlap[:, rows] = overlap_SM.double().cpu().numpy()
    found = []
    bounds = batch.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        counts = Tally.zeros(num_steps)
        found.append(counts)
        counts.documents[:] += 1
        for a, b in _answers(mask, start, end):
            counts.tokens[:] += b - a
            next_walk = a
            for m in range(max(a, start + 1), b - 1):
                known = min(num_steps, b - 1 - m)
                accepted = 0
                while accepted < known and agree[accepted, m + 1 + accepted]:
                    accepted += 1
                tried = min(accepted + 1, known)
                counts.any_at_risk[:tried] += 1
                counts.any_accepted[:accepted] += 1
                if m >= next_walk:
                    counts.at_risk[:tried] += 1
                    counts.accepted[:accepted] += 1
                    next_walk = m + accepted + 1
                if known == num_steps:
                    chances = [overlap[s, m + 1 + s] for s in range(num_steps)]
                    counts.overlap[:] += np.cumprod(chances)
                    counts.anchors[:] += 1
    return found


def _batches(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Split documents into batches of at most `capacity` tokens; a longer document is a batch of its own."""
    out: list[list[int]] = []
    used = capacity
    for place, length in enumerate(lengths):
        if used + length > capacity and (used or not out):
            out.append([])
            used = 0
        out[-1].append(place)
        used += length
    return out


def _read(store: FeatureStore, documents: np.ndarray, states: list[int]) -> Packed:
    """The documents as stored, for `pack`: hidden [T, states, D]."""
    read = [store.read(int(i), states=states) for i in documents]
    if not read:
        empty = torch.zeros(0, dtype=torch.int64)
        none = torch.zeros(0, len(states), store.hidden_size)
        return Packed(empty, empty.bool(), empty.int(), none, none)
    lengths = torch.tensor([0, *(len(d.input_ids) for d in read)], dtype=torch.int32)
    hidden = torch.cat([d.hidden for d in read])
    return Packed(
        torch.cat([d.input_ids for d in read]),
        torch.cat([d.loss_mask for d in read]),
        lengths.cumsum(0).int(),
        hidden,
        hidden,
    )


def measure(
    forward: Callable[[Packed, Scored, Tensor], HeadLoss],
    store: FeatureStore,
    documents: np.ndarray,
    num_steps: int,
    *,
    aux_layers: Sequence[int] = (),
    tokens_per_batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    add_up: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Acceptance of a draft on some documents; with several ranks all call this and get the same result.

    Args:
        forward: `Draft` or an engine around one.
        store: the store.
        documents: document numbers.
        num_steps: draft tokens K.
        aux_layers: layers whose inputs the draft starts from; none for an MTP layer.
        tokens_per_batch: token budget of a forward pass.
        dtype, device: of the layer.
        rank, world_size: this rank and the number of ranks; each takes every `world_size`-th document.
        add_up: sums a tensor over the ranks; needed with more than one.
        progress: called with the number of documents done.

    Returns:
        `Tally.result` of all documents and, where they come from several sources, of each in `by_source`.
    """
    slices = [documents[r::world_size] for r in range(world_size)]
    plans = [[mine[b] for b in _batches(store.length[mine], tokens_per_batch)] for mine in slices]
    # every rank makes as many passes as the busiest one
    passes = max(len(p) for p in plans)
    sources = store.source
    counts = {name: Tally.zeros(num_steps) for name in sorted(set(sources[documents]))}
    states = state_columns(store.contract, aux_layers)
    with torch.no_grad():
        for number in range(passes):
            mine = plans[rank][number] if number < len(plans[rank]) else documents[:0]
            batch = pack(_read(store, mine, states), dtype, device)
            scored = batch.scored(num_steps)
            found = forward(batch, scored, scored.valid.float())
            if len(mine):
                tallies = tally(found.agree, found.overlap, scored, batch)
                for name, one in zip(sources[mine], tallies, strict=True):
                    counts[name] = counts[name].plus(one)
                if progress is not None:
                    progress(len(mine))
    if add_up is not None and counts:
        # every rank knows the same sources in the same order
        rows = torch.from_numpy(np.stack([np.concatenate(one) for one in counts.values()]))
        ends = np.cumsum([len(x) for x in Tally.zeros(num_steps)])[:-1]
        added = add_up(rows.to(device)).cpu().numpy()
        counts = {name: Tally(*np.split(row, ends)) for name, row in zip(counts, added, strict=True)}
    result = functools.reduce(Tally.plus, counts.values(), Tally.zeros(num_steps)).result()
    if len(counts) > 1:
        result["by_source"] = {name: one.result() for name, one in counts.items()}
    return result


def plan(config: RunConfig) -> str:
    """One line: what `layer61 evaluate` will measure."""
    try:
        store = open_split(config)
    except StoreNotFoundError:
        return f"acceptance of a checkpoint; there is no store at {config.train_store_path} yet"
    documents = held_out(store, config.evaluate.max_documents)
    tokens = int(store.n_loss[documents].sum())
    return (
        f"acceptance of the {config.evaluate.checkpoint} checkpoint with"
        f" {config.evaluate.num_speculative_tokens} draft tokens on {len(documents):,} held-out documents,"
        f" {tokens:,} answer tokens"
    )


def ready(config: RunConfig) -> None:
    """Raises what `run` would: there is no store, or no such checkpoint."""
    open_split(config)
    run_dir.find_weights(config.run.dir, config.evaluate.checkpoint, config.require_target(), verify=False)


def run(config: RunConfig) -> dict[str, Any]:
    """Measure a checkpoint on the held-out documents and write `RUN/evaluate.NAME.json`.

    Returns:
        acceptance_length and acceptance_per_position as a server would measure them, the same over all
        anchors alike, overlap_acceptance_length for sampled drafts, counts, and which weights were measured.

    Raises:
        ContractError: the store was not dumped from this target.
        InputError: there is no such checkpoint.
        ConfigError: there is nothing to evaluate on.
    """
    target = config.require_target()
    name = Path(config.evaluate.checkpoint).name
    weights = run_dir.find_weights(config.run.dir, config.evaluate.checkpoint, target)
    store = open_split(config)
    documents = held_out(store, config.evaluate.max_documents)
    check_contract(store, target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
    layer = load_layer(target, weights=None if weights == target else weights, dtype=dtype, device=device)
    check_lengths(store, layer.dims.index_topk)  # an EAGLE-3 draft has no indexer: dense at any length
    draft = Draft(layer, config.train)
    with task("evaluate", len(documents), "documents") as bar:
        found = measure(
            draft,
            store,
            documents,
            config.evaluate.num_speculative_tokens,
            aux_layers=layer.aux_layers,
            tokens_per_batch=config.train.tokens_per_rank,
            dtype=dtype,
            device=device,
            progress=bar.advance,
        )
    found |= {"checkpoint": name, "weights": str(weights), "store": config.train_store_path}
    write_json(run_dir.evaluation(config.run.dir, name), {"format": 1, **found})
    return found
