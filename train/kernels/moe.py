"""Routed experts: checks, the autograd function and the choice of a backend.

Legend: T tokens, D model width, F expert width, E experts, K experts a token, N = T * K rows.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.kernels import moe_torch
from train.kernels.routing import Routing, route

__all__ = ["BACKENDS", "Backend", "default_backend", "moe"]

Backend = Literal["torch", "grouped_mm", "triton"]
BACKENDS: tuple[Backend, ...] = ("torch", "grouped_mm", "triton")


def default_backend(x: Tensor, w1: Tensor) -> Backend:
    """Triton on a GPU from sm_80 on, grouped_mm elsewhere, the loop where neither fits.

    Both need rows of a multiple of 16 bytes, and bfloat16 or float32.
    """
    aligned = all(n * x.element_size() % 16 == 0 for n in w1.shape[1:])
    if not aligned or x.dtype not in (torch.bfloat16, torch.float32):
        return "torch"
    gpu = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] >= 8
    return "triton" if gpu else "grouped_mm"


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


def check(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, ids: bool
) -> None:
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
    if ids and topk_ids.numel():
        low, high = map(int, topk_ids.aminmax())
        if low < 0 or high >= E:
            raise ValueError(f"topk_ids: found ids from {low} to {high}, expected 0 to {E - 1}")


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
        ops: Any,
        main_grads: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Tensor:
        routing = route(topk_ids, len(w1))
        y, g, u = ops.forward(x, topk_weights, w1, w3, w2, routing)
        # the weights go in as they came: a partitioned parameter is freed and gathered again in between
        ctx.save_for_backward(x, topk_weights, w1, w3, w2, g, u, *routing)
        ctx.ops, ctx.main_grads = ops, main_grads
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_weights, w1, w3, w2, g, u, *routing = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx, dweights, dw1, dw3, dw2 = ctx.ops.backward(
            dy.contiguous(),
            x,
            topk_weights,
            w1,
            w3,
            w2,
            g,
            u,
            Routing(*routing),
            need=(need[0], need[2], need[3], need[4], need[5]),
            main_grads=ctx.main_grads,
        )
        return dx, None, dweights, dw1, dw3, dw2, None, None


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
    *,
    main_grads: tuple[Tensor, Tensor, Tensor] | None = None,
    debug: bool = False,
) -> Tensor:
    """Send each token through its experts and add up what they return, each with its router weight.

    y[t] = sum over k of topk_weights[t, k] * w2[e] (silu(w1[e] x[t]) * (w3[e] x[t])), e = topk_ids[t, k].

    Args:
        x: tokens [T, D], bfloat16 or float32 (float64 in the torch backend). T may be 0.
        topk_ids: int64 or int32 [T, K], each in [0, E); a token's ids may repeat.
        topk_weights: float32 [T, K].
        w1, w3: gate and up projections [E, F, D], contiguous, dtype of `x`.
        w2: down projections [E, D, F], contiguous, dtype of `x`.
        backend: `torch`, `grouped_mm` or `triton`; None chooses by device and shape.
        main_grads: float32 buffers like (w1, w3, w2); the backward adds the weights' gradients to them in
            float32, and the weights themselves get none.
        debug: check the ids on a GPU too, at the cost of a synchronisation; on CPU they always are.

    Returns:
        [T, D], dtype of `x`; differentiable once in x, topk_weights, w1, w3 and w2. Experts without tokens
        get gradients of exact zeros. Nothing is added in an order that depends on timing.

    Raises:
        ValueError: an argument does not fit; the message names it, what was found and what was expected.

    Source: arXiv 2412.19437, equation 12 without the shared expert; reference in `moe_ref.py`.
    """
    check(x, topk_ids, topk_weights, w1, w3, w2, ids=debug or x.device.type == "cpu")
    name = backend or default_backend(x, w1)
    ops = _ops(name)
    if ops is not moe_torch.Loop:
        check_rows(x, w1, name)
    if main_grads is not None:
        for label, buffer, w in zip(("w1", "w3", "w2"), main_grads, (w1, w3, w2), strict=True):
            if buffer.shape != w.shape or buffer.dtype != torch.float32 or not buffer.is_contiguous():
                raise ValueError(
                    f"main_grads: found {buffer.dtype} {list(buffer.shape)} for {label}, expected"
                    f" torch.float32 {list(w.shape)}, contiguous"
                )
    return _Moe.apply(x.contiguous(), topk_ids, topk_weights, w1, w3, w2, ops, main_grads)
