"""What is measured: layers of real networks, and inputs that look like what reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Layer:
    """A convolution with padding ``kernel // 2`` on ``(N, in_channels, size, size)``, and the deconvolution's options.

    ``count`` is how often the network has it: sums over layers count it so often. ``input_grad`` is False for a
    network's first layer, whose input is data: no implementation then computes a gradient for it.
    """

    in_channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    count: int = 1
    input_grad: bool = True
    groups: int = 1
    block: int = 64
    n_iter: int = 5
    sampling_stride: int = 3
    network: str = "vgg11"

    @property
    def name(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.in_channels}-{self.out_channels} {self.kernel}x{self.kernel}{stride}{groups} at {self.size}"

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1


def vgg11(image: int = 32) -> tuple[Layer, ...]:
    """VGG-11's distinct convolutions on square images of so many pixels."""
    return _distinct(_vgg11(image))


def _vgg11(image: int) -> Iterator[Layer]:
    channels, size = 3, image
    for width, pooled in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        yield Layer(channels, width, size, input_grad=channels > 3)
        channels, size = width, max(1, size >> pooled)


def resnet50(image: int = 64) -> tuple[Layer, ...]:
    """ResNet-50's distinct convolutions on square images of so many pixels."""
    return _distinct(_resnet50(image))


def _resnet50(image: int) -> Iterator[Layer]:
    first = Layer(3, 64, image, kernel=7, stride=2, input_grad=False, network="resnet50")
    yield first
    channels, size = 64, (first.out_size + 1) // 2
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            strided = Layer(width, width, size, stride=1 if block else stride, network="resnet50")
            yield Layer(channels, width, size, kernel=1, network="resnet50")
            yield strided
            yield Layer(width, 4 * width, strided.out_size, kernel=1, network="resnet50")
            if block == 0:
                yield Layer(channels, 4 * width, size, kernel=1, stride=stride, network="resnet50")
            channels, size = 4 * width, strided.out_size


def _distinct(layers: Iterator[Layer]) -> tuple[Layer, ...]:
    """Each once, with how often it came."""
    counts: dict[Layer, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    return tuple(Layer(**{**vars(layer), "count": count}) for layer, count in counts.items())


NETWORKS = {"vgg11": vgg11, "resnet50": resnet50}
IN_TORCHVISION = {"vgg11": "vgg11_bn"}  # where the name there is another


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
