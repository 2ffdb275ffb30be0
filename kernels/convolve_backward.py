"""The convolution's gradients: the input's by the forward kernel, the weight's and the bias's by one of their own.

The input's gradient at pixels ``i = phase (mod stride)`` is a convolution of stride 1 over the output's gradient with
those taps that reach them, evenly spaced as well: one launch per phase, no tap wasted. The weight's gradient is a
product over all pixels, split into parts that a second kernel adds in fixed order.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdeconv import torch_backend
from tdeconv.geometry import Geometry
from tdeconv.kernels import tuning
from tdeconv.kernels.configs import Config, Limits, limits
from tdeconv.kernels.convolve import (
    _NARROW,
    LIBRARY,
    Product,
    Sizes,
    _accumulate,
    _inside,
    axes,
    choices,
    configs,
    exact,
    fits,
    fitting,
    forward_sizes,
    input_precision,
    numbers,
    size_key,
    strides,
    three,
)
from tdeconv.kernels.launch import interpreted, launch
from tdeconv.layout import memory_format

# Programs wanted of the product over pixels, and pixels that pay for one.
_PROGRAMS = 512
_SPLIT_ROWS = 512


@triton.jit
def _convolve_bwd_weight_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, out_ptr, rows, columns, inner, taps, out_0, out_1, out_2, size_0, size_1, size_2, taps_1,
    taps_2, first_0, first_1, first_2, step_0, step_1, step_2, apart_0, apart_1, apart_2, stride_gn, stride_gc,
    stride_g0, stride_g1, stride_g2, stride_xn, stride_xc, stride_x0, stride_x1, stride_x2, group_g, group_x,
    rows_per_split, part_size, bias_at,
    FLAT: tl.constexpr, WIDEN: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A split's ``sum_{n, q} grad[n, q, o] x[n, q*step + first + tap*apart, c]`` as ``(O, tap, c)``, and its bias's."""
    split, group = tl.program_id(1), tl.program_id(2)
    blocks_c = tl.cdiv(inner, BLOCK_N)
    blocks_n = tl.cdiv(taps * inner, BLOCK_N) if FLAT else taps * blocks_c
    tile_m, tile_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    o = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_in = o < columns
    if FLAT:
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tap, c = column // inner, column % inner
        column_in = column < taps * inner
        j0, j1, j2 = tap // (taps_1 * taps_2), tap // taps_2 % taps_1, tap % taps_2
        a0, a1, a2 = (j0 * apart_0)[None, :], (j1 * apart_1)[None, :], (j2 * apart_2)[None, :]
    else:
        tap = tile_n // blocks_c
        c = (tile_n % blocks_c) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tap * inner + c
        column_in = c < inner
        j0, j1, j2 = tap // (taps_1 * taps_2), tap // taps_2 % taps_1, tap % taps_2
        a0, a1, a2 = j0 * apart_0, j1 * apart_1, j2 * apart_2
    grad_ptr += group.to(tl.int64) * group_g
    x_ptr += group.to(tl.int64) * group_x
    x_at = a0 * stride_x0 + a1 * stride_x1 + a2 * stride_x2 + (c * stride_xc)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    bias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows)
    for start in range(begin, end, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        m_in = m < end
        q2 = m % out_2
        q1 = m // out_2 % out_1
        q0 = m // (out_2 * out_1) % out_0
        n = (m // (out_2 * out_1 * out_0)).to(tl.int64)
        i0, i1, i2 = q0 * step_0 + first_0, q1 * step_1 + first_1, q2 * step_2 + first_2
        grad_row = grad_ptr + n * stride_gn + (q0 * stride_g0 + q1 * stride_g1 + q2 * stride_g2)
        x_row = x_ptr + n * stride_xn + (i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2)
        inside = _inside(i0[:, None] + a0, i1[:, None] + a1, i2[:, None] + a2, size_0, size_1, size_2)
        inside = inside & m_in[:, None] & column_in[None, :]
        grad = tl.load(grad_row[:, None] + o[None, :] * stride_gc, mask=m_in[:, None] & o_in[None, :], other=0.0)
        x = tl.load(x_row[:, None] + x_at, mask=inside, other=0.0)
        acc = _accumulate(tl.trans(grad), x, acc, INPUT_PRECISION, WIDEN)
        if tile_n == 0:
            bias += tl.sum(grad.to(tl.float32), axis=0)
    out_ptr += split.to(tl.int64) * part_size
    o += group * columns
    at = o[:, None].to(tl.int64) * (taps * inner) + column[None, :]
    tl.store(out_ptr + at, acc, mask=o_in[:, None] & column_in[None, :])
    if tile_n == 0:
        tl.store(out_ptr + bias_at + o, bias, mask=o_in)


@triton.jit
def _add_parts_kernel(parts_ptr, out_ptr, size, parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``out = parts[0] + parts[1] + ...``, in that order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(parts_ptr + at, mask=mask, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + at, total, mask=mask)


# --------------------------------------------------------------------------------------------------------- launchers

_ADD = Config.of(4, 1, BLOCK=1024)


class _Reach(NamedTuple):
    """Along one axis: the taps that reach a phase's pixels, how many, from which outputs ``q + first + j*apart``."""

    taps: slice
    used: int
    first: int
    apart: int


def _reach(phase: int, kernel: int, stride: int, padding: int, dilation: int) -> _Reach:
    every = stride // math.gcd(stride, dilation)
    start = next((t for t in range(min(every, kernel)) if (phase + padding - t * dilation) % stride == 0), None)
    if start is None:
        return _Reach(slice(0, 1), 0, 0, 0)
    count = -(-(kernel - start) // every)
    first = (phase + padding - start * dilation) // stride
    return _Reach(slice(start, None, every), count, first, -every * dilation // stride)


def input_gradients(grad: Tensor, weight: Tensor, grad_x: Tensor, geo: Geometry) -> list[Product]:
    """The launches, one per phase of the stride, that write all of ``grad_x``."""
    grad, weight, grad_x = three(grad), three(weight), three(grad_x)
    kernel, stride, padding, dilation = (
        axes(values, missing)
        for values, missing in ((geo.kernel_size, 1), (geo.stride, 1), (geo.padding, 0), (geo.dilation, 1))
    )
    products = []
    for phase in itertools.product(*(range(min(s, n)) for s, n in zip(stride, grad_x.shape[2:], strict=True))):
        reach = [_reach(*axis) for axis in zip(phase, kernel, stride, padding, dilation, strict=True)]
        pixels: Any = (..., *(slice(p, None, s) for p, s in zip(phase, stride, strict=True)))
        taps: Any = (..., *(r.taps for r in reach))
        products.append(
            Product(
                grad,
                weight[taps],
                grad_x[pixels],
                first=tuple(r.first for r in reach),
                step=(1, 1, 1),
                apart=tuple(r.apart for r in reach),
                groups=geo.groups,
                taps=math.prod(r.used for r in reach),
                transposed=True,
            )
        )
    return products


def input_sizes(x: Tensor, weight: Tensor, geo: Geometry) -> Sizes:
    """Of the largest phase."""
    axis = zip(x.shape[2:], geo.kernel_size, geo.stride, geo.dilation, strict=True)
    largest = [(triton.cdiv(n, s), triton.cdiv(k, s // math.gcd(s, d))) for n, k, s, d in axis]
    rows, taps = x.shape[0] * math.prod(n for n, _ in largest), math.prod(k for _, k in largest)
    return Sizes(rows, weight.shape[1], weight.shape[0] // geo.groups, taps)


# Tiles of output channels and columns, warps, stages of the pipeline.
_SHAPES = ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 4))
_EXACT_SHAPES = ((64, 128, 8, 3), (64, 64, 4, 3))  # operands are held in two parts
_NARROW_SHAPES = ((64, 64, 8, 2),)


@functools.lru_cache(maxsize=4096)
def weight_candidates(sizes: Sizes, itemsize: int, within: Limits, exact: bool = False) -> tuple[Config, ...]:
    """Configurations that fit the device, the likeliest first. The pixels of a step are policy: they are summed."""
    shapes = _NARROW_SHAPES if sizes.inner < _NARROW else _EXACT_SHAPES if exact else _SHAPES
    width = sizes.inner * sizes.taps if _flat(sizes, 64) else sizes.inner
    return fitting(shapes, sizes.columns, width, 128 // itemsize, itemsize, within)


def _weight_configs(sizes: Sizes, x: Tensor) -> tuple[Config, ...]:
    """The same for tensors at hand."""
    return weight_candidates(sizes, x.element_size(), limits(x.device), exact(x))


def _flat(sizes: Sizes, block_n: int) -> bool:
    """Whether a tile's columns run over (tap, channel): a tile of one tap would be mostly masked."""
    return sizes.taps > 1 and sizes.inner % block_n != 0


def split_pixels(sizes: Sizes, groups: int) -> tuple[int, int]:
    """Parts of the product over pixels, and pixels of each. By shape alone: it decides the rounding."""
    rows = sizes.rows
    tiles = triton.cdiv(sizes.columns, 64) * triton.cdiv(sizes.inner * sizes.taps, 64) * groups
    parts = max(1, min(triton.cdiv(_PROGRAMS, tiles), rows // _SPLIT_ROWS))
    size = triton.cdiv(triton.cdiv(rows, parts), 64) * 64
    return triton.cdiv(rows, size), size


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, channels innermost, and the bias, in float32."""
    sizes = forward_sizes(x, weight, geo)
    config = config or _weight_configs(sizes, x)[0]
    flat = _flat(sizes, config["BLOCK_N"])
    splits, per_split = split_pixels(sizes, geo.groups)
    size = weight.numel() + weight.shape[0]
    parts = x.new_empty((splits, size), dtype=torch.float32)
    tiles_n = triton.cdiv(sizes.inner * (sizes.taps if flat else 1), config["BLOCK_N"]) * (1 if flat else sizes.taps)
    grad3, x3, kernel = three(grad), three(x), axes(geo.kernel_size, 1)
    launch(
        _convolve_bwd_weight_kernel,
        (triton.cdiv(sizes.columns, config["BLOCK_M"]) * tiles_n, splits, geo.groups),
        config=config,
        device=x.device,
        grad_ptr=grad3,
        x_ptr=x3,
        out_ptr=parts,
        **sizes._asdict(),
        **numbers("out", grad3.shape[2:]),
        **numbers("size", x3.shape[2:]),
        taps_1=kernel[1],
        taps_2=kernel[2],
        **numbers("first", [-p for p in axes(geo.padding, 0)]),
        **numbers("step", axes(geo.stride, 1)),
        **numbers("apart", axes(geo.dilation, 1)),
        **strides("g", grad3),
        **strides("x", x3),
        group_g=sizes.columns * grad3.stride(1),
        group_x=sizes.inner * x3.stride(1),
        rows_per_split=per_split,
        part_size=size,
        bias_at=weight.numel(),
        FLAT=flat,
        WIDEN=interpreted(),
        INPUT_PRECISION=input_precision(x),
    )
    total = _added(parts)
    by_tap = total[: weight.numel()].view(weight.shape[0], *geo.kernel_size, sizes.inner)
    return by_tap.movedim(-1, 1), total[weight.numel() :]


def _added(parts: Tensor) -> Tensor:
    """The sum over the first axis of ``(parts, size)``, in order."""
    count, size = parts.shape
    if count == 1:
        return parts[0]
    total = parts.new_empty(size)
    grid = (triton.cdiv(size, _ADD["BLOCK"]),)
    where = {"parts_ptr": parts, "out_ptr": total, "size": size, "parts": count}
    launch(_add_parts_kernel, grid, config=_ADD, device=parts.device, **where)
    return total


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry, config: Config | None = None) -> Tensor:
    """The input's gradient, in its dtype and memory format."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    config = config or configs(input_sizes(x, weight, geo), x)[0]
    for product in input_gradients(grad, weight.to(x.dtype), grad_x, geo):
        product.run(config)
    return grad_x


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the input (None unless needed), the folded weight and the folded bias."""
    by_library = torch_backend.convolve_backward
    if not fits(x, weight, geo, grad):
        return by_library(grad, x, weight, geo, need_x)
    grad_x: list[Tensor | None] = [None]
    grads: list[Tensor] = []

    def run_input(config: Config) -> None:
        library = config == LIBRARY
        grad_x[:] = [_library(grad, x, weight, geo)[0] if library else input_gradient(grad, x, weight, geo, config)]

    def run_weight(config: Config) -> None:
        library = config == LIBRARY
        grads[:] = (
            by_library(grad, x, weight, geo, False)[1:] if library else weight_gradient(grad, x, weight, geo, config)
        )

    if need_x:
        sizes = input_sizes(x, weight, geo)
        options = choices(configs(sizes, x))
        tuning.run_best("convolve_bwd_input", size_key(sizes, x, geo), options, run_input, x.device)
    sizes = forward_sizes(x, weight, geo)
    options = choices(_weight_configs(sizes, x))
    tuning.run_best("convolve_bwd_weight", size_key(sizes, x, geo), options, run_weight, x.device)
    return grad_x[0], grads[0], grads[1]


def _library(grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry) -> tuple[Tensor, ...]:
    """The library's gradient of the input alone."""
    weight = weight.contiguous(memory_format=memory_format(x))
    zeros = [0] * len(geo.stride)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, geo.stride, geo.padding, geo.dilation, False, zeros, geo.groups, [True, False, False]
    )
