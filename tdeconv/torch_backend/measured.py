"""What depends on the CPU at hand, and not on sizes alone: measured once in a process, when it is first needed.

On an AMD EPYC of family 26 torch's own library for matrix products (MKL) takes 2.2 times as long as oneDNN, and
Winograd's convolutions about twice as long as oneDNN's; on the CPUs that this backend was tuned on before, Winograd's
took less. So two small problems are timed, which takes some 50 ms, more while other programs run. Where the times are
close to each other the answer is no, so that two runs hardly ever differ in it.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_CLEARLY = 0.85  # of the other's time
_ROUNDS = 3
_fixed: dict[str, bool] = {}


def onednn_product() -> Callable[..., Tensor] | None:
    """``x, w -> x @ w.T`` by oneDNN for float32 on a CPU, where this build of torch has it (inductor uses it, too)."""
    if not torch.backends.mkldnn.is_available():
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if operator is None else lambda x, w: operator(x, w, None, "none", [], "")


def onednn_multiplies() -> bool:
    """Whether oneDNN's matrix products take clearly less time than those of ``torch.mm``."""
    return _fixed["onednn"] if "onednn" in _fixed else _onednn_multiplies()


def products_convolve() -> bool:
    """Whether convolutions by matrix products take clearly less time than the library's."""
    return _fixed["products"] if "products" in _fixed else _products_convolve()


@contextmanager
def fixed(*, onednn: bool, products: bool) -> Iterator[None]:
    """Within the block these are the answers, on any CPU: for tests, and counts that two machines shall agree on."""
    before = dict(_fixed)
    _fixed.update(onednn=onednn and onednn_product() is not None, products=products)
    try:
        yield
    finally:
        _fixed.clear()
        _fixed.update(before)


@functools.cache
def _onednn_multiplies() -> bool:
    other = onednn_product()
    if other is None:
        return False
    a = torch.ones(384, 384)
    return _first_is_faster(lambda: other(a, a), lambda: a @ a)


@functools.cache
def _products_convolve() -> bool:
    winograd: Any = importlib.import_module("tdeconv.torch_backend.winograd")
    x, weight = torch.ones(8, 128, 14, 14), torch.ones(128, 128, 3, 3)
    y, bias, grad_x = torch.empty_like(x), weight.new_zeros(128), torch.empty_like(x)

    def by_products() -> None:
        winograd.convolve_(y, x, weight, bias, (1, 1))
        winograd.convolve_backward(y, x, weight, (1, 1), grad_x)

    def by_library() -> None:
        out = torch.conv2d(x, weight, bias, 1, 1)
        one, zero = [1, 1], [0, 0]
        torch.ops.aten.convolution_backward(out, x, weight, [128], one, one, one, False, zero, 1, [True, True, True])

    return _first_is_faster(by_products, by_library)


def _first_is_faster(first: Callable[[], Any], second: Callable[[], Any]) -> bool:
    """By the least of some times, taken in turn."""
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(_ROUNDS + 1):
            for call, seconds in zip((first, second), times, strict=True):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
    return min(times[0][1:]) < _CLEARLY * min(times[1][1:])
