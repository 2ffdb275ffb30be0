"""fuse_deconv_eval: the same outputs from plain layers, exported, compiled, and the original left alone."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from helpers import assert_close, randn
from tdeconv.channel_deconv import ChannelDeconv
from tdeconv.fuse import _OF_A_CALL, fuse_deconv_eval
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


# -------------------------------------------------------------------------------------------------- forwards of its own


class Causal(FastDeconv1d):
    """Sees no later sample."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (2, 0)))


class Padded(FastDeconv):
    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return nn.functional.pad(x, (1, 1, 1, 1)), (0, 0)


class Called(FastDeconv):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Scaled(Delinear):
    def _forward(self, x: Tensor) -> Tensor:
        return 2 * super()._forward(x)


class Shifted(ChannelDeconv):
    def _apply_statistics(self, *args: Any) -> Tensor:
        return super()._apply_statistics(*args) + 1


def patched(layer: nn.Module, method: str) -> nn.Module:
    own = getattr(layer, method)
    setattr(layer, method, lambda x: 2 * own(x))
    return layer


OWN: dict[str, Any] = {
    "forward": lambda: Causal(4, 4, 3),
    "_pad": lambda: Padded(4, 4, 3),
    "__call__": lambda: Called(4, 4, 3),
    "_forward": lambda: Scaled(4, 4),
    "_apply_statistics": lambda: Shifted(4),
    "patched forward": lambda: patched(FastDeconv3d(4, 4, 3), "forward"),
    "patched _forward": lambda: patched(Delinear(4, 4), "_forward"),
    "patched _call_impl": lambda: patched(ChannelDeconv(4), "_call_impl"),
}


@pytest.mark.parametrize("way", OWN)
def test_layer_with_a_forward_of_its_own_is_refused(way: str) -> None:
    layer = OWN[way]()
    base = next(kind for kind in DECONVS if isinstance(layer, kind)).__name__
    means = f"its layer '1.0' has a forward of its own.* another {way.rpartition(' ')[2]}; .* a module around a {base}"
    with pytest.raises(ValueError, match=means):
        fuse_deconv_eval(nn.Sequential(nn.ReLU(), nn.Sequential(layer)).eval())


@pytest.mark.parametrize("make", [lambda: FastDeconv(4, 4, 3), lambda: Delinear(4, 4), lambda: ChannelDeconv(3)])
def test_whatever_a_call_in_evaluation_runs_is_looked_at(make: Any) -> None:
    layer, called = make().eval(), set()
    x = torch.randn(2, 4) if isinstance(layer, Delinear) else torch.randn(2, 4, 8, 8)

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_locals.get("self") is layer:
            called.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    attributes = {"__getattr__", "_wrapped_call_impl", "momentum", "named_buffers", "_named_members", "named_modules"}
    assert {"forward", "_forward"} <= called
    assert {name for name in called - attributes if not name.startswith("<")} <= set(_OF_A_CALL)


def test_module_around_a_layer_keeps_what_it_does() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = FastDeconv1d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(nn.functional.pad(x, (2, 0)))

    model, x = trained(Around(), 4, 4, 16)
    assert fuse_deconv_eval(model)(x).shape == (4, 4, 16)
    assert_close(fuse_deconv_eval(model)(x), model(x), F32)


def test_subclass_that_calls_as_its_parent_does_is_folded() -> None:
    class Narrow(FastDeconv):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, block=2)

        def extra_repr(self) -> str:
            return "narrow"

    layer, x = trained(Narrow(4, 4, 3), 4, 4, 12, 12)
    plain = fuse_deconv_eval(layer)
    assert type(plain) is nn.Conv2d
    assert_close(plain(x), layer(x), F32)


@pytest.mark.parametrize(("mode", "padding"), [("zeros", (2, 0)), ("zeros", 2), ("reflect", (0, 0))])
def test_padding_that_was_set_later_is_what_torch_makes_of_it(mode: str, padding: Any) -> None:
    layer, x = trained(FastDeconv(3, 4, 3, padding=1, padding_mode=mode), 4, 3, 8, 8)
    torchs = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    layer.padding = torchs.padding = padding
    assert layer(x).shape == torchs(x).shape
    assert_close(fuse_deconv_eval(layer)(x), layer(x), F32)


# ----------------------------------------------------------------------------------------------------- computed weights


def pruned(layer: nn.Module) -> nn.Module:
    for amount in (0.3, 0.5):  # the second makes a container of both
        prune.random_unstructured(layer, "weight", amount)
    return prune.l1_unstructured(layer, "bias", 2)


BY_HOOK: dict[str, tuple[Any, set[str]]] = {
    "weight_norm": (weight_norm, {"weight_g", "weight_v", "bias"}),
    "spectral_norm": (spectral_norm, {"weight_orig", "bias"}),
    "pruning": (pruned, {"weight_orig", "bias_orig"}),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:.*spectral_norm.* is deprecated")
@pytest.mark.parametrize("since", ["after a step", "loaded"])
@pytest.mark.parametrize(
    "make", [lambda: FastDeconv(4, 6, 3, groups=2), lambda: Delinear(4, 6)], ids=["conv", "linear"]
)
@pytest.mark.parametrize("how", BY_HOOK)
def test_weight_that_a_hook_computes_is_the_one_a_call_would_use(how: str, make: Any, since: str) -> None:
    compute, names = BY_HOOK[how]
    torch.manual_seed(0)
    shape = (16, 4) if isinstance(make(), Delinear) else (4, 4, 12, 12)
    layer, x = trained(compute(make()), *shape, dtype=torch.float64)
    model = nn.Sequential(layer).eval()
    assert {name.removeprefix("0.") for name, _ in model.named_parameters()} == names
    if since == "loaded":
        state = {key: value if key.endswith("_mask") else value + 0.5 for key, value in model.state_dict().items()}
        model.load_state_dict(state)
    else:
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    before = copy.deepcopy(model.state_dict()), layer.weight
    plain = fuse_deconv_eval(model)
    assert layer.weight is before[1]  # folding leaves the stale one where it is
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert plain.state_dict().keys() == {"0.weight", "0.bias"}
    assert not plain[0]._forward_pre_hooks
    assert all(p.requires_grad for p in plain.parameters())
    assert_close(plain(x), model(x), F64)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weight_is_computed_and_wants_gradients_as_its_originals_do(how: str) -> None:
    layer, x = trained(getattr(parametrizations, how)(FastDeconv(4, 6, 3)), 4, 4, 12, 12, dtype=torch.float64)
    plain = fuse_deconv_eval(layer)
    assert type(plain) is nn.Conv2d
    assert plain.state_dict().keys() == {"weight", "bias"}
    assert plain.weight.requires_grad
    assert plain.bias.requires_grad
    assert plain.weight.is_leaf
    assert_close(plain(x), layer(x), F64)
    layer.parametrizations.requires_grad_(False)
    assert not fuse_deconv_eval(layer).weight.requires_grad
    assert fuse_deconv_eval(layer).bias.requires_grad
    layer.parametrizations.train()  # the power iteration of spectral_norm would go on
    with pytest.raises(ValueError, match=r"it is in training mode; call model.eval"):
        fuse_deconv_eval(layer)


def test_weight_that_another_hook_may_compute_is_refused() -> None:
    layer = FastDeconv(3, 4, 3).eval()
    raw = layer.weight
    del layer.weight
    layer.weight = raw.detach().clone()  # a constant, which nothing computes
    assert type(fuse_deconv_eval(layer)) is nn.Conv2d
    layer.raw = raw
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.raw.tanh()))
    means = "weight of layer '0' is no Parameter, and a forward pre-hook of the layer may compute it"
    with pytest.raises(ValueError, match=means):
        fuse_deconv_eval(nn.Sequential(layer).eval())


# ------------------------------------------------------------------------------------- what others registered on layers


class Hooked(nn.Module):
    """Hooks on its layer that change its input and output, and note in the model that they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = FastDeconv(4, 4, 3)
        self.layer.f = -1
        self.layer.owner = [self]
        self.calls: list[str] = []
        self.layer.register_forward_pre_hook(self.before, with_kwargs=True)
        self.layer.register_forward_hook(self.after, always_call=True)
        self.layer.register_full_backward_hook(self.backwards)

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append("before")
        return tuple(x + 1 for x in args), kwargs

    def after(self, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        self.calls.append("after")
        return 3 * y

    def backwards(self, _: nn.Module, gradients: Any, __: Any) -> Any:
        self.calls.append("backwards")
        return tuple(2 * g for g in gradients)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.layer.f == -1 else x


def test_hooks_and_attributes_of_a_layer_go_with_it() -> None:
    torch.manual_seed(0)
    model, x = Hooked().eval(), torch.randn(4, 4, 12, 12)
    gradients = []
    plain = fuse_deconv_eval(model)
    assert type(plain.layer) is nn.Conv2d
    assert plain.layer.f == -1
    assert plain.layer.owner == [plain]
    for m in (plain, model):
        m.calls.clear()
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.sum().backward()
        assert m.calls == ["before", "after", "backwards"]
        gradients.append((y, leaf.grad))
    assert_close(*gradients, 1e-4)
    handle = plain.layer.register_forward_pre_hook(lambda *_: None)  # has a number of its own
    handle.remove()
    assert len(plain.layer._forward_pre_hooks) == 1


# ------------------------------------------------------------------------------------- many processes, quantisers, LoRA


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


WAY_OUT = r"get_model_state_dict\(model, options=StateDictOptions\(full_state_dict=True\)\).* not sharded, and fold"


def test_sharded_model_is_refused_with_the_way_out_which_works(mesh: DeviceMesh) -> None:
    model, x = trained(net(), 4, 3, 16, 16)
    before = model(x)
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match=f"model is sharded by fully_shard .*{WAY_OUT}"):
        fuse_deconv_eval(model)
    model.unshard()
    with pytest.raises(TypeError, match=f"model is sharded by fully_shard .*{WAY_OUT}"):
        fuse_deconv_eval(nn.Sequential(model).eval())
    whole = net().eval()
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    assert_close(fuse_deconv_eval(whole)(x), before, F32)


def test_distributed_tensors_and_fsdp1_are_refused(mesh: DeviceMesh) -> None:
    model = nn.Sequential(FastDeconv(3, 4, 3)).eval()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
    with pytest.raises(TypeError, match=f"model is sharded into DTensor parameters.*{WAY_OUT}"):
        fuse_deconv_eval(model)
    # it cannot be made without an accelerator
    around = type("FullyShardedDataParallel", (nn.Sequential,), {})(FastDeconv(3, 4, 3))
    with pytest.raises(TypeError, match=f"model is sharded by .*FullyShardedDataParallel, .*{WAY_OUT}"):
        fuse_deconv_eval(nn.Sequential(around).eval())


def test_distributed_data_parallel_is_folded_or_told_to_give_its_module(mesh: DeviceMesh) -> None:
    model, x = trained(nn.Sequential(FastDeconv(3, 4, 3)), 4, 3, 12, 12)
    for wrapped in (nn.parallel.DistributedDataParallel(model), nn.DataParallel(model)):
        plain = fuse_deconv_eval(wrapped.eval())
        assert type(plain.module[0]) is nn.Conv2d
        assert_close(plain(x), model(x), F32)
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=dist.new_group([0]))
    with pytest.raises(TypeError, match=r"which torch cannot copy; fold the model inside, model.module"):
        fuse_deconv_eval(wrapped.eval())


class Quantised(Tensor):
    """A wrapper around a tensor that knows no arithmetic but that of linear layers, as torchao's are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            return function(args[0], args[1].inner, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{function} of a quantised tensor")


def quantise(model: nn.Module) -> nn.Module:
    """What torchao's quantize_ does to every linear layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Quantised(module.weight.detach()), requires_grad=False)
    return model


def linear_net() -> nn.Module:
    return nn.Sequential(Delinear(12, 8, block=6), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_quantised_weight_is_refused_where_a_folded_one_is_not(training: bool) -> None:
    model, x = trained(linear_net(), 16, 12)
    assert_close(quantise(fuse_deconv_eval(model))(x), model(x), F32)
    quantise(model)
    means = r"must be a plain tensor, not the Quantised of a quantiser; .* after folding it: .*fuse_deconv_eval\(model"
    with pytest.raises(TypeError, match=f"weight of layer '0' {means}"):
        fuse_deconv_eval(model)
    with pytest.raises(TypeError, match=f"weight {means}"):
        model.train(training)(x)


@pytest.mark.filterwarnings("ignore:.*ao.quantization.*:DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantize_dynamic_leaves_a_layer_and_takes_it_folded() -> None:
    model, x = trained(linear_net(), 16, 12)
    half = quantize_dynamic(model, {nn.Linear})
    assert type(half[0]) is Delinear
    assert torch.equal(half[0](x), model[0](x))
    whole = quantize_dynamic(fuse_deconv_eval(model), {nn.Linear})
    assert not any(isinstance(m, nn.Linear) for m in whole)
    assert_close(whole(x), model(x), 0.05)  # of 8 bits


def test_adapter_is_merged_after_folding() -> None:
    class Lora(nn.Module):
        """As peft wraps every linear layer."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = layer
            self.down, self.up = nn.Linear(12, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.up(self.down(x))

        def merged(self) -> nn.Module:
            self.base_layer.weight.data += self.up.weight @ self.down.weight
            return self.base_layer

    model, x = trained(Lora(Delinear(12, 8, block=6)), 16, 12, dtype=torch.float64)
    expected = model(x)
    assert_close(fuse_deconv_eval(model)(x), expected, F64)
    assert_close(fuse_deconv_eval(model).merged()(x), expected, F64)


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


def test_methods_of_a_layer_that_the_model_holds_are_the_folded_layers() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = FastDeconv(3, 4, 3)
            self.calls = {"forward": self.conv.forward, "call": self.conv.__call__}

        def forward(self, x: Tensor) -> Tensor:
            return self.calls["forward"](x) + 2 * self.calls["call"](x)

    model = Bound().double()
    x = randn(5, 3, 7, 7)
    model(x)
    plain = fuse_deconv_eval(model.eval())
    assert type(plain.calls["forward"].__self__) is nn.Conv2d
    assert plain.calls["call"].__self__ is plain.conv
    assert model.calls["forward"].__self__ is model.conv
    assert_close(plain(x), model(x), 1e-12)
