"""Models that are recorded instead of computed: torch.fx, torch.jit, the legacy ONNX export, fake tensors, make_fx."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tdeconv
from helpers import assert_close, train_step
from tdeconv import ChannelDeconv, Delinear, FastDeconv, FastDeconv1d, FastDeconv3d, fuse_deconv_eval
from tdeconv.distributed import StatisticsGroup
from tdeconv.vision import torchvision

F32 = 1e-5  # the same operations in another order or library, in float32

# a layer and an input; the sizes that follow the channels may grow afterwards
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: FastDeconv1d(3, 4, 3, stride=2), (2, 3, 12)),
    "2d": (lambda: FastDeconv(3, 4, 3, padding=1), (2, 3, 9, 9)),
    "3d": (lambda: FastDeconv3d(3, 4, 2), (2, 3, 5, 5, 5)),
    "1x1": (lambda: FastDeconv(4, 4, 1, block=2, freeze=True, freeze_iter=1), (2, 4, 6, 6)),
    "groups": (lambda: FastDeconv(4, 4, 3, groups=2, bias=False), (2, 4, 9, 9)),
    "reflect": (lambda: FastDeconv(3, 4, (2, 3), padding="same", padding_mode="reflect"), (2, 3, 9, 9)),
    "linear": (lambda: Delinear(6, 4, block=3), (5, 6)),
    "rows": (lambda: Delinear(6, 4), (2, 5, 6)),
    "channels": (lambda: ChannelDeconv(4), (3, 8, 5, 5)),
    "channels left over": (lambda: ChannelDeconv(4), (3, 6, 5, 5)),
    "channels of rows": (lambda: ChannelDeconv(4), (8, 6)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


def trained(name: str) -> tuple[nn.Module, Tensor]:
    """The layer after some training steps, in evaluation mode, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    for _ in range(3):
        layer(torch.randn(shape) + 1)
    return layer.eval(), torch.randn(shape)


def larger(x: Tensor) -> Tensor:
    """An input of another batch size, and another image size."""
    rows = x.ndim == 3 and x.shape[-1] == 6  # (..., features)
    shape = (x.shape[0] + 3, x.shape[1] + 2, 6) if rows else (x.shape[0] + 3, x.shape[1], *(n + 3 for n in x.shape[2:]))
    return torch.randn(shape)


# ---------------------------------------------------------------------------------------------------------- torch.fx


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_one_operation_to_torch_fx(name: str, training: bool) -> None:
    layer, x = trained(name)
    model = nn.Sequential(nn.Identity(), layer, nn.ReLU()).train(training)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert_close(train_step(traced, x), train_step(model, x), 0)


def test_a_traced_model_can_be_pickled_and_changes_its_mode() -> None:
    layer, x = trained("2d")
    traced = pickle.loads(pickle.dumps(fx.symbolic_trace(nn.Sequential(layer))))
    assert torch.equal(traced(x), layer(x))
    assert not torch.equal(traced.train()(x), layer(x))


def test_torch_fx_says_how_to_trace_a_layer_alone() -> None:
    with pytest.raises(RuntimeError, match=r"cannot trace a FastDeconv alone.*torch.nn.Sequential\(layer\)"):
        fx.symbolic_trace(FastDeconv(3, 4, 3))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_torch_fx_refuses_hooks_that_would_run_twice(register: str) -> None:
    model = nn.Sequential(Delinear(3, 4))
    getattr(model[0], register)(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"forward hooks of the Delinear at '0' run twice.*remove them"):
        fx.symbolic_trace(model)


class Functions(nn.Module):
    """The package's functions, called on tensors that torch.fx replaces by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.linear = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        mean, cov = tdeconv.patch_moments(x, 3, stride=2)
        root = tdeconv.inverse_sqrt(cov + 0.1 * torch.eye(27), method="eigh")
        weight, bias = tdeconv.fold_deconv(self.weight, None, mean, root)
        y = nn.functional.conv2d(x, weight, bias)
        z = tdeconv.fast_deconv(x=x, weight=self.weight, training=True)
        return tdeconv.delinear((y + z).mean((2, 3)), self.linear, training=True)


def test_a_function_is_one_operation_to_torch_fx() -> None:
    torch.manual_seed(0)
    model, x = Functions(), torch.randn(6, 3, 9, 9)
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    for function in (tdeconv.patch_moments, tdeconv.inverse_sqrt, tdeconv.fold_deconv, tdeconv.fast_deconv):
        assert called.count(function) == 1
    assert torch.equal(traced(x), model(x))


def test_torchvisions_feature_extractor_knows_the_layers_by_their_names() -> None:
    models = torchvision().models
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    model = models.resnet18(num_classes=5)
    names = extraction.get_graph_node_names(model)[0]
    tdeconv.convert_deconv(model, linear=True)
    assert set(extraction.get_graph_node_names(model)[0]) <= set(names)
    wanted = ["conv1", "layer2.0.downsample.0", "fc"]
    seen: dict[str, Tensor] = {}
    extractor = extraction.create_feature_extractor(model, wanted).eval()
    for name in wanted:
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    x = torch.randn(4, 3, 64, 64)
    model.eval()(x)
    features = extractor(x)
    assert all(torch.equal(features[name], seen[name]) for name in wanted)
    assert {tuple(f.shape) for f in extractor.train()(x).values()} == {tuple(f.shape) for f in seen.values()}


def test_timms_feature_graph_takes_the_layers() -> None:
    torchvision()
    timm = pytest.importorskip("timm")
    from timm.models._features_fx import FeatureGraphNet  # noqa: PLC0415  # after torchvision, which timm imports

    model = tdeconv.convert_deconv(timm.create_model("resnet18", num_classes=5)).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = FeatureGraphNet(model, out_indices=(1, 4)).eval()(x)
    assert torch.equal(maps[-1], model.forward_features(x))


# ------------------------------------------------------------------------------------------- TorchScript, legacy ONNX


@every_layer
@pytest.mark.parametrize("folded", [False, True])
def test_jit_trace_in_evaluation_serves_inputs_of_any_size(name: str, folded: bool) -> None:
    layer, x = trained(name)
    traced = torch.jit.trace(fuse_deconv_eval(layer) if folded else layer, (x,))
    for y in (x, larger(x)):
        assert_close(traced(y), layer(y), F32)


@every_layer
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Constant folding - Only steps=1 can be constant folded")  # torch's own padding
def test_the_legacy_onnx_export_in_evaluation_serves_inputs_of_any_size(name: str) -> None:
    layer, x = trained(name)
    file, axes = io.BytesIO(), {axis: f"axis{axis}" for axis in range(x.ndim) if larger(x).shape[axis] != x.shape[axis]}
    torch.onnx.export(layer, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": axes})
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for z in (x, larger(x)):
        (y,) = session.run(None, {"x": z.numpy()})
        assert_close(torch.from_numpy(np.asarray(y)), layer(z), 1e-4)


def test_jit_trace_records_the_functions() -> None:
    torch.manual_seed(0)
    x, weight, eye = torch.randn(6, 4, 9, 9), torch.randn(4, 4, 3, 3), torch.eye(18)

    def whole(x: Tensor) -> Tensor:
        statistics = torch.ones(36), eye.expand(2, 18, 18)
        return tdeconv.fast_deconv(x, weight[:, :2], None, *statistics, training=False, groups=2)

    def stages(x: Tensor) -> Tensor:
        mean, cov = tdeconv.patch_moments(x, 3, block=2, backend="reference")
        root = tdeconv.inverse_sqrt(cov + 0.1 * eye, backend="reference")
        return nn.functional.conv2d(x, *tdeconv.fold_deconv(weight, None, mean, root))

    more = larger(x)
    assert_close(torch.jit.trace(whole, (x,))(more), whole(more), F32)
    assert_close(torch.jit.trace(stages, (x,))(more), stages(more), F32)


@every_layer
def test_jit_trace_in_training_says_what_to_do(name: str) -> None:
    layer, x = trained(name)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record .* in training mode.*model.eval\(\)"):
        torch.jit.trace(layer.train(), (x,))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@every_layer
def test_jit_script_says_what_to_do_and_that_works(name: str) -> None:
    layer, x = trained(name)
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile .*fuse_deconv_eval\(model.eval\(\)\)"):
        torch.jit.script(nn.Sequential(layer))
    more = larger(x)
    assert_close(torch.jit.script(fuse_deconv_eval(layer))(more), layer(more), F32)


# ---------------------------------------------------------------------------------- fake tensors and other recorders


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_a_step_of_fake_tensors_gives_shapes_and_reads_nothing(name: str, training: bool) -> None:
    make, shape = LAYERS[name]
    expected = train_step(make().train(training), torch.randn(shape))
    with FakeTensorMode():
        layer, x = make().train(training), torch.randn(shape)
        for _ in range(3):  # a freezing layer's phases
            found = train_step(layer, x)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        assert f is None or (f.shape, f.dtype, f.stride()) == (e.shape, e.dtype, e.stride())


@pytest.mark.parametrize("name", ["2d", "1x1", "linear", "channels left over"])
def test_a_step_of_fake_tensors_over_many_processes(name: str) -> None:
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=fake_pg.FakeStore())
    try:
        make, shape = LAYERS[name]
        with FakeTensorMode():
            layer, x = make(), torch.randn(shape)
            layer.process_group = StatisticsGroup.of(None)
            for _ in range(3):
                y, grad, *_ = train_step(layer, x)
        assert (y.shape, grad.shape) == (make()(torch.randn(shape)).shape, torch.Size(shape))
    finally:
        torch.distributed.destroy_process_group()


@every_layer
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("training", [True, False])
def test_make_fx_records_a_layer(name: str, mode: Any, training: bool) -> None:
    layer, x = trained(name)
    layer.train(training)
    recorded = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert_close(recorded(x), layer(x), F32)


class Doubled(FastDeconv):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("how", ["subclass", "patched"])
def test_a_forward_of_its_own_is_refused_not_run_twice(how):
    layer = Doubled(3, 4, 3) if how == "subclass" else FastDeconv(3, 4, 3)
    if how == "patched":
        own = layer.forward
        layer.forward = lambda input: 2 * own(input)
    model = nn.Sequential(layer).eval()
    with pytest.raises(RuntimeError, match="at '0' twice, which has a forward of its own"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(ValueError, match="its layer '0' has a forward of its own, which would be lost"):
        tdeconv.fuse_deconv_eval(model)
