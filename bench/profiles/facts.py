"""What can be said of a model's deconvolution layers before any is timed: sizes, backend, choices and why, floors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdeconv import ChannelDeconv, Delinear, ops
from tdeconv.backends import choose
from tdeconv.bench.profiles.observe import input_of, layers_of
from tdeconv.bench.roofline import Ceilings, Shape, works
from tdeconv.geometry import Geometry


@dataclass
class Facts:
    """A layer as one training step met it.

    Attributes:
        type: its class.
        label: its sizes in short, ``64-128 3x3/2 @56``.
        input: its first input's shape.
        dtype: what its convolution computes in.
        backend, why: what it runs on.
        how: how each stage of the step is done, a line each; none on the reference backend.
        shapes: for the roofline, one for each call of the step; none for a ``ChannelDeconv``.
        calls: how often the step called it.
        stale: whether the step used the running statistics.
    """

    type: str
    label: str
    input: list[int]
    dtype: torch.dtype
    backend: str
    why: str
    how: dict[str, str]
    shapes: list[Shape] = field(default_factory=list)
    calls: int = 0
    stale: bool = False

    def floors(self, ceilings: Ceilings) -> dict[tuple[str, str], dict[str, Any]]:
        """By stage and direction: the seconds it needs at least, what sets them, its bytes and operations."""
        floors: dict[tuple[str, str], dict[str, Any]] = {}
        for shape in self.shapes:
            for work in works(shape, self.stale):
                zero = {"seconds": 0.0, "bound": work.bound(ceilings), "bytes": 0, "operations": 0}
                entry = floors.setdefault((work.stage, work.direction), zero)
                entry["seconds"] += work.floor(ceilings)
                entry["bytes"] += work.bytes
                entry["operations"] += work.operations
        return floors


def look(model: nn.Module, step: Callable[[], object], stale: bool = False) -> dict[str, Facts]:
    """Run a training step, which is ``stale`` or not: the layers it calls, in the order of their first calls."""
    facts: dict[str, Facts] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = input_of(args, kwargs).detach()
            input_grad = input_of(args, kwargs).requires_grad
            with torch.no_grad():
                now = _facts(layer, x, _working_dtype(output), input_grad, stale)
            kept = facts.setdefault(name, now)
            kept.calls += 1
            if kept is not now:
                kept.shapes += now.shapes

        return hook

    named = layers_of(model).items()
    handles = [layer.register_forward_hook(hook_of(name), with_kwargs=True) for name, layer in named]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return facts


def _working_dtype(output: Tensor) -> torch.dtype:
    """A CPU's float16 convolutions run in float32."""
    half_on_cpu = output.dtype == torch.float16 and output.device.type == "cpu"
    return torch.float32 if half_on_cpu else output.dtype


def _facts(layer: Any, x: Tensor, dtype: torch.dtype, input_grad: bool, stale: bool) -> Facts:
    choice = choose(layer.backend, x.device)
    about = Facts(
        *(type(layer).__name__, label(layer, x), list(x.shape), dtype, choice.backend, choice.reason, {}), stale=stale
    )
    if isinstance(layer, ChannelDeconv):
        return about
    x = x.to(dtype)
    x, geo, n_iter = layer.in_training(x)
    shape = _shape(x, geo, n_iter, layer, input_grad)
    if choice.backend != "reference":
        run = {work.stage for work in works(shape, stale)}
        said = ops.stages(choice.backend).describe(x, layer.weight, geo, n_iter)
        about.how = {stage: how for stage, how in said.items() if stage in run}
    about.shapes = [shape]
    return about


def _shape(x: Tensor, geo: Geometry, n_iter: int, layer: Any, input_grad: bool) -> Shape:
    return Shape(
        batch=x.shape[0],
        channels=geo.channels,
        size=tuple(x.shape[2:]),
        out=layer.weight.shape[0],
        kernel=geo.kernel_size,
        stride=geo.stride,
        padding=geo.padding,
        dilation=geo.dilation,
        groups=geo.groups,
        block=geo.block,
        sampling_stride=geo.sampling_stride,
        n_iter=n_iter,
        dtype=x.dtype,
        input_grad=input_grad,
    )


def label(layer: Any, x: Tensor) -> str:
    """A layer's sizes in short: ``64-128 3x3/2 @56``, ``32 dw 3x3 @14``, ``512-1000``."""
    if isinstance(layer, Delinear):
        return f"{layer.in_features}-{layer.out_features}"
    size = f"@{_sizes(x.shape[2:])}" if math.prod(x.shape[2:]) > 1 else ""
    if isinstance(layer, ChannelDeconv):
        return f"{x.shape[1]} {size}".strip()
    channels = f"{layer.in_channels}-{layer.out_channels}"
    if layer.groups == layer.in_channels == layer.out_channels:
        channels = f"{layer.in_channels} dw"
    elif layer.groups > 1:
        channels += f" g{layer.groups}"
    stride = f"/{_sizes(layer.stride)}" if max(layer.stride) > 1 else ""
    return f"{channels} {'x'.join(map(str, layer.kernel_size))}{stride} {size}".strip()


def _sizes(sizes: Sequence[int]) -> str:
    """``14`` of a square, else ``14x20``."""
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))
