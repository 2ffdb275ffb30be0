"""No value of a tensor is read on the host in a training step, which would make a GPU wait and forbid a CUDA graph."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import randn
from interpreting import DEVICE  # before the kernels
from tdeconv import ChannelDeconv, Delinear, FastDeconv, FastDeconv1d, FastDeconv3d, ops

inverse_sqrt = importlib.import_module("tdeconv.torch_backend.inverse_sqrt")  # the package exports such a function

# what a GPU has to finish before Python can go on
READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "2d": (lambda **kw: FastDeconv(4, 6, 3, padding=1, block=2, sampling_stride=2, **kw), (3, 4, 7, 7)),
    "1x1": (lambda **kw: FastDeconv(4, 6, 1, stride=2, **kw), (3, 4, 7, 7)),
    "depthwise": (lambda **kw: FastDeconv(4, 4, 3, groups=4, padding=1, padding_mode="reflect", **kw), (3, 4, 7, 7)),
    "few samples": (lambda **kw: FastDeconv(4, 6, 3, samples_per_feature=58, **kw), (3, 4, 7, 7)),
    "1d": (lambda **kw: FastDeconv1d(4, 4, 3, groups=2, sampling_stride=2, **kw), (4, 4, 13)),
    "3d": (lambda **kw: FastDeconv3d(2, 3, 2, padding=1, sampling_stride=1, **kw), (2, 2, 4, 5, 4)),
    "linear": (lambda **kw: Delinear(12, 5, block=4, **kw), (20, 12)),
    "channels": (lambda **kw: ChannelDeconv(3, **kw), (4, 8, 5, 5)),
}


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value is read, also within the operators, whose bodies a mode does not see otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "tdeconv":
            self.operators.append(name)
            with self:
                return getattr(ops, name)._init_fn(*args, **kwargs or {})
        assert name not in READS, f"a tensor is read on the host, by {func}"
        return func(*args, **kwargs or {})


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the capture of a CUDA graph shows it")
@pytest.mark.parametrize("kind", ["early", "fresh", "stale", "frozen"])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_value_is_read(name: str, backend: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step may, as a step that is captured may not be the first."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(inverse_sqrt, "uses_eigh", lambda *_: False)  # a CPU's alone
    make, shape = LAYERS[name]
    options = {"freeze": True, "freeze_iter": 3} if kind == "frozen" and name not in ("linear", "channels") else {}
    layer = make(stats_interval=4, **options)
    x = randn(*shape, dtype=torch.float32)
    layer(x)  # by the torch backend: under the interpreter it would take long
    layer.backend = backend
    layer._set_steps({"early": 2, "fresh": 24, "stale": 25, "frozen": 24}[kind])
    buffers = [b for b in layer.buffers() if b.is_floating_point()]
    before = [b.clone() for b in buffers]
    x.requires_grad_()
    with NoReads() as mode:
        layer(1.5 * x + 1).square().sum().backward()
    moved = [not torch.equal(a, b) for a, b in zip(before, buffers, strict=True)]
    fresh = kind in ("early", "fresh") or (kind == "frozen" and not options)
    assert moved == [fresh] * len(moved)
    if name != "channels" and backend != "reference":
        first, second = (
            ("deconvolve", "deconvolve_backward") if fresh else ("stale_deconvolve", "stale_deconvolve_backward")
        )
        assert [o for o in mode.operators if o != "constants"] == [first, second]


@pytest.mark.parametrize("read", [float, bool, int, Tensor.nonzero, lambda t: torch.equal(t, t)])
def test_reads_are_noticed(read: Callable[[Tensor], Any]) -> None:
    with NoReads(), pytest.raises(AssertionError, match="read on the host"):
        read(torch.ones(()))
