"""Patches of a channels-last view ``pixels (N, *spatial, C)``: gathered tap by tap, a few images at a time.

A part is a few images; where the kernel is pointwise, a few of the sampled pixels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.precision import statistics_dtype
from tdeconv.torch_backend.chunks import chunk_rows

Slices = tuple[slice, ...]


def _reach(size: int, positions: int, offset: int, stride: int) -> tuple[slice, slice]:
    """The positions p with ``0 <= p*stride + offset < size``, and the pixels they read, along one axis."""
    first = max(0, -(offset // stride))
    last = min(positions - 1, (size - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)


class Tap(NamedTuple):
    """A kernel position that meets the input: its number, the positions at which it does, the pixels it reads there."""

    number: int
    at: Slices
    reads: Slices


@functools.lru_cache(maxsize=1024)
def _taps(geo: Geometry, spatial: tuple[int, ...]) -> tuple[Tap, ...]:
    axes = zip(
        spatial, geo.positions(spatial), geo.sample_stride, geo.kernel_size, geo.dilation, geo.padding, strict=True
    )
    reaches = [[_reach(n, m, i * d - p, s) for i in range(k)] for n, m, s, k, d, p in axes]
    every = slice(None)
    return tuple(
        Tap(number, (every, *(at for at, _ in per_axis)), (every, *(reads for _, reads in per_axis)))
        for number, per_axis in enumerate(itertools.product(*reaches))
        if all(at.stop > at.start for at, _ in per_axis)
    )


def taps(pixels: Tensor, geo: Geometry) -> tuple[Tap, ...]:
    """The kernel positions that meet the input somewhere; one that meets only padding is left out."""
    return _taps(geo, tuple(pixels.shape[1:-1]))


def count(pixels: Tensor, geo: Geometry) -> int:
    """The number M of sampled patches."""
    if geo.pointwise:
        return -(-math.prod(pixels.shape[:-1]) // geo.flat_stride)
    return pixels.shape[0] * math.prod(geo.positions(tuple(pixels.shape[1:-1])))


def parts(pixels: Tensor, geo: Geometry) -> tuple[Tensor, ...]:
    """Pieces of ``pixels`` whose patches fit the cache: views, or of a pointwise kernel's samples a copy's."""
    if geo.pointwise:
        return _samples(pixels, geo).split(chunk_rows(geo.channels, pixels.device))
    width = math.prod(geo.positions(tuple(pixels.shape[1:-1]))) * geo.taps * geo.channels
    return pixels.split(chunk_rows(width, pixels.device))


def _samples(pixels: Tensor, geo: Geometry) -> Tensor:
    """A pointwise kernel's sampled pixels ``(M, C)``, in the order of :func:`_runs`: a view if they are all pixels."""
    if pixels.is_contiguous() and geo.flat_stride == 1:
        return pixels.view(-1, geo.channels)
    rows = pixels.new_empty(count(pixels, geo), geo.channels)
    for at, images in _runs(pixels, geo):
        rows[at].view(images.shape).copy_(images)
    return rows


def add_samples_(pixels: Tensor, rows: Tensor, geo: Geometry) -> None:
    """Adjoint of taking a pointwise kernel's samples: add the rows ``(M, C)`` to the pixels they came from."""
    for at, images in _runs(pixels, geo):
        images += rows[at].view(images.shape)


def _runs(pixels: Tensor, geo: Geometry) -> Iterator[tuple[slice, Tensor]]:
    """Views ``(images, samples, C)`` of the sampled pixels, each with its place among the ``M`` rows.

    One stride picks samples from all images' pixels laid end to end: so images that lie alike to it have one view.
    """
    n, size, stride = pixels.shape[0], math.prod(pixels.shape[1:-1]), geo.flat_stride
    flat = pixels.view(n, size, geo.channels)
    period = stride // math.gcd(size, stride)
    begin = 0
    for first in range(min(period, n)):
        images = flat[first::period, -first * size % stride :: stride]
        end = begin + images.shape[0] * images.shape[1]
        yield slice(begin, end), images
        begin = end


def gather(part: Tensor, geo: Geometry) -> Tensor:
    """A part's patches ``(M, taps, C)`` in the statistics' dtype."""
    dtype = statistics_dtype(part.dtype)
    if geo.pointwise:
        return part.to(dtype).unsqueeze(1)
    positions = geo.positions(tuple(part.shape[1:-1]))
    part = part.contiguous()
    rows = part.new_zeros((part.shape[0], *positions, geo.taps, geo.channels), dtype=dtype)
    for tap, at, reads in taps(part, geo):
        rows[at][..., tap, :] = part[reads]
    return rows.view(-1, geo.taps, geo.channels)


def scatter_add_(part: Tensor, rows: Tensor, geo: Geometry) -> None:
    """Adjoint of :func:`gather`, unless the kernel is pointwise. One tap's pixels never overlap, so the sum is the same
    every time."""
    rows = rows.view(part.shape[0], *geo.positions(tuple(part.shape[1:-1])), geo.taps, geo.channels)
    target = part.contiguous()
    for tap, at, reads in taps(part, geo):
        target[reads].add_(rows[at][..., tap, :])
    if target is not part:
        part.copy_(target)
