"""What a caller of convert_deconv should know: that a trained model changes, that nothing was converted."""

from __future__ import annotations

import warnings
from collections import Counter

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd

from tdeconv.plan import DECONVS, Plan, is_norm


def warn(plan: Plan, excluded: set[nn.Module]) -> None:
    """Warn the caller of the function that calls this, before the model is changed: a warning may be an error."""
    whys = {module: plan.why_left(module) for module in plan.layers}
    message = _trained(plan, excluded) if "" in whys.values() else _nothing_converted(whys)
    if message:
        warnings.warn(message, stacklevel=3)


def _trained(plan: Plan, excluded: set[nn.Module]) -> str:
    """Empty if no batch norm tells of training; an excluded one tells of a part that stays what it was."""
    norms = [module for module in plan.layers if is_norm(module) and module not in excluded]
    norms.sort(key=lambda norm: norm not in plan.removed)  # those that go are the better example
    norm = next(filter(_has_statistics, norms), None)
    if norm is None:
        return ""
    return (
        "convert_deconv changes what a trained model computes, and this model looks trained: its batch norm "
        f"{plan.layers[norm]!r} has the statistics of some data. A converted model does not give the outputs that its "
        "weights were trained for. Train it on after the conversion, or convert a model with random weights; "
        "tdeconv.update_stats alone does not bring the outputs back"
    )


def _has_statistics(norm: nn.Module) -> bool:
    """Whether the running statistics have left their start: a mean of 0, a variance of 1, no batch seen."""
    return any(
        _differs(getattr(norm, name, None), start)
        for name, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0))
    )


def _differs(value: Tensor | None, start: int) -> bool:
    """Never of what has no values: no tensor, or one without memory."""
    if value is None or value.is_meta or isinstance(value, FakeTensor) or nn.parameter.is_lazy(value):
        return False
    return bool((value != start).any())


def _nothing_converted(whys: dict[nn.Module, str]) -> str:
    """Empty if the model has no convolutions, or has been converted before."""
    reasons = Counter(why for module, why in whys.items() if isinstance(module, _ConvNd))
    if not reasons or any(isinstance(module, DECONVS) for module in whys):
        return ""
    (why, count), *_ = reasons.most_common(1)
    return (
        f"convert_deconv converted nothing: {count} of the model's {reasons.total()} convolutions were left for this "
        f"reason: {why} (a report=tdeconv.ConversionReport() lists the reasons of all)"
    )
