"""A whole layer, forward and backward, over the stage pairs of one fast backend.

A backend is a module with four stages and their gradients; ``torch_backend`` is one. The order of the backward is
what saves memory: the convolution's input gradient comes first, and the moments' gradient is added into it in place,
so that no second tensor of the input's size exists. Nothing of the input's size is kept from forward but the input.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.precision import statistics_dtype
from tdeconv.products import exact_products
from tdeconv.running import tells


class Stages(Protocol):
    """The contract of a fast backend. ``b`` covariances of ``D`` features, as in :mod:`tdeconv.reference`."""

    def describe(self, x: Tensor, weight: Tensor, geo: Geometry, n_iter: int) -> dict[str, str]:
        """How each stage would be done, a line each."""

    def patch_moments(self, x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]: ...

    def patch_moments_backward_(
        self, grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, geo: Geometry
    ) -> None:
        """Add the moments' gradient into ``grad_x`` at the sampled positions."""

    def inverse_sqrt(self, cov: Tensor, n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
        """The root, and two tensors that its gradient needs."""

    def inverse_sqrt_saved(self, cov: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
        """Empty tensors like those two, from the covariance's shape alone."""

    def inverse_sqrt_backward(self, grad: Tensor, basis: Tensor, spectrum: Tensor, n_iter: int) -> Tensor: ...

    def fold(
        self, weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry
    ) -> tuple[Tensor, Tensor]: ...

    def fold_backward(
        self,
        grad_weight: Tensor,
        grad_bias: Tensor,
        weight: Tensor,
        mean: Tensor,
        deconv: Tensor,
        geo: Geometry,
        need_statistics: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the weight, and of the mean and the root (None unless needed)."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor, geo: Geometry) -> Tensor: ...

    def convolve_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, geo: Geometry, need_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of the input (None unless needed), the folded weight and the folded bias."""


class Saved(NamedTuple):
    """What backward needs besides the input and the weight: the statistics, the folded weight, the root's factors."""

    mean: Tensor
    deconv: Tensor
    folded: Tensor
    basis: Tensor
    spectrum: Tensor


class Frozen(NamedTuple):
    """Statistics to use instead of the batch's wherever ``flag`` (a 0-d bool tensor) is true."""

    flag: Tensor
    mean: Tensor
    deconv: Tensor


def forward(
    stages: Stages,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    frozen: Frozen | None,
    geo: Geometry,
    eps: float,
    n_iter: int,
) -> tuple[Tensor, Saved, Tensor]:
    """The layer in training: the output, the rest of the forward, which running statistics are to count it ``(b)``."""
    with exact_products():
        if frozen is not None and frozen.flag:
            mean, deconv = _batched(frozen, statistics_dtype(x.dtype), geo)
            basis, spectrum = stages.inverse_sqrt_saved(deconv, n_iter)
            news = torch.zeros(geo.groups, dtype=torch.bool, device=x.device)
        else:
            mean, cov = stages.patch_moments(x, geo)
            news = tells(mean, cov)
            cov.diagonal(dim1=-2, dim2=-1).add_(eps)
            deconv, basis, spectrum = stages.inverse_sqrt(cov, n_iter)
        folded, shift = stages.fold(weight, bias, mean, deconv, geo)
    folded, shift = folded.to(x.dtype), shift.to(x.dtype)
    with _convolving(geo):
        y = stages.convolve(x, folded, shift, geo)
    return y, Saved(mean, deconv, folded, basis, spectrum), news


def _convolving(geo: Geometry) -> AbstractContextManager[Any]:
    """Where a backend convolves by matrix products, the setting for matrix products is not meant: torch's own
    convolutions do not follow it. A linear layer is a matrix product."""
    return exact_products() if geo.kernel_size else nullcontext()


def _batched(frozen: Frozen, dtype: torch.dtype, geo: Geometry) -> tuple[Tensor, Tensor]:
    d = geo.features
    mean, deconv = frozen.mean.to(dtype, copy=True), frozen.deconv.to(dtype, copy=True)
    return mean.view(geo.groups, d), deconv.view(geo.groups, d, d)


def backward(
    stages: Stages,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Saved,
    frozen: Tensor | None,
    geo: Geometry,
    n_iter: int,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the input (None unless needed), the weight and the bias; ``frozen`` as the forward's flag was."""
    with _convolving(geo):
        grad_x, grad_folded, grad_bias = stages.convolve_backward(grad, x, saved.folded, geo, need_x)
    stat = saved.mean.dtype
    grad_folded, grad_bias = grad_folded.to(stat), grad_bias.to(stat)
    through_statistics = need_x and not (frozen is not None and frozen)
    with exact_products():
        grad_weight, grad_mean, grad_deconv = stages.fold_backward(
            grad_folded, grad_bias, weight, saved.mean, saved.deconv, geo, through_statistics
        )
        if grad_x is not None and grad_mean is not None and grad_deconv is not None:
            grad_cov = stages.inverse_sqrt_backward(grad_deconv, saved.basis, saved.spectrum, n_iter)
            stages.patch_moments_backward_(grad_x, x, saved.mean, grad_mean, grad_cov, geo)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
