"""Memory formats, and weights whose strides leave no doubt about theirs."""

from __future__ import annotations

import pytest
import torch

from tdeconv.layout import beside, memory_format


def test_memory_format_is_torchs() -> None:
    x, w = torch.randn(2, 3, 4, 5), torch.randn(6, 3, 2, 2)
    last = x.to(memory_format=torch.channels_last)
    assert memory_format(x, w) == torch.contiguous_format
    assert memory_format(last, w) == memory_format(w, last) == torch.channels_last
    assert memory_format(torch.randn(2, 4, 5, 3).movedim(-1, 1)) == torch.channels_last
    assert memory_format(torch.randn(2, 4, 5, 6, 3).movedim(-1, 1)) == torch.channels_last_3d
    assert memory_format(torch.randn(2, 4, 3).movedim(-1, 1)) == torch.contiguous_format


@pytest.mark.parametrize("shape", [(48, 3, 1, 1), (6, 1, 3, 3), (1, 1, 1, 1), (4, 5, 3, 2)])
def test_a_weight_beside_a_contiguous_input_has_plain_strides(shape: tuple[int, ...]) -> None:
    """torch 2.13 writes past the end of the first of these, in forward, where its strides are ``(3, 1, 3, 3)``."""
    weight = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    plain = beside(torch.randn(2, shape[1], 8, 8), weight)
    assert plain.stride() == torch.empty(shape).stride()
    assert torch.equal(plain, weight)


def test_a_weight_beside_a_channels_last_input_is_channels_last() -> None:
    x = torch.randn(2, 8, 8, 3).movedim(-1, 1)
    assert beside(x, torch.randn(4, 3, 3, 3)).is_contiguous(memory_format=torch.channels_last)
