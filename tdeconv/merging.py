"""Methods by which models merge their own convolutions and batch norms to be deployed, in a converted model."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NoReturn

from torch import nn

# timm's reparameterize_model calls the first three, torchvision's quantised models have the last
_METHODS = ("fuse", "reparameterize", "switch_to_deploy", "fuse_model")


def bar_merging(model: nn.Module, replaced: set[nn.Module]) -> list[tuple[str, str, str]]:
    """Let these methods raise an error in the modules that hold one of ``replaced``, what conversion put in.

    They compute with the weights of convolutions and the statistics of batch norms, and would give other outputs or
    stop half way. A method that has arguments, or that the module's own forward uses, may belong to what the model
    computes, and is left alone.

    Returns:
        For each class and method: the names of the modules, that of the class, and why.
    """
    barred: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        used = _names_in(inspect.getattr_static(type(module), "forward", None))
        methods = [m for m in _METHODS if m not in used and _takes_nothing(getattr(type(module), m, None))]
        if methods and not replaced.isdisjoint(module.modules()):
            for method in methods:
                refuse = functools.partial(_refuse, type(module).__name__, method)
                vars(module)[method] = refuse
                barred.setdefault((type(module).__name__, method), []).append(name or "(the model)")
    return [
        (
            f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0],
            kind,
            f"{method}() is disabled, as it would merge what was converted; deploy with fuse_deconv_eval",
        )
        for (kind, method), names in barred.items()
    ]


def _names_in(function: Any) -> tuple[str, ...]:
    """The names that a function's own code uses."""
    code = getattr(function, "__code__", None)
    return code.co_names if code is not None else ()


def _takes_nothing(method: Any) -> bool:
    """Whether it can be called as ``module.method()``."""
    if not inspect.isfunction(method):
        return False
    _, *arguments = inspect.signature(method).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(a.default is not a.empty or a.kind in variable for a in arguments)


def _refuse(kind: str, method: str, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        f"{kind}.{method}() merges convolutions and batch norms, but tdeconv.convert_deconv has replaced some of them: "
        "call it before conversion, or deploy tdeconv.fuse_deconv_eval(model.eval()) as it is"
    )
