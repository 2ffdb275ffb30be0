"""Which dtype each stage computes in: policy, never tuned."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments, inverse roots and folding run in float32, or in float64 for float64 input; never in half precision."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants a convolution of ``x`` in; None where autocast is off, or leaves float64 alone."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:  # meta knows no autocast
        return None
    return torch.get_autocast_dtype(device)
