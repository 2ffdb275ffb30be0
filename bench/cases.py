"""What is measured: layers of real networks, and inputs that look like what reaches them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = 128


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution with padding 1 on ``(N, in_channels, size, size)``.

    ``count`` is how often the network has it: sums over layers count it so often. ``input_grad`` is False for a
    network's first layer, whose input is data: no implementation then computes a gradient for it.
    """

    in_channels: int
    out_channels: int
    size: int
    count: int = 1
    input_grad: bool = True

    @property
    def name(self) -> str:
        return f"{self.in_channels}-{self.out_channels}-{self.size}x{self.size}"


# VGG-11 on 32x32 images (CIFAR)
VGG11 = (
    Layer(3, 64, 32, input_grad=False),
    Layer(64, 128, 16),
    Layer(128, 256, 8),
    Layer(256, 256, 8),
    Layer(256, 512, 4),
    Layer(512, 512, 4),
    Layer(512, 512, 2, count=2),
)
BY_NAME = {layer.name: layer for layer in VGG11}


def activations(layer: Layer, batch: int, seed: int = 0) -> Tensor:
    """A float32 input ``(batch, C, size, size)`` with the correlation of real ones.

    Neighbouring pixels and channels repeat each other, as in images and features; behind the first layer a ReLU has
    been. White noise would be the easy case: its covariance is near the identity already.
    """
    generator = torch.Generator().manual_seed(seed)
    c, n = layer.in_channels, layer.size
    coarse = torch.randn(batch, c, max(1, n // 2), max(1, n // 2), generator=generator)
    x = F.interpolate(coarse, size=(n, n), mode="bilinear") + 0.3 * torch.randn(batch, c, n, n, generator=generator)
    mix = torch.eye(c) + torch.randn(c, c, generator=generator) / c**0.5
    x = torch.einsum("dc,nchw->ndhw", mix, x)
    return (x.relu() if layer.input_grad else x).contiguous()
