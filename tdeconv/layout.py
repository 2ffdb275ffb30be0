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
    whose strides could be channels-last for just that, beside a contiguous input, and write past its end; others refuse
    a channels-last one ``(1, 3, 1, 3)`` whose open strides are not those of that format (torch 2.13).
    """
    fmt = memory_format(x)
    weight = weight.contiguous(memory_format=fmt)
    if fmt == torch.contiguous_format:
        return weight.view(-1).view(weight.shape)
    channels_inside = weight.movedim(1, -1)
    return channels_inside.reshape(-1).view(channels_inside.shape).movedim(-1, 1)
