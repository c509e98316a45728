"""Offline acceptance: how many of a draft's tokens the target would take, from stored states alone.

A server drafts K tokens after each token it knows, keeps those that the target takes up to the first that it
does not, and goes on after the token that the target gives there. `tally` repeats this walk over the answers
of held-out documents, for every K up to the greatest, so that its acceptance length is the one a server
measures; beside it stands the mean over all anchors, which weighs hard places less than a server does.

Temperature 0: a draft token is taken where draft and target have the same arg-max. Where the text is the
target's greedy one this is the server's own walk, rounding aside. In a sampled text the later tokens of a
draft follow what was sampled, not what was most likely.

The temperature of the text: vLLM drafts the most likely token d also for sampled answers, takes it with the
target's probability p(d), the sum of min(p, q) for a q that is all on d, and otherwise samples from p without
d. What comes out is a sample of p, and d was taken exactly if it is that sample. So in a text that the target
sampled, a draft token is taken where it *is* the text's token: given the text, nothing is left to chance, and
the walk is exactly that of a server with the same temperature and top-p. Drafts that are sampled themselves
(vLLM's `draft_sample_method = "probabilistic"`) are not walked; `overlap_acceptance_length` stands for them,
the mean over all anchors of the product of their sums of min(p, q), which is exact for one draft token.

Legend: T tokens, S draft steps, M predicted tokens, B documents of a batch, N documents.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import run_dir
from configs.acceptance import acceptance_length, share_accepted, tables
from configs.errors import StoreNotFoundError
from configs.files import write_json
from configs.progress import log, task
from configs.schema import RunConfig
from configs.target import target_config
from featurestore import FeatureStore
from train.batch import Packed, check_contract, held_out, open_split, pack, state_columns
from train.draft import Draft
from train.loss import HeadLoss
from train.model import load_layer
from train.mtp import MTPLayer
from train.selection import selection_drift
from train.sparse import DENSE, check_attention, decide
from train.unroll import Scored

__all__ = ["SELECTION_DOCUMENTS", "Tally", "measure", "plan", "read_documents", "ready", "run", "tally"]

# its weights of all heads over all candidates cost as much as dense attention
SELECTION_DOCUMENTS = 16


class Tally(NamedTuple):
    """Counts by document; they add up.

    Attributes:
        served: drafts of the walk that tried each step (all earlier ones accepted, the target's token here
            known), and those accepted there, [N, 2, S, 2, S]: at temperature 0 and at the text's, for each
            number of draft tokens.
        alike: the same at temperature 0 over all anchors instead of the walk's, [N, 2, S].
        overlap: sum over anchors of the product of min(p, q) sums up to each step, [N, S].
        whole: anchors whose target's tokens are known up to each step, [N, S].
        tokens: answer tokens, [N].
    """

    served: np.ndarray
    alike: np.ndarray
    overlap: np.ndarray
    whole: np.ndarray
    tokens: np.ndarray

    @classmethod
    def zeros(cls, documents: int, num_steps: int) -> "Tally":
        """Nothing counted yet."""
        S = num_steps
        shapes: list[tuple[int, ...]] = [(2, S, 2, S), (2, S), (S,), (S,), ()]
        return cls(*(np.zeros((documents, *shape)) for shape in shapes))


def tally(found: HeadLoss, scored: Scored, batch: Packed) -> Tally:
    """Count the drafts of every answer of a batch, document by document.

    The token at row m is known, the anchor is m - 1, and step s predicts row m + 1 + s. A server's first
    draft of an answer comes after its first token, the next one after what was accepted and one token more.

    Args:
        found: with `hit`; [S, M].
        scored: the predictions, by token.
        batch: the documents.
    """
    S, T = len(found.agree), len(batch.input_ids)
    steps = np.arange(S)[:, None]
    rows = scored.tokens.cpu().numpy()

    def by_row(x_SM: Tensor) -> np.ndarray:
        """What step s says of row m + 1 + s, in column m."""
        x_ST = np.zeros((S, T + S + 1))
        x_ST[:, rows] = x_SM.double().cpu().numpy()
        return np.stack([x_ST[s, s + 1 : s + 1 + T] for s in range(S)])

    mask = batch.loss_mask.cpu().numpy()
    bounds = batch.cu_seqlens.cpu().numpy()
    known_T = np.zeros(T, np.int64)
    begins, ends = [], []
    for start, end in itertools.pairwise(bounds):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[start:end].astype(np.int8), [0]]))) + start
        for a, b in edges.reshape(-1, 2):
            # the state before a document's first token is not known
            first = max(a, start + 1)
            known_T[first:b] = np.minimum(np.arange(b - first)[::-1], S)
            if first < b - 1:
                begins.append(first)
                ends.append(b - 1)
    assert found.hit is not None
    taken = [by_row(x & scored.valid).astype(bool) & (steps < known_T) for x in (found.agree, found.hit)]
    # tokens of a draft that are accepted, up to the first that is not: [2, 1, T]
    depth = np.stack([np.logical_and.accumulate(x).sum(0) for x in taken])[:, None]
    drafts = steps + 1
    accepted, tried = np.minimum(depth, drafts), np.minimum(np.minimum(depth + 1, known_T), drafts)
    drafted = _walk(accepted + 1, np.array(begins, np.int64), np.array(ends, np.int64))
    # [2, S drafts, 2, S steps, T]
    counted = np.stack([tried, accepted], 2)[:, :, :, None] > steps
    served = np.add.reduceat(counted & drafted[:, :, None, None], bounds[:-1], -1, dtype=np.int64)
    alike = np.add.reduceat(counted[0, -1], bounds[:-1], -1, dtype=np.int64)
    whole = known_T > steps
    overlaps = np.where(whole, np.cumprod(by_row(found.overlap), 0), 0)
    return Tally(
        np.moveaxis(served, -1, 0).astype(float),
        np.moveaxis(alike, -1, 0).astype(float),
        np.add.reduceat(overlaps, bounds[:-1], -1).T,
        np.add.reduceat(whole, bounds[:-1], -1, dtype=np.int64).T.astype(float),
        np.add.reduceat(mask, bounds[:-1], dtype=np.int64).astype(float),
    )


def _walk(lengths: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where a server drafts, all answers and ways of drafting at once.

    Args:
        lengths: tokens that a draft at each place yields, int [..., T].
        begins: place of each answer's first draft.
        ends: places from here on have nothing to draft.

    Returns:
        bool, shape of `lengths`.
    """
    T = lengths.shape[-1]
    ways = np.arange(lengths.size // T)[:, None] * T
    at, stop = (ways + begins).ravel(), (ways + ends).ravel()
    drafted, flat = np.zeros(lengths.size, bool), lengths.ravel()
    while len(at):
        drafted[at] = True
        at = at + flat[at]
        left = at < stop
        at, stop = at[left], stop[left]
    return drafted.reshape(lengths.shape)


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


def read_documents(store: FeatureStore, documents: np.ndarray, states: list[int]) -> Packed:
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
    forward: Callable[..., HeadLoss],
    store: FeatureStore,
    documents: np.ndarray,
    num_speculative_tokens: int,
    *,
    num_steps_max: int = 1,
    text_temperature: float = 0,
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
        num_speculative_tokens: draft tokens a step, of all figures but the lists.
        num_steps_max: number up to which the lists go, if it is more than that.
        text_temperature: at which the target sampled the answers; 0 if it did not, or took the most likely.
        aux_layers: layers whose inputs the draft starts from; none for an MTP layer.
        tokens_per_batch: token budget of a forward pass.
        dtype, device: of the layer.
        rank, world_size: this rank and the number of ranks; each takes every `world_size`-th document.
        add_up: sums a tensor over the ranks; needed with more than one.
        progress: called with the number of documents done.

    Returns:
        At temperature 0 `acceptance_length` with `low` and `high`, `acceptance_per_position`, the same of all
        anchors alike, `overlap_acceptance_length`, and `documents`, `tokens`, `drafts`; then the lists of
        `configs.acceptance.tables`.
    """
    K, S = num_speculative_tokens, max(num_speculative_tokens, num_steps_max)
    places = np.arange(len(documents))[rank::world_size]
    mine = documents[places]
    plans = [_batches(store.length[documents[r::world_size]], tokens_per_batch) for r in range(world_size)]
    counts = Tally.zeros(len(documents), S)
    states = state_columns(store.contract, aux_layers)
    with torch.no_grad():
        # every rank makes as many passes as the busiest one
        for number in range(max(map(len, plans))):
            chosen = plans[rank][number] if number < len(plans[rank]) else []
            batch = pack(read_documents(store, mine[chosen], states), dtype, device)
            scored = batch.scored(S)
            found = forward(batch, scored, scored.valid.float(), hits=True)
            if chosen:
                for every, one in zip(counts, tally(found, scored, batch), strict=True):
                    every[places[chosen]] = one
                if progress is not None:
                    progress(len(chosen))
    if add_up is not None and len(documents):
        rows = np.concatenate([x.reshape(len(documents), -1) for x in counts], 1)
        added = add_up(torch.from_numpy(rows).to(device)).cpu().numpy()
        ends = np.cumsum([x[0].size for x in counts])[:-1]
        parts = np.split(added, ends, 1)
        counts = Tally(*(part.reshape(x.shape) for part, x in zip(parts, counts, strict=True)))
    temperatures = [0, text_temperature] if text_temperature else [0]
    lists = tables(
        counts.served[:, : len(temperatures)],
        temperatures,
        counts.tokens,
        store.source[documents],
        store.length[documents],
    )
    return _headline(counts, K) | {k: lists["by_num_steps"][K - 1][k] for k in ("low", "high")} | lists


def _headline(counts: Tally, num_steps: int) -> dict[str, Any]:
    """Figures of one number of draft tokens at temperature 0, over all documents."""
    served, alike, overlap, whole, tokens = (x.sum(0) for x in counts)
    served, alike = served[0, num_steps - 1, :, :num_steps], alike[:, :num_steps]
    overlaps = overlap / np.maximum(whole, 1)
    return {
        "acceptance_length": float(acceptance_length(served)),
        "acceptance_per_position": share_accepted(served).tolist(),
        "all_anchors_acceptance_length": float(acceptance_length(alike)),
        "all_anchors_acceptance_per_position": share_accepted(alike).tolist(),
        "overlap_acceptance_length": float(1 + overlaps[:num_steps].sum()),
        "documents": len(counts.tokens),
        "tokens": int(tokens),
        "drafts": int(served[0, 0]),
    }


def _selection(
    config: RunConfig, store: FeatureStore, documents: np.ndarray, draft: Draft, is_released: bool
) -> dict[str, Any]:
    """`selection_drift` over the first documents of which some key is left out."""
    layer, target = draft.layer, config.require_target()
    dtype, device = layer.embed_tokens.dtype, layer.embed_tokens.device
    released = None if is_released else load_layer(target, dtype=dtype, device=device)
    long = [int(i) for i in documents if store.length[i] > layer.dims.index_topk + 2][:SELECTION_DOCUMENTS]
    assert isinstance(layer, MTPLayer)
    assert isinstance(released, MTPLayer | None)
    with task("selection", len(long), "documents") as bar:

        def read() -> Iterator[Packed]:
            for i in long:
                states = state_columns(store.contract)
                yield pack(read_documents(store, np.array([i]), states), dtype, device)
                bar.advance(1)

        steps, masked = config.evaluate.num_speculative_tokens, config.train.mask_position_0
        found = selection_drift(layer, released, read(), steps, mask_position_0=masked)
    if found["warning"]:
        log("evaluate", f"warning: {found['warning']}")
    return {"documents": len(long), **found}


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
    """Raises what `run` would: there is no store, no such checkpoint, or the settings fit neither."""
    store, target = open_split(config), config.require_target()
    if config.train.draft == "mtp":
        check_attention(config.train, target_config(target), int(store.length.max(initial=0)))
    run_dir.find_weights(config.run.dir, config.evaluate.checkpoint, target, verify=False)


def run(config: RunConfig) -> dict[str, Any]:
    """Measure a checkpoint on the held-out documents and write `RUN/evaluate.NAME.json`.

    Returns:
        As `measure`, and which weights were measured; with sparse attention `selection` as well, as
        `train.selection.selection_drift` of at most 16 long documents.

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
    attention = DENSE  # at any length where there is no indexer, as in an EAGLE-3 draft
    if layer.dims.index_topk:
        attention = decide(config.train, target_config(target), store, device)
    draft = Draft(layer, config.train, attention).eval()
    with task("evaluate", len(documents), "documents") as bar:
        found = measure(
            draft,
            store,
            documents,
            config.evaluate.num_speculative_tokens,
            num_steps_max=config.evaluate.num_steps_max,
            text_temperature=0 if config.prompts.answers == "given" else config.prompts.temperature,
            aux_layers=layer.aux_layers,
            tokens_per_batch=config.train.tokens_per_rank,
            dtype=dtype,
            device=device,
            progress=bar.advance,
        )
    if attention.sparse:
        chosen = _selection(config, store, documents, draft, weights == target)
        greedy = [row for row in found["by_length"] if not row["temperature"]]
        accepted = {(row["length"], row["num_steps"]): row["acceptance_length"] for row in greedy}
        for row in chosen["by_length"]:
            row["acceptance_length"] = accepted[row["length"], row["step"]]
        found["selection"] = chosen
    found |= {"checkpoint": name, "weights": str(weights), "store": config.train_store_path}
    write_json(run_dir.evaluation(config.run.dir, name), {"format": 2, **found})
    return found
