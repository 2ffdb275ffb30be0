"""What several test files share: relative differences, layers run on a backend, small nets, the loops of method.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import tdeconv
from cases import Case
from tdeconv import reference
from tdeconv.geometry import Geometry

# The tensors of these tests are tiny: threads would only wait for each other, on a busy machine for minutes.
torch.set_num_threads(1)

FAST = ("torch",)  # the backends held to the reference
BACKENDS = ("reference", *FAST)

F64_TOLERANCE = 1e-11
F32_TOLERANCE = 2e-5

# Hypothesis: a bounded, repeatable search; torch's first calls are slow, so no deadlines
bounded = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def difference(actual: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """``||actual - expected|| / ||expected||`` in float64; absolute where the expected is zero; NaN for NaN.

    Where terms cancel, rounding follows their size: with ``size``, a tensor as large as they are, the difference is
    relative to its norm if that is larger.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    a, e = actual.detach().double(), expected.detach().double()
    scale = max(float(t.detach().double().norm()) for t in (e, size) if t is not None)
    return float((a - e).norm()) / (scale or 1.0)


def assert_close(actual: Any, expected: Any, tolerance: float, sizes: Sequence[Tensor | None] | None = None) -> None:
    """Two tensors, or two tuples of them (None agrees with None), differ by at most ``tolerance``, relatively: to the
    expected, or to these sizes where they are larger (see :func:`difference`).
    """
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    sizes = [None] * len(expected) if sizes is None else sizes
    for i, (a, e, size) in enumerate(zip(actual, expected, sizes, strict=True)):
        assert (a is None) == (e is None), f"number {i}: {a} against {e}"
        if a is not None:
            d = difference(a, e, size)
            assert d <= tolerance, f"number {i} of shape {tuple(a.shape)} differs by {d:.2e} > {tolerance:.2e}"


class Step(NamedTuple):
    """One training step: output, gradients (None where there is no such parameter), running statistics."""

    y: Tensor
    grad_x: Tensor | None
    grad_weight: Tensor
    grad_bias: Tensor | None
    running_mean: Tensor | None
    running_deconv: Tensor | None


def run_case(
    case: Case, backend: str, dtype: torch.dtype, tensors: tuple[Any, ...] | None = None, n_iter: int = 5
) -> Step:
    """The case as a function: forward in training, backward of a fixed random gradient."""
    x, weight, bias = leaves = _leaves(case, dtype, tensors)
    geo = case.geo
    batch = () if geo.groups == 1 else (geo.groups,)
    mean = torch.zeros(geo.groups * geo.features, dtype=dtype)
    deconv = torch.eye(geo.features, dtype=dtype).repeat(*batch, 1, 1)
    function = tdeconv.fast_deconv if case.rank else tdeconv.delinear
    y = function(x, weight, bias, mean, deconv, training=True, n_iter=n_iter, backend=backend, **case.options())
    return Step(y.detach(), *_gradients(y, leaves), mean, deconv)


def what_cancels(case: Case, tensors: tuple[Any, ...] | None = None, n_iter: int = 5, eps: float = 1e-5) -> Step:
    """How large the terms are that :func:`run_case` adds up, as sizes for :func:`difference`; float64.

    The layer with its root as a constant and its mean left out. Of few samples the mean's share cancels nearly all of
    that (with one sample the output is the bias, and neither input nor weight has a gradient), and what is left is the
    rounding of these terms. Nothing cancels in the statistics themselves.
    """
    x, weight, bias = leaves = _leaves(case, torch.float64, tensors)
    geo = case.geo
    with torch.no_grad():
        _, mean, deconv, _ = reference.deconvolve(x, weight, bias, geo, eps, n_iter)
    y = reference.convolve(x, *reference.fold(weight, bias, torch.zeros_like(mean), deconv, geo), geo)
    return Step(y.detach(), *_gradients(y, leaves), None, None)


def _leaves(case: Case, dtype: torch.dtype, tensors: tuple[Any, ...] | None) -> list[Tensor | None]:
    """Input, weight and bias to differentiate by, of these values or the case's."""
    given = tensors or case.tensors(torch.float64)
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]


def _gradients(y: Tensor, leaves: list[Tensor | None]) -> list[Tensor | None]:
    """By every leaf (None of a missing one), for a fixed random gradient."""
    g = randn(*y.shape, dtype=y.dtype, seed=1)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], g))
    return [None if t is None else next(grads) for t in leaves]


def fold_terms(
    tensors: Sequence[Tensor | None], grads: Sequence[Tensor], geo: Geometry
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """How large the terms are that a fold of weight, bias, mean and root adds up, and those of its gradients by weight,
    mean and root, as sizes for :func:`difference`: the same of values that cannot cancel.
    """
    weight, bias, mean, deconv = (None if t is None else t.detach().double().abs() for t in tensors)
    leaves = [weight.requires_grad_(), mean.neg().requires_grad_(), deconv.requires_grad_()]  # b' subtracts the mean's
    folded = reference.fold(leaves[0], bias, leaves[1], leaves[2], geo)
    return folded, torch.autograd.grad(folded, leaves, [g.double().abs() for g in grads])


def train_step(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor | None, ...]:
    """Output, gradients of input and parameters (None for a missing bias), running statistics, of one module."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(randn(*y.shape, dtype=y.dtype, seed=1))
    grads = (x.grad, *(p.grad for p in layer.parameters()))
    return (y.detach(), *grads, *(b.clone() for b in layer.buffers() if b.is_floating_point()))


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)


# ------------------------------------------------------------- method.md a second time: loops and numpy, whitening data


def loop_rows(x: Tensor, geo: Geometry, stride: tuple[int, ...]) -> np.ndarray:
    """Patches at every ``stride``-th position as rows ``(M, C*taps)``, one number at a time; zero outside the input."""
    values = x.detach().double().numpy()
    n, c, spatial = values.shape[0], values.shape[1], values.shape[2:]
    extent = [d * (k - 1) + 1 for d, k in zip(geo.dilation, geo.kernel_size, strict=True)]
    counts = [(s + 2 * p - e) // st + 1 for s, p, e, st in zip(spatial, geo.padding, extent, stride, strict=True)]
    rows = []
    for image in range(n):
        for position in itertools.product(*(range(m) for m in counts)):
            row = []
            for channel in range(c):
                for tap in itertools.product(*(range(k) for k in geo.kernel_size)):
                    axes = zip(position, stride, tap, geo.dilation, geo.padding, strict=True)
                    at = tuple(i * st + t * d - p for i, st, t, d, p in axes)
                    inside = all(0 <= a < s for a, s in zip(at, spatial, strict=True))
                    row.append(values[(image, channel, *at)] if inside else 0.0)
            rows.append(row)
    return np.array(rows)


def loop_samples(x: Tensor, geo: Geometry) -> np.ndarray:
    """The rows the statistics are taken over (method.md, step 1)."""
    stride = tuple(geo.sampling_stride * s for s in geo.stride)
    if math.prod(geo.kernel_size) > 1:
        return loop_rows(x, geo, stride)
    pixels = x.detach().double().movedim(1, -1).reshape(-1, x.shape[1]).numpy()
    return pixels[:: math.prod(stride)]


def column_home(j: int, geo: Geometry) -> tuple[int, int, int]:
    """(covariance, vector, place) of patch column ``j`` (method.md, step 2)."""
    d, vectors = geo.features, geo.channels // (geo.block * geo.groups)
    if geo.groups > 1:
        return j // d, 0, j % d
    if geo.grouping == "interleaved":
        return 0, j % vectors, j // vectors
    return 0, j // d, j % d


def loop_vectors(rows: np.ndarray, geo: Geometry) -> np.ndarray:
    """Rows split into their vectors: ``(covariances, M, vectors, D)``."""
    out = np.full((geo.groups, len(rows), geo.channels // (geo.block * geo.groups), geo.features), np.nan)
    for j in range(rows.shape[1]):
        covariance, vector, place = column_home(j, geo)
        out[covariance, :, vector, place] = rows[:, j]
    assert not np.isnan(out).any()
    return out


def loop_moments(x: Tensor, geo: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``(b, D)`` and biased covariance ``(b, D, D)`` (method.md, step 3, without eps)."""
    vectors = loop_vectors(loop_samples(x, geo), geo)
    means, covs = [], []
    for group in vectors.reshape(geo.groups, -1, geo.features):
        means.append(group.mean(0))
        covs.append(sum(np.outer(v, v) for v in group - group.mean(0)) / len(group))
    return np.array(means), np.array(covs)


def spectral_root(cov: np.ndarray, n_iter: int) -> np.ndarray:
    """The Newton-Schulz polynomial on each eigenvalue (method.md, step 4)."""
    values, vectors = np.linalg.eigh(cov)
    norm = np.sqrt((cov**2).sum((-2, -1)))[..., None]
    y, z = values / norm, np.ones_like(values)
    for _ in range(n_iter):
        t = (3 - z * y) / 2
        y, z = y * t, t * z
    return (vectors * (z / np.sqrt(norm))[..., None, :]) @ np.swapaxes(vectors, -1, -2)


def loop_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, geo: Geometry, eps: float = 1e-5, n_iter: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer as the paper tells it: whiten every patch, then multiply by the weight. Nothing is folded."""
    mean, cov = loop_moments(x, geo)
    root = spectral_root(cov + eps * np.eye(geo.features), n_iter)
    rows = loop_rows(x, geo, geo.stride)
    whitened = np.zeros_like(rows)
    vectors = loop_vectors(rows, geo)
    for b in range(geo.groups):
        vectors[b] = (vectors[b] - mean[b]) @ root[b]
    for j in range(rows.shape[1]):
        covariance, vector, place = column_home(j, geo)
        whitened[:, j] = vectors[covariance, :, vector, place]
    out = weight.shape[0]
    w, per_group = weight.detach().double().numpy().reshape(out, -1), rows.shape[1] // geo.groups
    y = np.zeros((len(rows), out))
    for o in range(out):
        first = o // (out // geo.groups) * per_group
        y[:, o] = whitened[:, first : first + per_group] @ w[o] + (0.0 if bias is None else float(bias[o]))
    extent = [d * (k - 1) + 1 for d, k in zip(geo.dilation, geo.kernel_size, strict=True)]
    shape = [
        (s + 2 * p - e) // st + 1 for s, p, e, st in zip(x.shape[2:], geo.padding, extent, geo.stride, strict=True)
    ]
    y = torch.from_numpy(y).reshape(x.shape[0], *shape, out).movedim(-1, 1)
    return y, torch.from_numpy(mean), torch.from_numpy(root)


class Net(nn.Module):
    """Layers by name, and what is done with them: ``how(net, x)``."""

    def __init__(self, how: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)
