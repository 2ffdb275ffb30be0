"""The fast backends against the reference: every stage over the named cases, values and gradients; whole layers."""

from __future__ import annotations

import math

import pytest
import torch

import tdeconv
from cases import CASES, LAYOUTS, SPECTRA, Case
from helpers import (
    F32_TOLERANCE,
    F64_TOLERANCE,
    FAST,
    assert_close,
    difference,
    fold_terms,
    randn,
    run_case,
    what_cancels,
)
from tdeconv import ops, reference
from tdeconv.bench import memory
from tdeconv.torch_backend import chunks, gemm, measured, patches, whiten

CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
SPECTRUM = pytest.mark.parametrize("spectrum", SPECTRA, ids=lambda s: s.name)


@pytest.fixture(params=FAST)
def backend(request):
    return request.param


def gradients(outputs, inputs):
    """Vector-Jacobian products of a fixed random gradient."""
    seeds = [randn(*y.shape, dtype=y.dtype, seed=i + 7) for i, y in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, seeds)


def tolerance(case: Case, dtype: torch.dtype, expected, by_reference, sizes) -> float:
    """A few times the reference's own float32 error, where an ill-posed case makes that more than the usual bound."""
    if dtype == torch.float64:
        return F64_TOLERANCE
    if not case.degenerate:
        return F32_TOLERANCE
    errors = [difference(r, e, s) for r, e, s in zip(by_reference, expected, sizes, strict=True) if e is not None]
    return max(F32_TOLERANCE, 4 * max(errors))


# -------------------------------------------------------------------------------------------------------- the stages


@CASE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_patch_moments(case, dtype, backend):
    x = case.tensors(torch.float64)[0].to(dtype).requires_grad_()
    exact = x.detach().double().clone().requires_grad_()
    bound = F64_TOLERANCE if dtype == torch.float64 else 4e-6
    moments, expected = ops.patch_moments(x, case.geo.pack(), backend), reference.patch_moments(exact, case.geo)
    assert_close(moments, expected, bound)
    centred = reference.to_vectors(reference.im2col(exact, case.geo), case.geo) - expected[0].unsqueeze(1)
    terms = centred.abs().mT @ centred.abs() / centred.shape[1]  # above and below the diagonal in orders of their own
    assert_close(moments[1].mT, moments[1], 2 * torch.finfo(dtype).eps, [terms])
    assert_close(gradients(moments, x), gradients(expected, exact), bound)


@pytest.mark.parametrize("which", [0, 1], ids=["mean", "cov"])
def test_patch_moments_gradient_of_one_output(which, backend):
    case = next(c for c in CASES if c.name == "block_by_gcd")
    x = case.tensors(torch.float64)[0].requires_grad_()
    actual = gradients([ops.patch_moments(x, case.geo.pack(), backend)[which]], x)
    assert_close(actual, gradients([reference.patch_moments(x, case.geo)[which]], x), F64_TOLERANCE)


def root_and_gradient(function, cov, grad):
    cov = cov.detach().requires_grad_()
    root = function(cov)
    (g,) = torch.autograd.grad(root, cov, grad.to(cov.dtype))
    return root.detach(), (g + g.mT) / 2  # the reference's gradient has an antisymmetric part that reaches nothing


@SPECTRUM
@pytest.mark.parametrize("n_iter", [1, 2, 3, 5, 8, 15, 20])
def test_inverse_sqrt_float64(spectrum, n_iter, backend):
    cov = spectrum.tensor()
    grad = randn(*cov.shape)
    actual = root_and_gradient(lambda c: tdeconv.inverse_sqrt(c, n_iter, backend=backend), cov, grad)
    expected = root_and_gradient(lambda c: tdeconv.inverse_sqrt(c, n_iter, backend="reference"), cov, grad)
    loss = 1 if n_iter <= 5 else condition(spectrum)
    assert_close(actual, expected, max(1e-12, 4 * loss * torch.finfo(cov.dtype).eps))
    assert_close(actual[0].mT, actual[0], 1e-11)


def condition(spectrum) -> float:
    """By which rounding errors of the covariance may grow in its root, once the steps have reached it."""
    return max(spectrum.eigenvalues) / min(spectrum.eigenvalues)


def float32_bound(spectrum, n_iter: int) -> float:
    """shared acceptance numbers: 5 steps lose nothing, 15 lose with the condition."""
    if n_iter <= 5:
        return F32_TOLERANCE
    bounds = ((2e3, 2e-5), (2e4, 1e-4), (2e5, 1e-3), (2e6, 2e-3))
    return next(bound for limit, bound in bounds if condition(spectrum) <= limit)


@SPECTRUM
@pytest.mark.parametrize("n_iter", [1, 5, 15])
def test_inverse_sqrt_float32(spectrum, n_iter, backend):
    cov = spectrum.tensor(torch.float32)
    grad = randn(*cov.shape, dtype=torch.float32)
    actual = root_and_gradient(lambda c: tdeconv.inverse_sqrt(c, n_iter, backend=backend), cov, grad)
    expected = root_and_gradient(lambda c: tdeconv.inverse_sqrt(c, n_iter, backend="reference"), cov.double(), grad)
    assert_close(actual, expected, float32_bound(spectrum, n_iter))


@pytest.mark.parametrize("n_iter", range(1, 21))
@pytest.mark.parametrize("d", [3, 30])
def test_inverse_sqrt_gradcheck(d, n_iter, backend):
    """Numerically, along random directions."""
    root = randn(2, d, d).requires_grad_()
    eye = torch.eye(d, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda r: tdeconv.inverse_sqrt(r @ r.mT / d + 0.1 * eye, n_iter, backend=backend), root, fast_mode=True
    )


@CASE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_fold(case, dtype, backend):
    stages, geo = ops.stages(backend), case.geo
    _, weight, bias = (None if t is None else t.to(dtype) for t in case.tensors(torch.float64))
    mean, deconv = (
        randn(geo.groups, geo.features, dtype=dtype, seed=2),
        randn(geo.groups, *[geo.features] * 2, dtype=dtype),
    )
    deconv = deconv + deconv.mT
    exact = [None if t is None else t.double().clone().requires_grad_() for t in (weight, bias, mean, deconv)]
    folded = stages.fold(weight, bias, mean, deconv, geo)
    expected = reference.fold(*exact, geo)
    bound = F64_TOLERANCE if dtype == torch.float64 else 4e-6
    grads = [randn(*t.shape, dtype=dtype, seed=i + 7) for i, t in enumerate(folded)]
    sizes, sizes_of_gradients = fold_terms((weight, bias, mean, deconv), grads, geo)
    assert_close(folded, expected, bound, sizes)

    actual = stages.fold_backward(*grads, weight, mean, deconv, geo, need_statistics=True)
    leaves = [exact[0], exact[2], exact[3]]
    wanted = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    assert_close(actual, wanted, bound, sizes_of_gradients)
    only_weight = stages.fold_backward(*grads, weight, mean, deconv, geo, need_statistics=False)
    assert only_weight[1:] == (None, None)
    assert torch.equal(only_weight[0], actual[0])


@CASE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_convolve(case, dtype, backend):
    stages, geo = ops.stages(backend), case.geo
    x, weight, _ = (None if t is None else t.to(dtype) for t in case.tensors(torch.float64))
    bias = randn(case.out, dtype=dtype)
    exact = [t.double().clone().requires_grad_() for t in (x, weight, bias)]
    y, expected = stages.convolve(x, weight, bias, geo), reference.convolve(*exact, geo)
    bound = F64_TOLERANCE if dtype == torch.float64 else 4e-6
    assert_close(y, expected, bound)

    grad = randn(*y.shape, dtype=dtype, seed=7)
    expected = torch.autograd.grad(expected, exact, grad.double())
    args = (grad, x, weight, geo)
    assert_close(stages.convolve_backward(*args, need_x=True), expected, bound)
    grad_x, *rest = stages.convolve_backward(*args, need_x=False)
    assert grad_x is None
    assert_close(rest, expected[1:], bound)


# ------------------------------------------------------------------------------------------------------- whole layers


@CASE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_layer(case, dtype, backend):
    assert_as_the_reference(case, dtype, backend)


def assert_as_the_reference(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Output, all gradients and buffers, from the same numbers, against the reference in float64."""
    tensors = [None if t is None else t.to(dtype) for t in case.tensors(torch.float64)]
    actual, expected = run_case(case, backend, dtype, tensors), run_case(case, "reference", torch.float64, tensors)
    by_reference, sizes = run_case(case, "reference", dtype, tensors), what_cancels(case, tensors)
    bound = tolerance(case, dtype, expected, by_reference, sizes)
    assert_close(actual, expected, bound, sizes)
    assert_close(actual, by_reference, bound, sizes)


@CASE
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_layer_on_any_cpu(case, onednn, products, monkeypatch):
    """Whatever was measured on a CPU, of which the other tests fix one answer; oneDNN for small products, too, and
    patches whitened however many there are."""
    monkeypatch.setattr(gemm, "_LARGE", 0)
    monkeypatch.setattr(whiten, "_PATCH", -math.inf)
    with measured.fixed(onednn=onednn, products=products):
        assert_as_the_reference(case, torch.float32, "torch")


@CASE
@pytest.mark.parametrize("patch", [math.inf, -math.inf], ids=["folded", "whitened"])
def test_folding_and_whitening_are_the_same(case, patch, monkeypatch):
    """In float64, to the last digits, whichever the sizes say."""
    monkeypatch.setattr(whiten, "_PATCH", patch)
    assert_as_the_reference(case, torch.float64, "torch")


@CASE
@pytest.mark.parametrize("values", [1, 200])
def test_layer_in_small_parts(case, values, monkeypatch):
    """Batches larger than the cache are worked on in parts; here, a few values at a time."""
    monkeypatch.setattr(chunks, "_ON_CPU", values)
    actual, expected = (run_case(case, name, torch.float64) for name in ("torch", "reference"))
    assert_close(actual, expected, F64_TOLERANCE, what_cancels(case))


@pytest.mark.parametrize("most", [1, 5, 12, 1000])
@pytest.mark.parametrize("sizes", [(7,), (3, 4), (2, 3, 5), (1, 1, 6), (0, 3)], ids=str)
def test_boxes_cover_an_array_once(sizes, most):
    seen = torch.zeros(sizes)
    for box in patches.boxes(sizes, most):
        assert seen[box].numel() <= most
        seen[box] += 1
    assert bool((seen == 1).all())


def peak_of_a_step(module: torch.nn.Module, x: torch.Tensor) -> int:
    x = x.detach().requires_grad_()
    return memory.allocations(lambda: module(x).square().sum().backward()).peak


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 8, 16, 16, 16), {}),
        ((1, 8, 16, 16, 16), {"groups": 8}),
        ((1, 8, 64, 64), {}),
        ((1, 8, 4, 1024), {}),
        ((1, 8, 1, 4096), {}),
        ((1, 8, 4096), {}),
        ((1, 64, 24, 24), {"kernel_size": 1}),
        ((1, 128, 64, 64), {}),
        ((1, 128, 64, 64), {"stride": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_memory_of_a_large_image_sampled_everywhere(shape, options, layout, monkeypatch):
    """Sampled everywhere, its patches are many times its own size: only a chunk of them exists at once."""
    monkeypatch.setattr(chunks, "_ON_CPU", 1 << 14)
    rank, channels = len(shape) - 2, shape[1]
    options = {"kernel_size": 3} | options
    options["padding"] = options["kernel_size"] // 2
    convolution = getattr(torch.nn, f"Conv{rank}d")(channels, channels, **options)
    plain = torch.nn.Sequential(convolution, getattr(torch.nn, f"BatchNorm{rank}d")(channels))
    name = "FastDeconv" if rank == 2 else f"FastDeconv{rank}d"
    layer = getattr(tdeconv, name)(channels, channels, **options, block=2, sampling_stride=1, backend="torch")
    x = LAYOUTS[layout](lambda shape: torch.randn(shape), shape)
    assert peak_of_a_step(layer, x) <= 2 * peak_of_a_step(plain, x)


def test_memory_of_one_volume_sampled_everywhere():
    """All its patches at once are 432 MiB."""
    x = torch.randn(1, 16, 64, 64, 64)
    plain = torch.nn.Sequential(torch.nn.Conv3d(16, 16, 3, padding=1), torch.nn.BatchNorm3d(16))
    layer = tdeconv.FastDeconv3d(16, 16, 3, padding=1, sampling_stride=1, backend="torch")
    assert peak_of_a_step(layer, x) <= 1.25 * peak_of_a_step(plain, x)


@CASE
def test_layer_with_fifteen_steps(case, backend):
    actual, expected = (run_case(case, name, torch.float64, n_iter=15) for name in (backend, "reference"))
    assert_close(actual, expected, 1e-9, what_cancels(case, n_iter=15))


def ill_conditioned(condition: float) -> torch.Tensor:
    """An input whose channels' covariance has this condition, eps included."""
    d, eps = 27, 1e-5
    values = eps * condition ** (torch.arange(d, dtype=torch.float64) / (d - 1))
    x = randn(4096, d)
    x = x - x.mean(0)
    white = x @ reference.converged_inverse_sqrt(x.mT @ x / len(x))
    rotation = torch.linalg.qr(randn(d, d, seed=1))[0]
    return (white * (values - eps).sqrt() @ rotation + 0.5).reshape(16, 16, 16, d).movedim(-1, 1).contiguous()


@pytest.mark.parametrize(("n_iter", "bound"), [(5, 2e-5), (15, 2e-3)])
def test_layer_at_condition_1e6_in_float32(n_iter, bound, backend):
    x = ill_conditioned(1e6).float()
    case = Case("condition_1e6", tuple(x.shape), out=8, kernel=1, sampling_stride=1)
    _, cov = tdeconv.patch_moments(x.double(), 1)
    assert torch.linalg.cond(cov + 1e-5 * torch.eye(27)) == pytest.approx(1e6, rel=0.05)
    _, weight, bias = case.tensors(torch.float32)
    tensors = (x, weight, bias)
    expected = run_case(case, "reference", torch.float64, tensors, n_iter)
    assert_close(run_case(case, backend, torch.float32, tensors, n_iter), expected, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@CASE
def test_layer_in_half_precision(case, dtype, backend):
    """At most a few times the error of plain torch in the same dtype; statistics are float32 inside either way."""
    tensors = [None if t is None else t.to(dtype) for t in case.tensors(torch.float64)]
    expected = run_case(case, "reference", torch.float64, tensors)
    plain = run_case(case, "reference", dtype, tensors)
    actual, sizes = run_case(case, backend, dtype, tensors), what_cancels(case, tensors)
    for a, r, e, size in zip(actual, plain, expected, sizes, strict=True):
        if e is not None:
            assert a.dtype == dtype
            assert difference(a, e, size) <= 3 * difference(r, e, size) + torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "name", ["plain", "channels_last", "groups_two", "block_by_gcd", "pointwise_block", "conv1d", "linear"]
)
def test_gradcheck_layer(name, backend):
    case = next(c for c in CASES if c.name == name)
    x, weight, bias = (t.requires_grad_() for t in case.tensors(torch.float64))
    function = tdeconv.fast_deconv if case.rank else tdeconv.delinear
    options = case.options() | {"training": True, "backend": backend, "eps": 1e-3}
    assert torch.autograd.gradcheck(lambda x, w, b: function(x, w, b, **options), (x, weight, bias), fast_mode=True)


def test_input_gradient_is_not_needed(backend):
    """The first layer of a network: the parameters' gradients are the same."""
    case = next(c for c in CASES if c.name == "block_by_gcd")
    x, weight, bias = case.tensors(torch.float64)
    grads = []
    for needs in (True, False):
        leaves = [t.clone().requires_grad_() for t in (weight, bias)]
        y = tdeconv.fast_deconv(
            x.clone().requires_grad_(needs), *leaves, training=True, backend=backend, **case.options()
        )
        grads.append(gradients([y], leaves))
    assert_close(grads[1], grads[0], 1e-14)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters(frozen, backend):
    """Gradients reach the input though the parameters do not ask for theirs."""
    case = next(c for c in CASES if c.name == "plain")
    x, weight, bias = case.tensors(torch.float64)
    x.requires_grad_()
    weight.requires_grad_(frozen == "bias")
    bias.requires_grad_(frozen == "weight")
    grads = []
    for name in (backend, "reference"):
        y = tdeconv.fast_deconv(x, weight, bias, training=True, backend=name, **case.options())
        grads += gradients([y], [x])
    assert_close(grads[0], grads[1], F64_TOLERANCE)


@pytest.mark.parametrize("how", ["sum", "mean", "slice", "channels_last", "transposed"])
def test_gradients_of_every_layout(how, backend):
    """What reaches backward is seldom contiguous."""
    case = next(c for c in CASES if c.name == "block_divides")
    reduce = {
        "sum": lambda y: y.sum(),
        "mean": lambda y: y.mean((0, 2, 3)).square().sum(),
        "slice": lambda y: y[:, 1:, ::2, 1::3].square().sum(),
        "channels_last": lambda y: (y.permute(0, 2, 3, 1).contiguous() * randn(2, 8, 8, 4)).sum(),
        "transposed": lambda y: (y.transpose(2, 3) @ randn(8, 3)).square().sum(),
    }[how]
    grads = []
    for name in (backend, "reference"):
        leaves = [t.requires_grad_() for t in case.tensors(torch.float64)]
        y = tdeconv.fast_deconv(*leaves, training=True, backend=name, **case.options())
        grads.append(torch.autograd.grad(reduce(y), leaves))
    assert_close(grads[0], grads[1], 1e-10)


def test_backward_twice_gives_the_same(backend):
    """The moments' gradient is added in place into the convolution's, and into nothing that was saved."""
    case = next(c for c in CASES if c.name == "plain")
    leaves = [t.requires_grad_() for t in case.tensors(torch.float64)]
    y = tdeconv.fast_deconv(*leaves, training=True, backend=backend, **case.options())
    grad = randn(*y.shape)
    kept = [t.detach().clone() for t in (*leaves, grad)]
    first, second = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for now, then in zip((*leaves, grad), kept, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(
    "name", ["plain", "channels_last", "past_the_half_gram", "wide_channels", "depthwise", "conv1d", "linear"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice(name, dtype, backend):
    case = next(c for c in CASES if c.name == name)
    first, second = (run_case(case, backend, dtype, case.tensors(dtype)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize(("n_iter", "kernel"), [(5, 1), (5, 3), (15, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_of_the_inputs_size_is_saved_but_the_input(n_iter, kernel, layout, bias, backend):
    case = Case("saved", (8, 6, 24, 24), out=5, kernel=kernel, padding=kernel // 2, block=3, bias=bias, layout=layout)
    tensors = [t.requires_grad_() for t in case.tensors(torch.float32) if t is not None]
    x, weight = tensors[:2]
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = tdeconv.fast_deconv(*tensors, training=True, n_iter=n_iter, backend=backend, **case.options())
    assert x.untyped_storage().data_ptr() in saved
    d = case.geo.features
    limit = max(weight.numel() * 4, d * d * 8)
    others = {k: v for k, v in saved.items() if k != x.untyped_storage().data_ptr()}
    sizes = {k: v.untyped_storage().nbytes() for k, v in others.items()}
    assert all(size <= limit for size in sizes.values())
    assert sum(sizes.values()) <= 6 * limit < x.untyped_storage().nbytes()
    y.sum().backward()


def test_second_derivatives_are_refused_not_wrong(backend):
    case = next(c for c in CASES if c.name == "plain")
    leaves = [t.requires_grad_() for t in case.tensors(torch.float64)]
    y = tdeconv.fast_deconv(*leaves, training=True, backend=backend, **case.options())
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; run the layer with backend='reference'"):
        grad.square().sum().backward()
