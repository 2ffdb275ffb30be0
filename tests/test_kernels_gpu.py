"""What only a GPU can show of the kernels: compiled layers at real sizes, and tensors past 2^31 elements."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from helpers import difference
from tdeconv import Delinear, FastDeconv, patch_moments

pytestmark = pytest.mark.gpu

HALF = 2e-2  # bfloat16's own rounding of a layer's output and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_compiled_equals_eager(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """A whole graph under autocast, forward, backward and the running statistics."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = (FastDeconv(64, 128, 3, padding=1), torch.nn.ReLU(), FastDeconv(128, 64, 1, stride=2), torch.nn.ReLU())
    head = (torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), Delinear(256, 32, block=64))
    model = torch.nn.Sequential(*layers, *head).cuda().to(memory_format=layout)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    tolerance = 1e-3 if dtype == torch.float32 else HALF
    for step in range(3):
        x = torch.randn(32, 64, 28, 28, device="cuda", generator=torch.Generator("cuda").manual_seed(step)) + 0.5
        results = []
        for m in (model, compiled):
            own = x.to(memory_format=layout).requires_grad_()
            m.zero_grad()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                y = m(own)
            y.float().square().mean().backward()
            results.append([y, own.grad, *(p.grad for p in m.parameters())])
        for actual, expected in zip(*reversed(results), strict=True):
            assert difference(actual, expected) <= tolerance
    for actual, expected in zip(compiled.buffers(), model.buffers(), strict=True):
        assert difference(actual, expected) <= tolerance


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, int]:
    """One image, and how often it is repeated to pass 2^31 elements (more than 4 GiB in bfloat16)."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    return torch.randn(1, 64, 320, 320, device="cuda", dtype=torch.bfloat16), 2**31 // (64 * 320 * 320) + 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_moments_past_2_to_the_31(images: tuple[torch.Tensor, int], layout: torch.memory_format) -> None:
    """An image repeated has the moments of one, and each repetition its share of the gradient."""
    image, times = images
    many = image.repeat(times, 1, 1, 1).to(memory_format=layout).requires_grad_()
    one = image.float().requires_grad_()
    assert many.numel() > 2**31
    actual = patch_moments(many, 3, stride=3, padding=1, backend="triton")
    expected = patch_moments(one, 3, stride=3, padding=1, backend="reference")
    g = torch.randn_like(expected[1])
    for mine, theirs in zip(actual, expected, strict=True):
        assert difference(mine, theirs) <= 1e-4
    (dx,) = torch.autograd.grad(actual[1], many, g * times)
    (expected_dx,) = torch.autograd.grad(expected[1], one, g)
    assert difference(dx[-1:], expected_dx) <= HALF


@pytest.mark.parametrize("way", ["triton", "library"])
def test_layer_past_2_to_the_31(images: tuple[torch.Tensor, int], way: str) -> None:
    image, times = images
    torch.manual_seed(0)
    layer = FastDeconv(64, 8, 3, padding=1, backend="triton").cuda().bfloat16()
    one = copy.deepcopy(layer)
    with importlib.import_module("tdeconv.kernels.convolve").use(way), torch.no_grad():
        y = layer(image.repeat(times, 1, 1, 1).to(memory_format=torch.channels_last))
        assert difference(y[-1:], one(image)) <= HALF
