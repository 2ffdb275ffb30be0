"""How each stage would be done, and why: the choices of this backend in words."""

from __future__ import annotations

from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.precision import statistics_dtype
from tdeconv.torch_backend.convolve import by_pixels, by_tiles, wide
from tdeconv.torch_backend.inverse_sqrt import decomposition_dtype, uses_eigh
from tdeconv.torch_backend.whiten import whitens


def describe(x: Tensor, weight: Tensor, geo: Geometry, n_iter: int) -> dict[str, str]:
    """One line per stage."""
    if whitens(x, weight, geo):
        few = f"the patches at all output positions are whitened, fewer than the {weight.shape[0]} output channels"
        fold, convolve = f"none: {few}", "one product of the whitened patches with the weight"
    else:
        fold, convolve = f"{weight.shape[0]} x {geo.pooled} rows of {geo.features}", _convolve(x, weight, geo)
    return {
        "patch_moments": _patch_moments(geo),
        "inverse_sqrt": _inverse_sqrt(x, geo, n_iter),
        "fold": fold,
        "convolve": convolve,
    }


def _patch_moments(geo: Geometry) -> str:
    what = f"pixels, one in {geo.flat_stride}" if geo.pointwise else f"patches at every {geo.sample_stride}"
    return f"{what}; {geo.groups} covariance(s) of {geo.features} features, {geo.pooled} vector(s) of a patch each"


def _inverse_sqrt(x: Tensor, geo: Geometry, n_iter: int) -> str:
    dtype = statistics_dtype(x.dtype)
    if uses_eigh(x.device, geo.groups, geo.features, n_iter):
        work = decomposition_dtype(x.device, dtype, n_iter)
        return f"eigendecomposition in {work}, the {n_iter}-step polynomial on its eigenvalues: fewer products on a CPU"
    why = (
        "too few steps, too small or too many matrices for decompositions to pay"
        if x.device.type == "cpu"
        else "eigensolvers are slow on a GPU"
    )
    return f"products, {n_iter} Newton-Schulz step(s) two at a time: {why}"


def _convolve(x: Tensor, weight: Tensor, geo: Geometry) -> str:
    if by_pixels(x, weight, geo):
        return "one product per pair of pixels: most taps of so small a map fall on padding"
    if by_tiles(x, weight, geo):
        return "Winograd's, 2x2 outputs at a time, channels-last, a few images at a time: fewer products"
    if not wide(x, weight):
        return "the library's convolution"
    return "the library's convolution, channels-last, a few images at a time; its weight gradient one product per tap"
