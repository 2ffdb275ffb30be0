"""ChannelDeconv against method.md's words written out, and what its buffers do."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

from helpers import (
    BACKENDS,
    F32_TOLERANCE,
    F64_TOLERANCE,
    FAST,
    all_finite,
    assert_close,
    randn,
    spectral_root,
    train_step,
)
from tdeconv import ChannelDeconv, running

# name: (arguments, input shape)
CASES = {
    "all_channels": ({"block": 4}, (3, 4, 7, 8)),
    "two_blocks": ({"block": 3}, (3, 6, 7, 8)),
    "channels_left_over": ({"block": 4}, (3, 6, 7, 8)),
    "two_blocks_and_left_over": ({"block": 2}, (3, 5, 6, 7)),
    "one_left_over": ({"block": 3}, (2, 4, 5, 5)),
    "block_one": ({"block": 1}, (3, 4, 5, 6)),
    "image_smaller_than_stride": ({"block": 2}, (6, 5, 2, 8)),
    "image_of_the_stride": ({"block": 2}, (20, 4, 3, 3)),
    "sampling_one": ({"block": 4, "sampling_stride": 1}, (3, 6, 5, 4)),
    "sampling_two": ({"block": 4, "sampling_stride": 2}, (3, 6, 5, 4)),
    "features": ({"block": 4}, (20, 12)),
    "features_left_over": ({"block": 5}, (20, 12)),
    "batch_one": ({"block": 2}, (1, 5, 9, 9)),
    "one_step": ({"block": 4, "n_iter": 1}, (3, 6, 7, 8)),
    "wide": ({"block": 30, "n_iter": 8}, (4, 70, 6, 7)),
    "large_eps": ({"block": 4, "eps": 1.0}, (3, 6, 7, 8)),
    "momentum_half": ({"block": 4, "momentum": 0.5}, (3, 6, 7, 8)),
}
NAME = pytest.mark.parametrize("name", CASES)


def make(name: str, backend: str | None = None, dtype: torch.dtype = torch.float64) -> ChannelDeconv:
    return ChannelDeconv(**CASES[name][0], backend=backend, dtype=dtype)


def inputs(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    x = randn(*CASES[name][1], seed=seed)
    return (x + 0.6 * x.roll(1, 1) + 0.5).to(dtype)


def by_the_book(layer: ChannelDeconv, x: torch.Tensor):
    """Output and statistics of one batch, with numpy and a loop over channels."""
    values = x.double().numpy().reshape(*x.shape, *[1] * (4 - x.ndim))
    n, channels, h, w = values.shape
    b = layer.block
    c = channels // b * b
    groups = c // b
    s = layer.sampling_stride
    step = s * s if h >= s and w >= s else 1
    matrix = np.zeros((b, groups * n * h * w))
    for channel in range(c):
        row, place = channel // groups, channel % groups
        matrix[row, place * n * h * w : (place + 1) * n * h * w] = values[:, channel].ravel()
    sample = matrix[:, ::step]
    mean = sample.mean(1, keepdims=True)
    root = spectral_root(sample @ sample.T / sample.shape[1] + layer.eps * np.eye(b), layer.n_iter)
    whitened = root @ (matrix - mean)
    y = np.zeros_like(values)
    for channel in range(c):
        row, place = channel // groups, channel % groups
        y[:, channel] = whitened[row, place * n * h * w : (place + 1) * n * h * w].reshape(n, h, w)
    mean2, var = np.zeros((1, 1)), np.ones((1, 1))
    if c < channels:
        rest = values[:, c:].reshape(n, -1)[:, ::step]
        mean2, var = rest.mean().reshape(1, 1), rest.var(ddof=1).reshape(1, 1)
        y[:, c:] = (values[:, c:] - mean2) / np.sqrt(var + layer.eps)
    return tuple(torch.from_numpy(t) for t in (y.reshape(x.shape), mean, root, mean2, var))


def statistics(layer: ChannelDeconv):
    return layer.running_mean1, layer.running_deconv, layer.running_mean2, layer.running_var


@NAME
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_first_statistics_are_the_methods(name, backend):
    layer = make(name, backend)
    x = inputs(name)
    y, *expected = by_the_book(layer, x)
    assert_close((layer(x), *statistics(layer)), (y, *expected), 1e-11)
    assert layer.num_batches_tracked == 1


@NAME
def test_later_statistics_move_by_momentum(name):
    layer = make(name)
    layer(inputs(name))
    old = [t.clone() for t in statistics(layer)]
    x = inputs(name, seed=1)
    new = by_the_book(layer, x)[1:]
    layer(x)
    m = layer.momentum
    if CASES[name][0]["block"] * (x.shape[1] // layer.block) == x.shape[1]:  # nothing left over, nothing to move
        new = (*new[:2], *old[2:])
    assert_close(statistics(layer), [(1 - m) * o + m * n for o, n in zip(old, new, strict=True)], 1e-11)
    assert layer.num_batches_tracked == 2


@NAME
@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_backends_agree(name, fast, dtype):
    layers = make(name, fast, dtype), make(name, "reference")
    for step in range(2):
        x = inputs(name, dtype, step)
        bound = F64_TOLERANCE if dtype == torch.float64 else F32_TOLERANCE
        assert_close(train_step(layers[0], x), train_step(layers[1], x.double()), bound)
    assert_close(train_step(layers[0].eval(), x), train_step(layers[1].eval(), x.double()), bound)


@pytest.mark.parametrize(
    "name", ["two_blocks", "two_blocks_and_left_over", "image_of_the_stride", "features_left_over"]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(name, backend, training):
    layer = make(name, backend).train(training)
    assert torch.autograd.gradcheck(layer, inputs(name).requires_grad_(), fast_mode=True)


def test_evaluation_uses_the_running_values():
    layer = make("channels_left_over")
    layer(inputs("channels_left_over"))
    x = inputs("channels_left_over", seed=1)
    before = copy.deepcopy(layer.state_dict())
    y = layer.eval()(x)
    mean1, root, mean2, var = statistics(layer)
    assert_close(y[:, :4], torch.einsum("bc,nchw->nbhw", root, x[:, :4] - mean1.view(1, 4, 1, 1)), 1e-12)
    assert_close(y[:, 4:], (x[:, 4:] - mean2) / (var + layer.eps).sqrt(), 1e-12)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_features_are_images_of_one_pixel():
    layers = make("features_left_over"), make("features_left_over")
    x = inputs("features_left_over")
    assert torch.equal(layers[0](x), layers[1](x[:, :, None, None])[:, :, 0, 0])


def test_the_papers_checkpoint_loads():
    layer = ChannelDeconv(3)
    state = {
        "running_mean1": randn(3, 1).float(),
        "running_deconv": randn(3, 3).float(),
        "running_mean2": torch.full((1, 1), 0.25),
        "running_var": torch.full((1, 1), 4.0),
        "num_batches_tracked": torch.tensor(7),
    }
    assert set(layer.state_dict()) == set(state)
    layer.load_state_dict(state, strict=True)
    x = randn(2, 4, 3, 3).float()
    y = layer.eval()(x)
    blocks = (x[:, :3] - state["running_mean1"].view(1, 3, 1, 1)).flatten(2)
    assert_close(y[:, :3], (state["running_deconv"] @ blocks).view(2, 3, 3, 3), 1e-6)
    assert_close(y[:, 3:], (x[:, 3:] - 0.25) / (4.0 + 1e-2) ** 0.5, 1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_are_the_same_layer(how):
    layer = make("two_blocks_and_left_over")
    layer(inputs("two_blocks_and_left_over"))
    if how == "state_dict":
        other = make("two_blocks_and_left_over")
        other.load_state_dict(layer.state_dict())
    else:
        other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = inputs("two_blocks_and_left_over", seed=1)
    assert torch.equal(layer(x), other(x))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in layer.state_dict().items())


def test_reset():
    layer, fresh = make("channels_left_over"), make("channels_left_over").state_dict()
    layer(inputs("channels_left_over"))
    layer.reset_parameters()
    assert all(torch.equal(v, fresh[k]) for k, v in layer.state_dict().items())


def test_construction():
    assert "block=3, eps=0.01, n_iter=5, momentum=0.1, sampling_stride=3" in repr(ChannelDeconv(3))
    layer = ChannelDeconv(3, 1e-3, 7, 0.2, 2)
    assert (layer.block, layer.eps, layer.n_iter, layer.momentum, layer.sampling_stride) == (3, 1e-3, 7, 0.2, 2)
    assert {t.device.type for t in ChannelDeconv(3, device="meta").state_dict().values()} == {"meta"}
    assert ChannelDeconv(3, dtype=torch.float64).running_var.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = make("channels_left_over").to(dtype)
    x = inputs("channels_left_over", dtype)
    exact = by_the_book(make("channels_left_over"), x)[0]
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, exact, 2 * torch.finfo(dtype).eps)
    assert layer.eval()(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_nothing(dtype):
    layers = make("channels_left_over", dtype=torch.float32), make("channels_left_over", dtype=torch.float32)
    x = inputs("channels_left_over", torch.float32)
    with torch.autocast("cpu", dtype):
        y = layers[0](x)
    assert torch.equal(y, layers[1](x))
    assert torch.equal(layers[0].running_deconv, layers[1].running_deconv)


@pytest.mark.parametrize(
    ("arguments", "shape", "error", "message"),
    [
        ({"block": 2}, (2, 4, 6), ValueError, r"expects an input \(N, C, H, W\) or \(N, C\), got shape \(2, 4, 6\)"),
        ({"block": 2}, (2, 4, 6, 6, 6), ValueError, r"expects an input .* got shape \(2, 4, 6, 6, 6\)"),
        ({"block": 5}, (2, 4, 6, 6), ValueError, r"block=5 needs at least that many channels, got 4"),
    ],
)
def test_inputs_refused(arguments, shape, error, message):
    layer = ChannelDeconv(**arguments)
    with pytest.raises(error, match=message):
        layer(torch.zeros(shape))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_dtypes_refused(dtype):
    with pytest.raises(TypeError, match="input must have a real floating-point dtype"):
        ChannelDeconv(2)(torch.zeros(2, 4, dtype=dtype))


def test_devices_mixed():
    with pytest.raises(ValueError, match="running_mean1 is on meta but the input is on cpu"):
        ChannelDeconv(2, device="meta")(torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (0, 6)])
def test_an_empty_batch(shape):
    layer = ChannelDeconv(4)
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_not_kept(bad):
    running._warn_once.cache_clear()
    layer = make("channels_left_over")
    layer(inputs("channels_left_over"))
    before = copy.deepcopy(layer.state_dict())
    x = inputs("channels_left_over")
    x[0, 0, 0, 0] = bad
    with pytest.warns(RuntimeWarning, match="keep their last finite values"):
        y = layer(x)
    assert not torch.isfinite(y).all()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


DEGENERATE = {
    "single_sample": randn(1, 6, 1, 1),
    "constant": torch.arange(6.0).view(1, 6, 1, 1).expand(3, 6, 5, 5),
    "zero": torch.zeros(3, 6, 5, 5),
    "far_from_zero": randn(3, 6, 5, 5) + 1000,
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [4, 5, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_inputs_stay_finite(name, dtype, block, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "a deconvolution layer in training was given a batch without variation")
        layer = ChannelDeconv(block, backend=backend, dtype=dtype)
        assert all_finite(train_step(layer, DEGENERATE[name].to(dtype)))
        assert all_finite(train_step(layer.eval(), DEGENERATE[name].to(dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_1e4_in_float16(backend):
    """Finite output and gradient; the variance 1e8 does not fit a float16 buffer, which is said once."""
    running._warn_once.cache_clear()
    layer = ChannelDeconv(4, backend=backend, dtype=torch.float16)
    x = (randn(3, 6, 5, 5).clamp(-3, 3) * 1e4).half()
    with pytest.warns(RuntimeWarning, match="overflow of the buffers' dtype"):
        assert all_finite(train_step(layer, x))
    assert (layer.running_mean2, layer.running_var) == (0, 1)
