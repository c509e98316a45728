"""Routed experts: every backend against the loop, outputs and all gradients."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from train.kernels.launch import record, use_tiles
from train.kernels.moe import moe, weight_gradients_once
from train.kernels.moe_ref import moe_reference
from train.kernels.tiles import TABLE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "grouped_mm", "triton")
NAMES = ("y", "dx", "dweights", "dw1", "dw3", "dw2")


class Shape(NamedTuple):
    tokens: int
    topk: int
    width: int
    expert_width: int
    experts: int
    choice: str = "spread"


# the interpreter's tiles are 16 rows by 32 columns by 32 steps
SHAPES = {
    "one_token": Shape(1, 2, 32, 32, 4),
    "no_tokens": Shape(0, 2, 32, 32, 4),
    "an_empty_expert": Shape(24, 2, 32, 32, 5, "not_2"),
    "all_on_one_expert": Shape(20, 1, 32, 32, 4, "only_3"),
    "no_size_a_multiple_of_a_tile": Shape(37, 3, 72, 40, 4),
    "prime_number_of_experts": Shape(33, 2, 64, 32, 7),
    "one_expert_for_all": Shape(18, 1, 32, 64, 1),
    "an_expert_twice_in_a_token": Shape(9, 3, 32, 32, 4, "repeated"),
}


def precise(backend: str) -> tuple[torch.dtype, float]:
    """The dtype a backend is best compared in, and the error it may have."""
    # on a GPU the products have tiles for bfloat16 alone
    return (torch.bfloat16, 2e-2) if backend == "triton" and DEVICE == "cuda" else (torch.float32, 1e-5)


def problem(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, ids, weights, w1, w3, w2, and the gradient of y; scaled so that every tensor is of order one."""
    T, K, D, F, E, choice = shape
    rng = torch.Generator().manual_seed(T * 1000 + E)
    if choice == "only_3":
        ids = torch.full((T, K), 3)
    elif choice == "repeated":
        ids = torch.randint(E, (T, 1), generator=rng).expand(T, K).clone()
    else:
        scores = torch.rand(T, E, generator=rng)
        if choice == "not_2":
            scores[:, 2] = -1
        ids = scores.topk(K, 1).indices
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> Tensor:
        scale = size[-1] ** -0.5 if len(size) == 3 else 1.0
        return (torch.randn(*size, generator=rng) * scale).to(dtype)

    weights = torch.rand(T, K, generator=rng).to(wide)
    stack = (normal(E, F, D), normal(E, F, D), normal(E, D, F))
    return tuple(t.to(DEVICE) for t in (normal(T, D), ids, weights, *stack, normal(T, D)))


def run(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """y and the gradients of all floating-point arguments."""
    *inputs, dy = arguments
    inputs = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)


def exact(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The reference in float64."""
    return run(moe_reference, tuple(t.double() if t.is_floating_point() else t for t in arguments))


def error_ratio(got: Tensor, expected: Tensor) -> float:
    difference = (got.double() - expected).square().mean().sqrt()
    return float(difference / (expected.square().mean().sqrt() + 1e-30)) if got.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_moe_equals_the_loop(backend: str, name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32 != precise(backend)[0]:
        pytest.skip("no tiles for float32 on a GPU")
    arguments = problem(SHAPES[name], dtype)
    # bfloat16 holds 8 bits; the interpreter cuts them off where the hardware rounds
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    results = run(lambda *a: moe(*a, backend=backend), arguments)
    for label, got, expected in zip(NAMES, results, exact(arguments), strict=True):
        assert got.shape == expected.shape
        assert not got.isnan().any(), f"{label} holds unwritten memory"
        assert error_ratio(got, expected) < limit, label
    empty = torch.bincount(arguments[1].flatten(), minlength=SHAPES[name].experts) == 0
    for label, got in zip(NAMES[3:], results[3:], strict=True):
        assert not got[empty].any(), f"{label} of an expert without tokens is not zero"


def test_default_backend_equals_the_loop() -> None:
    arguments = problem(Shape(50, 3, 40, 24, 6), torch.float32)
    for label, got, expected in zip(NAMES, run(moe, arguments), exact(arguments), strict=True):
        assert error_ratio(got, expected) < 1e-5, label


@pytest.mark.parametrize("function", [moe, moe_reference])
def test_gradients_pass_gradcheck(function: Callable[..., Tensor]) -> None:
    x, ids, weights, w1, w3, w2, _ = problem(Shape(5, 2, 4, 3, 4, "not_2"), torch.float64)
    inputs = [t.requires_grad_() for t in (x, weights, w1, w3, w2)]
    assert torch.autograd.gradcheck(lambda x, *rest: function(x, ids, *rest), inputs)


def chain(function: Callable[..., Tensor], steps: int) -> Callable[..., Tensor]:
    """Calls with the same weights, each on what the one before it returned, with other experts."""

    def run(x: Tensor, ids: Tensor, weights: Tensor, *stack: Tensor) -> Tensor:
        for s in range(steps):
            # the last call has fewer tokens than the others
            x, ids, weights = (t[: len(t) - (s == 3)] for t in (x, ids, weights))
            x = torch.tanh(x + function(x, ids.roll(s, 0), weights, *stack))
        return x.sum(0, keepdim=True)

    return run


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    "name", ["one_token", "an_empty_expert", "all_on_one_expert", "no_size_a_multiple_of_a_tile"]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_one_gradient_for_several_calls_equals_the_sum_of_theirs(backend: str, name: str, steps: int) -> None:
    dtype, limit = precise(backend)
    *inputs, _ = problem(SHAPES[name], dtype)
    arguments = (*inputs, torch.ones(1, SHAPES[name].width, dtype=dtype, device=DEVICE))

    def function(*a: Tensor) -> Tensor:
        return moe(*a, backend=backend)

    wide = tuple(t.double() if t.is_floating_point() else t for t in arguments)
    expected = run(chain(moe_reference, steps), wide)
    results = run(weight_gradients_once()(chain(function, steps)), arguments)
    for label, got, right in zip(NAMES, results, expected, strict=True):
        assert not got.isnan().any(), f"{label} holds unwritten memory"
        assert error_ratio(got, right) < limit, label
    empty = torch.bincount(arguments[1].flatten(), minlength=SHAPES[name].experts) == 0
    for label, got in zip(NAMES[3:], results[3:], strict=True):
        assert not got[empty].any(), f"{label} of an expert without tokens is not zero"


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_backward_counts_its_own_calls_only(backend: str) -> None:
    """Walks of one graph: to the tokens alone, from the first call alone, and the whole, twice."""
    dtype, limit = precise(backend)
    x, ids, weights, *stack, _ = problem(Shape(16, 2, 32, 32, 4), dtype)
    x.requires_grad_()
    parameters = [torch.nn.Parameter(w) for w in stack]
    with weight_gradients_once():
        first = moe(x, ids, weights, *parameters, backend=backend)
        second = moe(torch.tanh(first), ids, weights, *parameters, backend=backend)
    a = moe_reference(x, ids, weights, *parameters)
    b = moe_reference(torch.tanh(a), ids, weights, *parameters)
    torch.autograd.grad(second.sum(), x, retain_graph=True)
    for ours, plain in ((first, a), (second, b), (first + second, a + b)):
        found = torch.autograd.grad(ours.square().sum(), parameters, retain_graph=True)
        expected = torch.autograd.grad(plain.square().sum(), parameters, retain_graph=True)
        for label, got, right in zip(NAMES[3:], found, expected, strict=True):
            assert error_ratio(got, right.double()) < limit, label
    # added to what is there, as any gradient
    for _ in range(2):
        second.sum().backward(retain_graph=True)
    once = torch.autograd.grad(b.sum(), parameters)
    for label, p, right in zip(NAMES[3:], parameters, once, strict=True):
        assert error_ratio(p.grad, 2 * right.double()) < limit, label


def test_frozen_weights_get_no_gradient_and_other_weights_one_of_their_own() -> None:
    x, ids, weights, *stack, _ = problem(Shape(16, 2, 32, 32, 4), torch.float32)
    w1, w3, w2 = (torch.nn.Parameter(w) for w in stack)
    other = torch.nn.Parameter(w2.detach() / 2)
    w3.requires_grad_(False)

    def both(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            function(x, ids, weights, w1, w3, w2)
        y = torch.tanh(function(x, ids, weights, w1, w3, w2))
        return function(y, ids, weights, w1, w3, other).sum()

    expected = torch.autograd.grad(both(moe_reference), (w1, w2, other))
    weight_gradients_once()(both)(moe).backward()
    assert w3.grad is None
    for w, right in zip((w1, w2, other), expected, strict=True):
        assert error_ratio(w.grad, right.double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_gets_a_gradient(backend: str) -> None:
    dtype, limit = precise(backend)
    arguments = problem(Shape(16, 2, 32, 32, 4), dtype)
    expected = dict(zip(NAMES[1:], exact(arguments)[1:], strict=True))
    for wanted in range(5):
        *inputs, dy = (t.clone() for t in arguments)
        leaf = [inputs[0], *inputs[2:]][wanted].requires_grad_()
        moe(*inputs, backend=backend).backward(dy)
        assert error_ratio(leaf.grad, expected[NAMES[1 + wanted]]) < limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_may_be_freed_between_forward_and_backward(backend: str) -> None:
    """A partitioned parameter has no storage in between and is gathered into a new one for the backward."""
    dtype, limit = precise(backend)
    arguments = problem(Shape(16, 2, 32, 32, 4), dtype)
    x, ids, weights, *stack, dy = arguments
    parameters = [torch.nn.Parameter(w.clone()) for w in stack]
    y = moe(x, ids, weights, *parameters, backend=backend)
    for p in parameters:
        p.data = torch.empty(0)
    for p, w in zip(parameters, stack, strict=True):
        p.data = w.clone()
    y.backward(dy)
    for label, p, gradient in zip(NAMES[3:], parameters, exact(arguments)[3:], strict=True):
        assert error_ratio(p.grad, gradient) < limit, label


def amid_rubbish(tensor: Tensor) -> Tensor:
    """A copy in the middle of a larger allocation that holds no numbers, or absurd ones."""
    room, margin = torch.empty(tensor.numel() + 8192, dtype=tensor.dtype, device=DEVICE), 4096
    room.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
    return room[margin:-margin].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", ["no_size_a_multiple_of_a_tile", "an_empty_expert"])
@pytest.mark.usefixtures("poisoned")
def test_tiles_take_nothing_from_memory_around_the_tensors(name: str) -> None:
    """They reach beyond an expert's rows and widths, and beyond the last expert."""
    dtype, limit = precise("triton")
    arguments = problem(SHAPES[name], dtype)
    *inputs, dy = map(amid_rubbish, arguments)
    leaves = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    y = moe(*inputs, backend="triton")
    found = y.detach(), *torch.autograd.grad(y, leaves, dy)
    for label, got, expected in zip(NAMES, found, exact(arguments), strict=True):
        assert error_ratio(got, expected) < limit, label


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize(("place", "bad"), [(0, float("nan")), (6, float("inf"))], ids=["x", "dy"])
def test_a_token_that_is_not_finite_shows_and_changes_no_other(place: int, bad: float) -> None:
    """Its rows lie beside those of other experts, in the same tiles."""
    token = 7
    arguments = problem(SHAPES["an_empty_expert"], precise("triton")[0])
    changed = [t.clone() for t in arguments]
    changed[place][token] = bad
    found, before = (run(lambda *a: moe(*a, backend="triton"), tuple(a)) for a in (changed, arguments))
    others = torch.arange(len(arguments[0])) != token
    for label, got, expected in zip(NAMES[:3], found, before, strict=False):
        assert torch.equal(got[others], expected[others]), label
    own = arguments[1][token]
    for label, got, expected in zip(NAMES[3:], found[3:], before[3:], strict=True):
        if place == 0 or label == "dw2":
            assert not got[own].isfinite().flatten(1).all(1).any(), label
        # the sum over an expert's rows may show what the next one's are, but as no number
        for mine, right in zip(got, expected, strict=True):
            assert torch.equal(mine, right) or not mine.isfinite().all(), label


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_is_bitwise_the_same(backend: str) -> None:
    arguments = problem(Shape(30, 3, 32, 32, 4), torch.bfloat16)
    first, second = (run(lambda *a: moe(*a, backend=backend), arguments) for _ in range(2))
    for label, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), label


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tokens_and_expanded_gradients_are_taken(backend: str) -> None:
    dtype, limit = precise(backend)
    x, ids, weights, w1, w3, w2, _ = problem(Shape(10, 2, 32, 32, 4), dtype)
    strided = x.t().contiguous().t().requires_grad_()
    moe(strided, ids.int(), weights, w1, w3, w2, backend=backend).sum().backward()
    expected = exact((x, ids, weights, w1, w3, w2, torch.ones_like(x)))
    assert error_ratio(strided.grad, expected[1]) < limit


def test_offsets_beyond_32_bits() -> None:
    """The last of 256 experts of the real size begins after 3.7e9 elements of the stack."""
    D, F, E = 7168, 2048, 256
    rng = torch.Generator().manual_seed(0)
    # never touched but in its last expert, so that it takes no memory
    stack = torch.empty(E * F * D, dtype=torch.bfloat16, device=DEVICE)
    w1, w2 = stack.view(E, F, D), stack.view(E, D, F)
    stack[-F * D :] = (torch.randn(F * D, generator=rng) * D**-0.5).bfloat16()
    x = torch.randn(1, D, generator=rng).bfloat16().to(DEVICE)
    ids, weights = torch.tensor([[E - 1]], device=DEVICE), torch.ones(1, 1, device=DEVICE)
    table = TABLE["interpreter", "any"]
    large = {kernel: table[kernel]._replace(n=512, k=1024) for kernel in ("up_fwd", "down_fwd")}
    with use_tiles(**(large if DEVICE == "cpu" else {})), torch.no_grad():
        y = moe(x, ids, weights, w1, w1, w2, backend="triton")
    expected = moe_reference(x, torch.zeros_like(ids), weights, w1[-1:], w1[-1:], w2[-1:])
    assert error_ratio(y, expected.double()) < 2e-2


ARGUMENTS = ("x", "topk_ids", "topk_weights", "w1", "w3", "w2")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("x", lambda t: t[0], "found shape [32], expected [tokens, width]"),
        ("x", lambda t: t.half(), "found torch.float16, expected"),
        ("topk_ids", lambda t: t[:-1], "found shape [7, 2], expected [8, 2]"),
        ("topk_ids", lambda t: t.float(), "found torch.float32, expected torch.int64"),
        ("topk_ids", lambda t: t + 3, "found ids from"),
        ("topk_ids", lambda t: t - 9, "found ids from"),
        ("topk_weights", lambda t: t[:, :1], "found shape [8, 1], expected [8, 2]"),
        ("topk_weights", lambda t: t.bfloat16(), "found torch.bfloat16, expected torch.float32"),
        ("w1", lambda t: t[0], "found shape [24, 32], expected [experts, expert width, width]"),
        ("w3", lambda t: t[1:], "found shape [3, 24, 32], expected [4, 24, 32]"),
        ("w2", lambda t: t.mT, "found shape [4, 24, 32], expected [4, 32, 24]"),
        ("w2", lambda t: t.mT.contiguous().mT, "expected a contiguous tensor"),
        ("w3", lambda t: t.bfloat16(), "found torch.bfloat16, expected torch.float32"),
    ],
)
def test_wrong_arguments_are_named(name: str, change: Callable[[Tensor], Tensor], said: str) -> None:
    # ids are checked on CPU only
    tensors = (t.cpu() for t in problem(Shape(8, 2, 32, 24, 4), torch.float32)[:6])
    values = dict(zip(ARGUMENTS, tensors, strict=True))
    values[name] = change(values[name])
    with pytest.raises(ValueError, match="found") as error:
        moe(**values)
    assert str(error.value).startswith(f"{name}: ")
    assert said in str(error.value)


def test_wrong_backends_are_named() -> None:
    values = problem(Shape(8, 2, 32, 24, 4), torch.float32)[:6]
    with pytest.raises(
        ValueError, match="backend: found 'cutlass', expected one of torch, grouped_mm, triton"
    ):
        moe(*values, backend="cutlass")
    ragged = problem(Shape(8, 2, 30, 24, 4), torch.float32)[:6]
    for backend in ("grouped_mm", "triton"):
        with pytest.raises(ValueError, match="x: found last dimension 30, expected a multiple of 4"):
            moe(*ragged, backend=backend)
        with pytest.raises(ValueError, match=r"x: found torch\.float64, expected"):
            moe(*(t.double() if t.is_floating_point() else t for t in values), backend=backend)


def on_meta() -> tuple[Tensor, ...]:
    """Tensors without values: whatever reads one, as only a synchronisation with a device could, fails."""
    return tuple(t.to("meta") for t in problem(Shape(8, 2, 32, 32, 4), torch.bfloat16))


def test_triton_never_waits_for_the_device() -> None:
    *inputs, dy = on_meta()
    leaves = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    with record() as calls:
        moe(*inputs, backend="triton").backward(dy)
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]
    names = [call.kernel.fn.__name__ for call in calls]
    assert names.count("_weight_grad_kernel") == 3


def test_triton_multiplies_once_for_each_weight_however_many_calls() -> None:
    x, ids, weights, *stack, dy = on_meta()
    leaves = [w.requires_grad_() for w in stack]
    with record() as calls, weight_gradients_once():
        for _ in range(6):
            x = moe(x, ids, weights, *leaves, backend="triton")
        x.backward(dy)
    products = [call for call in calls if call.kernel.fn.__name__ == "_weight_grad_kernel"]
    assert len(products) == 3
    assert all(len(call.arguments["token"]) == 6 * ids.numel() for call in products)
