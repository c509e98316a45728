"""Block-scaled float8: one float32 scale for each 128 x 128 block of a weight, as in DeepSeek's checkpoints.

A weight `X.weight` in float8_e4m3fn stands beside `X.weight_scale_inv`; the value is the product of the two.
With `ue8m0` (`quantization_config.scale_fmt`) every scale is a power of two, still stored as float32.

Shape suffixes: O rows (out features), I columns (in features), P and Q blocks of rows and columns.
"""

import torch
import torch.nn.functional as F

from configs.errors import InputError

__all__ = ["BLOCK", "FP8_MAX", "dequantize", "quantize", "scale_shape"]

BLOCK = (128, 128)
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
# keeps the scale of an all-zero block finite and away from float32's subnormals
MIN_AMAX = 1e-4


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape [P, Q] of the scales of a weight [O, I]; the last block of either side may be part empty."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def _expand(scale_PQ: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    wide = scale_PQ.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def quantize(
    w: torch.Tensor, *, power_of_two: bool = True, block: tuple[int, int] = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight block by block, rounding to nearest even.

    A block's scale is `max(amax, 1e-4) / 448`, raised to the next power of two with `power_of_two`, so that
    the error of a value v is at most `max(|v| / 16, scale / 1024)` and the largest value is never cut off.

    Args:
        w: [O, I], any floating dtype.
        power_of_two: scales as `scale_fmt: ue8m0` asks; False for checkpoints without it.
        block: rows and columns of a block.

    Returns:
        w8: float8_e4m3fn [O, I].
        scale_inv: float32 [ceil(O / 128), ceil(I / 128)]; `w8 * scale_inv` restores the weight.

    Raises:
        InputError: the weight is not a matrix or holds a NaN or an infinity.
    Source: `fast_round_scale` of DeepSeek-V3.2-Exp's `inference/kernel.py` states the same rounding rule.
    """
    if w.ndim != 2:
        raise InputError(f"only matrices are quantised in blocks, found a tensor of shape {tuple(w.shape)}")
    w_OI = w.detach().float()
    rows, columns = scale_shape(w_OI.shape, block)
    padded = F.pad(w_OI, (0, columns * block[1] - w_OI.shape[1], 0, rows * block[0] - w_OI.shape[0]))
    amax_PQ = padded.abs().view(rows, block[0], columns, block[1]).amax(dim=(1, 3))
    if not amax_PQ.isfinite().all():
        raise InputError(f"{int((~w_OI.isfinite()).sum()):,} of {w_OI.numel():,} weights are NaN or infinite")
    scale_PQ = amax_PQ.clamp(min=MIN_AMAX) / FP8_MAX
    if power_of_two:
        # frexp is exact where log2 is not: scale = mantissa * 2**exponent, mantissa in [0.5, 1)
        mantissa, exponent = torch.frexp(scale_PQ)
        scale_PQ = torch.ldexp(
            torch.ones_like(scale_PQ), torch.where(mantissa == 0.5, exponent - 1, exponent)
        )
    scaled_OI = w_OI / _expand(scale_PQ, w_OI.shape, block)
    return scaled_OI.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale_PQ


def dequantize(
    w8: torch.Tensor,
    scale_inv: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Restore a weight [O, I] from float8 values and block scales; exact in bfloat16 for power-of-two scales.

    Raises:
        InputError: the scales do not have one entry for each block.
    """
    if w8.ndim != 2 or tuple(scale_inv.shape) != scale_shape(tuple(w8.shape), block):
        raise InputError(
            f"scales of shape {tuple(scale_inv.shape)} do not fit a weight of shape {tuple(w8.shape)}"
            f" in blocks of {block[0]} x {block[1]}"
        )
    return (w8.float() * _expand(scale_inv.float(), w8.shape, block)).to(dtype)
