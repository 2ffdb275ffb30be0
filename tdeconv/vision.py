"""torchvision, also beside a PyTorch that its compiled operators were not built for."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch

_declared: list[Any] = []  # a library's declarations live as long as it does


def torchvision() -> Any:
    """The package. Built for another PyTorch (CUDA's beside a CPU one) it fails at import: it describes operators that
    were not loaded. Their names are then declared, which is all that its models and data sets need.

    Raises:
        ImportError: it is not installed.
        RuntimeError: it cannot be imported for another reason.
    """
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return import_module("torchvision")
