"""Where a layer's time goes: its stages, timed inside a whole training step, of the reference and of a fast backend.

Stages as everywhere: ``patch_moments -> inverse_sqrt -> fold -> convolve``. ``moments`` is the part of
``patch_moments`` behind the patches; what is left of it is the price of taking them. ``rest`` is what the layer
does around a fast backend's stages: operators, memory layouts, running statistics.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tdeconv import corridor, ops, reference
from tdeconv.bench import measure
from tdeconv.bench.cases import Layer
from tdeconv.bench.steps import Problem, Step, oracle_answers
from tdeconv.geometry import Geometry

PARTS = ("patch_moments", "moments", "inverse_sqrt", "fold", "convolve", "rest")
STATISTICS = ("patch_moments", "moments", "inverse_sqrt")  # no backward where the input has no gradient
DIRECTIONS = ("forward", "backward")
FAST = ("torch",)
BACKENDS = ("reference", *FAST)


def parts(backend: str, layer: Layer) -> list[tuple[str, str]]:
    """The parts and directions that a step of this backend and layer has."""
    mine = PARTS if backend in FAST else PARTS[:-1]
    return [(p, d) for p in mine for d in DIRECTIONS if d == "forward" or layer.input_grad or p not in STATISTICS]


class _Layer:
    """What both ways of running the stages start from: the reference layer's own parameters and options."""

    def __init__(self, p: Problem) -> None:
        module: Any = p.modules["deconv"]
        self.x, self.grad, self.input_grad = p.x, p.grad, p.layer.input_grad
        self.weight, self.bias = module.weight.detach(), module.bias.detach()
        self.eps, self.n_iter = module.eps, module.n_iter
        self.geo = Geometry(
            module.in_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.block,
            module.grouping,
            module.sampling_stride,
        )
        d = self.geo.features
        self.flat = Geometry(d, (), (), (), (), 1, d, "contiguous")  # ready-made vectors: a linear layer's patches


class ReferenceStages(_Layer):
    """The reference, cut at the stages: each has an autograd graph of its own, walked back in reverse order."""

    def run(self, timer: measure.Timer) -> dict[str, float]:
        self.seconds: dict[str, float] = {}
        self.tape: list[tuple[str, list[Tensor], Sequence[Tensor]]] = []
        self.timer = timer
        x = self.x.detach().requires_grad_(self.input_grad)
        weight, bias = (t.detach().requires_grad_() for t in (self.weight, self.bias))
        eye = torch.eye(self.geo.features, dtype=x.dtype)

        def moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
            mean, cov = reference.patch_moments(vectors, self.flat)
            return mean, cov + self.eps * eye

        geo, n_iter = self.geo, self.n_iter
        (v,) = self._forward("patches", lambda x: reference.to_vectors(reference.im2col(x, geo), geo)[0], x)
        mean, cov = self._forward("moments", moments, v)
        (deconv,) = self._forward("inverse_sqrt", lambda cov: reference.inverse_sqrt(cov, n_iter), cov)
        folded, shift = self._forward(
            "fold", lambda w, b, m, s: reference.fold(w, b, m, s, geo), weight, bias, mean, deconv
        )
        (self.y,) = self._forward("convolve", lambda x, w, b: reference.convolve(x, w, b, geo), x, folded, shift)
        self._backward()
        self.grads = [t.grad for t in (x, weight, bias) if t.grad is not None]
        for d in DIRECTIONS:
            if f"moments {d}" in self.seconds:
                self.seconds[f"patch_moments {d}"] = self.seconds.pop(f"patches {d}") + self.seconds[f"moments {d}"]
        return self.seconds

    def answers(self) -> list[Tensor]:
        self.run(lambda: 0.0)
        return [self.y, *self.grads]

    def _forward(self, part: str, function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        start = self.timer()
        out = function(*inputs)
        self.seconds[f"{part} forward"] = self.timer() - start
        outputs = [out] if isinstance(out, Tensor) else list(out)
        cut = [t.detach().requires_grad_(t.requires_grad) for t in outputs]
        self.tape.append((part, outputs, cut))
        return cut

    def _backward(self) -> None:
        self.tape[-1][2][0].grad = self.grad
        for part, outputs, cut in reversed(self.tape):
            if outputs[0].requires_grad:
                start = self.timer()
                torch.autograd.backward(outputs, [t.grad for t in cut])
                self.seconds[f"{part} backward"] = self.timer() - start
        self.tape.clear()


class _TimedStages:
    """A fast backend's stages, each adding the seconds of its calls to its part."""

    def __init__(self, stages: corridor.Stages, timer: measure.Timer) -> None:
        self._stages, self._timer = stages, timer
        self.seconds: dict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._stages, name)
        stage, backward, _ = name.partition("_backward")
        part = f"{stage} {'backward' if backward else 'forward'}"

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._timer()
            result = function(*args, **kwargs)
            if stage in PARTS:
                self.seconds[part] += self._timer() - start
            return result

        return timed


class FastStages(_Layer):
    """A fast backend's layer, its stages timed where the layer calls them."""

    def __init__(self, backend: str, p: Problem) -> None:
        super().__init__(p)
        self.stages = ops.stages(backend)
        module: Any = copy.deepcopy(p.modules["deconv"])
        module.backend = backend
        self.step = Step(module, p.x, p.grad, p.layer.input_grad)
        self.vectors = reference.to_vectors(reference.im2col(self.x, self.geo), self.geo)[0].contiguous()
        self.mean, cov = reference.patch_moments(self.vectors, self.flat)
        self.grad_mean, self.grad_cov = torch.randn_like(self.mean), torch.randn_like(cov)

    def run(self, timer: measure.Timer) -> dict[str, float]:
        with self._timed(timer) as seconds:
            whole = self.step.run(timer)
        whole["backward"] = whole["step"] - whole["forward"]
        for d in DIRECTIONS:
            seconds[f"rest {d}"] = whole[d] - sum(s for part, s in seconds.items() if part.endswith(d))
        return {**seconds, **self._moments(timer)}

    def answers(self) -> list[Tensor]:
        with self._timed(lambda: 0.0):
            return self.step.first_step()

    @contextmanager
    def _timed(self, timer: measure.Timer) -> Iterator[dict[str, float]]:
        """Inside, the backend's operators find timed stages; the seconds by part."""
        timed = _TimedStages(self.stages, timer)

        def stages(backend: str) -> Any:
            return timed

        with mock.patch.object(ops, "stages", stages):
            yield timed.seconds

    def _moments(self, timer: measure.Timer) -> dict[str, float]:
        """The moments alone, of vectors that are there already."""
        start = timer()
        self.stages.patch_moments(self.vectors, self.flat)
        seconds = {"moments forward": timer() - start}
        if self.input_grad:
            into = torch.zeros_like(self.vectors)
            grads = (self.mean, self.grad_mean, self.grad_cov)
            start = timer()
            self.stages.patch_moments_backward_(into, self.vectors, *grads, self.flat)
            seconds["moments backward"] = timer() - start
        return seconds


def prepare(p: Problem) -> dict[str, measure.Work]:
    """The reference and the fast backends, by name.

    Raises:
        AssertionError: the stages of one do not add up to the layer.
    """
    works: dict[str, Any] = {"reference": ReferenceStages(p), **{name: FastStages(name, p) for name in FAST}}
    expected = oracle_answers(p, "deconv", torch.float32)  # only the cutting is checked here: test_layers has the rest
    for name, work in works.items():
        got = work.answers()
        measure.check(f"{name} by stages", got, expected[: len(got)])
    return works
