"""How each stage would be done, and why: the choices of this backend in words."""

from __future__ import annotations

import torch
from torch import Tensor

from tdeconv import torch_backend
from tdeconv.geometry import Geometry
from tdeconv.kernels import precision
from tdeconv.kernels.convolve import LIBRARY, choices, configs, fits, forward_sizes, size_key
from tdeconv.kernels.fold import product_config
from tdeconv.kernels.tuning import choose, tune


def describe(x: Tensor, weight: Tensor, geo: Geometry, n_iter: int) -> dict[str, str]:
    """One line per stage."""
    if x.dtype == torch.float64:
        lines = torch_backend.describe(x, weight, geo, n_iter)
        return {stage: f"{how} (float64: the torch backend's)" for stage, how in lines.items()}
    return {
        "patch_moments": _patch_moments(geo),
        "inverse_sqrt": _inverse_sqrt(x, geo, n_iter),
        "fold": _fold(x, weight, geo),
        "convolve": _convolve(x, weight, geo),
    }


def _patch_moments(geo: Geometry) -> str:
    what = f"pixels, one in {geo.flat_stride}" if geo.pointwise else f"patches at every {geo.sample_stride}"
    size = f"{geo.groups} covariance(s) of {geo.features} features, {geo.pooled} vector(s) of a patch each"
    return f"{what}, read in place; {size}; {precision.policy()} precision"


def _inverse_sqrt(x: Tensor, geo: Geometry, n_iter: int) -> str:
    how = precision.root_products(x.device, geo.features, n_iter)
    return f"{n_iter} Newton-Schulz step(s), two at a time, upper triangles; {how} products"


def _fold(x: Tensor, weight: Tensor, geo: Geometry) -> str:
    rows = weight.shape[0] // geo.groups * geo.pooled
    how = precision.float32_products(x.device)
    return f"{geo.groups} x {rows} rows of {geo.features}; {how} products; {product_config(rows, geo.features)}"


def _convolve(x: Tensor, weight: Tensor, geo: Geometry) -> str:
    if not geo.kernel_size:
        return "the library's product"
    if not fits(x, weight, geo):
        return "the library's convolution: its offsets or strides are beyond the kernel's"
    sizes = forward_sizes(x, weight, geo)
    options = choices(configs(sizes, x))
    with tune(False):  # nothing is run here, so nothing is measured
        config = choose("convolve", size_key(sizes, x, geo), options, lambda _: None, x.device)
    if config == LIBRARY:
        return "the library's convolution: no measurement says that the kernel is faster here"
    return f"implicit matrix product; {config}"
