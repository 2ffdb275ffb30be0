"""3x3 convolutions of stride 1 by Winograd's minimal filtering: 16 products for four outputs in place of 36.

Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, CVPR 2016, ``F(2x2, 3x3)``:
``y = A^T [(G w G^T) . (B^T x B)] A`` for every tile of 2x2 outputs, which reads 4x4 pixels. The coefficients are 1 and
1/2, and the sums four ninths as long: in float32 it is no less exact than the sum over all nine taps.

Transformed arrays have the tile's column and row in front: ``(16, tiles, channels)``, a batch of 16 products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdeconv.torch_backend.chunks import chunk_rows


def _tiles(outputs: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tiles that cover this many outputs."""
    return -(-outputs[0] // 2), -(-outputs[1] // 2)


def images_at_once(channels: int, outputs: Sequence[int], device: torch.device) -> int:
    """Images whose transform fits the cache."""
    rows, columns = _tiles(outputs)
    return chunk_rows(16 * rows * columns * channels, device)


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


def _transform_input_adjoint(v: Tensor, padding: Sequence[int], outputs: Sequence[int], x: Tensor) -> None:
    """``v (16, tiles, C)`` into ``x (n, C, H, W)``."""
    (rows, columns), n, c = _tiles(outputs), x.shape[0], x.shape[1]
    tiles = v.view(4, 4, n, rows, columns, c)
    half = _input_axis_adjoint(tiles, v.new_empty(4, n, rows, 2 * columns + 2, c), 3)
    padded = _input_axis_adjoint(half, v.new_empty(n, 2 * rows + 2, 2 * columns + 2, c), 1)
    inside = padded[:, padding[0] :, padding[1] :][:, : x.shape[2], : x.shape[3]]
    if inside.shape[1:3] != x.shape[2:]:  # pixels that no output reads
        x.zero_()
    x.movedim(1, -1)[:, : inside.shape[1], : inside.shape[2]] = inside


def _transform_weight(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` to ``(16, O, C)``."""
    taps = weight.permute(2, 3, 0, 1)
    return _weight_axis(_weight_axis(taps).transpose(0, 1)).flatten(0, 1)


def _transform_weight_adjoint(u: Tensor) -> Tensor:
    taps = _weight_axis_adjoint(_weight_axis_adjoint(u.unflatten(0, (4, 4))).transpose(0, 1))
    return taps.permute(2, 3, 0, 1)


def convolve_(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int]) -> None:
    """Write the convolution of ``x (N, C, H, W)`` with ``weight (O, C, 3, 3)`` into ``y (N, O, Ho, Wo)``."""
    o, (height, width) = weight.shape[0], y.shape[2:]
    rows, columns = _tiles((height, width))
    transformed = _transform_weight(weight).mT
    step = images_at_once(max(weight.shape[:2]), (height, width), x.device)
    for x_part, y_part in zip(x.split(step), y.split(step), strict=True):
        n = x_part.shape[0]
        m = torch.bmm(_transform_input(x_part, padding, (height, width)), transformed)
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
    outputs = grad.shape[2:]
    transformed = _transform_weight(weight)
    total = torch.zeros_like(transformed)
    step = images_at_once(max(weight.shape[:2]), outputs, x.device)
    for first in range(0, x.shape[0], step):
        part = slice(first, first + step)
        m, v = _transform_grad(grad[part]), _transform_input(x[part], padding, outputs)
        total.baddbmm_(m.mT, v)
        if grad_x is not None:
            _transform_input_adjoint(torch.bmm(m, transformed, out=v), padding, outputs, grad_x[part])
    return _transform_weight_adjoint(total)
