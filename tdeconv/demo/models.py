"""The demo's networks, VGG-style and residual, with convolution + batch norm or with deconvolution layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from tdeconv.layers import Delinear, FastDeconv

METHODS = ("batch_norm", "deconvolution")


@dataclass(frozen=True)
class Line:
    """What is trained and drawn as one line: a method, with deconvolution at one ``stats_interval``."""

    method: str
    stats_interval: int = 1

    @property
    def name(self) -> str:
        return self.method if self.method == "batch_norm" else f"{self.method}_{self.stats_interval}"

    @property
    def title(self) -> str:
        return ", statistics ".join(self.heads) if self.heads[1] else self.heads[0]

    @property
    def heads(self) -> tuple[str, str]:
        """The title in two parts, for a narrow column."""
        if self.method == "batch_norm":
            return "batch norm", ""
        k = self.stats_interval
        return "deconvolution", f"every {ordinal(k)} step" if k > 1 else "every step"


def ordinal(number: int) -> str:
    """``"2nd"``, ``"10th"``."""
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


class Block(NamedTuple):
    """A residual block of two 3x3 convolutions, the first of them with the stride."""

    width: int
    stride: int = 1


@dataclass(frozen=True)
class Arch:
    """Widths of 3x3 convolutions, 0 for a 2x2 max pooling, blocks; and how many channels are whitened together."""

    plan: tuple[int | Block, ...]
    block: int = 64


ARCHS = {
    "slim": Arch((32, 0, 32, 64, 0, 128, 128), block=16),
    "resnet": Arch((32, Block(32), Block(64, 2), Block(128, 2)), block=16),
    "vgg11": Arch((64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)),
    "vgg13": Arch((64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)),
    "vgg16": Arch((64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)),
}


class Residual(nn.Module):
    """The body's output and the shortcut's, added, behind a ReLU."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def build(arch: str, line: Line, channels: int, classes: int) -> nn.Sequential:
    """A network of :data:`ARCHS`, or of its name, a hyphen and another block, for ``(N, channels, H, W)`` images of any
    size.

    All lines draw the same random numbers in the same order: after the same ``torch.manual_seed`` their weights
    and biases are equal. As in the paper, the first deconvolution takes 15 steps and freezes its statistics, since the
    images' never change; there is no normalisation behind a deconvolution, and the classifier is a Delinear. It takes
    statistics in every step at any interval: in a step in which no layer does, nothing holds the activations' size, and
    at the rates that normalised networks learn at, a few such steps in a row diverge.
    """
    name, _, block = arch.partition("-")
    plan = ARCHS[name].plan
    options: dict[str, Any] = {"block": int(block or ARCHS[name].block), "stats_interval": line.stats_interval}

    def convolution(width: int, out: int, kernel_size: int = 3, stride: int = 1, **more: Any) -> list[nn.Module]:
        shape: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": kernel_size // 2}
        if line.method == "batch_norm":
            return [nn.Conv2d(width, out, **shape), nn.BatchNorm2d(out)]
        return [FastDeconv(width, out, **shape, **options, **more)]

    def residual(width: int, out: int, stride: int) -> Residual:
        first = convolution(width, out, stride=stride)
        body = nn.Sequential(*first, nn.ReLU(inplace=True), *convolution(out, out))
        same = width == out and stride == 1
        return Residual(body, nn.Identity() if same else nn.Sequential(*convolution(width, out, 1, stride)))

    layers: list[nn.Module] = []
    width = channels
    for part in plan:
        if isinstance(part, Block):
            layers.append(residual(width, part.width, part.stride))
            width = part.width
        elif part == 0:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        else:
            first = {} if layers or line.method == "batch_norm" else {"n_iter": 15, "freeze": True}
            layers += [*convolution(width, part, **first), nn.ReLU(inplace=True)]
            width = part
    linear = nn.Linear(width, classes) if line.method == "batch_norm" else Delinear(width, classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
