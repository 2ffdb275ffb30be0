"""Third stage: the inverse root and the mean folded into weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.torch_backend.taps import from_vectors, to_vectors


def _rows(weight: Tensor) -> Tensor:
    """A weight ``(O, C/groups, *kernel)`` as tap-major rows ``(O, taps*C/groups)``."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def _vectors(weight: Tensor, geo: Geometry) -> Tensor:
    """The weight's vectors ``(b, (O/groups)*G, D)``."""
    one = geo.one_group()
    return to_vectors(_rows(weight), one).view(geo.groups, -1, geo.features)


def _weight(vectors: Tensor, geo: Geometry, shape: torch.Size) -> Tensor:
    """Inverse of :func:`_vectors`; channels last in memory."""
    rows = from_vectors(vectors.reshape(shape[0], -1), geo.one_group())
    return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def fold(weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    folded = _vectors(weight.to(deconv.dtype), geo) @ deconv
    shift = (folded @ mean.unsqueeze(-1)).reshape(weight.shape[0], -1).sum(1)
    return _weight(folded, geo, weight.shape), (-shift if bias is None else bias.to(shift.dtype) - shift)


def _total_gradient(grad_weight: Tensor, grad_bias: Tensor, mean: Tensor, geo: Geometry) -> Tensor:
    """The folded weight's gradient with what reaches it through the folded bias, ``(b, (O/groups)*G, D)``."""
    per_vector = grad_bias.view(geo.groups, -1, 1).repeat_interleave(geo.pooled, dim=1)
    return torch.baddbmm(_vectors(grad_weight, geo), per_vector, mean.unsqueeze(1), alpha=-1)


def fold_backward(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, mean: Tensor, deconv: Tensor, geo: Geometry
) -> Tensor:
    return _weight(_total_gradient(grad_weight, grad_bias, mean, geo) @ deconv, geo, weight.shape)


def fold_backward_statistics(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, mean: Tensor, deconv: Tensor, geo: Geometry
) -> tuple[Tensor, Tensor]:
    vectors = _vectors(weight.to(deconv.dtype), geo)
    per_vector = grad_bias.view(geo.groups, -1, 1).repeat_interleave(geo.pooled, dim=1)
    grad_mean = -(deconv @ (vectors.mT @ per_vector)).squeeze(-1)
    return grad_mean, vectors.mT @ _total_gradient(grad_weight, grad_bias, mean, geo)
