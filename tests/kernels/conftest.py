"""The kernels run on the GPU, or in Triton's interpreter where there is none; unwritten memory holds NaN."""

# ruff: noqa: E402 - what is imported stays: nobody looks through it for garbage, now or between tests
import gc
import os
from typing import Any

gc.disable()

import numpy as np
import pytest
import torch


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def import_interpreted() -> None:
    """Import the kernels for the interpreter, which must be chosen before Triton's own functions are defined.

    The variable is gone afterwards: processes that other tests start must not inherit it.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        # the first launch would import gluon, too late
        import triton.experimental.gluon

        import train.kernels.loss_triton
        import train.kernels.moe_triton  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]
    chosen = isinstance(triton.language.sum, triton.runtime.interpreter.InterpretedFunction)
    assert chosen, "something imported triton before tests/kernels/conftest.py"


def widen_bfloat16_dots() -> None:
    """Make the interpreter multiply bfloat16 as numbers; Triton 3.7.1 multiplies their raw bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        return plain(self, widen(a), widen(b), acc, precision, imprecise)

    interpreter.InterpreterBuilder.create_dot = create_dot


if not torch.cuda.is_available():
    import_interpreted()
    widen_bfloat16_dots()


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "meta" or not tensor.numel():
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill everything that comes uninitialised, so that an unwritten row shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)

        def filled(*args: Any, plain: Any = plain, **kwargs: Any) -> torch.Tensor:
            return poison(plain(*args, **kwargs))

        monkeypatch.setattr(owner, name, filled)
