"""Who is measured: a convolution with its normalisation and a ReLU, as different codes do it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tdeconv import FastDeconv, convert_deconv
from tdeconv.backends import choose
from tdeconv.bench.cases import Layer

PAPER_FILE = Path("models") / "deconv.py"
OURS = ("torch", "triton")
STALE = " stale"  # ends the names of those whose training step uses the running statistics
NAMES = (  # in this order everywhere
    *("conv_bn_relu", "conv_bn_relu_compiled", "reference", "paper"),
    *(f"{name}{how}{kind}" for name in OURS for how in ("", "_compiled") for kind in ("", STALE)),
)


@dataclass(frozen=True)
class Implementation:
    """A way to run layers and networks. Those of one ``method`` take the same state_dict and give the same answers.

    ``build`` makes a layer; ``convert`` turns a network with batch norm, and options of :func:`tdeconv.convert_deconv`,
    into this implementation's. ``stale``: its training steps use the running statistics, as constants.
    """

    name: str
    method: str
    build: Callable[[Layer], nn.Module]
    convert: Callable[..., nn.Module]
    compiled: bool = False
    stale: bool = False
    layouts: tuple[str, ...] = ("contiguous", "channels_last")

    def ready(self, module: nn.Module) -> nn.Module:
        """What is called: the module, compiled where that is the implementation."""
        return Compiled(module) if self.compiled else module

    def in_stale_steps(self) -> Implementation:
        """The same, stale: another method, since its answers are others."""
        return replace(self, name=self.name + STALE, method=self.method + STALE, stale=True)


class Compiled(nn.Module):
    """A module under ``torch.compile``.

    The compiler keeps what it has compiled by code object, and gives up silently at eight for one. All modules of a
    class share theirs, so each gets a function with code of its own.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

        def call(x: Tensor) -> Tensor:
            return module(x)

        call.__code__ = call.__code__.replace()
        self._call = torch.compile(call, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)


def _conv_bn_relu(layer: Layer) -> nn.Module:
    # no bias: the normalisation would remove it, so this is what a careful user runs, and the faster one
    sizes = (layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.kernel // 2, 1, layer.groups)
    return nn.Sequential(nn.Conv2d(*sizes, bias=False), nn.BatchNorm2d(layer.out_channels), nn.ReLU())


def _options(layer: Layer) -> dict[str, Any]:
    return {
        "stride": layer.stride,
        "padding": layer.kernel // 2,
        "groups": layer.groups,
        "n_iter": layer.n_iter,
        "block": layer.block,
        "sampling_stride": layer.sampling_stride,
    }


def _deconv(name: str, layouts: tuple[str, ...] = ("contiguous", "channels_last")) -> Implementation:
    """The layers of one of this package's backends."""

    def build(layer: Layer) -> nn.Module:
        sizes = (layer.in_channels, layer.out_channels, layer.kernel)
        return nn.Sequential(FastDeconv(*sizes, **_options(layer), backend=name), nn.ReLU())

    def convert(model: nn.Module, **options: Any) -> nn.Module:
        return convert_deconv(model, backend=name, **options)

    return Implementation(name, "deconv", build, convert, layouts=layouts)


CONV_BN_RELU = Implementation("conv_bn_relu", "conv_bn_relu", _conv_bn_relu, lambda model, **_: model)
REFERENCE = _deconv("reference", layouts=("contiguous",))  # unfold, products, autograd
ORACLES = {  # what each method's answers are
    oracle.method: oracle for oracle in (CONV_BN_RELU, REFERENCE, REFERENCE.in_stale_steps())
}


def implementations(
    device: torch.device,
    *,
    backends: Sequence[str] = (),
    paper_code: Path | None = None,
    compiled: bool = True,
) -> tuple[Implementation, ...]:
    """All that can run on ``device``, in the order of ``NAMES``; this package's fast ones in both kinds of step.

    Args:
        backends: those of this package's fast ones that must be there; none: all that can run.
        paper_code: a checkout of the paper's repository.
        compiled: also under ``torch.compile``, where it works.

    Raises:
        BackendUnavailable: one of ``backends`` cannot run here; the message says why.
        FileNotFoundError: ``paper_code`` does not hold the paper's layer.
    """
    for name in backends:
        choose(name, device)
    ours = [_deconv(name) for name in backends or _fast(device)]
    paper = [] if paper_code is None else [_paper(paper_code)]
    eager = [CONV_BN_RELU, REFERENCE, *paper, *ours]
    if compiled and why_not_compiled(device) is None:
        compiled_ones = [replace(one, name=f"{one.name}_compiled", compiled=True) for one in (CONV_BN_RELU, *ours)]
        eager, ours = [*eager, *compiled_ones], [*ours, *compiled_ones[1:]]
    both = [*eager, *(one.in_stale_steps() for one in ours)]
    return tuple(sorted(both, key=lambda one: NAMES.index(one.name)))


def _fast(device: torch.device) -> Iterable[str]:
    return OURS if choose(None, device).backend == "triton" else OURS[:1]


def why_not_compiled(device: torch.device) -> str | None:
    """None if ``torch.compile`` can be measured on ``device``, else the reason why not."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler for the CPU, and there is none"
    return None


def _paper(checkout: Path) -> Implementation:
    """The paper's own layer."""
    module = load_paper(checkout)

    def build(layer: Layer) -> nn.Module:
        sizes = (layer.in_channels, layer.out_channels, layer.kernel)
        return nn.Sequential(module.FastDeconv(*sizes, **_options(layer)), nn.ReLU())

    def convert(model: nn.Module, **options: Any) -> nn.Module:
        """The converted network, with the paper's layer in every place."""
        model = convert_deconv(model, backend="torch", **options)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is FastDeconv:
                    setattr(parent, name, _as_paper_s(module, child))
        return model

    return Implementation("paper", "deconv", build, convert, layouts=("contiguous",))


def _as_paper_s(module: ModuleType, layer: FastDeconv) -> nn.Module:
    """The paper's layer with the options and the state of one of ours; it knows no tuples."""
    square = (layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.dilation[0])
    new = module.FastDeconv(
        *(layer.in_channels, layer.out_channels, *square, layer.groups, True),
        **{name: getattr(layer, name) for name in ("eps", "n_iter", "momentum", "block", "sampling_stride")},
        freeze=layer.freeze,
        freeze_iter=layer.freeze_iter,
    )
    missing, _ = new.load_state_dict(layer.state_dict(), strict=False)  # ours has a step counter, too
    assert not missing, missing

    def sample_as_ours(module: Any, inputs: tuple[Tensor, ...]) -> None:
        """Conversion samples more, and takes fewer steps, where samples are few; the paper's layer has no such rule."""
        _, geo, module.n_iter = layer.in_training(inputs[0])
        module.sampling_stride = geo.sampling_stride * module.stride[0]

    new.register_forward_pre_hook(sample_as_ours)
    return new


def load_paper(checkout: Path) -> ModuleType:
    """``models/deconv.py`` of the paper's repository.

    Raises:
        FileNotFoundError: the folder does not hold it.
    """
    path = checkout / PAPER_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"--paper-code must be a checkout of the paper's repository: no {PAPER_FILE} in {checkout}"
        )
    spec = importlib.util.spec_from_file_location("paper_deconv", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
