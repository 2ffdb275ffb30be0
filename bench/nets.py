"""Whole networks: a training step without the optimiser, with batch norm and converted."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdeconv.bench import measure, memory
from tdeconv.bench.cases import IN_TORCHVISION
from tdeconv.bench.clock import Clock, CpuClock
from tdeconv.bench.implementations import ORACLES, Implementation
from tdeconv.bench.measure import Prepared, Variant
from tdeconv.bench.steps import FORMATS, about, autocast
from tdeconv.convert import convert_deconv
from tdeconv.named_models import load_model
from tdeconv.schedule import every_step

TOLERANCE = 2e-5  # what a network's outputs may be off where the reference itself is exact, relative
TIMES = 10.0  # how many times the reference's own error they may
DRAWS = 3


@dataclass(frozen=True)
class Network:
    """A name that :func:`tdeconv.named_models.load_model` knows, images ``(batch, 3, size, size)``, and the block that
    it is converted with, if not the conversion's own."""

    name: str
    batch: int
    size: int
    block: int | None = None


@dataclass
class Problem:
    """A network with batch norm and its images, both float32; how to convert it, and its converted state behind a
    training step."""

    model: nn.Module
    x: Tensor
    options: Mapping[str, Any]
    state: Mapping[str, Tensor]


def problem(what: Network, device: torch.device | str = "cpu") -> Problem:
    """Random weights; no dropout, as the implementations are compared.

    Raises:
        ValueError: there is no such network, or it does not take images of that size.
    """
    torch.manual_seed(0)
    model = load_model(IN_TORCHVISION.get(what.name, what.name), argument="--model").to(device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(what.batch, 3, max(1, what.size // 2), max(1, what.size // 2), generator=generator)
    x = F.interpolate(coarse, size=(what.size, what.size)).to(device)
    try:
        with torch.no_grad():
            output = copy.deepcopy(model).train()(x)
    except Exception as error:  # whatever a stranger's model says
        raise ValueError(f"--model {what.name} does not take images {tuple(x.shape)}: {error}") from None
    if not isinstance(output, Tensor):
        raise ValueError(f"--model {what.name} must give one tensor, got {type(output).__name__}")
    options = {} if what.block is None else {"block": what.block}
    converted = convert_deconv(copy.deepcopy(model), **options).train()
    with torch.no_grad():
        converted(x)
    return Problem(model, x, options, converted.state_dict())


class Step:
    """Forward, and backward from the mean of the output's squares to the parameters; fresh or stale."""

    saved_bytes: int  # for backward; known after the first forward

    def __init__(self, model: nn.Module, x: Tensor, call: nn.Module | None = None, stale: bool = False) -> None:
        self.model, self.call, self.x, self.stale = model.train(), call or model, x, stale

    def run(self, clock: Clock) -> dict[str, float]:
        with every_step(self.model.modules(), fresh=not self.stale):
            start = clock.mark()
            with autocast(self.x.device, self.x.dtype):
                y = self.call(self.x)
            forward = clock.mark()
            y.float().square().mean().backward()
            end = clock.mark()
        seconds = {"forward": clock.seconds(start, forward), "step": clock.seconds(start, end)}
        self.forget()  # the next implementation needs the memory
        return seconds

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def first_forward(self) -> Tensor:
        """The output; counts ``saved_bytes``."""
        with every_step(self.model.modules(), fresh=not self.stale), autocast(self.x.device, self.x.dtype):
            y, self.saved_bytes = memory.forward_counted(self.call, self.x)
        return y.detach()


def _network(p: Problem, one: Implementation) -> nn.Module:
    """An implementation's network; for a stale step with running statistics that are not where they start."""
    model = one.convert(copy.deepcopy(p.model), **p.options)
    if one.stale:
        model.load_state_dict(p.state)
    return model.train()


def step_of(p: Problem, one: Implementation, variant: Variant) -> Step:
    """An implementation's step, from the problem's weights, which stay in float32: half precision is autocast's."""
    model = _network(p, one).to(memory_format=FORMATS[variant.layout])
    x = p.x.to(getattr(torch, variant.dtype)).contiguous(memory_format=FORMATS[variant.layout])
    return Step(model, x, one.ready(model), one.stale)


def _oracle(p: Problem, method: str, x: Tensor) -> Tensor:
    """The outputs of a method's oracle in the dtype of ``x``."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    oracle = ORACLES[method]
    model = _network(p, oracle).to(torch.float32 if half else x.dtype)
    # a deep network's graph takes many times its outputs' memory
    with torch.no_grad(), every_step(model.modules(), fresh=not oracle.stale), autocast(x.device, x.dtype):
        return model(x)


def _sensitivity(p: Problem, method: str, dtype: torch.dtype, expected: Tensor) -> float:
    """The oracle's own error in a dtype, the largest of a few inputs that differ in their last digits.

    A deep network at its start makes much of little, most of all where a layer sees few samples.
    """
    generator = torch.Generator(p.x.device).manual_seed(2)
    errors = []
    for _ in range(DRAWS):
        noise = torch.randn(p.x.shape, generator=generator, device=p.x.device)
        x = p.x * (1 + torch.finfo(torch.float32).eps * noise)
        errors += measure.relative_errors([_oracle(p, method, x.to(dtype))], [expected])
    return max(errors)


def prepare(p: Problem, wanted: Sequence[tuple[Implementation, Variant]]) -> Iterator[tuple[Variant, Prepared]]:
    """Every wanted step. Its outputs may be a few times as far from the float64 reference's as the reference's own in
    the same dtype.

    Raises:
        AssertionError: an implementation's outputs are wrong.
    """
    for method in ORACLES:
        mine = [(one, variant) for one, variant in wanted if one.method == method]
        expected = _oracle(p, method, p.x.double()) if mine else torch.empty(0)
        dtypes = dict.fromkeys(variant.dtype for _, variant in mine)
        own = {dtype: _sensitivity(p, method, getattr(torch, dtype), expected) for dtype in dtypes}
        for one, variant in mine:
            step = step_of(p, one, variant)
            error = _checked(one.name, step, expected, own[variant.dtype])
            step.run(CpuClock())  # the first backward compiles
            yield variant, Prepared(step, {"error": error, **about(step)})


def _checked(name: str, step: Step, expected: Tensor, own: float) -> float:
    try:
        return measure.check(name, [step.first_forward()], [expected], TIMES * own + TOLERANCE)
    except AssertionError as error:
        batch = f"a batch of {step.x.shape[0]} may be too small for this network's statistics: try a larger --batch"
        raise AssertionError(f"{error} ({batch})") from None
