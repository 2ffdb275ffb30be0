"""Inside the kernels of the patches: where rows and columns lie, and how a tile of them is loaded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_indices(r, vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Image, vector and the patch's first position along each axis (negative inside the padding) of rows ``r``."""
    m = r // vectors
    g = r - m * vectors
    n = m * flat
    o0 = tl.zeros_like(r)
    o1 = o0
    o2 = o0
    if RANK >= 1:
        i = n // pos2
        o2 = (n - i * pos2) * step2 - pad2
        n = i
    if RANK >= 2:
        i = n // pos1
        o1 = (n - i * pos1) * step1 - pad1
        n = i
    if RANK >= 3:
        i = n // pos0
        o0 = (n - i * pos0) * step0 - pad0
        n = i
    return n, g, o0, o1, o2


@triton.jit
def row_offsets(n, g, o0, o1, o2, stride_n, stride_g, stride_0, stride_1, stride_2, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of the rows' first elements; they may lie before the input, where nothing is read."""
    off = n.to(tl.int64) * stride_n + g.to(tl.int64) * stride_g
    if RANK >= 1:
        off += o2.to(tl.int64) * stride_2
    if RANK >= 2:
        off += o1.to(tl.int64) * stride_1
    if RANK >= 3:
        off += o0.to(tl.int64) * stride_0
    return off


@triton.jit
def columns(  # type: ignore[no-untyped-def]
    off_ptr,
    disp_ptr,
    at,
    first,
    width,
    plane,
    stride_f,
    RUNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Offsets, displacements along the axes and liveness of ``BLOCK_D`` columns from ``first``, ``at`` in the tables.

    ``RUNS``: they are channels of one tap, evenly spaced; its displacements are scalars.
    """
    lane = tl.arange(0, BLOCK_D)
    if RUNS:
        start = tl.load(off_ptr + at)
        if ALIGNED:
            start = (start // 16) * 16
        off = start + lane.to(tl.int64) * stride_f
        live = first + lane < width
        d0 = tl.load(disp_ptr + at)
        d1 = tl.load(disp_ptr + plane + at)
        d2 = tl.load(disp_ptr + 2 * plane + at)
    else:
        off = tl.load(off_ptr + at + lane)
        live = off >= 0
        d0 = tl.load(disp_ptr + at + lane)
        d1 = tl.load(disp_ptr + plane + at + lane)
        d2 = tl.load(disp_ptr + 2 * plane + at + lane)
    return off, live, d0, d1, d2


@triton.jit
def _inside(o, d, size, RUNS: tl.constexpr, ROWS_FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if RUNS:
        at = tl.expand_dims(o + d, 0 if ROWS_FAST else 1)
    elif ROWS_FAST:
        at = o[None, :] + d[:, None]
    else:
        at = o[:, None] + d[None, :]
    return (at >= 0) & (at < size)


@triton.jit
def tile_at(  # type: ignore[no-untyped-def]
    row_off,
    row_live,
    o0,
    o1,
    o2,
    col_off,
    col_live,
    d0,
    d1,
    d2,
    size0,
    size1,
    size2,
    RANK: tl.constexpr,
    CHECK: tl.constexpr,
    RUNS: tl.constexpr,
    ROWS_FAST: tl.constexpr,
):
    """Offsets and mask of a tile ``(rows, columns)``, or its transpose where rows are the neighbours in memory."""
    if ROWS_FAST:
        at = row_off[None, :] + col_off[:, None]
        mask = row_live[None, :] & col_live[:, None]
    else:
        at = row_off[:, None] + col_off[None, :]
        mask = row_live[:, None] & col_live[None, :]
    if CHECK:
        if RANK >= 1:
            mask = mask & _inside(o2, d2, size2, RUNS, ROWS_FAST)
        if RANK >= 2:
            mask = mask & _inside(o1, d1, size1, RUNS, ROWS_FAST)
        if RANK >= 3:
            mask = mask & _inside(o0, d0, size0, RUNS, ROWS_FAST)
    return at, mask


@triton.jit
def load_tile(x_ptr, at, mask, ROWS_FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile ``(rows, columns)`` in float32; zero in the padding, outside the rows and outside the columns."""
    tile = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ROWS_FAST:
        tile = tl.trans(tile)
    return tile


@triton.jit
def round_tf32(x):  # type: ignore[no-untyped-def]
    """To the nearest value that a tensor core keeps of it: the unit itself would truncate. NaN stays NaN."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
