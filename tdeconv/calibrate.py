"""The scale of every deconvolution layer, set by a batch of data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdeconv.distributed import StatisticsGroup, active, gather_and_sum
from tdeconv.layers import FastDeconv, FastDeconv1d, FastDeconv3d
from tdeconv.precision import statistics_dtype
from tdeconv.schedule import every_step
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

    The convolutions are scaled, not :class:`tdeconv.Delinear`, whose outputs are often scores. It is meant for
    networks with random weights, before their training.

    Args:
        model: changed in place, weights alone: buffers and modes are afterwards what they were. On several processes
            call this before ``DistributedDataParallel``, which gives all ranks the weights of one; with
            :func:`tdeconv.convert_sync_deconv` every rank has to call it, and the scales are those of all batches.
        batch: as large as a batch of training: a tensor, a tuple or list whose first item is the input, or a mapping of
            the model's keyword arguments.

    Returns:
        The model.

    Raises:
        TypeError: the model is no ``nn.Module``, or the batch none of these.
        ValueError: a layer's weight is computed from others (by a parametrisation, ``weight_norm``, pruning).

    Source: layer-sequential unit variance, Mishkin and Matas, *All you need is a good init*, ICLR 2016, here with one
    pass and without the orthogonal weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (FastDeconv, FastDeconv1d, FastDeconv3d))}
    computed = next((name for name, layer in layers.items() if "weight" not in layer._parameters), None)
    if computed is not None:
        raise ValueError(
            f"model must have weights that are Parameters, but that of its layer {computed!r} is computed from others; "
            "calibrate the model before it is parametrised or pruned"
        )
    scales: dict[Tensor, Tensor] = {}
    with torch.no_grad(), _as_it_was(model), ExitStack() as hooks:
        for layer in layers.values():
            hooks.callback(layer.register_forward_hook(_scaling(scales)).remove)
        model.train()
        run(model, batch)
    for weight, scale in scales.items():
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            weight.mul_(scale)
    return model


def _scaling(scales: dict[Tensor, Tensor]) -> Any:
    """A forward hook that finds the scale of the layer's weight in the first call that takes it, and scales the output
    of every call by it."""

    def hook(layer: Any, _: Any, output: Tensor) -> Tensor:
        shift = 0 if layer.bias is None else layer.bias.view(-1, *(1,) * len(layer.kernel_size))
        varying = output - shift
        if layer.weight not in scales:
            size = _root_mean_square(varying.to(statistics_dtype(varying.dtype)), active(layer.process_group))
            whole = layer.weight.flatten(1).square().sum(1).mean().sqrt()  # its size, were the whitening complete
            tells = size.isfinite() & (size > 1e-4 * whole)  # else the weight is 0, or the batch without variation
            scales[layer.weight] = torch.where(tells, 1 / size, 1).to(layer.weight.dtype)
        return varying * scales[layer.weight].to(output.dtype) + shift

    return hook


def _root_mean_square(x: Tensor, group: StatisticsGroup | None) -> Tensor:
    count = x.new_full((1,), x.numel())
    counts, total = gather_and_sum(count, x.square().sum(), group)
    return (total / counts.sum()).sqrt()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the block the model may train; its buffers and modes are put back."""
    modes = {module: module.training for module in model.modules()}
    names = {module: dict(module._buffers) for module in modes}
    values = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        with torch.random.fork_rng(devices=[]), every_step(modes, fresh=True):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
            module._buffers.update(names[module])
        for buffer, value in values.items():
            if not torch.equal(buffer, value):
                buffer.copy_(value)
