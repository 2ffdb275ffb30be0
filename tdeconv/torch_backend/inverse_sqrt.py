"""Second stage: the inverse root, exactly the n-step Newton-Schulz polynomial of the covariance.

On a CPU an eigendecomposition costs less than the products of the iteration: the polynomial is then a scalar
recurrence on the eigenvalues, ``S = V q(L) V^T``, and its gradient ``V (F o (V^T grad V)) V^T`` with F the divided
differences of q. Those follow the same recurrence, with no division, so near-equal eigenvalues stay exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdeconv.running import all_finite
from tdeconv.torch_backend import gemm, newton_schulz, symmetric

# Fewer steps than this, or a smaller matrix, take products for less than a decomposition costs; so does a batch, which
# LAPACK decomposes one by one.
_EIGH_STEPS = 3
_EIGH_FEATURES = 16
# More steps than this amplify float32's rounding of small eigenvalues (decompose in float64) and make products dear.
_FEW_STEPS = 7


def uses_eigh(device: torch.device, batch: int, features: int, n_iter: int) -> bool:
    """Whether the root comes from an eigendecomposition: on a CPU, where that was measured faster than products."""
    one = batch == 1 and features >= _EIGH_FEATURES and n_iter >= _EIGH_STEPS
    return device.type == "cpu" and (one or n_iter > _FEW_STEPS)


def decomposition_dtype(device: torch.device, dtype: torch.dtype, n_iter: int) -> torch.dtype:
    """What the root of a covariance of ``dtype`` is computed in."""
    return torch.float64 if device.type == "cpu" and n_iter > _FEW_STEPS else dtype


def _scalars(values: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """Normalised eigenvalues' ``z_n``, and the norms ``(b, 1)``; ``values (b, D)``."""
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    a, z = values / norm, torch.ones_like(values)
    for _ in range(n_iter):
        z = z * (1.5 - 0.5 * a * z * z)
    return z, norm


def _divided_differences(a: Tensor, n_iter: int) -> Tensor:
    """``(z_n(a_i) - z_n(a_j)) / (a_i - a_j)``, or ``z_n'(a_i)`` where they are equal, as ``(b, D, D)``.

    By their product rule, ``[fg] = f_i [g] + [f] g_j``, applied to ``z t`` and ``t = (3 - a z z)/2``. With ``a`` in
    ascending order that damps rounding errors above the diagonal and would amplify them below, so the half above is
    mirrored.
    """
    z = 1.5 - 0.5 * a
    diff = a.new_full((*a.shape, a.shape[-1]), -0.5)  # of the first step, z = (3 - a)/2
    half = (-0.5 * a).unsqueeze(-1)
    for _ in range(n_iter - 1):
        zi, zj = z.unsqueeze(-1), z.unsqueeze(-2)
        t = 1.5 - 0.5 * a * z * z
        diff_t = torch.addcmul(-0.5 * zj * zj, half, (zi + zj).mul_(diff))
        diff = diff_t.mul_(zi).addcmul_(diff, t.unsqueeze(-2))
        z = z * t
    return diff.triu().add_(diff.triu(1).mT)


def inverse_sqrt_saved(cov: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    dtype = decomposition_dtype(cov.device, cov.dtype, n_iter)
    return cov.new_empty(cov.shape, dtype=dtype), cov.new_empty(cov.shape[:-1], dtype=dtype)


def _eigh(cov: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and vectors, or None where LAPACK does not converge or the matrix is not finite."""
    if not all_finite(cov):
        return None
    try:
        return torch.linalg.eigh(cov)
    except torch.linalg.LinAlgError:
        return None


def inverse_sqrt(cov: Tensor, n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The root; then eigenvectors (as rows) and eigenvalues, or, of a root by products, the covariance and infinity."""
    work = cov.to(decomposition_dtype(cov.device, cov.dtype, n_iter))
    eigen = _eigh(work) if uses_eigh(work.device, work.shape[0], work.shape[1], n_iter) else None
    if eigen is None:
        root = newton_schulz.inverse_sqrt(work, n_iter)
        basis = work.clone() if work is cov else work
        return root.to(cov.dtype), basis, work.new_full(work.shape[:-1], torch.inf)
    values, vectors = eigen
    z, norm = _scalars(values, n_iter)
    rows = vectors.mT.contiguous()  # LAPACK's vectors are columns: as rows they lie in order
    half = rows * (z / norm.sqrt()).sqrt().unsqueeze(-1)
    return symmetric.product(half.mT, half).to(cov.dtype), rows, values


def inverse_sqrt_backward(grad: Tensor, basis: Tensor, spectrum: Tensor, n_iter: int) -> Tensor:
    dtype, grad = grad.dtype, grad.to(basis.dtype)
    if not uses_eigh(basis.device, basis.shape[0], basis.shape[1], n_iter) or spectrum.isinf().any():
        return newton_schulz.inverse_sqrt_backward(grad, basis, n_iter).to(dtype)
    z, norm = _scalars(spectrum, n_iter)
    inner = symmetric.product(basis, gemm.product((grad + grad.mT).div_(2), basis.mT))
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    norm_share = (z * diagonal).sum(-1, keepdim=True)
    inner.mul_(_divided_differences(spectrum / norm, n_iter)).mul_(norm.unsqueeze(-1) ** -1.5)
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    # the norm n takes part: S = q(L / n) / sqrt(n) and dn = sum(L dL) / n
    along = -(spectrum * diagonal).sum(-1, keepdim=True) / norm - 0.5 * norm**-1.5 * norm_share
    diagonal += along * spectrum / norm
    return symmetric.product(gemm.product(basis.mT, inner), basis).to(dtype)
