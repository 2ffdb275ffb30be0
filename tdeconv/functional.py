"""The four stages and the whole layers as functions: check the arguments, choose a backend, call it.

Shapes: input ``x (N, C, *spatial)`` with one, two or three spatial axes, or without the batch axis; weight
``(O, C/groups, *kernel)``. ``D = block * prod(kernel)`` features share one covariance. The statistics are float32, or
float64 for float64 input, whatever the input's precision. Source: Ye et al., *Network Deconvolution*, ICLR 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdeconv import checks, distributed, ops, reference, running, schedule, tracing, transforms
from tdeconv.backends import choose
from tdeconv.geometry import Geometry, resolve_block
from tdeconv.precision import compute_dtype, no_autocast, statistics_dtype
from tdeconv.tracing import sizes

METHODS = ("newton_schulz", "eigh")


@tracing.one_operation
def patch_moments(
    x: Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    block: int | None = None,
    grouping: str = "interleaved",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of an input's patches: the first stage.

    Args:
        x: ``(N, C, *spatial)``, one to three spatial axes, any real floating dtype, not empty.
        kernel_size: int, or one per spatial axis.
        stride: step between the sampled patches (a layer's sampling stride times its own stride). With a 1x1 kernel
            every ``prod(stride)``-th pixel in N, H, W order is taken, and padding plays no part.
        padding: zeros around the input; they are data to the statistics.
        dilation: spacing of the kernel's taps.
        groups: channel groups with a covariance each.
        block: channels that share a covariance's rows, cut down to a divisor of C; None means all. Ignored if
            ``groups > 1``, where it is ``C / groups``.
        grouping: ``"interleaved"`` (patch column ``j`` belongs to vector ``j mod G``, the paper's) or ``"contiguous"``.
        backend: see :func:`tdeconv.use_backend`.

    Returns:
        ``mean (D)`` and ``cov (D, D)``, or ``(groups * D)`` and ``(groups, D, D)``; no eps is added. Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    checks.float_tensor("x", x)
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x must have shape (N, C, *spatial) with 1 to 3 spatial axes, got {tuple(x.shape)}")
    if 0 in sizes(x):
        raise ValueError(f"x must hold at least one patch, got an empty tensor of shape {tuple(x.shape)}")
    groups = checks.positive_int("groups", groups)
    channels = sizes(x)[1]
    checks.divides("groups", groups, "the input's channels", channels)
    block = channels if block is None else checks.positive_int("block", block)
    geo = convolution_geometry(x, kernel_size, stride, padding, dilation, groups, block, grouping, 1)
    with no_autocast(x.device.type):
        name = transforms.backend_for(choose(backend, x.device))
        mean, cov = reference.patch_moments(x, geo) if name == "reference" else ops.patch_moments(x, geo.pack(), name)
    return mean.flatten(), cov if groups > 1 else cov.squeeze(0)


@tracing.one_operation
def inverse_sqrt(cov: Tensor, n_iter: int = 5, *, method: str = "newton_schulz", backend: str | None = None) -> Tensor:
    """Inverse square root of covariance matrices: the second stage.

    Args:
        cov: symmetric positive definite, ``(..., D, D)``, any real floating dtype (half precision is computed in
            float32). Add eps to its diagonal first.
        n_iter: Newton-Schulz steps from ``cov / ||cov||_F``. A few steps do not converge for small eigenvalues, and
            the result is exactly that polynomial of ``cov``: part of the method.
        method: ``"newton_schulz"``, or ``"eigh"`` for the converged root (``n_iter`` is then ignored).
        backend: see :func:`tdeconv.use_backend`.

    Returns:
        ``(..., D, D)``, symmetric, in cov's dtype. Differentiable; the norm takes part in the gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    checks.float_tensor("cov", cov)
    if cov.ndim < 2 or sizes(cov)[-1] != sizes(cov)[-2]:
        raise ValueError(f"cov must have shape (..., D, D), got {tuple(cov.shape)}")
    n_iter = checks.positive_int("n_iter", n_iter)
    checks.one_of("method", method, METHODS)
    if 0 in sizes(cov):
        return cov.clone()
    with no_autocast(cov.device.type):
        batch = cov.to(statistics_dtype(cov.dtype)).reshape(-1, *cov.shape[-2:])
        name = transforms.backend_for(choose(backend, cov.device))
        if method == "eigh":
            root = reference.converged_inverse_sqrt(batch)
        elif name == "reference":
            root = reference.inverse_sqrt(batch, n_iter)
        else:
            root = ops.inverse_sqrt(batch, n_iter, name)[0]
    return root.reshape(cov.shape).to(cov.dtype)


@tracing.one_operation
def fold_deconv(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    deconv: Tensor,
    *,
    groups: int = 1,
    grouping: str = "interleaved",
) -> tuple[Tensor, Tensor]:
    """Fold the whitening into a layer's parameters: the third stage.

    ``W'_g = W_g S`` for each vector of the weight and ``b' = b - sum_g W'_g mu``, so that convolving with
    ``(W', b')`` is whitening every patch and convolving with ``(W, b)``.

    Args:
        weight: ``(O, C/groups, *kernel)``, or a linear layer's ``(O, C)``.
        bias: ``(O)`` or None for zero.
        mean: ``(D)``, or ``(groups * D)``; D is ``block * prod(kernel)``.
        deconv: ``(D, D)``, or ``(groups, D, D)``.
        groups: as the convolution's.
        grouping: as the moments were taken (a linear layer's is ``"contiguous"``).

    Returns:
        The folded weight and bias, shaped and typed as ``weight`` and ``(O)``. Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    checks.plain_weight("weight", weight)
    for name, value in (("mean", mean), ("deconv", deconv)):
        checks.float_tensor(name, value)
    if weight.ndim < 2:
        raise ValueError(f"weight must have shape (O, C/groups, *kernel), got {tuple(weight.shape)}")
    groups = checks.positive_int("groups", groups)
    out, channels, *kernel = sizes(weight)
    checks.divides("groups", groups, "the output channels", out)
    checks.grouping(grouping)
    checks.same_home(weight, bias=bias, mean=mean, deconv=deconv)
    if bias is not None:
        checks.shape("bias", checks.float_tensor("bias", bias), (out,))
    ones = (1,) * len(kernel)
    geo = Geometry(channels * groups, tuple(kernel), ones, ones, ones, groups, 1, grouping)
    d = sizes(deconv)[-1] if deconv.ndim >= 2 else 0
    if d == 0 or d % geo.taps or (channels * geo.taps) % d:
        raise ValueError(
            f"deconv must have shape (D, D) with D a multiple of the {geo.taps} kernel positions that divides the "
            f"{channels * geo.taps} columns of weight, got {tuple(deconv.shape)}"
        )
    geo = Geometry(geo.channels, tuple(kernel), ones, ones, ones, groups, d // geo.taps, grouping)
    checks.running(mean, deconv, geo, training=False)
    with no_autocast(weight.device.type):
        folded, shift = _fold(weight, bias, mean, deconv, geo)
    return folded.to(weight.dtype), shift.to(weight.dtype)


@tracing.one_operation
def fast_deconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_deconv: Tensor | None = None,
    *,
    training: bool,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    n_iter: int = 5,
    momentum: float | Tensor | None = 0.1,
    block: int = 64,
    sampling_stride: int = 3,
    samples_per_feature: int = 0,
    grouping: str = "interleaved",
    stats_interval: int = 1,
    stats_warmup: int = schedule.WARMUP,
    step: int | None = None,
    stale: bool = False,
    num_updates: Tensor | None = None,
    backend: str | None = None,
    process_group: distributed.StatisticsGroup | None = None,
) -> Tensor:
    """A deconvolution layer: whiten every patch, then convolve; 1-D, 2-D or 3-D by the weight's shape.

    Args:
        x: ``(N, C, *spatial)`` or ``(C, *spatial)``.
        weight: ``(O, C/groups, *kernel)``.
        bias: ``(O)`` or None.
        running_mean: ``(D)``, or ``(groups * D)`` with groups > 1: updated in place in training, used otherwise. None
            in training keeps no statistics.
        running_deconv: ``(D, D)``, or ``(groups, D, D)``; likewise.
        training: whether the statistics are the input's own.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; padding in ints.
        eps: added to the covariance's diagonal.
        n_iter: Newton-Schulz steps.
        momentum: share of the new statistics in the running ones, a number or a 0-d tensor, which is not read; None
            makes these the plain average of all batches, which takes ``num_updates``.
        block: channels whitened together, cut down to a divisor of C.
        sampling_stride: patches are sampled at every ``sampling_stride * stride``-th position.
        samples_per_feature: where that leaves a covariance fewer than this many samples for each of its features, a
            training step samples more, up to all patches; and where samples are still few, it takes fewer
            Newton-Schulz steps (see :class:`tdeconv.FastDeconv`). 0, as in the paper, does neither.
        grouping: ``"interleaved"`` or ``"contiguous"``.
        stats_interval: behind the first ``stats_warmup`` training steps, take statistics in every ``stats_interval``-th
            only, in which ``momentum`` stands for as many steps; those between are stale. More than 1 needs ``step``.
        stats_warmup: see there.
        step: how many training steps came before this one.
        stale: whether a training step uses the running statistics, as constants, and leaves them as they are, whatever
            ``step`` says.
        num_updates: ``(groups)`` ints, updated in place: how many batches each covariance's running values are of. Only
            read with ``momentum=None``.
        backend: see :func:`tdeconv.use_backend`.
        process_group: whose ranks' batches the statistics are taken over: a converted layer's ``process_group`` (see
            :func:`tdeconv.convert_sync_deconv`), or None.

    Returns:
        ``(N, O, *spatial_out)`` in x's dtype, or autocast's. An empty batch yields an empty output and leaves the
        running statistics alone; statistics that are not finite do too, and the output shows them; and so does a batch
        without any variation, for each covariance that has none.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, range or device.
    """
    rank = checks.plain_weight("weight", weight).ndim - 2
    checks.float_tensor("x", x)
    if not 1 <= rank <= 3:
        raise ValueError(f"weight must have shape (O, C/groups, *kernel) with 1 to 3 axes, got {tuple(weight.shape)}")
    if x.ndim not in (rank + 1, rank + 2):
        raise ValueError(
            f"expected an input of {rank + 2} dimensions (N, C, *spatial), or {rank + 1} without a batch, for a weight "
            f"of shape {tuple(weight.shape)}; got shape {tuple(x.shape)}"
        )
    batch = x if x.ndim == rank + 2 else x.unsqueeze(0)
    groups = checks.weight_of(weight, batch, bias, groups)
    eps, n_iter, momentum, block, sampling_stride = checks.options(eps, n_iter, momentum, block, sampling_stride)
    samples_per_feature = checks.positive_int("samples_per_feature", samples_per_feature, least=0)
    geo = convolution_geometry(
        batch, sizes(weight)[2:], stride, padding, dilation, groups, block, grouping, sampling_stride
    )
    stale, momentum = _kind(training, stats_interval, stats_warmup, step, stale, momentum)
    if training and not stale:
        geo, n_iter = sampled(geo, n_iter, batch, samples_per_feature, process_group)
    y = _layer(
        batch,
        weight,
        bias,
        running_mean,
        running_deconv,
        training,
        geo,
        eps,
        n_iter,
        momentum,
        backend,
        process_group,
        stale,
        num_updates,
    )
    return y if batch is x else y.squeeze(0)


@tracing.one_operation
def delinear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_deconv: Tensor | None = None,
    *,
    training: bool,
    eps: float = 1e-5,
    n_iter: int = 5,
    momentum: float | Tensor | None = 0.1,
    block: int = 512,
    stats_interval: int = 1,
    stats_warmup: int = schedule.WARMUP,
    step: int | None = None,
    stale: bool = False,
    num_updates: Tensor | None = None,
    backend: str | None = None,
    process_group: distributed.StatisticsGroup | None = None,
) -> Tensor:
    """A fully connected deconvolution layer: whiten runs of ``block`` features by one shared covariance, then map.

    Args:
        x: ``(..., C)``.
        weight: ``(O, C)``.
        bias: ``(O)`` or None.
        running_mean: ``(D)`` with D the block cut down to a divisor of C; None in training keeps no statistics.
        running_deconv: ``(D, D)``; likewise.
        training, eps, n_iter, momentum, block, stats_interval, stats_warmup, step, stale, num_updates, backend,
            process_group: as in :func:`fast_deconv`.

    Returns:
        ``(..., O)`` in x's dtype, or autocast's.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, range or device.
    """
    checks.plain_weight("weight", weight)
    checks.float_tensor("x", x)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (O, C), got {tuple(weight.shape)}")
    features = sizes(weight)[1]
    if sizes(x)[-1:] != (features,):
        raise ValueError(f"expected an input of shape (..., {features}), got {tuple(x.shape)}")
    eps, n_iter, momentum, block, _ = checks.options(eps, n_iter, momentum, block)
    rows = x.reshape(-1, features)
    checks.weight_of(weight, rows, bias, 1)
    geo = linear_geometry(features, block)
    stale, momentum = _kind(training, stats_interval, stats_warmup, step, stale, momentum)
    y = _layer(
        rows,
        weight,
        bias,
        running_mean,
        running_deconv,
        training,
        geo,
        eps,
        n_iter,
        momentum,
        backend,
        process_group,
        stale,
        num_updates,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linear_geometry(features: int, block: int) -> Geometry:
    """A fully connected layer's sizes."""
    return Geometry(features, (), (), (), (), 1, resolve_block(block, features), "contiguous")


def convolution_geometry(
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    block: int,
    grouping: str,
    sampling_stride: int,
) -> Geometry:
    rank, channels = x.ndim - 2, sizes(x)[1]
    geo = Geometry(
        channels,
        checks.int_tuple("kernel_size", kernel_size, rank, 1),
        checks.int_tuple("stride", stride, rank, 1),
        checks.int_tuple("padding", padding, rank, 0),
        checks.int_tuple("dilation", dilation, rank, 1),
        groups,
        resolve_block(block, channels, groups),
        checks.grouping(grouping),
        sampling_stride,
    )
    checks.kernel_fits(x, geo)
    return geo


def sampled(
    geo: Geometry,
    n_iter: int,
    x: Tensor,
    samples_per_feature: int,
    process_group: distributed.StatisticsGroup | None,
) -> tuple[Geometry, int]:
    """The sizes and Newton-Schulz steps of a training step: where samples are few and ``samples_per_feature`` asks for
    it, patches are sampled more densely, and fewer steps are taken.

    Over several ranks, each is taken to have as large a batch as this one when patches are sampled. But all steps are
    taken: steps by a rank's own batch would give ranks of different batches different roots.
    """
    if not samples_per_feature:
        return geo, n_iter
    spatial, ranks = tuple(x.shape[2:]), process_group.size if process_group is not None else 1
    geo = geo.sampling_enough(x.shape[0] * ranks, spatial, samples_per_feature)
    return geo, geo.steps_enough(x.shape[0], spatial, n_iter) if ranks == 1 else n_iter


def _kind(
    training: bool,
    stats_interval: int,
    stats_warmup: int,
    step: int | None,
    stale: bool,
    momentum: float | Tensor | None,
) -> tuple[bool, float | Tensor | None]:
    """Whether it is a stale step, and the momentum of a fresh one."""
    interval, before = checks.interval(stats_interval, step)
    warmup = checks.positive_int("stats_warmup", stats_warmup, least=0)
    stale = checks.flag("stale", stale) or not schedule.is_fresh(before, interval, warmup)
    if interval > 1 and momentum is not None and before >= warmup:
        momentum = schedule.of_interval(momentum, interval)
    return training and stale, momentum


def _layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_deconv: Tensor | None,
    training: bool,
    geo: Geometry,
    eps: float,
    n_iter: int,
    momentum: float | Tensor | None,
    backend: str | None,
    process_group: distributed.StatisticsGroup | None,
    stale: bool,
    num_updates: Tensor | None,
) -> Tensor:
    """Any layer, arguments checked: statistics of the batch in a fresh training step, else the running ones."""
    tracing.no_training_step(training)
    fresh = training and not stale
    checks.same_home(
        x,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_deconv=running_deconv,
        num_updates=num_updates,
    )
    checks.running(running_mean, running_deconv, geo, fresh)
    if fresh and momentum is None and running_mean is not None:
        checks.num_updates(num_updates, geo)
    device, autocast = x.device.type, compute_dtype(x)
    if autocast is None:
        checks.same_dtype(x, weight=weight, bias=bias)
    choice, dtype = choose(backend, x.device), autocast or x.dtype
    group = distributed.active(process_group) if fresh else None
    with no_autocast(device):
        x = x.to(_convolution_dtype(dtype, device))
        if not training or (x.shape[0] == 0 and group is None):
            return _with_running(x, weight, bias, running_mean, running_deconv, geo).to(dtype)
        name = transforms.backend_for(choice)
        transforms.no_vmap_in_training()
        kept = None if running_mean is None or running_deconv is None else (running_mean, running_deconv)
        if stale and kept is not None:
            return _stale(x, weight, bias, *kept, geo, name).to(dtype)
        if group is not None:
            y, *new, news = distributed.deconvolve(x, weight, bias, kept, geo, eps, n_iter, name, group)
        elif name == "reference":
            y, *new, news = reference.deconvolve(x, weight, bias, geo, eps, n_iter)
        else:
            y, *new, _, _, _, news = ops.deconvolve(x, weight, bias, geo.pack(), eps, n_iter, name)
        if kept is None or schedule.recomputing():
            return y.to(dtype)
        if momentum is not None:
            running.update_(kept, new, momentum, news)
        elif num_updates is not None:
            num_updates.add_(running.update_(kept, new, running.average_share(num_updates, new[0].dtype), news))
    return y.to(dtype)


def _stale(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry, name: str
) -> Tensor:
    """A training step with the running statistics as constants."""
    mean, deconv = ops.constants([mean, deconv], statistics_dtype(weight.dtype))
    if name == "reference":
        return reference.convolve(x, *_fold(weight, bias, mean, deconv, geo), geo)
    shape = geo.groups, geo.features
    statistics = mean.view(shape), deconv.view(*shape, geo.features)
    return ops.stale_deconvolve(x, weight, bias, *statistics, geo.pack(), name)[0]


def _convolution_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """A folded bias, and the sums in a folded weight's gradient, leave float16's range for an input of 1e4 or so that
    the layer as a whole brings back to 1: on a CPU, where float16 is no faster, its convolution runs in float32."""
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


def _fold(weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """Fold unbatched statistics, as users and buffers hold them."""
    stat, d = statistics_dtype(weight.dtype), geo.features
    return reference.fold(weight, bias, mean.to(stat).reshape(-1, d), deconv.to(stat).reshape(-1, d, d), geo)


def _with_running(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, deconv: Tensor | None, geo: Geometry
) -> Tensor:
    """Evaluation: a fold and a plain convolution."""
    if mean is None or deconv is None:  # an empty batch in training, without running statistics
        folded, shift = weight, weight.new_zeros(weight.shape[0]) if bias is None else bias
    else:
        # cloned, or a later training step would change in place what this step's backward reads
        keep = torch.is_grad_enabled() or torch.jit.is_tracing()  # which traces again without gradients, to compare
        folded, shift = _fold(weight, bias, mean.clone() if keep else mean, deconv.clone() if keep else deconv, geo)
    return reference.convolve(x, folded, shift, geo)
