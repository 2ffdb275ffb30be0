"""First stage: mean and covariance of the sampled patches, and their gradient added into the input's.

The patch matrix never exists as a whole: a part at a time is gathered tap by tap into the layer's vectors, which copies
runs of a block's channels, centred, and multiplied while it is in the cache. The moments' features come in the order of
that, and are brought into the method's at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.torch_backend import gemm, symmetric
from tdeconv.torch_backend.patches import (
    Part,
    add_samples_,
    count,
    gather,
    in_runs,
    parts,
    picked,
    samples,
    scatter_add_,
)


def patch_moments(x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    cov, means, counts = None, [], []
    for part in parts(samples(_pixels(x, geo), geo), geo):
        vectors = gather(part, geo)
        means.append(_pooled(vectors.mean(0), geo))
        counts.append(vectors.shape[0] * geo.pooled)
        rows = centred(vectors, means[-1], geo)
        if cov is None:
            cov = rows.new_zeros(geo.groups, geo.features, geo.features)
        symmetric.add_product_(cov, rows.mT, rows)
    assert cov is not None
    # each part was centred by its own mean: add the parts' means about the common one (no cancellation at any offset)
    shares = [k / sum(counts) for k in counts]  # on the host: a tensor of them would have to be sent to a GPU
    mean = torch.stack([m * share for m, share in zip(means, shares, strict=True)]).sum(0)
    between = torch.stack([(m - mean) * share**0.5 for m, share in zip(means, shares, strict=True)], dim=1)
    cov = symmetric.mirror_(cov).div_(sum(counts)).baddbmm_(between.mT, between)
    return by_channel(mean, geo), both(by_channel, cov, geo)


def patch_moments_backward_(
    grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, geo: Geometry
) -> None:
    pixels, target = _pixels(x, geo), _pixels(grad_x, geo)
    vectors = count(pixels, geo) * geo.pooled
    mean, offset = by_place(mean, geo), by_place(grad_mean / vectors, geo)
    # the centred vectors sum to zero, so the mean gets nothing from the covariance
    slope = both(by_place, (grad_cov + grad_cov.mT) / vectors, geo)

    def grads(part: Part) -> Tensor:
        return spread(gemm.product(centred(gather(part, geo), mean, geo), slope), offset, geo)

    if picked(geo):
        own = samples(pixels, geo)
        for part in parts(own, geo):
            in_runs(part.pixels, geo).copy_(grads(part).squeeze(2))
        add_samples_(target, own, geo)
    else:
        for part, grad_part in zip(parts(pixels, geo), parts(target, geo), strict=True):
            scatter_add_(grad_part, grads(part), geo)
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


# The order of a covariance's features: the method's, by channel and then by place, and that of gathered patches.


def by_place(a: Tensor, geo: Geometry) -> Tensor:
    """``(..., D)`` from the method's order of features to that of gathered patches."""
    return a.unflatten(-1, (geo.block, geo.taps)).transpose(-1, -2).flatten(-2)


def by_channel(a: Tensor, geo: Geometry) -> Tensor:
    """Inverse of :func:`by_place`."""
    return a.unflatten(-1, (geo.taps, geo.block)).transpose(-1, -2).flatten(-2)


def both(order: Callable[[Tensor, Geometry], Tensor], matrix: Tensor, geo: Geometry) -> Tensor:
    """A matrix ``(b, D, D)`` with the features of its rows and columns in another order."""
    return matrix if geo.taps == 1 else order(order(matrix, geo).mT, geo).mT.contiguous()


def _pooled(means: Tensor, geo: Geometry) -> Tensor:
    """Mean ``(b, D)`` from those of each vector ``(vectors, taps, block)``."""
    return (means if geo.groups > 1 else means.mean(0, keepdim=True)).flatten(1)


def centred(vectors: Tensor, mean: Tensor, geo: Geometry) -> Tensor:
    """Vectors ``(M, vectors, taps, block)`` less their mean ``(b, D)``: ``(1, M*G, D)``, or ``(groups, M, D)``.

    In place, if they lie in this order and are not the input itself, as pixels can be: fresh memory is dear.
    """
    own = vectors.is_contiguous() and not geo.pointwise
    rows = torch.sub(
        vectors, mean.view(-1, geo.taps, geo.block), out=vectors if own else vectors.new_empty(vectors.shape)
    )
    return rows.flatten(2).transpose(0, 1) if geo.groups > 1 else rows.view(1, -1, geo.features)


def spread(rows: Tensor, offset: Tensor, geo: Geometry) -> Tensor:
    """Adjoint of :func:`centred`, with an offset ``(b, D)`` for every vector: ``(M, vectors, taps, block)``."""
    vectors = rows.transpose(0, 1) if geo.groups > 1 else rows
    vectors = vectors.reshape(-1, geo.groups * geo.pooled, geo.taps, geo.block)
    return vectors + offset.view(-1, geo.taps, geo.block)
