"""The Triton kernels of the first stage under the interpreter: values, gradients, bits, bad memory."""

from __future__ import annotations

import importlib
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated

import pytest
import torch

from cases import CASES, Case
from helpers import assert_close, randn
from tdeconv import reference, torch_backend
from tdeconv.geometry import Geometry

pytest.importorskip("triton")
from tdeconv.kernels import launch, patches, precision

# by name: in the package, the stage's function has its module's
forward = importlib.import_module("tdeconv.kernels.patch_moments")
backward = importlib.import_module("tdeconv.kernels.patch_moments_backward")

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 in a process of its own")

# One of every kind: layouts, ranks, groupings, packs, tables, runs, workspaces, overlaps, padding. The rest is slow.
QUICK = {
    "sampling_past_the_end", "stride_two", "stride_larger_than_kernel", "kernel_3x2", "dilation_rectangular",
    "groups_one_output_each", "contiguous_by_gcd_rectangular", "pointwise", "pointwise_block",
    "pointwise_groups_channels_last", "channels_last_block_stride", "expanded_batch", "sampled_in_padding_only",
    "single_sample", "fewer_samples_than_features", "wide_pointwise", "conv1d_groups_dilated",
    "conv3d_block_strided_rectangular", "linear",
}  # fmt: skip
EXTRA = [
    Case("runs", (2, 64, 3, 5), kernel=(1, 2), padding=1, sampling_stride=3, layout="channels_last"),
    Case("runs_contiguous_vectors", (1, 128, 4, 4), kernel=(1, 2), grouping="contiguous", layout="channels_last"),
    Case("runs_overlapping", (2, 64, 3, 4), kernel=(1, 2), sampling_stride=1),
    Case("several_splits", (3, 4, 24, 18), kernel=1, sampling_stride=1),
    Case("interleaved_workspace", (3, 64, 3, 4), padding=1, block=8, sampling_stride=3, layout="channels_last"),
    Case("groups_workspace", (2, 36, 4, 4), padding=1, groups=2, sampling_stride=1),
]
_ALL = [c for c in CASES if not c.name.startswith("bias")] + EXTRA
EVERY = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name in QUICK or c in EXTRA else pytest.mark.slow) for c in _ALL],
)


def case_named(name: str) -> Case:
    return next(c for c in _ALL if c.name == name)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory comes full of NaN: what a kernel does not write, or reads beyond a mask, shows."""
    empty = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def inputs(case: Case, dtype: torch.dtype):
    """Input, its float64 twin, random gradients of the two moments."""
    x, geo = case.tensors(torch.float64)[0].to(dtype), case.geo
    gradients = [randn(geo.groups, *(geo.features,) * n, seed=n, dtype=torch.float32) for n in (1, 2)]
    return x, x.double().requires_grad_(), gradients


def gradient(case: Case, x: torch.Tensor, exact: torch.Tensor, gradients, base: torch.Tensor | None = None):
    """The kernels' gradient, added to ``base`` or to zeros of the input's layout."""
    mean = reference.patch_moments(exact.detach(), case.geo)[0].float()
    out = (torch.zeros_like(x) if base is None else base).clone()
    backward.patch_moments_backward_(out, x, mean, *gradients, case.geo)
    return out


def exact_gradient(case: Case, exact: torch.Tensor, gradients) -> torch.Tensor:
    moments = reference.patch_moments(exact, case.geo)
    return torch.autograd.grad(moments, exact, [g.double() for g in gradients])[0]


@EVERY
def test_moments(case):
    x, exact, _ = inputs(case, torch.float32)
    with precision.use("strict"):
        mean, cov = forward.patch_moments(x, case.geo)
    assert mean.is_contiguous()
    assert cov.is_contiguous()
    assert_close((mean, cov), reference.patch_moments(exact.detach(), case.geo), 2e-6)
    assert torch.equal(cov, cov.mT)


@EVERY
def test_gradient(case):
    x, exact, gradients = inputs(case, torch.float32)
    with precision.use("strict"):
        actual = gradient(case, x, exact, gradients)
    assert_close(actual, exact_gradient(case, exact, gradients), 1e-5)


SOME = ["runs", "several_splits", "interleaved_workspace", "groups_one_output_each", "pointwise_block", "linear"]


@pytest.mark.parametrize("name", SOME)
def test_default_policy(name):
    case = case_named(name)
    x, exact, gradients = inputs(case, torch.float32)
    moments, expected = forward.patch_moments(x, case.geo), reference.patch_moments(exact.detach(), case.geo)
    assert_close(moments, expected, 1e-4)
    assert_close(gradient(case, x, exact, gradients), exact_gradient(case, exact, gradients), 1.5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["runs", "interleaved_workspace", "stride_two", "pointwise_groups_channels_last"])
def test_half_precision_input(name, dtype):
    """Values are float32's from the first subtraction on; only the gradient is rounded, once."""
    case = case_named(name)
    x, exact, gradients = inputs(case, dtype)
    mean, cov = forward.patch_moments(x, case.geo)
    assert mean.dtype == cov.dtype == torch.float32
    assert_close((mean, cov), reference.patch_moments(exact.detach(), case.geo), 1e-4)
    actual = gradient(case, x, exact, gradients)
    assert actual.dtype == dtype
    assert_close(actual, exact_gradient(case, exact, gradients), torch.finfo(dtype).eps)


@pytest.mark.parametrize("policy", precision.POLICIES)
@pytest.mark.parametrize("offset", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 100)), 1000])
@pytest.mark.parametrize("kernel", [pytest.param(1, marks=pytest.mark.slow), (1, 3)])
def test_mean_far_above_the_spread(kernel, offset, policy):
    """Nothing cancels: the covariance keeps its digits and its smallest eigenvalue its sign."""
    case = Case("offset", (8, 5, 26, 26), kernel=kernel, sampling_stride=1)
    noise = case.tensors(torch.float64)[0]
    x = (noise + offset * noise.std()).float()
    with precision.use(policy):
        mean, cov = forward.patch_moments(x, case.geo)
    assert_close((mean, cov), reference.patch_moments(x.double(), case.geo), 2e-6 if policy == "strict" else 1e-4)
    assert torch.linalg.eigvalsh(cov.double()).min() > 0


def test_the_default_policy_rounds_many_vectors():
    """Otherwise the tests above would show nothing: few vectors are multiplied exactly."""
    for name, rounds in (("several_splits", False), ("pointwise_block", False), ("many", True)):
        case = Case("many", (2, 4, 50, 50), kernel=1, sampling_stride=1) if name == "many" else case_named(name)
        src = patches.source(case.geo, case.tensors(torch.float32)[0])
        assert forward.products(torch.device("cpu"), src)["ROUND"] == rounds


@pytest.mark.parametrize("name", ["runs", "kernel_3x2", "interleaved_workspace", "runs_overlapping"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_adds_in_place_in_any_layout(name, layout):
    case = case_named(name)
    x, exact, gradients = inputs(case, torch.float32)
    base = randn(*x.shape, dtype=torch.float32, seed=5)
    if layout == "channels_last":
        base = base.contiguous(memory_format=torch.channels_last)
    with precision.use("strict"):
        actual = gradient(case, x, exact, gradients, base)
    expected = exact_gradient(case, exact, gradients)
    assert_close(actual, base.double() + expected, 1e-5)
    untouched = expected == 0
    assert torch.equal(actual[untouched], base[untouched])


@pytest.mark.parametrize("name", ["several_splits", "runs_overlapping", "pointwise_block"])
def test_same_bits_twice(name):
    case = case_named(name)
    x, exact, gradients = inputs(case, torch.float32)
    first, second = ((*forward.patch_moments(x, case.geo), gradient(case, x, exact, gradients)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["interleaved_workspace", pytest.param("groups_workspace", marks=pytest.mark.slow)])
def test_workspace_of_one_image_at_a_time(name, monkeypatch):
    case = case_named(name)
    x, exact, gradients = inputs(case, torch.float32)
    monkeypatch.setattr(patches, "WORKSPACE", 1)
    with precision.use("strict"):
        moments, actual = forward.patch_moments(x, case.geo), gradient(case, x, exact, gradients)
    assert_close(moments, reference.patch_moments(exact.detach(), case.geo), 2e-6)
    assert_close(actual, exact_gradient(case, exact, gradients), 1e-5)


def test_float64_is_the_torch_backends():
    case = case_named("plain")
    x = case.tensors(torch.float64)[0]
    for a, b in zip(forward.patch_moments(x, case.geo), torch_backend.patch_moments(x, case.geo), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("case", "fits"),
    [
        (Case("pixels", (1, 1, 46_000, 46_000), sampling_stride=3), True),
        (Case("too_many_pixels", (1, 1, 46_400, 46_400), sampling_stride=3), False),
        (Case("too_many_rows", (1, 2, 40_000, 30_000), block=1, kernel=1, sampling_stride=1), False),
        (Case("features", (2, 46_000), kernel=(), block=46_000), True),
        (Case("too_many_features", (2, 46_300), kernel=(), block=46_300), False),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_past_counting_is_the_torch_backends(case, fits):
    """Rows, pixels and the elements of a covariance are counted in 32 bits, the input's elements in 64."""
    x = torch.empty(case.shape, dtype=torch.bfloat16, device="meta")
    assert patches.source(case.geo, x).fits == fits


def test_not_a_number_is_not_hidden():
    """Rounding to tf32 by its bits must not make a number of one, whatever its payload."""
    case = case_named("several_splits")
    x = case.tensors(torch.float32)[0]
    x[1, 2, 3, 3] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    cov = forward.patch_moments(x, case.geo)[1][0]
    assert cov[2].isnan().all()


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "expected"),
    [(3, 3, 1, False), (3, 2, 1, True), (2, 2, 1, False), (3, 4, 2, True), (3, 3, 2, False), (2, 1, 9, True)],
)
def test_overlapping(kernel, stride, dilation, expected):
    """Against counting how often every pixel is read."""
    geo = Geometry(1, (kernel,), (stride,), (0,), (dilation,), 1, 1, "interleaved")
    count = torch.zeros(24, dtype=torch.int64)
    for p in range(geo.positions((24,))[0]):
        for k in range(kernel):
            count[p * stride + k * dilation] += 1
    assert (count.max() > 1) == expected == patches.overlapping(geo, (1, 1, 24))
