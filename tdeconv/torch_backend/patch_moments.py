"""First stage: mean and covariance of the sampled patches, and their gradient added into the input's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.precision import statistics_dtype
from tdeconv.torch_backend.taps import batched, from_vectors, taps, to_vectors, unbatched

# From here on the symmetric half of the moments in three row blocks (2/3 of the work) beats one product.
_HALF_FROM = 192


def _pixels(x: Tensor, geo: Geometry) -> Tensor:
    """A pointwise kernel's samples, a strided view or copy ``(M, C)``."""
    step = math.prod(geo.sample_stride)
    return x.movedim(1, -1).reshape(-1, geo.channels)[::step]


def _gather(x: Tensor, geo: Geometry) -> Tensor:
    """Sampled patches ``(M, taps*C)``, tap-major, in the statistics' dtype."""
    dtype = statistics_dtype(x.dtype)
    if geo.pointwise:
        return _pixels(x, geo).to(dtype)
    positions = geo.positions(tuple(x.shape[2:]))
    shape = (x.shape[0], *positions, geo.taps, geo.channels)
    rows = torch.zeros(shape, dtype=dtype, device=x.device) if any(geo.padding) else x.new_empty(shape, dtype=dtype)
    pixels = x.movedim(1, -1)
    for tap, at, reads in taps(geo, tuple(x.shape[2:]), positions, geo.sample_stride):
        rows[(slice(None), *at, tap)] = pixels[(slice(None), *reads)]
    return rows.view(-1, geo.taps * geo.channels)


def _scatter_add_(grad_x: Tensor, rows: Tensor, geo: Geometry) -> None:
    """Adjoint of :func:`_gather`; one tap's positions never overlap, so the sum is the same every time."""
    if geo.pointwise:
        step = math.prod(geo.sample_stride)
        flat = grad_x.movedim(1, -1)
        if flat.is_contiguous():
            flat.view(-1, geo.channels)[::step] += rows
        else:
            total = flat.reshape(-1, geo.channels).clone()
            total[::step] += rows
            flat.copy_(total.view(flat.shape))
        return
    positions = geo.positions(tuple(grad_x.shape[2:]))
    rows = rows.view(grad_x.shape[0], *positions, geo.taps, geo.channels)
    pixels = grad_x.movedim(1, -1)
    for tap, at, reads in taps(geo, tuple(grad_x.shape[2:]), positions, geo.sample_stride):
        pixels[(slice(None), *reads)] += rows[(slice(None), *at, tap)]


def _gram(vectors: Tensor) -> Tensor:
    """``V^T V`` of ``(b, R, D)``: lower blocks only where that pays, mirrored."""
    b, _, d = vectors.shape
    if b > 1 or d < _HALF_FROM:
        return vectors.mT @ vectors
    x = vectors[0]
    gram = x.new_empty(d, d)
    edges = [round(d * i / 3) for i in range(4)]
    for low, high in zip(edges, edges[1:], strict=False):
        torch.mm(x[:, low:high].t(), x[:, :high], out=gram[low:high, :high])
    # the diagonal blocks are whole: the upper triangle is the transpose of the lower
    return gram.tril_().add_(gram.tril(-1).t()).unsqueeze(0)


def patch_moments(x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    vectors = batched(to_vectors(_gather(x, geo), geo), geo)
    mean = vectors.mean(1)
    centred = vectors - mean.unsqueeze(1)
    return mean, _gram(centred).div_(vectors.shape[1])


def patch_moments_backward_(
    grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, geo: Geometry
) -> None:
    rows = to_vectors(_gather(x, geo), geo)
    vectors = batched(rows, geo) - mean.unsqueeze(1)
    count = vectors.shape[1]
    grad = torch.baddbmm(grad_mean.unsqueeze(1), vectors, grad_cov + grad_cov.mT, beta=1 / count, alpha=1 / count)
    _scatter_add_(grad_x, from_vectors(unbatched(grad, geo, rows.shape[0]), geo), geo)
