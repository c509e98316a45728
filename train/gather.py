"""Attention over gathered latents: each anchor reads the few keys it keeps, whatever the document's length.

Keys and values of all heads are made of one entry a place, a latent and a rotary key, 576 numbers in V3.2.
With the two halves of `kv_b_proj` folded into query and output (the absorbed form of arXiv 2412.19437,
section 2.1.1) no expanded keys or values are needed: a chunk of anchors gathers the entries it keeps and
attends to those. The backward computes each chunk anew, so that what is held grows with the anchors alone.

Legend: T tokens, A anchors, K kept places, S own entries, H heads, Q query width, P its part that is not
rotated, C value width, L kv_lora_rank, X an entry's width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.attention import Attend
from train.indexer import Candidates, Selection, chunks

__all__ = ["absorbed", "gather_form", "kept_logits", "split", "stacked", "take"]

# numbers gathered at once, by type of device: on a CPU what its cache holds
GATHERED = {"cpu": 1 << 20, "cuda": 1 << 25}


def absorbed(q_AHQ: Tensor, up_LHW: Tensor, width: int) -> Tensor:
    """Queries that score entries of a width, [A, H, X], from those that score expanded keys."""
    P = q_AHQ.shape[-1] - (width - len(up_LHW))
    return torch.cat((torch.einsum("ahp,lhp->ahl", q_AHQ[..., :P], up_LHW[..., :P]), q_AHQ[..., P:]), -1)


def take(rows_TX: Tensor, places_AK: Tensor) -> Tensor:
    """Rows at some places, [A, K, X]; row 0 stands in for places that are none."""
    # indexing would sort in its backward
    return rows_TX.index_select(0, places_AK.clamp(min=0).flatten()).unflatten(0, places_AK.shape)


def stacked(own: list[Tensor], count: int, like: Tensor) -> Tensor:
    """Own entries of all steps so far, [A, S, X]; of none, as wide as the rows of `like`."""
    return torch.stack(own, 1) if own else like.new_empty(count, 0, like.shape[-1])


def split(chosen_AK: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """Kept candidates as places of the document, int32 [A, K], -1 for none, and own entries, bool [A, S]."""
    count = len(candidates.k_TI)
    marks = [(chosen_AK == count + r).any(-1) for r in range(len(candidates.own))]
    own = torch.stack(marks, -1) if marks else chosen_AK.new_empty(len(chosen_AK), 0, dtype=torch.bool)
    return chosen_AK.where(chosen_AK < count, -1), own


def kept_places(selection: Selection) -> tuple[Tensor, Tensor]:
    """What the anchors of a batch keep: its rows, int32 [A, K], -1 for none, and own entries, bool [A, S]."""
    rows, own, index = [], [], selection.index
    for (mine, start, candidates), chosen in zip(selection.documents, selection.chosen, strict=True):
        if chosen is None:
            chosen = candidates.choose(index.q_AHI[mine], index.w_AH[mine])
        places, kept = split(chosen, candidates)
        rows.append((places + start).where(places >= 0, -1))
        own.append(kept)
    most = max(x.shape[1] for x in rows)
    return torch.cat([F.pad(x, (0, most - x.shape[1]), value=-1) for x in rows]), torch.cat(own)


def kept_logits(q_AHX: Tensor, taken_AKX: Tensor, own_ASX: Tensor, seen_AJ: Tensor, scale: float) -> Tensor:
    """Logits of kept entries, then of the own ones, -inf where there is none; float32 [A, H, K + S]."""
    logits = (q_AHX @ taken_AKX.transpose(1, 2)).float()
    own = q_AHX.float() @ own_ASX.float().transpose(1, 2)
    return (torch.cat((logits, own), -1) * scale).masked_fill(~seen_AJ[:, None], float("-inf"))


def _attend(
    q_AHQ: Tensor,
    taken_AKX: Tensor,
    own_ASX: Tensor,
    up_LHW: Tensor,
    seen_AJ: Tensor,
    scale: float,
) -> Tensor:
    L, K = len(up_LHW), taken_AKX.shape[1]
    q_AHX = absorbed(q_AHQ, up_LHW, taken_AKX.shape[-1])
    logits = kept_logits(q_AHX, taken_AKX, own_ASX, seen_AJ, scale)
    p = logits.softmax(-1).to(taken_AKX.dtype)
    o_AHL = p[..., :K] @ taken_AKX[..., :L] + p[..., K:] @ own_ASX[..., :L]
    P = q_AHQ.shape[-1] - (taken_AKX.shape[-1] - L)
    return torch.einsum("ahl,lhc->ahc", o_AHL, up_LHW[..., P:])


class _Gather(torch.autograd.Function):
    """`_attend` a chunk at a time; the gradients of entries and `up` are added up in float32.

    On CUDA the order of those sums is not fixed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_AHQ: Tensor,
        entries_TX: Tensor,
        own_ASX: Tensor,
        up_LHW: Tensor,
        places_AK: Tensor,
        own_kept_AS: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q_AHQ, entries_TX, own_ASX, up_LHW, places_AK, own_kept_AS)
        ctx.scale = scale
        out = []
        for c in chunks(len(q_AHQ), places_AK.shape[1] * entries_TX.shape[1], GATHERED[q_AHQ.device.type]):
            seen = torch.cat((places_AK[c] >= 0, own_kept_AS[c]), -1)
            out.append(_attend(q_AHQ[c], take(entries_TX, places_AK[c]), own_ASX[c], up_LHW, seen, scale))
        return torch.cat(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AHC: Tensor) -> tuple[Tensor | None, ...]:
        q_AHQ, entries_TX, own_ASX, up_LHW, places_AK, own_kept_AS = ctx.saved_tensors
        grad_q, grad_own = torch.empty_like(q_AHQ), torch.empty_like(own_ASX)
        grad_entries = torch.zeros_like(entries_TX, dtype=torch.float32)
        grad_up = torch.zeros_like(up_LHW, dtype=torch.float32)
        for c in chunks(len(q_AHQ), places_AK.shape[1] * entries_TX.shape[1], GATHERED[q_AHQ.device.type]):
            places = places_AK[c]
            given = (q_AHQ[c], take(entries_TX, places), own_ASX[c], up_LHW)
            leaves = [x.detach().requires_grad_() for x in given]
            q, taken, own, up = leaves
            seen = torch.cat((places >= 0, own_kept_AS[c]), -1)
            with torch.enable_grad():
                out = _attend(q, taken, own, up, seen, ctx.scale)
            grad_q[c], of_taken, grad_own[c], of_up = torch.autograd.grad(out, leaves, grad_AHC[c])
            grad_entries.index_add_(0, places.clamp(min=0).flatten(), of_taken.flatten(0, 1).float())
            grad_up += of_up
        return grad_q, grad_entries.to(entries_TX.dtype), grad_own, grad_up.to(up_LHW.dtype), None, None, None


def gather_form(
    latent_TL: Tensor, k_pe_TR: Tensor, up_LHW: Tensor, scale: float, selection: Selection
) -> Attend:
    """The form of attention in which an anchor reads what it keeps and nothing else.

    Args:
        latent_TL, k_pe_TR: entries of step 0.
        up_LHW: `Attention.up`.
        scale: factor of the logits.
        selection: which keys each step keeps, `Selection.step` before `attend`.

    Returns:
        attend(q_AHQ, (latent_AL, k_pe_AR) of the step, None at step 0) -> o_AHC.
    """
    entries_TX = torch.cat((latent_TL, k_pe_TR), -1)
    own_entries: list[Tensor] = []

    def attend(q: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
        if own is not None:
            own_entries.append(torch.cat(own, -1))
        own_ASX = stacked(own_entries, len(q), entries_TX)
        return _Gather.apply(q, entries_TX, own_ASX, up_LHW, *kept_places(selection), scale)

    return attend
