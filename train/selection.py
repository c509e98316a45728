"""How good the indexer's choice of keys is, and whether training has moved it.

A frozen indexer does not freeze the choice: what it scores comes through projections and norms that are
trained. Of every query with more candidates than it keeps, with p the attention's probabilities over all
candidates, mean over heads, S what the indexer keeps and B the equally many places where p is largest:

    mass     sum of p over S          best     sum of p over B          recall   share of B that is in S
    overlap  share of S that the released layer's indexer keeps too

Mass over best bounds the damage; recall counts keys that nobody weighs as well.

Legend: A anchors, S draft steps, H heads, X an entry's width, J candidates.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from configs.acceptance import length_bucket
from train.batch import Packed
from train.gather import stacked
from train.index_loss import attention_mass
from train.indexer import Selection, marked
from train.mtp import MTPLayer
from train.unroll import unroll

__all__ = ["FALL", "Choices", "selection_drift"]

# by how much mass over best may fall below the released layer's before a warning
FALL = 0.05


class Choice(NamedTuple):
    """One step's choice of the anchors of a document that have more candidates than they keep, [a] each.

    Attributes:
        rows: which anchors.
        mass, best, recall: float32.
        kept: bool [a, J].
    """

    rows: Tensor
    mass: Tensor
    best: Tensor
    recall: Tensor
    kept: Tensor


class Choices:
    """A `Watch` that weighs the choices of a single document.

    Args:
        valid_SA: bool, whether an anchor predicts anything at a step.

    Attributes:
        steps: the choice of each step; None where every anchor keeps all.
    """

    over: Literal["all", "kept"] = "kept"

    def __init__(self, valid_SA: Tensor) -> None:
        self.valid_SA = valid_SA
        self.steps: list[Choice | None] = []
        self._own: list[Tensor] = []

    def add(
        self,
        selection: Selection,
        q_AHX: Tensor,
        entries_TX: Tensor,
        own_AX: Tensor | None,
        scale: float,
    ) -> None:
        """Add a step."""
        if own_AX is not None:
            self._own.append(own_AX)
        own_ASX = stacked(self._own, len(q_AHX), entries_TX)
        (_, _, candidates), (chosen,) = selection.documents[0], selection.chosen
        step = len(self.steps)
        if chosen is None:
            self.steps.append(None)
            return
        parts = []
        for part in candidates.chunks():
            rows = torch.arange(part.start, part.stop, device=q_AHX.device)
            more = candidates.places_A[rows] + 1 + step > selection.topk
            rows = rows[more & self.valid_SA[step, rows]]
            seen = candidates.seen(rows)
            read = entries_TX[: len(candidates.k_TI)]
            p = attention_mass(q_AHX[rows], read, own_ASX[rows], seen, scale)
            kept = marked(chosen[rows], len(candidates))
            best, where = p.topk(selection.topk, -1)
            recall = kept.gather(1, where).float().mean(-1)
            parts.append(Choice(rows, (p * kept).sum(-1), best.sum(-1), recall, kept))
        self.steps.append(Choice(*map(torch.cat, zip(*parts, strict=True))))


@torch.no_grad()
def _choices(layer: MTPLayer, batch: Packed, num_steps: int, mask_position_0: bool) -> list[Choice | None]:
    scored = batch.scored(num_steps)
    valid_SA = torch.zeros(num_steps, len(scored.anchors), device=batch.input_ids.device)
    valid_SA.scatter_add_(1, scored.place, scored.valid.float())
    watch = Choices(valid_SA > 0)
    unroll(
        layer,
        batch.input_ids,
        batch.start,
        batch.cu_seqlens,
        num_steps,
        mask_position_0,
        sparse=True,
        anchors=scored.anchors,
        watch=watch,
    )
    return watch.steps


def selection_drift(
    layer: MTPLayer,
    released: MTPLayer | None,
    documents: Iterable[Packed],
    num_steps: int,
    *,
    mask_position_0: bool = True,
) -> dict[str, Any]:
    """The choice of a layer's indexer beside that of the released one's.

    Args:
        layer: the layer.
        released: the target's own; None where that is `layer`.
        documents: one at a time; those that keep every key say nothing.
        num_steps: draft steps.
        mask_position_0: as the layer is served.

    Returns:
        `by_length`, a list of `length`, `step`, `queries`, `mass`, `best`, `mass_over_best`, `recall`,
        `overlap` and `released_mass_over_best`; of all of them `mass_over_best`,
        `released_mass_over_best`, `overlap` and `queries`; `warning`, None or in words.
    """
    sums: dict[tuple[str, int], Tensor] = {}
    for batch in documents:
        bucket = length_bucket(len(batch.input_ids))
        mine = _choices(layer, batch, num_steps, mask_position_0)
        theirs = mine if released is None else _choices(released, batch, num_steps, mask_position_0)
        for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a is None or b is None or not len(a.rows):
                continue
            shared = (a.kept & b.kept).sum(-1) / a.kept.sum(-1)
            columns = (torch.ones_like(a.mass), a.mass, a.best, a.recall, shared, b.mass, b.best)
            new = torch.stack(columns).double().sum(1).cpu()
            sums[bucket, step] = sums.get((bucket, step), 0) + new

    def row(found: Tensor) -> dict[str, Any]:
        queries, mass, best, recall, shared, their_mass, their_best = found.tolist()
        return {
            "queries": int(queries),
            "mass": mass / queries,
            "best": best / queries,
            "mass_over_best": mass / best,
            "recall": recall / queries,
            "overlap": shared / queries,
            "released_mass_over_best": their_mass / their_best,
        }

    order = sorted(sums, key=lambda key: (int(key[0].partition("-")[0]), key[1]))
    rows = [{"length": bucket, "step": step + 1, **row(sums[bucket, step])} for bucket, step in order]
    if not rows:
        return {"by_length": [], "queries": 0, "warning": None}
    whole = row(torch.stack(list(sums.values())).sum(0))
    fell = whole["released_mass_over_best"] - whole["mass_over_best"]
    warning = None
    if fell > FALL:
        warning = (
            f"the indexer's choice holds {whole['mass_over_best']:.3f} of the best attention mass, that of"
            f" the released layer {whole['released_mass_over_best']:.3f}: training has moved what it scores;"
            " train it along (train.indexer = 'joint'), or freeze self_attn.q_a_proj. and"
            " self_attn.q_a_layernorm."
        )
    kept = ("queries", "mass_over_best", "released_mass_over_best", "recall", "overlap")
    return {"by_length": rows, **{key: whole[key] for key in kept}, "warning": warning}
