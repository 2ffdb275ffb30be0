"""What a layer would do with an input, and why."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from tdeconv.backends import choose


def explain(layer: nn.Module, x: Tensor) -> str:
    """Say which backend a layer would run ``x`` on, how each stage would be done, and why.

    Args:
        layer: a deconvolution layer.
        x: an input it accepts (its values are not read).

    Raises:
        TypeError: the layer is none of tdeconv's.
        BackendUnavailable: its backend was asked for by name and cannot run.
    """
    if not hasattr(layer, "running_deconv"):
        raise TypeError(f"layer must be a deconvolution layer, got {type(layer).__name__}")
    choice = choose(cast("str | None", layer.backend), x.device)
    return f"{type(layer).__name__}: backend {choice.backend!r}, {choice.reason}"
