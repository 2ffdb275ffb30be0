"""The formulas of network deconvolution in plain PyTorch: slow, any float dtype, differentiated by autograd.

Source: Ye et al., *Network Deconvolution*, ICLR 2020. Each function is one stage of the layer,

    patch_moments -> inverse_sqrt -> fold -> convolve,

and :func:`deconvolve` is all of them. The fast backends are tested against this file, which is written to be
read beside the paper and optimises nothing.

Shapes: input ``x (N, C, *spatial)``, weight ``(O, C/groups, *kernel)``; ``b`` covariances (``groups``, or 1) of ``D``
features each: mean ``(b, D)``, covariance and its inverse root ``(b, D, D)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tdeconv import transforms
from tdeconv.geometry import Geometry
from tdeconv.layout import beside
from tdeconv.precision import statistics_dtype
from tdeconv.products import product
from tdeconv.running import tells


def im2col(x: Tensor, geo: Geometry) -> Tensor:
    """Sampled patches as rows ``(M, C*kh*kw)``, columns channel-major: ``j = (c*kh + ki)*kw + kj``."""
    rank = len(geo.kernel_size)
    if geo.pointwise:
        pixels = x.movedim(1, -1).reshape(-1, geo.channels)
        step = 1
        for s in geo.sample_stride:
            step *= s
        return pixels[::step]
    x = F.pad(x, [p for p in reversed(geo.padding) for _ in range(2)])
    for axis in range(rank):
        x = x.unfold(2 + axis, geo.window[axis], geo.sample_stride[axis])[..., :: geo.dilation[axis]]
    # (N, C, *positions, *kernel) -> (N, *positions, C, *kernel)
    return x.movedim(1, 1 + rank).reshape(-1, geo.channels * geo.taps)


def to_vectors(rows: Tensor, geo: Geometry) -> Tensor:
    """Split each row of ``(R, C*kh*kw)`` into its vectors: ``(b, R*G, D)``."""
    r = rows.shape[0]
    if geo.groups > 1:
        return rows.reshape(r, geo.groups, geo.features).transpose(0, 1)
    if geo.interleaved:
        return rows.reshape(r, geo.features, geo.pooled).transpose(1, 2).reshape(1, -1, geo.features)
    return rows.reshape(1, r * geo.pooled, geo.features)


def weight_vectors(weight: Tensor, geo: Geometry) -> Tensor:
    """The weight's rows, split as the patches are: ``(b, (O/groups)*G, D)``."""
    if geo.groups > 1:
        return weight.reshape(geo.groups, -1, geo.features)
    return to_vectors(weight.reshape(weight.shape[0], -1), geo)


def weight_from_vectors(vectors: Tensor, geo: Geometry, shape: torch.Size) -> Tensor:
    """Inverse of :func:`weight_vectors`."""
    if geo.interleaved:
        vectors = vectors.reshape(-1, geo.pooled, geo.features).transpose(1, 2)
    return vectors.reshape(shape)


def patch_moments(x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """Mean ``(b, D)`` and biased covariance ``(b, D, D)`` of the sampled patches."""
    vectors = to_vectors(im2col(x.to(statistics_dtype(x.dtype)), geo), geo)
    mean = vectors.mean(1)
    centred = vectors - mean.unsqueeze(1)
    return mean, product(centred.mT, centred) / vectors.shape[1]


def inverse_sqrt(cov: Tensor, n_iter: int) -> Tensor:
    """``n_iter`` coupled Newton-Schulz steps from ``Cov / ||Cov||_F``, as the paper's code takes them."""
    norm = torch.linalg.matrix_norm(cov, keepdim=True)
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    y, z = cov / norm, eye
    for _ in range(n_iter):
        t = (3 * eye - product(z, y)) / 2
        y, z = product(y, t), product(t, z)
    return z / norm.sqrt()


class _ConvergedInverseSqrt(torch.autograd.Function):
    """eigh's own derivative divides by differences of eigenvalues, and is NaN where they repeat. The root's needs no
    more than sums: with ``r`` the roots of the eigenvalues, its divided differences are ``-1 / (r_i r_j (r_i + r_j))``.
    The derivative is a self-adjoint map: the same formula takes tangents forward and gradients back.
    """

    @staticmethod
    def forward(cov: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(cov)
        return product(vectors * values.rsqrt().unsqueeze(-2), vectors.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(ctx.saved_tensors[0])
        roots = values.sqrt()
        ri, rj = roots.unsqueeze(-1), roots.unsqueeze(-2)
        inner = product(product(vectors.mT, direction + direction.mT), vectors) / (-2 * ri * rj * (ri + rj))
        return product(product(vectors, inner), vectors.mT)


class _TransformableInverseSqrt(_ConvergedInverseSqrt):
    """The same under transforms and in forward mode; a class of its own, as torch.compile cannot go through it."""

    generate_vmap_rule = True
    jvp = _ConvergedInverseSqrt.backward


def converged_inverse_sqrt(cov: Tensor) -> Tensor:
    """The inverse square root itself, by eigendecomposition."""
    function = _TransformableInverseSqrt if transforms.transformed() else _ConvergedInverseSqrt
    return function.apply(cov)  # type: ignore[no-untyped-call]


def fold(weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """``W'_g = W_g S`` and ``b' = b - sum_g W'_g mu``, in the statistics' dtype."""
    folded = product(weight_vectors(weight.to(deconv.dtype), geo), deconv)
    shift = product(folded, mean.unsqueeze(-1)).reshape(weight.shape[0], -1).sum(1)
    return (
        weight_from_vectors(folded, geo, weight.shape),
        -shift if bias is None else bias.to(deconv.dtype) - shift,
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor, geo: Geometry) -> Tensor:
    """The convolution at full resolution (a linear map at spatial rank 0), in the input's dtype."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if not geo.kernel_size:
        return F.linear(x, weight, bias)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(geo.kernel_size) - 1]
    return conv(x, beside(x, weight), bias, geo.stride, geo.padding, geo.dilation, geo.groups)


def deconvolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geo: Geometry,
    eps: float,
    n_iter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer in training: ``(y, mean (b, D), deconv (b, D, D), news (b))``.

    ``news`` says which running statistics these are to be counted in.
    """
    mean, cov = patch_moments(x, geo)
    news = tells(mean, cov)
    eye = torch.eye(geo.features, dtype=cov.dtype, device=cov.device)
    deconv = inverse_sqrt(cov + eps * eye, n_iter)
    return convolve(x, *fold(weight, bias, mean, deconv, geo), geo), mean, deconv, news
