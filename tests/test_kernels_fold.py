"""The fold's kernels against the reference in float64: awkward cases, layouts, dtypes; nothing left unwritten."""

from __future__ import annotations

import importlib

import pytest
import torch

from cases import Case
from helpers import assert_close, difference, fold_terms, randn
from interpreting import DEVICE, case_named, named, poison  # noqa: F401  # before the kernels; a fixture

pytest.importorskip("triton")

from tdeconv import reference, torch_backend

kernels = importlib.import_module("tdeconv.kernels.fold")  # the package exports a function of that name

pytestmark = pytest.mark.usefixtures("poison")

BOUND = 1e-6
CASES = named(
    "plain odd_sizes kernel_1x3 kernel_even groups_two groups_one_output_each depthwise depthwise_two_outputs_each "
    "block_divides block_by_gcd block_coprime block_one contiguous_grouping contiguous_by_gcd_rectangular pointwise "
    "pointwise_block pointwise_groups_channels_last bias_off conv1d_block_sliced conv3d conv3d_depthwise_channels_last "
    "linear linear_by_gcd linear_sliced_bias_off past_the_half_gram sixty_four_channels",
    "kernel_five conv3d_block_strided_rectangular wide_channels wide_pointwise wide_few_pixels_strided conv1d_wide "
    "linear_wide",
)


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    """Weight, bias, mean and a root that is not symmetric, so that it is seen which way round it is used."""
    geo = case.geo
    _, weight, bias = (None if t is None else t.to(dtype) for t in case.tensors(torch.float64))
    mean = randn(geo.groups, geo.features, dtype=torch.float32, seed=2)
    deconv = randn(geo.groups, geo.features, geo.features, dtype=torch.float32, seed=3)
    return [None if t is None else t.to(DEVICE) for t in (weight, bias, mean, deconv)]


def exact(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def check(case: Case, tensors: list[torch.Tensor | None], bound: float = BOUND) -> None:
    geo, leaves = case.geo, exact(tensors)
    actual, expected = kernels.fold(*tensors, geo), reference.fold(*leaves, geo)
    grads = [randn(*t.shape, dtype=torch.float32, seed=i + 7).to(DEVICE) for i, t in enumerate(actual)]
    sizes, sizes_of_gradients = fold_terms(tensors, grads, geo)
    assert_close(actual, expected, bound, sizes)
    assert all(t.dtype == torch.float32 for t in actual)
    assert actual[0].movedim(1, -1).is_contiguous()  # as the operator's fake declares it
    weight, _, mean, deconv = tensors
    gradients = kernels.fold_backward(*grads, weight, mean, deconv, geo, need_statistics=True)
    wanted = torch.autograd.grad(expected, [leaves[0], leaves[2], leaves[3]], [g.double() for g in grads])
    assert_close(gradients, wanted, bound, sizes_of_gradients)
    alone = kernels.fold_backward(*grads, weight, mean, deconv, geo, need_statistics=False)
    assert alone[1:] == (None, None)
    assert torch.equal(alone[0], gradients[0])


@pytest.mark.parametrize("case", CASES)
def test_fold(case):
    check(case, inputs(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["block_by_gcd", "depthwise", "pointwise_block"])
def test_half_precision_weights_are_folded_in_float32(name, dtype):
    check(case_named(name), inputs(case_named(name), dtype))


def _permuted(weight: torch.Tensor) -> torch.Tensor:
    """Kernel axes that are no single axis of memory."""
    return weight.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)


@pytest.mark.parametrize("name", ["plain", "block_by_gcd", "groups_two", "contiguous_grouping"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda w: w.contiguous(memory_format=torch.channels_last),
        lambda w: torch.stack([w, w], -1)[..., 1],
        lambda w: w[:1].expand(w.shape),
        _permuted,
    ],
    ids=["channels_last", "strided", "expanded", "kernel_axes_apart"],
)
def test_weight_layouts(name, layout):
    case = case_named(name)
    tensors = inputs(case)
    tensors[0] = layout(tensors[0])
    check(case, tensors)


@pytest.mark.parametrize("name", ["plain", "block_by_gcd", "depthwise"])
def test_gradients_of_any_layout(name):
    case = case_named(name)
    weight, _, mean, deconv = inputs(case)
    grad = randn(*weight.shape, dtype=torch.float32).to(DEVICE)
    grad_bias = randn(2 * case.out, dtype=torch.float32).to(DEVICE)[::2]
    plain = kernels.fold_backward(grad, grad_bias.clone(), weight, mean, deconv, case.geo, True)
    for other in (grad.contiguous(memory_format=torch.channels_last), _permuted(grad)):
        assert_close(kernels.fold_backward(other, grad_bias, weight, mean, deconv, case.geo, True), plain, 1e-6)


@pytest.mark.parametrize(("rows", "features", "groups"), [(1, 9, 5), (4096, 64, 1), (512, 576, 1), (700, 27, 3)])
def test_rows_are_split_once_and_evenly(rows, features, groups):
    parts, size = kernels.split_rows(rows, features, groups)
    assert (parts - 1) * size < rows <= parts * size
    assert size % 32 == 0


def test_splits_are_added(monkeypatch):
    """Of a small covariance under many rows; here, few rows make a part."""
    monkeypatch.setattr(kernels, "_SPLIT_ROWS", 8)
    case = Case("rows", (1, 8, 3, 3), out=40, kernel=1, block=2)
    assert kernels.split_rows(160, 2, 1)[0] > 2
    check(case, inputs(case))


def test_same_bits_twice():
    case = case_named("block_by_gcd")
    tensors = inputs(case)
    for a, b in zip(*(kernels.fold(*tensors, case.geo) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_float64_is_the_torch_backends():
    case = case_named("block_by_gcd")
    tensors = [t if t is None else t.double() for t in inputs(case)]
    assert_close(kernels.fold(*tensors, case.geo), torch_backend.fold(*tensors, case.geo), 0.0)


def test_a_root_or_an_output_channel_past_counting_is_the_torch_backends():
    """Offsets within either are counted in 32 bits."""
    small, large = (torch.empty(1, d, d, device="meta") for d in (46_000, 46_300))
    weight = torch.empty(1 << 16, 1 << 15, device="meta")
    assert kernels._takes(small, weight)
    assert not kernels._takes(large, weight)
    assert not kernels._takes(small, weight, weight.t())  # one channel's values are as far apart as there are channels


def test_nothing_is_lost_where_values_are_large():
    """Rows of very different sizes: a mask that lets a neighbour in would show."""
    case = case_named("block_coprime")
    tensors = inputs(case)
    tensors[0] = tensors[0] * 10.0 ** torch.arange(-case.out, 0, device=DEVICE).view(-1, 1, 1, 1)
    got, wanted = kernels.fold(*tensors, case.geo)[0], reference.fold(*exact(tensors), case.geo)[0]
    for row, expected in zip(got, wanted, strict=True):
        assert difference(row, expected) <= BOUND
