"""V3.2's lightning indexer, which chooses the keys that sparse attention reads.

Query t of a document scores every key j it may see, by few narrow heads,

    I[t, j] = sum over h of w[t, h] * relu(q[t, h] . k[j])

and attends to the `index_topk` best ones, to all of them while there are no more. Faithful to vLLM 0.32.0
`models/deepseek_v32/attention.py`, whose fp8 rounding of q and k is left out: it exchanges two to four
percent of the keys, all of them near the threshold. Equal scores, which servers order by chance, are ordered
here by place, the later one first.

Legend: T tokens or places, A queries, D hidden_size, Q q_lora_rank, H index heads, I index_head_dim, J
candidates.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.dims import Dims

__all__ = [
    "Candidates",
    "Index",
    "Indexer",
    "Selection",
    "choose",
    "chunks",
    "marked",
    "rotary_half",
    "scores",
]

# scores held at once, float32, by type of device; what orders them takes about eight times as much
HELD = {"cpu": 1 << 20, "cuda": 1 << 23}
PLACE_BITS = 20


class Index(NamedTuple):
    """What the indexer makes of some tokens.

    Attributes:
        q_AHI: queries of the rows asked for, [A, H, I].
        k_TI: keys of all tokens, [T, I].
        w_AH: float32 weights of the rows' heads, [A, H], the constants of the score included.
    """

    q_AHI: Tensor
    k_TI: Tensor
    w_AH: Tensor


def rotary_half(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the pairs (j, j + R/2) of the first R dimensions, as the indexer does; the others pass.

    Args:
        x: [T, heads, I], I at least R.
        cos_TR, sin_TR: float32 [T, R/2] of the tokens' positions.

    Returns:
        The rotated tensor, in the dtype of `x`.
    """
    half = cos_TR.shape[-1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    a, b, rest = x.float().split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(x.dtype)


class Indexer(nn.Module):
    """The indexer of one layer (`self_attn.indexer.*`)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        heads, width = dims.index_n_heads, dims.index_head_dim
        self.dims = dims
        self.wq_b = nn.Linear(dims.q_lora_rank, heads * width, bias=False)
        self.wk = nn.Linear(dims.hidden_size, width, bias=False)
        self.k_norm = nn.LayerNorm(width, eps=1e-6)
        self.weights_proj = nn.Linear(dims.hidden_size, heads, bias=False)

    def forward(
        self, x_TD: Tensor, qr_AQ: Tensor, positions_T: Tensor, rows_A: Tensor | None = None
    ) -> Index:
        """Queries, keys and weights.

        Args:
            x_TD: normed input of the attention.
            qr_AQ: the attention's compressed queries after their norm, of the rows asked for.
            positions_T: place of each token in its document, int64 [T].
            rows_A: rows to make queries of, int64 [A]; by default all.
        """
        heads, width = self.dims.index_n_heads, self.dims.index_head_dim
        angles = positions_T[:, None].float() * self.dims.inv_freq(x_TD.device)
        cos, sin = angles.cos(), angles.sin()
        k_TI = rotary_half(self.k_norm(self.wk(x_TD))[:, None], cos, sin)[:, 0]
        if rows_A is not None:
            x_TD, cos, sin = x_TD[rows_A], cos[rows_A], sin[rows_A]
        q_AHI = rotary_half(self.wq_b(qr_AQ).unflatten(-1, (heads, width)), cos, sin)
        w_AH = self.weights_proj(x_TD).float() * (heads * width) ** -0.5
        return Index(q_AHI, k_TI, w_AH)


class _Scores(torch.autograd.Function):
    """One head at a time, in the backward too: [heads, queries, keys] never exists."""

    @staticmethod
    def forward(ctx: Any, q_AHI: Tensor, w_AH: Tensor, k_JI: Tensor) -> Tensor:
        ctx.save_for_backward(q_AHI, w_AH, k_JI)
        out_AJ = w_AH.new_zeros(len(q_AHI), len(k_JI))
        k_IJ = k_JI.float().t()
        for h in range(q_AHI.shape[1]):
            out_AJ.addcmul_(F.relu_(q_AHI[:, h].float() @ k_IJ), w_AH[:, h, None])
        return out_AJ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_AHI, w_AH, k_JI = ctx.saved_tensors
        k = k_JI.float()
        grad_q, grad_w, grad_k = torch.empty_like(q_AHI), torch.empty_like(w_AH), torch.zeros_like(k)
        for h in range(q_AHI.shape[1]):
            q = q_AHI[:, h].float()
            cut_AJ = F.relu_(q @ k.t())
            grad_w[:, h] = (grad_AJ * cut_AJ).sum(-1)
            flow_AJ = cut_AJ.sign_().mul_(grad_AJ).mul_(w_AH[:, h, None])
            grad_q[:, h] = flow_AJ @ k
            grad_k += flow_AJ.t() @ q
        return grad_q, grad_w, grad_k.to(k_JI.dtype)


def scores(q_AHI: Tensor, w_AH: Tensor, k_JI: Tensor) -> Tensor:
    """Score every key for every query, in float32, [A, J].

    Args:
        q_AHI, w_AH: queries and weights of their heads.
        k_JI: keys; who may see which is the caller's to say.
    """
    return _Scores.apply(q_AHI, w_AH, k_JI)


def choose(scores_AJ: Tensor, topk: int) -> Tensor:
    """The places of each row's best scores: the larger score, then the later place.

    Args:
        scores_AJ: float32; -inf where a place is no candidate.
        topk: most places of a row.

    Returns:
        int64 [A, min(topk, J)], best first; -1 where a row has fewer candidates.
    """
    places = torch.arange(scores_AJ.shape[-1], device=scores_AJ.device)
    # the bits of a float order as integers once those of negative ones are turned round; -0 counts as 0
    bits = (scores_AJ + 0.0).view(torch.int32).long()
    bits = torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    order_AJ = (bits << PLACE_BITS) + places
    order_AJ.masked_fill_(scores_AJ == float("-inf"), -(1 << 62))
    best, found = order_AJ.topk(min(topk, len(places)), -1)
    return found.masked_fill_(best == -(1 << 62), -1)


def chunks(count: int, numbers: int, held: int) -> list[slice]:
    """Slices of `count` rows of so many numbers each that hold about `held` numbers together."""
    size = max(held // max(numbers, 1), 1)
    return [slice(a, min(a + size, count)) for a in range(0, count, size)]


class Candidates:
    """The keys that the queries of one document choose among: those of its places, and each query's own.

    Args:
        k_TI: index keys of the document's places.
        places_A: the last place that each query sees, ascending int64 [A].
        topk: keys a query keeps.
    """

    def __init__(self, k_TI: Tensor, places_A: Tensor, topk: int) -> None:
        self.k_TI, self.places_A, self.topk = k_TI, places_A, topk
        self.own: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.k_TI) + len(self.own)

    @property
    def all_kept(self) -> bool:
        """Whether even the query with the most candidates keeps all of them."""
        return len(self) <= self.topk

    def seen(self, rows: slice | Tensor) -> Tensor:
        """Which candidates some queries see: places up to theirs, and their own; bool [c, T + own]."""
        every = torch.arange(len(self), device=self.k_TI.device)
        return (every <= self.places_A[rows, None]) | (every >= len(self.k_TI))

    def scores(self, q_AHI: Tensor, w_AH: Tensor, rows: slice) -> Tensor:
        """Scores of some queries, -inf for places they do not see, [c, T + own]; the own keys last."""
        q, w = q_AHI[rows], w_AH[rows]
        unseen = ~self.seen(rows)[:, : len(self.k_TI)]
        found = scores(q, w, self.k_TI).masked_fill(unseen, float("-inf"))
        own = [(F.relu((q.float() * k[rows, None].float()).sum(-1)) * w).sum(-1) for k in self.own]
        return torch.cat((found, torch.stack(own, -1)), -1) if own else found

    def chunks(self) -> list[slice]:
        """Rows whose scores may be held at a time."""
        return chunks(len(self.places_A), len(self), HELD[self.k_TI.device.type])

    @torch.no_grad()
    def choose(self, q_AHI: Tensor, w_AH: Tensor) -> Tensor:
        """What the queries keep: candidates as `choose` gives them, int32 [A, K], -1 for none.

        Candidate T + r is the query's own key of step r + 1.
        """
        if self.all_kept:
            every = torch.arange(len(self), dtype=torch.int32, device=q_AHI.device)
            return every.where(self.seen(slice(None)), -1)
        best = [choose(self.scores(q_AHI, w_AH, rows), self.topk).int() for rows in self.chunks()]
        return torch.cat(best)


def marked(chosen_AK: Tensor, count: int) -> Tensor:
    """Candidates from `choose` as bool [A, count]."""
    # one more takes what is none
    bits = torch.zeros(len(chosen_AK), count + 1, dtype=torch.bool, device=chosen_AK.device)
    return bits.scatter_(1, chosen_AK.where(chosen_AK >= 0, count).long(), True)[:, :count]


class Selection:
    """The keys that the anchors of a packed batch keep, chosen anew at every step of an unroll.

    Anchor i chooses at step s among the entries of step 0 at the places of its document up to i, and its own
    entries of steps 1 to s, which compete like any other; it asks with its query of step s.

    Args:
        anchors: rows that ask, ascending int64 [A].
        cu_seqlens: document boundaries, int32 [B+1].
        k_TI: index keys of step 0.
        topk: keys that a query keeps.

    Attributes:
        documents: of each document its anchors as a slice of all, its first row, its candidates.
        chosen: of each document from `Candidates.choose`; None while it keeps all.
    """

    def __init__(self, anchors: Tensor, cu_seqlens: Tensor, k_TI: Tensor, topk: int) -> None:
        self.anchors, self.k_TI, self.topk = anchors, k_TI, topk
        self.documents: list[tuple[slice, int, Candidates]] = []
        self.chosen: list[Tensor | None] = []
        first = 0
        counts = torch.searchsorted(anchors, cu_seqlens.long()).diff().tolist()
        for count, start in zip(counts, cu_seqlens.tolist(), strict=False):
            rows = slice(first, first + count)
            first += count
            places_A = anchors[rows] - start
            # nobody looks beyond the last anchor
            end = start + int(places_A[-1]) + 1 if count else start
            self.documents.append((rows, start, Candidates(k_TI[start:end], places_A, topk)))

    def step(self, index: Index, *, own: bool) -> None:
        """Choose for the next step.

        Args:
            index: the step's queries and weights of all anchors, [A, ...], and their own keys [A, I].
            own: whether there are own keys; not at step 0.
        """
        self.index, self.chosen = index, []
        for rows, _, candidates in self.documents:
            if own:
                candidates.own.append(index.k_TI[rows])
            kept = candidates.all_kept or rows.start == rows.stop
            self.chosen.append(None if kept else candidates.choose(index.q_AHI[rows], index.w_AH[rows]))
