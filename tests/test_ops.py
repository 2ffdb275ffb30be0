"""The operators: opcheck of each, shapes and layouts as the compiler is promised, gradients that reach what asks."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from cases import CASES, Case
from helpers import FAST, assert_close, randn
from tdeconv import ops, reference

OPERATORS = {
    name: getattr(torch.ops.tdeconv, name).default
    for name in (
        "deconvolve",
        "deconvolve_backward",
        "constants",
        "stale_deconvolve",
        "stale_deconvolve_backward",
        "patch_moments",
        "patch_moments_backward",
        "inverse_sqrt",
        "inverse_sqrt_backward",
    )
}
# one of each kind; those of 32 pixels and more keep opcheck's symbolic shapes honest
CHECKED = [
    "plain",
    "channels_last",
    "channels_last_depthwise",
    "sliced",
    "groups_two",
    "block_by_gcd",
    "contiguous_grouping",
    "bias_off",
    "pointwise_block",
    "wide_pointwise",
    "conv1d",
    "conv3d_depthwise_channels_last",
    "linear",
]
CASE = pytest.mark.parametrize("case", [c for c in CASES if c.name in CHECKED], ids=lambda c: c.name)


@pytest.fixture(params=FAST)
def backend(request):
    return request.param


def layer_args(case: Case, backend: str, dtype: torch.dtype, n_iter: int = 5):
    x, weight, bias = (None if t is None else t.to(dtype).requires_grad_() for t in case.tensors(torch.float64))
    return x, weight, bias, case.geo.pack(), 1e-5, n_iter, backend


def backward_args(case: Case, backend: str, dtype: torch.dtype, need_x: bool, n_iter: int = 5):
    args = layer_args(case, backend, dtype, n_iter)
    with torch.no_grad():
        y, *saved, _ = ops.deconvolve(*args)
    grad = randn(*y.shape, dtype=dtype)
    return grad, args[0].detach(), args[1].detach(), *saved, case.geo.pack(), n_iter, backend, need_x


def stale_args(case: Case, backend: str, dtype: torch.dtype):
    """A mean and a root like none a batch would have."""
    (x, weight, bias, geometry, *_), geo = layer_args(case, backend, dtype), case.geo
    stat = torch.promote_types(dtype, torch.float32)
    mean = randn(geo.groups, geo.features, seed=5).to(stat)
    deconv = covariance(geo.features, geo.groups).to(stat)
    return x, weight, bias, mean, deconv, geometry, backend


def stale_backward_args(case: Case, backend: str, dtype: torch.dtype, need_x: bool):
    args = stale_args(case, backend, dtype)
    with torch.no_grad():
        y, folded = ops.stale_deconvolve(*args)
    x, weight = (t.detach() for t in args[:2])
    return randn(*y.shape, dtype=dtype), x, weight, *args[3:5], folded, args[5], backend, need_x


def covariance(d: int, batch: int = 1) -> torch.Tensor:
    root = randn(batch, d, d)
    return root @ root.mT / d + 0.1 * torch.eye(d, dtype=torch.float64)


def moments_backward_args(case: Case, backend: str):
    x, geo = case.tensors(torch.float64)[0], case.geo
    mean, cov = ops.patch_moments(x, geo.pack(), backend)
    return x, mean, randn(*mean.shape), randn(*cov.shape, seed=1), geo.pack(), backend


def test_all_operators_are_here():
    names = {
        name.removesuffix(".default") for name in torch._C._dispatch_get_all_op_names() if name.startswith("tdeconv::")
    }
    assert names == {f"tdeconv::{name}" for name in (*OPERATORS, "product")}  # test_products has the last one


# ------------------------------------------------------------------------------------------------------------- opcheck


@CASE
def test_opcheck_deconvolve(case, backend):
    torch.library.opcheck(OPERATORS["deconvolve"], layer_args(case, backend, torch.float64))
    torch.library.opcheck(OPERATORS["stale_deconvolve"], stale_args(case, backend, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_constants(dtype):
    buffers = [randn(*shape).to(dtype) for shape in ((6,), (2, 3, 3), (1, 1))] + [randn(4, 5).t().to(dtype)]
    torch.library.opcheck(OPERATORS["constants"], (buffers, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_iter", [1, 5, 9])
def test_opcheck_deconvolve_of_other_dtypes_and_steps(dtype, n_iter, backend):
    case = next(c for c in CASES if c.name == "block_by_gcd")
    args = layer_args(case, backend, dtype, n_iter)
    torch.library.opcheck(OPERATORS["deconvolve"], args, test_utils=("test_schema", "test_faketensor"))


@CASE
@pytest.mark.parametrize("need_x", [True, False])
def test_opcheck_deconvolve_backward(case, need_x, backend):
    torch.library.opcheck(OPERATORS["deconvolve_backward"], backward_args(case, backend, torch.float64, need_x))
    stale = stale_backward_args(case, backend, torch.float64, need_x)
    torch.library.opcheck(OPERATORS["stale_deconvolve_backward"], stale)


@CASE
def test_opcheck_patch_moments(case, backend):
    x = case.tensors(torch.float64)[0].requires_grad_()
    torch.library.opcheck(OPERATORS["patch_moments"], (x, case.geo.pack(), backend))
    torch.library.opcheck(OPERATORS["patch_moments_backward"], moments_backward_args(case, backend))


@pytest.mark.parametrize(("d", "batch"), [(3, 1), (9, 4), (30, 1), (30, 2)])
@pytest.mark.parametrize("n_iter", [2, 5, 9])
def test_opcheck_inverse_sqrt(d, batch, n_iter, backend):
    cov = covariance(d, batch)
    torch.library.opcheck(OPERATORS["inverse_sqrt"], (cov.requires_grad_(), n_iter, backend))
    _, basis, spectrum = ops.inverse_sqrt(cov.detach(), n_iter, backend)
    torch.library.opcheck(OPERATORS["inverse_sqrt_backward"], (randn(*cov.shape), basis, spectrum, n_iter, backend))


# -------------------------------------------------------------------------------------- what the compiler is promised


def same_kind(real, fake):
    for r, f in zip(real, fake, strict=True):
        assert (tuple(r.shape), r.dtype) == (tuple(f.shape), f.dtype)
        strides = zip(r.shape, r.stride(), f.stride(), strict=True)
        assert r.numel() == 0 or all(a == b for n, a, b in strides if n > 1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_iter", [2, 9])
def test_fake_tensors_have_the_real_ones_shapes_dtypes_and_strides(case, dtype, n_iter, backend):
    """Of every case, in both dtypes: the layouts too, which a compiled graph relies on."""
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in layer_args(case, backend, dtype, n_iter)]
    real = ops.deconvolve(*args)
    grad = randn(*real[0].shape, dtype=dtype)
    x = (args[0], case.geo.pack(), backend)
    moments = ops.patch_moments(*x)
    calls = {
        ops.deconvolve: args,
        ops.deconvolve_backward: (grad, *args[:2], *real[1:-1], case.geo.pack(), n_iter, backend, True),
        ops.stale_deconvolve: stale_args(case, backend, dtype),
        ops.stale_deconvolve_backward: stale_backward_args(case, backend, dtype, True),
        ops.patch_moments: x,
        ops.patch_moments_backward: (args[0], moments[0], *moments, case.geo.pack(), backend),
    }
    for operator, arguments in calls.items():
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        same_kind(*([r] if isinstance(r, torch.Tensor) else r for r in (real, fake)))


@CASE
def test_a_stale_step_is_the_references_fold_and_convolution(case, backend):
    """Gradients too, in float64."""
    args = stale_args(case, backend, torch.float64)
    x, weight, bias, mean, deconv, *_ = args
    leaves = [t for t in args[:3] if t is not None]
    y, _ = ops.stale_deconvolve(*args)
    expected = reference.convolve(x, *reference.fold(weight, bias, mean, deconv, case.geo), case.geo)
    grad = randn(*y.shape)
    grads, expected_grads = (torch.autograd.grad(out, leaves, grad) for out in (y, expected))
    assert_close((y, *grads), (expected, *expected_grads), 1e-12)


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_layouts_are_the_inputs(layout, kernel, backend):
    case = Case("", (3, 6, 8, 7), kernel=kernel, padding=kernel // 2, block=3, layout=layout)
    x, weight, bias, *rest = layer_args(case, backend, torch.float64)
    y, *_ = ops.deconvolve(x, weight, bias, *rest)
    y.sum().backward()
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=fmt)
    assert x.grad.is_contiguous(memory_format=fmt)
    assert weight.grad.is_contiguous()


@pytest.mark.parametrize("asks", ["x", "weight", "bias", "none"])
def test_gradients_reach_what_asks_for_them(asks, backend):
    case = next(c for c in CASES if c.name == "plain")
    args = layer_args(case, backend, torch.float64)
    named = dict(zip(("x", "weight", "bias"), args[:3], strict=True))
    for name, tensor in named.items():
        tensor.requires_grad_(name == asks)
    y, *statistics = ops.deconvolve(*args)
    assert y.requires_grad == (asks != "none")
    assert not any(s.requires_grad for s in statistics)
    if y.requires_grad:
        y.sum().backward()
    assert all((t.grad is not None) == (name == asks) for name, t in named.items())


def test_inputs_are_not_written_to(backend):
    case = next(c for c in CASES if c.name == "block_by_gcd")
    args = layer_args(case, backend, torch.float64)
    given = [t for t in args if isinstance(t, torch.Tensor)]
    kept = [t.detach().clone() for t in given]
    y, *saved = ops.deconvolve(*args)
    saved_kept = [t.clone() for t in saved]
    y.square().sum().backward()
    for now, then in zip((*given, *saved), (*kept, *saved_kept), strict=True):
        assert torch.equal(now.detach(), then) or bool(then.isnan().all())
