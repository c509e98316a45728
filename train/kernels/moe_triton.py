"""Triton kernels of the routed experts, forward and backward.

Rows are sorted by expert but never copied: a kernel reads the tokens of its rows through the index `token`.
Every product runs over row tiles that lie within one expert; weights come through tensor descriptors (TMA
where the hardware has it), which also frees the registers that their addresses would take.

    up_fwd       g = x[token] w1^T, u = x[token] w3^T, h = weight silu(g) u         [N, F]
    down_fwd     rows = h w2^T                                                     [N, D]
    gather_sum   y[t] = sum of the rows of t's K slots, in float32 and in order    [T, D]
    down_bwd     a = dy[token] w2; from it the gradients of g, u and weight, and h again
    up_bwd       rows = dg w1 + du w3                                              [N, D]
    weight_grad  dw1 = dg^T x[token], dw3 = du^T x[token], dw2 = dy[token]^T h

The output of the down projection is not kept: the gradient of a router weight is <dy, w2 h> = <dy w2, h>.

Legend: T tokens, D model width, F expert width, E experts, K experts a token, N = T * K sorted rows; BM, BN,
BK rows, columns and contraction step of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.launch import launch, matrix, require_device, require_tiles, tile_for
from train.kernels.routing import Routing
from train.kernels.tiles import Tile

__all__ = ["backward", "forward", "row_tiles", "weight_grad"]


@triton.jit
def _place(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles walk the columns together, to share them in L2."""
    per_group = GROUP * tiles_n
    first = pid // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = pid % per_group
    return first + within % size, within // size


@triton.jit(do_not_specialize=["tiles_m"])
def _up_fwd_kernel(
    x, w1, w3, g, u, h, token, order, weight, tile_expert, tile_row, offsets, tiles_m,
    D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, tile_n = _place(tl.program_id(0), tiles_m, tl.cdiv(F, BN), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_row + tile)
    rows = row + tl.arange(0, BM)
    inside = rows < tl.load(offsets + expert + 1)
    source = tl.load(token + rows, mask=inside, other=0).to(tl.int64)
    k = tl.arange(0, BK)
    a_ptr = x + source[:, None] * D + k[None, :]
    acc_g = tl.zeros((BM, BN), tl.float32)
    acc_u = tl.zeros((BM, BN), tl.float32)
    w_row = expert * F + tile_n * BN
    for k0 in range(0, D, BK):
        # a row outside reads token 0, and is not stored
        a = tl.load(a_ptr + k0) if D % BK == 0 else tl.load(a_ptr + k0, mask=k[None, :] < D - k0, other=0.0)
        b = w1.load([w_row, k0]).T
        acc_g = tl.dot(a, b, acc_g, input_precision="ieee")
        b = w3.load([w_row, k0]).T
        acc_u = tl.dot(a, b, acc_u, input_precision="ieee")
    w = tl.load(weight + tl.load(order + rows, mask=inside, other=0), mask=inside, other=0.0)
    columns = tile_n * BN + tl.arange(0, BN)
    mask = inside[:, None] & (columns < F)[None, :]
    # the first row counts in 64 bits, what lies within a tile in 32: that halves the addresses' registers
    first = row.to(tl.int64) * F
    at = tl.arange(0, BM)[:, None] * F + columns[None, :]
    tl.store(g + first + at, acc_g.to(g.dtype.element_ty), mask=mask)
    tl.store(u + first + at, acc_u.to(u.dtype.element_ty), mask=mask)
    acc = acc_g * tl.sigmoid(acc_g) * acc_u * w[:, None]
    tl.store(h + first + at, acc.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles_m"])
def _down_fwd_kernel(
    h, w2, y, tile_expert, tile_row, offsets, tiles_m,
    D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, tile_n = _place(tl.program_id(0), tiles_m, tl.cdiv(D, BN), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_row + tile)
    acc = tl.zeros((BM, BN), tl.float32)
    w_row = expert * D + tile_n * BN
    for k0 in range(0, F, BK):
        a = h.load([row, k0])
        b = w2.load([w_row, k0]).T
        acc = tl.dot(a, b, acc, input_precision="ieee")
    rows = row + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    mask = (rows < tl.load(offsets + expert + 1))[:, None] & (columns < D)[None, :]
    at = tl.arange(0, BM)[:, None] * D + columns[None, :]
    tl.store(y + row.to(tl.int64) * D + at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gather_sum_kernel(
    rows, inverse, y, D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    tiles_n = tl.cdiv(D, BN)
    t = (tl.program_id(0) // tiles_n).to(tl.int64)
    columns = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(inverse + t * K + slot).to(tl.int64)
        acc += tl.load(rows + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y + t * D + columns, acc.to(y.dtype.element_ty), mask=columns < D)


@triton.jit
def _swiglu_bwd(
    acc, w, g, u, dg, du, h, inside, column, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Epilogue of down_bwd: fills dg, du and h from acc = dy w2, returns the rows' sums of acc silu(g) u.

    Halves the columns until PART are left: all of g and u beside the accumulator would not fit the registers.
    """
    if BN > PART:
        HALF: tl.constexpr = BN // 2
        left, right = tl.split(tl.reshape(acc, (BM, 2, HALF)).permute(0, 2, 1))
        dw = _swiglu_bwd(left, w, g, u, dg, du, h, inside, column, F, BM, HALF, PART)
        dw += _swiglu_bwd(right, w, g, u, dg, du, h, inside, column + HALF, F, BM, HALF, PART)
    else:
        columns = column + tl.arange(0, BN)
        at = tl.arange(0, BM)[:, None] * F + columns[None, :]
        mask = inside[:, None] & (columns < F)[None, :]
        gate = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
        sig = tl.sigmoid(gate)
        silu = gate * sig
        dw = tl.sum(acc * silu * up, 1)
        tl.store(h + at, (silu * up * w[:, None]).to(h.dtype.element_ty), mask=mask)
        acc = acc * w[:, None]
        tl.store(du + at, (acc * silu).to(du.dtype.element_ty), mask=mask)
        tl.store(dg + at, (acc * up * sig * (1 + gate * (1 - sig))).to(dg.dtype.element_ty), mask=mask)
    return dw


@triton.jit(do_not_specialize=["tiles_m", "N"])
def _down_bwd_kernel(
    dy, w2, g, u, dg, du, h, dweight, token, order, weight, N, tile_expert, tile_row, offsets, tiles_m,
    D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    tile, tile_n = _place(tl.program_id(0), tiles_m, tl.cdiv(F, BN), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_row + tile)
    rows = row + tl.arange(0, BM)
    inside = rows < tl.load(offsets + expert + 1)
    source = tl.load(token + rows, mask=inside, other=0).to(tl.int64)
    k = tl.arange(0, BK)
    a_ptr = dy + source[:, None] * D + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, D, BK):
        # the last step of a ragged D reads on into the next expert's weight: this side must be zero there
        a = tl.load(a_ptr + k0) if D % BK == 0 else tl.load(a_ptr + k0, mask=k[None, :] < D - k0, other=0.0)
        b = w2.load([expert * D + k0, tile_n * BN])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    w = tl.load(weight + tl.load(order + rows, mask=inside, other=0), mask=inside, other=0.0)
    first = row.to(tl.int64) * F
    dw = _swiglu_bwd(
        acc, w, g + first, u + first, dg + first, du + first, h + first, inside, tile_n * BN, F, BM, BN, PART
    )
    tl.store(dweight + tile_n.to(tl.int64) * N + rows, dw, mask=inside)


@triton.jit(do_not_specialize=["tiles_m"])
def _up_bwd_kernel(
    dg, du, w1, w3, dx, tile_expert, tile_row, offsets, tiles_m,
    D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, tile_n = _place(tl.program_id(0), tiles_m, tl.cdiv(D, BN), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_row + tile)
    acc = tl.zeros((BM, BN), tl.float32)
    # columns of dg and du beyond F come as zeros, so that the next expert's rows of a ragged F count nothing
    for k0 in range(0, F, BK):
        a = dg.load([row, k0])
        b = w1.load([expert * F + k0, tile_n * BN])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    for k0 in range(0, F, BK):
        a = du.load([row, k0])
        b = w3.load([expert * F + k0, tile_n * BN])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    rows = row + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    mask = (rows < tl.load(offsets + expert + 1))[:, None] & (columns < D)[None, :]
    at = tl.arange(0, BM)[:, None] * D + columns[None, :]
    tl.store(dx + row.to(tl.int64) * D + at, acc.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _weight_grad_kernel(
    dense, gathered, dw, token, offsets,
    D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """dw[e] = dense^T gathered [F, D] (w1, w3), or its transpose [D, F] (w2), in tiles of BM and BN."""
    # not tl.cdiv, which Triton 3.6 does not keep constant
    tiles_m: tl.constexpr = (F + BM - 1) // BM
    tiles_n: tl.constexpr = (D + BN - 1) // BN
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = _place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    start = tl.load(offsets + expert).to(tl.int32)
    end = tl.load(offsets + expert + 1).to(tl.int32)
    k = tl.arange(0, BK)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    inside = (columns < D)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    # the index is loaded one step ahead: loaded in the step that uses it, it would stop the loads from being
    # pipelined
    source = tl.load(token + start + k, mask=start + k < end, other=0).to(tl.int64)
    for row in range(start, end, BK):
        mask = (row + k < end)[:, None]
        b = tl.load(gathered + source[:, None] * D + columns[None, :], mask=mask & inside, other=0.0)
        # rows beyond the end are the next expert's, times zero; an infinite one of them shows here too, but
        # then the norm of all gradients is infinite anyway, and a mask would take the tile through registers
        a = dense.load([row, tile_m * BM]).T
        following = row + BK + k
        source = tl.load(token + following, mask=following < end, other=0).to(tl.int64)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    out = dw + expert.to(tl.int64) * (D * F)
    at = rows[:, None] + columns[None, :] * F if TRANSPOSED else rows[:, None] * D + columns[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(rows < F)[:, None] & inside)


def row_tiles(offsets: Tensor, num_rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Tiles of `size` rows, none across two experts. No host synchronisation.

    Args:
        offsets: int [E + 1], first row of each expert.
        num_rows: N, the last offset, known without reading it.
        size: rows of a tile.

    Returns:
        Expert and first row of each tile, int32 [N // size + min(E, N)]: an upper bound of the number of
        tiles; those beyond the real number have expert -1.
    """
    E = len(offsets) - 1
    tiles = (offsets[1:] - offsets[:-1] + size - 1) // size
    ends = tiles.cumsum(0)
    index = torch.arange(num_rows // size + min(E, num_rows), device=offsets.device)
    expert = torch.searchsorted(ends, index, right=True)
    known = expert.clamp(max=E - 1)
    row = offsets[known] + (index - (ends - tiles)[known]) * size
    return torch.where(expert < E, expert, -1).int(), row.int()


def gather_sum(rows_ND: Tensor, inverse_N: Tensor, topk: int) -> Tensor:
    """Sum of the K rows of each token, [T, D], in float32 and in the order of the slots."""
    N, D = rows_ND.shape
    y = rows_ND.new_empty(N // topk, D)
    tile = tile_for("gather_sum")
    programs = N // topk * triton.cdiv(D, tile.n)
    launch(_gather_sum_kernel, programs, tile, rows=rows_ND, inverse=inverse_N, y=y, D=D, K=topk, BN=tile.n)
    return y


def launch_tiles(
    kernel: Any, tile: Tile, columns: int, routing: Routing, shape_EFD: torch.Size, **operands: Any
) -> None:
    """Run a kernel over the row tiles of all experts times the column tiles of its `columns` wide result."""
    _, F, D = shape_EFD
    experts, rows = row_tiles(routing.offsets, len(routing.order), tile.m)
    launch(
        kernel,
        len(experts) * triton.cdiv(columns, tile.n),
        tile,
        **operands,
        tile_expert=experts,
        tile_row=rows,
        offsets=routing.offsets,
        tiles_m=len(experts),
        D=D,
        F=F,
        **tile.constants,
    )


def forward(
    x: Tensor, topk_weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, routing: Routing
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, D], and gate and up products [N, F] for the backward."""
    require_device(x.device)
    require_tiles(x.dtype)
    (E, F, D), (T, K) = w1.shape, topk_weights.shape
    N = T * K
    g, u, h = (x.new_empty(N, F) for _ in range(3))
    if not N:
        return torch.zeros_like(x), g, u
    token, order = routing.token.int(), routing.order.int()
    tile = tile_for("up_fwd", N / E)
    launch_tiles(
        _up_fwd_kernel,
        tile,
        F,
        routing,
        w1.shape,
        x=x,
        w1=matrix(w1, tile.n, tile.k),
        w3=matrix(w3, tile.n, tile.k),
        g=g,
        u=u,
        h=h,
        token=token,
        order=order,
        weight=topk_weights.contiguous(),
    )
    y_ND = x.new_empty(N, D)
    tile = tile_for("down_fwd", N / E)
    launch_tiles(
        _down_fwd_kernel,
        tile,
        D,
        routing,
        w1.shape,
        h=matrix(h, tile.m, tile.k),
        w2=matrix(w2, tile.n, tile.k),
        y=y_ND,
    )
    return gather_sum(y_ND, routing.inverse, K), g, u


def backward(
    dy: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    g: Tensor,
    u: Tensor,
    routing: Routing,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of x and topk_weights, None where not needed; and of what `weight_grad` multiplies
    those of g and u, and h, each [N, F]."""
    (E, F, D), (T, K) = w1.shape, topk_weights.shape
    N = T * K
    dg, du, h = (torch.empty_like(g) for _ in range(3))
    if not N:
        return torch.zeros_like(x), torch.zeros_like(topk_weights), dg, du, h
    tile = tile_for("down_bwd", N / E)
    # one partial sum for each column tile, added up in a fixed order
    partial = torch.empty(triton.cdiv(F, tile.n), N, dtype=torch.float32, device=x.device)
    launch_tiles(
        _down_bwd_kernel,
        tile,
        F,
        routing,
        w1.shape,
        dy=dy,
        w2=matrix(w2, tile.k, tile.n),
        g=g,
        u=u,
        dg=dg,
        du=du,
        h=h,
        dweight=partial,
        token=routing.token.int(),
        order=routing.order.int(),
        weight=topk_weights.contiguous(),
        N=N,
        PART=tile.part,
    )
    dweights = partial.sum(0).index_select(0, routing.inverse).view(T, K) if need_weights else None
    dx = None
    if need_x:
        dx_ND = x.new_empty(N, D)
        tile = tile_for("up_bwd", N / E)
        launch_tiles(
            _up_bwd_kernel,
            tile,
            D,
            routing,
            w1.shape,
            dg=matrix(dg, tile.m, tile.k),
            du=matrix(du, tile.m, tile.k),
            w1=matrix(w1, tile.k, tile.n),
            w3=matrix(w3, tile.k, tile.n),
            dx=dx_ND,
        )
        dx = gather_sum(dx_ND, routing.inverse, K)
    return dx, dweights, dg, du, h


def weight_grad(dense: Tensor, gathered: Tensor, routing: Routing, transposed: bool) -> Tensor:
    """dense^T gathered[token] of each expert, [E, F, D], or its transpose; dense [N, F], gathered [T, D]."""
    (N, F), D, E = dense.shape, gathered.shape[1], len(routing.offsets) - 1
    shape = (E, D, F) if transposed else (E, F, D)
    if not N:
        return dense.new_zeros(shape)
    dw = dense.new_empty(shape)
    tile = tile_for("weight_grad", N / E)
    launch(
        _weight_grad_kernel,
        E * triton.cdiv(F, tile.m) * triton.cdiv(D, tile.n),
        tile,
        dense=matrix(dense, tile.k, tile.m),
        gathered=gathered,
        dw=dw,
        token=routing.token.int(),
        offsets=routing.offsets,
        D=D,
        F=F,
        **tile.constants,
        TRANSPOSED=transposed,
    )
    return dw
