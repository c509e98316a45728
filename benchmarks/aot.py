"""Compiling the kernels ahead of time for sm_90, which need not be there, and reading what came out.

The launches are recorded on meta tensors of the real shapes, so that the arguments, their alignment and the
constants are those of a real run. Must run in a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from train.kernels import moe as moe_host
from train.kernels.launch import INTERPRETED, Call, record
from train.loss import head_loss

__all__ = ["SHARED_LIMIT", "Reading", "compile_call", "loss_calls", "moe_calls"]

SHARED_LIMIT = 232448
"""Bytes of shared memory a program may have on sm_90 (CUDA programming guide, technical specifications)."""


class Reading(NamedTuple):
    """What the compiler made of one launch."""

    kernel: str
    tile: tuple[int, ...]
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of stack of a thread; spilled registers lie there."""
    shared: int
    """Bytes of shared memory of a program."""
    operands: int
    """Bytes that the matrix operands of one step take, the least that a pipeline of one stage holds."""
    mma: int
    """wgmma instructions."""
    tma: int
    """Bulk tensor copies."""
    async_copies: int
    """cp.async instructions, the pipelined loads through pointers."""


def moe_calls(tokens: int, experts: int, D: int, F: int, K: int) -> list[Call]:
    """Every launch of one forward and backward at a shape."""
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    x = torch.empty(tokens, D, **meta).requires_grad_()
    ids = torch.empty(tokens, K, dtype=torch.int64, device="meta")
    weights = torch.empty(tokens, K, dtype=torch.float32, device="meta").requires_grad_()
    w1, w3 = (torch.empty(experts, F, D, **meta).requires_grad_() for _ in range(2))
    w2 = torch.empty(experts, D, F, **meta).requires_grad_()
    with record() as calls:
        y = moe_host.moe(x, ids, weights, w1, w3, w2, backend="triton")
        y.backward(torch.empty_like(y))
    return calls


def loss_calls(loss: str, chunk: int, D: int, V: int) -> list[Call]:
    """The launch of one chunk of the head loss."""
    student = torch.empty(chunk, D, device="meta", dtype=torch.bfloat16).requires_grad_()
    head = torch.empty(V, D, device="meta", dtype=torch.bfloat16)
    targets = torch.empty(chunk, dtype=torch.int64, device="meta")
    with record() as calls:
        head_loss(
            student, torch.empty_like(student), head, loss, targets=targets, chunk=chunk, backend="triton"
        )
    return calls


def operand_bytes(call: Call) -> int:
    """Bytes of the tiles one step of the contraction loads; 0 without a contraction."""
    tile, arguments = call.tile, call.arguments
    if "BK" not in arguments:
        return 0
    size = next(a.base if isinstance(a, TensorDescriptor) else a for a in arguments.values()).dtype.itemsize
    matrices = 2 if call.kernel.fn.__name__ == "_up_fwd_kernel" else 1
    return (tile.m + matrices * tile.n) * tile.k * size


def compile_call(call: Call) -> Reading:
    """Compile a recorded launch as the launch itself would, down to machine code."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set; kernels can only be compiled without it")
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    kernel = call.kernel
    options = {"num_warps": call.tile.warps, "num_stages": call.tile.stages, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**call.arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=parsed.__dict__)
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage!r}")
    ptx = compiled.asm["ptx"]
    return Reading(
        kernel=kernel.fn.__name__.strip("_").removesuffix("_kernel"),
        tile=tuple(call.tile),
        registers=int(found[1]),
        spilled=int(found[2]),
        shared=compiled.metadata.shared,
        operands=operand_bytes(call),
        mma=len(re.findall(r"wgmma\.mma_async", ptx)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        async_copies=len(re.findall(r"cp\.async\.c[ga]", ptx)),
    )
