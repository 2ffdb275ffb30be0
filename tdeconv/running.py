"""Running statistics: updated in place, without host synchronisation, and never by a batch that would ruin them.

Such a batch has a value that is not finite, or no variation at all: its inverse root is that of ``eps``, not of data.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdeconv.tracing import Layer, has_value


class Averaging(Layer):
    """A layer with running statistics: their momentum, and what is counted for them."""

    _averages = 1  # how many are counted apart
    _momentum: float | None
    running_deconv: Tensor
    num_updates: Tensor  # with momentum=None

    @property
    def momentum(self) -> float | None:
        """Share of a batch's statistics in the running ones. Set to None, these become the plain average of the batches
        from then on (the next one replaces what there was), and the layer gets the buffer ``num_updates``.
        """
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        if value is None and "num_updates" not in self._buffers:
            counts = torch.zeros(self._averages, dtype=torch.long, device=self.running_deconv.device)
            self.register_buffer("num_updates", counts)
        elif value is not None and "num_updates" in self._buffers:
            del self.num_updates
        self._momentum = value

    def _counts(self) -> dict[str, Tensor]:
        return {name: b for name, b in self._buffers.items() if b is not None and name.startswith("num_")}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # statistics without a count start at 0, on the device of those that are to be assigned
        statistics = state_dict.get(prefix + "running_deconv")
        if statistics is not None:
            for name, counts in self._counts().items():
                device = statistics.device if counts.is_meta else counts.device
                state_dict.setdefault(prefix + name, torch.zeros(counts.shape, dtype=counts.dtype, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args)


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "network deconvolution met NaN or Inf in its statistics (in the input, or overflow of the buffers' dtype); the "
        "running statistics keep their last finite values",
        RuntimeWarning,
        stacklevel=4,
    )


# By which the mean of equal values is off at most: up to 5.3 were seen, for all numbers of them up to 5 million.
_ROUNDINGS = 8


def tells(mean: Tensor, cov: Tensor) -> Tensor:
    """``(b)``: whether each covariance tells something of the data, from the mean ``(b, D)`` and the covariance
    ``(b, D, D)`` (no eps added).

    It does not if no feature's samples differ by more than rounding: its inverse root would be that of eps. Nor if its
    norm overflows, which makes the root zero. True of NaN and infinity, which :func:`update_` refuses.
    """
    # the diagonal; torch's compiler warns of its own code for `diagonal` (torch 2.13)
    variances, info = cov.flatten(-2)[..., :: cov.shape[-1] + 1], torch.finfo(cov.dtype)
    constant = (variances <= (mean * (_ROUNDINGS * info.eps)).square()).all(-1)
    total = variances.sum(-1)
    return ~(constant | ((total >= info.max**0.5) & (total < torch.inf)))


@functools.cache
def _warn_of_nothing() -> None:
    warnings.warn(
        "a deconvolution layer in training was given a batch without variation (a single sample, or equal ones), or "
        "with values too large for its dtype; the running statistics stay as they are. A single sample comes of a "
        "small batch or input, or of a large sampling_stride",
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
        told = int(news.sum())
        if not told:
            _warn_of_nothing()
            return news
        some = None if told == news.numel() else news
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
