"""Triton kernel of the losses: one program a row of logits, three passes over the vocabulary.

Pass 1 finds log-sum-exp and arg-max of both rows, pass 2 the overlap, the loss and, for kl and ce, the
gradient; the other losses weigh their gradient by the overlap and need pass 3. Every pass reads both rows
from memory: those of all programs that run at a time are more than the L2 cache holds.

Legend: C tokens of a chunk, V vocabulary, BV columns of a step.
"""

import triton
import triton.language as tl
from torch import Tensor

from train.kernels.launch import launch, require_device, tile_for
from train.kernels.loss_ref import ALPHA_MIN, ETA

__all__ = ["loss_rows"]

# those from tv on are functions of the overlap
_CODES = {"kl": 0, "ce": 1, "tv": 2, "lk_alpha": 3, "lk_lambda": 4}
_KL, _CE, _TV, _LK_ALPHA, _LK_LAMBDA = (tl.constexpr(i) for i in range(5))


@triton.jit
def _online(x, o, high, total, at):
    """One step of a lane's running maximum, sum of exponentials below it, and place of the maximum."""
    above = x > high
    e = tl.exp(-tl.abs(x - high))
    total = tl.where(above, total * e + 1.0, total + e)
    return tl.maximum(high, x), total, tl.where(above, o, at)


@triton.jit
def _across(high, total, at, V: tl.constexpr):
    """Log-sum-exp and first arg-max over the lanes."""
    top = tl.max(high, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(high - top), 0))
    return lse, tl.min(tl.where(high == top, at, V), 0)


# slices of a chunk start anywhere; one compiled kernel serves them all
@triton.jit(do_not_specialize_on_alignment=["weight", "target", "per_token", "agree", "overlap", "rest"])
def _loss_rows_kernel(
    student, teacher, weight, target, per_token, agree, overlap, rest, inverse_temperature,
    V: tl.constexpr, LOSS: tl.constexpr, REST: tl.constexpr, BACKWARD: tl.constexpr, ETA: tl.constexpr,
    ALPHA_MIN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * V
    teacher += row * V
    lanes = tl.arange(0, BV)
    # finite, for the difference of two infinities is none
    s_high = tl.full((BV,), -3e38, tl.float32)
    t_high = tl.full((BV,), -3e38, tl.float32)
    s_total = tl.zeros((BV,), tl.float32)
    t_total = tl.zeros((BV,), tl.float32)
    s_at = tl.zeros((BV,), tl.int32)
    t_at = tl.zeros((BV,), tl.int32)
    hit = tl.zeros((BV,), tl.float32)
    aim = tl.load(target + row) if LOSS == _CE else 0
    for v in range(0, V, BV):
        o = v + lanes
        inside = o < V
        s = tl.load(student + o, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        t = tl.load(teacher + o, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        s_high, s_total, s_at = _online(s, o, s_high, s_total, s_at)
        t_high, t_total, t_at = _online(t, o, t_high, t_total, t_at)
        if LOSS == _CE:
            # picked up here, before the gradient is written over it
            hit += tl.where(o == aim, s, 0.0)
    s_lse, s_top = _across(s_high, s_total, s_at, V)
    t_lse, t_top = _across(t_high, t_total, t_at, V)
    tl.store(agree + row, s_top == t_top)
    share = 1.0
    if REST:
        # tokens without a column take their part of p
        others = tl.load(rest + row)
        kept = t_lse
        t_lse = tl.maximum(kept, others) + tl.log(1.0 + tl.exp(-tl.abs(kept - others)))
        share = tl.exp(kept - t_lse)

    w = tl.load(weight + row)
    scale = w * inverse_temperature
    kl_lanes = tl.zeros((BV,), tl.float32)
    alpha_lanes = tl.zeros((BV,), tl.float32)
    mean_lanes = tl.zeros((BV,), tl.float32)
    for v in range(0, V, BV):
        o = v + lanes
        inside = o < V
        s = tl.load(student + o, mask=inside, other=0.0).to(tl.float32) * inverse_temperature - s_lse
        t = tl.load(teacher + o, mask=inside, other=0.0).to(tl.float32) * inverse_temperature - t_lse
        q = tl.where(inside, tl.exp(s), 0.0)
        p = tl.where(inside, tl.exp(t), 0.0)
        alpha_lanes += tl.minimum(p, q)
        if (LOSS == _KL) | (LOSS == _LK_LAMBDA):
            kl_lanes += tl.where(inside, p * (t - s), 0.0)
        if LOSS >= _TV:
            mean_lanes += tl.where(q < p, q, tl.where(q == p, 0.5 * q, 0.0))
        elif BACKWARD:
            grad = q * share - p if LOSS == _KL else tl.where(o == aim, q - 1.0, q)
            grad = tl.where(w != 0, grad * scale, 0.0)
            tl.store(student + o, grad.to(student.dtype.element_ty), mask=inside)
    alpha = tl.sum(alpha_lanes, 0)
    kl = tl.sum(kl_lanes, 0)
    tl.store(overlap + row, alpha)
    # what the gradients of kl and of the overlap are multiplied by
    by_kl = 0.0
    by_alpha = -1.0
    if LOSS == _KL:
        loss = kl
    elif LOSS == _CE:
        loss = s_lse - tl.sum(hit, 0)
    elif LOSS == _TV:
        loss = 1.0 - alpha
    elif LOSS == _LK_ALPHA:
        seen = tl.maximum(alpha, ALPHA_MIN)
        loss = -tl.log(seen)
        by_alpha = tl.where(alpha > ALPHA_MIN, -1.0 / seen, 0.0)
    else:
        mix = tl.exp(-ETA * alpha)
        loss = mix * kl + (1.0 - mix) * (1.0 - alpha)
        by_kl = mix
        by_alpha = mix - 1.0
    tl.store(per_token + row, loss)

    if BACKWARD and LOSS >= _TV:
        mean = tl.sum(mean_lanes, 0)
        for v in range(0, V, BV):
            o = v + lanes
            inside = o < V
            s = tl.load(student + o, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
            t = tl.load(teacher + o, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
            q = tl.exp(s - s_lse)
            p = tl.exp(t - t_lse)
            below = tl.where(q < p, 1.0, tl.where(q == p, 0.5, 0.0))
            grad = by_alpha * q * (below - mean)
            if LOSS == _LK_LAMBDA:
                grad += by_kl * (q * share - p)
            grad = tl.where(w != 0, grad * scale, 0.0)
            tl.store(student + o, grad.to(student.dtype.element_ty), mask=inside)


def loss_rows(
    s_CV: Tensor,
    t_CV: Tensor,
    loss: str,
    weight_C: Tensor,
    target_C: Tensor | None,
    temperature: float,
    per_token_C: Tensor,
    agree_C: Tensor,
    overlap_C: Tensor,
    backward: bool,
    rest_C: Tensor | None = None,
) -> None:
    """As `loss_ref.loss_rows`, in one launch, from the teacher's logits; rest_C as in `Teacher.of`."""
    require_device(s_CV.device)
    C, V = s_CV.shape
    tile = tile_for("loss_rows")
    launch(
        _loss_rows_kernel,
        C,
        tile,
        student=s_CV,
        teacher=t_CV,
        weight=weight_C,
        target=weight_C if target_C is None else target_C,
        per_token=per_token_C,
        agree=agree_C,
        overlap=overlap_C,
        rest=weight_C if rest_C is None else rest_C,
        inverse_temperature=float(1 / temperature),
        V=V,
        LOSS=_CODES[loss],
        REST=rest_C is not None,
        BACKWARD=backward,
        ETA=ETA,
        ALPHA_MIN=ALPHA_MIN,
        BV=tile.n,
    )
