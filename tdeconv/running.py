"""Running statistics: updated in place, without host synchronisation, and never by a value that is not finite."""

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


def all_finite(t: Tensor) -> Tensor:
    """A 0-d bool tensor: whether no value is NaN or Inf. The extremes tell, at a twentieth of isfinite's time."""
    return torch.isfinite(torch.stack(t.aminmax())).all()


@torch.no_grad()
def update_(running: Sequence[Tensor], new: Sequence[Tensor], momentum: float, first: Tensor | None = None) -> Tensor:
    """``r <- (1 - momentum) r + momentum * new`` for each pair, or nothing at all if any result is not finite.

    ``first`` (a 0-d bool tensor) makes the new values replace the old ones. Returns a 0-d bool tensor: whether the
    update was made.
    """
    updated = []
    for r, n in zip(running, new, strict=True):
        n = n.detach().reshape(r.shape)
        value = torch.lerp(r.to(n.dtype), n, momentum)
        updated.append((value if first is None else torch.where(first, n, value)).to(r.dtype))
    finite = torch.stack([all_finite(u) for u in updated]).all()
    asked = finite.device.type == "cpu" and has_value(finite)  # on a GPU, asking would wait
    if asked and not finite:
        _warn_once()
        return finite
    for r, u in zip(running, updated, strict=True):
        r.copy_(u if asked else torch.where(finite, u, r))
    return finite
