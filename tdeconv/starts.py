"""Where a converted convolution starts from: the scale and shift that its batch norm gave its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdeconv.plan import num_features


def take_affine(layer: Any, norm: nn.Module) -> None:
    """Give a deconvolution layer the batch norm's weight and bias: ``w_o <- gamma_o w_o / |w_o|``, ``b <- beta``.

    Whitened patches have a variance of 1 in every direction, so that an output's deviation is its weight's norm, which
    batch norm divided out. A ``gamma`` of zero, with which a residual branch starts, starts it here as well.

    Args:
        layer: changed in place: its weight ``(O, C/groups, *kernel)`` and bias ``(O)``.
        norm: behind it, of O features.
    """
    gamma, beta = _affine(norm, layer.weight)
    with torch.inference_mode(layer.weight.is_inference()), torch.no_grad():
        weight = layer.weight
        size = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        scale = torch.where(size == 0, 0, gamma / torch.where(size == 0, 1, size))
        weight.mul_(scale.view(-1, *(1,) * (weight.ndim - 1)))
        layer.bias.copy_(beta)


def _affine(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The batch norm's ``gamma`` and ``beta (O)``; 1 and 0 where it has none."""
    n = num_features(norm)
    gamma = torch.ones(n) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros(n) if norm.bias is None else norm.bias.detach()
    return gamma.to(like), beta.to(like)
