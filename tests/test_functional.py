"""The public functions: the stages compose to the layer, dtypes are kept, evaluation is a fold and a convolution."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tdeconv
from cases import CONV_CASES, Case
from helpers import BACKENDS, all_finite, assert_close, randn, what_cancels
from tdeconv import delinear, fast_deconv, fold_deconv, inverse_sqrt, patch_moments

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def stages_one_by_one(case: Case, x, weight, bias, backend: str, eps: float = 1e-5):
    """The layer from its stages, as a user composes them."""
    step = tuple(case.sampling_stride * s for s in case.axes(case.stride))
    options = {"padding": case.padding, "dilation": case.dilation, "groups": case.groups}
    mean, cov = patch_moments(
        x,
        case.kernel,
        stride=step,
        block=case.block,
        grouping=case.grouping,
        backend=backend,
        **options,
    )
    root = inverse_sqrt(cov + eps * torch.eye(cov.shape[-1], dtype=cov.dtype), backend=backend)
    weight, shift = fold_deconv(weight, bias, mean, root, groups=case.groups, grouping=case.grouping)
    conv = (F.conv1d, F.conv2d, F.conv3d)[case.rank - 1]
    return conv(x, weight, shift, case.stride, **options), mean, root


# One sample, or samples of nothing but padding: the running statistics do not count them.
WITHOUT_VARIATION = ("single_sample", "sampled_in_padding_only", "wide_few_pixels_strided")


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda c: c.name)
def test_stages_compose_to_the_layer(case, backend):
    leaves = [None if t is None else t.requires_grad_() for t in case.tensors(torch.float64)]
    given = [t for t in leaves if t is not None]
    y, mean, root = stages_one_by_one(case, *leaves, backend)
    running = torch.zeros_like(mean), torch.zeros_like(root)
    layer = fast_deconv(*leaves, *running, training=True, momentum=1, backend=backend, **case.options())
    sizes = what_cancels(case)
    assert_close(layer, y, 1e-11, [sizes.y])
    counted = case.name not in WITHOUT_VARIATION
    assert_close(running, (mean, root) if counted else [torch.zeros_like(t) for t in running], 1e-11)
    gradients = (torch.autograd.grad(out, given, randn(*y.shape, seed=1)) for out in (layer, y))
    assert_close(*gradients, 1e-11, [sizes.grad_x, sizes.grad_weight, sizes.grad_bias][: len(given)])


# ------------------------------------------------------------------------------------------------------ patch_moments


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2, "padding": (2, 0), "stride": (1, 2)}]
)
def test_patch_moments_are_those_of_unfold(options, backend):
    x = randn(3, 2, 8, 7)
    rows = F.unfold(x, 3, **options).transpose(1, 2).reshape(-1, 18)
    mean, cov = patch_moments(x, 3, backend=backend, **options)
    assert_close((mean, cov), (rows.mean(0), torch.cov(rows.t(), correction=0)), 1e-12)


def test_patch_moments_shapes(backend):
    x = randn(2, 6, 7, 7)
    assert [tuple(t.shape) for t in patch_moments(x, 2, block=4, backend=backend)] == [(8,), (8, 8)]
    assert [tuple(t.shape) for t in patch_moments(x, (1, 3), groups=3, backend=backend)] == [(18,), (3, 6, 6)]


@pytest.mark.parametrize("dtype", HALVES)
def test_patch_moments_of_half_precision_are_float32(dtype, backend):
    x = randn(2, 3, 8, 8, dtype=dtype)
    moments = patch_moments(x, 3, backend=backend)
    assert {m.dtype for m in moments} == {torch.float32}
    assert_close(moments, patch_moments(x.double(), 3, backend="reference"), 1e-6)


@pytest.mark.exact
def test_patch_moments_of_a_constant_have_no_covariance(backend):
    mean, cov = patch_moments(torch.full((2, 3, 6, 6), 1000.0), 3, backend=backend)
    assert torch.equal(mean, torch.full((27,), 1000.0))
    assert torch.equal(cov, torch.zeros(27, 27))


# ------------------------------------------------------------------------------------------------------- inverse_sqrt


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4), (2, 3, 4, 4), (0, 4, 4), (30, 30), (2, 30, 30)])
@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
def test_inverse_sqrt_takes_any_batch(shape, method, backend):
    root = randn(*shape)
    cov = root @ root.mT + torch.eye(shape[-1], dtype=torch.float64)
    result = inverse_sqrt(cov, 30, method=method, backend=backend)
    assert result.shape == cov.shape
    assert_close(result @ cov @ result, torch.eye(shape[-1], dtype=cov.dtype).expand(shape), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
def test_inverse_sqrt_keeps_the_dtype(dtype, method, backend):
    cov = torch.diag(torch.tensor([1.0, 0.5, 0.25])).to(dtype)
    condition = 4  # times as much may be left of a rounding error
    result = inverse_sqrt(cov, 12, method=method, backend=backend)
    assert result.dtype == dtype
    assert_close(result, torch.diag(cov.diagonal().double().rsqrt()), 2 * condition * torch.finfo(dtype).eps)


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 1e-5, 1e-5), (1.0, 1.0 + 1e-12, 3.0, 3.0)])
def test_converged_root_has_a_gradient_where_eigenvalues_repeat(values):
    """Its derivative along a direction, by differences."""
    cov = torch.diag(torch.tensor(values, dtype=torch.float64)).requires_grad_()
    weight, direction = randn(4, 4), randn(4, 4, seed=1)
    direction = direction + direction.mT
    (grad,) = torch.autograd.grad((inverse_sqrt(cov, method="eigh") * weight).sum(), cov)
    h = 1e-4 * min(values)
    up, down = (inverse_sqrt(cov.detach() + s * h * direction, method="eigh") for s in (1, -1))
    assert float((grad * direction).sum()) == pytest.approx(float(((up - down) * weight).sum()) / (2 * h), rel=1e-5)


def test_method_eigh_ignores_the_steps():
    cov = torch.diag(torch.tensor([1.0, 1e-4]))
    assert torch.equal(inverse_sqrt(cov, 1, method="eigh"), inverse_sqrt(cov, 9, method="eigh"))


# -------------------------------------------------------------------------------------------------------- fold_deconv


@pytest.mark.exact
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("grouping", ["interleaved", "contiguous"])
def test_folding_the_identity_changes_nothing(groups, grouping):
    weight, bias = randn(4, 6 // groups, 3, 2), randn(4)
    d = 36 // groups if groups > 1 else 12
    batch = (groups,) if groups > 1 else ()
    folded = fold_deconv(
        weight,
        bias,
        torch.zeros(groups * d, dtype=torch.float64),
        torch.eye(d, dtype=torch.float64).repeat(*batch, 1, 1),
        groups=groups,
        grouping=grouping,
    )
    assert_close(folded, (weight, bias), 0)


def test_folding_a_linear_layer_whitens_its_input():
    weight, bias, x = randn(3, 6), randn(3, seed=1), randn(5, 6, seed=2)
    mean, deconv = randn(2, seed=3), randn(2, 2, seed=4)
    deconv = deconv + deconv.mT
    whitened = ((x.reshape(5, 3, 2) - mean) @ deconv).reshape(5, 6)
    actual = F.linear(x, *fold_deconv(weight, bias, mean, deconv, grouping="contiguous"))
    assert_close(actual, F.linear(whitened, weight, bias), 1e-13)
    _, shift = fold_deconv(weight, None, mean, deconv, grouping="contiguous")
    assert_close(shift, fold_deconv(weight, bias, mean, deconv, grouping="contiguous")[1] - bias, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_fold_keeps_the_weights_dtype(dtype):
    folded = fold_deconv(randn(4, 2, 3, dtype=dtype), None, torch.zeros(6), torch.eye(6))
    assert {t.dtype for t in folded} == {dtype}


# ------------------------------------------------------------------------------------------------ fast_deconv, delinear


def test_no_statistics_to_keep(backend):
    x, weight = randn(3, 2, 6, 6), randn(4, 2, 3, 3)
    running = torch.zeros(18, dtype=torch.float64), torch.eye(18, dtype=torch.float64)
    y = fast_deconv(x, weight, training=True, backend=backend)
    assert torch.equal(y, fast_deconv(x, weight, None, *running, training=True, backend=backend))


@pytest.mark.parametrize("momentum", [0, 0.1, 1])
def test_running_statistics_move_by_momentum(momentum, backend):
    x, weight = randn(3, 2, 6, 6), randn(4, 2, 3, 3)
    old = randn(18, seed=1), randn(18, 18, seed=2)
    running = [t.clone() for t in old]
    new = [torch.zeros_like(t) for t in old]
    for statistics, m in ((running, momentum), (new, 1)):
        fast_deconv(x, weight, None, *statistics, training=True, momentum=m, backend=backend)
    assert_close(running, [(1 - momentum) * o + momentum * n for o, n in zip(old, new, strict=True)], 1e-14)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_unbatched_input_is_a_batch_of_one(rank, backend):
    x, weight, bias = randn(2, *[7] * rank), randn(3, 2, *[2] * rank), randn(3)
    one = fast_deconv(x, weight, bias, training=True, sampling_stride=1, backend=backend)
    batch = fast_deconv(x.unsqueeze(0), weight, bias, training=True, sampling_stride=1, backend=backend)
    assert torch.equal(one, batch.squeeze(0))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 4, 6), (2, 1, 3, 6)])
def test_delinear_takes_any_leading_shape(shape, backend):
    x, weight, bias = randn(*shape), randn(3, 6), randn(3)
    y = delinear(x, weight, bias, training=True, block=2, backend=backend)
    rows = delinear(x.reshape(-1, 6), weight, bias, training=True, block=2, backend=backend)
    assert torch.equal(y, rows.reshape(*shape[:-1], 3))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("training", [True, False])
def test_autocast(dtype, training, backend):
    """The output in autocast's dtype; statistics, parameters' gradients and buffers in float32."""
    x, weight, bias = (t.float() for t in (randn(4, 3, 8, 8), randn(5, 3, 3, 3), randn(5)))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    running = torch.zeros(27), torch.eye(27)
    with torch.autocast("cpu", dtype):
        y = fast_deconv(*leaves, *running, training=training, sampling_stride=1, backend=backend)
    assert y.dtype == dtype
    assert {t.dtype for t in running} == {torch.float32}
    grad = randn(*y.shape, dtype=dtype)
    grads = torch.autograd.grad(y, leaves, grad)
    assert {g.dtype for g in grads} == {torch.float32}
    exact = fast_deconv(*leaves, *running, training=training, sampling_stride=1, backend=backend)
    bound = 8 * torch.finfo(dtype).eps
    assert_close((y, *grads), (exact, *torch.autograd.grad(exact, leaves, grad.float())), bound)


def test_autocast_leaves_float64_alone(backend):
    x, weight = randn(4, 3, 8, 8), randn(5, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = fast_deconv(x, weight, training=True, backend=backend)
    assert torch.equal(y, fast_deconv(x, weight, training=True, backend=backend))


def test_statistics_are_not_lowered_by_autocast(backend):
    x = randn(4, 3, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mean, cov = patch_moments(x, 3, backend=backend)
        root = inverse_sqrt(cov + 1e-5 * torch.eye(27), backend=backend)
        folded = fold_deconv(x[:, :, :3, :3], None, mean, root)
    expected = patch_moments(x, 3, backend=backend)
    assert_close((mean, cov), expected, 0)
    assert_close(root, inverse_sqrt(expected[1] + 1e-5 * torch.eye(27), backend=backend), 0)
    assert_close(folded, fold_deconv(x[:, :, :3, :3], None, mean, root), 0)


def test_no_grad_and_inference_mode():
    x, weight = randn(2, 2, 6, 6), randn(2, 2, 3, 3)
    with torch.no_grad():
        y = fast_deconv(x.requires_grad_(), weight, training=True)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(fast_deconv(x, weight, training=True), y)


# --------------------------------------------------------------------------------------------------------- evaluation


class Recorder(TorchDispatchMode):
    """Every operator that runs, with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, result))
        return result


def storages(values):
    flat = torch.utils._pytree.tree_leaves(values)
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in flat if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("kind", ["3x3", "1x1", "grouped", "1d", "linear"])
def test_evaluation_is_a_fold_and_a_plain_convolution(kind, layout, gradients, backend):
    """No copy of the input, no statistics: what is as large as the input is the input or the output."""
    layer, shape = {
        "3x3": (tdeconv.FastDeconv(8, 2, 3, padding=1, block=4), (4, 8, 20, 20)),
        "1x1": (tdeconv.FastDeconv(8, 2, 1), (4, 8, 20, 20)),
        "grouped": (tdeconv.FastDeconv(8, 2, 3, groups=2), (4, 8, 20, 20)),
        "1d": (tdeconv.FastDeconv1d(8, 2, 3), (4, 8, 400)),
        "linear": (tdeconv.Delinear(16, 2, block=4), (800, 16)),
    }[kind]
    x = Case("", shape, layout=layout).tensors(torch.float32)[0] if kind != "linear" else randn(*shape).float()
    layer.eval()
    layer.backend = backend
    with torch.set_grad_enabled(gradients), Recorder() as recorder:
        y = layer(x)
    (source,) = storages(x)
    convolutions = 0
    for func, args, result in recorder.calls:
        assert func.namespace == "aten", func
        made = {k: n for k, n in storages(result).items() if k != source}
        if any(word in str(func) for word in ("convolution", "addmm", "linear")) and source in storages(args):
            convolutions += 1
        else:
            assert all(n < x.numel() * x.element_size() // 4 for n in made.values()), func
        assert not any(word in str(func) for word in ("eigh", "mean", "var", "isfinite", "lerp")), func
    assert convolutions == 1
    assert all_finite([y])
