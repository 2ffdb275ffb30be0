"""Who is measured: one layer with its normalisation, as different codes do it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from tdeconv import FastDeconv
from tdeconv.bench.cases import Layer

PAPER_FILE = Path("models") / "deconv.py"


@dataclass(frozen=True)
class Implementation:
    """A way to run a layer. Those of one ``method`` take the same state_dict and give the same answers."""

    name: str
    method: str
    build: Callable[[Layer], nn.Module]
    memory_format: torch.memory_format = torch.contiguous_format


def _conv_bn(layer: Layer) -> nn.Module:
    # no bias: the normalisation would remove it, so this is what a careful user runs, and the faster one
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(layer.out_channels))


def _deconv(backend: str) -> Callable[[Layer], nn.Module]:
    return lambda layer: FastDeconv(layer.in_channels, layer.out_channels, 3, padding=1, backend=backend)


CONV_BN = Implementation("conv_bn", "conv_bn", _conv_bn)
REFERENCE = Implementation("reference", "deconv", _deconv("reference"))  # unfold, products, autograd
ORACLES = {oracle.method: oracle for oracle in (CONV_BN, REFERENCE)}  # what each method's answers are


def implementations(paper_code: Path | None = None) -> tuple[Implementation, ...]:
    """All that can run here; the paper's own layer only from a checkout of its repository."""
    paper = () if paper_code is None else (Implementation("paper", "deconv", _paper(paper_code)),)
    return (
        CONV_BN,
        Implementation("conv_bn_channels_last", "conv_bn", _conv_bn, torch.channels_last),
        REFERENCE,
        *paper,
        Implementation("torch", "deconv", _deconv("torch")),
        Implementation("torch_channels_last", "deconv", _deconv("torch"), torch.channels_last),
    )


def _paper(checkout: Path) -> Callable[[Layer], nn.Module]:
    module = load_paper(checkout)
    return lambda layer: module.FastDeconv(layer.in_channels, layer.out_channels, 3, padding=1)


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
