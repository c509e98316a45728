"""The indexer's own loss: its scores as a distribution, against where attention puts its weight.

    loss = sum over t of weight[t] * KL(p[t] || softmax(I[t])),  p[t] = mean over heads of attention's weights

Both run over all candidates while the indexer is warmed up beside dense attention, and over the keys it
keeps once attention is sparse. The indexer learns from this alone, and nothing else does: p and the indexer's
inputs are detached. Source: section 2.1 of the report of DeepSeek-V3.2, where every token asks once; here the
anchors do, at every step of the unroll.

Legend: T places of a document, A its anchors, c anchors of a chunk, H heads of attention, X an entry's width,
I index_head_dim, S own entries, K kept places.
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.gather import GATHERED, kept_logits, split, stacked, take
from train.indexer import Candidates, Selection, chunks, scores

__all__ = ["IndexLoss", "Watch", "attention_mass"]


def attention_mass(
    q_AHX: Tensor, entries_TX: Tensor, own_ASX: Tensor, seen_AJ: Tensor, scale: float
) -> Tensor:
    """Probabilities of attention over all candidates, mean over heads, float32 [A, T + S]; a head at a time.

    Args:
        q_AHX: absorbed queries.
        entries_TX, own_ASX: entries of step 0 and the queries' own.
        seen_AJ: bool, the candidates of each query.
        scale: factor of the logits.
    """
    total = torch.zeros(seen_AJ.shape, device=q_AHX.device)
    for h in range(q_AHX.shape[1]):
        q = q_AHX[:, h]
        own = (own_ASX.float() @ q.float()[..., None])[..., 0]
        logits = torch.cat(((q @ entries_TX.t()).float(), own), -1) * scale
        total += logits.masked_fill(~seen_AJ, float("-inf")).softmax(-1)
    return total / q_AHX.shape[1]


def divergence(p_AJ: Tensor, scores_AJ: Tensor, seen_AJ: Tensor) -> Tensor:
    """KL(p || softmax(scores)) of each row over what it sees, [A]."""
    log_q = scores_AJ.masked_fill(~seen_AJ, float("-inf")).log_softmax(-1).masked_fill(~seen_AJ, 0)
    return (torch.special.xlogy(p_AJ, p_AJ) - p_AJ * log_q).sum(-1)


def own_scores(q_AHI: Tensor, w_AH: Tensor, k_AKI: Tensor) -> Tensor:
    """Scores of keys that each query has for itself, float32 [A, K]."""
    return ((q_AHI.float() @ k_AKI.float().transpose(1, 2)).relu() * w_AH[..., None]).sum(1)


class _Loss(torch.autograd.Function):
    """The loss of one document at one step; its gradient is formed in the forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        q_AHI: Tensor,
        w_AH: Tensor,
        k_TI: Tensor,
        own_ASI: Tensor,
        weights_A: Tensor,
        read: tuple[Tensor, Tensor, Tensor],
        scale: float,
        candidates: Candidates,
        chosen_AK: Tensor | None,
    ) -> Tensor:
        q_AHX, entries_TX, own_ASX = read
        total = weights_A.new_zeros(())
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q_AHI, w_AH, k_TI, own_ASI)]
        if chosen_AK is None:
            parts = candidates.chunks()
        else:
            held = GATHERED[k_TI.device.type]
            parts = chunks(len(q_AHI), chosen_AK.shape[1] * entries_TX.shape[1], held)
        for c in parts:
            if chosen_AK is None:
                seen = candidates.seen(c)
                p = attention_mass(q_AHX[c], entries_TX, own_ASX[c], seen, scale)
                keys = k_TI
            else:
                places, own_kept = split(chosen_AK[c], candidates)
                seen = torch.cat((places >= 0, own_kept), -1)
                taken = take(entries_TX, places)
                p = kept_logits(q_AHX[c], taken, own_ASX[c], seen, scale).softmax(-1).mean(1)
                keys = take(k_TI, places)
            leaves = [x.detach().float().requires_grad_() for x in (q_AHI[c], w_AH[c], keys, own_ASI[c])]
            q, w, k, own = leaves
            with torch.enable_grad():
                found = scores(q, w, k) if chosen_AK is None else own_scores(q, w, k)
                rows = divergence(p, torch.cat((found, own_scores(q, w, own)), -1), seen)
                # what a row of weight 0 holds has no meaning
                loss = (rows * weights_A[c]).masked_fill(weights_A[c] == 0, 0).sum()
            of_q, of_w, of_k, of_own = torch.autograd.grad(loss, leaves)
            total += loss.detach()
            grads[0][c], grads[1][c], grads[3][c] = of_q, of_w, of_own
            if chosen_AK is None:
                grads[2] += of_k
            else:
                grads[2].index_add_(0, places.clamp(min=0).flatten(), of_k.flatten(0, 1))
        ctx.save_for_backward(
            *(g.to(x.dtype) for g, x in zip(grads, (q_AHI, w_AH, k_TI, own_ASI), strict=True))
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * grad for saved in ctx.saved_tensors), *[None] * 5


class Watch(Protocol):
    """Is told by an unroll, step by step, what the indexer chose and what attention reads.

    Attributes:
        over: what the indexer chooses among for it: `all` candidates, or those `kept`.
    """

    over: Literal["all", "kept"]

    def add(
        self,
        selection: Selection,
        q_AHX: Tensor,
        entries_TX: Tensor,
        own_AX: Tensor | None,
        scale: float,
    ) -> None:
        """Take a step, whose `Selection.step` is done.

        Args:
            selection: the candidates and choices, and the indexer's queries and keys with their gradient.
            q_AHX: absorbed queries of attention.
            entries_TX: attention's entries of step 0.
            own_AX: attention's own entries of the step; None at step 0.
            scale: factor of attention's logits.
        """


class IndexLoss:
    """A `Watch` that adds up the indexer's loss over the steps of an unroll.

    Args:
        weights_SA: float32 weight of each anchor at each step, 0 where it predicts nothing.
        over: `all` candidates, or those `kept`.

    Attributes:
        loss: scalar with a gradient for the indexer's parameters alone; None before the first step.
    """

    def __init__(self, weights_SA: Tensor, over: Literal["all", "kept"]) -> None:
        self.weights_SA, self.over = weights_SA, over
        self.loss: Tensor | None = None
        self.own_entries: list[Tensor] = []
        self.own_keys: list[Tensor] = []
        self.steps = 0

    def add(
        self,
        selection: Selection,
        q_AHX: Tensor,
        entries_TX: Tensor,
        own_AX: Tensor | None,
        scale: float,
    ) -> None:
        """Add a step."""
        index, weights_A = selection.index, self.weights_SA[self.steps]
        if own_AX is not None:
            self.own_entries.append(own_AX.detach())
            self.own_keys.append(index.k_TI)
        self.steps += 1
        own_ASX = stacked(self.own_entries, len(q_AHX), entries_TX)
        own_ASI = stacked(self.own_keys, len(q_AHX), index.k_TI)
        for (rows, start, candidates), chosen in zip(selection.documents, selection.chosen, strict=True):
            if rows.start == rows.stop:
                continue
            end = start + len(candidates.k_TI)
            read = q_AHX[rows].detach(), entries_TX[start:end].detach(), own_ASX[rows]
            loss = _Loss.apply(
                index.q_AHI[rows],
                index.w_AH[rows],
                candidates.k_TI,
                own_ASI[rows],
                weights_A[rows],
                read,
                scale,
                candidates,
                chosen if self.over == "kept" else None,
            )
            self.loss = loss if self.loss is None else self.loss + loss
