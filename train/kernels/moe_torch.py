"""The experts in plain torch operators: matrix products expert by expert, or through `grouped_mm`.

Rows are sorted by expert once; everything that is not a matrix product works on all rows together.

Legend: T tokens, D model width, F expert width, E experts, K experts a token, N = T * K sorted rows.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from train.kernels.routing import Routing

__all__ = ["Grouped", "Loop"]

# rows of a product are a multiple of this: the CPU's bfloat16 kernels are compiled anew for each shape
ROWS = 32


def _whole(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def gather_sum(rows_ND: Tensor, inverse_N: Tensor, topk: int) -> Tensor:
    """Sum of the K rows of each token, [T, D], added in float32 and in the order of the slots."""
    return F.embedding_bag(inverse_N.view(-1, topk), rows_ND, mode="sum")


class Experts:
    """Forward and backward in terms of two products over the sorted rows of each expert.

    multiply_nt(a [N, k], w [E, m, k]) -> a w[e]^T  [N, m]
    multiply_nn(a [N, m], w [E, m, k]) -> a w[e]    [N, k]
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def multiply_nt(self, a: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError

    def multiply_nn(self, a: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def forward(
        cls, x: Tensor, topk_weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y [T, D], and gate and up products [N, F] for the backward."""
        self = cls(routing)
        T, K = topk_weights.shape
        x_ND = x.index_select(0, routing.token)
        g_NF, u_NF = self.multiply_nt(x_ND, w1), self.multiply_nt(x_ND, w3)
        # the router weight goes in before the down projection, where rows are narrower; what is left is a sum
        weight_N1 = topk_weights.reshape(-1).index_select(0, routing.order)[:, None]
        h_NF = (F.silu(g_NF) * u_NF).mul_(weight_N1.to(x.dtype))
        y_ND = self.multiply_nt(h_NF, w2)
        if not T * K:
            return torch.zeros_like(x), g_NF, u_NF
        return gather_sum(y_ND, routing.inverse, K), g_NF, u_NF

    @classmethod
    def backward(
        cls,
        dy: Tensor,
        x: Tensor,
        topk_weights: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        g_NF: Tensor,
        u_NF: Tensor,
        routing: Routing,
        need_x: bool,
        need_weights: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
        """Gradients of x and topk_weights, None where not needed; and of what `weight_grad` multiplies
        those of g and u, and h, each [N, F]."""
        self = cls(routing)
        K = topk_weights.shape[1]
        dx = dweights = None
        wide = topk_weights.dtype
        weight_N1 = topk_weights.reshape(-1).index_select(0, routing.order)[:, None].to(x.dtype)
        silu_NF = F.silu(g_NF)
        h_NF = silu_NF * u_NF
        # gradient of the expert's own output is weight * dy; the weight is taken out of the product
        dh_NF = self.multiply_nn(dy.index_select(0, routing.token), w2)
        if need_weights:
            dweight_N = torch.linalg.vecdot(dh_NF.to(wide), h_NF.to(wide))
            dweights = dweight_N.index_select(0, routing.inverse).view(-1, K)
        h_NF.mul_(weight_N1)
        dh_NF.mul_(weight_N1)
        du_NF = silu_NF.mul_(dh_NF)
        dg_NF = torch.ops.aten.silu_backward(dh_NF.mul_(u_NF), g_NF)
        if need_x:
            dx_ND = self.multiply_nn(dg_NF, w1).add_(self.multiply_nn(du_NF, w3))
            dx = gather_sum(dx_ND, routing.inverse, K) if len(dx_ND) else torch.zeros_like(x)
        return dx, dweights, dg_NF, du_NF, h_NF

    @staticmethod
    def weight_grad_of_calls(
        calls: list[tuple[Tensor, Tensor]], routings: list[Routing], transposed: bool
    ) -> Tensor:
        """dense^T gathered[token] of each expert over the rows of all calls, [E, F, D], or its transpose.

        An expert's rows come together just before their product, while they fit a cache.

        Args:
            calls: dense [N, F] and gathered [T, D] of each call.
            routings: of the same calls.
            transposed: whether [E, D, F] is wanted.
        """
        bounds = [routing.offsets.tolist() for routing in routings]
        (dense, gathered), E = calls[0], len(bounds[0]) - 1
        shape = (gathered.shape[1], dense.shape[1]) if transposed else (dense.shape[1], gathered.shape[1])
        out = dense.new_empty(E, *shape)
        counts = [sum(of[e + 1] - of[e] for of in bounds) for e in range(E)]
        most = _whole(max(counts, default=0))
        rows, inputs = dense.new_empty(most, dense.shape[1]), dense.new_empty(most, gathered.shape[1])
        for e, count in enumerate(counts):
            spans = [slice(*of[e : e + 2]) for of in bounds]
            torch.cat([call[0][span] for call, span in zip(calls, spans, strict=True)], out=rows[:count])
            chosen = [routing.token[span] for routing, span in zip(routings, spans, strict=True)]
            taken = [x.index_select(0, t) for (_, x), t in zip(calls, chosen, strict=True)]
            torch.cat(taken, out=inputs[:count])
            # no rows, a product of zeros
            some = slice(0, _whole(count))
            a, b = (inputs, rows) if transposed else (rows, inputs)
            for x in (a, b):
                x[count : some.stop] = 0
            torch.mm(a[some].t(), b[some], out=out[e])
        return out


class Loop(Experts):
    """One matrix product for each expert that has rows; written straight into the stacked result.

    A product takes a multiple of `ROWS` rows: those too many are the next expert's, who writes over them.
    """

    def __init__(self, routing: Routing) -> None:
        super().__init__(routing)
        bounds = routing.offsets.tolist()
        spans = ((e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a)
        self.spans = [(e, a, min(a + _whole(b - a), bounds[-1])) for e, a, b in spans]

    def multiply_nt(self, a: Tensor, w: Tensor) -> Tensor:
        out = a.new_empty(len(a), w.shape[1])
        for e, i, j in self.spans:
            torch.mm(a[i:j], w[e].t(), out=out[i:j])
        return out

    def multiply_nn(self, a: Tensor, w: Tensor) -> Tensor:
        out = a.new_empty(len(a), w.shape[2])
        for e, i, j in self.spans:
            torch.mm(a[i:j], w[e], out=out[i:j])
        return out


class Grouped(Experts):
    """`torch.nn.functional.grouped_mm`; no host synchronisation but for the gradients of weights."""

    def __init__(self, routing: Routing) -> None:
        super().__init__(routing)
        self.ends = routing.offsets[1:].int()

    def multiply_nt(self, a: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(a, w.transpose(1, 2), offs=self.ends)

    def multiply_nn(self, a: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(a, w, offs=self.ends)
