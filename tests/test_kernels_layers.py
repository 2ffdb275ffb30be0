"""Whole layers on the Triton kernels against the reference in float64; on a GPU, at real sizes too."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from cases import Case
from helpers import F32_TOLERANCE, assert_close, difference, randn, run_case, train_step, what_cancels
from interpreting import DEVICE, case_named, named, poison  # noqa: F401  # before the kernels; a fixture

pytest.importorskip("triton")

import tdeconv
from tdeconv import ops
from tdeconv.kernels import precision
from tdeconv.schedule import every_step

convolution = importlib.import_module("tdeconv.kernels.convolve")  # the package exports a function of that name

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the same layers run at real sizes")
WAYS = pytest.mark.parametrize("way", ["library", "triton"])


@pytest.fixture(autouse=True)
def strict():
    with precision.use("strict"):
        yield


CASES = named(
    "block_by_gcd pointwise_block channels_last_block_stride conv1d_groups_dilated linear_by_gcd",
    "plain groups_two stride_two dilation_rectangular depthwise contiguous_grouping sliced odd_sizes "
    "kernel_even sampling_three pointwise_strided pointwise_groups_channels_last block_coprime bias_off "
    "positions_in_padding_only expanded_batch conv1d conv3d conv3d_block_strided_rectangular past_the_half_gram "
    "sixty_four_channels linear linear_sliced_bias_off linear_wide",
)


@interpreted
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", CASES)
def test_layer(case):
    """Output, all gradients and buffers, from the same numbers."""
    check_layer(case, "triton")


@interpreted
@pytest.mark.parametrize("case", named("block_by_gcd", "plain depthwise linear"))
def test_layer_with_the_librarys_convolution(case):
    check_layer(case, "library")


def check_layer(case: Case, way: str) -> None:
    tensors = [None if t is None else t.float() for t in case.tensors(torch.float64)]
    with convolution.use(way):
        actual = run_case(case, "triton", torch.float32, tensors)
    expected = run_case(case, "reference", torch.float64, tensors)
    assert_close(actual, expected, F32_TOLERANCE, what_cancels(case, tensors))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", named("pointwise_block", "plain block_by_gcd depthwise"))
def test_layer_in_half_precision(case, dtype):
    """A few times the error of plain torch in the same dtype; the interpreter truncates to bfloat16."""
    tensors = [t.to(dtype) for t in case.tensors(torch.float64)]
    with convolution.use("triton"):
        actual = run_case(case, "triton", dtype, tensors)
    expected, plain = run_case(case, "reference", torch.float64, tensors), run_case(case, "reference", dtype, tensors)
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert a.dtype == dtype
        assert difference(a, e) <= 4 * difference(p, e) + 2 * torch.finfo(dtype).eps


MODULES = {
    "FastDeconv": lambda **kw: (tdeconv.FastDeconv(4, 6, 3, padding=1, block=2, sampling_stride=2, **kw), (3, 4, 7, 7)),
    "FastDeconv1d": lambda **kw: (tdeconv.FastDeconv1d(4, 4, 3, groups=2, sampling_stride=2, **kw), (4, 4, 13)),
    "FastDeconv3d": lambda **kw: (tdeconv.FastDeconv3d(2, 3, 2, padding=1, sampling_stride=1, **kw), (2, 2, 4, 5, 4)),
    "Delinear": lambda **kw: (tdeconv.Delinear(12, 5, block=4, **kw), (20, 12)),
}


@interpreted
@pytest.mark.parametrize("name", MODULES)
def test_module_in_training_and_evaluation(name):
    torch.manual_seed(0)
    layer, shape = MODULES[name](n_iter=5, backend="triton")
    oracle = copy.deepcopy(layer).double()
    oracle.backend = "reference"
    x = randn(*shape, dtype=torch.float32)
    with convolution.use("triton"):
        actual = train_step(layer, x)
    assert_close(actual, train_step(oracle, x.double()), F32_TOLERANCE)
    layer.eval()
    oracle.eval()
    assert_close(layer(x), oracle(x.double()), F32_TOLERANCE)


@interpreted
@pytest.mark.usefixtures("poison")
@WAYS
@pytest.mark.parametrize("name", MODULES)
def test_module_in_a_stale_step(name, way):
    """Against the reference's in float64, with statistics of another batch."""
    torch.manual_seed(0)
    layer, shape = MODULES[name](momentum=1, stats_interval=4, backend="torch")
    layer(2 * randn(*shape, dtype=torch.float32, seed=1) + 0.5)
    oracle = copy.deepcopy(layer).double()
    layer.backend, oracle.backend = "triton", "reference"
    x = randn(*shape, dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    with convolution.use(way), every_step([layer, oracle], fresh=False):
        assert_close(train_step(layer, x), train_step(oracle, x.double()), F32_TOLERANCE)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@interpreted
def test_operator_passes_opcheck():
    case = Case("opcheck", (2, 2, 4, 4), out=3, kernel=2, block=1, sampling_stride=1)
    x, weight, bias = (t.requires_grad_() for t in case.tensors(torch.float32))
    with convolution.use("triton"):
        torch.library.opcheck(
            ops.deconvolve,
            (x, weight, bias, case.geo.pack(), 1e-5, 5, "triton"),
            rtol=1e-4,
            atol=1e-5,
        )


def saved_bytes(case: Case, device: str) -> tuple[int, int, int]:
    """Bytes of the input, of everything else kept for backward, and of the largest of that."""
    tensors = [t.detach().to(device).requires_grad_() for t in case.tensors(torch.float32) if t is not None]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tdeconv.fast_deconv(*tensors, training=True, backend="triton", **case.options())
    x = kept.pop(tensors[0].untyped_storage().data_ptr()).nbytes()
    sizes = [storage.nbytes() for storage in kept.values()]
    return x, sum(sizes), max(sizes)


@interpreted
@pytest.mark.parametrize(("kernel", "layout"), [(1, "contiguous"), (3, "channels_last")])
def test_nothing_of_the_inputs_size_is_saved_but_the_input(kernel, layout):
    case = Case("saved", (4, 6, 24, 24), out=5, kernel=kernel, padding=kernel // 2, block=3, layout=layout)
    x, others, largest = saved_bytes(case, "cpu")
    assert x == 4 * 6 * 24 * 24 * 4
    d = case.geo.features
    # mean, root, folded weight, weight, and the root's factors, which are the covariance's size
    assert largest <= 16 * max(d * d, 5 * 6 * kernel**2) * 4
    assert others < x


@interpreted
def test_same_bits_twice():
    case = case_named("pointwise_block")
    with convolution.use("triton"):
        first, second = (run_case(case, "triton", torch.float32, case.tensors(torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_explain_says_how():
    text = tdeconv.explain(tdeconv.FastDeconv(4, 6, 3, backend="triton"), torch.zeros(2, 4, 9, 9))
    assert "backend 'triton'" in text
    assert all(stage in text for stage in ("patch_moments", "inverse_sqrt", "fold", "convolve"))


# ------------------------------------------------------------------------------------------------------------ on a GPU

REAL = {
    "vgg": lambda **kw: (tdeconv.FastDeconv(128, 256, 3, padding=1, **kw), (32, 128, 56, 56)),
    "resnet_3x3": lambda **kw: (tdeconv.FastDeconv(64, 64, 3, padding=1, **kw), (32, 64, 56, 56)),
    "resnet_strided": lambda **kw: (tdeconv.FastDeconv(256, 256, 3, stride=2, padding=1, **kw), (16, 256, 28, 28)),
    "resnet_1x1": lambda **kw: (tdeconv.FastDeconv(256, 64, 1, **kw), (32, 256, 56, 56)),
    "first": lambda **kw: (tdeconv.FastDeconv(3, 64, 7, stride=2, padding=3, **kw), (16, 3, 112, 112)),
    "resnext": lambda **kw: (tdeconv.FastDeconv(128, 128, 3, padding=1, groups=32, **kw), (16, 128, 28, 28)),
    "depthwise": lambda **kw: (tdeconv.FastDeconv(96, 96, 3, padding=1, groups=96, **kw), (16, 96, 28, 28)),
    "conv1d": lambda **kw: (tdeconv.FastDeconv1d(64, 96, 5, padding=2, **kw), (16, 64, 500)),
    "conv3d": lambda **kw: (tdeconv.FastDeconv3d(16, 32, 3, padding=1, **kw), (2, 16, 12, 20, 20)),
    "linear": lambda **kw: (tdeconv.Delinear(2048, 1000, **kw), (256, 2048)),
}


def real_layer(name: str, dtype: torch.dtype, layout: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer, shape = REAL[name](n_iter=5, backend="triton", dtype=dtype, device="cuda")
    x = torch.randn(shape, device="cuda")
    x = ((x + 0.5 * x.roll(1, -1)).relu() + 0.1).to(dtype)
    if layout == "channels_last" and x.ndim == 4:
        x, layer = x.contiguous(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    return layer, x


@pytest.mark.gpu
@WAYS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REAL)
def test_real_layer(name, dtype, layout, way, poison):  # noqa: F811
    """Against the reference in float64, within a few times the reference's own error in the same dtype."""
    layer, x = real_layer(name, dtype, layout)
    oracle, plain = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    oracle.backend = plain.backend = "reference"
    with convolution.use(way):
        actual = train_step(layer, x)
    expected, by_torch = train_step(oracle, x.double()), train_step(plain, x)
    for a, p, e in zip(actual, by_torch, expected, strict=True):
        floor = F32_TOLERANCE if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert difference(a, e) <= 4 * difference(p, e) + floor


@pytest.mark.gpu
@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet_3x3", "resnet_1x1", "depthwise"])
def test_real_layer_has_the_same_bits_twice(name, dtype, way):
    results = []
    torch.backends.cudnn.deterministic = True  # the library's own convolutions are only then
    try:
        for _ in range(2):
            layer, x = real_layer(name, dtype, "channels_last")
            with convolution.use(way):
                results.append(train_step(layer, x))
    finally:
        torch.backends.cudnn.deterministic = False
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("start", [2, 24, 25], ids=["early", "fresh", "stale"])
def test_real_layer_in_a_cuda_graph(start):
    """Nothing waits for the device, whatever the kind of step; of a fresh one the output is the batch's alone."""
    layer, x = real_layer("resnet_3x3", torch.bfloat16, "channels_last")
    layer.stats_interval = 4
    layer._set_steps(start)
    x.requires_grad_()

    def step():
        y = layer(x)
        return y, torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), convolution.use("triton"):
        expected = step()
    layer._set_steps(start)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with convolution.use("triton"), torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(captured[1], expected[1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [1, 3])
def test_real_layer_saves_its_input_alone(kernel):
    case = Case("saved", (32, 64, 56, 56), out=64, kernel=kernel, padding=kernel // 2, layout="channels_last")
    x, others, _ = saved_bytes(case, "cuda")
    assert others < x / 2
