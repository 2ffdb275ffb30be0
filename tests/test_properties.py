"""What must hold whatever the shapes: Hypothesis over arguments, and the method's degenerate cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import tdeconv
from cases import CASES, SPECTRA, Case
from helpers import (
    BACKENDS,
    FAST,
    all_finite,
    assert_close,
    bounded,
    loop_layer,
    loop_vectors,
    randn,
    run_case,
    what_cancels,
)
from tdeconv import delinear, fast_deconv, inverse_sqrt, patch_moments, reference

# --------------------------------------------------------------------------------------------------- drawn layers


@st.composite
def layers(draw, ranks=(0, 1, 2, 3)) -> Case:
    """Any layer on any input that it accepts, of at most a few hundred values."""
    rank = draw(st.sampled_from(ranks))
    groups = draw(st.integers(1, 3)) if rank else 1
    channels = groups * draw(st.integers(1, 8 if rank < 2 else 4))
    most = {0: 0, 1: 5, 2: 3, 3: 2}[rank]

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, stride, padding, dilation = axes(1, most), axes(1, 3), axes(0, 2), axes(1, 2)
    window = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least = [max(1, w - 2 * p) for w, p in zip(window, padding, strict=True)]
    spatial = tuple(draw(st.integers(n, n + (4 if rank < 3 else 2))) for n in least)
    return Case(
        "drawn",
        (draw(st.integers(1, 4) if rank else st.integers(1, 12)), channels, *spatial),
        out=groups * draw(st.integers(1, 3)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        block=draw(st.integers(1, channels + 1)),
        sampling_stride=draw(st.integers(1, 3)),
        grouping=draw(st.sampled_from(["interleaved", "contiguous"])),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"])),
    )


@bounded
@given(layers(), st.integers(1, 8), st.integers(0, 9))
@pytest.mark.parametrize("fast", FAST)
def test_backends_agree_on_any_layer(fast, case, n_iter, seed):
    """Outputs, all gradients and buffers in float64."""
    tensors = case.tensors(torch.float64, seed)
    actual, expected = (run_case(case, name, torch.float64, tensors, n_iter) for name in (fast, "reference"))
    # a single sample leaves eps alone to divide by
    assert_close(actual, expected, 1e-9, what_cancels(case, tensors, n_iter))


@bounded
@given(layers(), st.integers(1, 6))
def test_reference_is_the_method_on_any_layer(case, n_iter):
    x, weight, bias = case.tensors(torch.float64)
    assume(case.geo.features * x.numel() < 10_000)
    actual = reference.deconvolve(x, weight, bias, case.geo, 1e-2, n_iter)[:3]
    assert_close(actual, loop_layer(x, weight, bias, case.geo, 1e-2, n_iter), 1e-10)


@bounded
@given(layers(), st.integers(1, 6), st.sampled_from(BACKENDS))
def test_gradients_of_any_layer_are_its_differences(case, n_iter, backend):
    """In float64: the slope along a random direction in all inputs at once."""
    leaves = [t.clone().requires_grad_() for t in case.tensors(torch.float64) if t is not None]
    function = fast_deconv if case.rank else delinear
    options = case.options() | {"training": True, "eps": 1e-2, "n_iter": n_iter, "backend": backend}
    y = function(*leaves, **options)
    out = randn(*y.shape, seed=5)
    grads = torch.autograd.grad((y * out).sum(), leaves)
    directions = [randn(*t.shape, seed=i) for i, t in enumerate(leaves)]
    slope = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    h = 1e-5
    ends = [
        float(
            (
                function(*(t.detach() + s * h * d for t, d in zip(leaves, directions, strict=True)), **options) * out
            ).sum()
        )
        for s in (-1, 1)
    ]
    scale = sum(float((g * d).abs().sum()) for g, d in zip(grads, directions, strict=True))
    terms = float((what_cancels(case, n_iter=n_iter, eps=1e-2).y * out).abs().sum())
    rounding = 4 * torch.finfo(torch.float64).eps * terms / h
    assert (ends[1] - ends[0]) / (2 * h) == pytest.approx(slope, abs=1e-5 * scale + rounding)


@bounded
@given(layers(ranks=(1, 2, 3)))
def test_identity_whitening_is_the_convolution_on_any_layer(case):
    x, weight, bias = case.tensors(torch.float64)
    geo = case.geo
    mean = torch.zeros(geo.groups * geo.features, dtype=torch.float64)
    root = torch.eye(geo.features, dtype=torch.float64)
    root = root if geo.groups == 1 else root.repeat(geo.groups, 1, 1)
    conv = (F.conv1d, F.conv2d, F.conv3d)[case.rank - 1]
    plain = conv(x, weight, bias, case.stride, case.padding, case.dilation, case.groups)
    assert_close(fast_deconv(x, weight, bias, mean, root, training=False, **case.options()), plain, 1e-13)


@bounded
@given(
    st.lists(st.floats(-5, 1), min_size=1, max_size=30),
    st.integers(1, 20),
    st.integers(0, 5),
    st.sampled_from(FAST),
)
def test_root_of_any_spectrum(exponents, n_iter, seed, backend):
    """Symmetric, commutes with the covariance, and gains at most 1.5 per step."""
    d = len(exponents)
    vectors, _ = torch.linalg.qr(randn(d, d, seed=seed))
    values = 10 ** torch.tensor(exponents, dtype=torch.float64)
    cov = (vectors * values) @ vectors.mT
    cov = (cov + cov.mT) / 2
    root = inverse_sqrt(cov, n_iter, backend=backend)
    assert_close(root, inverse_sqrt(cov, n_iter, backend="reference"), 1e-9)
    assert_close(root.mT, root, 1e-9)
    assert_close(root @ cov, cov @ root, 1e-9)
    norm = torch.linalg.matrix_norm(cov)
    gains = torch.linalg.eigvalsh((root + root.mT) / 2) * norm.sqrt()
    assert gains.min() >= 1 - 1e-9
    assert gains.max() <= min(1.5**n_iter, float((norm / values.min()).sqrt())) * (1 + 1e-9)


# ------------------------------------------------------------------------------------------------------- other methods


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine", [False, True])
def test_one_channel_per_covariance_is_batch_norm(backend, affine):
    """A depthwise 1x1 kernel: one variance per channel, whose root is reached in any number of steps."""
    x = (randn(6, 5, 4, 3) * torch.arange(1.0, 6).view(1, 5, 1, 1) + 2).requires_grad_()
    weight = randn(5, 1, 1, 1) if affine else torch.ones(5, 1, 1, 1, dtype=torch.float64)
    bias = randn(5, seed=1) if affine else None
    y = fast_deconv(x, weight, bias, training=True, groups=5, sampling_stride=1, backend=backend)
    # batch norm adds eps to the biased variance, and so does this
    expected = F.batch_norm(x, None, None, weight.flatten(), bias, training=True, eps=1e-5)
    assert_close(y, expected, 1e-12)
    grad = randn(*y.shape, seed=2)
    assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_one_is_batch_norm_over_all_channels(backend):
    """With ``block=1`` the channels share one mean and variance, as samples of one variable."""
    x = randn(6, 5, 4, 3) * 2 + 1
    mean, cov = patch_moments(x, 1, block=1, backend=backend)
    root = inverse_sqrt(cov + 1e-5, method="eigh", backend=backend)
    weight, shift = tdeconv.fold_deconv(torch.eye(5, dtype=torch.float64)[:, :, None, None], None, mean, root)
    expected = F.batch_norm(x.reshape(-1, 1, 1), None, None, training=True, eps=1e-5).view(x.shape)
    assert_close(F.conv2d(x, weight, shift), expected, 1e-12)
    eye = torch.eye(5, dtype=torch.float64)[:, :, None, None]
    assert_close(fast_deconv(x, eye, training=True, block=1, sampling_stride=1, backend=backend), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_feature_of_a_linear_layer_is_batch_norm(backend):
    x = randn(20, 1) * 3 + 2
    y = delinear(x, torch.ones(1, 1, dtype=torch.float64), training=True, backend=backend)
    assert_close(y, F.batch_norm(x, None, None, training=True, eps=1e-5), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_channels_in_a_block_is_zca(backend):
    """1x1 with the converged root: decorrelated batch normalisation."""
    x = randn(5, 4, 6, 6) @ randn(6, 6, seed=1) + 1
    pixels = x.movedim(1, -1).reshape(-1, 4)
    cov = torch.cov(pixels.t(), correction=0) + 1e-5 * torch.eye(4)
    values, vectors = torch.linalg.eigh(cov)
    expected = (pixels - pixels.mean(0)) @ (vectors / values.sqrt()) @ vectors.t()
    eye = torch.eye(4, dtype=torch.float64)[:, :, None, None]
    y = fast_deconv(x, eye, training=True, n_iter=30, sampling_stride=1, backend=backend)
    assert_close(y.movedim(1, -1).reshape(-1, 4), expected, 1e-9)


# ------------------------------------------------------------------------------------------------------------ whitening


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("groups", "grouping"), [(1, "interleaved"), (1, "contiguous"), (2, "interleaved")])
@pytest.mark.parametrize("block", [2, 4])
def test_whitened_patches_have_identity_covariance(groups, grouping, block, backend):
    """A weight that reads off the whitened patch, one output per column."""
    x = randn(12, 4, 9, 8)
    x = x + 0.5 * x.roll(1, -1) + 0.4 * x.roll(1, 1) + 3
    eye = torch.eye(4 * 6 // groups, dtype=torch.float64).view(-1, 4 // groups, 2, 3).repeat(groups, 1, 1, 1)
    y = fast_deconv(
        x,
        eye,
        training=True,
        padding=1,
        groups=groups,
        block=block,
        grouping=grouping,
        n_iter=30,
        eps=1e-9,
        sampling_stride=1,
        backend=backend,
    )
    geo = Case("", tuple(x.shape), kernel=(2, 3), groups=groups, block=block, grouping=grouping).geo
    vectors = torch.from_numpy(loop_vectors(y.movedim(1, -1).reshape(-1, 24).numpy(), geo))
    for v in vectors.flatten(1, 2):
        assert_close(v.mean(0) + 1, torch.ones(v.shape[1], dtype=v.dtype), 1e-9)
        assert_close(torch.cov(v.t(), correction=0), torch.eye(v.shape[1], dtype=v.dtype), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_converged_root_whitens(backend):
    x = randn(9, 3, 8, 8)
    x = x + 0.9 * x.roll(1, -1)
    mean, cov = patch_moments(x, 3, padding=1, backend=backend)
    root = inverse_sqrt(cov, method="eigh", backend=backend)
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27)
    assert_close(torch.cov(((rows - mean) @ root).t(), correction=0), torch.eye(27, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("n_iter", [3, 5, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_five_steps_whiten_what_they_reach(n_iter, backend):
    """Directions near the norm come out with variance 1, weak ones short of it: never above."""
    cov = next(s for s in SPECTRA if s.name == "condition_1e4_small").tensor()[0]
    root = inverse_sqrt(cov, n_iter, backend=backend)
    variances = torch.linalg.eigvalsh(root @ cov @ root)
    assert variances.max() <= 1 + 1e-12
    assert variances.max() > 0.5
    assert variances.min() < 0.5


# ------------------------------------------------------------------------------------------------- order, determinism


@bounded
@given(layers(ranks=(1, 2, 3)), st.randoms(use_true_random=False), st.sampled_from(BACKENDS))
def test_statistics_ignore_the_batchs_order(case, random, backend):
    x = case.tensors(torch.float64)[0]
    order = random.sample(range(len(x)), len(x))
    geo = case.geo
    # a flat stride over pixels that does not divide an image's takes other pixels of the next image: the method's own
    assume(not geo.pointwise or math.prod(x.shape[2:]) % math.prod(geo.sample_stride) == 0)
    options = {"padding": case.padding, "dilation": case.dilation, "groups": case.groups, "block": case.block}
    options |= {"stride": geo.sample_stride, "grouping": case.grouping, "backend": backend}
    assert_close(patch_moments(x[order], case.kernel, **options), patch_moments(x, case.kernel, **options), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_images_output_moves_with_it(backend):
    """With the batch's order changed, so is the output's, and nothing else."""
    x, weight = randn(5, 3, 7, 7), randn(4, 3, 3, 3)
    order = [3, 0, 4, 2, 1]
    outputs = [fast_deconv(v, weight, training=True, sampling_stride=1, backend=backend) for v in (x[order], x)]
    assert_close(outputs[0], outputs[1][order], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0.0, 10.0, 1000.0])
def test_output_ignores_a_common_offset_without_padding(shift, backend):
    """The mean is taken out of every patch; in float32 too."""
    x, weight = randn(5, 3, 9, 9).float(), randn(4, 3, 3, 3)
    exact = fast_deconv(x.double(), weight, training=True, sampling_stride=1, backend="reference")
    y = fast_deconv(x + shift, weight.float(), training=True, sampling_stride=1, backend=backend)
    assert_close(y, exact, 1e-5 * (1 + shift))  # the input's own rounding grows with the offset


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-2, 1e3])
def test_output_ignores_the_inputs_scale(scale, backend):
    x, weight = randn(5, 3, 9, 9), randn(4, 3, 3, 3)
    outputs = [
        fast_deconv(f * x, weight, training=True, eps=1e-3 * f * f, sampling_stride=1, backend=backend)
        for f in (1, scale)
    ]
    assert_close(outputs[1], outputs[0], 1e-11)


@pytest.mark.parametrize(
    "name", ["plain", "depthwise", "block_by_gcd", "pointwise_block", "past_the_half_gram", "linear"]
)
def test_two_threads_give_the_bits_of_two_threads(name):
    case = next(c for c in CASES if c.name == name)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (run_case(case, "torch", torch.float32) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------- modules


@bounded
@given(st.integers(1, 12), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_modules_of_any_size_train_and_evaluate(channels, block, kernel, batch, bias):
    layer = tdeconv.FastDeconv(channels, 2, kernel, bias=bias, block=block, sampling_stride=1)
    assert channels % layer.block == 0
    assert layer.block <= max(1, min(block, channels))
    linear = tdeconv.Delinear(channels, 3, bias, block=block)
    for module, x in ((layer, randn(batch, channels, 4, 4).float()), (linear, randn(batch, channels).float())):
        x.requires_grad_()
        module(x).sum().backward()
        assert all_finite([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        assert all_finite([module.eval()(x)])


def test_a_deep_stack_stays_at_the_scale_of_its_input():
    """Whitened layers without any other normalisation: twelve of them neither explode nor vanish."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(12) for m in (tdeconv.FastDeconv(8, 8, 3, padding=1), nn.ReLU())))
    x = (randn(8, 8, 12, 12).float() * 100).requires_grad_()
    y = net(x)
    y.square().mean().backward()
    assert 0.01 < y.detach().std() < 100
    assert all_finite([x.grad, *(p.grad for p in net.parameters())])
