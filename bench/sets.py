"""What can be asked for: sets of layers, stages, networks and sweeps, and how often each is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from tdeconv.bench.cases import NETWORKS, Layer
from tdeconv.bench.implementations import NAMES
from tdeconv.bench.nets import Network
from tdeconv.bench.scaling import AXES

SETS = ("quick", "layers", "models", "scaling", "model")
MODELS = ("vgg11", "resnet18", "resnet50", "mobilenet_v2")
BATCH = {"vgg11": 128, "resnet50": 64}  # of the layers, on a CPU
LAYER_SIZE = {"vgg11": 32, "resnet50": 64}  # the images that they come from
MODEL_BATCH, MODEL_SIZE = 16, 128  # of whole networks, on a CPU
GPU_BATCH, GPU_SIZE = 64, 224


@dataclass(frozen=True)
class Options:
    """What the command line may change; None: the set's own."""

    batch: int | None = None
    size: int | None = None
    rounds: int | None = None
    model: str | None = None
    blocks: tuple[int, ...] | None = None
    intervals: tuple[int, ...] | None = None
    layouts: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    oracle: str | None = None


@dataclass(frozen=True)
class Plan:
    """A set on a device: ``layers`` and ``stages`` by name, each with its batch."""

    name: str
    layers: dict[str, tuple[Layer, int]] = field(default_factory=dict)
    stages: dict[str, tuple[Layer, int]] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    sweeps: dict[str, tuple[Layer, int]] = field(default_factory=dict)
    implementations: tuple[str, ...] = ()  # of layers and sweeps; none: all that can run
    network_implementations: tuple[str, ...] = ()
    stage_implementations: tuple[str, ...] = ("reference", "torch", "triton")
    layouts: tuple[str, ...] = ("contiguous", "channels_last")
    dtypes: tuple[str, ...] = ("float32",)
    intervals: tuple[int, ...] = (10,)  # over which the mean of fresh and stale steps is reported
    rounds: int = 12
    oracle: str = "float64"


def plan(name: str, device: torch.device, options: Options) -> Plan:
    """The set of that name.

    Raises:
        ValueError: ``name`` is none of ``SETS``, or ``"model"`` without a model.
    """
    if name not in SETS:
        raise ValueError(f"set must be one of {', '.join(SETS)}, got {name!r}")
    made = _PLANS[name](device.type == "cuda", options)
    keys = ("layouts", "dtypes", "intervals", "rounds", "oracle")
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    return replace(made, name=name, **given)


def has_torchvision() -> bool:
    """Whole networks are its; layers do without."""
    return importlib.util.find_spec("torchvision") is not None


def _layers(gpu: bool, options: Options, names: tuple[str, ...]) -> dict[str, tuple[Layer, int]]:
    found = {}
    for name in names:
        size = options.size or (GPU_SIZE if gpu else LAYER_SIZE[name])
        batch = options.batch or (GPU_BATCH if gpu else BATCH[name])
        for layer in NETWORKS[name](size):
            if options.blocks is None:
                found[f"{name} {layer.name}"] = (layer, batch)
            for block in options.blocks or ():  # as layers of as many networks
                network = f"{name} block {block}"
                found[f"{network} {layer.name}"] = (replace(layer, network=network, block=block), batch)
    return found


def _networks(names: Sequence[str], gpu: bool, options: Options) -> dict[str, Network]:
    """Each of the names, in each of the blocks asked for."""
    batch, size = (
        options.batch or (GPU_BATCH if gpu else MODEL_BATCH),
        options.size or (GPU_SIZE if gpu else MODEL_SIZE),
    )
    return {
        name if block is None else f"{name} block {block}": Network(name, batch, size, block)
        for name in names
        for block in options.blocks or (None,)
    }


def _quick(gpu: bool, options: Options) -> Plan:
    layers = _layers(gpu, options, ("vgg11",))
    shown = [name for name in NAMES if gpu or "compiled" not in name]  # compiling takes a minute
    return Plan(
        "quick",
        layers=layers,
        stages=layers,
        networks=_networks(["resnet18"], gpu, options) if has_torchvision() else {},
        implementations=tuple(shown),
        network_implementations=tuple(name for name in shown if name != "reference"),
        stage_implementations=("torch", "triton"),
        layouts=_native(gpu),
        dtypes=_dtypes(gpu),
        rounds=5,
        oracle="float32",
    )


def _all_layers(gpu: bool, options: Options) -> Plan:
    layers = _layers(gpu, options, ("vgg11", "resnet50"))
    stages = {name: case for name, case in layers.items() if name.startswith("vgg11")}
    layouts = _native(gpu) if gpu else Plan.layouts
    return Plan("layers", layers=layers, stages=stages, layouts=layouts, dtypes=_dtypes(gpu))


def _models(gpu: bool, options: Options) -> Plan:
    networks = _networks(MODELS, gpu, options)
    return Plan("models", networks=networks, layouts=_native(gpu), dtypes=_dtypes(gpu), rounds=6)


def _model(gpu: bool, options: Options) -> Plan:
    if options.model is None:
        raise ValueError("the set 'model' needs the name of a model")
    networks = _networks([options.model], gpu, options)
    return Plan("model", networks=networks, layouts=_native(gpu), dtypes=_dtypes(gpu), rounds=6)


def _scaling(gpu: bool, options: Options) -> Plan:
    sweeps = {f"{axis} {value}": (layer, batch) for axis, cases in AXES.items() for value, layer, batch in cases}
    shown = ("conv_bn_relu", "torch", "triton")
    return Plan("scaling", sweeps=sweeps, implementations=shown, layouts=("contiguous",), rounds=5)


def _native(gpu: bool) -> tuple[str, ...]:
    return ("channels_last",) if gpu else ("contiguous",)


def _dtypes(gpu: bool) -> tuple[str, ...]:
    return ("bfloat16",) if gpu else ("float32",)


_PLANS = {"quick": _quick, "layers": _all_layers, "models": _models, "scaling": _scaling, "model": _model}
