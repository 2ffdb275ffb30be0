"""The reference backend: against method.md written a second time with loops, and by gradcheck."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import CASES, SPECTRA, Case
from helpers import assert_close, loop_layer, loop_moments, randn, spectral_root
from tdeconv import reference
from tdeconv.geometry import Geometry, resolve_block

# one of each kind, small enough for numerical derivatives
GRADIENT_CASES = [
    Case("conv2d", (2, 2, 4, 5), out=2, padding=1),
    Case("conv2d_interleaved", (2, 4, 4, 4), out=2, kernel=2, block=2, sampling_stride=1, stride=2),
    Case("conv2d_contiguous", (2, 4, 4, 4), out=2, kernel=2, block=2, grouping="contiguous"),
    Case("conv2d_groups", (2, 4, 4, 4), out=4, kernel=2, groups=2, dilation=2, sampling_stride=1),
    Case("conv2d_depthwise", (2, 2, 4, 4), out=4, kernel=2, groups=2, padding=1),
    Case("conv2d_pointwise", (3, 4, 3, 4), out=2, kernel=1, block=2),
    Case("conv2d_bias_off", (2, 2, 4, 4), out=2, kernel=(1, 2), bias=False),
    Case("conv1d", (2, 3, 7), out=2, padding=1),
    Case("conv1d_groups", (3, 4, 6), out=2, kernel=2, groups=2),
    Case("conv3d", (2, 1, 3, 4, 3), out=2, kernel=2, padding=1),
    Case("conv3d_interleaved", (2, 4, 2, 3, 3), out=2, kernel=(1, 2, 1), block=2),
    Case("linear", (6, 3), kernel=(), out=2),
    Case("linear_blocks", (5, 6), kernel=(), out=2, block=3),
]


def tensors(case: Case):
    x, weight, bias = case.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    return leaves, bias is not None


def symmetric(root: torch.Tensor) -> torch.Tensor:
    return root @ root.mT / root.shape[-1] + 0.05 * torch.eye(root.shape[-1], dtype=root.dtype)


# ------------------------------------------------------------------------------------- against the loops of helpers.py


@pytest.mark.parametrize("case", [c for c in CASES if c.geo.features < 150], ids=lambda c: c.name)
def test_moments_are_those_of_the_loops(case):
    x, _, _ = case.tensors(torch.float64)
    mean, cov = loop_moments(x, case.geo)
    assert_close(reference.patch_moments(x, case.geo), (torch.from_numpy(mean), torch.from_numpy(cov)), 1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA, ids=lambda s: s.name)
@pytest.mark.parametrize("n_iter", [1, 2, 5, 15])
def test_root_is_the_polynomial_of_each_eigenvalue(spectrum, n_iter):
    cov = spectrum.tensor()
    expected = torch.from_numpy(spectral_root(cov.numpy(), n_iter))
    assert_close(reference.inverse_sqrt(cov, n_iter), expected, 1e-13 if n_iter <= 5 else 1e-10)


@pytest.mark.parametrize("case", [c for c in CASES if c.geo.features < 150], ids=lambda c: c.name)
def test_layer_is_whitening_every_patch_and_then_the_weight(case):
    x, weight, bias = case.tensors(torch.float64)
    y, mean, root, _ = reference.deconvolve(x, weight, bias, case.geo, 1e-5, 5)
    assert_close((y, mean, root), loop_layer(x, weight, bias, case.geo), 1e-11)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 3])
def test_rows_are_those_of_unfold(padding, dilation, stride):
    geo = Geometry(3, (3, 2), (stride,) * 2, (padding,) * 2, (dilation,) * 2, 1, 3, "interleaved")
    x = randn(2, 3, 9, 8)
    expected = F.unfold(x, (3, 2), dilation, padding, stride).transpose(1, 2).reshape(-1, 18)
    assert torch.equal(reference.im2col(x, geo), expected)


def test_pointwise_samples_are_a_flat_stride_of_pixels():
    geo = Geometry(4, (1, 1), (1, 1), (0, 0), (1, 1), 1, 4, "interleaved", sampling_stride=3)
    x = randn(2, 4, 5, 7)
    assert torch.equal(reference.im2col(x, geo), x.permute(0, 2, 3, 1).reshape(-1, 4)[::9])


def test_converged_root_is_the_limit_of_the_iteration():
    cov = SPECTRA[11].tensor()
    root = reference.converged_inverse_sqrt(cov)
    assert_close(root @ cov @ root, torch.eye(27, dtype=cov.dtype).unsqueeze(0), 1e-12)
    assert_close(reference.inverse_sqrt(cov, 40), root, 1e-11)


def test_five_steps_do_not_converge_and_that_is_the_method():
    cov = torch.diag(torch.tensor([1.0, 1e-5], dtype=torch.float64)).unsqueeze(0)
    gain = reference.inverse_sqrt(cov, 5)[0, 1, 1]
    assert 7 < gain < 1.5**5 + 1e-3  # the converged root's would be 316


@pytest.mark.parametrize(
    ("block", "channels", "groups", "expected"),
    [(64, 3, 1, 3), (64, 64, 1, 64), (64, 128, 1, 64), (64, 96, 1, 32), (3, 5, 1, 1), (4, 6, 1, 2), (2, 12, 3, 4)],
)
def test_block_is_cut_down_to_a_divisor(block, channels, groups, expected):
    assert resolve_block(block, channels, groups) == expected


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_weight_vectors_come_back(case):
    _, weight, _ = case.tensors(torch.float64)
    vectors = reference.weight_vectors(weight, case.geo)
    assert torch.equal(reference.weight_from_vectors(vectors, case.geo, weight.shape), weight)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_geometry_survives_packing(case):
    geo = case.geo
    packed = geo.pack()
    assert all(type(v) is int for v in packed)
    assert Geometry.unpack(packed) == geo


# ---------------------------------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.name)
def test_gradcheck_patch_moments(case):
    (x, *_), _ = tensors(case)
    assert torch.autograd.gradcheck(lambda x: reference.patch_moments(x, case.geo), x)


@pytest.mark.parametrize("n_iter", [1, 2, 5, 9])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck_inverse_sqrt(batch, n_iter):
    root = randn(batch, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: reference.inverse_sqrt(symmetric(r), n_iter), root)
    assert torch.autograd.gradcheck(
        lambda c: reference.inverse_sqrt(c, n_iter), symmetric(root).detach().requires_grad_()
    )


def test_gradcheck_converged_inverse_sqrt():
    root = randn(2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: reference.converged_inverse_sqrt(symmetric(r)), root)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.name)
def test_gradcheck_fold(case):
    (_, weight, *bias), _ = tensors(case)
    geo = case.geo
    mean = randn(geo.groups, geo.features, seed=2).requires_grad_()
    deconv = randn(geo.groups, geo.features, geo.features, seed=3).requires_grad_()

    def fold(weight, mean, deconv, bias=None):
        return reference.fold(weight, bias, mean, deconv, geo)

    assert torch.autograd.gradcheck(fold, (weight, mean, deconv, *bias))


@pytest.mark.parametrize("case", [c for c in GRADIENT_CASES if c.bias], ids=lambda c: c.name)
def test_gradcheck_convolve(case):
    leaves, _ = tensors(case)
    assert torch.autograd.gradcheck(lambda x, w, b: reference.convolve(x, w, b, case.geo), leaves)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.name)
def test_gradcheck_layer(case):
    leaves, _ = tensors(case)

    def layer(x, weight, bias=None):
        return reference.deconvolve(x, weight, bias, case.geo, 1e-2, 5)[:3]

    assert torch.autograd.gradcheck(layer, leaves)


def test_gradgradcheck_layer():
    case = Case("small", (2, 2, 3, 4), out=1, kernel=2, sampling_stride=1)
    leaves, _ = tensors(case)
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: reference.deconvolve(x, w, b, case.geo, 1e-1, 3)[0], leaves, atol=1e-4
    )


def test_every_case_has_its_own_name():
    for cases in (CASES, SPECTRA):
        assert len({c.name for c in cases}) == len(cases) >= 30
