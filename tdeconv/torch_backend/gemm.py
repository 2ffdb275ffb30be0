"""Matrix products of the backend's stages, by whichever library multiplies faster on this CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tdeconv.torch_backend import measured

# Multiplications and additions from which oneDNN's start, which takes longer, no longer counts.
_LARGE = 1 << 21


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    kind = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return kind and a.shape[0] * a.shape[1] * b.shape[1] >= _LARGE and measured.onednn_multiplies()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices, or of two batches ``(b, M, K)`` and ``(b, K, N)``. Has no derivative."""
    if a.ndim == 3:
        return product(a[0], b[0]).unsqueeze(0) if a.shape[0] == 1 else torch.bmm(a, b)
    onednn = measured.onednn_product() if _by_onednn(a, b) else None
    return a @ b if onednn is None else onednn(_dense(a), _dense(b).t())


def _dense(a: Tensor) -> Tensor:
    """Without gaps: for a part of a larger matrix oneDNN has no kernel but one that takes a thousand times as long."""
    return a if a.is_contiguous() or a.t().is_contiguous() else a.contiguous()


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a @ b`` to ``total``, which is returned."""
    if a.ndim == 3 and a.shape[0] == 1:
        add_product_(total[0], a[0], b[0])
    elif a.ndim == 3:
        total.baddbmm_(a, b)
    elif _by_onednn(a, b):
        total.add_(product(a, b))
    else:
        total.addmm_(a, b)
    return total
