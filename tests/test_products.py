"""Statistics, roots and folds do not depend on the precision that torch is allowed for float32 matrix products.

Few CPUs have products in bfloat16. So they are imitated on any: wherever the switch allows it, float32 products get
operands rounded to bfloat16. A dispatch mode sees those of autograd, and a function mode those in Python; inside the
operators of a fast backend neither is in force, so the stages enter it again.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import tdeconv
from cases import CASES
from helpers import BACKENDS, assert_close, randn, run_case, train_step
from tdeconv import ops
from tdeconv.products import _opaque, _Product, exact_products, product

SWITCH = torch.backends.mkldnn.matmul
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "matmul", "__matmul__", "linear", "addbmm"}


def lowered(args):
    if SWITCH.fp32_precision in ("none", "ieee"):
        return args
    return tree_map(
        lambda t: t.bfloat16().float() if isinstance(t, torch.Tensor) and t.dtype == torch.float32 else t, args
    )


class InPython(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        own = int(name.endswith("_") and not name.startswith("__"))  # written in place
        if name in PRODUCTS:
            args = (*args[:own], *lowered(args[own:]))
        return func(*args, **(kwargs or {}))


class InAutograd(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        return func(*(lowered(args) if name in PRODUCTS and not name.endswith("_") else args), **(kwargs or {}))


class Lowered:
    """A fast backend whose stages run with lowered products."""

    def __init__(self, stages):
        self._stages = stages

    def __getattr__(self, name):
        def stage(*args):
            with InPython():
                return getattr(self._stages, name)(*args)

        return stage


@pytest.fixture(autouse=True)
def restored_setting():
    yield
    torch.set_float32_matmul_precision("highest")
    SWITCH.fp32_precision = "none"
    torch._dynamo.reset()


@pytest.fixture
def bfloat16_products(monkeypatch):
    stages = ops.stages
    monkeypatch.setattr(ops, "stages", lambda backend: Lowered(stages(backend)))
    torch.set_float32_matmul_precision("medium")
    with InPython(), InAutograd():
        yield


def test_the_imitation_lowers_products(bfloat16_products):
    """Else the tests below would show nothing."""
    a, b = randn(20, 20).float().requires_grad_(), randn(20, 20, seed=1).float()
    exact = a.detach().double() @ b.double()
    assert (a @ b - exact).norm() > 1e-3 * exact.norm()
    (grad,) = torch.autograd.grad(a @ b, a, b)
    assert (grad - b.double() @ b.double().T).norm() > 1e-3 * grad.norm()
    assert_close(product(a, b), exact, 1e-6)
    assert SWITCH.fp32_precision == "bf16"
    layer, x = tdeconv.Delinear(20, 20), a.detach()  # a linear layer's product inside the operator
    y = layer(x)
    torch.set_float32_matmul_precision("highest")
    assert (layer(x) - y).norm() > 1e-3 * y.norm()


@pytest.mark.parametrize("n_iter", [5, 15])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "block_by_gcd", "depthwise", "pointwise_block", "wide_channels", "conv3d"])
def test_a_layer_is_as_exact_as_ever(name, backend, n_iter, request):
    """Output, all gradients and running statistics, to the last bit: convolutions do not follow the setting either."""
    case = next(c for c in CASES if c.name == name)
    tensors = case.tensors(torch.float32)
    expected = run_case(case, backend, torch.float32, tensors, n_iter)
    request.getfixturevalue("bfloat16_products")
    for a, e in zip(run_case(case, backend, torch.float32, tensors, n_iter), expected, strict=True):
        assert a is e is None or torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_layer_keeps_its_statistics_exact(backend, request):
    """Its output is a matrix product, which does follow the setting; the buffers do not."""
    case = next(c for c in CASES if c.name == "linear")
    expected = run_case(case, backend, torch.float32)
    request.getfixturevalue("bfloat16_products")
    got = run_case(case, backend, torch.float32)
    assert torch.equal(got.running_mean, expected.running_mean)
    assert torch.equal(got.running_deconv, expected.running_deconv)
    assert_close(got.y, expected.y, 4 * torch.finfo(torch.bfloat16).eps * 4)


@pytest.mark.parametrize("make", [lambda: tdeconv.FastDeconv(8, 4, 3, block=4), lambda: tdeconv.ChannelDeconv(8)])
def test_evaluation_and_channel_statistics(make, request):
    torch.manual_seed(0)
    layer, x = make(), randn(4, 8, 9, 9).float()
    other = copy.deepcopy(layer)
    train_step(layer, x)
    expected = layer.eval()(x)
    request.getfixturevalue("bfloat16_products")
    train_step(other, x)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
    if isinstance(layer, tdeconv.FastDeconv):  # the other multiplies the input itself by its root
        assert torch.equal(other.eval()(x), expected)


@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stages_alone(method, backend, request):
    x, weight = randn(4, 6, 8, 8).float(), randn(5, 6, 3, 3).float()

    def stages():
        leaf = x.clone().requires_grad_()
        mean, cov = tdeconv.patch_moments(leaf, 3, backend=backend)
        root = tdeconv.inverse_sqrt(cov + 0.1 * torch.eye(54), 5, method=method, backend=backend)
        folded = tdeconv.fold_deconv(weight, None, mean, root)
        return (*folded, *torch.autograd.grad(folded[0].square().sum() + folded[1].square().sum(), leaf))

    expected = stages()
    request.getfixturevalue("bfloat16_products")
    for a, e in zip(stages(), expected, strict=True):
        assert torch.equal(a, e)


def test_product_has_every_derivative():
    a, b = randn(3, 4, 5).requires_grad_(), randn(3, 5, 2, seed=1).requires_grad_()
    shared = randn(5, 2).requires_grad_()
    for right in (b, shared):
        assert torch.autograd.gradcheck(_Product.apply, (a, right), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(_Product.apply, (a, right))
    assert_close(torch.func.vmap(_Product.apply)(a, b), a @ b, 1e-15)
    torch.library.opcheck(_opaque, (a.detach().float().requires_grad_(), b.detach().float().requires_grad_()))


def test_compiled_folds_stay_exact(request):
    """A compiled graph cannot turn the switch: there the product is an operator."""
    torch.manual_seed(0)
    layer, x = tdeconv.FastDeconv(8, 4, 3, block=4), randn(4, 8, 9, 9).float()
    layer(x)
    expected = layer.eval()(x)
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("medium")
    names = []

    def look(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    assert_close(torch.compile(layer, fullgraph=True, backend=look)(x), expected, 1e-6)
    assert sum("tdeconv.product" in name for name in names) == 2


def test_the_setting_comes_back():
    torch.set_float32_matmul_precision("high")
    with exact_products():
        with exact_products():
            assert SWITCH.fp32_precision == "ieee"
        assert SWITCH.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == "high"
    nn.Sequential(tdeconv.FastDeconv(3, 4, 3))(randn(2, 3, 8, 8).float()).sum().backward()
    assert torch.get_float32_matmul_precision() == "high"


def test_a_setting_that_another_thread_makes_meanwhile_stays():
    torch.set_float32_matmul_precision("medium")
    with exact_products():
        thread = threading.Thread(target=torch.set_float32_matmul_precision, args=("high",))
        thread.start()
        thread.join()
    assert torch.get_float32_matmul_precision() == "high"


def test_threads_share_the_switch():
    """It is the process's: as long as any thread needs exact products, they are, and then the setting is back."""
    torch.set_float32_matmul_precision("medium")
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def stay():
        with exact_products():
            inside.set()
            leave.wait(60)
            seen.append(SWITCH.fp32_precision)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(60)
    with exact_products():
        pass
    seen.append(SWITCH.fp32_precision)
    leave.set()
    thread.join(60)
    assert seen == ["ieee", "ieee"]
    assert SWITCH.fp32_precision == "bf16"
