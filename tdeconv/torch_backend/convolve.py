"""Fourth stage: the convolution, in the layout and by the products that were measured fastest on a CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tdeconv import reference
from tdeconv.geometry import Geometry
from tdeconv.layout import beside, memory_format
from tdeconv.torch_backend import measured, winograd
from tdeconv.torch_backend.chunks import chunk_rows
from tdeconv.torch_backend.patches import taps, whole

# With this many channels on both sides, a CPU's forward convolution is faster channels-last by more than the change of
# layout costs.
_CHANNELS_LAST = 64
# With this many, so are its gradients, and the weight's as one product per tap, which skips the padding.
_WIDE = 128
# With this many, so is Winograd's form of it.
_TILED = 128
# Up to this many pixels in and out, so is the whole convolution, pixel by pixel: most taps fall on padding.
_FEW_PIXELS = 4

Index = tuple[slice | int, ...]


def _channels(x: Tensor, weight: Tensor) -> int:
    """The narrower side of a convolution that this backend may do otherwise than the library; else 0.

    A pointwise one is the library's: it is a product in either layout, and a change of layout costs more than it gains.
    """
    patches = x.shape[1] == weight.shape[1] and weight.shape[2:].numel() > 1
    kind = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return min(weight.shape[:2]) if kind and patches else 0


def _by_products(x: Tensor) -> bool:
    """Whether this CPU is one on which products beat the library's convolutions (of float64 it has slow ones alone)."""
    return x.dtype == torch.float64 or measured.products_convolve()


def wide(x: Tensor, weight: Tensor) -> bool:
    """Whether both sides have channels enough for products of single taps, channels-last."""
    return _channels(x, weight) >= _WIDE and _by_products(x)


def by_pixels(x: Tensor, weight: Tensor, geo: Geometry) -> bool:
    """Whether the map is so small that the convolution is best done pixel by pixel."""
    return _channels(x, weight) >= _WIDE and max(math.prod(x.shape[2:]), math.prod(_out(x, geo))) <= _FEW_PIXELS


def by_tiles(x: Tensor, weight: Tensor, geo: Geometry) -> bool:
    """Whether Winograd's products are fewer by more than their transforms cost: 3x3, stride 1, channels enough."""
    shape = geo.kernel_size == (3, 3) and geo.stride == geo.dilation == (1, 1)
    return shape and _channels(x, weight) >= _TILED and not by_pixels(x, weight, geo) and _by_products(x)


def _out(x: Tensor, geo: Geometry) -> tuple[int, ...]:
    return geo.every().positions(tuple(x.shape[2:]))


def _images(x: Tensor, weight: Tensor, geo: Geometry) -> Iterator[slice]:
    """A few images at a time, in and out within the cache."""
    step = chunk_rows(max(x[0].numel(), weight.shape[0] * math.prod(_out(x, geo))), x.device)
    for first in range(0, x.shape[0], step):
        yield slice(first, first + step)


def _channels_last(x: Tensor) -> Tensor:
    """A view's worth of ``x (N, C, *spatial)`` with its channels innermost."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _pairs(pixels: Tensor, geo: Geometry) -> Iterator[tuple[int, Index, Index]]:
    """Tap, output pixel and input pixel of every product of a convolution that does not fall on padding."""
    images = slice(None)
    for tap, at, reads in taps(whole(pixels, geo), geo):
        outs = [range(s.start, s.stop) for s in at[1:]]
        ins = [range(s.start, s.stop, s.step or 1) for s in reads[1:]]
        for out, into in zip(itertools.product(*outs), itertools.product(*ins), strict=True):
            yield tap, (images, *out), (images, *into)


def _tap_weights(weight: Tensor) -> Tensor:
    """``(O, taps, C)``; a view of a folded weight."""
    return weight.movedim(1, -1).flatten(1, -2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, geo: Geometry) -> Tensor:
    if by_pixels(x, weight, geo):
        return _convolve_by_pixels(_channels_last(x), weight, bias, geo)
    if by_tiles(x, weight, geo):
        shape = (x.shape[0], weight.shape[0], *_out(x, geo))
        y = torch.empty(shape, dtype=x.dtype, memory_format=memory_format(x))
        winograd.convolve_(y, x, weight, bias, geo.padding)
        return y
    if _channels(x, weight) < _CHANNELS_LAST or not x.is_contiguous() or not _by_products(x):
        return reference.convolve(x, weight, bias, geo)
    y = x.new_empty(x.shape[0], weight.shape[0], *_out(x, geo))
    for part in _images(x, weight, geo):
        y[part] = reference.convolve(_channels_last(x[part]), weight, bias, geo)
    return y


def empty_output(x: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """Like the output, its channels innermost. Not a view of its pixels: autograd would refuse an in-place activation
    behind the layer."""
    shape = (x.shape[0], *_out(x, geo), weight.shape[0])
    strides = x.new_empty(shape, device="meta").movedim(-1, 1).stride()
    return torch.empty_strided((shape[0], shape[-1], *shape[1:-1]), strides, dtype=x.dtype, device=x.device)


def _convolve_by_pixels(x: Tensor, weight: Tensor, bias: Tensor, geo: Geometry) -> Tensor:
    pixels, by_tap = x.movedim(1, -1), _tap_weights(weight)
    y = empty_output(x, weight, geo)
    out_pixels = y.movedim(1, -1)
    out_pixels.copy_(bias)
    for tap, out, into in _pairs(pixels, geo.every()):
        out_pixels[out].addmm_(pixels[into], by_tap[:, tap].t())
    return y


def _input_gradient_by_pixels(grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    grads, by_tap = grad.movedim(1, -1), _tap_weights(weight)
    pixels = torch.zeros(x.movedim(1, -1).shape, dtype=x.dtype, device=x.device)
    for tap, out, into in _pairs(pixels, geo.every()):
        pixels[into].addmm_(grads[out], by_tap[:, tap])
    return pixels.movedim(-1, 1)


def _add_weight_gradient_(total: Tensor, grad: Tensor, x: Tensor, geo: Geometry) -> None:
    """``total (O, taps, C)``: a tap's is ``grad^T x`` over the positions at which the tap falls inside the input."""
    o, _, c = total.shape
    pixels, grads = x.movedim(1, -1), grad.movedim(1, -1)
    for tap, at, reads in taps(whole(pixels, geo.every()), geo.every()):
        total[:, tap].addmm_(grads[at].reshape(-1, o).t(), pixels[reads].reshape(-1, c))


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    if not geo.kernel_size:
        return grad @ weight if need_x else None, grad.t() @ x, grad.sum(0)
    if by_tiles(x, weight, geo):
        grad_x = torch.empty_like(x, memory_format=memory_format(x)) if need_x else None
        grad_weight = winograd.convolve_backward(grad, x, weight, geo.padding, grad_x)
        return grad_x, grad_weight, grad.sum((0, 2, 3))
    if not wide(x, weight) and not by_pixels(x, weight, geo):
        grads = _library_backward(grad, x, weight, geo, [need_x, True, True])
        return grads[0] if need_x else None, grads[1], grads[2]
    total = grad.new_zeros(weight.shape[0], geo.taps, weight.shape[1])
    grad_x = torch.empty_like(x) if need_x else None
    for part in _images(x, weight, geo):
        x_part, grad_part = _channels_last(x[part]), _channels_last(grad[part])
        _add_weight_gradient_(total, grad_part, x_part, geo)
        if grad_x is not None and by_pixels(x, weight, geo):
            grad_x[part] = _input_gradient_by_pixels(grad_part, x_part, weight, geo)
        elif grad_x is not None:
            grad_x[part] = _library_backward(grad_part, x_part, weight, geo, [True, False, False])[0]
    grad_weight = total.view(weight.shape[0], *geo.kernel_size, -1).movedim(-1, 1)
    return grad_x, grad_weight, grad.sum((0, *range(2, grad.ndim)))


def _library_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own gradients of a convolution: input, weight and bias, those that the mask asks for."""
    zeros = [0] * len(geo.stride)
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        beside(x, weight),
        [weight.shape[0]],
        geo.stride,
        geo.padding,
        geo.dilation,
        False,
        zeros,
        geo.groups,
        mask,
    )
