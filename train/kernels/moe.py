"""Routed experts: checks, the autograd functions and the choice of a backend.

The gradients of the stacked weights are not formed by each call's backward, which would write them whole for
however few tokens and leave autograd to add them up. The calls of a `weight_gradients_once` leave their rows,
and the first thing after the last of their backwards is one product for each weight over the rows of all:

    w ──► _Sink ──token──► _Moe, step 0 ──► ... ──► _Moe, step K-1        forward
    w.grad ◄── _Sink ◄── rows ── _Moe, step 0 ◄── ... ◄── _Moe, step K-1  backward

A token holds nothing; that every call depends on it is what makes autograd run `_Sink` after all of them.

Legend: T tokens, D model width, F expert width, E experts, K experts a token, N = T * K rows.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.kernels import moe_torch
from train.kernels.routing import Routing, route

__all__ = ["BACKENDS", "Backend", "default_backend", "moe", "weight_gradients_once"]

Backend = Literal["torch", "grouped_mm", "triton"]
BACKENDS: tuple[Backend, ...] = ("torch", "grouped_mm", "triton")


def default_backend(x: Tensor, w1: Tensor) -> Backend:
    """Triton in bfloat16 on sm_90, for which it has tiles, grouped_mm on other GPUs; elsewhere the loop.

    The first two need rows of a multiple of 16 bytes.
    """
    aligned = all(n * x.element_size() % 16 == 0 for n in w1.shape[1:])
    if x.device.type == "cpu" or not aligned or x.dtype not in (torch.bfloat16, torch.float32):
        return "torch"
    hopper = torch.cuda.get_device_capability(x.device)[0] == 9
    return "triton" if hopper and x.dtype == torch.bfloat16 else "grouped_mm"


def check_rows(x: Tensor, w1: Tensor, backend: str) -> None:
    """Refuse what grouped_mm and the tensor descriptors cannot read. Raises ValueError."""
    if x.dtype == torch.float64:
        raise ValueError(
            f"x: found {x.dtype}, expected torch.bfloat16 or torch.float32 with backend {backend}"
        )
    step = 16 // x.element_size()
    for name, size in (("x", x.shape[1]), ("w2", w1.shape[1])):
        if size % step:
            raise ValueError(
                f"{name}: found last dimension {size}, expected a multiple of {step} with backend {backend}"
            )


def check(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> None:
    """Refuse arguments that do not fit. Raises ValueError naming argument, found and expected."""

    def expect(name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: found shape {list(t.shape)}, expected {list(shape)}")
        if t.dtype not in dtypes:
            raise ValueError(f"{name}: found {t.dtype}, expected {' or '.join(map(str, dtypes))}")
        if t.device != x.device:
            raise ValueError(f"{name}: found on {t.device}, expected on {x.device}, where x is")

    if x.dim() != 2:
        raise ValueError(f"x: found shape {list(x.shape)}, expected [tokens, width]")
    if w1.dim() != 3:
        raise ValueError(f"w1: found shape {list(w1.shape)}, expected [experts, expert width, width]")
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids: found shape {list(topk_ids.shape)}, expected [tokens, experts a token]")
    (T, D), (E, F, _), K = x.shape, w1.shape, topk_ids.shape[1]
    floating = (torch.bfloat16, torch.float32, torch.float64)
    expect("x", x, (T, D), floating)
    expect("topk_ids", topk_ids, (T, K), (torch.int64, torch.int32))
    expect("topk_weights", topk_weights, (T, K), (torch.promote_types(x.dtype, torch.float32),))
    for name, w, shape in (("w1", w1, (E, F, D)), ("w3", w3, (E, F, D)), ("w2", w2, (E, D, F))):
        expect(name, w, shape, (x.dtype,))
        if not w.is_contiguous():
            raise ValueError(f"{name}: found strides {list(w.stride())}, expected a contiguous tensor")
    # on a GPU the check would wait for the device
    if topk_ids.device.type == "cpu" and topk_ids.numel():
        low, high = map(int, topk_ids.aminmax())
        if low < 0 or high >= E:
            raise ValueError(f"topk_ids: found ids from {low} to {high}, expected 0 to {E - 1}")


class _Shared:
    """What calls with the same weights have in common: the rows their backwards leave, and their product.

    The product of weight i (w1, w3, w2) is dense^T gathered[token] over the rows of each expert, with pairs
    (dense [N, F], gathered [T, D]) = (dg, x), (du, x), (h, dy).
    """

    def __init__(self, ops: Any, num_experts: int) -> None:
        self.ops, self.num_experts = ops, num_experts
        self.clear(None)

    def clear(self, backward: int | None) -> None:
        self.backward = backward
        self.ids: list[Tensor] = []
        self.routings: list[Routing] = []
        self.pairs: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [], [])

    def leave(self, topk_ids: Tensor, routing: Routing, *pairs: tuple[Tensor, Tensor] | None) -> None:
        # a graph may be walked more than once, and not every walk comes as far as the weights
        current = torch._C._current_graph_task_id()
        if current != self.backward:
            self.clear(current)
        self.ids.append(topk_ids)
        self.routings.append(routing)
        for rows, pair in zip(self.pairs, pairs, strict=True):
            if pair is not None:
                rows.append(pair)

    def gradient(self, weight: int) -> Tensor:
        rows = self.pairs[weight]
        if self.ops in (moe_torch.Loop, moe_torch.Grouped):
            gradient = self.ops.weight_grad_of_calls(rows, self.routings, transposed=weight == 2)
            rows.clear()
            return gradient
        # the kernels have one launch for all experts
        (dense, gathered), routing = rows[0], self.routings[0]
        if len(rows) > 1:
            # as if all tokens had come in one call: each call's rows move to where that call would have them
            routing = route(torch.cat(self.ids), self.num_experts)
            gathered = torch.cat([g for _, g in rows])
            dense = dense.new_empty(len(routing.order), dense.shape[1])
            places = routing.inverse.split([len(r.order) for r in self.routings])
            for place, call in zip(places, self.routings, strict=True):
                part, _ = rows.pop(0)
                dense.index_copy_(0, place.index_select(0, call.order), part)
                del part
        rows.clear()
        return self.ops.weight_grad(dense, gathered, routing, transposed=weight == 2)


class _Sink(torch.autograd.Function):
    """Gives out a token for a weight, and forms the weight's gradient when all that took it are done."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, shared: _Shared, weight: int) -> Tensor:
        ctx.shared, ctx.weight = shared, weight
        return w.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.shared.gradient(ctx.weight), None, None


class _Moe(torch.autograd.Function):
    """The experts with the backward of a backend; no output of the down projection is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        shared: _Shared,
        *tokens: Tensor | None,
    ) -> Tensor:
        routing = route(topk_ids, len(w1))
        y, g, u = shared.ops.forward(x, topk_weights, w1, w3, w2, routing)
        # the weights go in as they came: a partitioned parameter is freed and gathered again in between
        ctx.save_for_backward(x, topk_ids, topk_weights, w1, w3, w2, g, u, *routing)
        ctx.shared = shared
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_ids, topk_weights, w1, w3, w2, g, u, *routed = ctx.saved_tensors
        need_x, _, need_weights, *need = ctx.needs_input_grad[:6]
        routing, dy = Routing(*routed), dy.contiguous()
        dx, dweights, dg, du, h = ctx.shared.ops.backward(
            dy, x, topk_weights, w1, w3, w2, g, u, routing, need_x, need_weights
        )
        if any(need):
            pairs = ((dg, x), (du, x), (h, dy))
            ctx.shared.leave(
                topk_ids, routing, *(pair if n else None for pair, n in zip(pairs, need, strict=True))
            )
        return dx, None, dweights, *[None] * 7


# of the current `weight_gradients_once`: what calls share, by the weights they were given, and the weights
_once: ContextVar[dict[tuple[int, ...], tuple[_Shared, list[Tensor | None], tuple[Tensor, ...]]] | None]
_once = ContextVar("once", default=None)


@contextlib.contextmanager
def weight_gradients_once() -> Iterator[None]:
    """Form the gradient of each weight once for all calls of `moe` within that are given the same weights.

    Without it, each call's backward forms the gradients of its own rows and autograd adds up those of several
    calls. Gradients of calls within are never added, however many: they are one product over all rows.
    """
    reset = _once.set({})
    try:
        yield
    finally:
        _once.reset(reset)


def _share(ops: Any, weights: tuple[Tensor, ...]) -> tuple[_Shared, list[Tensor | None]]:
    """What a call has in common with those before it, and the token of each weight that wants a gradient."""
    begun = _once.get()
    graph = torch.is_grad_enabled()
    key = (id(ops), *map(id, weights), graph)
    if begun is not None and key in begun:
        return begun[key][:2]
    shared = _Shared(ops, len(weights[0]))
    tokens = [_Sink.apply(w, shared, i) if graph and w.requires_grad else None for i, w in enumerate(weights)]
    if begun is not None:
        begun[key] = shared, tokens, weights
    return shared, tokens


def _ops(backend: str) -> Any:
    if backend == "torch":
        return moe_torch.Loop
    if backend == "grouped_mm":
        return moe_torch.Grouped
    if backend == "triton":
        from train.kernels import moe_triton  # imported late: its import reads TRITON_INTERPRET

        return moe_triton
    raise ValueError(f"backend: found {backend!r}, expected one of {', '.join(BACKENDS)} or None")


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Send each token through its experts and add up what they return, each with its router weight.

    y[t] = sum over k of topk_weights[t, k] * w2[e] (silu(w1[e] x[t]) * (w3[e] x[t])), e = topk_ids[t, k].

    Args:
        x: tokens [T, D], bfloat16 or float32 (float64 in the torch backend). T may be 0.
        topk_ids: int64 or int32 [T, K], each in [0, E), checked on CPU only; a token's ids may repeat.
        topk_weights: float32 [T, K].
        w1, w3: gate and up projections [E, F, D], contiguous, dtype of `x`.
        w2: down projections [E, D, F], contiguous, dtype of `x`.
        backend: `torch`, `grouped_mm` or `triton`; None chooses by device and shape.

    Returns:
        [T, D], dtype of `x`; differentiable once in x, topk_weights, w1, w3 and w2. Experts without tokens
        get gradients of exact zeros. Nothing is added in an order that depends on timing. Several calls with
        the same weights belong into a `weight_gradients_once`.

    Raises:
        ValueError: an argument does not fit; the message names it, what was found and what was expected.

    Source: arXiv 2412.19437, equation 12 without the shared expert; reference in `moe_ref.py`.
    """
    check(x, topk_ids, topk_weights, w1, w3, w2)
    name = backend or default_backend(x, w1)
    ops = _ops(name)
    if ops is not moe_torch.Loop:
        check_rows(x, w1, name)
    shared, tokens = _share(ops, (w1, w3, w2))
    return _Moe.apply(x.contiguous(), topk_ids, topk_weights, w1, w3, w2, shared, *tokens)
