"""Memory layouts, decided as torch's convolutions decide them."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last if any tensor is, else contiguous."""
    for t in tensors:
        fmt = _CHANNELS_LAST.get(t.ndim)
        if fmt is not None and t.is_contiguous(memory_format=fmt) and not t.is_contiguous():
            return fmt
    return torch.contiguous_format
