"""The convolution's kernels against the reference in float64, and the choice between them and the library."""

from __future__ import annotations

import importlib

import pytest
import torch

from cases import Case
from helpers import assert_close, difference, randn
from interpreting import DEVICE, case_named, named, poison  # noqa: F401  # before the kernels; a fixture

pytest.importorskip("triton")

from tdeconv import reference
from tdeconv.kernels import describe, precision, tuning
from tdeconv.kernels.configs import Limits, cuda_limits

# the package exports functions of these names
forward, backward = (importlib.import_module(f"tdeconv.kernels.{name}") for name in ("convolve", "convolve_backward"))

BOUND = 1e-6
SHIPPED = (forward.Sizes(1 << 16, 256, 256, 9), forward.Sizes(1 << 16, 64, 3, 49))  # a wide layer's and a first one's
CASES = named(
    "plain odd_sizes odd_sizes_unpadded stride_two stride_larger_than_kernel stride_rectangular dilation_rectangular "
    "stride_dilation_padding kernel_1x3 kernel_3x2 kernel_even groups_two groups_one_output_each "
    "pointwise_strided pointwise_padded pointwise_groups_channels_last channels_last sliced "
    "transposed expanded_batch positions_in_padding_only kernel_covers_input past_the_half_gram conv1d_groups_dilated "
    "conv1d_block_sliced conv3d_block_strided_rectangular",
    "depthwise depthwise_two_outputs_each "
    "kernel_five conv3d conv3d_depthwise_channels_last wide_channels wide_channels_strided_dilated wide_few_pixels "
    "wide_few_pixels_strided wide_pointwise wide_channels_last sixty_four_channels conv1d_wide conv3d_wide",
)
# 32 channels of a tap at a time, and a few more
CASES.append(pytest.param(Case("channels_past_a_step", (2, 37, 3, 4), out=5, kernel=(1, 2)), id="channels_past_a_step"))


@pytest.fixture
def strict():
    with precision.use("strict"):
        yield


@pytest.fixture
def triton(poison, strict):  # noqa: F811
    with forward.use("triton"):
        yield


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x, weight, _ = case.tensors(dtype)
    return [x.to(DEVICE), weight.to(DEVICE), randn(case.out, dtype=dtype).to(DEVICE)]


def exact(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("case", CASES)
def test_convolve(case):
    geo, tensors = case.geo, inputs(case)
    leaves = exact(tensors)
    y, expected = forward.convolve(*tensors, geo), reference.convolve(*leaves, geo)
    assert_close(y, expected, BOUND)
    grad = randn(*y.shape, dtype=torch.float32, seed=7).to(DEVICE)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    actual = backward.convolve_backward(grad, *tensors[:2], geo, need_x=True)
    # a bias's gradient of few pixels is a difference of large numbers
    assert_close(actual[:2], wanted[:2], BOUND)
    assert_close(actual[2], wanted[2], 4 * BOUND)
    grad_x, *rest = backward.convolve_backward(grad, *tensors[:2], geo, need_x=False)
    assert grad_x is None
    assert all(torch.equal(a, b) for a, b in zip(rest, actual[1:], strict=True))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "stride_dilation_padding", "groups_two", "channels_last", "wide_pointwise"])
def test_half_precision_is_rounded_once(name, dtype):
    """A small multiple of plain torch's error in the same dtype (the interpreter truncates to bfloat16, and so may err
    twice as much); weight and bias gradients stay in float32."""
    case = case_named(name)
    tensors, geo = inputs(case, dtype), case.geo
    leaves, plain = exact(tensors), [t.clone().requires_grad_() for t in tensors]
    y, by_torch, expected = (
        forward.convolve(*tensors, geo),
        reference.convolve(*plain, geo),
        reference.convolve(*leaves, geo),
    )
    assert y.dtype == dtype
    assert difference(y, expected) <= 3 * difference(by_torch, expected) + 1e-6
    grad = randn(*y.shape, dtype=dtype, seed=7).to(DEVICE)
    actual = backward.convolve_backward(grad, *tensors[:2], geo, need_x=True)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    by_torch = torch.autograd.grad(by_torch, plain, grad)
    for a, t, w in zip(actual, by_torch, wanted, strict=True):
        assert difference(a, w) <= 3 * difference(t, w) + 1e-6
    assert actual[0].dtype == dtype
    assert actual[1].dtype == actual[2].dtype == torch.float32


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", ["plain", "stride_two", "depthwise"])
def test_relu_in_the_epilogue(name):
    case = case_named(name)
    tensors = inputs(case)
    expected = reference.convolve(*exact(tensors), case.geo).relu()
    assert_close(forward.by_kernel(*tensors, case.geo, relu=True), expected, BOUND)
    expected = reference.convolve(tensors[0].double(), tensors[1].double(), torch.zeros(case.out).double(), case.geo)
    assert_close(forward.by_kernel(*tensors[:2], None, case.geo), expected, BOUND)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slices", "expanded"])
def test_output_gradients_of_any_layout(layout):
    case = case_named("stride_two")
    x, weight, _ = inputs(case)
    shape = forward.out_shape(x, weight, case.geo)
    grad = {
        "contiguous": lambda: randn(*shape, dtype=torch.float32),
        "channels_last": lambda: randn(*shape, dtype=torch.float32).contiguous(memory_format=torch.channels_last),
        "slices": lambda: randn(*(2 * n for n in shape), dtype=torch.float32)[::2, ::2, ::2, ::2],
        "expanded": lambda: torch.tensor(0.7).expand(shape),
    }[layout]().to(DEVICE)
    actual = backward.convolve_backward(grad, x, weight, case.geo, need_x=True)
    wanted = backward.convolve_backward(grad.clone(memory_format=torch.contiguous_format), x, weight, case.geo, True)
    assert_close(actual, wanted, BOUND)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_formats_are_kept(layout):
    case = case_named("plain")
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, weight, bias = inputs(case)
    x = x.contiguous(memory_format=fmt)
    y = forward.convolve(x, weight, bias, case.geo)
    assert y.is_contiguous(memory_format=fmt)
    grads = backward.convolve_backward(torch.ones_like(y), x, weight, case.geo, need_x=True)
    assert grads[0].is_contiguous(memory_format=fmt)
    assert grads[1].movedim(1, -1).is_contiguous()


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", ["plain", "wide_pointwise", "groups_one_output_each"])
def test_every_candidate_gives_the_same(name):
    case = case_named(name)
    x, weight, bias = inputs(case)
    sizes = forward.forward_sizes(x, weight, case.geo)
    within = cuda_limits(9, 0)
    results = [forward.by_kernel(x, weight, bias, case.geo, config=c) for c in forward.candidates(sizes, 4, within)]
    magnitudes = [t.double().abs().requires_grad_() for t in (x, weight, bias)]  # sums in other orders differ by theirs
    size = reference.convolve(*magnitudes, case.geo)
    assert all(difference(y, results[0], size) <= 2e-7 for y in results)
    grad = torch.ones_like(results[0])
    grads = [
        backward.weight_gradient(grad, x, weight, case.geo, c)[0] for c in backward.weight_candidates(sizes, 4, within)
    ]
    (size,) = torch.autograd.grad(size, magnitudes[1], torch.ones_like(size))
    assert all(difference(g, grads[0], size) <= 2e-7 for g in grads)


@pytest.mark.usefixtures("triton")
def test_pixels_in_parts(monkeypatch):
    """A product over many pixels is split; here, few pixels make a part."""
    monkeypatch.setattr(backward, "_SPLIT_ROWS", 40)
    case = case_named("odd_sizes")
    tensors = inputs(case)
    leaves, geo = exact(tensors), case.geo
    assert backward.split_pixels(forward.forward_sizes(*tensors[:2], geo), 1)[0] > 2
    expected = reference.convolve(*leaves, geo)
    grad = randn(*expected.shape, dtype=torch.float32).to(DEVICE)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    first, second = (backward.weight_gradient(grad, *tensors[:2], geo) for _ in range(2))
    assert_close(first, wanted[1:], 4 * BOUND)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("within", [cuda_limits(8, 0), cuda_limits(9, 0), cuda_limits(12, 0), Limits(65536, 512, 64)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_there_is_a_configuration_for_every_device(within, itemsize):
    for sizes in (*SHIPPED, forward.Sizes(1, 1, 1, 9), forward.Sizes(1 << 20, 64, 64, 1)):
        assert forward.candidates(sizes, itemsize, within)
        assert backward.weight_candidates(sizes, itemsize, within)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, 0), (2, 1, 1), (3, 2, 2), (4, 6, 3), (6, 4, 1)])
def test_every_tap_reaches_each_pixel_of_its_phase_once(kernel, stride, dilation, padding):
    for phase in range(stride):
        taps, count, first, apart = backward._reach(phase, kernel, stride, padding, dilation)
        found = [(t, first + j * apart) for j, t in enumerate(range(kernel)[taps][:count])]
        wanted = [
            (t, (phase + padding - t * dilation) // stride)
            for t in range(kernel)
            if (phase + padding - t * dilation) % stride == 0
        ]
        assert found == wanted


def test_unmeasured_is_the_library():
    case = case_named("plain")
    tensors = inputs(case)
    assert forward.choices(()) == (forward.LIBRARY,)
    assert torch.equal(forward.convolve(*tensors, case.geo), reference.convolve(*tensors, case.geo))
    lines = describe(*tensors[:2], case.geo, 5)
    assert list(lines) == ["patch_moments", "inverse_sqrt", "fold", "convolve"]
    assert "library" in lines["convolve"]
    with forward.use("triton"):
        assert "BLOCK_M" in describe(*tensors[:2], case.geo, 5)["convolve"]
    assert "float64" in describe(tensors[0].double(), tensors[1], case.geo, 5)["convolve"]


def test_the_measured_way_is_taken(monkeypatch):
    case = case_named("plain")
    tensors, asked = inputs(case), []

    def fastest(kernel, sizes, candidates, run, device):
        asked.append(kernel)
        assert candidates[0] == forward.LIBRARY
        return candidates[1]

    monkeypatch.setattr(tuning, "choose", fastest)
    y = forward.convolve(*tensors, case.geo)
    assert torch.equal(y, forward.by_kernel(*tensors, case.geo))
    grads = backward.convolve_backward(torch.ones_like(y), *tensors[:2], case.geo, need_x=True)
    assert grads[1].dtype == torch.float32
    assert asked == ["convolve", "convolve_bwd_input", "convolve_bwd_weight"]


@pytest.mark.parametrize("way", ["library", "triton"])
def test_linear_and_float64_and_empty_go_elsewhere(way):
    linear, plain = case_named("linear"), case_named("plain")
    with forward.use(way):
        x, weight, bias = inputs(linear)
        y = forward.convolve(x, weight, bias, linear.geo)
        assert_close(y, torch.nn.functional.linear(x, weight, bias), 1e-6)
        grad_x, grad_weight, grad_bias = backward.convolve_backward(y, x, weight, linear.geo, True)
        assert_close((grad_x, grad_weight, grad_bias), (y @ weight, y.t() @ x, y.sum(0)), 1e-6)
        tensors = exact(inputs(plain))
        assert_close(forward.convolve(*tensors, plain.geo), reference.convolve(*tensors, plain.geo), 1e-14)
        x, weight, bias = inputs(plain)
        assert forward.convolve(x[:0], weight, bias, plain.geo).shape == (0, 4, 8, 8)


def without_memory(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def fits(case: Case, **given: torch.Tensor) -> bool:
    shape = (case.out, case.shape[1] // case.groups, *case.axes(case.kernel))
    tensors = {"x": without_memory(*case.shape), "weight": without_memory(*shape), **given}
    return forward.fits(geo=case.geo, **tensors)


def test_what_does_not_fit_is_the_librarys():
    """An offset within an image, as the kernels count it, is below 2^31, with room for the padding."""
    plain = case_named("plain")
    assert fits(plain)
    assert not fits(Case("strided", (1, 4, 8, 8), stride=5))  # 25 launches
    assert not fits(Case("input", (1, 1 << 15, 1 << 10, 1 << 10), kernel=1))
    first = (16, 3, 6144, 6144)
    assert fits(Case("first", first, out=16, padding=1))
    assert not fits(Case("output", first, out=64, padding=1))
    assert fits(Case("small_output", first, out=64, padding=1, stride=4))
    assert not fits(Case("weight", (1, 1 << 15, 3, 3), out=1 << 13))
    assert not fits(Case("pixels", (1 << 12, 1, 1 << 10, 1 << 10), out=1, kernel=1))
    assert not fits(plain, x=without_memory(4, 2, 8, 1 << 28).transpose(0, 1)[..., :8])  # far apart in memory
    assert not fits(plain, weight=without_memory(3, 3, 4, 1 << 28)[..., :4].permute(2, 3, 0, 1))
    assert not fits(plain, grad=without_memory(4, 2, 8, 1 << 28).transpose(0, 1)[..., :8])
    assert fits(plain, grad=without_memory(1).expand(2, 4, 8, 8))
