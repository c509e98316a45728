"""The vocabulary loss: both backends against all logits at once, values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.kernels.loss_ref import head_loss_reference
from train.loss import HeadLoss, default_chunk, head_loss

LOSSES = ("kl", "ce", "lk_alpha", "lk_lambda", "tv")
BACKENDS = ("torch", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, sharp: float = 1.0
) -> tuple[Tensor, ...]:
    """student, teacher, head, weights (one of them 0) and targets."""
    rng = torch.Generator().manual_seed(tokens + vocab)
    student = torch.randn(tokens, width, generator=rng)
    teacher = student + 0.5 * torch.randn(tokens, width, generator=rng)
    head = torch.randn(vocab, width, generator=rng) * (2 * sharp / width**0.5)
    weights = torch.rand(tokens, generator=rng).to(torch.promote_types(dtype, torch.float32))
    weights[tokens // 2] = 0
    targets = torch.randint(vocab, (tokens,), generator=rng)
    return tuple(
        t.to(DEVICE) for t in (student.to(dtype), teacher.to(dtype), head.to(dtype), weights, targets)
    )


def evaluate(student: Tensor, *rest: Any, **options: Any) -> tuple[HeadLoss, Tensor]:
    student = student.clone().requires_grad_()
    result = head_loss(student, *rest, **options)
    return result, torch.autograd.grad(result.loss, student)[0]


def error_ratio(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / (expected.norm() + 1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_head_loss_equals_all_logits_at_once(backend: str, loss: str, dtype: torch.dtype) -> None:
    # 13 tokens in chunks of 5 leave a short chunk; 600 columns are no multiple of the interpreter's 256
    student, teacher, head, weights, targets = problem(13, 24, 600, dtype)
    result, gradient = evaluate(
        student, teacher, head, loss, weights, targets, temperature=0.8, chunk=5, backend=backend
    )
    # rounded logits of bfloat16 decide which of p and q is less, so the reference must round them too
    inputs = [t.double() if dtype == torch.float32 else t for t in (student, teacher, head)]
    inputs[0].requires_grad_()
    weights = weights.to(torch.promote_types(inputs[0].dtype, torch.float32))
    expected, agree, overlap, per_token = head_loss_reference(*inputs, loss, weights, targets, 0.8)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert error_ratio(result.loss, expected.detach()) < 1e-5
    assert error_ratio(result.overlap, overlap) < 1e-5
    assert error_ratio(result.per_token, per_token) < 1e-5
    assert error_ratio(gradient, torch.autograd.grad(expected, inputs[0])[0]) < limit
    assert torch.equal(result.agree, agree)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_loss_stands_saturated_rows(backend: str, loss: str) -> None:
    """Logits in the hundreds: most probabilities are exactly zero in float32."""
    student, teacher, head, weights, targets = problem(6, 24, 300, torch.float32, sharp=60)
    result, gradient = evaluate(student, teacher, head, loss, weights, targets, backend=backend)
    wide = student.double().requires_grad_()
    expected, *_ = head_loss_reference(wide, teacher.double(), head.double(), loss, weights.double(), targets)
    assert gradient.isfinite().all()
    if loss != "lk_alpha":  # an overlap below 1e-20 is cut off, and rounding decides which is
        assert error_ratio(result.loss, expected.detach()) < 1e-4
        assert error_ratio(gradient, torch.autograd.grad(expected, wide)[0]) < 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_pass_gradcheck(loss: str) -> None:
    student, teacher, head, weights, targets = problem(5, 4, 11, torch.float64)
    student.requires_grad_()

    # lk_lambda holds its mixing factor constant, which a finite difference cannot
    def fixed(student: Tensor) -> Tensor:
        logits = student @ head.T
        q, p = logits.softmax(-1), (teacher @ head.T).softmax(-1)
        alpha = torch.minimum(p, q).sum(-1)
        mix = (-3 * start).exp()
        return ((mix * (p * (p / q).log()).sum(-1) + (1 - mix) * (1 - alpha)) * weights).sum()

    start = head_loss(student, teacher, head, weights=weights).overlap
    if loss != "lk_lambda":
        for function in (head_loss, head_loss_reference):
            assert torch.autograd.gradcheck(
                lambda s, f=function: f(s, teacher, head, loss, weights, targets)[0], (student,)
            )
        return
    assert torch.autograd.gradcheck(fixed, (student,))
    expected = torch.autograd.grad(fixed(student), student)[0]
    result, gradient = evaluate(student.detach(), teacher, head, loss, weights)
    assert torch.allclose(gradient, expected)
    assert torch.allclose(result.loss, fixed(student))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_student_and_teacher_are_at_the_optimum(backend: str, loss: str) -> None:
    student, _, head, _, _ = problem(5, 16, 300, torch.float32)
    targets = (student @ head.T).argmax(-1)
    result, gradient = evaluate(student, student, head, loss, targets=targets, backend=backend)
    assert result.agree.all()
    assert torch.allclose(result.overlap, torch.ones(5, device=DEVICE), atol=1e-5)
    if loss != "ce":
        assert abs(result.loss.item()) < 1e-4
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_tokens_of_weight_zero_may_hold_anything(backend: str, loss: str) -> None:
    student, teacher, head, weights, targets = problem(9, 16, 300, torch.float32)
    clean, clean_gradient = evaluate(student, teacher, head, loss, weights, targets, backend=backend)
    student[4], teacher[4], targets[4] = float("nan"), float("inf"), -100
    result, gradient = evaluate(student, teacher, head, loss, weights, targets, backend=backend)
    assert not gradient[4].any()
    assert torch.equal(result.loss, clean.loss)
    assert torch.equal(gradient, clean_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_students_that_share_a_teacher_equal_one_at_a_time(backend: str) -> None:
    student, teacher, head, weights, targets = problem(7, 16, 300, torch.float32)
    several = torch.stack((student, 0.5 * student, teacher))
    steps = torch.stack((weights, 2 * weights, 0 * weights))
    for loss in ("ce", "lk_lambda"):
        result, gradient = evaluate(several, teacher, head, loss, steps, targets, chunk=3, backend=backend)
        alone = [
            evaluate(s, teacher, head, loss, w, targets, backend=backend)
            for s, w in zip(several, steps, strict=True)
        ]
        assert torch.allclose(result.loss, torch.stack([r.loss for r, _ in alone]).sum())
        assert torch.allclose(gradient, torch.stack([g for _, g in alone]), atol=1e-6)
        for field in ("agree", "overlap", "per_token"):
            one_by_one = torch.stack([getattr(r, field) for r, _ in alone])
            assert torch.allclose(getattr(result, field), one_by_one, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agreement_takes_the_first_of_equal_logits(backend: str) -> None:
    head = torch.zeros(300, 8, device=DEVICE)
    head[270], head[5], head[200] = 1.0, 1.0, -1.0
    ones = torch.ones(2, 8, device=DEVICE)
    # two arg-maxima for the student, one of them the teacher's
    assert head_loss(
        ones, ones * torch.tensor([[1.0], [-1.0]], device=DEVICE), head, backend=backend
    ).agree.tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_a_loss_of_zero(backend: str) -> None:
    student, teacher, head, *_ = problem(3, 16, 40, torch.float32)
    result, gradient = evaluate(student[:0], teacher[:0], head, backend=backend)
    assert result.loss == 0
    assert gradient.shape == (0, 16)
    assert result.agree.shape == result.overlap.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pruned", [False, True])
def test_hits_are_the_tokens_that_the_student_finds_most_likely(backend: str, pruned: bool) -> None:
    student, teacher, head, _, _ = problem(9, 16, 300, torch.float32)
    keep = torch.arange(0, 300, 3) if pruned else None
    named = (student @ (head if keep is None else head[keep]).T).argmax(-1)
    tokens = named if keep is None else keep[named]
    tokens[::2] = (tokens[::2] + 1) % 300
    options = {"draft_head": head[keep], "keep": keep} if keep is not None else {}
    result = head_loss(student, teacher, head, targets=tokens, hits=True, backend=backend, chunk=4, **options)
    assert result.hit is not None
    assert result.hit.tolist() == [False, True] * 4 + [False]
    plain = head_loss(student, teacher, head, backend=backend, chunk=4, **options)
    assert plain.hit is None
    assert result.loss == plain.loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_student_gets_a_gradient(backend: str) -> None:
    student, teacher, head, weights, _ = problem(5, 16, 300, torch.float32)
    inputs = [t.requires_grad_() for t in (student, teacher, head, weights)]
    result = head_loss(student, teacher, head, weights=weights, backend=backend)
    assert [t.requires_grad for t in result if t is not None] == [True, False, False, False]
    (2 * result.loss).backward()
    assert [t.grad is not None for t in inputs] == [True, False, False, False]
    _, once = evaluate(student.detach(), teacher.detach(), head.detach(), "kl", weights.detach())
    assert error_ratio(student.grad, 2 * once) < 1e-5


class Largest(TorchDispatchMode):
    """The most elements any result of an operator had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return result


def test_logits_of_all_tokens_are_never_held() -> None:
    student, teacher, head, weights, targets = problem(64, 8, 500, torch.float32)
    for loss in LOSSES:
        with Largest() as largest:
            evaluate(student, teacher, head, loss, weights, targets, chunk=16)
        assert largest.elements == 16 * 500


def test_default_chunk_keeps_within_half_a_gibibyte() -> None:
    tokens = default_chunk(129280, torch.device("cuda"))
    assert tokens * 129280 * 2 <= 1 << 29
    assert tokens == 2048
    assert default_chunk(129280, torch.device("cpu")) == 64


ARGUMENTS = ("student", "teacher", "head", "weights", "targets")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("student", lambda t: t[0], "found shape [16], expected [T, D] or [S, T, D]"),
        ("student", lambda t: t.half(), "found torch.float16"),
        ("teacher", lambda t: t[1:], "found shape [4, 16], expected [5, 16]"),
        ("teacher", lambda t: t.bfloat16(), "found torch.bfloat16, expected torch.float32"),
        ("head", lambda t: t[:, 1:], "found shape [40, 15], expected [vocabulary, 16]"),
        ("head", lambda t: t.double(), "found torch.float64, expected torch.float32"),
        ("weights", lambda t: t[1:], "found torch.float32 [4], expected torch.float32 [5]"),
        ("weights", lambda t: t.bfloat16(), "found torch.bfloat16 [5], expected torch.float32 [5]"),
        ("targets", lambda t: None, "found none, expected int64 [T]"),
        ("targets", lambda t: t.int(), "found torch.int32 [5], expected torch.int64 [5]"),
        ("targets", lambda t: t + 40, "found ids from"),
    ],
)
def test_wrong_arguments_are_named(name: str, change: Callable[[Tensor], Any], said: str) -> None:
    values = dict(zip(ARGUMENTS, problem(5, 16, 40, torch.float32), strict=True))
    values[name] = change(values[name])
    with pytest.raises(ValueError, match="found") as error:
        head_loss(**values, loss="ce")
    assert str(error.value).startswith(f"{name}: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"loss": "jsd"}, "loss: found 'jsd', expected one of kl, ce, lk_alpha, lk_lambda, tv"),
        ({"temperature": 0.0}, "temperature: found 0.0, expected a number above 0"),
        ({"chunk": 0}, "chunk: found 0, expected 1 or more"),
        ({"backend": "grouped_mm"}, "backend: found 'grouped_mm', expected torch or triton or None"),
    ],
)
def test_wrong_options_are_named(option: dict[str, Any], said: str) -> None:
    student, teacher, head, *_ = problem(5, 16, 40, torch.float32)
    with pytest.raises(ValueError, match="found") as error:
        head_loss(student, teacher, head, **option)
    assert str(error.value) == said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [None, 350])
def test_a_head_of_the_draft_with_fewer_tokens_misses_the_others(
    backend: str, loss: str, dtype: torch.dtype, kept: int | None
) -> None:
    student, teacher, head, weights, targets = problem(13, 24, 600, dtype)
    rng = torch.Generator().manual_seed(1)
    keep = None if kept is None else torch.randperm(600, generator=rng)[:kept].sort().values
    own = head if keep is None else head[keep]
    own = (own.float() + 0.02 * torch.randn(own.shape, generator=rng)).to(dtype)
    found = [student.clone().requires_grad_(), own.clone().requires_grad_()]
    options = {"temperature": 0.8, "chunk": 5, "backend": backend}
    result = head_loss(
        found[0], teacher, head, loss, weights, targets, draft_head=found[1], keep=keep, **options
    )
    gradients = torch.autograd.grad(result.loss, found)
    wide = [t.double() if dtype == torch.float32 else t for t in (student, teacher, head, own)]
    wide[0].requires_grad_()
    wide[3].requires_grad_()
    weights = weights.to(torch.promote_types(wide[0].dtype, torch.float32))
    expected, agree, overlap, _ = head_loss_reference(
        *wide[:3], loss, weights, targets, 0.8, draft_head_ND=wide[3], keep_N=keep
    )
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert error_ratio(result.loss, expected.detach()) < 1e-5
    assert error_ratio(result.overlap, overlap) < 1e-5
    for got, wanted in zip(gradients, torch.autograd.grad(expected, [wide[0], wide[3]]), strict=True):
        assert error_ratio(got, wanted) < limit
    assert torch.equal(result.agree, agree)
    if keep is not None:
        missed = ~torch.isin((teacher @ head.T).argmax(-1), keep)
        assert 0 < int(missed.sum()) < 13
        assert not result.agree[missed].any()
        assert not gradients[0][missed].any()
