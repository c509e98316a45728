"""The vocabulary loss: student against teacher through one frozen head, a chunk of tokens at a time.

Legend: T tokens, S draft steps, D width, V vocabulary.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.kernels.loss_ref import Teacher, loss_rows

__all__ = ["HeadLoss", "Loss", "default_chunk", "head_loss"]

Loss = Literal["kl", "ce", "lk_alpha", "lk_lambda", "tv"]
BACKENDS = ("torch", "triton")


class HeadLoss(NamedTuple):
    """What `head_loss` returns."""

    loss: Tensor
    """Scalar, float32: sum over tokens of weight times loss."""
    agree: Tensor
    """bool, shape of the student without its last dimension: student and teacher have the same arg-max."""
    overlap: Tensor
    """float32, same shape: sum over v of min(p[v], q[v]), the chance that a sampled draft is accepted."""
    per_token: Tensor
    """float32, same shape: the loss of each token, without its weight."""
    hit: Tensor | None = None
    """bool, same shape: the student's arg-max is the target token itself; where `hits` asked for it."""
    indexer: Tensor | None = None
    """Scalar with a gradient for the indexer alone: its own loss, where a draft trains it."""


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
        draft_head_ND: Tensor | None,
        keep_N: Tensor | None,
        tokens_T: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        rows = _rows(backend)
        steps, T, _ = student_STD.shape
        V = len(head_VD)
        own_ND = head_VD if draft_head_ND is None else draft_head_ND
        backward = ctx.needs_input_grad[0]
        grad_STD = torch.empty_like(student_STD) if backward else None
        # the head's gradient is a sum over every chunk and step
        grad_ND = own_ND.new_zeros(own_ND.shape, dtype=weights_ST.dtype) if ctx.needs_input_grad[9] else None
        per_token_ST, overlap_ST = weights_ST.new_zeros(steps, T), weights_ST.new_zeros(steps, T)
        agree_ST = torch.zeros(steps, T, dtype=torch.bool, device=student_STD.device)
        hit_ST = None if tokens_T is None else torch.zeros_like(agree_ST)
        t_CV = student_STD.new_empty(min(chunk, T), V)
        s_CN = t_CV.new_empty(len(t_CV), len(own_ND))
        seen_V = None if keep_N is None else _marked(keep_N, V)
        for a in range(0, T, chunk):
            b = min(a + chunk, T)
            s, t = s_CN[: b - a], t_CV[: b - a]
            torch.mm(teacher_TD[a:b], head_VD.t(), out=t)
            rest_C = missed_C = None
            if keep_N is not None and seen_V is not None:
                missed_C = ~seen_V[t.argmax(-1)]
                if targets_T is not None:
                    missed_C |= ~seen_V[targets_T[a:b].clamp(0, V - 1)]
                weights_ST[:, a:b].masked_fill_(missed_C, 0)
                rest_C = (t[:, ~seen_V].to(weights_ST.dtype) / temperature).logsumexp(-1)
                t = t[:, keep_N]
            # the Triton kernel reads the teacher's row beside each student's, where it has the time to
            plain = rows is loss_rows
            teacher = Teacher.of(t, temperature, weights_ST.dtype, rest_C) if plain else t
            for i in range(steps):
                torch.mm(student_STD[i, a:b], own_ND.t(), out=s)
                if hit_ST is not None and tokens_T is not None:
                    at_C = s.argmax(-1)
                    hit_ST[i, a:b] = (at_C if keep_N is None else keep_N[at_C]) == tokens_T[a:b]
                rows(
                    s,
                    teacher,
                    loss,
                    weights_ST[i, a:b],
                    None if targets_T is None else _places(targets_T[a:b], keep_N),
                    temperature,
                    per_token_ST[i, a:b],
                    agree_ST[i, a:b],
                    overlap_ST[i, a:b],
                    backward,
                    *(() if plain else (rest_C,)),
                )
                if grad_STD is not None:
                    torch.mm(s, own_ND, out=grad_STD[i, a:b])
                if grad_ND is not None:
                    grad_ND += s.t() @ student_STD[i, a:b].masked_fill(weights_ST[i, a:b, None] == 0, 0)
            if missed_C is not None:
                agree_ST[:, a:b] &= ~missed_C
        if grad_STD is not None:
            ctx.save_for_backward(grad_STD, grad_ND)
        # a token of weight 0 may hold anything, NaN included
        total = (per_token_ST * weights_ST).masked_fill(weights_ST == 0, 0).sum()
        counted = [agree_ST, overlap_ST, per_token_ST, *([] if hit_ST is None else [hit_ST])]
        ctx.mark_non_differentiable(*counted)
        return total, agree_ST, overlap_ST, per_token_ST, hit_ST

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_STD, grad_ND = ctx.saved_tensors
        head = None if grad_ND is None else (grad_ND * grad).to(grad_STD.dtype)
        return (grad_STD * grad, *[None] * 8, head, None, None)


def _marked(keep_N: Tensor, size: int) -> Tensor:
    """bool [V]: the token is in the draft's vocabulary."""
    return torch.zeros(size, dtype=torch.bool, device=keep_N.device).index_fill_(0, keep_N, True)


def _places(targets_C: Tensor, keep_N: Tensor | None) -> Tensor:
    """Targets as ids of the draft; what it stands for means nothing where the target is not kept."""
    if keep_N is None:
        return targets_C
    return torch.searchsorted(keep_N, targets_C).clamp(max=len(keep_N) - 1)


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
    draft_head: Tensor | None = None,
    keep: Tensor | None = None,
    hits: bool = False,
) -> HeadLoss:
    """Compare what student and teacher predict through the same frozen head, or the student through its own.

    With p = softmax(head teacher / temperature), q = softmax(head student / temperature) and
    alpha = sum over v of min(p[v], q[v]), the loss of a token is

        kl         sum p log(p / q)
        ce         -log q[target]
        tv         1 - alpha, which is sum |p - q| / 2
        lk_alpha   -log alpha
        lk_lambda  lambda kl + (1 - lambda) (1 - alpha), lambda = exp(-3 alpha) without gradient

    Never holds [tokens, vocabulary] for more than `chunk` tokens. The logits have the dtype of the states, as
    the engines' have; everything after them is float32. No factor temperature ** 2 is applied.

    A student of a smaller vocabulary has q over `keep` alone, p stays the teacher's over all tokens, and the
    sums run over `keep`. Where the teacher's arg-max (or the target of `ce`) is not in it, the student can
    only miss: no agreement, and the row counts with weight 0 in the loss.

    Args:
        student: [T, D], or [S, T, D] when S students share one teacher, whose logits are then computed once.
            It gets a gradient, and of the other inputs `draft_head` alone.
        teacher: [T, D], dtype of `student`.
        head: [V, D], dtype of `student`.
        loss: name of the loss.
        weights: float32, shape of `student` without D; ones by default. A token of weight 0 has no part in
            the loss and a gradient of exact zeros, whatever its states hold.
        targets: int64 [T], required by `ce`; not read where the weight is 0.
        temperature: above 0.
        chunk: tokens whose logits are held at once; by default what fits 0.5 GB (a cache on CPU).
        backend: `torch` or `triton`; None chooses by device.
        draft_head: [N, D], dtype of `student`: the student's own head, which may get a gradient too.
        keep: token ids of the rows of `draft_head`, ascending int64 [N]; needed where N is not V.
        hits: compare the student's arg-max with `targets` too, which may be of any loss then.

    Returns:
        loss, agree, overlap, the loss of each token, and with `hits` whether the arg-max is the target token.

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
    if (draft_head is None) != (keep is None) and (draft_head is None or len(draft_head) != len(head)):
        raise ValueError("keep: a draft head of another size and its token ids come together")
    if draft_head is not None:
        expected = [len(head) if keep is None else len(keep), head.shape[1]]
        if list(draft_head.shape) != expected:
            raise ValueError(f"draft_head: found shape {list(draft_head.shape)}, expected {expected}")
    for name, t in (("teacher", teacher), ("head", head), ("draft_head", draft_head)):
        if t is not None and t.dtype != student.dtype:
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
    if loss == "ce" or hits:
        if targets is None:
            raise ValueError(
                "targets: found none, expected int64 [T], which the loss ce and hits compare with"
            )
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
    others |= {"draft_head": draft_head, "keep": keep}
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
        # rows that a smaller vocabulary misses are taken out of a copy
        weights.detach().view(steps_first.shape[:-1]).clone(),
        targets if loss == "ce" else None,
        float(temperature),
        chunk or default_chunk(len(head), student.device),
        backend or ("triton" if student.device.type == "cuda" and wide == torch.float32 else "torch"),
        draft_head,
        keep,
        targets if hits else None,
    )
    total, agree, overlap, per_token, hit = result
    by_token = agree.view(shape), overlap.view(shape), per_token.view(shape)
    return HeadLoss(total, *by_token, None if hit is None else hit.view(shape))
