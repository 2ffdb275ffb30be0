"""Running statistics: updated in place, without host synchronisation, and never by a batch that would ruin them.

Such a batch has a value that is not finite, or no variation at all: its inverse root is that of ``eps``, not of data.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from tdeconv.tracing import has_value


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "network deconvolution met NaN or Inf in its statistics (in the input, or overflow of the buffers' dtype); the "
        "running statistics keep their last finite values",
        RuntimeWarning,
        stacklevel=4,
    )


# The mean of M equal values is off by log2(M) roundings at most: this many are for any number of samples.
_ROUNDINGS = 32


def varied(mean: Tensor, cov: Tensor) -> Tensor:
    """``(b)``: whether the samples of each covariance differed by more than rounding, from their mean ``(b, D)`` and
    covariance ``(b, D, D)`` (no eps added). True of NaN, which :func:`update_` refuses.
    """
    variances = cov.detach().diagonal(dim1=-2, dim2=-1)
    rounding = _ROUNDINGS * torch.finfo(mean.dtype).eps * mean.detach().abs().amax(-1)
    return ~(variances.amax(-1).sqrt() <= rounding)


@functools.cache
def warn_of_one_sample() -> None:
    warnings.warn(
        "a deconvolution layer in training was given a batch with a single sample for its covariance, which is then "
        "zero and has the inverse root of eps alone; the running statistics stay as they are. Use larger batches or "
        "inputs, or a smaller sampling_stride",
        RuntimeWarning,
        stacklevel=4,
    )


def all_finite(t: Tensor) -> Tensor:
    """A 0-d bool tensor: whether no value is NaN or Inf. The extremes tell, at a twentieth of isfinite's time."""
    return torch.isfinite(torch.stack(t.aminmax())).all()


@torch.no_grad()
def update_(
    running: Sequence[Tensor], new: Sequence[Tensor], momentum: float | Tensor, news: Tensor | None = None
) -> Tensor:
    """``r <- (1 - momentum) r + momentum * new`` for each pair, or nothing at all if any result is not finite.

    Args:
        running: the buffers.
        new: as many values, each shaped like its buffer, or ``(b, ...)`` with as many values.
        momentum: a number, or a tensor ``(b)`` or 0-d.
        news: a bool tensor ``(b)``, or 0-d; where it is false, a buffer stays as it is.

    Returns:
        A bool tensor shaped as ``news``, else 0-d: where the update was made.
    """
    asked = new[0].device.type == "cpu" and has_value(new[0])  # on a GPU, asking would wait
    some = news
    if asked and news is not None:
        if not news.any():
            return news
        some = None if news.all() else news
    updated = []
    for r, n in zip(running, new, strict=True):
        n = n.detach()
        share = momentum if isinstance(momentum, (int, float)) else _over(momentum.to(n.dtype), n)
        value = torch.lerp(r.to(n.dtype).reshape(n.shape), n, share).to(r.dtype)
        updated.append((value if some is None else torch.where(_over(some, n), value, r.view(n.shape))).view(r.shape))
    finite = torch.stack([all_finite(u) for u in updated]).all()
    if asked and not finite:
        _warn_once()
    else:
        for r, u in zip(running, updated, strict=True):
            r.copy_(u if asked else torch.where(finite, u, r))
    return finite if news is None else finite & news


def _over(per_covariance: Tensor, values: Tensor) -> Tensor:
    """One value for each of ``values (b, ...)``, or for all of them, shaped to broadcast over them."""
    return per_covariance.reshape(-1, *(1,) * (values.ndim - 1))


def average_share(count: Tensor, dtype: torch.dtype) -> Tensor:
    """The momentum that makes running values the plain average of ``count`` batches and the new one."""
    return 1 / (count + 1).to(dtype)
