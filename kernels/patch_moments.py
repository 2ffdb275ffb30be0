"""First stage: mean and covariance of the sampled patches.

One symmetric product with an implicit im2col: a program owns a pair of column tiles of the upper triangle and a share
of the rows, loads both tiles straight from the input, and writes its partial sums; a second kernel adds the partials
in fixed order and finishes ``Cov = E[xx^T] - mu mu^T``. Every column is shifted by the mean of a few of its samples
first, so that nothing cancels, and corrected by the mean of the values as they were multiplied: a Gram matrix.

Where a tile's columns are scattered in memory and wanted by many tiles, the patches of a few images at a time are
written out once, into a bounded workspace, and the product reads those.
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
from tdeconv.kernels.patch_tiles import columns, load_tile, round_tf32, row_indices, row_offsets, tile_at
from tdeconv.kernels.patches import TILE, Columns, Source, dense, image_parts, source
from tdeconv.kernels.recording import start

_PILOT = Config.of(4, 1, BLOCK_M=64)  # rows whose mean is the shift
_FINISH = Config.of(4, 1, BLOCK_E=128, BLOCK_Z=16)
_WRITE = Config.of(4, 1, BLOCK_M=32)
# Programs of the product per multiprocessor; rows that pay for one, in tiles.
_PER_MULTIPROCESSOR = 2
_LEAST_TILES = 4
# Vectors, and vectors per feature, from which the rounding of single values is lost in their mean.
_MANY = 4096
_MANY_PER_FEATURE = 64


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _patch_moments_pilot_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_off_ptr, x_disp_ptr, shift_ptr, rows, apart, loops, width, padded, plane,
    vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, size0, size1, size2,
    stride_xn, stride_xg, stride_x0, stride_x1, stride_x2, stride_xf,
    RANK: tl.constexpr, CHECK: tl.constexpr, X_ROWS_FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``shift (packs, padded)``: each column's mean over up to ``BLOCK_M`` rows, spread evenly."""
    first, pack = tl.program_id(0) * BLOCK_D, tl.program_id(1)
    lane = tl.arange(0, BLOCK_M)
    r = lane * apart
    live = (r < rows) & (lane < BLOCK_M)
    n, g, o0, o1, o2 = row_indices(r, vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, RANK)
    off = row_offsets(n, g, o0, o1, o2, stride_xn, stride_xg, stride_x0, stride_x1, stride_x2, RANK)
    at = pack * loops * padded + first
    col, col_live, d0, d1, d2 = columns(
        x_off_ptr, x_disp_ptr, at, first, width, plane, stride_xf, False, False, BLOCK_D
    )
    where, mask = tile_at(
        off, live, o0, o1, o2, col, col_live, d0, d1, d2, size0, size1, size2, RANK, CHECK, False, X_ROWS_FAST
    )
    tile = load_tile(x_ptr, where, mask, X_ROWS_FAST)
    count = tl.sum(live.to(tl.float32), 0)
    tl.store(shift_ptr + pack * padded + first + tl.arange(0, BLOCK_D), tl.sum(tile, 0) / count)


@triton.jit
def _patches_write_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_off_ptr, x_disp_ptr, out_ptr, rows, loops, width, padded, plane,
    vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, size0, size1, size2,
    stride_xn, stride_xg, stride_x0, stride_x1, stride_x2, stride_xf,
    RANK: tl.constexpr, CHECK: tl.constexpr, RUNS: tl.constexpr, X_ALIGNED: tl.constexpr, X_ROWS_FAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out (packs, rows*loops, width)``: the matrix itself. A program's loops share the lines they read."""
    first, pack = tl.program_id(1) * BLOCK_D, tl.program_id(2)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, g, o0, o1, o2 = row_indices(r, vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, RANK)
    off = row_offsets(n, g, o0, o1, o2, stride_xn, stride_xg, stride_x0, stride_x1, stride_x2, RANK)
    f = first + tl.arange(0, BLOCK_D)
    for v in range(loops):
        at = (pack * loops + v) * padded + first
        col, col_live, d0, d1, d2 = columns(
            x_off_ptr, x_disp_ptr, at, first, width, plane, stride_xf, RUNS, X_ALIGNED, BLOCK_D
        )
        where, mask = tile_at(
            off, r < rows, o0, o1, o2, col, col_live, d0, d1, d2, size0, size1, size2, RANK, CHECK, RUNS, X_ROWS_FAST
        )
        tile = load_tile(x_ptr, where, mask, X_ROWS_FAST)
        to = ((pack.to(tl.int64) * rows + r) * loops + v) * width  # a size may be the constant 1, which has no .to
        inside = (r < rows)[:, None] & (f < width)[None, :]
        tl.store(out_ptr + to[:, None] + f[None, :], tile.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pair(number):  # type: ignore[no-untyped-def]
    """Tiles ``p <= q`` of the upper triangle: number 0 is (0, 0), then (0, 1), (1, 1), (0, 2), ..."""
    q = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    q = tl.where(q * (q + 1) // 2 > number, q - 1, q)
    q = tl.where((q + 1) * (q + 2) // 2 <= number, q + 1, q)
    return number - q * (q + 1) // 2, q


@triton.jit
def _patch_moments_gram_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_off_ptr, x_disp_ptr, shift_ptr, partial_ptr, sums_ptr, rows, split_rows, loops, width, padded, plane,
    vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, size0, size1, size2,
    stride_xn, stride_xg, stride_x0, stride_x1, stride_x2, stride_xf,
    ACCUMULATE: tl.constexpr, SINGLE: tl.constexpr, ROUND: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    RANK: tl.constexpr, CHECK: tl.constexpr, RUNS: tl.constexpr, LOOPED: tl.constexpr,
    X_ALIGNED: tl.constexpr, X_ROWS_FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of one pair of tiles over one split of the rows.

    ``partial (splits, packs, pairs, BLOCK_D, BLOCK_D)`` of shifted products, ``sums (splits, packs, padded)`` of
    shifted values. ``SINGLE``: there is one tile; ``LOOPED``: every vector has column tables of its own.
    """
    pair, split, pack = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p, q = _pair(pair)
    lane = tl.arange(0, BLOCK_D)
    shift_p = tl.load(shift_ptr + pack * padded + p * BLOCK_D + lane)
    shift_q = tl.load(shift_ptr + pack * padded + q * BLOCK_D + lane)
    if not LOOPED:
        at = pack * padded
        cp, lp, p0, p1, p2 = columns(
            x_off_ptr, x_disp_ptr, at + p * BLOCK_D, p * BLOCK_D, width, plane, stride_xf, RUNS, X_ALIGNED, BLOCK_D
        )
        cq, lq, q0, q1, q2 = columns(
            x_off_ptr, x_disp_ptr, at + q * BLOCK_D, q * BLOCK_D, width, plane, stride_xf, RUNS, X_ALIGNED, BLOCK_D
        )
    slot = (split * tl.num_programs(2) + pack).to(tl.int64)
    square = lane[:, None] * BLOCK_D + lane[None, :]
    partial_ptr += (slot * tl.num_programs(0) + pair) * (BLOCK_D * BLOCK_D)
    sums_ptr += slot * padded + q * BLOCK_D + lane
    if ACCUMULATE:  # noqa: SIM108
        acc = tl.load(partial_ptr + square)
    else:
        acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, rows)
    for i in range(tl.cdiv(end - begin, BLOCK_M) * loops):
        r = begin + (i // loops) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = r < end
        n, g, o0, o1, o2 = row_indices(r, vectors, flat, pos0, pos1, pos2, step0, step1, step2, pad0, pad1, pad2, RANK)
        off = row_offsets(n, g, o0, o1, o2, stride_xn, stride_xg, stride_x0, stride_x1, stride_x2, RANK)
        if LOOPED:
            at = (pack * loops + i % loops) * padded
            cp, lp, p0, p1, p2 = columns(
                x_off_ptr, x_disp_ptr, at + p * BLOCK_D, p * BLOCK_D, width, plane, stride_xf, RUNS, X_ALIGNED, BLOCK_D
            )
            cq, lq, q0, q1, q2 = columns(
                x_off_ptr, x_disp_ptr, at + q * BLOCK_D, q * BLOCK_D, width, plane, stride_xf, RUNS, X_ALIGNED, BLOCK_D
            )
        where, mask = tile_at(
            off, live, o0, o1, o2, cq, lq, q0, q1, q2, size0, size1, size2, RANK, CHECK, RUNS, X_ROWS_FAST
        )
        # padding is data: zero, then shifted; a row past the end is nothing: zero again after the shift
        b = tl.where(live[:, None], load_tile(x_ptr, where, mask, X_ROWS_FAST) - shift_q[None, :], 0.0)
        if ROUND:
            b = round_tf32(b)
        if SINGLE:
            a = b
        else:
            where, mask = tile_at(
                off, live, o0, o1, o2, cp, lp, p0, p1, p2, size0, size1, size2, RANK, CHECK, RUNS, X_ROWS_FAST
            )
            a = tl.where(live[:, None], load_tile(x_ptr, where, mask, X_ROWS_FAST) - shift_p[None, :], 0.0)
            if ROUND:
                a = round_tf32(a)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=INPUT_PRECISION)
        total += b
    tl.store(partial_ptr + square, acc)
    if p == q:
        column_sums = tl.sum(total, 0)
        if ACCUMULATE:
            column_sums += tl.load(sums_ptr)
        tl.store(sums_ptr, column_sums)


@triton.jit
def _patch_moments_finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, sums_ptr, shift_ptr, home_ptr, mean_ptr, cov_ptr, splits, count, features, padded,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """``mean (b, D)`` and ``cov (b, D, D)`` from the partial sums, ``BLOCK_E`` elements of a pair at a time."""
    pieces: tl.constexpr = BLOCK_D * BLOCK_D // BLOCK_E
    pair, pack = tl.program_id(0) // pieces, tl.program_id(1)
    packs = tl.num_programs(1)
    p, q = _pair(pair)
    e = (tl.program_id(0) % pieces) * BLOCK_E + tl.arange(0, BLOCK_E)
    i = p * BLOCK_D + e // BLOCK_D
    j = q * BLOCK_D + e % BLOCK_D
    product = tl.zeros((BLOCK_Z, BLOCK_E), tl.float32)
    sum_i = tl.zeros((BLOCK_Z, BLOCK_E), tl.float32)
    sum_j = tl.zeros((BLOCK_Z, BLOCK_E), tl.float32)
    pairs = tl.num_programs(0) // pieces
    for first in range(0, splits, BLOCK_Z):
        z = first + tl.arange(0, BLOCK_Z)
        mask = (z < splits)[:, None]
        slot = (z * packs + pack).to(tl.int64)[:, None]
        product += tl.load(partial_ptr + (slot * pairs + pair) * (BLOCK_D * BLOCK_D) + e[None, :], mask=mask, other=0.0)
        sum_i += tl.load(sums_ptr + slot * padded + i[None, :], mask=mask, other=0.0)
        sum_j += tl.load(sums_ptr + slot * padded + j[None, :], mask=mask, other=0.0)
    mean_i, mean_j = tl.sum(sum_i, 0) / count, tl.sum(sum_j, 0) / count
    value = tl.sum(product, 0) / count - mean_i * mean_j
    home_i, home_j = tl.load(home_ptr + pack * padded + i), tl.load(home_ptr + pack * padded + j)
    b, fi, fj = home_i // features, home_i % features, home_j % features
    # a pack's groups share a tile but not a covariance; the lower triangle is the upper one's very bits
    keep = (home_i >= 0) & (home_j >= 0) & (i <= j) & (b == home_j // features)
    cov_ptr += b.to(tl.int64) * features * features
    tl.store(cov_ptr + fi * features + fj, value, mask=keep)
    tl.store(cov_ptr + fj * features + fi, value, mask=keep)
    shift = tl.load(shift_ptr + pack * padded + i)
    tl.store(mean_ptr + home_i, shift + mean_i, mask=keep & (i == j))


# --------------------------------------------------------------------------------------------------------- launchers


def products(device: torch.device, src: Source) -> dict[str, Any]:
    """How shifted values are multiplied: by the default policy in one tf32 pass of values rounded to nearest.

    Few vectors do not average the rounding of their values: those are multiplied exactly, which costs nothing then.
    """
    exact = precision.float32_products(device)
    few = src.count < max(_MANY, _MANY_PER_FEATURE * src.cols.features)
    if precision.policy() == "strict" or few or torch.version.hip:
        return {"ROUND": False, "INPUT_PRECISION": exact}
    return {"ROUND": True, "INPUT_PRECISION": "tf32" if device.type == "cuda" else exact}


def gram_candidates(src: Source, exact: bool) -> list[Config]:
    """The default first. They differ in prefetching alone: no sum changes its order with the winner.

    Exact products on tensor cores take three passes over split operands, which need the registers of fewer rows;
    elements loaded one by one need more addresses, and warps to hold them.
    """
    rows, stages = (32, (3, 2)) if exact else (64, (3, 2))
    warps = 8 if src.cols.tile == TILE and not src.contiguous else 4
    return [Config.of(warps, n, BLOCK_M=rows, BLOCK_D=src.cols.tile) for n in stages]


def gram_legal(config: Config, within: Limits, itemsize: int) -> bool:
    m, d = config["BLOCK_M"], config["BLOCK_D"]
    return legal(config, within, staged=2 * m * d * itemsize, kept=2 * m * d * 4, held=d * d + 3 * m * d)


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _split_rows(src: Source, pairs: int, block: int, device: torch.device) -> int:
    """Rows of a split, whole tiles: enough splits to fill the device, none too short to be worth its partial sums."""
    wanted = max(1, _PER_MULTIPROCESSOR * multiprocessors(device) // (pairs * src.cols.packs))
    tiles = -(-src.rows // block)
    least = -(-_LEAST_TILES // src.loops)
    return max(least, -(-tiles // wanted)) * block


def pilot(x: Tensor, src: Source) -> Tensor:
    """Every column's shift ``(packs, padded)``."""
    cols = src.cols
    shift = x.new_empty((cols.packs, cols.padded), dtype=torch.float32)
    flags = {"RANK": src.flags["RANK"], "CHECK": src.flags["CHECK"]}
    place = src.place(0, "x")
    del place["X_ALIGNED"]
    start(
        _patch_moments_pilot_kernel,
        (cols.tiles, cols.packs),
        config=Config.of(4, 1, BLOCK_M=_PILOT["BLOCK_M"], BLOCK_D=cols.tile),
        device=x.device,
        x_ptr=x,
        shift_ptr=shift,
        rows=src.rows,
        apart=max(1, src.rows // _PILOT["BLOCK_M"]),
        loops=src.loops,
        **src.sizes,
        **src.geometry,
        **place,
        **flags,
    )
    return shift


def write_patches(x: Tensor, src: Source) -> Tensor:
    """The matrix itself, in the input's dtype: ``(packs, rows*loops, width)``."""
    cols = src.cols
    out = x.new_empty(cols.packs, src.count, cols.width)
    block = _WRITE["BLOCK_M"]
    start(
        _patches_write_kernel,
        (triton.cdiv(src.rows, block), cols.tiles, cols.packs),
        config=Config.of(4, 1, BLOCK_M=block, BLOCK_D=cols.tile),
        device=x.device,
        x_ptr=x,
        out_ptr=out,
        rows=src.rows,
        loops=src.loops,
        **src.sizes,
        **src.geometry,
        **src.place(0, "x"),
        **src.flags,
    )
    return out


class _Sums:
    """Partial sums over the splits, and what fills them."""

    def __init__(self, shift: Tensor, cols: Columns) -> None:
        self.shift, self.cols = shift, cols
        self.pairs = cols.tiles * (cols.tiles + 1) // 2
        self.partial: Tensor | None = None
        self.config = _FINISH

    def add(self, x: Tensor, src: Source, how: dict[str, Any]) -> None:
        """The first call decides the splits and the configuration: later ones must not have more rows."""
        if self.partial is not None:
            self._launch(x, src, how, self.config, accumulate=True)
            return
        cols, d = self.cols, self.cols.tile
        configs = gram_candidates(src, not how["ROUND"])
        configs = [c for c in configs if gram_legal(c, limits(x.device), x.element_size())] or configs[-1:]
        self.split_rows = _split_rows(src, self.pairs, configs[0]["BLOCK_M"], x.device)
        self.splits = triton.cdiv(src.rows, self.split_rows)
        self.partial = self.shift.new_empty(self.splits, cols.packs, self.pairs, d, d)
        self.sums = self.shift.new_empty(self.splits, cols.packs, cols.padded)
        sizes = tuning.key(
            rows=src.rows, width=cols.width, packs=cols.packs, loops=src.loops, rank=src.flags["RANK"],
            runs=cols.runs, fast=src.place(0, "x")["X_ROWS_FAST"], dtype=str(x.dtype), how=how["INPUT_PRECISION"],
        )  # fmt: skip
        self.config = tuning.run_best(
            "patch_moments", sizes, configs, lambda c: self._launch(x, src, how, c, accumulate=False), x.device
        )

    def _launch(self, x: Tensor, src: Source, how: dict[str, Any], config: Config, accumulate: bool) -> None:
        start(
            _patch_moments_gram_kernel,
            (self.pairs, self.splits, self.cols.packs),
            config=config,
            device=x.device,
            x_ptr=x,
            shift_ptr=self.shift,
            partial_ptr=self.partial,
            sums_ptr=self.sums,
            rows=src.rows,
            split_rows=self.split_rows,
            loops=src.loops,
            **src.sizes,
            **src.geometry,
            **src.place(0, "x"),
            **src.flags,
            **how,
            ACCUMULATE=accumulate,
            SINGLE=self.pairs == 1,
            LOOPED=src.loops > 1,
        )

    def finish(self, src: Source, count: int) -> tuple[Tensor, Tensor]:
        cols, d = self.cols, self.cols.features
        mean = self.shift.new_empty(cols.groups, d)
        cov = self.shift.new_empty(cols.groups, d, d)
        # an element's sum does not depend on its neighbours; the interpreter wants few programs
        block = cols.tile**2 if cov.device.type == "cpu" else _FINISH["BLOCK_E"]
        start(
            _patch_moments_finish_kernel,
            (self.pairs * (cols.tile**2 // block), cols.packs),
            config=Config.of(4, 1, BLOCK_D=cols.tile, BLOCK_E=block, BLOCK_Z=_FINISH["BLOCK_Z"]),
            device=cov.device,
            partial_ptr=self.partial,
            sums_ptr=self.sums,
            shift_ptr=self.shift,
            home_ptr=src.home,
            mean_ptr=mean,
            cov_ptr=cov,
            splits=self.splits,
            count=count,
            features=d,
            padded=cols.padded,
        )
        return mean, cov


def patch_moments(x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """Mean ``(b, D)`` and biased covariance ``(b, D, D)`` of the sampled patches of ``x (N, C, *spatial)``, float32."""
    if x.dtype == torch.float64:
        return torch_backend.patch_moments(x, geo)
    src = source(geo, x)
    if not src.fits:
        return torch_backend.patch_moments(x, geo)
    cols = src.cols
    if src.rows == 0:
        nothing = x.new_full((cols.groups, cols.features), torch.nan, dtype=torch.float32)
        return nothing, nothing.unsqueeze(-1).expand(-1, -1, cols.features).clone()
    sums = _Sums(pilot(x, src), cols)
    how = products(x.device, src)
    if cols.direct:
        sums.add(x, src, how)
    else:
        for part in x.split(image_parts(src, x.shape[0], x.element_size())):
            patches = source(geo, part)
            sums.add(write_patches(part, patches), dense(patches), how)
    return sums.finish(src, src.count)
