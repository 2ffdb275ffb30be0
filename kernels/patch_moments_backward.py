"""The gradient of the first stage, added into the input's gradient at the sampled positions alone.

Of a centred row ``x`` it is ``x Gs + gm``, ``Gs = (grad_cov + grad_cov^T)/count`` and ``gm = grad_mean/count``: one
product, whose rows are read from the input as in forward. Where no two patches share a pixel every element is read,
added to and written once, in place. Where patches overlap, or a tile's columns are scattered, a few images' rows at a
time are written to a bounded workspace, and a second kernel gathers for every pixel what belongs to it, in the order
of the taps. No atomics: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdeconv import torch_backend
from tdeconv.geometry import Geometry
from tdeconv.kernels import precision, tuning
from tdeconv.kernels.configs import Config, Limits, legal, limits
from tdeconv.kernels.patch_moments import write_patches
from tdeconv.kernels.patch_tiles import columns, load_tile, round_tf32, row_indices, row_offsets, tile_at
from tdeconv.kernels.patches import Columns, Source, dense, image_parts, overlapping, source
from tdeconv.kernels.recording import start

_GATHER = Config.of(4, 1, BLOCK_P=32, BLOCK_C=32)
_GATHER_INTERPRETED = Config.of(4, 1, BLOCK_P=256, BLOCK_C=64)  # fewer programs


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _patch_moments_matrix_kernel(  # type: ignore[no-untyped-def]
    grad_cov_ptr, grad_mean_ptr, mean_ptr, home_ptr, matrix_ptr, bias_ptr, shift_ptr, count, features, padded,
    ROUND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``matrix (packs, padded, padded)``, ``bias`` and ``shift (packs, padded)``: Gs, gm and the mean by columns."""
    pack = tl.program_id(2)
    i = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    home_i, home_j = tl.load(home_ptr + pack * padded + i), tl.load(home_ptr + pack * padded + j)
    fi, fj = (home_i % features)[:, None], (home_j % features)[None, :]
    b = (home_i // features)[:, None]
    keep = (home_i >= 0)[:, None] & (home_j >= 0)[None, :] & (b == (home_j // features)[None, :])
    base = grad_cov_ptr + b.to(tl.int64) * features * features
    value = tl.load(base + fi * features + fj, mask=keep, other=0.0)
    value = (value + tl.load(base + fj * features + fi, mask=keep, other=0.0)) / count
    if ROUND:
        value = round_tf32(value)
    tl.store(matrix_ptr + (pack.to(tl.int64) * padded + i[:, None]) * padded + j[None, :], value)
    if tl.program_id(0) == 0:
        grad_mean = tl.load(grad_mean_ptr + home_j, mask=home_j >= 0, other=0.0)
        tl.store(bias_ptr + pack * padded + j, grad_mean / count)
        tl.store(shift_ptr + pack * padded + j, tl.load(mean_ptr + home_j, mask=home_j >= 0, other=0.0))


@triton.jit
def _patch_moments_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_off_ptr, x_disp_ptr, g_ptr, g_off_ptr, g_disp_ptr, matrix_ptr, bias_ptr, shift_ptr,
    rows, loops, tiles, width, padded, plane,
    vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, size0, size1, size2,
    stride_xn, stride_xg, stride_x0, stride_x1, stride_x2, stride_xf,
    stride_gn, stride_gg, stride_g0, stride_g1, stride_g2, stride_gf,
    ADD: tl.constexpr, ROUND: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    RANK: tl.constexpr, CHECK: tl.constexpr, RUNS: tl.constexpr,
    X_ALIGNED: tl.constexpr, X_ROWS_FAST: tl.constexpr, G_ALIGNED: tl.constexpr, G_ROWS_FAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of ``(x - shift) matrix + bias``; neighbouring programs share their rows.

    ``ADD``: added in place to ``g``, of the input's shape; else written out as ``g (packs, rows*loops, width)``.
    """
    q, table = tl.program_id(0) % tiles, tl.program_id(1)
    pack = table // loops
    r = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = r < rows
    n, g, o0, o1, o2 = row_indices(r, vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, RANK)
    off = row_offsets(n, g, o0, o1, o2, stride_xn, stride_xg, stride_x0, stride_x1, stride_x2, RANK)
    lane = tl.arange(0, BLOCK_D)
    matrix_ptr += pack.to(tl.int64) * padded * padded + q * BLOCK_D
    lane_k = tl.arange(0, BLOCK_K)
    inner = lane_k[:, None] * padded + lane[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, padded, BLOCK_K):
        col, col_live, d0, d1, d2 = columns(
            x_off_ptr, x_disp_ptr, table * padded + first, first, width, plane, stride_xf, RUNS, X_ALIGNED, BLOCK_K
        )
        at, mask = tile_at(
            off, live, o0, o1, o2, col, col_live, d0, d1, d2, size0, size1, size2, RANK, CHECK, RUNS, X_ROWS_FAST
        )
        shift = tl.load(shift_ptr + pack * padded + first + lane_k)
        # rows past the end are never stored, columns that are none meet zeros of the matrix
        a = load_tile(x_ptr, at, mask, X_ROWS_FAST) - shift[None, :]
        if ROUND:
            a = round_tf32(a)
        acc = tl.dot(a, tl.load(matrix_ptr + first * padded + inner), acc, input_precision=INPUT_PRECISION)
    acc += tl.load(bias_ptr + pack * padded + q * BLOCK_D + lane)[None, :]
    first = q * BLOCK_D
    if ADD:
        col, col_live, d0, d1, d2 = columns(
            g_off_ptr, g_disp_ptr, table * padded + first, first, width, plane, stride_gf, RUNS, G_ALIGNED, BLOCK_D
        )
        off = row_offsets(n, g, o0, o1, o2, stride_gn, stride_gg, stride_g0, stride_g1, stride_g2, RANK)
        at, mask = tile_at(
            off, live, o0, o1, o2, col, col_live, d0, d1, d2, size0, size1, size2, RANK, CHECK, RUNS, G_ROWS_FAST
        )
        if G_ROWS_FAST:
            acc = tl.trans(acc)
        acc += tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        row = (pack.to(tl.int64) * rows + r) * loops + table % loops  # a size may be the constant 1, which has no .to
        at = row[:, None] * width + (first + lane)[None, :]
        mask = live[:, None] & (first + lane < width)[None, :]
    tl.store(g_ptr + at, acc.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _axis(i, pad, moved, step, positions):  # type: ignore[no-untyped-def]
    """The position whose tap, moved by ``moved``, reads pixel ``i``; and whether there is one."""
    o = i + pad - moved
    p = o // step
    return p, (o >= 0) & (p * step == o) & (p < positions)


@triton.jit
def _patches_gather_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, g_ptr, pixels, channels, run, loops, width, stride_sample, stride_unit,
    kernel0, kernel1, kernel2, dilation0, dilation1, dilation2, pos0, pos1, pos2, step0, step1, step2,
    pad0, pad1, pad2, size0, size1, size2, stride_gn, stride_gc, stride_g0, stride_g1, stride_g2,
    SCATTERED: tl.constexpr, G_ROWS_FAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds to each pixel of ``g`` its elements of the written-out ``rows``, tap by tap."""
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if G_ROWS_FAST:  # pixels are the neighbours in memory
        i, c = i[None, :], c[:, None]
    else:
        i, c = i[:, None], c[None, :]
    n = i // (size0 * size1 * size2)
    i0, i1, i2 = i // (size1 * size2) % size0, i // size2 % size1, i % size2
    taps = kernel0 * kernel1 * kernel2
    inside = (i < pixels) & (c < channels)
    acc = tl.zeros(inside.shape, tl.float32)
    hit = tl.zeros(i.shape, tl.int1)
    for t in range(taps):
        p0, ok0 = _axis(i0, pad0, t // (kernel1 * kernel2) * dilation0, step0, pos0)
        p1, ok1 = _axis(i1, pad1, t // kernel2 % kernel1 * dilation1, step1, pos1)
        p2, ok2 = _axis(i2, pad2, t % kernel2 * dilation2, step2, pos2)
        ok = ok0 & ok1 & ok2
        m = ((n * pos0 + p0) * pos1 + p1) * pos2 + p2
        if SCATTERED:
            column = c * taps + t
            row, f = m * loops + column % loops, column // loops
            at = row.to(tl.int64) * width + f
        else:
            unit = c // run
            at = m.to(tl.int64) * stride_sample + unit.to(tl.int64) * stride_unit + (t * run + c % run)
        acc += tl.load(rows_ptr + at, mask=ok & inside, other=0.0)
        hit = hit | ok
    at = n.to(tl.int64) * stride_gn + i0.to(tl.int64) * stride_g0 + i1.to(tl.int64) * stride_g1
    at = at + i2.to(tl.int64) * stride_g2 + c.to(tl.int64) * stride_gc
    mask = inside & hit  # a pixel that no patch reads is left alone
    acc += tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + at, acc.to(g_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------- launchers


def products(device: torch.device) -> dict[str, Any]:
    """How centred values and ``Gs`` are multiplied: by the default policy in one tf32 pass, rounded to nearest."""
    exact = precision.float32_products(device)
    if precision.policy() == "strict" or torch.version.hip:
        return {"ROUND": False, "INPUT_PRECISION": exact}
    return {"ROUND": True, "INPUT_PRECISION": "tf32" if device.type == "cuda" else exact}


def candidates(cols: Columns) -> list[Config]:
    """The default first. They differ in prefetching alone: no sum changes its order with the winner."""
    width, step = cols.tile, min(cols.tile, 32)
    stages = (1,) if cols.padded == step else (3, 2)
    return [Config.of(4, n, BLOCK_M=64, BLOCK_D=width, BLOCK_K=step) for n in stages]


def fits(config: Config, within: Limits, itemsize: int) -> bool:
    m, d, k = config["BLOCK_M"], config["BLOCK_D"], config["BLOCK_K"]
    return legal(config, within, staged=(m * itemsize + d * 4) * k, kept=m * k * 4, held=m * d + 2 * m * k + d * k)


class _Factors:
    """What a row is multiplied by, in the order of the columns."""

    def __init__(self, src: Source, mean: Tensor, grad_mean: Tensor, grad_cov: Tensor) -> None:
        cols = src.cols
        self.how = products(mean.device)
        self.matrix = mean.new_empty(cols.packs, cols.padded, cols.padded)
        self.bias, self.shift = mean.new_empty(2, cols.packs, cols.padded).unbind()
        start(
            _patch_moments_matrix_kernel,
            (cols.tiles, cols.tiles, cols.packs),
            config=Config.of(4, 1, BLOCK_D=cols.tile),
            device=mean.device,
            grad_cov_ptr=grad_cov.contiguous(),
            grad_mean_ptr=grad_mean.contiguous(),
            mean_ptr=mean.contiguous(),
            home_ptr=src.home,
            matrix_ptr=self.matrix,
            bias_ptr=self.bias,
            shift_ptr=self.shift,
            count=src.count,
            features=cols.features,
            padded=cols.padded,
            ROUND=self.how["ROUND"],
        )

    def multiply(self, x: Tensor, src: Source, out: Tensor, in_place: bool) -> None:
        """Added to ``out``, the input's gradient, in place; or written out as its rows."""
        cols = src.cols
        configs = candidates(cols)
        configs = [c for c in configs if fits(c, limits(x.device), x.element_size())] or configs[-1:]
        sizes = tuning.key(
            rows=src.rows, width=cols.width, packs=cols.packs, loops=src.loops, rank=src.flags["RANK"],
            runs=cols.runs, fast=src.place(0, "x")["X_ROWS_FAST"], dtype=str(x.dtype),
            how=self.how["INPUT_PRECISION"], place=in_place,
        )  # fmt: skip
        if in_place:  # measured elsewhere first: repeated, it would add more than once
            tuning.choose(
                "patch_moments_backward", sizes, configs,
                lambda c: self._launch(x, src, torch.empty_like(out), c, in_place), x.device,
            )  # fmt: skip
        tuning.run_best(
            "patch_moments_backward", sizes, configs, lambda c: self._launch(x, src, out, c, in_place), x.device
        )

    def _launch(self, x: Tensor, src: Source, out: Tensor, config: Config, in_place: bool) -> None:
        cols = src.cols
        start(
            _patch_moments_bwd_kernel,
            (triton.cdiv(src.rows, config["BLOCK_M"]) * cols.tiles, src.tables),
            config=config,
            device=x.device,
            x_ptr=x,
            g_ptr=out,
            matrix_ptr=self.matrix,
            bias_ptr=self.bias,
            shift_ptr=self.shift,
            rows=src.rows,
            loops=src.loops,
            tiles=cols.tiles,
            **src.sizes,
            **src.geometry,
            **src.place(0, "x"),
            **src.place(int(in_place), "g"),
            **src.flags,
            **self.how,
            ADD=in_place,
        )


def _gather(rows: Tensor, grad_x: Tensor, geo: Geometry, src: Source) -> None:
    """Add the written-out ``rows (packs, count, width)`` to the pixels they come from."""
    cols = src.cols
    g = grad_x[(slice(None), slice(None), *(None,) * (5 - grad_x.ndim))]  # three spatial axes
    pixels = g.shape[0] * g.shape[2:].numel()
    config = _GATHER_INTERPRETED if grad_x.device.type == "cpu" else _GATHER
    units = cols.vectors if cols.groups == 1 else 1
    axes = {"kernel": cols.kernel_size, "dilation": cols.dilation, "size": tuple(g.shape[2:])}
    named = {f"{name}{i}": v for name, values in axes.items() for i, v in enumerate(values)}
    strides = dict(zip(("n", "c", "0", "1", "2"), g.stride(), strict=True))
    start(
        _patches_gather_kernel,
        (triton.cdiv(pixels, config["BLOCK_P"]), triton.cdiv(cols.channels, config["BLOCK_C"])),
        config=config,
        device=grad_x.device,
        rows_ptr=rows,
        g_ptr=grad_x,
        pixels=pixels,
        channels=cols.channels,
        run=cols.run,
        loops=src.loops,
        width=cols.width,
        stride_sample=units * cols.width,
        stride_unit=cols.width * (1 if cols.groups == 1 else src.rows),
        **{k: v for k, v in src.geometry.items() if k[:3] in ("pos", "ste", "pad")},
        **named,
        **{f"stride_g{axis}": v for axis, v in strides.items()},
        SCATTERED=cols.scattered,
        G_ROWS_FAST=g.stride(1) != 1,
    )


def patch_moments_backward_(
    grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, geo: Geometry
) -> None:
    """Add the gradient of ``mean (b, D)`` and ``cov (b, D, D)`` into ``grad_x`` where ``x (N, C, *)`` is sampled."""
    src = source(geo, x, grad_x)
    if x.dtype == torch.float64 or not src.fits:
        torch_backend.patch_moments_backward_(grad_x, x, mean, grad_mean, grad_cov, geo)
        return
    cols = src.cols
    factors = _Factors(src, mean, grad_mean, grad_cov)
    if cols.direct and not overlapping(geo, tuple(x.shape)):
        factors.multiply(x, src, grad_x, in_place=True)
        return
    images = image_parts(src, x.shape[0], mean.element_size())
    for x_part, grad_part in zip(x.split(images), grad_x.split(images), strict=True):
        patches = source(geo, x_part)
        rows = mean.new_empty(cols.packs, patches.count, cols.width)
        if cols.direct:
            factors.multiply(x_part, patches, rows, in_place=False)
        else:
            factors.multiply(write_patches(x_part, patches), dense(patches), rows, in_place=False)
        _gather(rows, grad_part, geo, patches)
