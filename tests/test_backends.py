"""Which backend runs: who asks, in which order, and what is said when it cannot."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import tdeconv
from helpers import randn
from tdeconv import BackendUnavailable, FastDeconv, backends, use_backend
from tdeconv.backends import choose, why_no_triton

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("TDECONV_BACKEND", raising=False)


@pytest.fixture
def not_interpreted(monkeypatch):
    """As where nobody set the variable."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("not_interpreted")
def test_automatic_is_torch_without_triton():
    choice = choose(None, CPU)
    assert choice.backend == "torch"
    assert "automatic" in choice.reason
    assert str(why_no_triton(CPU)) in choice.reason


def test_automatic_is_triton_on_a_gpu_where_it_runs(monkeypatch):
    monkeypatch.setattr(backends, "why_no_triton", lambda device: None)
    assert choose(None, GPU) == ("triton", "automatic: a cuda device with Triton")
    assert choose("auto", GPU).backend == "triton"
    assert choose("torch", GPU).backend == "torch"


def test_automatic_never_interprets(monkeypatch):
    monkeypatch.setattr(backends, "why_no_triton", lambda device: None)
    assert choose(None, CPU).backend == "torch"
    assert "only be interpreted" in choose("auto", CPU).reason
    assert choose("triton", CPU).backend == "triton"


def test_a_gpu_without_its_kernels_is_worth_one_warning(monkeypatch):
    monkeypatch.setattr(backends, "why_no_triton", lambda device: "it is too old")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="slower torch backend on cuda:0: it is too old"):
        assert choose(None, GPU).backend == "torch"
    assert choose(None, GPU).reason == "automatic: triton cannot run here (it is too old)"  # and no second warning


# --------------------------------------------------------------------------------------------- what the kernels need


@pytest.mark.usefixtures("not_interpreted")
def test_cpu_tensors_need_the_interpreter(monkeypatch):
    assert "TRITON_INTERPRET=1" in str(why_no_triton(CPU))
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch = importlib.import_module("tdeconv.kernels.launch")
    assert (why_no_triton(CPU) is None) == launch.interpreted()
    monkeypatch.setattr(launch, "_INTERPRETED", False)  # the variable came after the kernels
    assert "TRITON_INTERPRET=1" in str(why_no_triton(CPU))


def test_triton_must_be_there(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in [m for m in sys.modules if m == "tdeconv.kernels" or m.startswith("tdeconv.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it then raises ModuleNotFoundError
    assert str(why_no_triton(CPU)).startswith("Triton cannot be imported (")


def test_other_systems_and_devices(monkeypatch):
    assert why_no_triton(torch.device("mps")) == "there are no kernels for mps devices"
    monkeypatch.setattr(backends.platform, "system", lambda: "Darwin")
    assert why_no_triton(GPU) == "the kernels need Linux, not Darwin"


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_an_old_gpu(capability, runs, monkeypatch):
    pytest.importorskip("triton")
    cuda = SimpleNamespace(get_device_capability=lambda d: capability, get_device_name=lambda d: "Some GPU")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    expected = None if runs else "Some GPU has compute capability 7.5, the kernels need 8.0 or newer"
    assert why_no_triton(GPU) == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert why_no_triton(GPU) is None


def test_the_interpreter_runs_what_is_asked_for_by_name():
    """In a Python of its own: Triton decides when a kernel is defined."""
    pytest.importorskip("triton")
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = {!r}\n"
        "import torch, tdeconv\n"
        "cov = torch.eye(3)\n"
        "print((tdeconv.inverse_sqrt(cov, backend='triton') - tdeconv.inverse_sqrt(cov)).abs().max().item() < 1e-6)"
    )
    run = [subprocess.run([sys.executable, "-c", code.format(v)], capture_output=True, text=True) for v in ("1", "0")]
    assert run[0].stdout == "True\n", run[0].stderr
    assert "BackendUnavailable: backend 'triton' was asked for by the backend argument but cannot run" in run[1].stderr


# ------------------------------------------------------------------------------------------------------------- asking


def test_order_of_the_askers(monkeypatch):
    monkeypatch.setenv("TDECONV_BACKEND", "reference")
    assert choose(None, CPU) == ("reference", "asked for by TDECONV_BACKEND")
    with use_backend("torch"):
        assert choose(None, CPU) == ("torch", "asked for by tdeconv.use_backend")
        assert choose("reference", CPU) == ("reference", "asked for by the backend argument")
        assert "automatic" in choose("auto", CPU).reason
    assert choose(None, CPU).backend == "reference"


def test_an_empty_environment_variable_asks_for_nothing(monkeypatch):
    monkeypatch.setenv("TDECONV_BACKEND", "")
    assert "automatic" in choose(None, CPU).reason


def test_contexts_nest_and_end():
    with use_backend("reference"):
        with use_backend("torch"):
            assert choose(None, CPU).backend == "torch"
        assert choose(None, CPU).backend == "reference"
        with pytest.raises(RuntimeError, match="within"), use_backend("torch"):
            raise RuntimeError("within")
        assert choose(None, CPU).backend == "reference"
    assert "automatic" in choose(None, CPU).reason


def test_a_context_holds_in_every_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose(None, CPU).backend))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.usefixtures("not_interpreted")
def test_a_backend_asked_for_by_name_that_cannot_run(monkeypatch):
    x, layer = randn(2, 2, 5, 5).float(), FastDeconv(2, 2, 3, backend="triton")
    for asker, call in {
        "the backend argument": lambda: layer(x),
        "tdeconv.use_backend": lambda: use_in_context(lambda: tdeconv.patch_moments(x, 3)),
    }.items():
        with pytest.raises(BackendUnavailable, match=f"'triton' was asked for by {asker} but cannot run: "):
            call()
    monkeypatch.setenv("TDECONV_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match="asked for by TDECONV_BACKEND"):
        tdeconv.inverse_sqrt(torch.eye(3))
    assert torch.equal(layer.running_mean, torch.zeros(18))


def use_in_context(call):
    with use_backend("triton"):
        return call()


def test_unknown_names(monkeypatch):
    message = "must be one of 'auto', 'triton', 'torch', 'reference', got 'numpy'"
    with pytest.raises(ValueError, match=message), use_backend("numpy"):
        pass
    with pytest.raises(ValueError, match=message):
        FastDeconv(2, 2, 3, backend="numpy")
    with pytest.raises(ValueError, match=message):
        tdeconv.inverse_sqrt(torch.eye(2), backend="numpy")
    monkeypatch.setenv("TDECONV_BACKEND", "numpy")
    with pytest.raises(ValueError, match="environment variable TDECONV_BACKEND " + message):
        tdeconv.inverse_sqrt(torch.eye(2))


@pytest.mark.parametrize("asker", ["argument", "layer", "context", "environment"])
def test_what_is_asked_for_runs(asker, monkeypatch):
    """The reference has second derivatives, the fast backends have none: whose graph is it?"""

    def twice_differentiable(**backend):
        cov = torch.eye(3, dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(tdeconv.inverse_sqrt(cov, **backend).square().sum(), cov, create_graph=True)
        try:
            torch.autograd.grad(grad.square().sum(), cov)
        except RuntimeError:
            return False
        return True

    assert not twice_differentiable(backend="torch")
    if asker == "argument":
        assert twice_differentiable(backend="reference")
    elif asker == "context":
        with use_backend("reference"):
            assert twice_differentiable()
    elif asker == "environment":
        monkeypatch.setenv("TDECONV_BACKEND", "reference")
        assert twice_differentiable()
    else:
        layer = FastDeconv(1, 1, 2, backend="reference", sampling_stride=1).double()
        x = randn(1, 1, 4, 4).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()


# ------------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (tdeconv.FastDeconv(3, 4, 3), (2, 3, 8, 8)),
        (tdeconv.FastDeconv(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 8)),
        (tdeconv.FastDeconv(4, 4, 3, groups=4), (2, 4, 8, 8)),
        (tdeconv.FastDeconv1d(3, 4, 3), (2, 3, 8)),
        (tdeconv.FastDeconv3d(3, 4, 2), (2, 3, 5, 5, 5)),
        (tdeconv.Delinear(8, 4), (5, 8)),
        (tdeconv.ChannelDeconv(2), (2, 4, 6, 6)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, torch.nn.Module) else "",
)
def test_explain_names_the_layer_the_backend_and_the_reason(layer, shape, backend):
    with use_backend(backend):
        text = tdeconv.explain(layer, torch.zeros(shape))
    assert type(layer).__name__ in text
    assert backend in text
    assert "asked for by tdeconv.use_backend" in text


def test_explain_of_automatic_says_why():
    text = tdeconv.explain(FastDeconv(3, 4, 3), torch.zeros(2, 3, 8, 8))
    assert choose(None, CPU).backend in text
    assert "automatic" in text


def test_explain_says_what_is_sampled_and_how_many_steps_that_is_enough_for():
    layer = FastDeconv(8, 4, 1, samples_per_feature=4)
    text = tdeconv.explain(layer, torch.zeros(5, 8, 3, 3))
    assert "samples: 45 of 8 features, 5.62 for each; Newton-Schulz steps: 2" in text
    assert "(not 5, for want of samples; sampled at a stride of 1, not 3, for more samples)" in text
    text = tdeconv.explain(FastDeconv(8, 4, 1, backend="reference"), torch.zeros(5, 8, 3, 3))
    assert text.endswith("samples: 5 of 8 features, 0.625 for each; Newton-Schulz steps: 5")


def test_explain_of_another_layer():
    with pytest.raises(TypeError, match="layer must be one of tdeconv's deconvolution layers, got Conv2d"):
        tdeconv.explain(torch.nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8))
