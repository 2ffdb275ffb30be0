"""A layer's training step without the optimiser: the same numbers for every implementation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tdeconv.bench import cases, measure, memory, roofline
from tdeconv.bench.cases import Layer
from tdeconv.bench.clock import Clock, CpuClock
from tdeconv.bench.implementations import ORACLES, STALE, Implementation
from tdeconv.bench.measure import Prepared, Variant
from tdeconv.schedule import every_step

KINDS = ("forward", "step")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# A ReLU's gradient jumps at zero: outputs nearer to it than this share of their deviation get no gradient, so that
# rounding does not change which ones pass.
NEAR_ZERO = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
TIMES = 4.0  # how many times plain torch's own error in half precision an answer's may be
FEW = 4  # images whose statistics are a stale step's


@dataclass
class Problem:
    """A layer's input, the gradient of its output, and for each method the module to start from, all float32."""

    layer: Layer
    x: Tensor
    grad: Tensor
    modules: Mapping[str, nn.Module]


def problem(layer: Layer, batch: int, device: torch.device | str = "cpu") -> Problem:
    torch.manual_seed(1)
    modules = {method: oracle.build(layer).to(device) for method, oracle in ORACLES.items()}
    grad = torch.randn(batch, layer.out_channels, layer.out_size, layer.out_size)
    x = cases.activations(layer, batch).to(device)
    with torch.no_grad():  # or the root would be the identity, and the mean zero
        modules["deconv" + STALE].train()(x[:FEW])
    return Problem(layer, x, grad.to(device), modules)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """How a user computes in half precision; nothing for float32 and float64."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))


class Step:
    """A module's forward, and backward to its parameters and, where the layer's input has a gradient, its input.

    Args:
        call: what runs the module, if not the module itself: its compiled form.
        stale: whether deconvolution layers use their running statistics; else all take the batch's.
    """

    saved_bytes: int  # for backward; known after the first step

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        grad: Tensor,
        input_grad: bool,
        call: nn.Module | None = None,
        stale: bool = False,
    ) -> None:
        self.module, self.stale = module.train(), stale
        self.call = call or module
        self.x = x.detach().requires_grad_(input_grad)
        self.grad = grad

    def kind(self) -> AbstractContextManager[None]:
        """Within, the module's steps are of this step's kind."""
        return every_step(self.module.modules(), fresh=not self.stale)

    def run(self, clock: Clock) -> dict[str, float]:
        self.forget()
        with self.kind():
            start = clock.mark()
            with autocast(self.x.device, self.x.dtype):
                y = self.call(self.x)
            forward = clock.mark()
            y.backward(self.grad)
            end = clock.mark()
        return {"forward": clock.seconds(start, forward), "step": clock.seconds(start, end)}

    def first_step(self) -> list[Tensor]:
        """Output, gradients and running statistics of one step; counts ``saved_bytes``."""
        self.forget()
        with self.kind(), autocast(self.x.device, self.x.dtype):
            y, self.saved_bytes = memory.forward_counted(self.call, self.x)
        # from now on the gradient has the layout of the output, as the next layer would give it
        self.grad = torch.empty_like(y).copy_(self.grad)
        y.backward(self.grad)
        grads = [t.grad for t in (self.x, *self.module.parameters()) if t.grad is not None]
        return [y, *grads, *(b for b in self.module.buffers() if b.is_floating_point())]

    def forget(self) -> None:
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)


def step_of(p: Problem, one: Implementation, variant: Variant) -> Step:
    """An implementation's step, from the method's state. Parameters stay in float32: half precision is autocast's."""
    module = one.build(p.layer).to(p.x.device)
    module.load_state_dict(p.modules[one.method].state_dict())
    module = module.to(memory_format=FORMATS[variant.layout])
    x = p.x.to(getattr(torch, variant.dtype)).contiguous(memory_format=FORMATS[variant.layout])
    return Step(module, x, p.grad, p.layer.input_grad, one.ready(module), one.stale)


def oracle_answers(p: Problem, method: str, dtype: torch.dtype) -> list[Tensor]:
    """What a method's oracle answers to :meth:`Step.first_step`; in half precision by autocast."""
    half = dtype in (torch.bfloat16, torch.float16)
    module = copy.deepcopy(p.modules[method]).to(torch.float32 if half else dtype)
    stale = ORACLES[method].stale
    return Step(module, p.x.to(dtype), p.grad.to(dtype), p.layer.input_grad, stale=stale).first_step()


def away_from_zero(p: Problem, method: str, dtype: torch.dtype) -> Problem:
    """The same problem, without gradient where the method's outputs are next to the ReLU's jump."""
    *rest, _ = copy.deepcopy(p.modules[method]).train()
    with torch.no_grad(), every_step(rest, fresh=not ORACLES[method].stale):
        before = nn.Sequential(*rest)(p.x)
    return replace(p, grad=p.grad * (before.abs() > NEAR_ZERO[dtype] * before.std()))


def prepare(
    p: Problem,
    wanted: Sequence[tuple[Implementation, Variant]],
    oracle_dtype: torch.dtype = torch.float64,
) -> Iterator[tuple[Variant, Prepared]]:
    """Every wanted step, its answers checked against its method's oracle.

    Raises:
        AssertionError: an implementation's answers are wrong.
    """
    for method in p.modules:
        for dtype in dict.fromkeys(v.dtype for one, v in wanted if one.method == method):
            mine = away_from_zero(p, method, getattr(torch, dtype))
            expected = oracle_answers(mine, method, oracle_dtype)
            tolerance = _tolerance(mine, method, getattr(torch, dtype), expected)
            for one, variant in wanted:
                if (one.method, variant.dtype) == (method, dtype):
                    step = step_of(mine, one, variant)
                    error = measure.check(one.name, step.first_step(), expected, tolerance)
                    yield variant, Prepared(step, {"error": error, **about(step)})


def _tolerance(p: Problem, method: str, dtype: torch.dtype, expected: Sequence[Tensor]) -> float:
    """In half precision: a few times the error of the method's plain code in the same dtype."""
    if dtype == torch.float32:
        return measure.TOLERANCE
    errors = measure.relative_errors(oracle_answers(p, method, dtype), expected)
    return TIMES * max(errors) + torch.finfo(dtype).eps


def about(step: Any) -> dict[str, Any]:
    """What a step that has run once takes: a layer's or a network's."""
    step.forget()
    used = memory.allocations(lambda: step.run(CpuClock()), str(step.x.device))
    return {
        "saved_bytes": step.saved_bytes,
        "peak_bytes": used.peak,
        "allocations": used.count,
        "batch": step.x.shape[0],
        "shape": list(step.x.shape),
    }


def counted(layer: Layer, batch: int, dtype: str) -> roofline.Shape:
    """The layer as the roofline knows it."""
    return roofline.Shape(
        *(batch, layer.in_channels, (layer.size,) * 2, layer.out_channels, (layer.kernel,) * 2, (layer.stride,) * 2),
        groups=layer.groups,
        block=layer.block,
        sampling_stride=layer.sampling_stride,
        n_iter=layer.n_iter,
        dtype=getattr(torch, dtype),
        input_grad=layer.input_grad,
    )


def floors(layer: Layer, method: str, batch: int, dtype: str, ceilings: roofline.Ceilings) -> dict[str, dict[str, Any]]:
    """For each kind, what the layer must cost at least: bytes, operations, seconds and what bounds them."""
    shape = counted(layer, batch, dtype)
    stale = ORACLES[method].stale
    found = roofline.conv_bn_relu(shape) if method == "conv_bn_relu" else roofline.works(shape, stale)
    forward = [work for work in found if work.direction == "forward"]
    return {kind: roofline.total(works, ceilings) for kind, works in (("forward", forward), ("step", found))}
