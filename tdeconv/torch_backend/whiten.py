"""Third and fourth stage in one, where a layer has fewer output positions than output channels: whiten the patches, and
multiply by the weight as it is.

It is the same function. To fold the root into the weight takes ``2 G D^2`` operations for each output channel, to
whiten the patches as many for each position. Forward keeps the whitened patches, and not the folded weight, which would
be larger.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.torch_backend import gemm
from tdeconv.torch_backend.convolve import empty_output
from tdeconv.torch_backend.patch_moments import both, by_channel, by_place, centred
from tdeconv.torch_backend.patches import gather, scatter_add_, whole

# To take and to put back a patch costs as much as this many products of each of its values, or less. Whitening the last
# stage of a ResNet-18 (256 positions, 512 channels) brought a step without statistics from 255 to 222 ms at D = 144.
_PATCH = 64


def whitens(x: Tensor, weight: Tensor, geo: Geometry) -> bool:
    """Whether this is the cheaper way."""
    patches = not geo.pointwise or (not any(geo.padding) and set(geo.stride) <= {1})  # else not all pixels, or more
    kind = geo.groups == 1 and patches and x.dtype in (torch.float32, torch.float64)
    positions = _positions(x, geo)
    return kind and (weight.shape[0] - positions) * geo.features >= _PATCH * positions


def _positions(x: Tensor, geo: Geometry) -> int:
    return x.shape[0] * math.prod(geo.every().positions(tuple(x.shape[2:])))


def whitened(x: Tensor, geo: Geometry) -> Tensor:
    """An empty tensor for the whitened patches, channel-major as a weight's columns are."""
    return x.new_empty(_positions(x, geo), geo.channels * geo.taps)


def whiten_convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry
) -> tuple[Tensor, Tensor]:
    """The output, and the whitened patches."""
    o, columns = weight.shape[0], whitened(x, geo)
    vectors = gemm.product(_vectors(x, mean, geo), both(by_place, deconv, geo))
    _in_columns(columns, geo).copy_(vectors.view(-1, geo.pooled, geo.taps, geo.block))
    y = empty_output(x, weight, geo)
    y.movedim(1, -1).view(-1, o).copy_(gemm.product(columns, _matrix(weight, x).t()))
    if bias is not None:
        y.movedim(1, -1).add_(bias)
    return y, columns


def whiten_convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    deconv: Tensor,
    columns: Tensor,
    geo: Geometry,
    need_x: bool,
    need_statistics: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input (None unless needed), the weight, the bias, the mean and the root (None unless needed)."""
    grads, every = grad.movedim(1, -1).reshape(-1, weight.shape[0]), geo.every()
    grad_weight = gemm.product(grads.t(), columns).view(weight.shape)
    if not need_x:
        return None, grad_weight, grads.sum(0), None, None
    grad_columns = gemm.product(grads, _matrix(weight, x))
    grad_whitened = _in_columns(grad_columns, geo).reshape(1, -1, geo.features)
    grad_vectors = gemm.product(grad_whitened, both(by_place, deconv, geo))
    grad_x = torch.zeros_like(x)
    places = grad_vectors.view(-1, geo.pooled, geo.taps, geo.block)
    scatter_add_(whole(grad_x.movedim(1, -1), every), places, every)
    if not need_statistics:
        return grad_x, grad_weight, grads.sum(0), None, None
    grad_deconv = both(by_channel, gemm.product(_vectors(x, mean, geo).mT, grad_whitened), geo)
    return grad_x, grad_weight, grads.sum(0), -by_channel(grad_vectors.sum(1), geo), grad_deconv


def _matrix(weight: Tensor, x: Tensor) -> Tensor:
    """``(O, C * taps)`` in the input's dtype: weights of half precision may come with an input of float32."""
    return weight.to(x.dtype).reshape(weight.shape[0], -1)


def _vectors(x: Tensor, mean: Tensor, geo: Geometry) -> Tensor:
    """The centred vectors ``(1, M*G, D)`` of the patches at all output positions."""
    every = geo.every()
    return centred(gather(whole(x.movedim(1, -1), every), every), by_place(mean, geo), every)


def _in_columns(columns: Tensor, geo: Geometry) -> Tensor:
    """Channel-major columns ``(M, C * taps)`` as vectors ``(M, G, taps, block)``; a view."""
    if geo.interleaved:
        return columns.view(-1, geo.block, geo.taps, geo.pooled).permute(0, 3, 2, 1)
    return columns.view(-1, geo.pooled, geo.block, geo.taps).transpose(2, 3)
