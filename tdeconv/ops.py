"""PyTorch operators of the fast backends: schema, shapes for the compiler, autograd; no arithmetic.

Each operator takes the backend's name, so that what was chosen outside a compiled graph stays chosen inside it, and
the layer's sizes as ``Geometry.pack()``. None has a second derivative: the reference backend is differentiated by
autograd as often as one likes.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from tdeconv import corridor, flops, tracing
from tdeconv.geometry import Geometry
from tdeconv.layout import memory_format
from tdeconv.precision import no_autocast, statistics_dtype
from tdeconv.products import exact_products

_MODULES = {"torch": "tdeconv.torch_backend", "triton": "tdeconv.kernels"}


@functools.cache
def stages(backend: str) -> corridor.Stages:
    """The module of a fast backend, loaded on first use."""
    return importlib.import_module(_MODULES[backend])


def _no_autocast(function: Any) -> Any:
    """The dtypes are settled before an operator is called; autocast inside it would lower the statistics'."""

    @functools.wraps(function)
    def inner(first: Tensor, *args: Any) -> Any:
        with no_autocast(first.device.type):
            return function(first, *args)

    return inner


def _stage(function: Any) -> Any:
    """A stage of the statistics alone, whose products nothing lowers either."""

    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        with exact_products():
            return function(*args)

    return _no_autocast(inner)


def _empty(like: Tensor, shape: tuple[int, ...], *layout_of: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(*layout_of))


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "tdeconv's fast backends have no second derivative; run the layer with backend='reference', or under "
        "tdeconv.use_backend('reference'), to differentiate it twice"
    )


# ------------------------------------------------------------------------------------------------ the whole layer


@torch.library.custom_op("tdeconv::deconvolve", mutates_args=())
@_no_autocast
def deconvolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    eps: float,
    n_iter: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, saved, news = corridor.forward(stages(backend), x, weight, bias, Geometry.unpack(geometry), eps, n_iter)
    return y.contiguous(memory_format=memory_format(x, weight)), *saved, news


@deconvolve.register_fake
def _(x, weight, bias, geometry, eps, n_iter, backend):  # type: ignore[no-untyped-def]
    geo = Geometry.unpack(geometry)
    y, folded = _empty_outputs(x, weight, geo, backend)
    mean, cov = _empty_moments(x, geo)
    news = x.new_empty(geo.groups, dtype=torch.bool)
    return y, mean, cov, folded, *stages(backend).inverse_sqrt_saved(cov, n_iter), news


def _empty_outputs(x: Tensor, weight: Tensor, geo: Geometry, backend: str) -> tuple[Tensor, Tensor]:
    """Like the layer's output and the folded weight, or the whitened patches."""
    # here too: dynamo, which torch's exporter falls back on, takes the answer elsewhere for False
    tracing.no_training_step(True)
    axes = zip(x.shape[2:], geo.padding, geo.window, geo.stride, strict=True)
    y = _empty(x, (x.shape[0], weight.shape[0], *((n + 2 * p - w) // s + 1 for n, p, w, s in axes)), x, weight)
    if corridor.whitens(stages(backend), x, weight, geo):
        return y, stages(backend).whitened(x, geo)
    o, c, *kernel = weight.shape
    return y, _empty(x, (o, *kernel, c)).movedim(-1, 1)


@torch.library.custom_op("tdeconv::deconvolve_backward", mutates_args=())
@_no_autocast
def deconvolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    deconv: Tensor,
    folded: Tensor,
    basis: Tensor,
    spectrum: Tensor,
    geometry: list[int],
    n_iter: int,
    backend: str,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = corridor.Saved(mean, deconv, folded, basis, spectrum)
    geo = Geometry.unpack(geometry)
    return _gradients(x, weight, *corridor.backward(stages(backend), grad, x, weight, saved, geo, n_iter, need_x))


def _gradients(x: Tensor, weight: Tensor, dx: Tensor | None, dw: Tensor, db: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As an operator returns them: in their tensors' layouts, an empty one where there is none."""
    dx = x.new_empty(0) if dx is None else dx.contiguous(memory_format=memory_format(x))
    return dx, dw.contiguous(memory_format=memory_format(weight)), db


deconvolve_backward.register_autograd(_no_second_derivative)


def _empty_gradients(x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx = _empty(x, x.shape, x) if need_x else x.new_empty(0)
    return dx, _empty(weight, weight.shape, weight), weight.new_empty(weight.shape[0])


@deconvolve_backward.register_fake
def _(grad, x, weight, mean, deconv, folded, basis, spectrum, geometry, n_iter, backend, need_x):  # type: ignore[no-untyped-def]
    return _empty_gradients(x, weight, need_x)


def _deconvolve_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.geometry, _, ctx.n_iter, ctx.backend = inputs
    ctx.save_for_backward(x, weight, *output[1:-1])
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*output[1:])


def _deconvolve_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    need_x = ctx.needs_input_grad[0]
    dx, dw, db = deconvolve_backward(grad, *ctx.saved_tensors, ctx.geometry, ctx.n_iter, ctx.backend, need_x)
    return dx if need_x else None, dw, db if ctx.has_bias else None, *(None,) * 4


deconvolve.register_autograd(_deconvolve_backward, setup_context=_deconvolve_setup)


# ---------------------------------------------------------------------------------------------------- a stale step


@torch.library.custom_op("tdeconv::constants", mutates_args=())
def constants(running: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of a layer's running statistics, which the next fresh step overwrites.

    An operator, so that no compiler takes them from the buffers later, in backward.
    """
    return [value.to(dtype, copy=True) for value in running]


@constants.register_fake
def _(running, dtype):  # type: ignore[no-untyped-def]
    return [torch.empty_like(value, dtype=dtype) for value in running]


@torch.library.custom_op("tdeconv::stale_deconvolve", mutates_args=())
@_no_autocast
def stale_deconvolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geometry: list[int], backend: str
) -> tuple[Tensor, Tensor]:
    y, folded = corridor.stale_forward(stages(backend), x, weight, bias, mean, deconv, Geometry.unpack(geometry))
    return y.contiguous(memory_format=memory_format(x, weight)), folded


@stale_deconvolve.register_fake
def _(x, weight, bias, mean, deconv, geometry, backend):  # type: ignore[no-untyped-def]
    return _empty_outputs(x, weight, Geometry.unpack(geometry), backend)


@torch.library.custom_op("tdeconv::stale_deconvolve_backward", mutates_args=())
@_no_autocast
def stale_deconvolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    deconv: Tensor,
    folded: Tensor,
    geometry: list[int],
    backend: str,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    geo = Geometry.unpack(geometry)
    grads = corridor.stale_backward(stages(backend), grad, x, weight, mean, deconv, folded, geo, need_x)
    return _gradients(x, weight, *grads[:3])


stale_deconvolve_backward.register_autograd(_no_second_derivative)


@stale_deconvolve_backward.register_fake
def _(grad, x, weight, mean, deconv, folded, geometry, backend, need_x):  # type: ignore[no-untyped-def]
    return _empty_gradients(x, weight, need_x)


def _stale_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, mean, deconv, ctx.geometry, ctx.backend = inputs
    ctx.save_for_backward(x, weight, mean, deconv, output[1])
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])


def _stale_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    need_x = ctx.needs_input_grad[0]
    dx, dw, db = stale_deconvolve_backward(grad, *ctx.saved_tensors, ctx.geometry, ctx.backend, need_x)
    return dx if need_x else None, dw, db if ctx.has_bias else None, *(None,) * 4


stale_deconvolve.register_autograd(_stale_backward, setup_context=_stale_setup)


# -------------------------------------------------------------------------------------------------- single stages


@torch.library.custom_op("tdeconv::patch_moments", mutates_args=())
@_stage
def patch_moments(x: Tensor, geometry: list[int], backend: str) -> tuple[Tensor, Tensor]:
    return stages(backend).patch_moments(x, Geometry.unpack(geometry))


def _empty_moments(x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    dtype, d = statistics_dtype(x.dtype), geo.features
    return _empty(x, (geo.groups, d), dtype=dtype), _empty(x, (geo.groups, d, d), dtype=dtype)


@patch_moments.register_fake
def _(x, geometry, backend):  # type: ignore[no-untyped-def]
    return _empty_moments(x, Geometry.unpack(geometry))


@torch.library.custom_op("tdeconv::patch_moments_backward", mutates_args=())
@_stage
def patch_moments_backward(
    x: Tensor, mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, geometry: list[int], backend: str
) -> Tensor:
    dx = _empty(x, x.shape, x).zero_()
    stages(backend).patch_moments_backward_(dx, x, mean, grad_mean, grad_cov, Geometry.unpack(geometry))
    return dx


patch_moments_backward.register_autograd(_no_second_derivative)


@patch_moments_backward.register_fake
def _(x, mean, grad_mean, grad_cov, geometry, backend):  # type: ignore[no-untyped-def]
    return _empty(x, x.shape, x)


def _patch_moments_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.geometry, ctx.backend = inputs
    ctx.save_for_backward(x, output[0])


def _patch_moments_backward(ctx: Any, grad_mean: Tensor, grad_cov: Tensor) -> tuple[Any, ...]:
    return patch_moments_backward(*ctx.saved_tensors, grad_mean, grad_cov, ctx.geometry, ctx.backend), None, None


patch_moments.register_autograd(_patch_moments_backward, setup_context=_patch_moments_setup)


@torch.library.custom_op("tdeconv::inverse_sqrt", mutates_args=())
@_stage
def inverse_sqrt(cov: Tensor, n_iter: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return stages(backend).inverse_sqrt(cov, n_iter)


@inverse_sqrt.register_fake
def _(cov, n_iter, backend):  # type: ignore[no-untyped-def]
    return _empty(cov, cov.shape), *stages(backend).inverse_sqrt_saved(cov, n_iter)


@torch.library.custom_op("tdeconv::inverse_sqrt_backward", mutates_args=())
@_stage
def inverse_sqrt_backward(grad: Tensor, basis: Tensor, spectrum: Tensor, n_iter: int, backend: str) -> Tensor:
    return stages(backend).inverse_sqrt_backward(grad, basis, spectrum, n_iter)


inverse_sqrt_backward.register_autograd(_no_second_derivative)


@inverse_sqrt_backward.register_fake
def _(grad, basis, spectrum, n_iter, backend):  # type: ignore[no-untyped-def]
    return _empty(grad, grad.shape)


def _inverse_sqrt_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ctx.n_iter, ctx.backend = inputs
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _inverse_sqrt_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return inverse_sqrt_backward(grad, *ctx.saved_tensors, ctx.n_iter, ctx.backend), None, None


inverse_sqrt.register_autograd(_inverse_sqrt_backward, setup_context=_inverse_sqrt_setup)


flops.register_when_counted()
