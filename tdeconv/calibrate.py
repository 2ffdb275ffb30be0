"""The scale of every deconvolution layer, set by a batch of data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdeconv.layers import FastDeconv, FastDeconv1d, FastDeconv3d
from tdeconv.precision import statistics_dtype
from tdeconv.update_stats import run

Model = TypeVar("Model", bound=nn.Module)


def calibrate_deconv(model: Model, batch: Any) -> Model:
    """Scale the weight of every deconvolution layer so that its output varies by 1 over a batch of data.

    Whitened patches would give a layer outputs of about the deviation of its weight's norm, if whitening were complete.
    By ``n_iter`` steps it is not, least of all for covariances of many features, and a deep network of outputs that are
    too small, or too large, starts badly. Here each layer's weight is multiplied by one number, in the order of the
    calls, so that the root mean square of what its output differs from its bias is 1, as it was behind a batch norm at
    its start. (One number for a layer, not for a channel: a channel that hardly varies would be blown up.) A weight of
    zero, with which a residual branch may start, stays zero. A second call changes nothing but by rounding.

    The convolutions are scaled, not :class:`tdeconv.Delinear`, whose outputs are scores, often. It is meant for
    networks with random weights, before their training.

    Args:
        model: changed in place, weights alone: running statistics, modes and counters are afterwards what they were.
        batch: as large as a batch of training: a tensor, a tuple or list whose first item is the input, or a mapping of
            the model's keyword arguments.

    Returns:
        The model.

    Raises:
        TypeError: the model is no ``nn.Module``, or the batch none of these.

    Source: layer-sequential unit variance, Mishkin and Matas, *All you need is a good init*, ICLR 2016, here with one
    pass and without the orthogonal weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    scales: dict[Any, Tensor] = {}
    with torch.no_grad(), _as_it_was(model), ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, (FastDeconv, FastDeconv1d, FastDeconv3d)):
                hooks.callback(layer.register_forward_hook(_scaling(scales)).remove)
        run(model.train(), batch)
    with torch.no_grad():
        for layer, scale in scales.items():
            layer.weight.mul_(scale)
    return model


def _scaling(scales: dict[Any, Tensor]) -> Any:
    """A forward hook that finds the layer's scale in its first call, and scales the output of every call by it."""

    def hook(layer: Any, _: Any, output: Tensor) -> Tensor:
        shift = 0 if layer.bias is None else layer.bias.view(-1, *(1,) * len(layer.kernel_size))
        varying = output - shift
        if layer not in scales:
            size = varying.to(statistics_dtype(varying.dtype)).square().mean().sqrt()
            whole = layer.weight.flatten(1).square().sum(1).mean().sqrt()  # its size, were the whitening complete
            tells = size.isfinite() & (size > 1e-4 * whole)  # else the weight is 0, or the batch without variation
            scales[layer] = torch.where(tells, 1 / size, 1).to(layer.weight.dtype)
        return varying * scales[layer].to(output.dtype) + shift

    return hook


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the block the model may train; its buffers and modes are put back."""
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for buffer, value in buffers.items():
            buffer.copy_(value)
        for module, training in modes.items():
            module.training = training
