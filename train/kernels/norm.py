"""The root mean square norm with a backward of a few passes on a CPU, where torch composes it of a dozen.

Legend: T rows, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["RMSNorm"]

# elements of a piece, which stays in a cache from its first pass to its last
PIECE = 1 << 18


def _pieces(*of_T: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, a piece at a time."""
    return zip(*(x.split(max(PIECE // max(of_T[0].shape[1], 1), 1)) for x in of_T), strict=True)


class _RMSNorm(torch.autograd.Function):
    """torch's own forward, and a backward in float32 from its input and one factor of each row."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y_TD, factor_T1 = torch.ops.aten._fused_rms_norm(x_TD, [x_TD.shape[1]], weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, factor_T1)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, factor_T1 = ctx.saved_tensors
        wide = factor_T1.dtype
        dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        w, dw = weight_D.to(wide), weight_D.new_zeros(len(weight_D), dtype=wide)
        for x, grad, factor, dx in _pieces(x_TD, grad_TD, factor_T1, dx_TD):
            x, grad = x.to(wide), grad.to(wide)
            product = x * grad
            dw.addmv_(product.t(), factor[:, 0])
            along = torch.mv(product, w)[:, None].mul_(factor).mul_(factor).div_(x.shape[1])
            torch.mul(grad, w, out=product).addcmul_(x, along, value=-1)
            dx.copy_(product.mul_(factor))
        return dx_TD, dw.to(weight_D.dtype), None


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm`, whose backward has a kernel of its own on a GPU alone."""

    def forward(self, x: Tensor) -> Tensor:
        """y = weight * x / sqrt(mean of x ** 2 + eps); x and y [..., D]."""
        if x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return super().forward(x)
        return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)
