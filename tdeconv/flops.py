"""What the operators cost, for ``torch.utils.flop_counter``: as much as it counts of the reference's own operations.

That is so whichever backend runs, and whatever it does instead (an eigendecomposition, Winograd's products), so that
the numbers of two machines agree.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

from tdeconv.geometry import Geometry

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _moments(x: Shape, geo: Geometry) -> int:
    """The centred vectors' product with themselves; backward has two such products."""
    return 2 * geo.groups * geo.patches(x[0], tuple(x[2:])) * geo.pooled * geo.features**2


def _products(cov: Shape, count: int) -> int:
    return count * 2 * math.prod(cov) * cov[-1]


def _root(cov: Shape, n_iter: int) -> int:
    """Three products a step."""
    return _products(cov, 3 * n_iter)


def _root_backward(cov: Shape, n_iter: int) -> int:
    """Two for each of those but four: the first step multiplies by the identity twice, and nothing reads the last Y."""
    return _products(cov, 6 * n_iter - 4)


def _fold(weight: Shape, geo: Geometry) -> int:
    """The weight's vectors times the root, and what comes of it times the mean."""
    return 2 * math.prod(weight) * (geo.features + 1)


# Formulas, by the operators' names for their arguments: shapes in place of tensors, ``out`` for those of the outputs.


def _deconvolve(*, x: Shape, weight: Shape, geometry: list[int], n_iter: int, out: Sequence[Shape], **_: Any) -> int:
    geo = Geometry.unpack(geometry)
    statistics = _moments(x, geo) + _root((geo.groups, geo.features, geo.features), n_iter)
    return statistics + _stale(x=x, weight=weight, geometry=geometry, out=out)


def _deconvolve_backward(
    *,
    grad: Shape,
    x: Shape,
    weight: Shape,
    deconv: Shape,
    geometry: list[int],
    n_iter: int,
    need_x: bool,
    out: Sequence[Shape],
    **_: Any,
) -> int:
    geo = Geometry.unpack(geometry)
    stale = _stale_backward(grad=grad, x=x, weight=weight, geometry=geometry, need_x=need_x, out=out)
    return stale + (_fold(weight, geo) + 2 * _moments(x, geo) + _root_backward(deconv, n_iter) if need_x else 0)


def _stale(*, x: Shape, weight: Shape, geometry: list[int], out: Sequence[Shape], **_: Any) -> int:
    return _fold(weight, Geometry.unpack(geometry)) + int(import_module(COUNTER).conv_flop_count(x, weight, out[0]))


def _stale_backward(
    *, grad: Shape, x: Shape, weight: Shape, geometry: list[int], need_x: bool, out: Sequence[Shape], **_: Any
) -> int:
    geo, mask = Geometry.unpack(geometry), [need_x, True, True]
    # torch's own, which takes a grouped weight's gradient for a dense one
    convolution = import_module(COUNTER).conv_backward_flop(
        grad, x, weight, None, None, None, None, False, None, geo.groups, mask, out_val=out
    )
    return int(convolution) + _fold(weight, geo)


def _patch_moments(*, x: Shape, geometry: list[int], **_: Any) -> int:
    return _moments(x, Geometry.unpack(geometry))


def _patch_moments_backward(*, x: Shape, geometry: list[int], **_: Any) -> int:
    return 2 * _moments(x, Geometry.unpack(geometry))


def _inverse_sqrt(*, cov: Shape, n_iter: int, **_: Any) -> int:
    return _root(cov, n_iter)


def _inverse_sqrt_backward(*, grad: Shape, n_iter: int, **_: Any) -> int:
    return _root_backward(grad, n_iter)


_FORMULAS = {
    "deconvolve": _deconvolve,
    "deconvolve_backward": _deconvolve_backward,
    "stale_deconvolve": _stale,
    "stale_deconvolve_backward": _stale_backward,
    "patch_moments": _patch_moments,
    "patch_moments_backward": _patch_moments_backward,
    "inverse_sqrt": _inverse_sqrt,
    "inverse_sqrt_backward": _inverse_sqrt_backward,
}


def _by_name(operator: Any, formula: Any) -> Any:
    names = [argument.name for argument in operator.default._schema.arguments]

    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(**dict(zip(names, args, strict=False)), **kwargs, out=out_shape)

    return flops


def _register() -> None:
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.tdeconv, name)
        import_module(COUNTER).register_flop_formula(operator)(_by_name(operator, formula))


class _WhenLoaded:
    """A finder that gives the counter's module its formulas as soon as it is loaded, which few programs do.

    To load it for everyone takes longer than all else that ``import tdeconv`` does: it loads Triton.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_counted() -> None:
    """Register the formulas of the operators, now if the counter is loaded, else when it is."""
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenLoaded)
