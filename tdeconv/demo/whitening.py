"""What deconvolution does to photographs, as numbers: the paper's exhibits before they are drawn.

A convolution whose weight is the identity (each channel copied from the patch's centre), folded with the patches'
statistics, shows every pixel as the whitened patch sees it. Its folded weight holds the deconvolution kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdeconv.functional import fold_deconv, inverse_sqrt, patch_moments


def pooled_moments(pictures: Sequence[Tensor], kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Mean ``(D)`` and biased covariance ``(D, D)`` of all pictures' patches, float64; pictures ``(C, H, W)``."""
    parts = []
    for picture in pictures:
        count = math.prod((length - kernel_size) // stride + 1 for length in picture.shape[1:])
        mean, cov = patch_moments(picture.unsqueeze(0), kernel_size, stride=stride)
        parts.append((count, mean.double(), cov.double()))
    total = sum(count for count, _, _ in parts)
    mean = torch.stack([m * (count / total) for count, m, _ in parts]).sum(0)
    cov = torch.stack([(c + torch.outer(m - mean, m - mean)) * (count / total) for count, m, c in parts]).sum(0)
    return mean, cov


@dataclass(frozen=True)
class PixelDeconvolution:
    """Deconvolution of single pixels from the patch around them.

    Attributes:
        kernels: ``(C, C, k, k)``: output channel, input channel, place.
        bias: ``(C)``.
        n_iter, eps: Newton-Schulz steps, and what was added to the covariance's diagonal.
    """

    kernels: Tensor
    bias: Tensor
    n_iter: int
    eps: float

    def __call__(self, picture: Tensor) -> Tensor:
        """Deconvolve a ``(C, H, W)`` picture, at the places whose patch lies inside it."""
        return F.conv2d(picture.unsqueeze(0), self.kernels, self.bias).squeeze(0)


def pixel_deconvolution(
    pictures: Sequence[Tensor], kernel_size: int = 15, n_iter: int = 15, eps: float = 1e-3, stride: int = 5
) -> PixelDeconvolution:
    """The deconvolution kernels of pictures ``(C, H, W)``, values in [0, 1], from every ``stride``-th patch."""
    channels = pictures[0].shape[0]
    mean, cov = pooled_moments(pictures, kernel_size, stride)
    deconv = inverse_sqrt(cov + eps * torch.eye(len(cov), dtype=cov.dtype), n_iter)
    identity = nn.init.dirac_(torch.empty(channels, channels, kernel_size, kernel_size, dtype=cov.dtype))
    kernels, bias = fold_deconv(identity, None, mean, deconv)
    return PixelDeconvolution(kernels.float(), bias.float(), n_iter, eps)


@dataclass(frozen=True)
class PatchWhitening:
    """The covariance of patches of ``D = C*k*k`` values before and after, all ``(D, D)``.

    Attributes:
        cov: of the patches.
        deconv: its inverse square root by ``n_iter`` steps.
        whitened: of the patches times ``deconv``.
        few: of the patches times the root by ``few_steps`` steps, as the layers behind the first take.
    """

    channels: int
    n_iter: int
    few_steps: int
    cov: Tensor
    deconv: Tensor
    whitened: Tensor
    few: Tensor


def patch_whitening(
    images: Tensor, kernel_size: int = 3, n_iter: int = 15, few_steps: int = 5, eps: float = 1e-5
) -> PatchWhitening:
    """How the first layer whitens images ``(N, C, H, W)``, as it gets them."""
    _, cov = patch_moments(images.double(), kernel_size)
    deconv, few = (inverse_sqrt(cov + eps * torch.eye(len(cov), dtype=cov.dtype), n) for n in (n_iter, few_steps))
    return PatchWhitening(images.shape[1], n_iter, few_steps, cov, deconv, deconv @ cov @ deconv, few @ cov @ few)


@dataclass(frozen=True)
class Density:
    """A density of values scaled to mean 0 and variance 1: bin centres and heights, and the excess kurtosis."""

    centres: Tensor
    height: Tensor
    kurtosis: float


def density(values: Tensor, reach: float = 10.0, bins: int = 200) -> Density:
    """The histogram of all values within ``reach`` standard deviations, as a density over all of them."""
    z = values.flatten().double()
    z = (z - z.mean()) / z.std()
    counts, edges = torch.histogram(z, bins, range=(-reach, reach))
    width = edges[1] - edges[0]
    return Density((edges[1:] + edges[:-1]) / 2, counts / (len(z) * width), float((z**4).mean() - 3))
