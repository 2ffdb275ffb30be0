"""A whole layer, forward and backward, over the stage pairs of one fast backend.

A backend is a module with four stages and their gradients; ``torch_backend`` is one. The order of the backward is
what saves memory: the convolution's input gradient comes first, and the moments' gradient is added into it in place,
so that no second tensor of the input's size exists. Nothing of the input's size is kept from forward but the input.

A stale step, whose statistics are constants, is the second half of that, forward and backward: fold and convolve.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from tdeconv.geometry import Geometry
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

    # Optional: of fold and convolve in one, see torch_backend.whiten.

    def whitens(self, x: Tensor, weight: Tensor, geo: Geometry) -> bool: ...

    def whitened(self, x: Tensor, geo: Geometry) -> Tensor: ...

    def whiten_convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry
    ) -> tuple[Tensor, Tensor]: ...

    def whiten_convolve_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        deconv: Tensor,
        columns: Tensor,
        geo: Geometry,
        need_x: bool,
        need_statistics: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]: ...


def whitens(stages: Stages, x: Tensor, weight: Tensor, geo: Geometry) -> bool:
    """Whether the backend can whiten patches instead of folding, and does for these sizes."""
    return hasattr(stages, "whitens") and bool(stages.whitens(x, weight, geo))


class Saved(NamedTuple):
    """What backward needs besides the input and the weight: the statistics, the folded weight (or whitened patches),
    the root's factors."""

    mean: Tensor
    deconv: Tensor
    folded: Tensor
    basis: Tensor
    spectrum: Tensor


def forward(
    stages: Stages,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geo: Geometry,
    eps: float,
    n_iter: int,
) -> tuple[Tensor, Saved, Tensor]:
    """A fresh step: the output, the rest of the forward, which running statistics are to count it ``(b)``."""
    with exact_products():
        mean, cov = stages.patch_moments(x, geo)
        news = tells(mean, cov)
        cov.diagonal(dim1=-2, dim2=-1).add_(eps)
        deconv, basis, spectrum = stages.inverse_sqrt(cov, n_iter)
    y, folded = stale_forward(stages, x, weight, bias, mean, deconv, geo)
    return y, Saved(mean, deconv, folded, basis, spectrum), news


def stale_forward(
    stages: Stages, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry
) -> tuple[Tensor, Tensor]:
    """With statistics ``(b, D)`` and ``(b, D, D)`` that are there already: the output, and the folded weight or what
    else was made of the root."""
    if whitens(stages, x, weight, geo):
        with exact_products():
            return stages.whiten_convolve(x, weight, bias, mean, deconv, geo)
    with exact_products():
        folded, shift = stages.fold(weight, bias, mean, deconv, geo)
    folded, shift = folded.to(x.dtype), shift.to(x.dtype)
    with _convolving(geo):
        return stages.convolve(x, folded, shift, geo), folded


def _convolving(geo: Geometry) -> AbstractContextManager[Any]:
    """Where a backend convolves by matrix products, the setting for matrix products is not meant: torch's own
    convolutions do not follow it. A linear layer is a matrix product."""
    return exact_products() if geo.kernel_size else nullcontext()


def backward(
    stages: Stages,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Saved,
    geo: Geometry,
    n_iter: int,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the input (None unless needed), the weight and the bias."""
    grad_x, grad_weight, grad_bias, grad_mean, grad_deconv = stale_backward(
        stages, grad, x, weight, saved.mean, saved.deconv, saved.folded, geo, need_x, need_x
    )
    if grad_x is not None and grad_mean is not None and grad_deconv is not None:
        with exact_products():
            grad_cov = stages.inverse_sqrt_backward(grad_deconv, saved.basis, saved.spectrum, n_iter)
            stages.patch_moments_backward_(grad_x, x, saved.mean, grad_mean, grad_cov, geo)
    return grad_x, grad_weight, grad_bias


def stale_backward(
    stages: Stages,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    deconv: Tensor,
    folded: Tensor,
    geo: Geometry,
    need_x: bool,
    need_statistics: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Back through convolution and fold: gradients of the input, the weight, the bias, the mean and the root (of the
    last two None unless needed; in a stale step they are constants)."""
    if whitens(stages, x, weight, geo):
        with exact_products():
            grad_x, grad_weight, grad_bias, grad_mean, grad_deconv = stages.whiten_convolve_backward(
                grad, x, weight, mean, deconv, folded, geo, need_x, need_statistics
            )
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_mean, grad_deconv
    with _convolving(geo):
        grad_x, grad_folded, grad_bias = stages.convolve_backward(grad, x, folded, geo, need_x)
    grad_folded, grad_bias = grad_folded.to(mean.dtype), grad_bias.to(mean.dtype)
    with exact_products():
        grad_weight, grad_mean, grad_deconv = stages.fold_backward(
            grad_folded, grad_bias, weight, mean, deconv, geo, need_statistics
        )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_mean, grad_deconv
