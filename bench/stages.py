"""Where a layer's time goes: its stages, timed inside a whole training step, of the reference and of a fast backend.

Stages as everywhere: ``patch_moments -> inverse_sqrt -> fold -> convolve``, the first in two: ``patches``, the price of
taking them, and ``moments``. ``rest`` is what the layer does around a fast backend's stages: operators, memory layouts,
running statistics.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tdeconv import corridor, ops, reference
from tdeconv.bench import measure, roofline
from tdeconv.bench.cases import Layer
from tdeconv.bench.clock import Clock, CpuClock
from tdeconv.bench.measure import Prepared, Variant
from tdeconv.bench.steps import Problem, Step, away_from_zero, counted, oracle_answers
from tdeconv.geometry import Geometry

STAGES = ("patches", "moments", "inverse_sqrt", "fold", "convolve", "rest")
STATISTICS = ("patches", "moments", "inverse_sqrt")  # no backward where the input has no gradient
DIRECTIONS = ("forward", "backward")
REFERENCE = "reference"  # the one that is cut at its stages instead of timed at them
LEAST = 1e-9  # seconds: what is left of one time after another was taken from it may be less than nothing


def parts(implementation: str, layer: Layer) -> list[str]:
    """The stages and directions that a step of this implementation and layer has, and the whole step."""
    mine = STAGES[:-1] if implementation == REFERENCE else STAGES
    found = [(s, d) for s in mine for d in DIRECTIONS if d == "forward" or layer.input_grad or s not in STATISTICS]
    return ["step", *(f"{stage} {direction}" for stage, direction in found)]


class _Layer:
    """What both ways of running the stages start from: the reference layer's own parameters and options."""

    def __init__(self, p: Problem) -> None:
        if p.layer.groups > 1:
            raise ValueError(f"layer must have one group to be cut at its stages, got {p.layer.name}")
        module: Any = p.modules["deconv"][0]  # behind it is the ReLU
        self.x, self.grad, self.input_grad = p.x.detach(), p.grad, p.layer.input_grad
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

    def run(self, clock: Clock) -> dict[str, float]:
        self.tape: list[tuple[str, list[Tensor], Sequence[Tensor]]] = []
        self.marks: dict[str, tuple[Any, Any]] = {}
        self.clock = clock
        start = clock.mark()
        x = self.x.detach().requires_grad_(self.input_grad)
        weight, bias = (t.detach().requires_grad_() for t in (self.weight, self.bias))
        eye = torch.eye(self.geo.features, dtype=x.dtype, device=x.device)

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
        self.marks["step"] = start, clock.mark()
        self.grads = [t.grad for t in (x, weight, bias) if t.grad is not None]
        return {part: clock.seconds(*marks) for part, marks in self.marks.items()}

    def answers(self) -> list[Tensor]:
        self.run(CpuClock())
        return [self.y, *self.grads]

    def _forward(self, part: str, function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        start = self.clock.mark()
        out = function(*inputs)
        self.marks[f"{part} forward"] = start, self.clock.mark()
        outputs = [out] if isinstance(out, Tensor) else list(out)
        cut = [t.detach().requires_grad_(t.requires_grad) for t in outputs]
        self.tape.append((part, outputs, cut))
        return cut

    def _backward(self) -> None:
        self.tape[-1][2][0].grad = self.grad
        for part, outputs, cut in reversed(self.tape):
            if outputs[0].requires_grad:
                start = self.clock.mark()
                torch.autograd.backward(outputs, [t.grad for t in cut])
                self.marks[f"{part} backward"] = start, self.clock.mark()
        self.tape.clear()


class WatchedStages:
    """A fast backend's module, each call of a stage by way of ``around(stage, direction, call)``."""

    def __init__(self, stages: corridor.Stages, around: Callable[[str, str, Callable[[], Any]], Any]) -> None:
        self._stages, self._around = stages, around

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._stages, name)
        stage, backward, _ = name.partition("_backward")
        if stage not in roofline.STAGES:
            return function
        direction = DIRECTIONS[bool(backward)]
        return lambda *args: self._around(stage, direction, lambda: function(*args))


class Stopwatch:
    """The marks of stages' calls, by stage and direction: ``"fold backward"``."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def around(self, stage: str, direction: str, call: Callable[[], Any]) -> Any:
        start = self._clock.mark()
        result = call()
        self._marks[f"{stage} {direction}"].append((start, self._clock.mark()))
        return result

    def seconds(self) -> dict[str, float]:
        """By stage and direction."""
        return {part: sum(self._clock.seconds(*m) for m in marks) for part, marks in self._marks.items()}


class FastStages(_Layer):
    """A fast backend's layer, its stages timed where the layer calls them."""

    def __init__(self, backend: str, p: Problem) -> None:
        super().__init__(p)
        self.stages = ops.stages(backend)
        modules: Any = copy.deepcopy(p.modules["deconv"])
        module = modules[0]
        module.backend = backend
        self.step = Step(module, p.x, p.grad, p.layer.input_grad)
        self.vectors = reference.to_vectors(reference.im2col(self.x, self.geo), self.geo)[0].contiguous()
        self.mean, cov = reference.patch_moments(self.vectors, self.flat)
        self.grad_mean, self.grad_cov = torch.randn_like(self.mean), torch.randn_like(cov)

    def run(self, clock: Clock) -> dict[str, float]:
        with self._timed(clock) as timed:
            whole = self.step.run(clock)
        whole["backward"] = whole["step"] - whole["forward"]
        seconds = timed.seconds()
        for d in DIRECTIONS:
            rest = whole[d] - sum(s for part, s in seconds.items() if part.endswith(d))
            seconds[f"rest {d}"] = max(rest, LEAST)
        for part, moments in self._moments(clock).items():
            seconds[part] = moments
            patches = part.replace("moments", "patches")
            seconds[patches] = max(seconds.pop(part.replace("moments", "patch_moments")) - moments, LEAST)
        return {"step": whole["step"], **seconds}

    def answers(self) -> list[Tensor]:
        with self._timed(CpuClock()):
            return self.step.first_step()

    @contextmanager
    def _timed(self, clock: Clock) -> Iterator[Stopwatch]:
        """Inside, the backend's operators find timed stages."""
        watch = Stopwatch(clock)
        watched = WatchedStages(self.stages, watch.around)

        def stages(backend: str) -> Any:
            return watched

        with mock.patch.object(ops, "stages", stages):
            yield watch

    def _moments(self, clock: Clock) -> dict[str, float]:
        """The moments alone, of vectors that are there already."""
        start = clock.mark()
        self.stages.patch_moments(self.vectors, self.flat)
        seconds = {"moments forward": clock.seconds(start, clock.mark())}
        if self.input_grad:
            into = torch.zeros_like(self.vectors)
            grads = (self.mean, self.grad_mean, self.grad_cov)
            start = clock.mark()
            self.stages.patch_moments_backward_(into, self.vectors, *grads, self.flat)
            seconds["moments backward"] = clock.seconds(start, clock.mark())
        return seconds


def prepare(p: Problem, names: Sequence[str]) -> Iterator[tuple[Variant, Prepared]]:
    """The stages of the reference or of fast backends, as a layer calls them, in float32.

    Raises:
        AssertionError: the stages of one do not add up to the layer.
    """
    p = away_from_zero(p, "deconv", torch.float32)
    # without the ReLU; and only the cutting is checked here: test_layers has the rest
    expected = oracle_answers(replace(p, modules={"deconv": p.modules["deconv"][0]}), "deconv", torch.float32)
    for name in names:
        work: Any = ReferenceStages(p) if name == REFERENCE else FastStages(name, p)
        got = work.answers()
        measure.check(f"{name} by stages", got, expected[: len(got)])
        yield Variant(name, "contiguous", "float32"), Prepared(work, {"batch": p.x.shape[0], "shape": list(p.x.shape)})


def floors(layer: Layer, batch: int, ceilings: roofline.Ceilings) -> dict[str, dict[str, Any]]:
    """What each stage must cost at least; that of the moments is of reading the patches, too."""
    found = roofline.works(counted(layer, batch, "float32"))
    named = {f"{w.stage.removeprefix('patch_')} {w.direction}": roofline.total([w], ceilings) for w in found}
    return {**named, "step": roofline.total(found, ceilings)}
