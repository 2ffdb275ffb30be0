"""fuse_deconv_eval: the same outputs from plain layers, exported, compiled, and the original left alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close
from tdeconv.channel_deconv import ChannelDeconv
from tdeconv.fuse import fuse_deconv_eval
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d

F32 = 1e-5
F64 = 1e-12
DECONVS = (FastDeconv, FastDeconv1d, FastDeconv3d, Delinear, ChannelDeconv)


def trained(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The model in evaluation mode with running statistics of a few batches, and another batch."""
    torch.manual_seed(0)
    mix = torch.randn(shape[1], shape[1])
    model = model.to(dtype).train()
    for _ in range(3):
        model(torch.einsum("nc...,cd->nd...", torch.randn(shape), mix).to(dtype) + 1)
    return model.eval(), torch.randn(shape).to(dtype)


def net() -> nn.Module:
    """Every kind of layer."""
    return nn.Sequential(
        FastDeconv(3, 16, 3, padding=1, n_iter=10, freeze=True),
        nn.ReLU(),
        FastDeconv(16, 16, 3, padding="same", groups=4),
        ChannelDeconv(6),
        nn.ReLU(),
        FastDeconv(16, 8, 1, block=4),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        Delinear(32, 5, block=8),
    )


LAYERS: dict[str, tuple[Any, type[nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: FastDeconv1d(6, 4, 5, stride=2, padding=2), nn.Conv1d, (4, 6, 31)),
    "2d": (
        lambda: FastDeconv(6, 4, (3, 5), stride=(1, 2), padding=(1, 0), dilation=(2, 1), block=3),
        *(nn.Conv2d, (4, 6, 12, 13)),
    ),
    "3d": (lambda: FastDeconv3d(3, 4, 3, padding=1), nn.Conv3d, (4, 3, 7, 8, 9)),
    "no bias": (lambda: FastDeconv(3, 4, 3, bias=False), nn.Conv2d, (4, 3, 12, 12)),
    "same": (lambda: FastDeconv(3, 4, (5, 3), padding="same"), nn.Conv2d, (4, 3, 12, 12)),
    "uneven same": (lambda: FastDeconv(3, 4, (4, 3), padding="same"), nn.Conv2d, (4, 3, 12, 12)),
    "reflect": (lambda: FastDeconv(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d, (4, 3, 12, 12)),
    "padded 1x1": (lambda: FastDeconv(8, 4, 1, padding=1, block=4), nn.Conv2d, (4, 8, 12, 12)),
    "groups": (lambda: FastDeconv(8, 4, 3, groups=2), nn.Conv2d, (4, 8, 12, 12)),
    "depthwise": (lambda: FastDeconv(4, 8, 3, groups=4, n_iter=1), nn.Conv2d, (4, 4, 12, 12)),
    "contiguous": (lambda: FastDeconv(8, 4, 3, block=4, grouping="contiguous"), nn.Conv2d, (4, 8, 12, 12)),
    "linear": (lambda: Delinear(12, 5, block=4), nn.Linear, (16, 12)),
    "linear without bias": (lambda: Delinear(12, 5, bias=False), nn.Linear, (16, 12)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, F32), (torch.float64, F64)], ids=["f32", "f64"])
@pytest.mark.parametrize(("make", "kind", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_layer_becomes_the_plain_layer_it_equals(
    make: Any, kind: type[nn.Module], shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    layer, x = trained(make(), *shape, dtype=dtype)
    plain = fuse_deconv_eval(layer)
    assert type(plain) is kind
    assert plain.bias is not None
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert not plain.training
    assert_close(plain(x), layer(x), tolerance)


@pytest.mark.parametrize("shape", [(6, 12, 7, 7), (6, 13, 7, 7), (6, 5, 2, 2), (9, 12), (9, 13)])
def test_channel_deconv_becomes_plain_operations(shape: tuple[int, ...]) -> None:
    layer, x = trained(ChannelDeconv(4), *shape)
    plain = fuse_deconv_eval(layer)
    assert not isinstance(plain, ChannelDeconv)
    assert plain(x).shape == x.shape
    assert_close(plain(x), layer(x), F32)


def test_half_precision_weights_stay_so() -> None:
    layer, x = trained(FastDeconv(4, 8, 3), 4, 4, 12, 12, dtype=torch.bfloat16)
    plain = fuse_deconv_eval(layer)
    assert plain.weight.dtype == plain.bias.dtype == torch.bfloat16
    assert_close(plain(x), layer(x), 0.02)


def test_network_is_folded_and_the_original_left_alone() -> None:
    model, x = trained(net(), 4, 3, 16, 16)
    state, before = copy.deepcopy(model.state_dict()), model(x)
    plain = fuse_deconv_eval(model)
    assert not any(isinstance(m, DECONVS) for m in plain.modules())
    assert_close(plain(x), before, F32)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            tensor.zero_()
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sum(isinstance(m, DECONVS) for m in model.modules()) == 5


def test_layers_used_twice_stay_one_wherever_they_are_referred_to() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = FastDeconv(4, 4, 3, padding=1)
            self.b = self.a
            self.listed = [self.a]

        def forward(self, x: Tensor) -> Tensor:
            return self.listed[0](self.b(self.a(x)))

    model, x = trained(Twice(), 4, 4, 12, 12)
    plain = fuse_deconv_eval(model)
    assert type(plain.a) is nn.Conv2d
    assert plain.a is plain.b is plain.listed[0]
    assert_close(plain(x), model(x), F32)


def test_gradients_are_wanted_where_they_were() -> None:
    layer = FastDeconv(3, 4, 3).eval()
    assert fuse_deconv_eval(layer).weight.requires_grad
    layer.requires_grad_(False)
    assert not any(p.requires_grad for p in fuse_deconv_eval(layer).parameters())
    with torch.inference_mode():
        assert not fuse_deconv_eval(layer).weight.is_inference()


def test_model_without_deconvolution_layers_is_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    plain = fuse_deconv_eval(model)
    assert plain[0] is not model[0]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(plain(x), model(x))


def test_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be in evaluation mode, but its layer '0' is .*call model.eval"):
        fuse_deconv_eval(net())
    model = net().eval()
    model[-1].train()
    with pytest.raises(ValueError, match="its layer '8' is in training mode"):
        fuse_deconv_eval(model)
    model.eval().training = True
    with pytest.raises(ValueError, match="but it is in training mode"):
        fuse_deconv_eval(model)


@pytest.mark.filterwarnings("ignore:.*jit.script.*")
def test_what_is_no_model_is_refused() -> None:
    for model in (None, torch.jit.script(nn.Sequential(nn.ReLU()))):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module that is not scripted"):
            fuse_deconv_eval(model)


# -------------------------------------------------------------------------------------------------------- deployment


def test_folded_model_exports_without_this_package() -> None:
    model, x = trained(net(), 4, 3, 16, 16)
    plain = fuse_deconv_eval(model)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: batch},))
    assert "tdeconv" not in str(program.graph)
    assert_close(program.module()(x), model(x), F32)
    assert_close(program.module()(x[:3]), model(x[:3]), F32)


# torch's exporter warns of its own deprecated functions
quiet = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", "ignore:Exporting a model while it is in training"
)


def to_onnx(model: nn.Module, x: Tensor) -> Any:
    return torch.onnx.export(model, (x,), dynamo=True, verbose=False)


@quiet
def test_folded_model_runs_in_onnxruntime() -> None:
    model, x = trained(net(), 4, 3, 16, 16)
    file = io.BytesIO()
    to_onnx(fuse_deconv_eval(model), x).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(np.asarray(y)), model(x), 1e-4)


@quiet
def test_onnx_export_of_an_unfolded_model_in_training_names_the_way_out() -> None:
    model, x = trained(net(), 4, 3, 16, 16)
    with pytest.raises(Exception, match="fuse_deconv_eval"):  # torch's exporter wraps the error in one of its own
        to_onnx(model.train(), x)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_folded_model_compiles_as_one_graph(backend: str) -> None:
    model, x = trained(net(), 4, 3, 16, 16)
    compiled = torch.compile(fuse_deconv_eval(model), fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_close(compiled(x), model(x), 1e-4)
