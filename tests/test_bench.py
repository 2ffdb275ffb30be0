"""The benchmarks' machinery, on layers too small to time: what it measures and how is right."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tdeconv.backends import BackendUnavailable
from tdeconv.bench import cases, clock, implementations, machine, measure, nets, roofline, sets, stages, steps, suites
from tdeconv.bench.cases import Layer, activations
from tdeconv.bench.measure import Row, Variant
from tdeconv.vision import torchvision

CPU = torch.device("cpu")
TINY = Layer(8, 6, 7)
TINY_FIRST = Layer(3, 4, 7, kernel=5, stride=2, input_grad=False)
TINY_POINT = Layer(8, 6, 7, kernel=1, block=2, n_iter=3)
TINY_GROUPS = Layer(8, 6, 7, groups=2)
LAYERS = pytest.mark.parametrize("layer", [TINY, TINY_FIRST, TINY_POINT], ids=["hidden", "first", "point"])
MADE_UP = roofline.Ceilings(1e10, {torch.float32: 1e11, torch.bfloat16: 1e11}, 1e-6)
pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(implementations.why_not_compiled(CPU) is not None, reason="no C++ compiler")


class CountingClock:
    """Each mark is one second after the one before."""

    def __init__(self) -> None:
        self.mark: Callable[[], int] = itertools.count().__next__
        self.readied = 0

    def ready(self) -> None:
        self.readied += 1

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)


# ------------------------------------------------------------------------------------------------------ measuring


class _Tick:
    """A work of known cost."""

    def __init__(self, name: str, log: list[str], cost: float) -> None:
        self.name, self.log, self.cost = name, log, cost

    def run(self, clock: clock.Clock) -> dict[str, float]:
        self.log.append(self.name)
        return {"part": self.cost * self.log.count(self.name)}


def test_every_round_runs_each_work_once_in_changing_order() -> None:
    log: list[str] = []
    works = {name: _Tick(name, log, cost) for name, cost in (("a", 1.0), ("b", 10.0), ("c", 100.0))}
    counting = CountingClock()
    recorded = measure.interleaved(works, 9, clock=counting)
    rounds = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert len(rounds) == 9
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2
    assert recorded["b"]["part"] == [10.0 * i for i in range(1, 10)]
    assert counting.readied == 27


class _Pedantic:
    """What ``benchmark.pedantic`` does with the timer."""

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int, iterations: int) -> None:
        assert iterations == 1
        self.data = []
        for _ in range(rounds):
            setup()
            start = measure.recorded_clock()
            target()
            self.data.append(measure.recorded_clock() - start)


def test_replay_gives_the_recorded_durations() -> None:
    benchmark = _Pedantic()
    measure.replay(benchmark, [0.1, 0.3, 0.2])
    assert benchmark.data == [0.1, 0.3, 0.2]


def test_check_refuses_wrong_and_undefined_answers() -> None:
    good = torch.ones(4, dtype=torch.float64)
    assert measure.check("x", [good.float()], [good]) == 0
    with pytest.raises(AssertionError, match="x: relative errors"):
        measure.check("x", [good.float(), good.float() * 1.001], [good, good])
    with pytest.raises(AssertionError, match="nan"):
        measure.check("x", [torch.full((4,), torch.nan)], [good])


class _Event:
    """A CUDA event that was recorded at a time."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.waited = False

    def record(self, stream: object) -> None:
        _Event.now += 0.25
        self.at = _Event.now

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: _Event) -> float:
        assert end.waited  # CUDA refuses to tell before
        return 1e3 * (end.at - self.at)


def test_a_gpu_s_clock_waits_for_events_and_floods_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    properties = type("P", (), {"L2_cache_size": 64})
    for name, value in {
        "Event": _Event,
        "current_stream": lambda device: None,
        "synchronize": waited.append,
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = clock.CudaClock(CPU)
    found._flood.fill_(1)
    found.ready()
    assert found._flood.numel() == 128
    assert not found._flood.any()
    assert waited == [CPU]
    assert found.seconds(found.mark(), found.mark()) == 0.25


def test_there_is_no_clock_for_other_devices() -> None:
    assert isinstance(clock.clock_of(CPU), clock.CpuClock)
    with pytest.raises(ValueError, match="device must be a cpu or cuda device, got meta"):
        clock.clock_of(torch.device("meta"))


# ------------------------------------------------------------------------------------------------------------ cases


@pytest.mark.parametrize(("network", "convolutions", "parameters"), [("vgg11", 8, 9_217_728), ("resnet50", 53, None)])
def test_networks_have_all_their_convolutions(network: str, convolutions: int, parameters: int | None) -> None:
    layers = cases.NETWORKS[network](224)
    assert sum(layer.count for layer in layers) == convolutions
    assert [layer.input_grad for layer in layers] == [False] + [True] * (len(layers) - 1)
    weights = sum(layer.count * layer.in_channels * layer.out_channels * layer.kernel**2 for layer in layers)
    assert weights == (parameters or 23_454_912)  # ResNet-50's without the 2,048,000 of its last layer and batch norms
    assert layers[-1].out_size == (14 if network == "vgg11" else 7)


def test_layers_match_torchvision_s() -> None:
    model = torchvision().models.resnet50(weights=None).eval()
    seen: dict[tuple[int, ...], int] = {}

    def count(module: Any, inputs: Any, output: Any) -> None:
        key = (module.in_channels, module.out_channels, inputs[0].shape[-1], module.kernel_size[0], module.stride[0])
        seen[key] = seen.get(key, 0) + 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    ours = {(one.in_channels, one.out_channels, one.size, one.kernel, one.stride): one.count
            for one in cases.resnet50(64)}  # fmt: skip
    assert ours == seen


def test_activations_are_correlated_and_repeatable() -> None:
    x = activations(TINY, 16)
    assert x.shape == (16, 8, 7, 7)
    assert x.min() == 0
    assert activations(TINY_FIRST, 16).min() < 0
    assert torch.equal(x, activations(TINY, 16))
    left, right = x[..., :-1].flatten(), x[..., 1:].flatten()
    assert torch.corrcoef(torch.stack([left, right]))[0, 1] > 0.2


# ---------------------------------------------------------------------------------------------- layers and stages


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like the paper's repository; its layer is this project's."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "deconv.py").write_text("from tdeconv import FastDeconv\n", encoding="utf-8")
    return tmp_path


def _everyone(checkout: Path | None = None, compiled: bool = False) -> tuple[implementations.Implementation, ...]:
    return implementations.implementations(CPU, paper_code=checkout, compiled=compiled)


def _wanted(everyone: Any, dtype: str = "float32") -> list[tuple[implementations.Implementation, Variant]]:
    return [(one, Variant(one.name, layout, dtype)) for one in everyone for layout in one.layouts]


@LAYERS
def test_all_implementations_agree_and_are_timed(layer: Layer, checkout: Path) -> None:
    wanted = _wanted(_everyone(checkout))
    works = dict(steps.prepare(steps.problem(layer, 3), wanted))
    assert set(works) == {variant for _, variant in wanted}
    names = {"conv_bn_relu", "reference", "paper", "torch", "torch stale"}
    assert {variant.implementation for variant in works} == names
    for variant, prepared in works.items():
        assert 0 < prepared.info["error"] < measure.TOLERANCE
        assert prepared.info["shape"] == [3, layer.in_channels, 7, 7]
        assert 0 < prepared.info["allocations"] < 1000
        assert prepared.info["peak_bytes"] > prepared.info["saved_bytes"] > 0
        work: Any = prepared.work
        assert work.run(CountingClock()) == {"forward": 1, "step": 2}
        assert (work.x.grad is not None) == layer.input_grad
        assert work.grad.is_contiguous(memory_format=steps.FORMATS[variant.layout])


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stale_step_s_answers_are_those_of_an_evaluation_with_gradients(layer: Layer, dtype: torch.dtype) -> None:
    problem = steps.problem(layer, 3)
    method = "deconv" + implementations.STALE
    y, *grads = steps.oracle_answers(problem, method, dtype)
    module = copy.deepcopy(problem.modules[method]).to(dtype).eval()
    x = problem.x.to(dtype).requires_grad_(layer.input_grad)
    expected = module(x)
    expected.backward(problem.grad.to(dtype))
    wanted = [expected, *(t.grad for t in (x, *module.parameters()) if t.grad is not None)]
    statistics = [b for b in module.buffers() if b.is_floating_point()]
    for got, want in zip([y, *grads], [*wanted, *statistics], strict=True):
        torch.testing.assert_close(got, want)
    root = module[0].running_deconv
    assert not torch.equal(root, torch.eye(len(root), dtype=dtype))


def _of_name(name: str) -> implementations.Implementation:
    return next(one for one in _everyone() if one.name == name)


@pytest.mark.parametrize(("named", "method"), [("torch", "deconv stale"), ("torch stale", "deconv")])
def test_the_wrong_kind_of_step_is_not_timed(named: str, method: str, network: nets.Network) -> None:
    one = replace(_of_name(named), method=method)
    with pytest.raises(AssertionError, match=f"{named}: relative errors"):
        list(steps.prepare(steps.problem(TINY, 3), _wanted([one])))
    with pytest.raises(AssertionError, match=f"{named}: relative errors"):
        list(nets.prepare(nets.problem(network), _wanted([one])))


def test_steps_are_of_their_kind_in_every_round() -> None:
    """However many there are, and whatever freezes."""
    works = dict(steps.prepare(steps.problem(TINY, 3), _wanted([_of_name("torch"), _of_name("torch stale")])))
    for variant, prepared in works.items():
        work: Any = prepared.work
        work.module[0].freeze_iter, work.module[0].freeze = 1, True
        root = work.module[0].running_deconv.clone()
        for _ in range(4):
            before = work.module[0].running_deconv.clone()
            work.run(clock.CpuClock())
            assert torch.equal(before, work.module[0].running_deconv) == variant.implementation.endswith("stale")
        assert torch.equal(root, work.module[0].running_deconv) == variant.implementation.endswith("stale")
    fresh, stale = (works[Variant(name, "contiguous", "float32")].info for name in ("torch", "torch stale"))
    # the input, the folded weight, and of D = 72 features the mean and the root's copy; the ReLU's output is not kept
    assert stale["saved_bytes"] == 4 * (3 * 8 * 49 + 6 * 72 + 72 + 72 * 72)
    assert stale["saved_bytes"] < fresh["saved_bytes"]
    assert stale["allocations"] < fresh["allocations"]


def test_what_is_near_the_relu_s_jump_gets_no_gradient() -> None:
    problem = steps.problem(TINY, 3)
    for method in problem.modules:
        masked = steps.away_from_zero(problem, method, torch.bfloat16)
        kept = masked.grad != 0
        assert 0.85 < kept.float().mean() < 0.97  # 92% of normal values are beyond a tenth of their deviation
        assert torch.equal(masked.grad[kept], problem.grad[kept])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_may_be_as_wrong_as_the_plain_code(dtype: str) -> None:
    works = dict(steps.prepare(steps.problem(TINY, 3), _wanted(_everyone(), dtype)))
    assert all(1e-4 < prepared.info["error"] < 0.1 for prepared in works.values())
    work: Any = next(iter(works.values())).work
    assert work.x.dtype == getattr(torch, dtype)
    assert next(work.module.parameters()).dtype == torch.float32


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_are_compiled_however_many_there_are() -> None:
    everyone = [one for one in _everyone(compiled=True) if one.name == "conv_bn_relu_compiled"]
    torch._dynamo.reset()
    for size in range(5, 15):  # the compiler's limit for one code object is 8
        works = dict(steps.prepare(steps.problem(Layer(2, 2, size), 2), _wanted(everyone)))
        assert len(works) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 20


def test_an_implementation_with_wrong_answers_is_not_timed() -> None:
    def wrong(layer: Layer) -> nn.Module:
        module: Any = implementations.REFERENCE.build(layer)
        module[0].n_iter = 4
        return module

    one = implementations.Implementation("wrong", "deconv", wrong, copy.deepcopy)
    with pytest.raises(AssertionError, match="wrong: relative errors"):
        list(steps.prepare(steps.problem(TINY, 3), _wanted([one])))


@LAYERS
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_stages_are_timed_inside_a_step_that_is_right(layer: Layer, name: str) -> None:
    ((variant, prepared),) = stages.prepare(steps.problem(layer, 3), [name])
    assert variant == (name, "contiguous", "float32")
    seconds = prepared.work.run(clock.CpuClock())
    assert set(seconds) == set(stages.parts(name, layer))
    assert ("inverse_sqrt backward" in seconds) == layer.input_grad
    assert all(s > 0 for s in seconds.values())
    counted = prepared.work.run(CountingClock())
    assert counted["fold forward"] == 1  # a mark before and one behind


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_group_convolutions_are_not_cut_at_their_stages(name: str) -> None:
    with pytest.raises(ValueError, match="layer must have one group to be cut at its stages, got 8-6 3x3 in 2 groups"):
        list(stages.prepare(steps.problem(TINY_GROUPS, 3), [name]))
    assert len(dict(steps.prepare(steps.problem(TINY_GROUPS, 3), _wanted(_everyone())))) == 7


def test_a_stage_called_twice_counts_twice() -> None:
    counting: Any = CountingClock()
    watch = stages.Stopwatch(counting)
    module: Any = type("Stages", (), {"fold": lambda self: 5, "describe": lambda self: 6})()
    watched = stages.WatchedStages(module, watch.around)
    assert [watched.fold(), watched.fold(), watched.describe()] == [5, 5, 6]
    assert watch.seconds() == {"fold forward": 2.0}


def test_a_folder_without_the_paper_s_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no models.deconv\.py in"):
        _everyone(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="backend 'triton' was asked for"):
        implementations.implementations(CPU, backends=["triton"])


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in str(implementations.why_not_compiled(CPU))
    assert not any(one.compiled for one in implementations.implementations(CPU))


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> nets.Network:
    """Small, with a dropout and a depthwise layer."""

    def build(name: str, argument: str) -> nn.Module:
        assert (name, argument) == ("mine", "--model")
        return nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
            *(nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(100, 5)),
        )

    monkeypatch.setattr(nets, "load_model", build)
    return nets.Network("mine", 4, 9)


def test_networks_are_converted_checked_and_timed(network: nets.Network, checkout: Path) -> None:
    wanted = _wanted(_everyone(checkout))
    problem = nets.problem(network)
    works = dict(nets.prepare(problem, wanted))
    assert set(works) == {variant for _, variant in wanted}
    for variant, prepared in works.items():
        work: Any = prepared.work
        assert prepared.info["error"] < 1e-2  # four images make rounding large
        assert prepared.info["saved_bytes"] > 0
        assert prepared.info["shape"] == [4, 3, 9, 9]
        assert work.run(CountingClock()) == {"forward": 1, "step": 2}
        assert all(p.grad is None for p in work.model.parameters())
        has_norm = any(isinstance(m, nn.BatchNorm2d) for m in work.model.modules())
        assert has_norm == (variant.implementation == "conv_bn_relu")


def test_a_network_that_refuses_the_images_is_refused(network: nets.Network) -> None:
    with pytest.raises(ValueError, match=r"--model mine does not take images \(4, 3, 2, 2\)"):
        nets.problem(nets.Network("mine", 4, 2))


def test_a_network_with_wrong_outputs_is_not_timed(network: nets.Network) -> None:
    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        model: Any = implementations.REFERENCE.convert(model)
        model[0].eps = 1.0
        return model

    one = implementations.Implementation("wrong", "deconv", implementations.REFERENCE.build, wrong)
    with pytest.raises(AssertionError, match="wrong: relative errors"):
        list(nets.prepare(nets.problem(network), _wanted([one])))


# --------------------------------------------------------------------------------------------------- sets and suites


def _session(name: str, **options: Any) -> suites.Session:
    plan = sets.plan(name, CPU, sets.Options(**options))
    return suites.Session(plan, CPU, _everyone())


@pytest.mark.parametrize("name", sets.SETS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_set_has_rows_that_are_told_apart(name: str, device: str) -> None:
    plan = sets.plan(name, torch.device(device), sets.Options(model="timm:resnet18"))
    session = suites.Session(plan, torch.device(device), _everyone())
    rows = {test: list(suite.rows(session)) for test, suite in suites.BY_TEST.items()}
    assert sum(map(len, rows.values())) > 2
    assert all(len(set(mine)) == len(mine) for mine in rows.values())
    for test, mine in rows.items():
        for row in mine:
            about = suites.BY_TEST[test].about(session, row, MADE_UP)
            assert about["suite"] == test.removeprefix("test_")
            assert about["count"] > 0
            assert "kind" in about or "stage" in about
            assert about.get("floor_s", 1) > 0
    if device == "cuda":
        assert {row.dtype for row in rows["test_layer"]} <= {"bfloat16"}
        assert all(network.size == 224 for network in plan.networks.values())


def test_the_quick_set_compiles_on_gpus_only() -> None:
    for device, compiled in (("cpu", False), ("cuda", True)):
        plan = sets.plan("quick", torch.device(device), sets.Options())
        assert ("conv_bn_relu_compiled" in plan.implementations) == compiled
        assert ("conv_bn_relu_compiled" in plan.network_implementations) == compiled


def test_options_change_a_set() -> None:
    options = {"batch": 2, "size": 16, "rounds": 3, "layouts": ("channels_last",), "dtypes": ("bfloat16",)}
    session = _session("layers", **options)
    rows = list(suites.BY_TEST["test_layer"].rows(session))
    assert session.plan.rounds == 3
    assert {row.dtype for row in rows} == {"bfloat16"}
    # what exists in one layout only is measured in that one
    assert {(row.implementation, row.layout) for row in rows} == {
        ("conv_bn_relu", "channels_last"),
        ("torch", "channels_last"),
        ("torch stale", "channels_last"),
        ("reference", "contiguous"),
    }
    assert {batch for _, batch in session.plan.layers.values()} == {2}
    assert {layer.size for layer, _ in session.plan.layers.values() if not layer.input_grad} == {16}


def test_blocks_are_measured_side_by_side() -> None:
    options = {"blocks": (8, 32), "intervals": (4,), "model": "resnet18"}
    session = _session("layers", **options)
    case = "vgg11 block 8 256-256 3x3 at 8"
    assert {layer.block for layer, _ in session.plan.layers.values()} == {8, 32}
    assert session.plan.layers[case][0].block == 8
    row = Row(case, "torch stale", "contiguous", "float32", "step")
    about = suites.BY_TEST["test_layer"].about(session, row, MADE_UP)
    assert (about["network"], about["case"], about["stats_intervals"]) == (
        "vgg11 block 8",
        "256-256 3x3 at 8",
        [4],
    )
    fresh = suites.BY_TEST["test_layer"].about(session, row._replace(implementation="torch"), MADE_UP)
    assert "stats_intervals" not in fresh
    assert about["operations"] < fresh["operations"]
    networks = _session("model", **options).plan.networks
    assert networks == {f"resnet18 block {b}": nets.Network("resnet18", 16, 128, b) for b in (8, 32)}


def test_a_network_is_converted_in_the_block_asked_for(network: nets.Network) -> None:
    problem = nets.problem(replace(network, block=1))
    for one in (_of_name("torch"), _of_name("torch stale")):
        ((variant, prepared),) = nets.prepare(problem, [(one, Variant(one.name, "contiguous", "float32"))])
        work: Any = prepared.work
        assert work.model[0].block == 1, variant


def test_unknown_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="set must be one of quick, layers"):
        sets.plan("everything", CPU, sets.Options())
    with pytest.raises(ValueError, match="needs the name of a model"):
        sets.plan("model", CPU, sets.Options())


def test_a_layer_s_floor_is_its_method_s() -> None:
    session = _session("quick")
    rows = suites.BY_TEST["test_layer"].rows(session)
    case = "vgg11 256-256 3x3 at 8"
    floors = {(row.implementation, row.part): suites.BY_TEST["test_layer"].about(session, row, MADE_UP)
              for row in rows if row.case == case}  # fmt: skip
    assert floors["torch", "step"] == floors["reference", "step"]
    assert floors["torch", "step"]["operations"] > floors["conv_bn_relu", "step"]["operations"]
    # conv + batch norm + ReLU: 2 N Ho Wo C O k^2, three times; 8 passes over the output beside the convolution's
    assert floors["conv_bn_relu", "step"]["operations"] == 3 * 2 * 128 * 64 * 256 * 256 * 9
    x, weight = 128 * 64 * 256 * 4, 256 * 256 * 9 * 4
    assert floors["conv_bn_relu", "step"]["bytes"] == 3 * (2 * x + weight) + 8 * x


def test_the_moments_share_is_of_their_time_with_the_patches() -> None:
    seconds = {"moments forward": [1.0, 2.0, 6.0], "patches forward": [0.5, 0.5, 0.5], "fold forward": [3.0, 4.0]}
    assert suites.median(seconds, "moments forward") == 2.5
    assert suites.median(seconds, "fold forward") == 3.5


def test_sweeps_are_prepared_with_all_their_parts() -> None:
    session = _session("scaling")
    row = Row("n_iter 2", "torch", "contiguous", "float32", "fold forward")
    layer, _ = session.plan.sweeps[row.case]
    session.plan.sweeps[row.case] = (layer, 1)
    both = [Variant(name, "contiguous", "float32") for name in ("conv_bn_relu", "torch")]
    works = dict(suites.BY_TEST["test_scaling"].prepare(session, row.case, both))
    assert set(works) == set(both)
    assert set(works[both[1]].work.run(clock.CpuClock())) == set(stages.parts("torch", layer))
    about = suites.BY_TEST["test_scaling"].about(session, row, MADE_UP)
    assert (about["axis"], about["value"], about["stage"], about["direction"]) == ("n_iter", 2, "fold", "forward")


def test_the_machine_is_described_without_its_name() -> None:
    found = machine.describe(CPU)
    assert found["torch"] == torch.__version__
    assert found["driver"] is None
    assert found["cores"] >= 1
    assert set(found) == {"device", "cores", "threads", "driver", "torch", "triton"}
    assert machine.as_json(MADE_UP) == {"memory": 1e10, "launch": 1e-6, "matmul": {"float32": 1e11, "bfloat16": 1e11}}


def test_half_precision_is_never_slower_than_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 9e10, torch.bfloat16: 1e9, torch.float16: 2e11}
    asked: list[tuple[tuple[torch.dtype, ...], dict[str, int]]] = []

    def measured(device: torch.device, dtypes: list[torch.dtype], **sizes: int) -> roofline.Ceilings:
        asked.append((tuple(dtypes), sizes))
        return roofline.Ceilings(1e9, {dtype: rates[dtype] for dtype in dtypes}, 1e-6)

    monkeypatch.setattr(roofline, "measure_ceilings", measured)
    ceilings = machine.ceilings.__wrapped__  # measured anew
    found = ceilings(CPU, ("bfloat16", "float16"))
    assert found.matmul == {torch.float32: 9e10, torch.bfloat16: 9e10, torch.float16: 2e11}
    assert asked == [((torch.float32,), {}), ((torch.bfloat16, torch.float16), machine.EMULATED)]
    assert ceilings(CPU, ("float32",)).matmul == {torch.float32: 9e10}
