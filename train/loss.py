"""The vocabulary loss: student against teacher through one frozen head, a chunk of tokens at a time.

Legend: T tokens, S draft steps, D width, V vocabulary.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.kernels.loss_ref import loss_rows

__all__ = ["HeadLoss", "Loss", "default_chunk", "head_loss"]

Loss = Literal["kl", "ce", "lk_alpha", "lk_lambda", "tv"]
BACKENDS = ("torch", "triton")


class HeadLoss(NamedTuple):
    """What `head_loss` returns."""

    loss: Tensor
    """Scalar, float32: sum over tokens of weight times loss. The only field with a gradient."""
    agree: Tensor
    """bool, shape of the student without its last dimension: student and teacher have the same arg-max."""
    overlap: Tensor
    """float32, same shape: sum over v of min(p[v], q[v]), the chance that a sampled draft is accepted."""
    per_token: Tensor
    """float32, same shape: the loss of each token, without its weight."""


def default_chunk(vocab_size: int, device: torch.device) -> int:
    """Tokens of a chunk: two bfloat16 logit tensors of 0.5 GB each on a GPU, what a cache holds on CPU."""
    if device.type == "cuda":
        return max((1 << 28) // vocab_size // 128, 1) * 128
    # matrix products of fewer than 64 rows are slow
    return max((1 << 19) // vocab_size, 64)


def _rows(backend: str) -> Any:
    if backend == "triton":
        from train.kernels.loss_triton import loss_rows as triton_rows  # its import reads TRITON_INTERPRET

        return triton_rows
    return loss_rows


class _HeadLoss(torch.autograd.Function):
    """The gradient is formed in the forward, while a chunk's logits are there, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_STD: Tensor,
        teacher_TD: Tensor,
        head_VD: Tensor,
        loss: str,
        weights_ST: Tensor,
        targets_T: Tensor | None,
        temperature: float,
        chunk: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = _rows(backend)
        steps, T, _ = student_STD.shape
        V = len(head_VD)
        backward = ctx.needs_input_grad[0]
        grad_STD = torch.empty_like(student_STD) if backward else None
        per_token_ST, overlap_ST = weights_ST.new_zeros(steps, T), weights_ST.new_zeros(steps, T)
        agree_ST = torch.zeros(steps, T, dtype=torch.bool, device=student_STD.device)
        s_CV = student_STD.new_empty(min(chunk, T), V)
        t_CV = torch.empty_like(s_CV)
        for a in range(0, T, chunk):
            b = min(a + chunk, T)
            s, t = s_CV[: b - a], t_CV[: b - a]
            torch.mm(teacher_TD[a:b], head_VD.t(), out=t)
            for i in range(steps):
                torch.mm(student_STD[i, a:b], head_VD.t(), out=s)
                rows(
                    s,
                    t,
                    loss,
                    weights_ST[i, a:b],
                    None if targets_T is None else targets_T[a:b],
                    temperature,
                    per_token_ST[i, a:b],
                    agree_ST[i, a:b],
                    overlap_ST[i, a:b],
                    backward,
                )
                if grad_STD is not None:
                    torch.mm(s, head_VD, out=grad_STD[i, a:b])
        if grad_STD is not None:
            ctx.save_for_backward(grad_STD)
        # a token of weight 0 may hold anything, NaN included
        total = (per_token_ST * weights_ST).masked_fill(weights_ST == 0, 0).sum()
        ctx.mark_non_differentiable(agree_ST, overlap_ST, per_token_ST)
        return total, agree_ST, overlap_ST, per_token_ST

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad_STD,) = ctx.saved_tensors
        return (grad_STD * grad, *[None] * 8)


def head_loss(
    student: Tensor,
    teacher: Tensor,
    head: Tensor,
    loss: str = "kl",
    weights: Tensor | None = None,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    backend: str | None = None,
) -> HeadLoss:
    """Compare what student and teacher predict through the same frozen head.

    With p = softmax(head teacher / temperature), q = softmax(head student / temperature) and
    alpha = sum over v of min(p[v], q[v]), the loss of a token is

        kl         sum p log(p / q)
        ce         -log q[target]
        tv         1 - alpha, which is sum |p - q| / 2
        lk_alpha   -log alpha
        lk_lambda  lambda kl + (1 - lambda) (1 - alpha), lambda = exp(-3 alpha) without gradient

    Never holds [tokens, vocabulary] for more than `chunk` tokens. The logits have the dtype of the states, as
    the engines' have; everything after them is float32. No factor temperature ** 2 is applied.

    Args:
        student: [T, D], or [S, T, D] when S students share one teacher, whose logits are then computed once.
            The only input that gets a gradient.
        teacher: [T, D], dtype of `student`.
        head: [V, D], dtype of `student`.
        loss: name of the loss.
        weights: float32, shape of `student` without D; ones by default. A token of weight 0 has no part in
            the loss and a gradient of exact zeros, whatever its states hold.
        targets: int64 [T], required by `ce`; not read where the weight is 0.
        temperature: above 0.
        chunk: tokens whose logits are held at once; by default what fits 0.5 GB (a cache on CPU).
        backend: `torch` or `triton`; None chooses by device.

    Returns:
        loss, agree, overlap and the loss of each token.

    Raises:
        ValueError: an argument does not fit; the message names it, what was found and what was expected.

    Source: lk_alpha and lk_lambda with eta 3 as in the LK losses of arXiv 2602.23881.
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss: found {loss!r}, expected one of {', '.join(get_args(Loss))}")
    if student.dim() not in (2, 3):
        raise ValueError(f"student: found shape {list(student.shape)}, expected [T, D] or [S, T, D]")
    if head.dim() != 2 or head.shape[1] != student.shape[-1]:
        raise ValueError(f"head: found shape {list(head.shape)}, expected [vocabulary, {student.shape[-1]}]")
    if teacher.shape != student.shape[-2:]:
        raise ValueError(f"teacher: found shape {list(teacher.shape)}, expected {list(student.shape[-2:])}")
    if student.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"student: found {student.dtype}, expected torch.bfloat16 or torch.float32")
    for name, t in (("teacher", teacher), ("head", head)):
        if t.dtype != student.dtype:
            raise ValueError(f"{name}: found {t.dtype}, expected {student.dtype}, the dtype of student")
    if not temperature > 0:
        raise ValueError(f"temperature: found {temperature}, expected a number above 0")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: found {chunk}, expected 1 or more")
    if backend not in (*BACKENDS, None):
        raise ValueError(f"backend: found {backend!r}, expected {' or '.join(BACKENDS)} or None")
    wide = torch.promote_types(student.dtype, torch.float32)
    shape = student.shape[:-1]
    if weights is None:
        weights = torch.ones(shape, dtype=wide, device=student.device)
    elif weights.shape != shape or weights.dtype != wide:
        raise ValueError(
            f"weights: found {weights.dtype} {list(weights.shape)}, expected {wide} {list(shape)}"
        )
    if loss == "ce":
        if targets is None:
            raise ValueError("targets: found none, expected int64 [T], which the loss ce compares with")
        if targets.shape != shape[-1:] or targets.dtype != torch.int64:
            raise ValueError(
                f"targets: found {targets.dtype} {list(targets.shape)},"
                f" expected torch.int64 {list(shape[-1:])}"
            )
        if targets.device.type == "cpu":
            used = targets[(weights != 0).view(-1, len(targets)).any(0)]
            low, high = map(int, used.aminmax()) if len(used) else (0, 0)
            if low < 0 or high >= len(head):
                raise ValueError(f"targets: found ids from {low} to {high}, expected 0 to {len(head) - 1}")
    else:
        targets = None
    others = {"teacher": teacher, "head": head, "weights": weights, "targets": targets}
    for name, other in others.items():
        if other is not None and other.device != student.device:
            raise ValueError(
                f"{name}: found on {other.device}, expected on {student.device}, where student is"
            )
    steps_first = student if student.dim() == 3 else student[None]
    result = _HeadLoss.apply(
        steps_first.contiguous(),
        teacher.detach(),
        head.detach(),
        loss,
        weights.detach().view(steps_first.shape[:-1]),
        targets,
        float(temperature),
        chunk or default_chunk(len(head), student.device),
        backend or ("triton" if student.device.type == "cuda" and wide == torch.float32 else "torch"),
    )
    total, agree, overlap, per_token = result
    return HeadLoss(total, agree.view(shape), overlap.view(shape), per_token.view(shape))
