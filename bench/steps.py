"""A layer's training step without the optimiser: the same numbers for every implementation."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdeconv.bench import cases, measure
from tdeconv.bench.cases import Layer
from tdeconv.bench.implementations import ORACLES, Implementation

KINDS = ("forward", "step")


@dataclass
class Problem:
    """A layer's input, the gradient of its output, and for each method the module to start from, all float32."""

    layer: Layer
    x: Tensor
    grad: Tensor
    modules: Mapping[str, nn.Module]


def problem(layer: Layer, batch: int) -> Problem:
    torch.manual_seed(1)
    modules = {method: oracle.build(layer) for method, oracle in ORACLES.items()}
    grad = torch.randn(batch, layer.out_channels, layer.size, layer.size)
    return Problem(layer, cases.activations(layer, batch), grad, modules)


class Step:
    """A module's forward, and backward to its parameters and, where the layer's input has a gradient, its input."""

    saved_bytes: int  # for backward; known after the first step

    def __init__(self, module: nn.Module, x: Tensor, grad: Tensor, input_grad: bool) -> None:
        self.module = module.train()
        self.x = x.detach().requires_grad_(input_grad)
        self.grad = grad

    def run(self, timer: measure.Timer) -> dict[str, float]:
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        start = timer()
        y = self.module(self.x)
        forward = timer()
        y.backward(self.grad)
        end = timer()
        return {"forward": forward - start, "step": end - start}

    def first_step(self) -> list[Tensor]:
        """Output, gradients and running statistics of one step; counts ``saved_bytes``."""
        y, self.saved_bytes = measure.forward_counted(self.module, self.x)
        # from now on the gradient has the layout of the output, as the next layer would give it
        self.grad = torch.empty_like(y).copy_(self.grad)
        y.backward(self.grad)
        grads = [t.grad for t in (self.x, *self.module.parameters()) if t.grad is not None]
        return [y, *grads, *(b for b in self.module.buffers() if b.is_floating_point())]


def oracle_answers(p: Problem, method: str, dtype: torch.dtype) -> list[Tensor]:
    """What a method's oracle answers to :meth:`Step.first_step` in this dtype."""
    module = copy.deepcopy(p.modules[method]).to(dtype)
    return Step(module, p.x.to(dtype), p.grad.to(dtype), p.layer.input_grad).first_step()


def prepare(
    p: Problem, everyone: Sequence[Implementation], oracle_dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Step], dict[str, float]]:
    """Every implementation's step, and its error against its method's oracle.

    Raises:
        AssertionError: an implementation's answers are wrong.
    """
    steps, errors = {}, {}
    for method, start in p.modules.items():
        expected = oracle_answers(p, method, oracle_dtype)
        for one in (one for one in everyone if one.method == method):
            module = one.build(p.layer)
            module.load_state_dict(start.state_dict())
            module = module.to(memory_format=one.memory_format)
            step = Step(module, p.x.contiguous(memory_format=one.memory_format), p.grad, p.layer.input_grad)
            errors[one.name] = measure.check(one.name, step.first_step(), expected)
            steps[one.name] = step
    return steps, errors
