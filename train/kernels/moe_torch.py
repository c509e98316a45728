"""The experts in plain torch operators: matrix products expert by expert, or through `grouped_mm`.

Rows are sorted by expert once; everything between two products works on all rows together.

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


class Experts:
    """Forward and backward in terms of two products with stacked matrices, over the sorted rows.

    Args:
        routing: where the rows of a token lie.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def apart(self, x_TA: Tensor, *stacks_EAB: Tensor) -> list[Tensor]:
        """x[token] w[e] of each row with each stack, [N, B]."""
        raise NotImplementedError

    def together(self, like_TB: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Sum of r w[e] over the rows of a token and the pairs of rows r [N, A] and a stack w [E, A, B].

        Shape and dtype are those of `like_TB`; it is added up in float32.
        """
        raise NotImplementedError

    @classmethod
    def forward(
        cls, x: Tensor, topk_weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y [T, D], and gate and up products [N, F] for the backward."""
        self = cls(routing)
        g_NF, u_NF = self.apart(x, w1.mT, w3.mT)
        # the router weight goes in before the down projection, where rows are narrower; what is left is a sum
        weight_N1 = topk_weights.reshape(-1).index_select(0, routing.order)[:, None]
        h_NF = F.silu(g_NF).mul_(u_NF).mul_(weight_N1.to(x.dtype))
        return self.together(x, (h_NF, w2.mT)), g_NF, u_NF

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
        (dh_NF,) = self.apart(dy, w2)
        if need_weights:
            dweight_N = torch.linalg.vecdot(dh_NF.to(wide), h_NF.to(wide))
            dweights = dweight_N.index_select(0, routing.inverse).view(-1, K)
        h_NF.mul_(weight_N1)
        dh_NF.mul_(weight_N1)
        du_NF = silu_NF.mul_(dh_NF)
        dg_NF = torch.ops.aten.silu_backward(dh_NF.mul_(u_NF), g_NF)
        if need_x:
            dx = self.together(x, (dg_NF, w1), (du_NF, w3))
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
            a = 0
            for (d, x), routing, of in zip(calls, routings, bounds, strict=True):
                span, b = slice(of[e], of[e + 1]), a + of[e + 1] - of[e]
                rows[a:b] = d[span]
                torch.index_select(x, 0, routing.token[span], out=inputs[a:b])
                a = b
            # no rows, a product of zeros
            some = slice(0, _whole(count))
            left, right = (inputs, rows) if transposed else (rows, inputs)
            for x in (left, right):
                x[count : some.stop] = 0
            torch.mm(left[some].t(), right[some], out=out[e])
        return out


class Loop(Experts):
    """One matrix product for each expert that has rows, gathered and added up while they fit a cache.

    A product takes a multiple of `ROWS` rows: those too many are the next expert's, who writes over them.
    """

    def __init__(self, routing: Routing) -> None:
        super().__init__(routing)
        bounds = routing.offsets.tolist()
        spans = ((e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a)
        self.spans = [(e, a, b, min(a + _whole(b - a), bounds[-1])) for e, a, b in spans]
        self.most = max((j - a for _, a, _, j in self.spans), default=0)

    def apart(self, x_TA: Tensor, *stacks_EAB: Tensor) -> list[Tensor]:
        token_N = self.routing.token
        taken = x_TA.new_empty(self.most, x_TA.shape[1])
        out = [x_TA.new_empty(len(token_N), w.shape[2]) for w in stacks_EAB]
        for e, a, _, j in self.spans:
            rows = torch.index_select(x_TA, 0, token_N[a:j], out=taken[: j - a])
            for w, o in zip(stacks_EAB, out, strict=True):
                torch.mm(rows, w[e], out=o[a:j])
        return out

    def together(self, like_TB: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        token_N = self.routing.token
        made = like_TB.new_empty(self.most, like_TB.shape[1])
        total = torch.zeros_like(like_TB, dtype=torch.promote_types(like_TB.dtype, torch.float32))
        for e, a, b, j in self.spans:
            out = made[: j - a]
            for n, (rows, w) in enumerate(pairs):
                torch.addmm(out, rows[a:j], w[e], beta=1 if n else 0, out=out)
            total.index_add_(0, token_N[a:b], out[: b - a].to(total.dtype))
        return total.to(like_TB.dtype)


class Grouped(Experts):
    """`torch.nn.functional.grouped_mm`; no host synchronisation but for the gradients of weights."""

    def __init__(self, routing: Routing) -> None:
        super().__init__(routing)
        self.ends = routing.offsets[1:].int()

    def apart(self, x_TA: Tensor, *stacks_EAB: Tensor) -> list[Tensor]:
        rows = x_TA.index_select(0, self.routing.token)
        return [F.grouped_mm(rows, w, offs=self.ends) for w in stacks_EAB]

    def together(self, like_TB: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        if not len(self.routing.order):
            return torch.zeros_like(like_TB)
        rows_NB, *more = (F.grouped_mm(rows, w, offs=self.ends) for rows, w in pairs)
        for rows in more:
            rows_NB.add_(rows)
        # the rows of each token, in the order of its slots
        slots_TK = self.routing.inverse.view(len(like_TB), -1)
        return F.embedding_bag(slots_TK, rows_NB, mode="sum")
