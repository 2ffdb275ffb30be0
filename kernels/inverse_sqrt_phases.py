"""The inverse root of larger matrices: phases of symmetric tile products over a workspace.

The workspace holds ``(slots, b, P, P)``, P being D rounded up to whole tiles: the tail is zeros that the polynomial
turns into multiples of the identity, apart from the rest, so that the inner loop needs no masks. A program of products
(:mod:`tdeconv.kernels.newton_schulz`) comes as two tables. The same functions run phase by phase, a launch each, and in
one cooperative launch with a barrier over the grid after each phase. What other programs of that launch have written
is read through L2 (``.cg``): L1 is not coherent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tdeconv.kernels.products import dot

INTS = tl.constexpr(8)  # per operation: x0, y0, x1, y1, number of products, c, out, out2
FLOATS = tl.constexpr(6)  # alpha, beta, gamma, alpha2, beta2, gamma2


@triton.jit
def _upper_tile(tile):  # type: ignore[no-untyped-def]
    """Row and column of the ``tile``-th tile of the upper triangle, column by column."""
    col = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    col -= (col * (col + 1) // 2 > tile).to(tl.int32)
    col += ((col + 1) * (col + 2) // 2 <= tile).to(tl.int32)
    return tile - col * (col + 1) // 2, col


@triton.jit
def _slot(ws_ptr, slot, matrix, batch, P):  # type: ignore[no-untyped-def]
    """``matrix`` is int64, and makes the offset so."""
    return ws_ptr + (slot * batch + matrix) * P * P


@triton.jit
def _store_symmetric(ptr, value, row, col, LD, limit, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the part of tile (row, col) on or above the diagonal, and its mirror image."""
    down, right = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    rows, cols = row * BLOCK + down, col * BLOCK + right
    tl.store(ptr + rows * LD + cols, value, mask=(rows <= cols) & (rows < limit) & (cols < limit))
    rows, cols = col * BLOCK + down, row * BLOCK + right
    tl.store(ptr + rows * LD + cols, tl.trans(value), mask=(rows >= cols) & (rows < limit) & (cols < limit))


@triton.jit
def _symmetrised(ptr, row, col, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile (row, col) of ``(X + X^T)/2``, zeros outside D."""
    down, right = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    rows, cols = row * BLOCK + down, col * BLOCK + right
    x = tl.load(ptr + rows * D + cols, mask=(rows < D) & (cols < D), other=0.0)
    rows, cols = col * BLOCK + down, row * BLOCK + right
    y = tl.load(ptr + rows * D + cols, mask=(rows < D) & (cols < D), other=0.0)
    return 0.5 * (x + tl.trans(y))


@triton.jit
def _partial_inner(x_ptr, y_ptr, out_ptr, part, size, PARTS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ``part``-th of PARTS sums of ``x y`` over ``size`` numbers."""
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(part * CHUNK, size, PARTS * CHUNK):
        at = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0, cache_modifier=".cg")
        y = tl.load(y_ptr + at, mask=at < size, other=0.0, cache_modifier=".cg")
        total += x * y
    tl.store(out_ptr + part, tl.sum(total))


@triton.jit
def _sum_of_parts(part_ptr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.load(part_ptr + tl.arange(0, PARTS), cache_modifier=".cg"))


@triton.jit
def _square_work(work, cov_ptr, part_ptr, D, PARTS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    matrix = (work // PARTS).to(tl.int64)
    cov = cov_ptr + matrix * D * D
    _partial_inner(cov, cov, part_ptr + matrix * PARTS, work % PARTS, D * D, PARTS, CHUNK)


@triton.jit
def _normalise_work(  # type: ignore[no-untyped-def]
    work, cov_ptr, part_ptr, basis_ptr, norm_ptr, ws_ptr, D, P, tiles, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """``A = C / |C|`` into slot 0 and, for backward, unpadded; and the norm."""
    matrix, tile = (work // tiles).to(tl.int64), work % tiles
    row, col = _upper_tile(tile)
    norm = tl.sqrt(_sum_of_parts(part_ptr + matrix * PARTS, PARTS))
    a = _symmetrised(cov_ptr + matrix * D * D, row, col, D, BLOCK) / norm
    _store_symmetric(ws_ptr + matrix * P * P, a, row, col, P, P, BLOCK)
    _store_symmetric(basis_ptr + matrix * D * D, a, row, col, D, D, BLOCK)
    if tile == 0:
        tl.store(norm_ptr + matrix, norm)


@triton.jit
def _spread_work(work, basis_ptr, grad_ptr, ws_ptr, slot, batch, D, P, tiles, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A into slot 0 and the symmetric part of the root's gradient into the slot of A's tangent."""
    matrix, tile = (work // tiles).to(tl.int64), work % tiles
    row, col = _upper_tile(tile)
    a = _symmetrised(basis_ptr + matrix * D * D, row, col, D, BLOCK)
    _store_symmetric(ws_ptr + matrix * P * P, a, row, col, P, P, BLOCK)
    grad = _symmetrised(grad_ptr + matrix * D * D, row, col, D, BLOCK)
    _store_symmetric(_slot(ws_ptr, slot, matrix, batch, P), grad, row, col, P, P, BLOCK)


@triton.jit
def _product_work(  # type: ignore[no-untyped-def]
    work, first, ops, ws_ptr, ints_ptr, floats_ptr, root_ptr, norm_ptr, batch, D, P, tiles, TO_ROOT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One upper tile of one of ``ops`` operations from the ``first`` on, of one matrix."""
    row, col = _upper_tile(work % tiles)
    op = first + work // tiles % ops
    matrix = (work // tiles // ops).to(tl.int64)
    ints, floats = ints_ptr + op * INTS, floats_ptr + op * FLOATS
    x0, y0 = _slot(ws_ptr, tl.load(ints), matrix, batch, P), _slot(ws_ptr, tl.load(ints + 1), matrix, batch, P)
    x1, y1 = _slot(ws_ptr, tl.load(ints + 2), matrix, batch, P), _slot(ws_ptr, tl.load(ints + 3), matrix, batch, P)
    inner = tl.arange(0, BLOCK_K)
    rows, cols = row * BLOCK + tl.arange(0, BLOCK), col * BLOCK + tl.arange(0, BLOCK)
    # both factors are symmetric: columns of the second are read as rows, in order
    x_at, y_at = rows[:, None] * P + inner[None, :], cols[None, :] * P + inner[:, None]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    steps = P // BLOCK_K
    for step in range(tl.load(ints + 4) * steps):
        second = step >= steps
        k = tl.where(second, step - steps, step) * BLOCK_K
        x = tl.load(tl.where(second, x1, x0) + k + x_at, cache_modifier=".cg")
        y = tl.load(tl.where(second, y1, y0) + k + y_at, cache_modifier=".cg")
        acc = dot(x, y, acc, PRECISION)
    at = rows[:, None] * P + cols[None, :]
    c = tl.load(_slot(ws_ptr, tl.load(ints + 5), matrix, batch, P) + at, cache_modifier=".cg")
    eye = (rows[:, None] == cols[None, :]).to(tl.float32)
    out = tl.load(floats) * acc + tl.load(floats + 1) * c + tl.load(floats + 2) * eye
    if TO_ROOT:
        scale = 1 / tl.sqrt(tl.load(norm_ptr + matrix, cache_modifier=".cg"))
        _store_symmetric(root_ptr + matrix * D * D, out * scale, row, col, D, D, BLOCK)
    else:
        _store_symmetric(_slot(ws_ptr, tl.load(ints + 6), matrix, batch, P), out, row, col, P, P, BLOCK)
        slot = tl.load(ints + 7)
        if slot >= 0:
            out = tl.load(floats + 3) * out + tl.load(floats + 4) * c + tl.load(floats + 5) * eye
            _store_symmetric(_slot(ws_ptr, slot, matrix, batch, P), out, row, col, P, P, BLOCK)


@triton.jit
def _inner_work(work, ws_ptr, part_ptr, result, tangent, batch, P, PARTS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Parts of ``<dZ, A>`` and, PARTS further on, of ``<G, Z>``."""
    matrix, part = (work // PARTS // 2).to(tl.int64), work % PARTS
    other = work // PARTS % 2
    x = _slot(ws_ptr, tl.where(other == 0, result + tangent, result), matrix, batch, P)
    y = _slot(ws_ptr, tl.where(other == 0, 0, tangent), matrix, batch, P)
    _partial_inner(x, y, part_ptr + (matrix * 2 + other) * PARTS, part, P * P, PARTS, CHUNK)


@triton.jit
def _finish_work(  # type: ignore[no-untyped-def]
    work, ws_ptr, part_ptr, norm_ptr, out_ptr, slot, batch, D, P, tiles, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """``(dZ - (<dZ, A> + <G, Z>/2) A) / n^1.5``: the norm's share too."""
    matrix = (work // tiles).to(tl.int64)
    row, col = _upper_tile(work % tiles)
    along = _sum_of_parts(part_ptr + matrix * 2 * PARTS, PARTS)
    along += 0.5 * _sum_of_parts(part_ptr + (matrix * 2 + 1) * PARTS, PARTS)
    at = (row * BLOCK + tl.arange(0, BLOCK)[:, None]) * P + col * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(ws_ptr + matrix * P * P + at, cache_modifier=".cg")
    dz = tl.load(_slot(ws_ptr, slot, matrix, batch, P) + at, cache_modifier=".cg")
    norm = tl.load(norm_ptr + matrix)
    _store_symmetric(out_ptr + matrix * D * D, (dz - along * a) / (norm * tl.sqrt(norm)), row, col, D, D, BLOCK)
