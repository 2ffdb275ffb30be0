"""Fourth stage: the convolution, in the layout and by the products that were measured fastest on a CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tdeconv import reference
from tdeconv.geometry import Geometry
from tdeconv.layout import memory_format
from tdeconv.torch_backend.patches import taps

# With this many channels on both sides, a CPU's convolutions are faster channels-last by more than the change of layout
# costs, and the weight gradient faster as one product per tap, which skips the padding.
_WIDE = 128
# Up to this many pixels in and out, so is the whole convolution, pixel by pixel: most taps fall on padding.
_FEW_PIXELS = 4


def wide(x: Tensor, weight: Tensor) -> bool:
    """Whether both sides have channels enough for products of single taps."""
    ungrouped = x.shape[1] == weight.shape[1]
    kind = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return kind and ungrouped and x.ndim > 2 and min(weight.shape[:2]) >= _WIDE


def native(x: Tensor, weight: Tensor) -> Tensor:
    """The input in the memory layout this backend computes in: channels last, where a CPU's convolutions gain by it."""
    if x.ndim == 4 and x.dtype == torch.float32 and wide(x, weight):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _pairs(pixels: Tensor, geo: Geometry) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Tap, output pixel and input pixel of every product of a convolution that does not fall on padding."""
    for tap, at, reads in taps(pixels, geo):
        outs = [range(s.start, s.stop) for s in at[1:]]
        ins = [range(s.start, s.stop, s.step or 1) for s in reads[1:]]
        yield from zip(itertools.repeat(tap), itertools.product(*outs), itertools.product(*ins))


def _tap_weights(weight: Tensor) -> Tensor:
    """``(O, taps, C)``; a view of a folded weight."""
    return weight.movedim(1, -1).flatten(1, -2)


def by_pixels(x: Tensor, weight: Tensor, geo: Geometry) -> bool:
    """Whether the map is so small that the convolution is best done pixel by pixel."""
    spatial = tuple(x.shape[2:])
    return wide(x, weight) and max(math.prod(spatial), math.prod(geo.every().positions(spatial))) <= _FEW_PIXELS


def convolve(x: Tensor, weight: Tensor, bias: Tensor, geo: Geometry) -> Tensor:
    if not by_pixels(x, weight, geo):
        return reference.convolve(x, weight.contiguous(memory_format=memory_format(x)), bias, geo)
    every, pixels, by_tap = geo.every(), x.movedim(1, -1), _tap_weights(weight)
    y = bias.expand(x.shape[0], *every.positions(tuple(x.shape[2:])), -1).contiguous()
    for tap, out, into in _pairs(pixels, every):
        y[(slice(None), *out)].addmm_(pixels[(slice(None), *into)], by_tap[:, tap].t())
    return y.movedim(-1, 1)


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    pixels, grads, by_tap = x.movedim(1, -1), grad.movedim(1, -1), _tap_weights(weight)
    grad_pixels = torch.zeros_like(pixels, memory_format=torch.contiguous_format)
    for tap, out, into in _pairs(pixels, geo.every()):
        grad_pixels[(slice(None), *into)].addmm_(grads[(slice(None), *out)], by_tap[:, tap])
    return grad_pixels.movedim(-1, 1)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    o, c = weight.shape[:2]
    pixels, grads = x.movedim(1, -1), grad.movedim(1, -1)
    out = grad.new_zeros(o, geo.taps, c)
    for tap, at, reads in taps(pixels, geo.every()):
        torch.mm(grads[at].reshape(-1, o).t(), pixels[reads].reshape(-1, c), out=out[:, tap])
    return out.view(o, *geo.kernel_size, c).movedim(-1, 1)


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    if not geo.kernel_size:
        return grad @ weight if need_x else None, grad.t() @ x, grad.sum(0)
    products, pixelwise = wide(x, weight), by_pixels(x, weight, geo)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight.contiguous(memory_format=memory_format(x)),
        [weight.shape[0]],
        geo.stride,
        geo.padding,
        geo.dilation,
        False,
        [0] * len(geo.stride),
        geo.groups,
        [need_x and not pixelwise, not products, not products],
    )
    if products:
        grad_weight = _weight_gradient(grad, x, weight, geo)
        grad_bias = grad.sum((0, *range(2, grad.ndim)))
    if pixelwise and need_x:
        grad_x = _input_gradient(grad, x, weight, geo)
    return grad_x if need_x else None, grad_weight, grad_bias
