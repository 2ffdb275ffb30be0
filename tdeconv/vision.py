"""torchvision, also beside a PyTorch that its compiled operators were not built for."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch

_declared: list[Any] = []  # a library's declarations live as long as it does


def declare_operators() -> None:
    """Declare the operators that torchvision describes, where its library could not be loaded and has not done so.

    Built for another PyTorch (CUDA's beside a CPU one), torchvision fails at import, because it describes operators
    that do not exist. Their names are all that its models and data sets need.
    """
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)


class _Descriptions:
    """Looks on while modules are imported: torchvision describes its operators after it has tried to load them."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision._meta_registrations":
            declare_operators()


def torchvision() -> Any:
    """The package, whichever PyTorch it was built for.

    Raises:
        ImportError: it is not installed.
        RuntimeError: it cannot be imported for another reason.
    """
    sys.meta_path.insert(0, _Descriptions)
    try:
        return import_module("torchvision")
    finally:
        sys.meta_path.remove(_Descriptions)
