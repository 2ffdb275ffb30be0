"""Memory layouts, decided as torch's convolutions decide them."""

from __future__ import annotations

import torch
from torch import Tensor

from tdeconv import transforms

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last if any tensor is, else contiguous."""
    if transforms.mapping():  # torch.vmap does not tell a tensor's layout
        return torch.contiguous_format
    for t in tensors:
        fmt = _CHANNELS_LAST.get(t.ndim)
        if fmt is not None and t.is_contiguous(memory_format=fmt) and not t.is_contiguous():
            return fmt
    return torch.contiguous_format


def beside(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution's weight in its input's memory format, and with that format's own strides.

    Axes of one leave their strides open. Some of torch's CPU convolutions take a contiguous weight ``(O, 3, 1, 1)``
    whose strides could be channels-last for just that, beside a contiguous input, and write past its end (torch 2.13).
    """
    weight = weight.contiguous(memory_format=memory_format(x))
    return weight.view(-1).view(weight.shape) if weight.is_contiguous() else weight
