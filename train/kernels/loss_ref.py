"""The losses of one predicted token against the target's distribution, in plain torch, two ways.

`head_loss_reference` holds all logits and leaves the gradients to autograd: the slow reference.
`loss_rows` writes the gradient of a chunk of logits over the logits themselves: the torch backend.

Legend: T tokens, C tokens of a chunk, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ALPHA_MIN", "ETA", "Teacher", "head_loss_reference", "loss_rows"]

ETA = 3.0
"""eta of lk_lambda."""
ALPHA_MIN = 1e-20
"""Overlap below which -log(overlap) is cut off, and its gradient zero."""


def head_loss_reference(
    student_TD: Tensor,
    teacher_TD: Tensor,
    head_VD: Tensor,
    loss: str = "kl",
    weights_T: Tensor | None = None,
    targets_T: Tensor | None = None,
    temperature: float = 1.0,
    draft_head_ND: Tensor | None = None,
    keep_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All logits at once; arguments as `train.loss.head_loss` takes them, two-dimensional student only.

    Returns:
        loss (scalar), agree bool [T], overlap [T] and the loss of each token [T]; the first is differentiable
        in all inputs.
    """
    wide = torch.promote_types(student_TD.dtype, torch.float32)
    s = F.linear(student_TD, head_VD if draft_head_ND is None else draft_head_ND).to(wide) / temperature
    t = F.linear(teacher_TD, head_VD).to(wide) / temperature
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    s_at_T, t_at_T = s.argmax(-1), t.argmax(-1)
    missed_T = torch.zeros_like(t_at_T, dtype=torch.bool)
    if keep_N is not None:
        s_at_T, log_p = keep_N[s_at_T], log_p[:, keep_N]
        missed_T = ~torch.isin(t_at_T, keep_N)
        if loss == "ce" and targets_T is not None:
            missed_T |= ~torch.isin(targets_T, keep_N)
            targets_T = torch.searchsorted(keep_N, targets_T).clamp(max=len(keep_N) - 1)
    p, q = log_p.exp(), log_q.exp()
    alpha = torch.minimum(p, q).sum(-1)
    kl = (p * (log_p - log_q)).sum(-1)
    if loss == "kl":
        rows = kl
    elif loss == "ce":
        assert targets_T is not None
        rows = -log_q.gather(1, targets_T[:, None])[:, 0]
    elif loss == "tv":
        rows = 1 - alpha
    elif loss == "lk_alpha":
        rows = -alpha.clamp_min(ALPHA_MIN).log()
    elif loss == "lk_lambda":
        mix = (-ETA * alpha.detach()).exp()
        rows = mix * kl + (1 - mix) * (1 - alpha)
    else:
        raise ValueError(loss)
    counted = rows.masked_fill(missed_T, 0)
    total = counted.sum() if weights_T is None else (counted * weights_T).sum()
    return total, s_at_T == t_at_T, alpha.detach(), rows.detach()


def _scaled(x_CV: Tensor, share_C: Tensor | None) -> Tensor:
    return x_CV if share_C is None else x_CV.mul_(share_C[:, None])


class Teacher(NamedTuple):
    """What the losses need of a chunk's teacher; the same for all students."""

    logits_CV: Tensor
    """Divided by the temperature, in the dtype of the losses."""
    at_C: Tensor
    """Place of the greatest logit, the first of equal ones."""
    lse_C: Tensor
    """Log-sum-exp over all tokens."""
    p_CV: Tensor
    share_C: Tensor | None
    """Sum of p where some tokens have no column."""

    @classmethod
    def of(
        cls, t_CV: Tensor, temperature: float, wide: torch.dtype, rest_C: Tensor | None = None
    ) -> "Teacher":
        """Read a chunk of logits.

        Args:
            t_CV: logits; kept.
            temperature: divides them.
            wide: dtype of the losses.
            rest_C: log-sum-exp of the logits, divided by the temperature, of tokens that have no column: they
                take their share of p and none of q.
        """
        highest_C, at_C = t_CV.max(-1)
        t, highest_C = t_CV.to(wide), highest_C.to(wide)
        if temperature != 1:
            t, highest_C = t / temperature, highest_C / temperature
        p = t.softmax(-1)
        # log-sum-exp, from the greatest logit and its probability, without another pass
        lse_C = highest_C - p.gather(1, at_C[:, None])[:, 0].log_()
        share_C = None
        if rest_C is not None:
            kept_C, lse_C = lse_C, torch.logaddexp(lse_C, rest_C)
            share_C = (kept_C - lse_C).exp_()
        return cls(t, at_C, lse_C, _scaled(p, share_C), share_C)


def loss_rows(
    s_CV: Tensor,
    teacher: Teacher,
    loss: str,
    weight_C: Tensor,
    target_C: Tensor | None,
    temperature: float,
    per_token_C: Tensor,
    agree_C: Tensor,
    overlap_C: Tensor,
    backward: bool,
) -> None:
    """Losses of a chunk; with `backward`, s_CV becomes the gradient of the weighted sum by its logits.

    Args:
        s_CV: logits of the student, overwritten.
        teacher: of the same rows and temperature; kept.
        loss: name of the loss.
        weight_C: weight of each row; a row of weight 0 gets a gradient of exact zeros whatever it holds.
        target_C: int64, the token of each row, for `ce`.
        temperature: divides the logits.
        per_token_C, agree_C, overlap_C: filled in: unweighted loss, equal arg-max, sum of min(p, q).
        backward: whether to form the gradient.
    """
    wide = per_token_C.dtype
    t, t_at_C, t_lse_C, p, share_C = teacher
    s = s_CV.to(wide)
    s_max_C = s.amax(-1)
    # to find a place is slow: only rows whose greatest logit the teacher's token has too are searched
    torch.eq(s.gather(1, t_at_C[:, None])[:, 0], s_max_C, out=agree_C)
    equal = agree_C.nonzero()[:, 0]
    agree_C[equal] = s[equal].argmax(-1) == t_at_C[equal]
    if temperature != 1:
        s, s_max_C = s / temperature, s_max_C / temperature
    q = s.softmax(-1)
    s_lse_C = s_max_C - q.amax(-1).log_()
    if loss == "ce":
        assert target_C is not None
        token_C1 = target_C.clamp(0, s.shape[1] - 1)[:, None]
        torch.sub(s_lse_C, s.gather(1, token_C1)[:, 0], out=per_token_C)
    if loss in ("kl", "lk_lambda"):
        torch.sum(torch.sub(t, s, out=s).mul_(p), -1, out=per_token_C)
        apart_C = s_lse_C - t_lse_C
        per_token_C.add_(apart_C if share_C is None else apart_C * share_C)
    torch.sum(torch.minimum(p, q, out=s), -1, out=overlap_C)
    difference = torch.sub(q, p, out=s)
    if loss == "lk_lambda":
        mix_C = overlap_C.mul(-ETA).exp_()
        per_token_C.mul_(mix_C).add_((1 - mix_C) * (1 - overlap_C))
    elif loss == "lk_alpha":
        torch.neg(overlap_C.clamp_min(ALPHA_MIN).log_(), out=per_token_C)
    elif loss == "tv":
        torch.sub(1, overlap_C, out=per_token_C)
    if not backward:
        return
    # by the logits: of kl, q - p (q times the sum of p where that is not 1); of ce, q - onehot; of the
    # overlap, q (m - M), with m = 1 where q < p (1/2 where equal: the subgradient of torch.minimum) and
    # M = sum of q m
    weight_C1 = (weight_C / temperature)[:, None]
    if loss == "ce":
        q.scatter_add_(1, token_C1, q.new_full(token_C1.shape, -1.0))
    elif loss == "kl":
        q = difference if share_C is None else _scaled(q, share_C).sub_(p)
    else:
        m = difference.sign_().sub_(1).mul_(-0.5)
        toward = m.sub_(torch.linalg.vecdot(q, m)[:, None]).mul_(q)
        if loss == "tv":
            q = toward.neg_()
        elif loss == "lk_alpha":
            seen = overlap_C > ALPHA_MIN
            q = toward.mul_(torch.where(seen, -1 / overlap_C.clamp_min(ALPHA_MIN), 0)[:, None])
        else:
            q = _scaled(q, share_C).sub_(p).mul_(mix_C[:, None]).sub_(toward.mul_((1 - mix_C)[:, None]))
    torch.mul(q, weight_C1, out=s_CV if s_CV.dtype == q.dtype else q)
    if s_CV.dtype != q.dtype:
        s_CV.copy_(q)
    s_CV.index_fill_(0, (weight_C == 0).nonzero()[:, 0], 0)
