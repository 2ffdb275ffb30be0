"""The inverse root of tiny matrices, and its gradient: one warp per matrix, every step in registers.

A value and its tangent go through the same functions; without TANGENT the tangents are unused scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tdeconv.kernels.products import dot


@triton.jit
def _times(x, dx, y, dy, TANGENT: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    zero = tl.zeros(x.shape, tl.float32)
    z = dot(x, y, zero, PRECISION)
    if TANGENT:
        return z, dot(x, dy, dot(dx, y, zero, PRECISION), PRECISION)
    else:
        return z, dx


@triton.jit
def _mirrored(x, upper):  # type: ignore[no-untyped-def]
    """The upper triangle on both sides: rounding must not make the factors cease to commute."""
    return tl.where(upper, x, tl.trans(x))


@triton.jit
def _double_factor(m, dm, eye, TANGENT: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``q(M)``: two steps' factor of Z."""
    b, db = _times(m, dm, m, dm, TANGENT, PRECISION)
    r, dr = b - 9 * m + 27 * eye, db
    if TANGENT:
        dr = db - 9 * dm
    q, dq = _times(b, db, r, dr, TANGENT, PRECISION)
    q = (q - 39 * m + 36 * eye) * 0.0625
    if TANGENT:
        dq = (dq - 39 * dm) * 0.0625
    return q, dq


@triton.jit
def _single_factor(m, dm, eye, TANGENT: tl.constexpr):  # type: ignore[no-untyped-def]
    t, dt = 1.5 * eye - 0.5 * m, dm
    if TANGENT:
        dt = -0.5 * dm
    return t, dt


@triton.jit
def _advance(m, dm, f, df, upper, TANGENT: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``M <- (F M) F``."""
    k, dk = _times(f, df, m, dm, TANGENT, PRECISION)
    m, dm = _times(k, dk, f, df, TANGENT, PRECISION)
    m = _mirrored(m, upper)
    if TANGENT:
        dm = _mirrored(dm, upper)
    return m, dm


@triton.jit
def _polynomial(  # type: ignore[no-untyped-def]
    m, dm, eye, upper, MIDDLE: tl.constexpr, INNER: tl.constexpr, LAST: tl.constexpr, N_ITER: tl.constexpr,
    TANGENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Z_n``: two steps, then MIDDLE times two steps, INNER steps (0 or 1), LAST steps (0, 1 or 2)."""
    if N_ITER == 1:
        z, dz = _single_factor(m, dm, eye, TANGENT)
    else:
        z, dz = _double_factor(m, dm, eye, TANGENT, PRECISION)
        if N_ITER > 2:
            m, dm = _advance(m, dm, z, dz, upper, TANGENT, PRECISION)
    if MIDDLE > 0:  # a loop of no turns is compiled too, and without a step before it dm is still a constant
        for _ in range(MIDDLE):
            f, df = _double_factor(m, dm, eye, TANGENT, PRECISION)
            z, dz = _times(z, dz, f, df, TANGENT, PRECISION)
            m, dm = _advance(m, dm, f, df, upper, TANGENT, PRECISION)
    if INNER == 1:
        t, dt = _single_factor(m, dm, eye, TANGENT)
        z, dz = _times(z, dz, t, dt, TANGENT, PRECISION)
        m, dm = _advance(m, dm, t, dt, upper, TANGENT, PRECISION)
    if LAST == 1:
        t, dt = _single_factor(m, dm, eye, TANGENT)
        z, dz = _times(z, dz, t, dt, TANGENT, PRECISION)
    if LAST == 2:
        f, df = _double_factor(m, dm, eye, TANGENT, PRECISION)
        z, dz = _times(z, dz, f, df, TANGENT, PRECISION)
    return z, dz


@triton.jit
def _inverse_sqrt_tiny_fwd_kernel(  # type: ignore[no-untyped-def]
    cov_ptr, root_ptr, basis_ptr, norm_ptr, D, MIDDLE: tl.constexpr, INNER: tl.constexpr, LAST: tl.constexpr,
    N_ITER: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Root and normalised covariance ``(b, D, D)``, norms ``(b,)``; zeros that fill the tile stay apart."""
    matrix = tl.program_id(0).to(tl.int64)
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside, upper, at = (rows < D) & (cols < D), rows <= cols, matrix * D * D + rows * D + cols
    mirror = matrix * D * D + cols * D + rows
    cov = tl.load(cov_ptr + at, mask=inside, other=0.0)
    norm = tl.sqrt(tl.sum(cov * cov))
    a = 0.5 * (cov + tl.trans(cov)) / norm
    tl.store(basis_ptr + at, a, mask=inside)
    tl.store(norm_ptr + matrix, norm)
    eye = (rows == cols).to(tl.float32)
    z, _ = _polynomial(a, 0.0, eye, upper, MIDDLE, INNER, LAST, N_ITER, False, PRECISION)
    z = z * (1 / tl.sqrt(norm))
    tl.store(root_ptr + at, z, mask=inside & upper)
    tl.store(root_ptr + mirror, z, mask=inside & upper)


@triton.jit
def _inverse_sqrt_tiny_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, basis_ptr, norm_ptr, out_ptr, D, MIDDLE: tl.constexpr, INNER: tl.constexpr, LAST: tl.constexpr,
    N_ITER: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The polynomial's tangent along the root's gradient, and the norm's share: ``out (b, D, D)``, symmetric."""
    matrix = tl.program_id(0).to(tl.int64)
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside, upper, at = (rows < D) & (cols < D), rows <= cols, matrix * D * D + rows * D + cols
    mirror = matrix * D * D + cols * D + rows
    a = tl.load(basis_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    grad = 0.5 * (grad + tl.trans(grad))
    eye = (rows == cols).to(tl.float32)
    z, dz = _polynomial(a, grad, eye, upper, MIDDLE, INNER, LAST, N_ITER, True, PRECISION)
    # read again rather than held in registers all the while
    a = tl.load(basis_ptr + at, mask=inside, other=0.0)
    grad = 0.5 * (tl.load(grad_ptr + at, mask=inside, other=0.0) + tl.load(grad_ptr + mirror, mask=inside, other=0.0))
    norm = tl.load(norm_ptr + matrix)
    out = (dz - (tl.sum(dz * a) + 0.5 * tl.sum(grad * z)) * a) / (norm * tl.sqrt(norm))
    tl.store(out_ptr + at, out, mask=inside & upper)
    tl.store(out_ptr + mirror, out, mask=inside & upper)
