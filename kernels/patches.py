"""Where patches lie in memory: rows and columns of the patch matrix as offsets into the input, read in place.

The matrix of a stage has one row per sample (and per vector of a sample, where a vector is a fixed distance away), and
one column per feature. A row's offset is a few divisions, a column's is read from a small table, and an element's is
their sum. Columns come in the order *tap, channel*, so that neighbours in a channels-last input stay neighbours;
``home`` says which feature a column is. Small covariances (depthwise) share a tile: a *pack* of groups is one matrix.

Interleaved vectors of a larger kernel mix taps: feature ``f`` of vector ``v`` is column ``f*G + v``, and no distance is
fixed. There the columns stay in the features' order and every vector has a table of its own (``loops`` tables).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.kernels.configs import counted, matrix_counted

TILE = 64  # columns of the largest tile
WORKSPACE = 32 << 20  # bytes of patches written out at a time: they stay in a large GPU's second-level cache


@dataclass(frozen=True)
class Columns:
    """The matrix's columns: ``packs`` matrices of ``width`` columns, ``run`` of them the channels of one tap."""

    channels: int
    kernel_size: tuple[int, int, int]
    dilation: tuple[int, int, int]
    groups: int
    block: int
    vectors: int  # G
    interleaved: bool

    @property
    def taps(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def features(self) -> int:
        return self.block * self.taps

    @property
    def scattered(self) -> bool:
        """Interleaved vectors that mix taps."""
        return self.interleaved and self.vectors > 1 and self.taps > 1

    @property
    def loops(self) -> int:
        return self.vectors if self.scattered else 1

    @property
    def groups_per_pack(self) -> int:
        return min(self.groups, max(1, TILE // self.features))

    @property
    def packs(self) -> int:
        return -(-self.groups // self.groups_per_pack)

    @property
    def run(self) -> int:
        return self.block * self.groups_per_pack

    @property
    def width(self) -> int:
        return self.run * self.taps

    @property
    def tile(self) -> int:
        """Columns of a tile: a power of two from 16 (the least a product takes) to 64."""
        return min(TILE, max(16, triton.next_power_of_2(self.width)))

    @property
    def tiles(self) -> int:
        return -(-self.width // self.tile)

    @property
    def padded(self) -> int:
        """``width`` as the tables have it: whole tiles."""
        return self.tiles * self.tile

    @property
    def runs(self) -> bool:
        """Whether every tile is channels of one tap."""
        whole = self.groups % self.groups_per_pack == 0
        return not self.scattered and whole and (self.taps == 1 or self.run % self.tile == 0)

    @property
    def direct(self) -> bool:
        """Whether to read the input in place every time: each element is wanted by one tile, or is cheap to find."""
        return self.runs or self.tiles == 1

    def steps(self, stride_c: int) -> tuple[int, int]:
        """Distances from channel to channel of a vector, and from vector to vector (where rows count them)."""
        if self.scattered or self.vectors == 1:
            return stride_c, 0
        return (self.vectors * stride_c, stride_c) if self.interleaved else (stride_c, self.block * stride_c)


def _three(axes: tuple[int, ...], fill: int) -> tuple[int, int, int]:
    padded = (*(fill,) * (3 - len(axes)), *axes)
    return padded[0], padded[1], padded[2]


def columns_of(geo: Geometry) -> Columns:
    return Columns(
        geo.channels,
        _three(geo.kernel_size, 1),
        _three(geo.dilation, 1),
        geo.groups,
        geo.block,
        geo.pooled,
        geo.interleaved,
    )


@functools.lru_cache(maxsize=512)
def _features(cols: Columns, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Channel and tap of every column ``(packs*loops, padded)``, and its home ``(packs, padded)``: covariance and
    feature as one number ``covariance*D + feature``; -1 for none.
    """
    f = torch.arange(cols.padded, device=device)
    table = torch.arange(cols.packs * cols.loops, device=device).unsqueeze(1)
    if cols.scattered:
        column = f * cols.vectors + table
        channel, tap, home = column // cols.taps, column % cols.taps, f.unsqueeze(0)
        live = (f < cols.width).expand_as(channel)
    else:
        tap, within = (f // cols.run).expand(cols.packs, -1), f % cols.run
        group = table * cols.groups_per_pack + within // cols.block
        home = (group * cols.block + within % cols.block) * cols.taps + tap
        channel = table * cols.run + within
        live = (f < cols.width) & (group < cols.groups)
    channel = torch.where(live, channel, -1)
    return channel, tap, torch.where(live[: cols.packs], home, -1).int().contiguous()


@functools.lru_cache(maxsize=512)
def _tables(
    cols: Columns, stride_c: int, strides: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets ``(packs*loops, padded)``, -1 where there is no column; displacements ``(3, packs*loops, padded)``; home.

    Made on the device: nothing is copied to it. They are kept, so a CUDA graph may be captured after a first run.
    """
    channel, tap, home = _features(cols, device)
    step = cols.steps(stride_c)[0]
    k, d = cols.kernel_size, cols.dilation
    disp = torch.stack([tap // (k[1] * k[2]) * d[0], tap // k[2] % k[1] * d[1], tap % k[2] * d[2]])
    offset = channel * step
    for moved, stride in zip(disp, strides, strict=True):
        offset = offset + moved * stride
    return torch.where(channel >= 0, offset, -1).contiguous(), disp.int().contiguous(), home


@dataclass(frozen=True)
class Source:
    """A matrix in memory, as arguments of a kernel."""

    cols: Columns
    rows: int  # of one pass; a scattered layout's tables make ``loops`` passes
    loops: int
    pixels: int  # of the input, or more: that many are counted
    home: Tensor
    geometry: dict[str, Any]  # rows -> positions, the same for every tensor of this shape
    places: tuple[dict[str, Any], ...]  # each tensor's offsets and strides: names that lack the tensor's letter
    flags: dict[str, Any]

    @property
    def count(self) -> int:
        """Vectors that share a covariance."""
        return self.rows * self.loops

    @property
    def fits(self) -> bool:
        """Whether rows, pixels and the covariance's elements can be counted in 32 bits; the input's are in 64."""
        return counted(self.count, self.pixels) and matrix_counted(self.cols.features)

    @property
    def contiguous(self) -> bool:
        """Whether a tile's columns are neighbours in memory."""
        return bool(self.flags["RUNS"]) and not self.places[0]["{1}_ROWS_FAST"]

    @property
    def tables(self) -> int:
        return self.cols.packs * self.loops

    @property
    def sizes(self) -> dict[str, int]:
        """Of the tables."""
        cols = self.cols
        return {"width": cols.width, "padded": cols.padded, "plane": self.tables * cols.padded}

    def place(self, number: int, letter: str) -> dict[str, Any]:
        """Arguments of one tensor, its letter put in: ``stride_xn``, ``x_off_ptr``."""
        return {name.format(letter, letter.upper()): value for name, value in self.places[number].items()}


def _merged(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> tuple[list[int], list[list[int]]]:
    """Neighbouring axes that are evenly spaced in every tensor, as one."""
    sizes, steps = [shape[0]], [[s[0]] for s in strides]
    for axis in range(1, len(shape)):
        if all(mine[-1] == s[axis] * shape[axis] for mine, s in zip(steps, strides, strict=True)):
            sizes[-1] *= shape[axis]
            for mine, s in zip(steps, strides, strict=True):
                mine[-1] = s[axis]
        else:
            sizes.append(shape[axis])
            for mine, s in zip(steps, strides, strict=True):
                mine.append(s[axis])
    return sizes, steps


def source(geo: Geometry, *tensors: Tensor) -> Source:
    """The patches of one tensor ``(N, C, *spatial)``, or of several of the same shape."""
    first = tensors[0]
    return _source(geo, tuple(first.shape), tuple(t.stride() for t in tensors), first.device)


@functools.lru_cache(maxsize=512)
def _source(
    geo: Geometry, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], device: torch.device
) -> Source:
    cols = columns_of(geo)
    axes, moved = (shape[0], *shape[2:]), tuple((s[0], *s[2:]) for s in strides)
    if geo.pointwise:
        # pixels in N, H, W order: every axis is walked by the one flat stride
        sizes, steps = _merged(axes, moved)
        spatial = tuple(sizes[1:])
        positions, step, pad, flat = spatial, (1,) * len(spatial), (0,) * len(spatial), geo.flat_stride
        samples = -(-math.prod(sizes) // flat)
    else:
        spatial, steps = tuple(axes[1:]), [list(s) for s in moved]
        positions, step, pad, flat = geo.positions(spatial), geo.sample_stride, geo.padding, 1
        samples = axes[0] * math.prod(positions)
    pixels = max(samples * flat, math.prod(axes))
    vectors = 1 if cols.scattered else cols.vectors
    named = {"pos": (positions, 1), "step": (step, 1), "pad": (pad, 0), "size": (spatial, 1)}
    geometry = {f"{name}{i}": v for name, (axis, fill) in named.items() for i, v in enumerate(_three(axis, fill))}
    places = tuple(
        _place(cols, s[1], n_and_axes[0], _three(tuple(n_and_axes[1:]), 0), device)
        for s, n_and_axes in zip(strides, steps, strict=True)
    )
    home = _features(cols, device)[2]
    flags = {"RANK": len(spatial), "CHECK": any(pad), "RUNS": cols.runs}
    geometry |= {"vectors": vectors, "flat": flat}
    return Source(cols, samples * vectors, cols.loops, pixels, home, geometry, places, flags)


def _place(
    cols: Columns, stride_c: int, stride_n: int, axes: tuple[int, int, int], device: torch.device
) -> dict[str, Any]:
    off, disp, _ = _tables(cols, stride_c, axes, device)
    step_f, step_g = cols.steps(stride_c)
    strides = {"stride_{0}n": stride_n, "stride_{0}g": step_g} | {f"stride_{{0}}{i}": v for i, v in enumerate(axes)}
    return {
        "{0}_off_ptr": off,
        "{0}_disp_ptr": disp,
        **strides,
        "stride_{0}f": step_f,
        "{1}_ALIGNED": cols.runs and all(v % 16 == 0 for v in (*strides.values(), cols.run * stride_c)),
        "{1}_ROWS_FAST": step_f != 1,
    }


def dense(like: Source) -> Source:
    """The same matrix written out: ``(packs, rows*loops, width)``, in the order of its columns."""
    return _dense(like.cols, like.count, like.home.device)


@functools.lru_cache(maxsize=512)
def _dense(cols: Columns, count: int, device: torch.device) -> Source:
    f = torch.arange(cols.padded, device=device)
    pack = torch.arange(cols.packs, device=device).unsqueeze(1)
    home = _features(cols, device)[2]
    off = torch.where(home >= 0, pack * count * cols.width + f, -1).contiguous()
    disp = torch.zeros((3, *off.shape), dtype=torch.int32, device=device)
    runs = cols.groups % cols.groups_per_pack == 0
    place = {"{0}_off_ptr": off, "{0}_disp_ptr": disp, "stride_{0}n": cols.width, "stride_{0}g": 0, "stride_{0}f": 1}
    place |= {f"stride_{{0}}{i}": 0 for i in range(3)}
    place |= {"{1}_ALIGNED": runs and cols.width % 16 == 0, "{1}_ROWS_FAST": False}
    # the rows of a linear layer; columns of the last tile that are none are those beyond the width
    flags = {"RANK": 0, "CHECK": False, "RUNS": runs}
    ones = {f"{name}{i}": int(name != "pad") for name in ("pos", "step", "pad", "size") for i in range(3)}
    return Source(cols, count, 1, count, home, ones | {"vectors": 1, "flat": 1}, (place,), flags)


def overlapping(geo: Geometry, shape: tuple[int, ...]) -> bool:
    """Whether two sampled patches share a pixel."""
    if geo.pointwise:
        return False
    axes = zip(geo.kernel_size, geo.dilation, geo.sample_stride, geo.positions(tuple(shape[2:])), strict=True)
    return any(k * d % s == 0 and k * d // s < p for n, d, s, p in axes for k in range(1, n))


def image_parts(like: Source, images: int, itemsize: int) -> int:
    """Images whose patches fit the workspace, at least one."""
    if not images:
        return 1
    per_image = -(-like.count // images) * like.cols.packs * like.cols.width * itemsize
    return max(1, min(images, WORKSPACE // max(1, per_image)))
