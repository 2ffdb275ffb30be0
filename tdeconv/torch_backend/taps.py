"""Kernel positions one by one: which input pixels a tap touches, and in which order patch columns are whitened.

A patch row is gathered tap by tap, ``(tap, channel)``, because a channels-last input then gives runs of C contiguous
values; :func:`vector_order` brings its columns into the order of the layer's vectors, channel-major and split by the
grouping, in one pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch

from tdeconv.geometry import Geometry

Slices = tuple[slice, ...]


def _reach(size: int, positions: int, offset: int, stride: int) -> tuple[slice, slice]:
    """The positions p with ``0 <= p*stride + offset < size``, and the pixels they read, along one axis."""
    first = max(0, -(offset // stride))
    last = min(positions - 1, (size - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)


def taps(
    geo: Geometry, spatial: tuple[int, ...], positions: tuple[int, ...], stride: tuple[int, ...]
) -> Iterator[tuple[int, Slices, Slices]]:
    """Each tap's number, the positions at which it falls inside the input, and the pixels it reads there."""
    axes = zip(spatial, positions, stride, geo.kernel_size, geo.dilation, geo.padding, strict=True)
    reaches = [[_reach(n, m, i * d - p, s) for i in range(k)] for n, m, s, k, d, p in axes]
    for number, per_axis in enumerate(itertools.product(*reaches)):
        yield number, tuple(r[0] for r in per_axis), tuple(r[1] for r in per_axis)


@functools.lru_cache(maxsize=256)
def vector_order(geo: Geometry, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Column orders between tap-major rows and the layer's vectors; None where they agree.

    ``rows.index_select(1, order[0])`` turns ``(R, taps*C)`` into ``(R, G*D)`` or ``(R, groups*D)``; ``order[1]`` is the
    way back.
    """
    c, t = torch.arange(geo.channels), torch.arange(geo.taps)
    tap_major = (t * geo.channels).unsqueeze(0) + c.unsqueeze(1)  # [c, t] -> its column in a gathered row
    columns = tap_major.flatten()
    if geo.interleaved:
        columns = columns.reshape(geo.features, geo.pooled).t().flatten()
    if torch.equal(columns, torch.arange(columns.numel())):
        return None
    return columns.to(device), columns.argsort().to(device)


def to_vectors(rows: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """Tap-major rows ``(R, taps*C)`` as ``(R, G*D)`` or ``(R, groups*D)``."""
    order = vector_order(geo, rows.device)
    return rows if order is None else rows.index_select(1, order[0])


def from_vectors(vectors: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """Inverse of :func:`to_vectors`."""
    order = vector_order(geo, vectors.device)
    return vectors if order is None else vectors.index_select(1, order[1])


def batched(vectors: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """``(R, G*D)`` as ``(1, R*G, D)``, or ``(R, groups*D)`` as ``(groups, R, D)``; a view."""
    if geo.groups == 1:
        return vectors.view(1, -1, geo.features)
    return vectors.view(-1, geo.groups, geo.features).transpose(0, 1)


def unbatched(vectors: torch.Tensor, geo: Geometry, rows: int) -> torch.Tensor:
    """Inverse of :func:`batched`."""
    return (vectors if geo.groups == 1 else vectors.transpose(0, 1)).reshape(rows, -1)
