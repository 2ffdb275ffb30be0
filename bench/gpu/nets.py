"""ResNet-50 and VGG-11 with batch norm: torchvision's where it can be imported, else the same written out here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tdeconv.vision import torchvision


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut: ``(N, inputs, H, W) -> (N, 4 * width, H/stride, W/stride)``."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu, self.shortcut = nn.ReLU(inplace=True), nn.Sequential()
        if stride > 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet(depths: Sequence[int], width: int = 64, classes: int = 1000) -> nn.Sequential:
    """``depths`` bottlenecks per resolution; ResNet-50 is (3, 4, 6, 3)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = width
    for level, depth in enumerate(depths):
        for i in range(depth):
            layers.append(Bottleneck(inputs, width << level, 2 if level and not i else 1))
            inputs = 4 * (width << level)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def vgg11(classes: int = 1000) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, pooled in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] * pooled
        inputs = outputs
    head = [nn.Linear(512 * 49, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    head += [nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4096, classes)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *head)


def tiny(classes: int = 10) -> nn.Sequential:
    """For the interpreter."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)),
    )


OWN: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: resnet((3, 4, 6, 3)),
    "vgg11": vgg11,
    "tiny": tiny,
}
PUBLIC = {"resnet50": "resnet50", "vgg11": "vgg11_bn"}
SIZE = {"tiny": 6}  # of the images; else 224


def build(network: str) -> tuple[nn.Module, str]:
    """The network with batch norm, random weights, and whose code it is."""
    try:
        package = torchvision() if network in PUBLIC else None
    except ImportError:
        package = None
    if package is None:
        return OWN[network](), "written out"
    return package.models.get_model(PUBLIC[network], weights=None), f"torchvision {package.__version__}"
