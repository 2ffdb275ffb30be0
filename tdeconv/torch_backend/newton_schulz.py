"""The n-step Newton-Schulz polynomial by products, two steps at a time, with its gradient as a tangent.

``M = Z Y`` stays a polynomial of the normalised covariance A, and two steps multiply Z by
``q(M) = (36 - 39M + 27M^2 - 9M^3 + M^4) / 16``, which takes two products. Starting from ``Z = I`` this needs 10
products for n = 5, where the coupled iteration takes 15, and is the same polynomial.
The gradient of a polynomial of a symmetric matrix is its own tangent: ``grad_A = dp(A)[sym(grad)]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdeconv.torch_backend import gemm


class Jet(NamedTuple):
    """A symmetric matrix and, where the gradient is wanted, its tangent; both ``(b, D, D)``."""

    value: Tensor
    tangent: Tensor | None = None

    def times(self, other: Jet) -> Jet:
        value = gemm.product(self.value, other.value)
        if self.tangent is None or other.tangent is None:
            return Jet(value)
        tangent = gemm.product(self.tangent, other.value)
        return Jet(value, gemm.add_product_(tangent, self.value, other.tangent))

    def scale(self, factor: float) -> Jet:
        return Jet(self.value * factor, None if self.tangent is None else self.tangent * factor)

    def plus(self, other: Jet, factor: float = 1.0) -> Jet:
        value = torch.add(self.value, other.value, alpha=factor)
        if self.tangent is None or other.tangent is None:
            return Jet(value)
        return Jet(value, torch.add(self.tangent, other.tangent, alpha=factor))

    def plus_identity(self, factor: float) -> Jet:
        eye = torch.eye(self.value.shape[-1], dtype=self.value.dtype, device=self.value.device)
        return Jet(torch.add(self.value, eye, alpha=factor), self.tangent)


def polynomial(a: Jet, n_iter: int) -> Jet:
    """``Z_n`` of the Newton-Schulz iteration from ``Y_0 = A``, ``Z_0 = I``."""
    z, m = None, a
    steps = [2] * (n_iter // 2) + [1] * (n_iter % 2)
    for i, step in enumerate(steps):
        if step == 1:
            factor = m.scale(-0.5).plus_identity(1.5)
        else:
            b = m.times(m)
            inner = b.plus(m, -9).plus_identity(27)
            factor = b.times(inner).plus(m, -39).plus_identity(36).scale(1 / 16)
        z = factor if z is None else z.times(factor)
        if i + 1 < len(steps):
            m = factor.times(m).times(factor)
    assert z is not None
    return z


def inverse_sqrt(cov: Tensor, n_iter: int) -> Tensor:
    norm = torch.linalg.matrix_norm(cov, keepdim=True)
    return polynomial(Jet(cov / norm), n_iter).value / norm.sqrt()


def inverse_sqrt_backward(grad: Tensor, cov: Tensor, n_iter: int) -> Tensor:
    norm = torch.linalg.matrix_norm(cov, keepdim=True)
    grad = (grad + grad.mT) / 2
    z, tangent = polynomial(Jet(cov / norm, grad), n_iter)
    assert tangent is not None
    scaled = tangent / norm.sqrt()
    # the norm's share: S = p(C / norm) / sqrt(norm)
    along = -(scaled * cov).sum((-2, -1), keepdim=True) / norm**2
    along = along - 0.5 * (grad * z).sum((-2, -1), keepdim=True) * norm**-1.5
    return scaled / norm + along * cov / norm
