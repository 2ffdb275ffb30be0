"""First stage: mean and covariance of the sampled patches, and their gradient added into the input's.

The patch matrix never exists as a whole: a part at a time is gathered tap by tap into rows ``(M, taps, C)``, which
copies runs of C contiguous values, centred and brought into the order of the layer's vectors, and multiplied
while they are in the cache.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.torch_backend import gemm, symmetric
from tdeconv.torch_backend.patches import Part, add_samples_, count, gather, parts, picked, samples, scatter_add_


def patch_moments(x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    cov, means, counts = None, [], []
    for part in parts(samples(_pixels(x, geo), geo), geo):
        rows = gather(part, geo)
        means.append(_pooled_mean(rows.mean(0), geo))
        counts.append(rows.shape[0] * geo.pooled)
        vectors = _centred_vectors(rows, means[-1], geo)
        if cov is None:
            cov = vectors.new_zeros(geo.groups, geo.features, geo.features)
        symmetric.add_product_(cov, vectors.mT, vectors)
    assert cov is not None
    # each part was centred by its own mean: add the parts' means about the common one (no cancellation at any offset)
    share = torch.tensor(counts, dtype=cov.dtype, device=cov.device).div_(sum(counts)).view(-1, 1, 1)
    stacked = torch.stack(means)
    mean = (stacked * share).sum(0)
    between = ((stacked - mean) * share.sqrt()).transpose(0, 1)
    cov = symmetric.mirror_(cov).div_(sum(counts)).baddbmm_(between.mT, between)
    return mean, cov


def patch_moments_backward_(
    grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, geo: Geometry
) -> None:
    pixels, target = _pixels(x, geo), _pixels(grad_x, geo)
    vectors = count(pixels, geo) * geo.pooled
    # the centred vectors sum to zero, so the mean gets nothing from the covariance
    grad_cov, grad_mean = (grad_cov + grad_cov.mT) / vectors, grad_mean / vectors

    def rows(part: Part) -> Tensor:
        return _rows(gemm.product(_centred_vectors(gather(part, geo), mean, geo), grad_cov), grad_mean, geo)

    if picked(geo):
        own = samples(pixels, geo)
        for part in parts(own, geo):
            part.pixels.copy_(rows(part).squeeze(1))
        add_samples_(target, own, geo)
    else:
        for part, grad_part in zip(parts(pixels, geo), parts(target, geo), strict=True):
            scatter_add_(grad_part, rows(part), geo)
    if target.data_ptr() != grad_x.data_ptr():
        grad_x.copy_(target.movedim(-1, 1))


def _pixels(x: Tensor, geo: Geometry) -> Tensor:
    """``(N, *spatial, C)``; a copy where one stride could not go over the pixels as they lie to pick some."""
    pixels = x.movedim(1, -1)
    return pixels if not picked(geo) or _in_rows(pixels) else pixels.contiguous()


def _in_rows(pixels: Tensor) -> bool:
    """Whether one step leads from each of an image's pixels to the next."""
    spatial = [(n, s) for n, s in zip(pixels.shape[1:-1], pixels.stride()[1:-1], strict=True) if n > 1]
    return all(step == inner * n for (_, step), (n, inner) in itertools.pairwise(spatial))


def _split(columns: Tensor, geo: Geometry) -> Tensor:
    """Channel-major columns ``(R, C*taps)`` as vectors ``(R, G, D)``, or ``(R, groups, D)``; a view."""
    if geo.interleaved:
        return columns.view(-1, geo.features, geo.pooled).transpose(1, 2)
    return columns.view(-1, geo.groups * geo.pooled, geo.features)


def _pooled_mean(tap_means: Tensor, geo: Geometry) -> Tensor:
    """Mean of the vectors ``(b, D)`` from that of the rows ``(taps, C)``."""
    columns = tap_means.t().reshape(1, -1)
    return _split(columns, geo).mean(1) if geo.groups == 1 else columns.view(geo.groups, -1)


def _centred_vectors(rows: Tensor, mean: Tensor, geo: Geometry) -> Tensor:
    """Rows ``(M, taps, C)`` as centred vectors ``(1, M*G, D)`` or ``(groups, M, D)``."""
    vectors = rows.new_empty(rows.shape[0], geo.groups * geo.pooled, geo.features)
    columns = rows.transpose(1, 2)  # (M, C, taps)
    if geo.interleaved and geo.pooled == 1:
        torch.sub(columns, mean.view(1, geo.block, geo.taps), out=vectors.view(columns.shape))
    else:
        torch.sub(_split(columns.reshape(rows.shape[0], -1), geo), mean, out=vectors)
    return vectors.transpose(0, 1) if geo.groups > 1 else vectors.view(1, -1, geo.features)


def _rows(vectors: Tensor, offset: Tensor, geo: Geometry) -> Tensor:
    """Vectors plus an offset for each of their features ``(b, D)``, as rows ``(M, taps, C)``."""
    if geo.groups > 1:
        vectors = vectors.transpose(0, 1)
    vectors = vectors.reshape(-1, geo.groups * geo.pooled, geo.features)
    if geo.interleaved and geo.pooled > 1:
        columns = vectors.new_empty(vectors.shape[0], geo.channels * geo.taps)
        torch.add(vectors, offset, out=_split(columns, geo))
        return columns.view(-1, geo.channels, geo.taps).transpose(1, 2).contiguous()
    rows = vectors.new_empty(vectors.shape[0], geo.taps, geo.channels)
    split = rows.transpose(1, 2).unflatten(1, (-1, geo.block))  # (M, vectors, block, taps)
    torch.add(vectors.view(split.shape), offset.view(-1, geo.block, geo.taps), out=split)
    return rows
