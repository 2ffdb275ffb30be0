"""Another CPU's library, imitated: products, convolutions, sums and eigenvectors round as some other one's could.

Libraries add up in an order of their own, which depends on the CPU: what cancels to 0 in one of them is a few ulps of
its terms in another. Tests must hold with all of them. So each result is moved by up to half an ``eps`` of the same
result of the absolute values, about what another order of summation changes: where terms cancel, that follows the
terms' size and not the result's. How far each value moves depends on the result and the seed alone: as in a library,
the same call gives the same bits twice.

The kernels are replaced in torch's dispatcher: below autograd, the custom operators and compiled graphs. So is NumPy's
product, with which Triton's interpreter runs the project's kernels.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What adds up, and its forms that write into a tensor.
SUMS = {
    "mm": ("mm.out",),
    "bmm": ("bmm.out",),
    "dot": (),
    "addmm": ("addmm_", "addmm.out"),
    "addmv": ("addmv_", "addmv.out"),
    "baddbmm": ("baddbmm_", "baddbmm.out"),
    "addbmm": ("addbmm_", "addbmm.out"),
    "convolution": (),
    "convolution_backward": (),
    "sum.dim_IntList": ("sum.IntList_out",),
    "mean.dim": ("mean.out",),
    "linalg_vector_norm": ("linalg_vector_norm.out",),
}
HALVES = (torch.bfloat16, torch.float16)


def imitate(seed: int) -> None:
    """From now on in this process, round as the CPU of this number would."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of replacing, which is meant
        _replace(_library(), seed)
    np.matmul = functools.partial(_matmul, np.matmul, f"{seed} numpy")


def _replace(library: torch.library.Library, seed: int) -> None:
    for name, writing in SUMS.items():
        value = torch.library.get_kernel(f"aten::{name}", "CPU")
        for form in (name, *writing):
            kernel = torch.library.get_kernel(f"aten::{form}", "CPU")
            library.impl(form, functools.partial(_sum, kernel, value, f"{seed} {name}"), "CPU", with_keyset=True)
    eigh = torch.library.get_kernel("aten::_linalg_eigh", "CPU")
    library.impl("_linalg_eigh", functools.partial(_eigh, eigh, f"{seed} eigh"), "CPU", with_keyset=True)


@functools.cache
def _library() -> torch.library.Library:
    """Kept: what it has replaced would come back at its end."""
    return torch.library.Library("aten", "IMPL")


@torch.compiler.disable
def _sum(kernel: Any, value: Any, key: str, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``kernel`` returns, moved; ``value`` is the same operator's kernel that writes nowhere."""
    if torch.jit.is_tracing():  # which would record what moves it
        return kernel.call_boxed(keyset, *args, **kwargs)
    factors = {name: _magnitude(v) for name, v in kwargs.items() if name != "out"}
    sizes = value.call_boxed(keyset, *map(_magnitude_of_tensor, args), **factors)
    results = kernel.call_boxed(keyset, *args, **kwargs)
    for result, size in zip(_listed(results), _listed(sizes), strict=True):
        if result is None or not result.is_floating_point() or _one_term(key, args[0], result):
            continue
        if result.dtype in HALVES:  # added up in float32: only the last rounding may be another
            size = result.abs()
        result.add_(size * _random(result, key) * (torch.finfo(result.dtype).eps / 2))
    return results


def _magnitude_of_tensor(value: Any) -> Any:
    """Positional numbers are axes and sizes, not factors."""
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _magnitude(value: Any) -> Any:
    factor = isinstance(value, (int, float)) and not isinstance(value, bool)
    return abs(value) if factor else _magnitude_of_tensor(value)


def _listed(values: Any) -> tuple[Any, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def _one_term(key: str, first: Tensor, result: Tensor) -> bool:
    """Whether there is nothing to add, so that every library gives the same."""
    name = key.split()[1]
    if name in ("mm", "bmm", "dot"):
        return first.shape[-1] <= 1
    return name in ("sum.dim_IntList", "mean.dim", "linalg_vector_norm") and first.numel() == result.numel()


@torch.compiler.disable
def _eigh(kernel: Any, key: str, keyset: Any, a: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The decomposition of a neighbour, as LAPACK's is: equal eigenvalues have any vectors that span the same."""
    if a.numel():
        r = _random(a, key)
        a = a + (r + r.mT) * a.abs().amax((-2, -1), keepdim=True) * (torch.finfo(a.dtype).eps / 2)
    return kernel.call_boxed(keyset, a, *args, **kwargs)


def _matmul(kernel: Any, key: str, a: Any, b: Any, **kwargs: Any) -> Any:
    result = kernel(a, b, **kwargs)
    if result.dtype not in (np.float32, np.float64):
        return result
    r = _random(torch.from_numpy(result), key).numpy()
    return result + kernel(np.abs(a), np.abs(b), **kwargs) * r * (np.finfo(result.dtype).eps / 2)


def _random(result: Tensor, key: str) -> Tensor:
    """Numbers between -1 and 1 of its shape and dtype, the same for the same values."""
    values = result.reshape(-1).view(torch.uint8).numpy().tobytes()
    g = torch.Generator().manual_seed(zlib.crc32(values, zlib.crc32(key.encode())))
    return torch.rand(result.shape, generator=g, dtype=result.dtype) * 2 - 1
