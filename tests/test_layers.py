"""The modules: backends agree on awkward layers; buffers, freezing, checkpoints, copies, dtypes and devices."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import tdeconv
from helpers import BACKENDS, F32_TOLERANCE, F64_TOLERANCE, FAST, assert_close, difference, randn, train_step
from tdeconv import ChannelDeconv, Delinear, FastDeconv, FastDeconv1d, FastDeconv3d

LAYERS = {1: FastDeconv1d, 2: FastDeconv, 3: FastDeconv3d}
IMAGE = (4, 4, 9, 8)

# name: (layer, its arguments, input shape)
MODULES = {
    "padding_same": (FastDeconv, {"padding": "same"}, IMAGE),
    "padding_same_even_kernel": (FastDeconv, {"kernel_size": (2, 4), "padding": "same"}, IMAGE),
    "padding_same_dilated": (FastDeconv, {"padding": "same", "dilation": (2, 1)}, IMAGE),
    "padding_valid": (FastDeconv, {"padding": "valid"}, IMAGE),
    "padding_pair": (FastDeconv, {"padding": (0, 2)}, IMAGE),
    "reflect": (FastDeconv, {"padding": 1, "padding_mode": "reflect"}, IMAGE),
    "reflect_pair": (FastDeconv, {"padding": (1, 3), "padding_mode": "reflect"}, IMAGE),
    "replicate": (FastDeconv, {"padding": 2, "padding_mode": "replicate"}, IMAGE),
    "replicate_strided": (FastDeconv, {"padding": 1, "stride": 2, "padding_mode": "replicate"}, IMAGE),
    "circular": (FastDeconv, {"padding": 1, "padding_mode": "circular"}, IMAGE),
    "circular_grouped": (FastDeconv, {"padding": 1, "groups": 2, "padding_mode": "circular"}, IMAGE),
    "same_circular": (FastDeconv, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"}, IMAGE),
    "same_reflect_dilated": (FastDeconv, {"padding": "same", "dilation": 2, "padding_mode": "reflect"}, IMAGE),
    "pointwise_reflect": (FastDeconv, {"kernel_size": 1, "padding": 1, "padding_mode": "reflect"}, IMAGE),
    "bias_off": (FastDeconv, {"bias": False}, IMAGE),
    "rectangular": (FastDeconv, {"kernel_size": (1, 3), "stride": (2, 1), "dilation": (1, 2)}, IMAGE),
    "depthwise": (FastDeconv, {"groups": 4, "n_iter": 1}, IMAGE),
    "grouped_three_steps": (FastDeconv, {"groups": 2, "n_iter": 3, "padding": 1}, IMAGE),
    "block_by_gcd": (FastDeconv, {"in_channels": 6, "block": 4, "padding": 1}, (3, 6, 9, 8)),
    "contiguous_grouping": (FastDeconv, {"block": 2, "grouping": "contiguous", "padding": 1}, IMAGE),
    "fifteen_steps": (FastDeconv, {"n_iter": 12, "eps": 1e-2}, IMAGE),
    "large_eps": (FastDeconv, {"eps": 1.0, "padding": 1}, IMAGE),
    "momentum_one": (FastDeconv, {"momentum": 1}, IMAGE),
    "momentum_zero": (FastDeconv, {"momentum": 0.0}, IMAGE),
    "freezing": (FastDeconv, {"freeze": True, "freeze_iter": 1, "padding": 1}, IMAGE),
    "freezing_grouped": (FastDeconv, {"freeze": True, "freeze_iter": 1, "groups": 2}, IMAGE),
    "freezing_reflect": (
        FastDeconv,
        {"freeze": True, "freeze_iter": 2, "padding": 1, "padding_mode": "reflect"},
        IMAGE,
    ),
    "unbatched": (FastDeconv, {"padding": 1, "sampling_stride": 1}, IMAGE[1:]),
    "unbatched_circular": (FastDeconv, {"padding": 1, "padding_mode": "circular", "sampling_stride": 1}, IMAGE[1:]),
    "batch_one": (FastDeconv, {"padding": 1, "sampling_stride": 1}, (1, *IMAGE[1:])),
    "conv1d_same": (FastDeconv1d, {"padding": "same", "dilation": 3}, (4, 4, 19)),
    "conv1d_reflect": (FastDeconv1d, {"padding": 2, "stride": 2, "padding_mode": "reflect"}, (4, 4, 19)),
    "conv1d_unbatched": (FastDeconv1d, {"padding": 1, "sampling_stride": 1}, (4, 19)),
    "conv3d_same": (FastDeconv3d, {"kernel_size": (1, 2, 3), "padding": "same"}, (4, 4, 4, 6, 5)),
    "conv3d_circular": (FastDeconv3d, {"kernel_size": 2, "padding": 1, "padding_mode": "circular"}, (4, 4, 4, 5, 4)),
    "conv3d_unbatched": (FastDeconv3d, {"kernel_size": 2, "sampling_stride": 1}, (4, 5, 6, 5)),
    "linear": (Delinear, {}, (16, 4)),
    "linear_blocks": (Delinear, {"in_features": 12, "block": 8}, (9, 12)),
    "linear_bias_off": (Delinear, {"bias": False}, (16, 4)),
    "linear_leading_axes": (Delinear, {"block": 2}, (3, 5, 4)),
    "linear_one_row": (Delinear, {"in_features": 12, "block": 3}, (12,)),
}
NAME = pytest.mark.parametrize("name", MODULES)


def make(name: str, backend: str | None = None, dtype: torch.dtype = torch.float64, seed: int = 0):
    kind, given, _ = MODULES[name]
    options = dict(given)
    torch.manual_seed(seed)
    if kind is Delinear:
        sizes = (options.pop("in_features", 4), 3)
    else:
        sizes = (options.pop("in_channels", 4), 4, options.pop("kernel_size", 3))
    return kind(*sizes, **options, backend=backend, dtype=dtype)


def inputs(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    x = randn(*MODULES[name][2], seed=seed)
    return (x + 0.7 * x.roll(1, -1) + 0.5).to(dtype)


def history(layer: nn.Module, name: str, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Everything a layer shows over three training steps on different inputs, and its evaluation after them."""
    seen: list[torch.Tensor | None] = []
    for step in range(3):
        seen += train_step(layer.train(), inputs(name, dtype, step))
    return seen + list(train_step(layer.eval(), inputs(name, dtype, 9)))


@NAME
@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_backends_agree(name, fast, dtype):
    layer, plain = (make(name, backend).to(dtype) for backend in (fast, "reference"))
    expected = history(copy.deepcopy(plain).double(), name, torch.float64)
    actual = history(layer, name, dtype)
    assert all(t is None or t.dtype == dtype for t in actual)
    bound = F64_TOLERANCE
    if dtype == torch.float32:  # many steps lose digits whoever computes
        by_plain = zip(history(plain, name, dtype), expected, strict=True)
        bound = max(F32_TOLERANCE, 2 * max(difference(p, e) for p, e in by_plain if e is not None))
    assert_close(actual, expected, bound)


@NAME
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, of its own layer
def test_identity_whitening_is_the_convolution(name):
    """A fresh layer in evaluation: mean 0, root the identity."""
    layer = make(name).eval()
    kind, options, _ = MODULES[name]
    options = {
        k: v for k, v in options.items() if k in ("padding", "padding_mode", "stride", "dilation", "groups", "bias")
    }
    x = inputs(name)
    if kind is Delinear:
        plain = nn.Linear(layer.in_features, layer.out_features, **options, dtype=torch.float64)
    else:
        conv = {FastDeconv1d: nn.Conv1d, FastDeconv: nn.Conv2d, FastDeconv3d: nn.Conv3d}[kind]
        plain = conv(layer.in_channels, layer.out_channels, layer.kernel_size, **options, dtype=torch.float64)
    assert not plain.load_state_dict(layer.state_dict(), strict=False).missing_keys
    expected = train_step(plain, x)  # no buffers
    assert_close(train_step(layer, x)[: len(expected)], expected, 1e-13)


# ------------------------------------------------------------------------------------------------------- construction


def test_positional_order_is_the_papers():
    layer = FastDeconv(4, 6, 3, 2, 1, 1, 2, False, 1e-3, 7, 0.2, 32, 2, True, 50)
    assert (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride) == (4, 6, (3, 3), (2, 2))
    assert (layer.padding, layer.dilation, layer.groups, layer.bias) == ((1, 1), (1, 1), 2, None)
    assert (layer.eps, layer.n_iter, layer.momentum, layer.block) == (1e-3, 7, 0.2, 2)
    assert (layer.sampling_stride, layer.freeze, layer.freeze_iter) == (2, True, 50)
    linear = Delinear(12, 6, False, 1e-3, 7, 0.2, 8)
    assert (linear.in_features, linear.out_features, linear.bias) == (12, 6, None)
    assert (linear.eps, linear.n_iter, linear.momentum, linear.block) == (1e-3, 7, 0.2, 4)


def test_defaults_are_the_papers():
    layer, linear = FastDeconv(128, 8, 3), Delinear(1024, 10)
    assert (layer.eps, layer.n_iter, layer.momentum, layer.block, layer.sampling_stride) == (1e-5, 5, 0.1, 64, 3)
    assert (layer.freeze, layer.freeze_iter, layer.grouping) == (False, 100, "interleaved")
    assert (linear.eps, linear.n_iter, linear.momentum, linear.block) == (1e-5, 5, 0.1, 512)


def numbers(value):
    """All numbers of a layer's attributes, of tuples too."""
    return [n for v in value for n in numbers(v)] if isinstance(value, tuple) else [value]


NUMPY = {
    "conv": (FastDeconv, (4, 6, 3, 2, 1, 1, 2, True, 1e-3, 7, 0.25, 32, 2, True, 50)),
    "linear": (Delinear, (12, 6, True, 1e-3, 7, 0.25, 8)),
    "channels": (ChannelDeconv, (4, 1e-3, 7, 0.25, 2)),
}


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("scalar", [lambda n: np.asarray(n)[()], np.asarray], ids=["scalar", "array"])
def test_numbers_of_numpy_are_kept_as_pythons(name, scalar):
    kind, values = NUMPY[name]
    layer = kind(*(v if isinstance(v, bool) else scalar(v) for v in values))
    plain = kind(*values)
    assert repr(layer) == repr(plain)
    for key, value in vars(plain).items():
        if not key.startswith("_"):
            assert vars(layer)[key] == value
            assert [type(n) for n in numbers(vars(layer)[key])] == [type(n) for n in numbers(value)]
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(pickle.loads(pickle.dumps(layer)).running_deconv, plain.running_deconv)


def test_functions_take_numbers_of_numpy():
    i, x, weight = np.int64, randn(2, 4, 9, 9), randn(6, 2, 3, 3)
    options = {"stride": (2, 1), "padding": 1, "dilation": 1, "groups": 2, "n_iter": 7, "sampling_stride": 2}
    numpys = {key: np.array(value) if isinstance(value, tuple) else i(value) for key, value in options.items()}
    taken = tdeconv.fast_deconv(x, weight, training=True, eps=np.float32(0.5), **numpys)
    assert torch.equal(taken, tdeconv.fast_deconv(x, weight, training=True, eps=0.5, **options))
    rows = randn(5, 4), randn(3, 4)
    taken = tdeconv.delinear(*rows, training=True, momentum=np.float64(1), n_iter=i(2), block=i(2))
    assert torch.equal(taken, tdeconv.delinear(*rows, training=True, momentum=1, n_iter=2, block=2))
    taken = tdeconv.patch_moments(x, i(3), stride=[i(2), 2], groups=i(2), block=i(2))
    assert_close(taken, tdeconv.patch_moments(x, 3, stride=2, groups=2), 0)
    cov = torch.eye(3, dtype=torch.float64)
    assert torch.equal(tdeconv.inverse_sqrt(cov, i(3)), tdeconv.inverse_sqrt(cov, 3))
    statistics = randn(36), randn(2, 18, 18)
    assert_close(
        tdeconv.fold_deconv(weight, None, *statistics, groups=i(2)),
        tdeconv.fold_deconv(weight, None, *statistics, groups=2),
        0,
    )


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("sequence", [tuple, list, np.array])
def test_one_number_alone_is_every_axis(rank, sequence):
    """As in torch's layers for stride, padding and dilation; of such a kernel size torch makes a layer without use."""
    x = randn(2, 3, *(9,) * rank)
    torch.manual_seed(0)
    layer = LAYERS[rank](3, 4, sequence([3]), sequence([2]), sequence([1]), sequence([2])).double()
    torch.manual_seed(0)
    plain = LAYERS[rank](3, 4, 3, 2, 1, 2).double()
    assert repr(layer) == repr(plain)
    assert torch.equal(layer(x), plain(x))
    torchs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](3, 4, 3, (2,), (1,), (2,))
    assert torchs.double()(x).shape == layer(x).shape


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *((kind(3, 4, 3), (2, 3, *(5,) * rank)) for rank, kind in LAYERS.items()),
        (Delinear(6, 4), (5, 6)),
        (ChannelDeconv(4), (3, 6, 5, 5)),
    ],
)
def test_the_input_has_torchs_name(layer, shape):
    x = randn(*shape, dtype=torch.float32)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_buffers(rank, groups):
    layer = LAYERS[rank](4, 4, 2, groups=groups, block=2)
    d = 2 * 2**rank
    assert layer.running_mean.shape == (groups * d,)
    assert layer.running_deconv.shape == ((d, d) if groups == 1 else (groups, d, d))
    assert torch.equal(layer.running_mean, torch.zeros(groups * d))
    assert torch.equal(layer.running_deconv, torch.eye(d).expand_as(layer.running_deconv))


def test_parameters_are_initialised_as_torchs():
    for ours, theirs, args in ((FastDeconv, nn.Conv2d, (4, 6, 3)), (Delinear, nn.Linear, (4, 6))):
        torch.manual_seed(5)
        layer = ours(*args)
        torch.manual_seed(5)
        plain = theirs(*args)
        assert torch.equal(layer.weight, plain.weight)
        assert torch.equal(layer.bias, plain.bias)


@NAME
def test_parameters_and_statistics_reset(name):
    layer = make(name)
    fresh = {k: v.clone() for k, v in layer.state_dict().items()}
    train_step(layer, inputs(name))
    moved = {k: v.clone() for k, v in layer.state_dict().items()}
    if layer.momentum:
        assert not torch.equal(moved["running_mean"], fresh["running_mean"])
    layer.reset_running_stats()
    assert torch.equal(layer.weight, moved["weight"])
    buffers = [k for k, _ in layer.named_buffers()]
    assert all(torch.equal(layer.state_dict()[k], fresh[k]) for k in buffers)
    train_step(layer, inputs(name))
    layer.reset_parameters()
    assert not torch.equal(layer.weight, fresh["weight"])
    assert all(torch.equal(layer.state_dict()[k], fresh[k]) for k in buffers)


def test_repr_says_what_differs_from_a_convolution():
    text = repr(FastDeconv(6, 4, 3, stride=2, padding=1, groups=2, bias=False))
    assert "6, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False" in text
    assert "block=3" in text
    assert "n_iter=5" in text
    assert "freeze" not in text
    text = repr(
        FastDeconv(6, 4, 3, 1, 0, 1, 1, True, 1e-3, 7, 0.2, 2, 4, True, 9, grouping="contiguous", backend="torch")
    )
    for part in (
        "eps=0.001",
        "n_iter=7",
        "momentum=0.2",
        "block=2",
        "sampling_stride=4",
        "freeze=True",
        "freeze_iter=9",
    ):
        assert part in text
    assert "grouping=contiguous" in text
    assert "backend=torch" in text
    assert "in_features=6, out_features=4, bias=True, block=6, n_iter=5" in repr(Delinear(6, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["argument", "to"])
def test_modules_of_every_float_dtype(dtype, kind):
    for cls, args, shape in ((FastDeconv, (4, 6, 3), (4, 4, 8, 8)), (Delinear, (4, 6), (9, 4))):
        layer = cls(*args, dtype=dtype) if kind == "argument" else cls(*args).to(dtype)
        seen = train_step(layer, randn(*shape, dtype=dtype))
        assert {t.dtype for t in (*seen, *layer.parameters(), *layer.buffers())} == {dtype}
        assert layer.eval()(randn(*shape, dtype=dtype)).dtype == dtype


def test_meta_device():
    layers = [FastDeconv(4, 6, 3, freeze=True, device="meta"), Delinear(4, 6, device="meta")]
    with torch.device("meta"):
        layers += [FastDeconv1d(4, 6, 3), FastDeconv3d(4, 4, 3, groups=2)]
    for layer in layers:
        assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
        layer.to_empty(device="cpu").reset_parameters()
        assert torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean))
        assert all(torch.isfinite(t).all() for t in layer.state_dict().values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_shapes_alone_go_through_on_the_meta_device(training, freeze):
    layer = FastDeconv(4, 6, 3, stride=2, freeze=freeze, device="meta").train(training)
    y = layer(torch.empty(5, 4, 9, 7, device="meta", requires_grad=True))
    assert (y.shape, y.device.type) == ((5, 6, 4, 3), "meta")
    y.sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    assert Delinear(4, 6, device="meta")(torch.empty(5, 4, device="meta")).shape == (5, 6)


# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("name", ["padding_pair", "depthwise", "conv1d_same", "linear_blocks", "freezing"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_stay_in_float32_under_autocast(name, backend, dtype):
    layer = make(name, backend, torch.float32)
    for training in (True, True, False):
        layer.train(training)
        with torch.autocast("cpu", dtype):
            y = layer(inputs(name, torch.float32))
        assert y.dtype == dtype
        assert {b.dtype for b in layer.buffers()} <= {torch.float32, torch.int64}
    plain = make(name, backend, torch.float32)
    for _ in range(2):
        plain(inputs(name, torch.float32))
    assert_close(list(layer.buffers()), list(plain.buffers()), 4 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------- what training steps leave


@pytest.mark.parametrize("backend", BACKENDS)
def test_untracked_statistics_stay(backend):
    layer = make("padding_pair", backend)
    layer.track_running_stats = False
    y = layer(inputs("padding_pair"))
    assert torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean))
    tracked = make("padding_pair", backend)
    assert torch.equal(y, tracked(inputs("padding_pair")))
    layer.eval()(inputs("padding_pair"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["padding_pair", "depthwise", "linear_blocks"])
def test_evaluation_leaves_the_layer_as_it_is(name, backend):
    layer = make(name, backend)
    layer(inputs(name))
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    first, second = layer(inputs(name, seed=1)), layer(inputs(name, seed=1))
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["padding_pair", "depthwise", "linear_blocks", "freezing"])
def test_backward_after_another_step(name, backend):
    """The running statistics move in place; a graph that used them must not notice."""
    layer = make(name, backend)
    layer(inputs(name))
    grads = []
    for between in (False, True):
        state = copy.deepcopy(layer.state_dict())
        layer.eval()
        x = inputs(name, seed=1).requires_grad_()
        y = layer(x)
        if between:
            layer.train()(inputs(name, seed=2))
        grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
        layer.load_state_dict(state)
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_layer_twice_in_a_graph(backend):
    layer, single = make("padding_same", backend), make("padding_same", backend)
    x = inputs("padding_same")
    (layer(x) + layer(x)).sum().backward()
    single(x).sum().backward()
    assert_close(layer.weight.grad, 2 * single.weight.grad, 1e-13)


def test_memory_format_is_kept():
    x = inputs("padding_same", torch.float32)
    layer = make("padding_same", dtype=torch.float32)
    assert layer(x).is_contiguous()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    wide = FastDeconv(128, 128, 1, block=8)  # where a backend may prefer another layout than the caller's
    x = randn(2, 128, 5, 5).float().requires_grad_()
    y = wide(x)
    y.sum().backward()
    assert y.is_contiguous()
    assert x.grad.is_contiguous()
    assert wide.weight.grad.is_contiguous()


# -------------------------------------------------------------------------------------------------------- checkpoints


def papers_checkpoint(name: str) -> dict[str, torch.Tensor]:
    """A state_dict with exactly the keys that the paper's code saves."""
    layer = make(name)
    d, groups = layer.block * layer.weight[0, 0].numel(), getattr(layer, "groups", 1)
    root = randn(groups, d, d, seed=3)
    root = (root + root.mT) / 2
    state = {
        "weight": randn(*layer.weight.shape, seed=1),
        "bias": randn(layer.weight.shape[0], seed=2),
        "running_mean": randn(groups * d, seed=4),
        "running_deconv": root if groups > 1 else root[0],
    }
    return {k: v for k, v in state.items() if k != "bias" or layer.bias is not None}


def papers_output(layer, state, x):
    """Evaluation in the paper's terms: fold with the running values, then convolve."""
    weight, mean, root = state["weight"], state["running_mean"], state["running_deconv"]
    out, d, groups = weight.shape[0], root.shape[-1], getattr(layer, "groups", 1)
    bias = state.get("bias", torch.zeros(out, dtype=weight.dtype))
    if groups > 1:
        w = weight.view(groups, -1, d) @ root
        shift = (w @ mean.view(groups, d, 1)).view(out)
    elif isinstance(layer, Delinear):
        w = weight.view(-1, d) @ root
        shift = (w @ mean).view(out, -1).sum(1)
    else:  # column j belongs to vector j mod G
        vectors = weight.view(out, d, -1)
        w = torch.einsum("odg,de->oeg", vectors, root)
        shift = torch.einsum("oeg,e->o", w, mean)
    w = w.reshape(weight.shape)
    if isinstance(layer, Delinear):
        return nn.functional.linear(x, w, bias - shift)
    conv = {FastDeconv1d: nn.functional.conv1d, FastDeconv: nn.functional.conv2d, FastDeconv3d: nn.functional.conv3d}
    return conv[type(layer)](x, w, bias - shift, layer.stride, layer.padding, layer.dilation, layer.groups)


PAPERS = [
    "padding_pair",
    "bias_off",
    "depthwise",
    "grouped_three_steps",
    "block_by_gcd",
    "freezing",
    "linear",
    "linear_blocks",
]


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_papers_checkpoint_loads_and_gives_the_same(name, backend):
    layer, state = make(name, backend), papers_checkpoint(name)
    kept = dict(state)
    result = layer.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert state.keys() == kept.keys()
    x = inputs(name)
    assert_close(layer.eval()(x), papers_output(layer, state, x), 1e-12)


def test_the_papers_checkpoint_of_a_network():
    """Nested layers; a freezing one starts counting where it stands."""
    net = nn.Sequential(make("freezing"), nn.ReLU(), nn.Sequential(make("block_by_gcd")), make("linear"))
    state = {}
    for prefix, name in (("0", "freezing"), ("2.0", "block_by_gcd"), ("3", "linear")):
        state |= {f"{prefix}.{k}": v for k, v in papers_checkpoint(name).items()}
    net.load_state_dict(state, strict=True)
    assert net[0].num_batches_tracked == 0
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    assert set(net.state_dict()) - set(state) == {"0.num_batches_tracked"}


@NAME
def test_keys_are_the_papers(name):
    layer = make(name)
    keys = set(papers_checkpoint(name)) | ({"num_batches_tracked"} if getattr(layer, "freeze", False) else set())
    assert set(layer.state_dict()) == keys


@NAME
def test_state_dicts_have_a_version(name):
    """The paper's layers are plain modules, whose version torch writes as 1."""
    assert make(name).state_dict()._metadata[""]["version"] == 2


@NAME
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_are_the_same_layer(name, how):
    layer = make(name)
    train_step(layer, inputs(name))
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = make(name, seed=1)
        other.load_state_dict(layer.state_dict())
    ours, theirs = history(layer, name, torch.float64), history(other, name, torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        assert a is b is None or torch.equal(a, b)


# ---------------------------------------------------------------------------------------- initialisation without memory


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", ["freezing", "freezing_grouped", "padding_pair", "linear", "depthwise"])
def test_a_layer_made_on_meta_is_the_checkpoints(name, missing):
    """Its counter, which a checkpoint of the paper's code lacks, is 0 on the weight's device. Left on meta it would
    send the whole operator to its stand-in, and the output would be memory that nobody wrote."""
    layer = make(name)
    train_step(layer, inputs(name))
    state = copy.deepcopy(layer.state_dict())
    if missing:
        state.pop("num_batches_tracked", None)
    with torch.device("meta"):
        other = make(name)
    other.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in other.state_dict().values())
    if missing and getattr(layer, "freeze", False):
        assert other.num_batches_tracked == 0
        layer._set_steps(0)
    for a, b in zip(history(layer, name, torch.float64), history(other, name, torch.float64), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("name", ["freezing", "linear"])
def test_memory_that_nobody_wrote_is_no_count(name):
    """``to_empty`` leaves a counter of any value; a checkpoint that has none makes it 0."""
    layer = make(name)
    layer.momentum = None
    state = {k: v for k, v in layer.state_dict().items() if not k.startswith("num_")}
    for counts in layer._counts().values():
        counts.fill_(94823748923)
    layer.load_state_dict(state)
    assert all(int(c.sum()) == 0 for c in layer._counts().values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_argument_may_lie_elsewhere(backend):
    layer = make("freezing", backend)
    for name in ("num_batches_tracked", "running_mean", "running_deconv"):
        other = copy.deepcopy(layer)
        setattr(other, name, getattr(layer, name).to("meta"))
        with pytest.raises(ValueError, match=f"{name} is on meta but the input is on cpu"):
            other(inputs("freezing"))


# ------------------------------------------------------------------------------------------------------------ freezing


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("freeze_iter", [1, 3])
def test_statistics_are_computed_in_the_first_of_every_ten_rounds(freeze_iter, backend):
    layer = FastDeconv(2, 3, 2, freeze=True, freeze_iter=freeze_iter, sampling_stride=1, backend=backend)
    moved = []
    for step in range(22 * freeze_iter):
        before = layer.running_deconv.clone(), layer.running_mean.clone()
        assert layer.num_batches_tracked == step
        layer(randn(3, 2, 5, 5, dtype=torch.float32, seed=step))
        now = layer.running_deconv, layer.running_mean
        changed = [not torch.equal(a, b) for a, b in zip(before, now, strict=True)]
        assert changed[0] == changed[1]
        moved.append(changed[0])
    assert moved == [step % (10 * freeze_iter) <= freeze_iter for step in range(22 * freeze_iter)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_step_is_an_evaluation(backend):
    """No moments and no root, and no gradient through them."""
    layer = make("freezing", backend)
    for _ in range(2):
        layer(inputs("freezing"))
    assert layer.num_batches_tracked == 2
    frozen = train_step(layer, inputs("freezing", seed=1))
    assert_close(frozen, train_step(layer.eval(), inputs("freezing", seed=1)), 1e-13)


def test_the_freeze_counter_is_in_the_checkpoint():
    layer = FastDeconv(2, 3, 2, freeze=True, freeze_iter=2, sampling_stride=1)
    for step in range(5):
        layer(randn(3, 2, 5, 5, dtype=torch.float32, seed=step))
    other = FastDeconv(2, 3, 2, freeze=True, freeze_iter=2, sampling_stride=1)
    other.load_state_dict(layer.state_dict())
    assert other.num_batches_tracked == 5
    for step in range(5, 22):
        x = randn(3, 2, 5, 5, dtype=torch.float32, seed=step)
        assert torch.equal(layer(x), other(x))
        assert torch.equal(layer.running_deconv, other.running_deconv)
    assert other.num_batches_tracked == 22


def test_the_freeze_counter_counts_training_steps_only():
    layer = FastDeconv(2, 3, 2, freeze=True, freeze_iter=1)
    x = randn(3, 2, 5, 5, dtype=torch.float32)
    layer.eval()(x)
    assert layer.num_batches_tracked == 0
    layer.train()(x)
    assert layer.num_batches_tracked == 1
    layer(x[:0])  # which one rank of several may get: the others count the step
    assert layer.num_batches_tracked == 2
    layer.track_running_stats = False
    layer(x)
    assert layer.num_batches_tracked == 2
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_untracked_freezing_layer_leaves_its_statistics(backend):
    layer = FastDeconv(2, 3, 2, freeze=True, freeze_iter=1, sampling_stride=1, backend=backend)
    x = randn(3, 2, 5, 5, dtype=torch.float32)
    for _ in range(2):
        layer(x)
    layer.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_a_network_learns_on_the_torch_backend():
    """The layers together, from a checkpointed loss: it falls, and both backends walk the same way."""
    losses = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        net = nn.Sequential(
            FastDeconv(3, 8, 3, padding=1, freeze=True, freeze_iter=2),
            nn.ReLU(),
            FastDeconv(8, 8, 3, stride=2, padding=1, block=4),
            nn.ReLU(),
            nn.Flatten(),
            Delinear(8 * 16, 5, block=16),
        ).double()
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
        x, target = randn(12, 3, 8, 8), torch.arange(12) % 5
        with tdeconv.use_backend(backend):
            for _ in range(6):
                loss = nn.functional.cross_entropy(net(x), target)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
    first, second = losses[:6], losses[6:12]
    assert first == pytest.approx(second, rel=1e-6)
    assert first[-1] < 0.8 * first[0]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("channels", [4, 128])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_in_place_activation_may_follow(size, channels, layout):
    layer = tdeconv.FastDeconv(channels, channels, 3, padding=1)
    x = torch.randn(4, channels, size, size).to(memory_format=layout).requires_grad_()
    y = layer(x)
    expected = y.detach().relu()
    torch.nn.functional.relu(y, inplace=True).sum().backward()
    assert torch.equal(y, expected)
    assert x.grad.isfinite().all()
