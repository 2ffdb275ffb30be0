"""The demo's networks: one VGG-style plan, with convolution + batch norm or with deconvolution layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tdeconv.layers import Delinear, FastDeconv

METHODS = ("batch_norm", "deconvolution")
TITLES = {"batch_norm": "batch norm", "deconvolution": "network deconvolution"}


@dataclass(frozen=True)
class Arch:
    """Widths of the 3x3 convolutions, 0 for a 2x2 max pooling, and the block of channels whitened together."""

    plan: tuple[int, ...]
    block: int = 64


ARCHS = {
    "slim": Arch((32, 0, 32, 64, 0, 128, 128), block=16),
    "vgg11": Arch((64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)),
    "vgg13": Arch((64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)),
    "vgg16": Arch((64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)),
}


def build(arch: str, method: str, channels: int, classes: int) -> nn.Sequential:
    """A network of :data:`ARCHS` for ``(N, channels, H, W)`` images of any size, by one of :data:`METHODS`.

    Both methods draw the same random numbers in the same order: after the same ``torch.manual_seed`` their weights
    and biases are equal. As in the paper, the first deconvolution takes 15 steps and freezes its statistics, since the
    images' never change; there is no normalisation behind a deconvolution, and the classifier is a Delinear.
    """
    plan, block = ARCHS[arch].plan, ARCHS[arch].block
    layers: list[nn.Module] = []
    width = channels
    for out in plan:
        if out == 0:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        if method == "batch_norm":
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out)]
        elif not layers:
            layers.append(FastDeconv(width, out, 3, padding=1, block=block, n_iter=15, freeze=True))
        else:
            layers.append(FastDeconv(width, out, 3, padding=1, block=block))
        layers.append(nn.ReLU(inplace=True))
        width = out
    linear = nn.Linear(width, classes) if method == "batch_norm" else Delinear(width, classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
