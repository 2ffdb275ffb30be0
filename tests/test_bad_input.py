"""What is refused, and in which words; what is degenerate and stays finite; what is not finite and is not kept."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import tdeconv
from helpers import BACKENDS, all_finite, assert_close, randn, train_step
from tdeconv import (
    ChannelDeconv,
    Delinear,
    FastDeconv,
    FastDeconv1d,
    FastDeconv3d,
    convert_deconv,
    delinear,
    fast_deconv,
    fold_deconv,
    inverse_sqrt,
    patch_moments,
    running,
)

META = torch.device("meta")


def image(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(shape or (2, 3, 8, 8), **kwargs)


def conv(**options):
    """A functional call with sound arguments but for those given."""
    given = {"x": image(), "weight": image(4, 3, 3, 3), "bias": None, "training": True} | options
    return fast_deconv(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)


def lin(**options):
    given = {"x": image(5, 6), "weight": image(4, 6), "bias": None, "training": True} | options
    return delinear(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)


def fold(**options):
    given = {"weight": image(4, 3, 3, 3), "bias": None, "mean": image(27), "deconv": torch.eye(27)} | options
    return fold_deconv(given.pop("weight"), given.pop("bias"), given.pop("mean"), given.pop("deconv"), **given)


# (call, error, what the message says)
REFUSED = {
    # rank
    "conv1d_rank": (
        lambda: FastDeconv1d(3, 4, 3)(image()),
        ValueError,
        r"FastDeconv1d expects an input of 3 .* got .*2, 3, 8, 8",
    ),
    "conv2d_rank": (
        lambda: FastDeconv(3, 4, 3)(image(3, 8)),
        ValueError,
        r"4 dimensions \(N, C, \*spatial\), or 3 without a batch",
    ),
    "conv2d_rank_5": (lambda: FastDeconv(3, 4, 3)(image(2, 3, 8, 8, 8)), ValueError, r"got shape \(2, 3, 8, 8, 8\)"),
    "conv3d_rank": (lambda: FastDeconv3d(3, 4, 3)(image(3, 8, 8)), ValueError, "expects an input of 5 dimensions"),
    "linear_rank": (
        lambda: Delinear(1, 4)(image()[0, 0, 0, 0]),
        ValueError,
        r"expected an input of shape \(\.\.\., 1\), got \(\)",
    ),
    "function_rank": (
        lambda: conv(x=image(2, 8)),
        ValueError,
        r"expected an input of 4 dimensions .* weight of shape \(4, 3, 3, 3\)",
    ),
    "weight_rank": (
        lambda: conv(weight=image(4, 3)),
        ValueError,
        r"weight must have shape \(O, C/groups, \*kernel\) with 1 to 3",
    ),
    "delinear_weight_rank": (
        lambda: lin(weight=image(4, 6, 1)),
        ValueError,
        r"weight must have shape \(O, C\), got \(4, 6, 1\)",
    ),
    "moments_rank": (lambda: patch_moments(image(3, 8), 3), ValueError, "1 to 3 spatial axes, got"),
    "cov_rank": (lambda: inverse_sqrt(image(3)), ValueError, r"cov must have shape \(\.\.\., D, D\), got \(3,\)"),
    "cov_square": (
        lambda: inverse_sqrt(image(3, 4)),
        ValueError,
        r"cov must have shape \(\.\.\., D, D\), got \(3, 4\)",
    ),
    "fold_rank": (
        lambda: fold(weight=image(4)),
        ValueError,
        r"weight must have shape \(O, C/groups, \*kernel\), got \(4,\)",
    ),
    # channels and other shapes
    "channels": (
        lambda: FastDeconv(4, 4, 3)(image()),
        ValueError,
        "expected an input with 4 channels along axis -3, got 3",
    ),
    "features": (
        lambda: Delinear(5, 4)(image(2, 6)),
        ValueError,
        r"expected an input of shape \(\.\.\., 5\), got \(2, 6\)",
    ),
    "weight_channels": (
        lambda: conv(weight=image(4, 2, 3, 3)),
        ValueError,
        "groups=1 needs an input with 2 channels, got 3",
    ),
    "bias_shape": (lambda: conv(bias=image(3)), ValueError, r"bias must have shape \(4,\), got \(3,\)"),
    "fold_bias_shape": (lambda: fold(bias=image(3)), ValueError, r"bias must have shape \(4,\), got \(3,\)"),
    "mean_shape": (
        lambda: conv(running_mean=image(26), running_deconv=torch.eye(27)),
        ValueError,
        r"running_mean must have shape \(27,\)",
    ),
    "deconv_shape": (
        lambda: conv(running_mean=image(27), running_deconv=torch.eye(26)),
        ValueError,
        r"running_deconv must have .*\(27, 27\)",
    ),
    "one_of_two": (lambda: conv(running_mean=image(27)), ValueError, "running_mean and running_deconv go together"),
    "none_in_evaluation": (lambda: conv(training=False), ValueError, "need running_mean and running_deconv, got None"),
    "fold_deconv_shape": (
        lambda: fold(deconv=torch.eye(10)),
        ValueError,
        "a multiple of the 9 kernel positions that divides",
    ),
    "fold_mean_shape": (lambda: fold(mean=image(9)), ValueError, r"mean must have shape \(27,\), got \(9,\)"),
    # dtype
    "integers": (
        lambda: FastDeconv(3, 4, 3)(image(dtype=torch.int64)),
        TypeError,
        r"floating-point dtype, got torch.int64; .*float\(\)",
    ),
    "bools": (
        lambda: conv(x=image(dtype=torch.bool)),
        TypeError,
        "x must have a real floating-point dtype, got torch.bool",
    ),
    "complex": (
        lambda: FastDeconv(3, 4, 3)(image(dtype=torch.complex64)),
        TypeError,
        "real floating-point dtype, got torch.complex64",
    ),
    "linear_integers": (
        lambda: Delinear(6, 4)(image(5, 6, dtype=torch.int32)),
        TypeError,
        "floating-point dtype, got torch.int32",
    ),
    "linear_complex": (lambda: lin(x=image(5, 6, dtype=torch.complex128)), TypeError, "real floating-point dtype"),
    "weight_integers": (
        lambda: conv(weight=image(4, 3, 3, 3, dtype=torch.int8)),
        TypeError,
        "weight must have a real floating",
    ),
    "bias_complex": (lambda: conv(bias=image(4, dtype=torch.complex64)), TypeError, "bias must have a real floating"),
    "moments_integers": (lambda: patch_moments(image(dtype=torch.int64), 3), TypeError, "x must have a real floating"),
    "cov_complex": (
        lambda: inverse_sqrt(torch.eye(3, dtype=torch.complex64)),
        TypeError,
        "cov must have a real floating",
    ),
    "fold_integers": (lambda: fold(mean=image(27, dtype=torch.int64)), TypeError, "mean must have a real floating"),
    "not_a_tensor": (lambda: FastDeconv(3, 4, 3)([[1.0]]), TypeError, "input must be a torch.Tensor, got list"),
    "weight_not_a_tensor": (lambda: conv(weight=3.0), TypeError, "weight must be a torch.Tensor, got float"),
    "mixed_dtypes": (
        lambda: FastDeconv(3, 4, 3)(image().double()),
        TypeError,
        "weight is torch.float32 but the input is torch.float64",
    ),
    "mixed_dtypes_linear": (
        lambda: Delinear(6, 4)(image(5, 6).half()),
        TypeError,
        "convert one of them, or use torch.autocast",
    ),
    "dtype_of_a_layer": (
        lambda: FastDeconv(3, 4, 3, dtype=torch.int32),
        TypeError,
        "dtype must be a real floating-point .* torch.int32",
    ),
    "dtype_of_linear": (
        lambda: Delinear(3, 4, dtype=torch.complex64),
        TypeError,
        "dtype must be a real floating-point",
    ),
    "dtype_of_channel": (lambda: ChannelDeconv(3, dtype=torch.bool), TypeError, "dtype must be a real floating-point"),
    # devices
    "devices": (
        lambda: FastDeconv(3, 4, 3, device=META)(image()),
        ValueError,
        "weight is on meta but the input is on cpu; move one",
    ),
    "devices_linear": (
        lambda: Delinear(6, 4, device=META)(image(5, 6)),
        ValueError,
        "weight is on meta but the input is on cpu",
    ),
    "devices_bias": (lambda: conv(bias=image(4, device=META)), ValueError, "bias is on meta but the input is on cpu"),
    "devices_running": (
        lambda: conv(running_mean=image(27, device=META), running_deconv=torch.eye(27)),
        ValueError,
        "running_mean is on meta",
    ),
    "devices_fold": (lambda: fold(deconv=torch.eye(27, device=META)), ValueError, "deconv is on meta"),
    # kernel larger than the padded input
    "kernel": (
        lambda: FastDeconv(3, 4, 9)(image()),
        ValueError,
        r"kernel \(extent 9 with dilation\) is larger than the padded input",
    ),
    "kernel_dilated": (
        lambda: FastDeconv(3, 4, 3, dilation=(1, 5), padding=1)(image()),
        ValueError,
        r"extent 11 .*size 8 \+ 2\*1.*axis 1",
    ),
    "kernel_1d": (lambda: FastDeconv1d(3, 4, 9)(image(2, 3, 8)), ValueError, "larger than the padded input .* axis 0"),
    "kernel_3d": (
        lambda: FastDeconv3d(3, 4, (1, 1, 4))(image(2, 3, 3, 3, 3)),
        ValueError,
        "larger than the padded input .* axis 2",
    ),
    "kernel_of_moments": (lambda: patch_moments(image(), 9), ValueError, "larger than the padded input"),
    "kernel_in_evaluation": (lambda: FastDeconv(3, 4, 9).eval()(image()), ValueError, "larger than the padded input"),
    # options
    "block_zero": (lambda: FastDeconv(3, 4, 3, block=0), ValueError, "block must be at least 1, got 0"),
    "block_negative": (lambda: Delinear(3, 4, block=-2), ValueError, "block must be at least 1, got -2"),
    "block_float": (lambda: ChannelDeconv(2.0), TypeError, r"block must be a positive int, got 2.0 \(float\)"),
    "block_of_moments": (lambda: patch_moments(image(), 3, block=0), ValueError, "block must be at least 1"),
    "block_of_function": (lambda: conv(block=True), TypeError, "block must be a positive int, got True"),
    "n_iter_zero": (lambda: FastDeconv(3, 4, 3, n_iter=0), ValueError, "n_iter must be at least 1, got 0"),
    "n_iter_float": (lambda: lin(n_iter=5.0), TypeError, "n_iter must be a positive int, got 5.0"),
    "n_iter_of_root": (lambda: inverse_sqrt(torch.eye(3), -1), ValueError, "n_iter must be at least 1, got -1"),
    "n_iter_of_channel": (lambda: ChannelDeconv(2, n_iter=0), ValueError, "n_iter must be at least 1"),
    "eps_zero": (lambda: FastDeconv(3, 4, 3, eps=0), ValueError, "eps must be positive and finite, got 0"),
    "eps_negative": (lambda: Delinear(3, 4, eps=-1e-5), ValueError, "eps must be positive and finite, got -1e-05"),
    "eps_nan": (lambda: conv(eps=float("nan")), ValueError, "eps must be positive and finite, got nan"),
    "eps_inf": (lambda: ChannelDeconv(2, eps=float("inf")), ValueError, "eps must be positive and finite, got inf"),
    "eps_string": (
        lambda: FastDeconv(3, 4, 3, eps="1e-5"),
        TypeError,
        r"eps must be a positive number, got '1e-5' \(str\)",
    ),
    "momentum_above": (lambda: FastDeconv(3, 4, 3, momentum=1.1), ValueError, r"momentum must be in \[0, 1\], got 1.1"),
    "momentum_below": (lambda: Delinear(3, 4, momentum=-0.1), ValueError, r"momentum must be in \[0, 1\], got -0.1"),
    "momentum_nan": (lambda: conv(momentum=float("nan")), ValueError, r"momentum must be in \[0, 1\], got nan"),
    "momentum_text": (
        lambda: ChannelDeconv(2, momentum="0.1"),
        TypeError,
        r"momentum must be a number in \[0, 1\], got '0.1'",
    ),
    "sampling_zero": (
        lambda: FastDeconv(3, 4, 3, sampling_stride=0),
        ValueError,
        "sampling_stride must be at least 1, got 0",
    ),
    "sampling_of_channel": (
        lambda: ChannelDeconv(2, sampling_stride=-3),
        ValueError,
        "sampling_stride must be at least 1, got -3",
    ),
    "sampling_of_function": (lambda: conv(sampling_stride=0), ValueError, "sampling_stride must be at least 1"),
    "freeze_iter": (
        lambda: FastDeconv(3, 4, 3, freeze=True, freeze_iter=0),
        ValueError,
        "freeze_iter must be at least 1, got 0",
    ),
    "freeze_iter_endless": (
        lambda: FastDeconv(3, 4, 3, freeze=True, freeze_iter=10**9),
        ValueError,
        "freeze_iter must be at most 100000, got 1000000000",
    ),
    "freeze_iter_set": (
        lambda: setattr(FastDeconv(3, 4, 3, freeze=True), "freeze_iter", 2.0),
        TypeError,
        "freeze_iter must be a positive int, got 2.0",
    ),
    "step_missing": (
        lambda: conv(stats_interval=4),
        ValueError,
        "stats_interval=4 needs step, the number of training steps before; got None",
    ),
    "step_missing_linear": (lambda: lin(stats_interval=2), ValueError, "stats_interval=2 needs step"),
    "step_negative": (lambda: conv(stats_interval=4, step=-1), ValueError, "step must be at least 0, got -1"),
    "step_float": (lambda: lin(stats_interval=4, step=1.0), TypeError, "step must be .* int, got 1.0"),
    "step_tensor": (lambda: conv(step=torch.tensor(3)), TypeError, r"step must be .* int, got tensor\(3\)"),
    "stale_number": (lambda: conv(stale=1), TypeError, r"stale must be True or False, got 1 \(int\)"),
    "stale_none": (lambda: lin(stale=None), TypeError, "stale must be True or False, got None"),
    "stale_without_statistics": (
        lambda: conv(stale=True),
        ValueError,
        "need running_mean and running_deconv, got None",
    ),
    "stale_by_its_step": (
        lambda: lin(stats_interval=4, step=21),
        ValueError,
        "stale steps need running_mean and running_deconv, got None",
    ),
    "method": (
        lambda: inverse_sqrt(torch.eye(3), method="svd"),
        ValueError,
        "method must be one of 'newton_schulz', 'eigh', got 'svd'",
    ),
    "grouping": (
        lambda: FastDeconv(3, 4, 3, grouping="x"),
        ValueError,
        "grouping must be one of 'interleaved', 'contiguous', got 'x'",
    ),
    "grouping_of_moments": (lambda: patch_moments(image(), 3, grouping=None), ValueError, "grouping must be one of"),
    "grouping_of_fold": (lambda: fold(grouping="mixed"), ValueError, "grouping must be one of"),
    # groups
    "groups_in": (
        lambda: FastDeconv(3, 4, 3, groups=2),
        ValueError,
        "groups must divide in_channels, got groups=2 and in_channels=3",
    ),
    "groups_out": (
        lambda: FastDeconv(4, 3, 3, groups=2),
        ValueError,
        "groups must divide out_channels, got groups=2 and out_channels=3",
    ),
    "groups_zero": (lambda: FastDeconv(4, 4, 3, groups=0), ValueError, "groups must be at least 1, got 0"),
    "groups_of_function": (lambda: conv(groups=2), ValueError, "groups must divide the input's channels, got groups=2"),
    "groups_of_moments": (
        lambda: patch_moments(image(), 3, groups=2),
        ValueError,
        "groups must divide the input's channels",
    ),
    "groups_of_fold": (lambda: fold(groups=3), ValueError, "groups must divide the output channels, got groups=3"),
    # sizes
    "in_channels": (lambda: FastDeconv(0, 4, 3), ValueError, "in_channels must be at least 1, got 0"),
    "out_channels": (lambda: FastDeconv(4, -1, 3), ValueError, "out_channels must be at least 1, got -1"),
    "in_features": (lambda: Delinear(0, 4), ValueError, "in_features must be at least 1, got 0"),
    "out_features": (lambda: Delinear(4, 2.5), TypeError, "out_features must be a positive int, got 2.5"),
    "kernel_zero": (
        lambda: FastDeconv(3, 4, 0),
        ValueError,
        r"kernel_size must be at least 1 along every axis, got \(0, 0\)",
    ),
    "kernel_tuple": (
        lambda: FastDeconv(3, 4, (3, 3, 3)),
        ValueError,
        r"kernel_size must have 2 ints, .* got \(3, 3, 3\)",
    ),
    "kernel_float": (
        lambda: FastDeconv1d(3, 4, 3.0),
        TypeError,
        "kernel_size must be an int or a tuple of 1 ints, got 3.0",
    ),
    "stride_zero": (
        lambda: FastDeconv(3, 4, 3, stride=(1, 0)),
        ValueError,
        r"stride must be at least 1 along every axis, got \(1, 0\)",
    ),
    "dilation_zero": (lambda: FastDeconv3d(3, 4, 3, dilation=0), ValueError, "dilation must be at least 1"),
    "padding_negative": (
        lambda: FastDeconv(3, 4, 3, padding=-1),
        ValueError,
        "padding must be at least 0 along every axis",
    ),
    "padding_of_function": (
        lambda: conv(padding="same"),
        TypeError,
        "padding must be an int or a tuple of 2 ints, got 'same'",
    ),
    "padding_name": (lambda: FastDeconv(3, 4, 3, padding="half"), ValueError, "Invalid padding string 'half'"),
    "padding_same_strided": (
        lambda: FastDeconv(3, 4, 3, 2, "same"),
        ValueError,
        "padding='same' is not supported for strided",
    ),
    "padding_mode": (lambda: FastDeconv(3, 4, 3, padding_mode="mirror"), ValueError, "padding_mode must be one of"),
    "stride_bool": (
        lambda: FastDeconv(3, 4, 3, stride=True),
        TypeError,
        "stride must be an int or a tuple of 2 ints, got True",
    ),
    # NumPy's numbers are taken, its booleans and a tensor's are not
    "numpy_bool": (
        lambda: FastDeconv(np.True_, 4, 3),
        TypeError,
        r"in_channels must be a positive int, got True \(bool\)",
    ),
    "numpy_bools": (
        lambda: FastDeconv(3, 4, 3, stride=np.array([True, True])),
        TypeError,
        "stride must be an int or a tuple of 2 ints, got",
    ),
    "numpy_float": (
        lambda: Delinear(3, np.float64(2.5)),
        TypeError,
        "out_features must be a positive int, got .*2.5",
    ),
    "numpy_array": (lambda: conv(n_iter=np.array([5])), TypeError, r"n_iter must be a positive int, got \[5\]"),
    "numpy_out_of_range": (lambda: ChannelDeconv(np.int64(0)), ValueError, "block must be at least 1, got 0"),
    "tensor_number": (
        lambda: Delinear(3, 4, eps=torch.tensor(1e-5)),
        TypeError,
        "eps must be a positive number, got tensor",
    ),
    "kernel_too_long": (
        lambda: FastDeconv3d(3, 4, (3, 3)),
        ValueError,
        r"kernel_size must have 3 ints, one per spatial axis, got \(3, 3\)",
    ),
    # nothing to take statistics of
    "moments_of_nothing": (
        lambda: patch_moments(image(0, 3, 8, 8), 3),
        ValueError,
        "x must hold at least one patch, got an empty",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


NO_INTERVALS = {
    "zero": (0, ValueError, "stats_interval must be at least 1, got 0"),
    "negative": (-1, ValueError, "stats_interval must be at least 1, got -1"),
    "endless": (10**9, ValueError, "stats_interval must be at most 100000, got 1000000000"),
    "fraction": (2.5, TypeError, r"stats_interval must be a positive int, got 2.5 \(float\)"),
    "whole float": (4.0, TypeError, r"stats_interval must be a positive int, got 4.0 \(float\)"),
    "bool": (True, TypeError, r"stats_interval must be a positive int, got True \(bool\)"),
    "text": ("4", TypeError, r"stats_interval must be a positive int, got '4' \(str\)"),
    "none": (None, TypeError, r"stats_interval must be a positive int, got None"),
    "tensor": (torch.tensor(4), TypeError, r"stats_interval must be a positive int, got tensor\(4\)"),
}
TAKES_AN_INTERVAL = {
    "FastDeconv1d": lambda k: FastDeconv1d(3, 4, 3, stats_interval=k),
    "FastDeconv": lambda k: FastDeconv(3, 4, 3, stats_interval=k),
    "FastDeconv3d": lambda k: FastDeconv3d(3, 4, 3, stats_interval=k),
    "Delinear": lambda k: Delinear(3, 4, stats_interval=k),
    "ChannelDeconv": lambda k: ChannelDeconv(3, stats_interval=k),
    "fast_deconv": lambda k: conv(stats_interval=k, step=3),
    "delinear": lambda k: lin(stats_interval=k, step=3),
    "convert_deconv": lambda k: convert_deconv(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), stats_interval=k),
}


@pytest.mark.parametrize("value", NO_INTERVALS)
@pytest.mark.parametrize("what", TAKES_AN_INTERVAL)
def test_an_interval_that_is_none_is_refused(what, value):
    interval, error, message = NO_INTERVALS[value]
    if value == "endless" and what in ("fast_deconv", "delinear"):  # which have no need to walk so far
        TAKES_AN_INTERVAL[what](interval)
        return
    with pytest.raises(error, match=message):
        TAKES_AN_INTERVAL[what](interval)


@pytest.mark.parametrize("value", NO_INTERVALS)
@pytest.mark.parametrize("layer", [FastDeconv(3, 4, 3, stats_interval=4), Delinear(6, 4), ChannelDeconv(3)], ids=type)
def test_an_interval_that_is_refused_leaves_the_layer(layer, value):
    interval, error, message = NO_INTERVALS[value]
    before, had, places = copy.deepcopy(layer.state_dict()), layer.stats_interval, layer._places
    with pytest.raises(error, match=message):
        layer.stats_interval = interval
    assert layer.stats_interval == had
    assert layer._places is places
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("value", ["zero", "endless"])
def test_a_model_that_is_refused_an_interval_stays_as_it_was(value):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    interval, error, message = NO_INTERVALS[value]
    with pytest.raises(error, match=message):
        convert_deconv(model, stats_interval=interval)
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d]


@pytest.mark.parametrize(
    "bad", [image(2, 4, 8, 8), image(3, 8), image(dtype=torch.int64), image(2, 3, 2, 2), image(device=META)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_input_leaves_the_layer_as_it_was(bad, backend):
    layer = FastDeconv(3, 4, 3, freeze=True, backend=backend)
    layer(randn(2, 3, 8, 8).float())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((TypeError, ValueError)):
        layer(bad)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


# ------------------------------------------------------------------------------------------------------- nothing at all

EMPTY = {
    "conv2d": (lambda **k: FastDeconv(3, 4, 3, stride=2, padding=1, **k), (0, 3, 9, 8), (0, 4, 5, 4)),
    "grouped": (lambda **k: FastDeconv(4, 6, 3, groups=2, bias=False, **k), (0, 4, 9, 8), (0, 6, 7, 6)),
    "reflect": (lambda **k: FastDeconv(3, 4, 3, padding=1, padding_mode="reflect", **k), (0, 3, 9, 8), (0, 4, 9, 8)),
    "freezing": (lambda **k: FastDeconv(3, 4, 3, freeze=True, **k), (0, 3, 9, 8), (0, 4, 7, 6)),
    "conv1d": (lambda **k: FastDeconv1d(3, 4, 3, **k), (0, 3, 9), (0, 4, 7)),
    "conv3d": (lambda **k: FastDeconv3d(3, 4, 2, **k), (0, 3, 3, 4, 5), (0, 4, 2, 3, 4)),
    "linear": (lambda **k: Delinear(6, 4, **k), (0, 6), (0, 4)),
    "linear_leading_axes": (lambda **k: Delinear(6, 4, block=2, **k), (3, 0, 6), (3, 0, 4)),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["training", "untracked", "evaluation"])
def test_an_empty_batch(name, backend, mode):
    """An empty output, statistics untouched, and a backward that gives zeros."""
    make, shape, out = EMPTY[name]
    layer = make(backend=backend)
    layer.train(mode != "evaluation")
    layer.track_running_stats = mode != "untracked"
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == out
    assert y.dtype == x.dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items() if k != "num_batches_tracked")
    if name == "freezing":  # a step all the same, as on the ranks that have data
        assert layer.num_batches_tracked == (mode == "training")


# ---------------------------------------------------------------------------------------------------------- degenerate

LAYERS = {
    "conv2d": (lambda **k: FastDeconv(4, 6, 3, padding=1, **k), (4, 4, 12, 12)),
    "conv2d_fifteen_steps": (lambda **k: FastDeconv(4, 6, 3, padding=1, n_iter=15, **k), (4, 4, 12, 12)),
    "blocks": (lambda **k: FastDeconv(4, 6, 3, block=2, **k), (4, 4, 12, 12)),
    "pointwise": (lambda **k: FastDeconv(4, 6, 1, **k), (4, 4, 12, 12)),
    "grouped": (lambda **k: FastDeconv(4, 6, 3, groups=2, **k), (4, 4, 12, 12)),
    "depthwise": (lambda **k: FastDeconv(4, 4, 3, padding=1, groups=4, n_iter=1, **k), (4, 4, 12, 12)),
    "conv1d": (lambda **k: FastDeconv1d(4, 6, 3, padding=1, **k), (4, 4, 40)),
    "conv3d": (lambda **k: FastDeconv3d(4, 6, 2, **k), (2, 4, 5, 5, 5)),
    "linear": (lambda **k: Delinear(12, 5, block=4, **k), (32, 12)),
    "linear_wide": (lambda **k: Delinear(40, 5, **k), (16, 40)),
}
INPUTS = {
    "single_sample": lambda shape: randn(1, *shape[1:]),
    "constant_channels": lambda shape: torch.arange(float(shape[1])).view(1, -1, *[1] * (len(shape) - 2)).expand(shape),
    "zero": lambda shape: torch.zeros(shape),
    "mean_1000_spreads": lambda shape: randn(*shape) + 1000,
    "values_of_1e4": lambda shape: randn(*shape).clamp(-3, 3) * 1e4,
    "constant_1e4": lambda shape: torch.full(shape, 1e4),
    "tiny": lambda shape: randn(*shape) * 1e-4,
}


@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_degenerate_inputs_stay_finite(which, name, backend, dtype):
    """Outputs, gradients and statistics, in training and after it; nothing is warned of but that nothing is told."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    # with momentum 1 evaluation has the batch's own statistics: others may leave float16's range, and rightly
    layer, x = make(backend=backend, dtype=dtype, momentum=1), INPUTS[which](shape).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*batch without variation")
        before = layer.running_deconv.clone()
        for training in (True, False):
            if not training and torch.equal(layer.running_deconv, before):
                continue  # a batch without variation, which is not counted
            layer.train(training)
            x = x.detach().requires_grad_()
            y = layer(x)
            assert y.dtype == dtype
            # a gradient of ones is what sums within the layer suffer most from
            grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
            assert all_finite([y, *grads, *layer.buffers()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["values_of_1e4", "constant_1e4", "mean_1000_spreads"])
def test_degenerate_inputs_under_autocast(which, dtype, backend):
    layer, x = FastDeconv(4, 6, 3, padding=1, backend=backend), INPUTS[which]((4, 4, 12, 12)).float().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
    assert all_finite([y, *grads, *layer.buffers()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_of_1000_spreads_keeps_float32s_digits(backend):
    """Not only finite: the covariance is taken about the mean."""
    x = randn(4, 3, 12, 12).float() + 1000
    actual, exact = patch_moments(x, 3, backend=backend), patch_moments(x.double(), 3, backend="reference")
    assert_close(actual, exact, 2e-6)
    root = inverse_sqrt(actual[1] + 1e-5 * torch.eye(27), backend=backend)
    assert_close(root, inverse_sqrt(exact[1] + 1e-5 * torch.eye(27), backend="reference"), 2e-5)


# ---------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_output_and_not_in_the_statistics(name, backend, bad):
    running._warn_once.cache_clear()
    make, shape = LAYERS[name]
    layer, x = make(backend=backend), randn(*shape).float()
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    broken = x.clone()
    broken[(0,) * x.ndim] = bad
    broken.requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            y = layer(broken)
            y.sum().backward()
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "NaN or Inf in its statistics" in str(caught[0].message)
    assert not torch.isfinite(y).all()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all_finite(train_step(layer, x))  # the next sound batch is none the worse


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_shows_what_is_not_finite_where_it_is(backend):
    layer = FastDeconv(3, 4, 3, padding=1, backend=backend)
    x = randn(2, 3, 8, 8).float()
    layer(x)
    layer.eval()
    x[1, 0, 0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1, :, :2, :2]).all()
    assert torch.isfinite(y[1, :, 2:, 2:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_show_what_is_not_finite(backend):
    cov = torch.eye(30)
    cov[0, 0] = float("nan")
    cov.requires_grad_()
    root = inverse_sqrt(cov, backend=backend)
    root.sum().backward()
    assert torch.isnan(root).any()
    x = randn(2, 3, 8, 8).float()
    x[0, 0, 4, 4] = float("inf")
    assert not all_finite(patch_moments(x, 3, backend=backend))


def test_the_public_names_are_the_documented_ones():
    assert {"FastDeconv", "FastDeconv1d", "FastDeconv3d", "Delinear", "ChannelDeconv"} <= set(tdeconv.__all__)
    functions = {"patch_moments", "inverse_sqrt", "fold_deconv", "fast_deconv", "delinear", "use_backend", "explain"}
    assert functions <= set(tdeconv.__all__)
    assert all(hasattr(tdeconv, name) for name in tdeconv.__all__)
