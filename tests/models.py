"""Public models for the tests of conversion: torchvision's and timm's, the smallest of each family, without weights."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tdeconv.vision import torchvision


def timm() -> Any:
    torchvision()  # timm imports it
    return importlib.import_module("timm")


@dataclass(frozen=True)
class Public:
    """A model: the shape of its inputs, how many, and how many convolutions and batch norms conversion leaves.

    ``slow`` keeps it out of the default run. ``left`` says what is left and why it has to be.
    """

    shape: tuple[int, ...] = (8, 3, 64, 64)
    inputs: int = 1
    left: int = 0
    slow: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # of the model
    convert: dict[str, Any] = field(default_factory=dict)  # of convert_deconv


VIDEO = (2, 3, 4, 32, 32)
# A 3x3x3 kernel of 64 channels has 1728 columns, whose covariance takes a CPU seconds to decompose.
NARROW = {"block": 16}

TORCHVISION = {
    "vgg11_bn": Public(),
    "resnet18": Public(slow=False),
    "resnet50": Public(),
    "resnext50_32x4d": Public(),
    "wide_resnet50_2": Public(),
    "densenet121": Public(),
    "mobilenet_v2": Public(slow=False),
    "mobilenet_v3_small": Public(),
    "mnasnet0_5": Public(),
    "efficientnet_b0": Public(),
    "efficientnet_v2_s": Public(),
    "googlenet": Public(slow=False, options={"init_weights": False}),
    "inception_v3": Public((4, 3, 96, 96), options={"init_weights": False, "aux_logits": False}),
    "shufflenet_v2_x0_5": Public(),
    "regnet_x_400mf": Public(),
    "regnet_y_400mf": Public(),
    "maxvit_t": Public((2, 3, 224, 224)),
    "deeplabv3_resnet50": Public((4, 3, 64, 64)),
    "fcn_resnet50": Public((4, 3, 64, 64)),
    "lraspp_mobilenet_v3_large": Public(),
    "r3d_18": Public(VIDEO, convert=NARROW),
    "mc3_18": Public(VIDEO, convert=NARROW),
    "r2plus1d_18": Public(VIDEO),
    "s3d": Public((1, 3, 14, 224, 224)),
    "raft_large": Public((1, 3, 128, 128), inputs=2),
    # without batch norm
    "alexnet": Public(),
    "squeezenet1_1": Public(),
    "convnext_tiny": Public(),
}

TIMM = {
    "resnet10t": Public(),
    "resnet26": Public(),
    "resnet18d": Public(),
    "resnetblur18": Public(),
    "seresnet18": Public(),
    "legacy_seresnet18": Public(),
    "seresnext26d_32x4d": Public(),
    "skresnet18": Public(),
    "resnext26ts": Public(),
    "res2net50_14w_8s": Public(),
    "resnetv2_18": Public(slow=False, left=1),  # the last batch norm normalises a sum for the classifier
    "dpn48b": Public(left=1),  # the same
    "densenet121": Public(),
    "cspresnet50": Public(),
    "cspresnext50": Public(),
    "cspdarknet53": Public(),
    "darknet53": Public(),
    "dla34": Public(),
    "hrnet_w18_small": Public(),
    "gernet_s": Public(),
    "tresnet_m": Public(),
    "selecsls42": Public(),
    "ese_vovnet19b_dw": Public(),
    "hgnet_tiny": Public(),
    "hgnetv2_b0": Public(),
    "xception41": Public(),
    "legacy_xception": Public(),
    "inception_v3": Public((4, 3, 96, 96)),
    "inception_v4": Public((4, 3, 96, 96)),
    "inception_resnet_v2": Public((4, 3, 96, 96)),
    "pnasnet5large": Public((4, 3, 96, 96), left=28),  # Conv2dSame, and the batch norms behind three of these
    "lambda_resnet26t": Public(),
    "convmixer_768_32": Public(),
    "mobilenetv1_100": Public(),
    "mobilenetv2_035": Public(),
    "mobilenetv3_small_050": Public(),
    "mobilenetv4_conv_small": Public(),
    "mobilenet_edgetpu_v2_xs": Public(),
    "efficientnet_b0": Public(slow=False),
    "efficientnet_es": Public(),
    "tf_efficientnet_b0": Public(left=10),  # Conv2dSame, and the batch norms behind them
    "tinynet_e": Public(),
    "mixnet_s": Public(),
    "mnasnet_small": Public(),
    "semnasnet_075": Public(),
    "fbnetc_100": Public(),
    "spnasnet_100": Public(),
    "hardcorenas_a": Public(),
    "ghostnet_050": Public(),
    "ghostnetv2_100": Public(),
    "lcnet_035": Public(),
    "lcnetv2_base": Public(),
    "rexnet_100": Public(),
    "regnetx_002": Public(slow=False),
    "regnety_002": Public(),
    "regnetz_005": Public(),
    "repvgg_a0": Public(left=17),  # batch norms of branches without a convolution, summed with others
    "mobileone_s0": Public(left=35),  # the same
    "repvit_m0_9": Public(left=25),  # batch norms of sums
    "starnet_s1": Public(left=1),  # the last batch norm normalises a sum for the classifier
    "fasternet_t0": Public(),
}

PUBLIC = {
    **{f"torchvision.{name}": public for name, public in TORCHVISION.items()},
    **{f"timm.{name}": public for name, public in TIMM.items()},
}


def build(name: str) -> nn.Module:
    """The model with random weights, and 10 classes where it has classes."""
    package, _, model = name.partition(".")
    options = {"num_classes": 10, **PUBLIC[name].options}
    if package == "timm":
        return timm().create_model(model, **options)
    builder = torchvision().models.get_model_builder(model)
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    return builder(weights=None, **({} if model.startswith("raft") else options))


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output: a tensor, or a dict or sequence of such outputs."""
    if isinstance(output, Tensor):
        return [output]
    return [t for item in (output.values() if isinstance(output, dict) else output) for t in tensors(item)]
