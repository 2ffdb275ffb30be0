"""What every entry point refuses, before anything is computed or written: the argument, what came, what is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from tdeconv.geometry import GROUPINGS, Geometry
from tdeconv.tracing import sizes

BACKENDS = ("triton", "torch", "reference")


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays in Python's own numbers and lists, which layers keep; anything else as it is."""
    if isinstance(value, (int, float, tuple, list, torch.SymInt, Tensor)) or not hasattr(value, "tolist"):
        return value
    return value.tolist()


def positive_int(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be a positive int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return cast(int, value)  # a SymInt stands in for one under torch.compile


def positive_number(name: str, value: Any) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a positive number, got {value!r} ({type(value).__name__})")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r} ({type(value).__name__})")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    if value not in tuple(allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def int_tuple(name: str, value: Any, rank: int, minimum: int) -> tuple[int, ...]:
    """An int, one alone or one per spatial axis, as a tuple of ``rank`` ints, each at least ``minimum``."""
    value = _plain(value)
    values = [_plain(v) for v in value] if isinstance(value, (tuple, list)) else [value]
    if not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be an int or a tuple of {rank} ints, got {value!r}")
    if len(values) == 1:
        values *= rank
    if len(values) != rank:
        raise ValueError(f"{name} must have {rank} ints, one per spatial axis, got {tuple(values)}")
    if any(v < minimum for v in values):
        raise ValueError(f"{name} must be at least {minimum} along every axis, got {tuple(values)}")
    return tuple(values)


def float_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must have a real floating-point dtype, got {value.dtype}; convert it, e.g. {name}.float()"
        )
    return value


def plain_weight(name: str, value: Any) -> Tensor:
    """A weight that can be whitened: not one that quantisers made a wrapper of, to whom a layer's weight is what
    multiplies its input."""
    cls = type(value)
    # torch's own are for distributing and tracing
    if hasattr(cls, "__tensor_flatten__") and cls.__module__.partition(".")[0] != "torch":
        raise TypeError(
            f"{name} must be a plain tensor, not the {cls.__name__} of a quantiser; quantise the model after folding "
            "it: tdeconv.fuse_deconv_eval(model.eval()) has plain convolutions and linear layers"
        )
    return float_tensor(name, value)


def divides(name: str, divisor: int, of_name: str, of: int) -> None:
    if of % divisor:
        raise ValueError(f"{name} must divide {of_name}, got {name}={divisor} and {of_name}={of}")


def grouping(value: Any) -> str:
    return one_of("grouping", value, GROUPINGS)


def options(
    eps: Any, n_iter: Any, momentum: Any, block: Any, sampling_stride: Any = 1
) -> tuple[float, int, Any, int, int]:
    """The options that all layers and whole-layer functions share, in Python's own numbers; a momentum may be None, or
    a tensor, which is not read."""
    return (
        positive_number("eps", eps),
        positive_int("n_iter", n_iter),
        momentum if momentum is None or isinstance(momentum, Tensor) else fraction("momentum", momentum),
        positive_int("block", block),
        positive_int("sampling_stride", sampling_stride),
    )


def same_home(x: Tensor, **others: Tensor | None) -> None:
    """Parameters and buffers lie on the input's device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but the input is on {x.device}; move one of them")


def same_dtype(x: Tensor, **others: Tensor | None) -> None:
    """Without autocast, parameters have the input's dtype, as in torch's own layers."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but the input is {x.dtype}; convert one of them, or use torch.autocast"
            )


def channels(x: Tensor, expected: int, axis: int = 1) -> None:
    if sizes(x)[axis] != expected:
        raise ValueError(
            f"expected an input with {expected} channels along axis {axis}, got {x.shape[axis]} "
            f"(shape {tuple(x.shape)})"
        )


def kernel_fits(x: Tensor, geo: Geometry) -> None:
    for axis, (n, p, w) in enumerate(zip(sizes(x)[2:], geo.padding, geo.window, strict=True)):
        if n + 2 * p < w:
            raise ValueError(
                f"the kernel (extent {w} with dilation) is larger than the padded input (size {n} + 2*{p}) along "
                f"spatial axis {axis}; use a larger input, more padding or a smaller kernel_size"
            )


def shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if sizes(value) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")


def weight_of(weight: Any, x: Tensor, bias: Tensor | None, groups: Any) -> int:
    """A convolution's weight ``(O, C/groups, *kernel)`` and bias ``(O)`` against its input; the groups as an int."""
    plain_weight("weight", weight)
    groups, channels, (out, per_group, *_) = positive_int("groups", groups), sizes(x)[1], sizes(weight)
    divides("groups", groups, "the input's channels", channels)
    divides("groups", groups, "the output channels", out)
    if per_group * groups != channels:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} with groups={groups} needs an input with "
            f"{per_group * groups} channels, got {channels} (shape {tuple(x.shape)})"
        )
    if bias is not None:
        float_tensor("bias", bias)
        shape("bias", bias, (out,))
    return groups


def running(mean: Tensor | None, deconv: Tensor | None, geo: Geometry, training: bool) -> None:
    """Running statistics: both or neither, of the layer's sizes; evaluation needs them."""
    if (mean is None) != (deconv is None):
        raise ValueError("running_mean and running_deconv go together: give both or neither")
    if mean is None or deconv is None:
        if not training:
            raise ValueError("training=False and stale steps need running_mean and running_deconv, got None")
        return
    d = geo.features
    shape("running_mean", mean, (geo.groups * d,))
    shape("running_deconv", deconv, (d, d) if geo.groups == 1 else (geo.groups, d, d))


def interval(stats_interval: Any, step: Any) -> tuple[int, int]:
    """Statistics every few steps: the interval, and how many training steps came before."""
    stats_interval = positive_int("stats_interval", stats_interval)
    if stats_interval > 1 and step is None:
        raise ValueError(f"stats_interval={stats_interval} needs step, the number of training steps before; got None")
    return stats_interval, positive_int("step", 0 if step is None else step, least=0)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def num_updates(value: Any, geo: Geometry) -> None:
    """The count that a plain average needs."""
    if value is None:
        raise ValueError("momentum=None needs num_updates, a count of batches per covariance, got None")
    if not isinstance(value, Tensor) or value.dtype != torch.long:
        raise TypeError(f"num_updates must be a tensor of int64, got {getattr(value, 'dtype', type(value).__name__)}")
    shape("num_updates", value, (geo.groups,))


def float_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating-point dtype, got {dtype}")
    return dtype


def backend(name: Any) -> str | None:
    """A layer's ``backend`` argument: None, or a name that exists (whether it can run is decided at the call)."""
    return None if name is None else one_of("backend", name, ("auto", *BACKENDS))
