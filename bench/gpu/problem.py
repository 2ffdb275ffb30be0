"""One layer's stages: inputs like real ones, each stage's call on a backend, and its answers in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.cases import Case
from tdeconv import reference, torch_backend
from tdeconv.bench import roofline

EPS = 1e-5
Call = Callable[[], tuple[Tensor, ...]]
# What a stage may differ from float64 by, forward and backward (relative, Euclidean), besides its outputs' rounding:
# the default policy's; convolutions in float32 multiply in tf32, the library's as the kernels'.
TOLERANCE = {
    "patch_moments": (1e-4, 1.5e-3),
    "inverse_sqrt": (3e-5, 5e-5),
    "fold": (2e-5, 5e-5),
    "convolve": (2e-3, 2e-3),
}
LONG_ROOT = 2e-3  # with more than seven steps


def shape_of(case: Case) -> roofline.Shape:
    return roofline.Shape(
        batch=case.batch,
        channels=case.channels,
        size=(case.size, case.size),
        out=case.out,
        kernel=(case.kernel, case.kernel),
        stride=(case.stride, case.stride),
        n_iter=case.n_iter,
        dtype=getattr(torch, case.dtype),
        input_grad=not case.first,
    )


class Problem:
    """A case on a device. ``geo`` as in :mod:`tdeconv.reference`; what a stage takes is computed when first needed."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device, self.shape = case, device, shape_of(case)
        self.geo, self.n_iter = self.shape.geo, case.n_iter
        self.generator = torch.Generator(device).manual_seed(0)
        self.dtype = self.shape.dtype
        self._grads: dict[str, tuple[Tensor, ...]] = {}
        self.format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def _laid_out(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).contiguous(memory_format=self.format)

    @functools.cached_property
    def x(self) -> Tensor:
        """``(N, C, H, W)``: neighbours repeat each other, as behind a ReLU (``tdeconv.bench.cases`` has the same)."""
        n, c, size = self.case.batch, self.case.channels, self.case.size
        coarse = self.randn(n, c, max(1, size // 2), max(1, size // 2))
        x = F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * self.randn(n, c, size, size)
        return self._laid_out(x if self.case.first else x.relu())

    @functools.cached_property
    def weight(self) -> Tensor:
        case = self.case
        fan = case.channels * case.kernel**2
        return self._laid_out(self.randn(case.out, case.channels, case.kernel, case.kernel) / fan**0.5)

    @functools.cached_property
    def bias(self) -> Tensor:
        return self.randn(self.case.out).to(self.dtype)

    @functools.cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``(b, D)`` and covariance ``(b, D, D)`` with its eps, float32."""
        mean, cov = torch_backend.patch_moments(self.x.float(), self.geo)
        return mean, cov + EPS * torch.eye(cov.shape[-1], device=self.device)

    @functools.cached_property
    def root(self) -> Tensor:
        """``(b, D, D)``, float32."""
        return reference.inverse_sqrt(self.moments[1].double(), self.n_iter).float()

    @functools.cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias for the convolution, in the input's dtype."""
        weight, bias = reference.fold(self.weight, self.bias, self.moments[0], self.root, self.geo)
        return self._laid_out(weight), bias.to(self.dtype)

    def inputs(self, stage: str) -> tuple[Tensor, ...]:
        mean, cov = self.moments if stage in ("inverse_sqrt", "fold") else (self.bias, self.bias)
        return {
            "patch_moments": lambda: (self.x,),
            "inverse_sqrt": lambda: (cov,),
            "fold": lambda: (self.weight, self.bias, mean, self.root),
            "convolve": lambda: (self.x, *self.folded),
        }[stage]()

    def formula(self, stage: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The reference's stage."""
        if stage == "patch_moments":
            return reference.patch_moments(*inputs, self.geo)
        if stage == "inverse_sqrt":
            return (reference.inverse_sqrt(*inputs, self.n_iter),)
        if stage == "fold":
            return reference.fold(*inputs, self.geo)
        return (reference.convolve(*inputs, self.geo),)

    def grads(self, stage: str) -> tuple[Tensor, ...]:
        """Gradients of a stage's outputs, fixed; a symmetric matrix has a symmetric one."""
        if stage not in self._grads:
            self._grads[stage] = self._new_grads(stage)
        return self._grads[stage]

    def _new_grads(self, stage: str) -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = [torch.empty_like(t) for t in self.formula(stage, *self.inputs(stage))]
        found = [self.randn(*t.shape).to(t.dtype).contiguous(memory_format=_format(t)) for t in outputs]
        return tuple((g + g.mT) / 2 if _square(g) else g for g in found)

    def truth(self, stage: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs and inputs' gradients in float64, of the same rounded inputs."""
        leaves = [t.double().requires_grad_() for t in self.inputs(stage)]
        outputs = self.formula(stage, *leaves)
        grads = torch.autograd.grad(outputs, leaves, [g.double() for g in self.grads(stage)])
        return outputs, grads

    def call(self, stages: Any, stage: str, direction: str) -> Call:
        """A backend's stage, ready to be run again and again; backward gives the gradients in the order of inputs."""
        inputs = self.inputs(stage)
        if direction == "forward":
            return {
                "patch_moments": lambda: stages.patch_moments(*inputs, self.geo),
                "inverse_sqrt": lambda: stages.inverse_sqrt(*inputs, self.n_iter)[:1],
                "fold": lambda: stages.fold(*inputs, self.geo),
                "convolve": lambda: (stages.convolve(*inputs, self.geo),),
            }[stage]
        return getattr(self, f"_{stage}_backward")(stages, inputs, self.grads(stage))

    def _patch_moments_backward(self, stages: Any, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Call:
        (x,), into = inputs, torch.zeros_like(inputs[0])
        mean = self.moments[0]

        def run() -> tuple[Tensor, ...]:
            stages.patch_moments_backward_(into, x, mean, *grads, self.geo)
            return (into,)

        return run

    def _inverse_sqrt_backward(self, stages: Any, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Call:
        _, basis, spectrum = stages.inverse_sqrt(*inputs, self.n_iter)
        return lambda: (stages.inverse_sqrt_backward(*grads, basis, spectrum, self.n_iter),)

    def _fold_backward(self, stages: Any, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Call:
        weight, _, mean, root = inputs
        need = not self.case.first

        def run() -> tuple[Tensor, ...]:
            grad_weight, grad_mean, grad_root = stages.fold_backward(*grads, weight, mean, root, self.geo, need)
            return (grad_weight, grads[1], grad_mean, grad_root)

        return run

    def _convolve_backward(self, stages: Any, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Call:
        x, weight, _ = inputs
        return lambda: stages.convolve_backward(*grads, x, weight, self.geo, not self.case.first)

    def error(self, stage: str, direction: str, got: tuple[Tensor | None, ...], truth: Any) -> float:
        """The largest relative error of any tensor.

        Raises:
            ValueError: it is beyond what the stage is allowed, or not a number.
        """
        backward = direction == "backward"
        worst = 0.0
        for number, (g, e) in enumerate(zip(got, truth[backward], strict=True)):
            if g is None:
                continue
            allowed = TOLERANCE[stage][backward] + torch.finfo(g.dtype).eps
            allowed = max(allowed, LONG_ROOT) if stage == "inverse_sqrt" and self.n_iter > 7 else allowed
            g, e = ((t.detach().double() + t.detach().double().mT) / 2 if _square(t) else t.detach().double()
                    for t in (g, e))  # fmt: skip
            error = float((g - e).norm() / e.norm())
            if not error <= allowed:
                raise ValueError(f"wrong {direction}: output {number} has relative error {error:.2e} > {allowed:.2e}")
            worst = max(worst, error)
        return worst


def _square(t: Tensor) -> bool:
    """Whether it is a covariance or a root: what is symmetric counts by its symmetric part."""
    return t.ndim == 3


def _format(t: Tensor) -> torch.memory_format:
    last = t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
