"""Which dtype each stage computes in: policy, never tuned."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, autocast changes nothing; a context for a kind of device. Meta tensors know no autocast anyway."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
