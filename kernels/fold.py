"""Third stage: the inverse root and the mean folded into weight and bias, and the gradients of that.

A weight's row of ``G`` vectors is ``G`` rows ``(o, g)`` of one tall matrix, g fastest: with interleaved grouping
(column ``f*G + g``) a tile of such rows and features is then one run of memory per output channel. Forward and the
weight's gradient are the same product, ``out_r = (a_r - c_o mu^T) M`` with ``c = 0`` or the bias's gradient; what
reaches the folded weight through the folded bias is never written. Sums over tiles are added by a second kernel in
fixed order. Products are float32's everywhere: a weight is small, and an error in it is in every pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdeconv import torch_backend
from tdeconv.geometry import Geometry
from tdeconv.kernels.configs import Config, counted, matrix_counted, span
from tdeconv.kernels.launch import launch
from tdeconv.kernels.precision import float32_products
from tdeconv.torch_backend.fold import channels_last_weight

# Programs wanted of the product over rows, of which a small covariance has too few tiles; and rows that pay for one.
_PROGRAMS = 256
_SPLIT_ROWS = 256


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _offsets(r, f, vectors, step_f, step_g, stride_o, stride_c, stride_t, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where features ``f (1, F)`` of rows ``r (R, 1)`` are; rows count (output channel, vector)."""
    o = r // vectors
    column = f * step_f + (r - o * vectors) * step_g
    within = column * stride_c
    if TAPS > 1:  # else one kernel position, or a contiguous weight: columns evenly spaced
        within = (column // TAPS) * stride_c + (column % TAPS) * stride_t
    return o.to(tl.int64) * stride_o + within


@triton.jit
def _fold_product_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    out_ptr,
    deconv_ptr,
    mean_ptr,
    coefficient_ptr,
    bias_ptr,
    shift_ptr,
    rows,
    features,
    vectors,
    step_f,
    step_g,
    stride_ao,
    stride_ac,
    stride_at,
    stride_oo,
    stride_oc,
    stride_ot,
    stride_dk,
    stride_df,
    A_TAPS: tl.constexpr,
    OUT_TAPS: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out_r = (a_r - c_o mu^T) M``, M the root (transposed in the gradient); forward also ``out_r . mu``.

    WHOLE = G says that a tile holds all features of all vectors of its output channels: the folded bias is finished
    here. With 0, one partial sum per row goes to ``shift (feature tiles, groups * rows)``.
    """
    first_row = tl.program_id(0) * BLOCK_R
    group = tl.program_id(2).to(tl.int64)
    r = first_row + tl.arange(0, BLOCK_R)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    outs = rows // vectors
    a_ptr += group * outs * stride_ao
    out_ptr += group * outs * stride_oo
    deconv_ptr += group * features * features
    mean_ptr += group * features
    row_in, f_in = r < rows, f < features
    if GRADIENT:
        coefficient = tl.load(coefficient_ptr + group * outs + r // vectors, mask=row_in, other=0.0)
    acc = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < features
        at = _offsets(r[:, None], k[None, :], vectors, step_f, step_g, stride_ao, stride_ac, stride_at, A_TAPS)
        a = tl.load(a_ptr + at, mask=row_in[:, None] & k_in[None, :], other=0.0).to(tl.float32)
        if GRADIENT:
            a -= coefficient[:, None] * tl.load(mean_ptr + k, mask=k_in, other=0.0)[None, :]
        m = tl.load(
            deconv_ptr + k[:, None] * stride_dk + f[None, :] * stride_df, mask=k_in[:, None] & f_in[None, :], other=0.0
        )
        acc = tl.dot(a, m, acc, input_precision=INPUT_PRECISION)
    at = _offsets(r[:, None], f[None, :], vectors, step_f, step_g, stride_oo, stride_oc, stride_ot, OUT_TAPS)
    tl.store(out_ptr + at, acc, mask=row_in[:, None] & f_in[None, :])
    if not GRADIENT:
        per_row = tl.sum(acc * tl.load(mean_ptr + f, mask=f_in, other=0.0)[None, :], axis=1)
        if WHOLE == 0:
            groups = tl.num_programs(2)
            at_row = tl.program_id(1).to(tl.int64) * groups * rows + group * rows + r
            tl.store(shift_ptr + at_row, per_row, mask=row_in)
        else:
            total = tl.sum(tl.reshape(per_row, (BLOCK_R // WHOLE, WHOLE)), axis=1)
            o = first_row // WHOLE + tl.arange(0, BLOCK_R // WHOLE)
            o_in = o < outs
            shift = -total
            if HAS_BIAS:
                shift += tl.load(bias_ptr + group * outs + o, mask=o_in, other=0.0).to(tl.float32)
            tl.store(shift_ptr + group * outs + o, shift, mask=o_in)


@triton.jit
def _fold_bias_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    bias_ptr,
    shift_ptr,
    outs,
    vectors,
    tiles,
    HAS_BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The folded bias from one partial sum per (feature tile, output channel, vector), in that order."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_in = o < outs
    total = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for tile in range(tiles):
        row = partial_ptr + tile * outs * vectors
        for start in range(0, vectors, BLOCK_G):
            g = start + tl.arange(0, BLOCK_G)
            mask = o_in[:, None] & (g < vectors)[None, :]
            total += tl.sum(tl.load(row + o[:, None] * vectors + g[None, :], mask=mask, other=0.0), axis=1)
    shift = -total
    if HAS_BIAS:
        shift += tl.load(bias_ptr + o, mask=o_in, other=0.0).to(tl.float32)
    tl.store(shift_ptr + o, shift, mask=o_in)


@triton.jit
def _fold_bwd_statistics_kernel(  # type: ignore[no-untyped-def]
    w_ptr,
    grad_ptr,
    mean_ptr,
    coefficient_ptr,
    out_ptr,
    u_ptr,
    rows,
    features,
    vectors,
    step_f,
    step_g,
    stride_wo,
    stride_wc,
    stride_wt,
    stride_go,
    stride_gc,
    stride_gt,
    rows_per_split,
    groups,
    W_TAPS: tl.constexpr,
    GRAD_TAPS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A split's part of ``sum_r w_r (grad_r - c_o mu^T)^T`` and of ``u = sum_r c_o w_r``: ``(splits, groups, ...)``."""
    blocks_f = tl.cdiv(features, BLOCK_F)
    tile_k, tile_f = tl.program_id(0) // blocks_f, tl.program_id(0) % blocks_f
    split, group = tl.program_id(1), tl.program_id(2).to(tl.int64)
    outs = rows // vectors
    k, f = tile_k * BLOCK_K + tl.arange(0, BLOCK_K), tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    k_in, f_in = k < features, f < features
    w_ptr += group * outs * stride_wo
    grad_ptr += group * outs * stride_go
    mean = tl.load(mean_ptr + group * features + f, mask=f_in, other=0.0)
    acc = tl.zeros((BLOCK_K, BLOCK_F), dtype=tl.float32)
    u = tl.zeros((BLOCK_K,), dtype=tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        row_in = r < last
        at = _offsets(r[:, None], k[None, :], vectors, step_f, step_g, stride_wo, stride_wc, stride_wt, W_TAPS)
        w = tl.load(w_ptr + at, mask=row_in[:, None] & k_in[None, :], other=0.0).to(tl.float32)
        at = _offsets(r[:, None], f[None, :], vectors, step_f, step_g, stride_go, stride_gc, stride_gt, GRAD_TAPS)
        grad = tl.load(grad_ptr + at, mask=row_in[:, None] & f_in[None, :], other=0.0).to(tl.float32)
        coefficient = tl.load(coefficient_ptr + group * outs + r // vectors, mask=row_in, other=0.0)
        grad -= coefficient[:, None] * mean[None, :]
        acc = tl.dot(tl.trans(w), grad, acc, input_precision=INPUT_PRECISION)
        if tile_f == 0:
            u += tl.sum(w * coefficient[:, None], axis=0)
    base = (split * groups + group) * features
    tl.store(out_ptr + (base + k[:, None]) * features + f[None, :], acc, mask=k_in[:, None] & f_in[None, :])
    if tile_f == 0:
        tl.store(u_ptr + base + k, u, mask=k_in)


@triton.jit
def _fold_bwd_finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    u_ptr,
    deconv_ptr,
    grad_deconv_ptr,
    grad_mean_ptr,
    features,
    groups,
    splits,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``grad_mean = -S^T u`` by the programs ``z = 0``; the others add the splits' parts of the root's gradient."""
    group = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    f_in = f < features
    square = groups * features * features
    if tl.program_id(2) == 0:
        total = tl.zeros((BLOCK_F,), dtype=tl.float32)
        for start in range(0, features, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_in = k < features
            u = tl.zeros((BLOCK_K,), dtype=tl.float32)
            for split in range(splits):
                u += tl.load(u_ptr + (split * groups + group) * features + k, mask=k_in, other=0.0)
            at = (group * features + k[:, None]) * features + f[None, :]
            s = tl.load(deconv_ptr + at, mask=k_in[:, None] & f_in[None, :], other=0.0)
            total += tl.sum(s * u[:, None], axis=0)
        tl.store(grad_mean_ptr + group * features + f, -total, mask=f_in)
    else:
        k = (tl.program_id(2) - 1) * BLOCK_K + tl.arange(0, BLOCK_K)
        at = (group * features + k[:, None]) * features + f[None, :]
        mask = (k < features)[:, None] & f_in[None, :]
        acc = tl.zeros((BLOCK_K, BLOCK_F), dtype=tl.float32)
        for split in range(splits):
            acc += tl.load(partial_ptr + split * square + at, mask=mask, other=0.0)
        tl.store(grad_deconv_ptr + at, acc, mask=mask)


# --------------------------------------------------------------------------------------------------------- launchers


class _Matrix(NamedTuple):
    """A weight's memory: ``(O, C/groups, taps)`` and the ``TAPS`` by which its columns are told apart."""

    tensor: Tensor
    strides: tuple[int, int, int]
    taps: int

    @classmethod
    def of(cls, weight: Tensor) -> _Matrix:
        """A view; a copy only where the kernel's axes cannot be one (neither contiguous nor channels innermost)."""
        flat = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(-1)
        so, sc, st = flat.stride()
        if sc == flat.shape[2] * st or flat.shape[1] == 1:
            return cls(flat, (so, st, 0), 1)
        return cls(flat, (so, sc, st), flat.shape[2])

    def arguments(self, letter: str) -> dict[str, int]:
        return {f"stride_{letter}{axis}": stride for axis, stride in zip("oct", self.strides, strict=True)}


def _sizes(weight: Tensor, geo: Geometry) -> dict[str, int]:
    """Rows of one group, features, vectors of a row; and where a vector's features are: column ``f*a + g*b``."""
    steps = (geo.pooled, 1) if geo.interleaved else (1, geo.features)
    return {
        "rows": weight.shape[0] // geo.groups * geo.pooled,
        "features": geo.features,
        "vectors": geo.pooled,
        "step_f": steps[0],
        "step_g": steps[1],
    }


def _side(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))


def _warps(outputs: int) -> int:
    """Three-pass products hold each operand twice: fewer warps would spill."""
    return max(1, min(4, outputs // 256))


def product_config(rows: int, features: int) -> Config:
    """Tiles of the product: no larger than the matrix, and 64 x 64 where that allows a warp group's instructions."""
    r, f, k = _side(rows, 64), _side(features, 64), _side(features, 32)
    return Config.of(_warps(r * f), 3 if features > k else 1, BLOCK_R=r, BLOCK_F=f, BLOCK_K=k)


def statistics_config(features: int) -> Config:
    side = _side(features, 64)
    return Config.of(_warps(side * side), 3, BLOCK_K=side, BLOCK_F=side, BLOCK_R=32)


_BIAS = Config.of(4, 1, BLOCK_O=16, BLOCK_G=32)
_FINISH = Config.of(4, 2, BLOCK_F=32, BLOCK_K=32)


def split_rows(rows: int, features: int, groups: int) -> tuple[int, int]:
    """Parts into which the product over rows is split, and rows of each. By shape alone: it decides the rounding."""
    tiles = triton.cdiv(features, 64) ** 2 * groups
    parts = max(1, min(_PROGRAMS // tiles, rows // _SPLIT_ROWS))
    size = triton.cdiv(triton.cdiv(rows, parts), 32) * 32
    return triton.cdiv(rows, size), size


def _takes(deconv: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels do it: float64, and a root or an output channel past counting, are torch_backend's."""
    fits = matrix_counted(deconv.shape[-1]) and counted(*(span(w[0]) for w in weights))
    return fits and deconv.dtype != torch.float64


def fold(weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """``W'_g = W_g S`` with its channels innermost, and ``b' = b - sum_g W'_g mu``, both in the statistics' dtype."""
    if not _takes(deconv, weight):
        return torch_backend.fold(weight, bias, mean, deconv, geo)
    mean, deconv = mean.contiguous(), deconv.contiguous()
    folded = channels_last_weight(weight, deconv.dtype)
    shift = deconv.new_empty(weight.shape[0])
    sizes = _sizes(weight, geo)
    config = product_config(sizes["rows"], geo.features)
    tiles = triton.cdiv(geo.features, config["BLOCK_F"])
    whole = geo.pooled if tiles == 1 and config["BLOCK_R"] % geo.pooled == 0 else 0
    partial = shift if whole else deconv.new_empty(tiles, weight.shape[0] * geo.pooled)
    bias = None if bias is None else bias.contiguous()
    _product(weight, folded, deconv, mean, sizes, config, geo, shift=partial, bias=bias, whole=whole)
    if not whole:
        launch(
            _fold_bias_kernel,
            (triton.cdiv(weight.shape[0], _BIAS["BLOCK_O"]),),
            config=_BIAS,
            device=weight.device,
            partial_ptr=partial,
            bias_ptr=shift if bias is None else bias,
            shift_ptr=shift,
            outs=weight.shape[0],
            vectors=geo.pooled,
            tiles=tiles,
            HAS_BIAS=bias is not None,
        )
    return folded, shift


def _product(
    a: Tensor,
    out: Tensor,
    deconv: Tensor,
    mean: Tensor,
    sizes: dict[str, int],
    config: Config,
    geo: Geometry,
    *,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    coefficient: Tensor | None = None,
    whole: int = 0,
) -> None:
    """Forward with ``shift`` to write; the gradient with the bias's as ``coefficient``."""
    source, target = _Matrix.of(a), _Matrix.of(out)
    gradient = coefficient is not None
    grid = (
        triton.cdiv(sizes["rows"], config["BLOCK_R"]),
        triton.cdiv(geo.features, config["BLOCK_F"]),
        geo.groups,
    )
    launch(
        _fold_product_kernel,
        grid,
        config=config,
        device=a.device,
        a_ptr=source.tensor,
        out_ptr=target.tensor,
        deconv_ptr=deconv,
        mean_ptr=mean,
        coefficient_ptr=mean if coefficient is None else coefficient,
        bias_ptr=mean if bias is None else bias,
        shift_ptr=mean if shift is None else shift,
        **sizes,
        **source.arguments("a"),
        **target.arguments("o"),
        stride_dk=1 if gradient else geo.features,
        stride_df=geo.features if gradient else 1,
        A_TAPS=source.taps,
        OUT_TAPS=target.taps,
        GRADIENT=gradient,
        HAS_BIAS=bias is not None,
        WHOLE=whole,
        INPUT_PRECISION=float32_products(a.device),
    )


def fold_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    deconv: Tensor,
    geo: Geometry,
    need_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the weight, and of the mean and the root (None unless needed), in the statistics' dtype."""
    if not _takes(deconv, weight, grad_weight):
        return torch_backend.fold_backward(grad_weight, grad_bias, weight, mean, deconv, geo, need_statistics)
    mean, deconv, grad_bias = mean.contiguous(), deconv.contiguous(), grad_bias.contiguous()
    unfolded = torch.empty_like(weight, dtype=deconv.dtype)
    if not _collapses(unfolded):
        unfolded = weight.new_empty(weight.shape, dtype=deconv.dtype)
    sizes = _sizes(weight, geo)
    config = product_config(sizes["rows"], geo.features)
    _product(grad_weight, unfolded, deconv, mean, sizes, config, geo, coefficient=grad_bias)
    if not need_statistics:
        return unfolded, None, None
    return unfolded, *_statistics(grad_weight, grad_bias, weight, mean, deconv, sizes, geo)


def _collapses(weight: Tensor) -> bool:
    """Whether the kernel's axes are one axis of its memory."""
    return weight.ndim <= 3 or weight.flatten(2).data_ptr() == weight.data_ptr()


def _statistics(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    deconv: Tensor,
    sizes: dict[str, int],
    geo: Geometry,
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean ``(b, D)`` and the root ``(b, D, D)``."""
    d = geo.features
    splits, per_split = split_rows(sizes["rows"], d, geo.groups)
    partial, u = deconv.new_empty(splits, geo.groups, d, d), deconv.new_empty(splits, geo.groups, d)
    w, grad = _Matrix.of(weight), _Matrix.of(grad_weight)
    config = statistics_config(d)
    launch(
        _fold_bwd_statistics_kernel,
        (triton.cdiv(d, config["BLOCK_K"]) * triton.cdiv(d, config["BLOCK_F"]), splits, geo.groups),
        config=config,
        device=weight.device,
        w_ptr=w.tensor,
        grad_ptr=grad.tensor,
        mean_ptr=mean,
        coefficient_ptr=grad_bias,
        out_ptr=partial,
        u_ptr=u,
        **sizes,
        **w.arguments("w"),
        **grad.arguments("g"),
        rows_per_split=per_split,
        groups=geo.groups,
        W_TAPS=w.taps,
        GRAD_TAPS=grad.taps,
        INPUT_PRECISION=float32_products(weight.device),
    )
    grad_mean = torch.empty_like(mean)
    grad_deconv = partial[0] if splits == 1 else torch.empty_like(deconv)
    launch(
        _fold_bwd_finish_kernel,
        (
            triton.cdiv(d, _FINISH["BLOCK_F"]),
            geo.groups,
            1 + (triton.cdiv(d, _FINISH["BLOCK_K"]) if splits > 1 else 0),
        ),
        config=_FINISH,
        device=weight.device,
        partial_ptr=partial,
        u_ptr=u,
        deconv_ptr=deconv,
        grad_deconv_ptr=grad_deconv,
        grad_mean_ptr=grad_mean,
        features=d,
        groups=geo.groups,
        splits=splits,
    )
    return grad_mean, grad_deconv
