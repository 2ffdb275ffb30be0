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


@pytest.mark.parametrize("shape", [(1, 3, 1, 3), (48, 3, 1, 1), (1, 3, 3, 1), (4, 5, 3, 2), (1, 3, 1, 1, 3)])
def test_a_channels_last_weight_has_the_strides_of_its_format(shape: tuple[int, ...]) -> None:
    """torch 2.13 refuses the gradient of the first of these, in float64, where its strides are ``(3, 1, 9, 3)``."""
    o, c, *kernel = shape
    x = torch.randn(1, *[5] * len(kernel), c, dtype=torch.float64).movedim(-1, 1)
    weight = torch.randn(*kernel, o, c, dtype=torch.float64).movedim((-2, -1), (0, 1)).requires_grad_()
    beside_it = beside(x, weight)
    assert beside_it.stride() == torch.empty(o, *kernel, c).movedim(-1, 1).stride()
    assert torch.equal(beside_it, weight)
    convolve = (torch.nn.functional.conv2d, torch.nn.functional.conv3d)[len(kernel) - 2]
    convolve(x, beside_it, padding=1).sum().backward()
    (plain,) = torch.autograd.grad(convolve(x.contiguous(), weight.contiguous(), padding=1).sum(), weight)
    torch.testing.assert_close(weight.grad, plain)
