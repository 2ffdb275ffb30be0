"""Fourth stage: the convolution, in the layout and by the products that were measured fastest on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdeconv import reference
from tdeconv.geometry import Geometry
from tdeconv.torch_backend.taps import taps

# From this many channels on both sides, one product per tap beats the library's weight gradient.
_PRODUCTS_FROM = 128


def native(x: Tensor) -> Tensor:
    """The input in the memory layout this backend computes in: channels last, where the CPU's convolutions gain."""
    if x.device.type == "cpu" and x.ndim == 4 and x.dtype == torch.float32:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def convolve(x: Tensor, weight: Tensor, bias: Tensor, geo: Geometry) -> Tensor:
    return reference.convolve(x, weight, bias, geo)


def _by_products(x: Tensor, geo: Geometry, out_channels: int) -> bool:
    return x.device.type == "cpu" and geo.groups == 1 and min(geo.channels, out_channels) >= _PRODUCTS_FROM


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """``dW[:, :, tap] = grad^T x`` over the positions at which the tap falls inside the input; padding is skipped."""
    o, c = weight.shape[:2]
    spatial, positions = tuple(x.shape[2:]), tuple(grad.shape[2:])
    out = grad.new_zeros(o, math.prod(geo.kernel_size), c)
    pixels, grads = x.movedim(1, -1), grad.movedim(1, -1)
    for tap, at, reads in taps(geo, spatial, positions, geo.stride):
        g, p = grads[(slice(None), *at)].reshape(-1, o), pixels[(slice(None), *reads)].reshape(-1, c)
        torch.mm(g.t(), p, out=out[:, tap])
    return out.view(o, *geo.kernel_size, c).movedim(-1, 1)


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    if not geo.kernel_size:
        return grad @ weight if need_x else None, grad.t() @ x, grad.sum(0)
    products = _by_products(x, geo, weight.shape[0])
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [weight.shape[0]],
        geo.stride,
        geo.padding,
        geo.dilation,
        False,
        [0] * len(geo.stride),
        geo.groups,
        [need_x, not products, not products],
    )
    if products:
        grad_weight = _weight_gradient(grad, x, weight, geo)
        grad_bias = grad.sum((0, *range(2, grad.ndim)))
    return grad_x if need_x else None, grad_weight, grad_bias
