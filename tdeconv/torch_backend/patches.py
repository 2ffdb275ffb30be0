"""Patches of a channels-last view ``pixels (N, *spatial, C)``: gathered tap by tap, a part of them at a time.

A part is a few images; of an image that is too large for the cache, a few rows of positions, or a piece of one row.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
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


class Part(NamedTuple):
    """Some of the patches: those at ``positions`` along each axis of all these images, the first of which begins
    ``before`` pixels outside."""

    pixels: Tensor
    positions: tuple[int, ...]
    before: tuple[int, ...]


class Tap(NamedTuple):
    """A kernel position that meets the input: its number, the positions at which it does, the pixels it reads there."""

    number: int
    at: Slices
    reads: Slices


@functools.lru_cache(maxsize=1024)
def _taps(
    geo: Geometry, spatial: tuple[int, ...], positions: tuple[int, ...], before: tuple[int, ...]
) -> tuple[Tap, ...]:
    axes = zip(spatial, positions, before, geo.sample_stride, geo.kernel_size, geo.dilation, strict=True)
    reaches = [[_reach(n, m, i * d - b, s) for i in range(k)] for n, m, b, s, k, d in axes]
    every = slice(None)
    return tuple(
        Tap(number, (every, *(at for at, _ in per_axis)), (every, *(reads for _, reads in per_axis)))
        for number, per_axis in enumerate(itertools.product(*reaches))
        if all(at.stop > at.start for at, _ in per_axis)
    )


def taps(part: Part, geo: Geometry) -> tuple[Tap, ...]:
    """The kernel positions that meet the input somewhere; one that meets only padding is left out."""
    return _taps(geo, tuple(part.pixels.shape[1:-1]), part.positions, part.before)


def whole(pixels: Tensor, geo: Geometry) -> Part:
    """All patches in one part."""
    return Part(pixels, geo.positions(tuple(pixels.shape[1:-1])), geo.padding)


def count(pixels: Tensor, geo: Geometry) -> int:
    """The number M of sampled patches."""
    return geo.patches(pixels.shape[0], tuple(pixels.shape[1:-1]))


def boxes(sizes: Sequence[int], most: int) -> Iterator[Slices]:
    """Boxes of at most ``most`` elements that cover an array, each as long as it can be along the last axes."""
    steps = []
    for size in reversed(sizes):
        steps.append(max(1, min(size, most)))
        most //= max(1, size)
    axes = zip(sizes, reversed(steps), strict=True)
    # an empty array is one empty box
    return itertools.product(*([slice(i, min(i + k, n)) for i in range(0, max(1, n), k)] for n, k in axes))


def parts(pixels: Tensor, geo: Geometry) -> Iterator[Part]:
    """All patches, in parts that fit the cache; of :func:`samples` if the kernel is pointwise. Views."""
    spatial = tuple(pixels.shape[1:-1])
    if geo.pointwise:
        axes = [(n, n, 1, 1, 0) for n in spatial]
    else:
        places = (geo.sample_stride, geo.window, geo.padding)
        axes = list(zip(spatial, geo.positions(spatial), *places, strict=True))
    most = chunk_rows(geo.taps * geo.channels, pixels.device)
    for images, *box in boxes((pixels.shape[0], *(m for _, m, *_ in axes)), most):
        reads, before = [], []
        for at, (n, m, stride, window, padding) in zip(box, axes, strict=True):
            first, end = at.start * stride - padding, (at.stop - 1) * stride - padding + window
            # an axis that is not cut stays whole, so that contiguous images stay contiguous
            low, high = (0, n) if at.stop - at.start == m else (min(max(first, 0), n), min(max(end, 0), n))
            reads.append(slice(low, high))
            before.append(low - first)
        yield Part(pixels[(images, *reads)], tuple(at.stop - at.start for at in box), tuple(before))


def picked(geo: Geometry) -> bool:
    """Whether some of a pointwise kernel's pixels are samples, and not all."""
    return geo.pointwise and geo.flat_stride > 1


def samples(pixels: Tensor, geo: Geometry) -> Tensor:
    """The pixels that patches are taken from; of those that are :func:`picked`, a copy ``(M, C)`` in the statistics'
    dtype, in the order of :func:`_runs`."""
    if not picked(geo):
        return pixels
    rows = pixels.new_empty(count(pixels, geo), geo.channels, dtype=statistics_dtype(pixels.dtype))
    for at, images in _runs(pixels, geo):
        rows[at].view(images.shape).copy_(images)
    return rows


def add_samples_(pixels: Tensor, rows: Tensor, geo: Geometry) -> None:
    """Adjoint of picking samples: add the rows ``(M, C)`` to the pixels they came from."""
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


def in_runs(pixels: Tensor, geo: Geometry) -> Tensor:
    """Channels ``(..., C)`` as those of each vector, ``(..., vectors, block)``; a view."""
    if geo.interleaved:
        return pixels.unflatten(-1, (geo.block, geo.pooled)).transpose(-1, -2)
    return pixels.unflatten(-1, (geo.groups * geo.pooled, geo.block))


def as_vectors(runs: Tensor, geo: Geometry) -> Tensor:
    """Runs ``(M, taps * vectors, block)`` as vectors ``(M, vectors, taps, block)``; a view.

    Tap t of the r-th run of channels is run ``r * taps + t``. Interleaved, run s belongs to vector ``s mod G``, at
    place ``s // G`` in it: column ``c * taps + t`` with ``c = q * G + r`` is ``q * taps * G + s``.
    """
    if geo.interleaved:
        return runs.view(-1, geo.taps, geo.pooled, geo.block).transpose(1, 2)
    return runs.view(-1, geo.groups * geo.pooled, geo.taps, geo.block)


def gather(part: Part, geo: Geometry) -> Tensor:
    """A part's patches as vectors ``(M, vectors, taps, block)`` in the statistics' dtype.

    Their features are ordered by place, then by channel, and not the method's way by channel, then by place: so runs of
    ``block`` channels are copied as they are. One tap after the other: all its runs at a time.
    """
    pixels, dtype = part.pixels, statistics_dtype(part.pixels.dtype)
    if geo.pointwise:
        return in_runs(pixels.to(dtype).reshape(-1, geo.channels), geo).unsqueeze(2)
    pixels = in_runs(pixels, geo).contiguous()
    n, vectors = pixels.shape[0], geo.groups * geo.pooled
    runs = pixels.new_zeros((n, *part.positions, geo.taps * vectors, geo.block), dtype=dtype)
    for tap, at, reads in taps(part, geo):
        runs[at][..., tap :: geo.taps, :] = pixels[reads]
    return as_vectors(runs, geo)


def scatter_add_(part: Part, vectors: Tensor, geo: Geometry) -> None:
    """Adjoint of :func:`gather`. One tap's pixels never overlap, so the sum is the same every time."""
    target = in_runs(part.pixels, geo)
    if geo.pointwise:
        target.add_(vectors.view(target.shape))
        return
    runs = vectors.transpose(1, 2) if geo.interleaved else vectors
    runs = runs.reshape(part.pixels.shape[0], *part.positions, -1, geo.block)
    total = runs.new_zeros(target.shape)
    for tap, at, reads in taps(part, geo):
        total[reads] += runs[at][..., tap :: geo.taps, :]
    target += total
