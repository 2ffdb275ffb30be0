"""A training step watched from outside: when each deconvolution layer runs, and the stages inside it, both directions.

Hooks say which layer runs. Autograd runs backward's nodes in the reverse order of their making, one at a time on a
device, so all between a layer's output getting its gradient and its own view of the input getting one is that layer's.
The stages are timed where the operators call them, by a stand-in for the backend's module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from tdeconv import ChannelDeconv, Delinear, FastDeconv, FastDeconv1d, FastDeconv3d, ops
from tdeconv.bench.clock import Clock
from tdeconv.bench.roofline import STAGES
from tdeconv.bench.stages import WatchedStages

LAYERS = (FastDeconv, FastDeconv1d, FastDeconv3d, Delinear, ChannelDeconv)
WHOLE, REST = "layer", "rest"


class Part(NamedTuple):
    """Of a step: a stage of a layer, the whole layer, or the rest of it beside its stages."""

    layer: str
    stage: str
    direction: str


class _Open(NamedTuple):
    """A part that has begun: its mark, and its range in a trace."""

    part: Part
    start: Any
    range: AbstractContextManager[Any]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The deconvolution layers by name, in the order of registration."""
    return {name or "model": module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer's input, as its hooks get it."""
    return args[0] if args else kwargs["x"]


class Observer:
    """Inside :meth:`watching`, collects when the parts of a model's steps begin and end."""

    def __init__(self, model: nn.Module, clock: Clock, ranges: bool = False) -> None:
        """``ranges``: also name every part in a trace of ``torch.profiler``; it costs time."""
        self._layers, self._clock = layers_of(model), clock
        self._range: Callable[[str], AbstractContextManager[Any]] = (
            torch.profiler.record_function if ranges else lambda name: nullcontext()
        )
        self._spans: list[tuple[Part, Any, Any]] = []
        self._forward: list[_Open] = []  # a stack, though these layers do not hold one another
        self._backward: _Open | None = None
        self._last: Any = None  # the latest sign that the layer in backward was still at work

    def take(self) -> dict[Part, float]:
        """Seconds of each part since the last call; a layer called several times has the sum. Waits for the device."""
        self._end_backward()
        seconds: dict[Part, float] = {}
        for part, start, end in self._spans:
            seconds[part] = seconds.get(part, 0.0) + self._clock.seconds(start, end)
        self._spans.clear()
        return seconds

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        for name, layer in self._layers.items():
            handles.append(layer.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after(name)))
            trained = [p for p in layer.parameters() if p.requires_grad]
            handles += [p.register_post_accumulate_grad_hook(self._gradient) for p in trained]
        original = ops.stages

        def stages(backend: str) -> Any:
            return WatchedStages(original(backend), self.timed)

        try:
            with mock.patch.object(ops, "stages", stages):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def timed(self, stage: str, direction: str, function: Callable[[], Any]) -> Any:
        """Call a stage's function, as part of the layer that runs."""
        running = self._backward if direction == "backward" else self._forward[-1] if self._forward else None
        if running is None:  # called without a layer
            return function()
        opened = self._begin(Part(running.part.layer, stage, direction))
        try:
            return function()
        finally:
            self._end(opened, self._clock.mark())

    def _begin(self, part: Part) -> _Open:
        range_ = self._range(f"{part.layer}: {part.stage} {part.direction}")
        range_.__enter__()
        return _Open(part, self._clock.mark(), range_)

    def _end(self, opened: _Open, mark: Any) -> None:
        opened.range.__exit__(None, None, None)
        self._spans.append((opened.part, opened.start, mark))

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = input_of(args, kwargs)
            self._forward.append(self._begin(Part(name, WHOLE, "forward")))
            if x.requires_grad and torch.is_grad_enabled():
                x = x.view_as(x)  # this layer's alone: its gradient is ready when the layer's backward is done
                x.register_hook(lambda grad: self._end_backward(self._clock.mark()))
            return (x, *args[1:]), {key: value for key, value in kwargs.items() if key != "x"}

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def begin_backward(grad: Tensor) -> None:
            self._end_backward()
            self._backward = self._begin(Part(name, WHOLE, "backward"))

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._end(self._forward.pop(), self._clock.mark())
            if output.requires_grad:
                output.register_hook(begin_backward)

        return hook

    def _gradient(self, parameter: Tensor) -> None:
        """A parameter has its gradient: all there is to see of the end of a layer whose input has none."""
        self._last = self._clock.mark()

    def _end_backward(self, mark: Any = None) -> None:
        if self._backward is not None:
            end = mark if mark is not None else self._last
            self._end(self._backward, self._backward.start if end is None else end)
        self._backward = self._last = None


def with_rest(seconds: dict[Part, float], step: float) -> tuple[dict[Part, float], float]:
    """Parts that add up to the step: the stages, the rest of each layer and direction, and all that is no such layer.

    Args:
        seconds: of stages and whole layers (:meth:`Observer.take`).
        step: seconds.

    Returns:
        Seconds of the stages and rests, and of all else.
    """
    parts = {part: s for part, s in seconds.items() if part.stage != WHOLE}
    wholes = {part: s for part, s in seconds.items() if part.stage == WHOLE}
    for whole, s in wholes.items():
        stages = sum(parts.get(whole._replace(stage=stage), 0.0) for stage in STAGES)
        parts[whole._replace(stage=REST)] = s - stages
    return parts, step - sum(wholes.values())
