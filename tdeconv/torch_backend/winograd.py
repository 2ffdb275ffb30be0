"""3x3 convolutions of stride 1 by Winograd's minimal filtering: 16 products for four outputs in place of 36.

Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, CVPR 2016, ``F(2x2, 3x3)``:
``y = A^T [(G w G^T) . (B^T x B)] A`` for every tile of 2x2 outputs, which reads 4x4 pixels. The coefficients are 1 and
1/2, and the sums four ninths as long: in float32 it is no less exact than the sum over all nine taps.

Transformed arrays have the tile's column and row in front: ``(16, tiles, channels)``, a batch of 16 products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdeconv.torch_backend.chunks import chunk_rows
from tdeconv.torch_backend.patches import boxes


def _tiles(outputs: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tiles that cover this many outputs."""
    return -(-outputs[0] // 2), -(-outputs[1] // 2)


class Stripe(NamedTuple):
    """Images, and rows of their outputs, that are worked on together; the rows of pixels that these read."""

    images: slice
    outputs: slice
    reads: slice
    padding: tuple[int, int]  # before the pixels read
    shared: int  # of them, the first ones, which the stripe above reads too


def stripes(images: int, channels: int, outputs: Sequence[int], padding: Sequence[int], on: Tensor) -> Iterator[Stripe]:
    """All of a convolution, in stripes whose transform fits the cache: whole images, if these do."""
    rows, columns = _tiles(outputs)
    for part, tiles in boxes((images, rows), chunk_rows(16 * columns * channels, on.device)):
        # of the pixels' rows; the first ones may lie in the padding
        first, end = 2 * tiles.start - padding[0], 2 * tiles.stop - padding[0] + 2
        low, above = max(0, first), max(0, first + 2) if tiles.start else 0
        reads, shared = slice(low, max(low, end)), max(0, above - low)
        yield Stripe(part, slice(2 * tiles.start, 2 * tiles.stop), reads, (low - first, padding[1]), shared)


def _runs(a: Tensor, dim: int, size: int) -> tuple[Tensor, ...]:
    """The first, second, ... of ``size`` pixels of every tile along an axis; views."""
    return a.unfold(dim, size, 2).unbind(-1)


# --------------------------------------------------------------------------- one axis: B^T, A^T, G and their adjoints


def _input_axis(a: Tensor, dim: int) -> Tensor:
    """``B^T``: pixels along an axis to ``(4, ...)``, the axis now tiles."""
    p0, p1, p2, p3 = _runs(a, dim, 4)
    v = a.new_empty(4, *p0.shape)
    torch.sub(p0, p2, out=v[0])
    torch.add(p1, p2, out=v[1])
    torch.sub(p2, p1, out=v[2])
    torch.sub(p1, p3, out=v[3])
    return v


def _input_axis_adjoint(v: Tensor, a: Tensor, dim: int) -> Tensor:
    """``B``: tiles ``v (4, ...)`` added up in the pixels ``a``, where neighbours overlap by two."""
    p0, p1, p2, p3 = _runs(a, dim, 4)
    a.narrow(dim, -2, 2).zero_()
    p0.copy_(v[0])
    inner = torch.sub(v[1], v[2])
    torch.add(inner, v[3], out=p1)
    torch.add(v[1], v[2], out=inner)
    p2.add_(inner.sub_(v[0]))
    p3.sub_(v[3])
    return a


def _output_axis(m: Tensor, a: Tensor, dim: int) -> Tensor:
    """``A^T``: tiles ``m (4, ...)`` to the outputs ``a``."""
    even, odd = _runs(a, dim, 2)
    inner = torch.add(m[1], m[2])
    torch.add(inner, m[0], out=even)
    torch.sub(m[1], m[2], out=inner)
    torch.sub(inner, m[3], out=odd)
    return a


def _output_axis_adjoint(a: Tensor, dim: int) -> Tensor:
    """``A``: outputs along an axis to ``(4, ...)``."""
    even, odd = _runs(a, dim, 2)
    m = a.new_empty(4, *even.shape)
    m[0] = even
    torch.add(even, odd, out=m[1])
    torch.sub(even, odd, out=m[2])
    torch.neg(odd, out=m[3])
    return m


def _weight_axis(w: Tensor) -> Tensor:
    """``G``: taps ``(3, ...)`` to ``(4, ...)``."""
    u = w.new_empty(4, *w.shape[1:])
    ends, middle = torch.add(w[0], w[2]).mul_(0.5), 0.5 * w[1]
    u[0], u[3] = w[0], w[2]
    torch.add(ends, middle, out=u[1])
    torch.sub(ends, middle, out=u[2])
    return u


def _weight_axis_adjoint(u: Tensor) -> Tensor:
    """``G^T``: ``(4, ...)`` to taps ``(3, ...)``."""
    w = u.new_empty(3, *u.shape[1:])
    ends = torch.add(u[1], u[2]).mul_(0.5)
    torch.add(u[0], ends, out=w[0])
    torch.add(u[3], ends, out=w[2])
    torch.sub(u[1], u[2], out=w[1]).mul_(0.5)
    return w


# ------------------------------------------------------------------------------------------- both axes, then products


def _transform_input(x: Tensor, padding: Sequence[int], outputs: Sequence[int]) -> Tensor:
    """``x (n, C, H, W)`` to ``(16, tiles, C)``; what lies beyond the last tile is not read."""
    rows, columns = _tiles(outputs)
    padded = x.new_zeros(x.shape[0], 2 * rows + 2, 2 * columns + 2, x.shape[1])
    inside = padded[:, padding[0] :, padding[1] :][:, : x.shape[2], : x.shape[3]]
    inside.copy_(x.movedim(1, -1)[:, : inside.shape[1], : inside.shape[2]])
    return _input_axis(_input_axis(padded, 1), 3).view(16, -1, x.shape[1])


def _transform_input_adjoint(v: Tensor, padding: Sequence[int], outputs: Sequence[int], x: Tensor, shared: int) -> None:
    """``v (16, tiles, C)`` into ``x (n, C, H, W)``; added to its first ``shared`` rows."""
    (rows, columns), n, c = _tiles(outputs), x.shape[0], x.shape[1]
    tiles = v.view(4, 4, n, rows, columns, c)
    half = _input_axis_adjoint(tiles, v.new_empty(4, n, rows, 2 * columns + 2, c), 3)
    padded = _input_axis_adjoint(half, v.new_empty(n, 2 * rows + 2, 2 * columns + 2, c), 1)
    inside = padded[:, padding[0] :, padding[1] :][:, : x.shape[2], : x.shape[3]]
    pixels = x.movedim(1, -1)
    inside[:, :shared] += pixels[:, :shared]
    pixels.copy_(inside)


def _transform_weight(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` to ``(16, O, C)``."""
    taps = weight.permute(2, 3, 0, 1)
    return _weight_axis(_weight_axis(taps).transpose(0, 1)).flatten(0, 1)


def _transform_weight_adjoint(u: Tensor) -> Tensor:
    taps = _weight_axis_adjoint(_weight_axis_adjoint(u.unflatten(0, (4, 4))).transpose(0, 1))
    return taps.permute(2, 3, 0, 1)


def convolve_(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int]) -> None:
    """Write the convolution of ``x (N, C, H, W)`` with ``weight (O, C, 3, 3)`` into ``y (N, O, Ho, Wo)``."""
    o, transformed = weight.shape[0], _transform_weight(weight).mT
    for stripe in stripes(x.shape[0], max(weight.shape[:2]), y.shape[2:], padding, x):
        y_part = y[stripe.images, :, stripe.outputs]
        n, _, height, width = y_part.shape
        rows, columns = _tiles((height, width))
        x_part = x[stripe.images, :, stripe.reads]
        m = torch.bmm(_transform_input(x_part, stripe.padding, (height, width)), transformed)
        m[5] += bias  # the tile's second row and column reaches each of its outputs once
        half = _output_axis(m.view(4, 4, n, rows, columns, o), m.new_empty(4, n, rows, 2 * columns, o), 3)
        whole = _output_axis(half, m.new_empty(n, 2 * rows, 2 * columns, o), 1)
        y_part.copy_(whole[:, :height, :width].movedim(-1, 1))


def _transform_grad(grad: Tensor) -> Tensor:
    """``grad (n, O, Ho, Wo)`` to ``(16, tiles, O)``."""
    rows, columns = _tiles(grad.shape[2:])
    even = grad.new_zeros if grad.shape[2] % 2 or grad.shape[3] % 2 else grad.new_empty
    whole = even(grad.shape[0], 2 * rows, 2 * columns, grad.shape[1])
    whole[:, : grad.shape[2], : grad.shape[3]] = grad.movedim(1, -1)
    return _output_axis_adjoint(_output_axis_adjoint(whole, 1), 3).view(16, -1, grad.shape[1])


def convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], grad_x: Tensor | None) -> Tensor:
    """The gradient of the weight; that of the input goes into ``grad_x``, if there is one."""
    transformed = _transform_weight(weight)
    total = torch.zeros_like(transformed)
    for stripe in stripes(x.shape[0], max(weight.shape[:2]), grad.shape[2:], padding, x):
        images, reads = stripe.images, stripe.reads
        grad_part = grad[images, :, stripe.outputs]
        outputs = grad_part.shape[2:]
        m, v = _transform_grad(grad_part), _transform_input(x[images, :, reads], stripe.padding, outputs)
        total.baddbmm_(m.mT, v)
        if grad_x is not None:
            v, grad_x_part = torch.bmm(m, transformed, out=v), grad_x[images, :, reads]
            _transform_input_adjoint(v, stripe.padding, outputs, grad_x_part, stripe.shared)
    return _transform_weight_adjoint(total)
