"""Products that are known to be symmetric: two thirds of the work where that pays."""

from __future__ import annotations

from torch import Tensor

from tdeconv.torch_backend import gemm

# From here on three block rows of the lower triangle, mirrored, beat the whole product.
_BLOCKS_FROM = 192
_BLOCKS = 3


def _rows(d: int) -> list[tuple[int, int]]:
    return [(d * i // _BLOCKS, d * (i + 1) // _BLOCKS) for i in range(_BLOCKS)]


def _whole(total: Tensor) -> bool:
    return total.shape[0] > 1 or total.shape[1] < _BLOCKS_FROM


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right``, which is symmetric; of a large ``total (1, D, D)`` the lower blocks alone."""
    if _whole(total):
        gemm.add_product_(total, left, right)
        return
    for low, high in _rows(total.shape[1]):
        gemm.add_product_(total[0, low:high, :high], left[0, low:high], right[0, :, :high])


def mirror_(total: Tensor) -> Tensor:
    """Complete what :func:`add_product_` left out."""
    if not _whole(total):
        for low, high in _rows(total.shape[1]):
            total[0, :low, low:high] = total[0, low:high, :low].t()
    return total


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right (b, D, D)``, known to be symmetric."""
    total = left.new_zeros(left.shape[0], left.shape[1], right.shape[2])
    add_product_(total, left, right)
    return mirror_(total)
