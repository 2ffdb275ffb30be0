"""Which networks are trained: public ones of every family, with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tdeconv.named_models import load_model


@dataclass(frozen=True)
class Network:
    """A network: what :func:`tdeconv.named_models.load_model` calls it, and its library's options.

    ``dense`` networks give scores of every pixel, in the entry ``"out"`` of a dictionary.
    """

    model: str
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, classes: int) -> nn.Module:
        """The network with random weights, as torch's seed gives them."""
        return load_model(self.model, num_classes=classes, **self.options)

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        """The model's scores: ``(N, classes)``, or ``(N, classes, H, W)`` of a dense network."""
        output = model(images)
        return output["out"] if self.dense else output


NETWORKS = {
    "resnet26": Network("timm:resnet26"),
    "resnet50": Network("timm:resnet50"),
    "regnety_002": Network("timm:regnety_002"),
    "resnext26ts": Network("timm:resnext26ts"),
    "densenet121": Network("timm:densenet121"),
    "mobilenetv2_100": Network("timm:mobilenetv2_100"),
    "mobilenetv3_small_100": Network("timm:mobilenetv3_small_100"),
    "efficientnet_b0": Network("timm:efficientnet_b0"),
    "vgg11_bn": Network("timm:vgg11_bn"),
    "resnet18": Network("torchvision:resnet18"),
    "googlenet": Network("torchvision:googlenet", options={"init_weights": False, "aux_logits": False}),
    "lraspp_mobilenet_v3_large": Network("torchvision:lraspp_mobilenet_v3_large", dense=True),
}
