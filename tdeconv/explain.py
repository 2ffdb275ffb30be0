"""What a layer would do with an input, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdeconv import ops
from tdeconv.backends import choose
from tdeconv.channel_deconv import ChannelDeconv
from tdeconv.geometry import Geometry
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d


def explain(layer: nn.Module, x: Tensor) -> str:
    """Say which backend a layer would run ``x`` on in training, how each stage would be done, and why.

    The stages are those of a step that takes statistics, whichever kind the next step is.

    Args:
        layer: a deconvolution layer.
        x: an input it accepts, with a batch axis (its values are not read).

    Returns:
        Text: the backend and the reason for it; in which steps statistics are taken, if not in all; a line for each
        stage.

    Raises:
        TypeError: the layer is none of tdeconv's.
        BackendUnavailable: its backend was asked for by name and cannot run.
    """
    if not isinstance(layer, (FastDeconv, FastDeconv1d, FastDeconv3d, Delinear, ChannelDeconv)):
        raise TypeError(f"layer must be one of tdeconv's deconvolution layers, got {type(layer).__name__}")
    choice = choose(layer.backend, x.device)
    lines = [f"{type(layer).__name__}: backend {choice.backend!r} ({choice.reason})"]
    if layer._places:
        lines.append(f"  {layer.describe_schedule()}")
    if isinstance(layer, ChannelDeconv):
        return "\n".join(lines)
    x, geo, n_iter = layer.in_training(x)
    lines.append(f"  samples: {_samples(geo, x)}; Newton-Schulz steps: {n_iter}{_why(layer, geo, n_iter)}")
    if choice.backend != "reference":
        stages = ops.stages(choice.backend).describe(x, layer.weight, geo, n_iter)
        lines += [f"  {stage}: {how}" for stage, how in stages.items()]
    return "\n".join(lines)


def _samples(geo: Geometry, x: Tensor) -> str:
    samples = geo.patches(x.shape[0], tuple(x.shape[2:])) * geo.pooled
    return f"{samples} of {geo.features} features, {samples / geo.features:.3g} for each"


def _why(layer: Any, geo: Geometry, n_iter: int) -> str:
    """What ``samples_per_feature`` has changed."""
    changed = []
    if n_iter < layer.n_iter:
        changed.append(f"not {layer.n_iter}, for want of samples")
    if geo.sampling_stride < (stride := getattr(layer, "sampling_stride", 1)):
        changed.append(f"sampled at a stride of {geo.sampling_stride}, not {stride}, for more samples")
    return f" ({'; '.join(changed)})" if changed else ""
