"""Fourth stage: the convolution as an implicit matrix product, bias and optional ReLU in its epilogue.

A program owns a tile of (pixels, output channels); its loop runs over taps and channel blocks and reads the patches
straight from the input, zero where a tap falls outside. Positions, strides and taps come as numbers of up to three
axes, so that any layout is read in place, and so that the input's gradient is the same kernel over the output's
gradient (:mod:`tdeconv.kernels.convolve_backward`). The library's convolution stays a candidate: which is faster, only
a measurement on the device can say, and until there is one it is the library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdeconv import reference, torch_backend
from tdeconv.geometry import Geometry
from tdeconv.kernels import precision, tuning
from tdeconv.kernels.configs import Config, Limits, counted, legal, limits, span
from tdeconv.kernels.launch import interpreted, launch
from tdeconv.layout import memory_format

_AXES = 3
# Below this many channels of a group a tile of one tap would be mostly masked: taps and channels are one index then.
_NARROW = 16


@triton.jit
def _tile_of(pid, blocks_m, blocks_n, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Programs in bands of BAND tiles along M, so that those that run together share operands in the cache."""
    in_band = BAND * blocks_n
    first = pid // in_band * BAND
    height = tl.minimum(blocks_m - first, BAND)
    within = pid % in_band
    return first + within % height, within // height


@triton.jit
def _inside(p0, p1, p2, size_0, size_1, size_2):  # type: ignore[no-untyped-def]
    return (p0 >= 0) & (p0 < size_0) & (p1 >= 0) & (p1 < size_1) & (p2 >= 0) & (p2 < size_2)


@triton.jit
def _accumulate(a, b, acc, INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """WIDEN: the interpreter holds bfloat16 as integers and would multiply those; the product is the same."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def _convolve_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, y_ptr, rows, columns, inner, taps, out_0, out_1, out_2, size_0, size_1, size_2, taps_1,
    taps_2, first_0, first_1, first_2, step_0, step_1, step_2, apart_0, apart_1, apart_2, stride_xn, stride_xc,
    stride_x0, stride_x1, stride_x2, stride_wo, stride_wc, stride_w0, stride_w1, stride_w2, stride_yn, stride_yc,
    stride_y0, stride_y1, stride_y2, group_x, group_w, group_y,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, FLAT: tl.constexpr, WIDEN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y[n, q, o] = b[o] + sum_{tap, c} x[n, q*step + first + tap*apart, c] w[o, c, tap]`` per group.

    FLAT: the sum runs over one index (tap, c) instead of channel blocks of one tap at a time.
    """
    group = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), 8)
    m, o = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in, o_in = m < rows, o < columns
    q2 = m % out_2
    q1 = m // out_2 % out_1
    q0 = m // (out_2 * out_1) % out_0
    n = (m // (out_2 * out_1 * out_0)).to(tl.int64)
    i0, i1, i2 = q0 * step_0 + first_0, q1 * step_1 + first_1, q2 * step_2 + first_2
    x_row = x_ptr + group * group_x + n * stride_xn + (i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2)
    w_column = w_ptr + group * group_w + o * stride_wo
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FLAT:
        for start in range(0, taps * inner, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_in = k < taps * inner
            tap, c = k // inner, k % inner
            j0, j1, j2 = tap // (taps_1 * taps_2), tap // taps_2 % taps_1, tap % taps_2
            a0, a1, a2 = j0 * apart_0, j1 * apart_1, j2 * apart_2
            p0, p1, p2 = i0[:, None] + a0[None, :], i1[:, None] + a1[None, :], i2[:, None] + a2[None, :]
            inside = _inside(p0, p1, p2, size_0, size_1, size_2) & m_in[:, None] & k_in[None, :]
            x_at = a0 * stride_x0 + a1 * stride_x1 + a2 * stride_x2 + c * stride_xc
            w_at = j0 * stride_w0 + j1 * stride_w1 + j2 * stride_w2 + c * stride_wc
            x = tl.load(x_row[:, None] + x_at[None, :], mask=inside, other=0.0)
            w = tl.load(w_column[None, :] + w_at[:, None], mask=k_in[:, None] & o_in[None, :], other=0.0)
            acc = _accumulate(x, w, acc, INPUT_PRECISION, WIDEN)
    else:
        blocks_c = tl.cdiv(inner, BLOCK_K)
        for step in range(taps * blocks_c):
            tap = step // blocks_c
            c = (step % blocks_c) * BLOCK_K + tl.arange(0, BLOCK_K)
            c_in = c < inner
            j0, j1, j2 = tap // (taps_1 * taps_2), tap // taps_2 % taps_1, tap % taps_2
            a0, a1, a2 = j0 * apart_0, j1 * apart_1, j2 * apart_2
            inside = _inside(i0 + a0, i1 + a1, i2 + a2, size_0, size_1, size_2) & m_in
            x_at = a0 * stride_x0 + a1 * stride_x1 + a2 * stride_x2 + c * stride_xc
            w_at = j0 * stride_w0 + j1 * stride_w1 + j2 * stride_w2 + c * stride_wc
            x = tl.load(x_row[:, None] + x_at[None, :], mask=inside[:, None] & c_in[None, :], other=0.0)
            w = tl.load(w_column[None, :] + w_at[:, None], mask=c_in[:, None] & o_in[None, :], other=0.0)
            acc = _accumulate(x, w, acc, INPUT_PRECISION, WIDEN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + group * columns + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0)
    y_row = y_ptr + group * group_y + n * stride_yn + (q0 * stride_y0 + q1 * stride_y1 + q2 * stride_y2)
    mask = m_in[:, None] & o_in[None, :]
    tl.store(y_row[:, None] + o[None, :] * stride_yc, acc.to(y_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------- launchers


def three(x: Tensor) -> Tensor:
    """A view with three spatial axes, the missing ones of size 1 in front."""
    return x.reshape(*x.shape[:2], *(1,) * (_AXES + 2 - x.ndim), *x.shape[2:]) if x.ndim < _AXES + 2 else x


def axes(values: Sequence[int], missing: int) -> tuple[int, ...]:
    return (*(missing,) * (_AXES - len(values)), *values)


def strides(letter: str, tensor: Tensor, names: str = "nc012") -> dict[str, int]:
    return {f"stride_{letter}{name}": stride for name, stride in zip(names, tensor.stride(), strict=True)}


def numbers(name: str, values: Sequence[int]) -> dict[str, int]:
    return {f"{name}_{i}": v for i, v in enumerate(values)}


def input_precision(x: Tensor) -> str:
    """Half-precision products are exact in float32; float32's are rounded once, as cuDNN's are, unless strict."""
    if x.dtype != torch.float32:
        return "ieee"
    nvidia = x.device.type == "cuda" and torch.version.hip is None
    return "tf32" if nvidia and precision.policy() == "default" else precision.float32_products(x.device)


class Sizes(NamedTuple):
    """Of one group's product: pixels, output channels, input channels; kernel positions."""

    rows: int
    columns: int
    inner: int
    taps: int


# The library's convolution, among configurations.
LIBRARY = Config.of(1, 1, LIBRARY=1)


def exact(x: Tensor) -> bool:
    """Whether products are float32's, in three passes where matrix units take them."""
    return x.dtype == torch.float32 and input_precision(x) != "tf32"


def depth(itemsize: int, inner: int, taps: int) -> tuple[int, bool]:
    """BLOCK_K and FLAT: policy, because they decide in which order is summed. A gathered tile's every element has an
    address of its own, in registers."""
    flat = inner < _NARROW and taps > 1
    most = 64 // itemsize if flat else 128 // itemsize
    return min(most, max(16, triton.next_power_of_2(inner * (taps if flat else 1)))), flat


# Tiles of pixels and output channels, warps, stages of the pipeline.
_SHAPES = ((128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 4))
_LARGEST = (128, 256, 8, 3)
_EXACT_SHAPES = ((128, 64, 8, 3), (64, 64, 8, 3))  # operands are held in two parts
_FLAT_SHAPES = ((128, 64, 8, 2), (64, 32, 8, 2))
# Only where operands are read from shared memory do a tile's sums fill the registers without spilling.
_LARGE_SHARED = 200_000


@functools.lru_cache(maxsize=4096)
def candidates(sizes: Sizes, itemsize: int, within: Limits, exact: bool = False) -> tuple[Config, ...]:
    """Configurations that fit the device, the likeliest first; ``exact`` says that products take three passes."""
    block_k, flat = depth(itemsize, sizes.inner, sizes.taps)
    shapes = _FLAT_SHAPES if flat else _EXACT_SHAPES if exact else _SHAPES
    if itemsize == 2 and not flat and within.shared >= _LARGE_SHARED:
        shapes = (shapes[0], _LARGEST, *shapes[1:])
    return fitting(shapes, sizes.rows, sizes.columns, block_k, itemsize, within)


def configs(sizes: Sizes, x: Tensor) -> tuple[Config, ...]:
    """The same for tensors at hand."""
    return candidates(sizes, x.element_size(), limits(x.device), exact(x))


def fitting(
    shapes: Iterable[tuple[int, int, int, int]], rows: int, columns: int, block_k: int, itemsize: int, within: Limits
) -> tuple[Config, ...]:
    """Tiles cut down to the product's size, those that needed no cutting first, with as deep a pipeline as fits."""
    most_m, most_n = (max(16, triton.next_power_of_2(n)) for n in (rows, columns))
    found: dict[Config, None] = {}
    for m, n, warps, stages in sorted(shapes, key=lambda s: s[1] > most_n or s[0] > most_m):  # stable
        m, n = min(m, most_m), min(n, most_n)
        warps = max(1, min(warps, m * n // 256))
        for pipeline in range(stages, 0, -1):
            config = Config.of(warps, pipeline, BLOCK_M=m, BLOCK_N=n, BLOCK_K=block_k)
            if legal(config, within, staged=(m + n) * block_k * itemsize, held=m * n):
                found[config] = None
                break
    return tuple(found)


@dataclass(frozen=True)
class Product:
    """One launch: ``y[n, q, o] = sum x[n, q*step + first + tap*apart, c] w[o, c, tap]`` for tensors of three axes."""

    x: Tensor
    w: Tensor
    y: Tensor
    first: tuple[int, ...]
    step: tuple[int, ...]
    apart: tuple[int, ...]
    groups: int
    taps: int
    transposed: bool = False  # w is (groups * inner, columns, ...): the input's gradient

    def run(self, config: Config, bias: Tensor | None = None, relu: bool = False) -> None:
        x, w, y = self.x, self.w, self.y
        columns, inner = y.shape[1] // self.groups, x.shape[1] // self.groups
        rows = y.shape[0] * math.prod(y.shape[2:])
        tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
        launch(
            _convolve_kernel,
            (tiles, self.groups),
            config=config,
            device=x.device,
            x_ptr=x,
            w_ptr=w,
            bias_ptr=y if bias is None else bias,
            y_ptr=y,
            rows=rows,
            columns=columns,
            inner=inner,
            taps=self.taps,
            **numbers("out", y.shape[2:]),
            **numbers("size", x.shape[2:]),
            taps_1=w.shape[3],
            taps_2=w.shape[4],
            **numbers("first", self.first),
            **numbers("step", self.step),
            **numbers("apart", self.apart),
            **strides("x", x),
            **strides("w", w, "co012" if self.transposed else "oc012"),
            **strides("y", y),
            group_x=inner * x.stride(1),
            group_w=(inner if self.transposed else columns) * w.stride(0),
            group_y=columns * y.stride(1),
            HAS_BIAS=bias is not None,
            RELU=relu,
            FLAT=depth(x.element_size(), inner, self.taps)[1],
            WIDEN=interpreted(),
            INPUT_PRECISION=input_precision(x),
        )


# ------------------------------------------------------------------------------------------- the kernel or the library

_forced: str | None = None


@contextmanager
def use(way: str) -> Iterator[None]:
    """Within the block convolutions are done by ``"library"`` or ``"triton"``, measured or not."""
    global _forced
    before, _forced = _forced, way
    try:
        yield
    finally:
        _forced = before


def fits(x: Tensor, weight: Tensor, geo: Geometry, grad: Tensor | None = None) -> bool:
    """Whether the kernels can take it: pixels, and offsets within an image or the weight, are counted in 32 bits, and
    each phase of a stride is a launch. ``grad`` is the output's gradient, in backward."""
    if not geo.kernel_size or x.numel() == 0 or x.dtype == torch.float64:
        return False
    y = out_shape(x, weight, geo)
    pixels = [shape[0] * math.prod(shape[2:]) for shape in (x.shape, y)]
    # the output and the input's gradient are dense, the others lie as they are given; half, for offsets in the padding
    dense = [x.shape[1:].numel(), math.prod(y[1:]), weight.numel()]
    given = [span(t[0]) for t in (x, grad) if t is not None] + [span(weight)]
    return counted(*pixels, *(2 * n for n in dense + given)) and math.prod(geo.stride) <= 16


def choices(own: Sequence[Config]) -> Sequence[Config]:
    """What may be chosen; first, what is done where nothing was measured."""
    if _forced == "library":
        return (LIBRARY,)
    return own if _forced else (LIBRARY, *own)


def size_key(sizes: Sizes, x: Tensor, geo: Geometry) -> str:
    """What the speed depends on."""
    return tuning.key(
        **sizes._asdict(),
        groups=geo.groups,
        stride=math.prod(geo.stride),
        dilation=math.prod(geo.dilation),
        channels_last=x.stride(1) == 1,
        dtype=str(x.dtype).removeprefix("torch."),
    )


def out_shape(x: Tensor, weight: Tensor, geo: Geometry) -> tuple[int, ...]:
    return x.shape[0], weight.shape[0], *geo.every().positions(tuple(x.shape[2:]))


def forward_sizes(x: Tensor, weight: Tensor, geo: Geometry) -> Sizes:
    n, o, *positions = out_shape(x, weight, geo)
    return Sizes(n * math.prod(positions), o // geo.groups, weight.shape[1], geo.taps)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, geo: Geometry) -> Tensor:
    """``y (N, O, *positions)`` in the input's dtype and memory format."""
    if not fits(x, weight, geo):
        return _by_library(x, weight, bias, geo)
    sizes = forward_sizes(x, weight, geo)
    y: list[Tensor] = []

    def run(config: Config) -> None:
        way = _by_library if config == LIBRARY else functools.partial(by_kernel, config=config)
        y[:] = [way(x, weight, bias, geo)]

    tuning.run_best("convolve", size_key(sizes, x, geo), choices(configs(sizes, x)), run, x.device)
    return y[0]


def _by_library(x: Tensor, weight: Tensor, bias: Tensor, geo: Geometry) -> Tensor:
    if x.dtype == torch.float64:
        return torch_backend.convolve(x, weight, bias, geo)
    return reference.convolve(x, weight.contiguous(memory_format=memory_format(x)), bias, geo)


def by_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geo: Geometry,
    *,
    config: Config | None = None,
    relu: bool = False,
) -> Tensor:
    """The kernel's convolution; with ``relu``, of what follows it too."""
    y = torch.empty(out_shape(x, weight, geo), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    product = Product(
        three(x),
        three(weight.to(x.dtype)),
        three(y),
        first=tuple(-p for p in axes(geo.padding, 0)),
        step=axes(geo.stride, 1),
        apart=axes(geo.dilation, 1),
        groups=geo.groups,
        taps=geo.taps,
    )
    if config is None:
        config = configs(forward_sizes(x, weight, geo), x)[0]
    product.run(config, None if bias is None else bias.contiguous(), relu)
    return y
