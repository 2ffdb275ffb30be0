"""``tdeconv profile``: whose time is whose, held exactly under a clock of the test's own; the tables; the command."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdeconv import ChannelDeconv, Delinear, FastDeconv, FastDeconv1d, cli, ops, running
from tdeconv.bench import machine
from tdeconv.bench.profiles import command as profiling
from tdeconv.bench.profiles import tables as profile_tables
from tdeconv.bench.profiles.facts import label, look
from tdeconv.bench.profiles.observe import Observer, Part, with_rest
from tdeconv.bench.roofline import STAGES, Ceilings, Shape, floor

CEILINGS = Ceilings(1e9, dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 10000000000.0), 1e-6)
FORWARD = dict(zip(STAGES, (1.0, 2.0, 3.0, 4.0), strict=True))
BACKWARD = dict(zip(STAGES, (10.0, 20.0, 30.0, 40.0), strict=True))
REST = 5.0  # in forward: updating the running statistics


class Ticks:
    """A clock that only moves when it is told to."""

    now = 0.0

    def ready(self) -> None: ...

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """A clock by which every stage and every update of running statistics takes a known time, and all else none."""
    clock, original, update = Ticks(), ops.stages("torch"), running.update_

    class Slow:
        def __getattr__(self, name: str) -> Any:
            stage, backward, _ = name.partition("_backward")
            seconds = (BACKWARD if backward else FORWARD).get(stage, 0.0)
            return lambda *args: (advance(seconds), getattr(original, name)(*args))[1]

    def advance(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(ops, "stages", lambda backend: Slow())
    monkeypatch.setattr(running, "update_", lambda *args: (advance(REST), update(*args))[1])
    return clock


class Other(nn.Module):
    """Something that is no deconvolution: 100 seconds forward and 1000 backward."""

    def __init__(self, clock: Ticks) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        clock = self.clock

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                clock.now += 100
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                clock.now += 1000
                return grad.clone()

        return Function.apply(x)


class Net(nn.Module):
    """Branches that join, work in place behind a layer, a layer called twice, a linear one, and one never called."""

    def __init__(self, clock: Ticks) -> None:
        super().__init__()
        self.first, self.left = FastDeconv(3, 4, 3, padding=1), FastDeconv(4, 4, 3, padding=1)
        self.right, self.twice = FastDeconv(4, 4, 1, bias=False), FastDeconv(4, 4, 1)
        self.never, self.head = FastDeconv(4, 4, 1), Delinear(4, 2)
        self.other = Other(clock)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(torch.relu_(self.first(x)))
        x = self.other(self.left(x)) + self.other(torch.relu_(self.right(self.other(x))))
        x = self.twice(self.other(self.twice(x)))
        return self.head(self.other(x).mean((2, 3)))


def observed(
    model: nn.Module, x: Tensor, clock: Any, dtype: torch.dtype = torch.float32
) -> tuple[dict[Part, float], float]:
    observer, step = Observer(model, clock), profiling.Step(model.train(), x, dtype, clock)
    step()
    with observer.watching():
        start, end = step()
        return with_rest(observer.take(), clock.seconds(start, end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_second_goes_to_the_layer_and_stage_that_spent_it(ticks: Ticks, dtype: torch.dtype) -> None:
    parts, other = observed(Net(ticks), torch.randn(4, 3, 6, 6), ticks, dtype)
    expected: dict[Part, float] = {}
    for name, calls in {"first": 1, "left": 1, "right": 1, "twice": 2, "head": 1}.items():
        for stage, seconds in FORWARD.items():
            expected[Part(name, stage, "forward")] = calls * seconds
        for stage, seconds in BACKWARD.items():
            if name != "first" or stage in ("fold", "convolve"):  # whose input has no gradient
                expected[Part(name, stage, "backward")] = calls * seconds
        expected[Part(name, "rest", "forward")] = calls * REST
        expected[Part(name, "rest", "backward")] = 0.0
    assert parts == expected
    assert other == 6 * 1100


def test_a_frozen_model_has_no_backward_where_there_is_none(ticks: Ticks) -> None:
    model = nn.Sequential(FastDeconv(3, 4, 1), Other(ticks), FastDeconv(4, 4, 1), Other(ticks))
    model[0].requires_grad_(False)
    parts, other = observed(model, torch.randn(4, 3, 6, 6), ticks)
    assert {(part.layer, part.stage) for part in parts if part.direction == "backward"} == {
        *(("2", stage) for stage in ("fold", "convolve", "rest"))
    }
    assert other == 2 * 100 + 1000


def test_watching_leaves_the_answers_and_the_model_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FastDeconv(3, 4, 3), nn.ReLU(inplace=True), FastDeconv(4, 2, 1))
    x, stages = torch.randn(4, 3, 6, 6), ops.stages
    step = profiling.Step(model, x, torch.float32, profiling.clock_of(x.device))
    step()
    plain = [p.grad.clone() for p in model.parameters()]
    observer = Observer(model, profiling.clock_of(x.device))
    with observer.watching():
        step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    seen = len(observer.take())
    step()
    assert seen == 2 * (4 + 1) + (2 + 1) + (4 + 1)
    assert observer.take() == {}
    assert ops.stages is stages


def test_the_reference_and_channel_deconv_have_only_wholes() -> None:
    model = nn.Sequential(FastDeconv(3, 4, 1, backend="reference"), ChannelDeconv(2, backend="reference"))
    x = torch.randn(4, 3, 6, 6)
    parts, other = observed(model, x, profiling.clock_of(x.device))
    assert set(parts) == {Part(name, "rest", d) for name in "01" for d in ("forward", "backward")}
    assert min(parts.values()) > 0
    assert other > 0


# ------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("layer", "shape", "text"),
    [
        (FastDeconv(64, 128, 3, stride=2), (2, 64, 56, 56), "64-128 3x3/2 @56"),
        (FastDeconv(8, 8, 3, groups=8), (2, 8, 14, 20), "8 dw 3x3 @14x20"),
        (FastDeconv(8, 4, (1, 3), stride=(1, 2), groups=2), (2, 8, 14, 14), "8-4 g2 1x3/1x2 @14"),
        (FastDeconv(8, 4, 1), (2, 8, 1, 1), "8-4 1x1"),
        (FastDeconv1d(8, 4, 5), (2, 8, 30), "8-4 5 @30"),
        (Delinear(8, 4), (2, 7, 8), "8-4"),
        (ChannelDeconv(4), (2, 8, 6, 6), "8 @6"),
    ],
)
def test_labels(layer: nn.Module, shape: tuple[int, ...], text: str) -> None:
    assert label(layer, torch.empty(shape)) == text


def test_facts_of_the_layers_that_a_step_calls() -> None:
    model = Net(Ticks()).to(torch.float32)
    x = torch.randn(4, 3, 6, 6)
    facts = look(model, profiling.Step(model, x, torch.bfloat16, Ticks()))
    assert list(facts) == ["first", "left", "right", "twice", "head"]
    assert [f.calls for f in facts.values()] == [1, 1, 1, 2, 1]
    assert [f.type for f in facts.values()] == [*["FastDeconv"] * 4, "Delinear"]
    assert {f.dtype for f in facts.values()} == {torch.bfloat16}
    first, head = facts["first"], facts["head"]
    assert (first.backend, first.input) == ("torch", [4, 3, 6, 6])
    assert first.why.startswith("automatic: ")
    assert set(first.how) == set(STAGES)
    (shape,) = first.shapes
    assert shape == Shape(4, 3, (6, 6), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 3, dtype=torch.bfloat16, input_grad=False)
    assert head.shapes[0].outputs == 4 * 2
    floors = facts["twice"].floors(CEILINGS)
    once = floor(facts["twice"].shapes[0], CEILINGS)
    assert {key: value["seconds"] for key, value in floors.items()} == {key: 2 * s for key, s in once.items()}


def test_float16_on_a_cpu_is_convolved_in_float32() -> None:
    model, x = nn.Sequential(FastDeconv(3, 4, 1)), torch.randn(4, 3, 6, 6)
    facts = look(model, profiling.Step(model, x, torch.float16, Ticks()))
    assert facts["0"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ tables


def row(number: int, name: str, stages: bool = True, **more: Any) -> dict[str, Any]:
    forward = dict(FORWARD, rest=5.0) if stages else {"rest": 15.0}
    backward = dict(BACKWARD, rest=50.0) if stages else {"rest": 150.0}
    seconds = {"forward": forward, "backward": backward}
    total = sum(forward.values()) + sum(backward.values())
    how = {"convolve": "the library's", "fold": f"{number} rows"} if stages else {}
    about = {"number": number, "name": name, "shape": "64-128 3x3/2 @56", "calls": 1, "seconds": seconds}
    about |= {"total_s": total, "share_of_step": total / 1000, "floor_s": 33.0, "share_of_floor": 33.0 / total}
    return {**about, "backend": "torch", "why": "automatic", "how": how, **more}


def content(layers: list[dict[str, Any]], scale: float = 1.0) -> dict[str, Any]:
    """A profile whose step takes 1000 seconds, times ``scale``."""
    for layer in layers:
        layer["seconds"] = {d: {s: t * scale for s, t in of.items()} for d, of in layer["seconds"].items()}
        layer["total_s"], layer["floor_s"] = layer["total_s"] * scale, layer["floor_s"] and layer["floor_s"] * scale
    other = 1000.0 * scale - sum(layer["total_s"] for layer in layers)
    ceilings = {"memory": 2e10, "launch": 3e-6, "matmul": {"float32": 9e10}}
    about = {"model": "nets:net", "converted": True, "input": [2, 3, 8, 8], "dtype": "float32", "layout": "contiguous"}
    about |= {"step": "fresh"}
    about |= {
        "device": "a machine",
        "device_type": "cpu",
        "threads": 2,
        "torch": "2.13",
        "datetime": "2026-11-22T00:00",
    }
    about |= {
        "rounds": 5,
        "step_s": 1000.0 * scale,
        "step_median_s": 1010.0 * scale,
        "else_s": other,
        "unwatched_s": 990.0 * scale,
    }
    return {**about, "ceilings": ceilings, "layers": layers, "not_called": []}


def lines_of(text: str) -> dict[str, list[str]]:
    """The words of the table's lines, by the first two."""
    split = [line.split() for line in text.splitlines() if line]
    return {" ".join(words[:2]): words for words in split}


def test_the_table_has_every_part_and_adds_up() -> None:
    lines = lines_of(profile_tables.text(content([row(1, "a"), row(2, "b")])))
    times = ["1.00", "2.00", "3.00", "4.00", "5.00", "10.0", "20.0", "30.0", "40.0", "50.0"]
    assert lines["1 a"] == ["1", "a", "64-128", "3x3/2", "@56", *times, "165", "16%", "33.0", "20%"]
    doubled = ["2.00", "4.00", "6.00", "8.00", "10.0", "20.0", "40.0", "60.0", "80.0", "100"]
    assert lines["all 2"] == ["all", "2", "deconvolution", "layers", *doubled, "330", "33%", "66.0", "20%"]
    assert lines["everything else"][2:] == ["670", "67%"]
    assert lines["the step"][2:4] == ["1000", "100%"]


@pytest.mark.parametrize(
    ("scale", "unit", "total"), [(1.0, "seconds", "165"), (1e-3, "milliseconds", "165"), (1e-6, "microseconds", "165")]
)
def test_the_unit_suits_the_step(scale: float, unit: str, total: str) -> None:
    text = profile_tables.text(content([row(1, "a")], scale))
    assert f"Times in {unit}: medians of 5 rounds" in text
    assert total in lines_of(text)["1 a"]


def test_without_stages_a_direction_is_one_column() -> None:
    lines = lines_of(profile_tables.text(content([row(1, "a", stages=False)])))
    assert lines["# layer"] == ["#", "layer", "shape", "forward", "backward", "total", "step", "floor", "share"]
    assert lines["1 a"][5:7] == ["15.0", "150"]


def test_a_layer_without_some_stages_or_a_floor_has_dashes() -> None:
    mixed = [row(1, "a"), row(2, "b", stages=False, floor_s=None, share_of_floor=None)]
    words = lines_of(profile_tables.text(content(mixed)))["2 b"]
    assert words[5:] == [*"-" * 4, "15.0", *"-" * 4, "150", "165", "16%", "-", "-"]


def test_long_names_lose_their_middle_and_no_line_is_too_wide() -> None:
    names = [f"backbone.layers.{i}.feed_forward.residual_block.pointwise_{i}" for i in range(100)]
    layers = [row(i + 1, name, shape="1024-2048 1x1/2 @112") for i, name in enumerate(names)]
    text = profile_tables.text(content(layers))
    assert max(map(len, text.splitlines())) <= 120
    shortened = [line.split()[1] for line in text.splitlines() if "\N{HORIZONTAL ELLIPSIS}" in line]
    assert len(shortened) == 100
    assert shortened[41].startswith("backb")
    assert shortened[41].endswith("_41")
    markdown = profile_tables.markdown(content(layers))
    assert all(f" {name} " in markdown for name in names)


def test_choices_name_the_layers_they_were_made_for() -> None:
    layers = [row(i, "a", how={"convolve": "tiles" if i in (2, 3, 5) else "the library's"}) for i in range(1, 7)]
    text = profile_tables.text(content(layers))
    assert "  torch: automatic [1-6]\n" in text
    assert "  the library's [1, 4, 6]\n" in text
    assert "  tiles [2-3, 5]\n" in text
    assert "| 2-3, 5 | tiles |" in profile_tables.markdown(content(layers))


def test_what_is_worth_a_remark_is_said() -> None:
    plain = profile_tables.text(content([row(1, "a")]))
    assert "above 100%" not in plain
    assert "Not called" not in plain
    remarkable = {**content([row(1, "a", share_of_floor=1.2)]), "not_called": ["spare"]}
    text = profile_tables.text(remarkable)
    assert "A share above 100%" in text
    assert "Not called in a step: spare." in text


# ----------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with small models, where ceilings are made up."""
    code = """
        import tdeconv
        from torch import nn

        def pixels():
            return nn.Sequential(
                *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
                *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
                *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            )

        def ready():
            return nn.Sequential(tdeconv.FastDeconv(3, 4, 1, block=1), nn.Conv2d(4, 2, 1))

        def features():
            return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))

        def picky():
            return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 2))
    """
    (tmp_path / "nets.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.delenv("TDECONV_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "ceilings", lambda device, dtypes: CEILINGS)


def profile(*options: str) -> int:
    return cli.main(["profile", "--rounds", "2", "--batch", "4", "--out", "out", *options])


def saved() -> dict[str, Any]:
    return json.loads(Path("out/profile.json").read_text())


@pytest.mark.usefixtures("nets")
def test_a_profile_is_printed_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile("--model", "nets:pixels", "--size", "8") == 0
    out, data = capsys.readouterr().out, saved()
    assert sorted(p.name for p in Path("out").iterdir()) == ["profile.json", "profile.md", "trace.json"]
    assert (data["model"], data["input"], data["converted"]) == ("nets:pixels", [4, 2, 8, 8], True)
    assert [layer["name"] for layer in data["layers"]] == ["0", "3"]
    assert [layer["shape"] for layer in data["layers"]] == ["2-3 3x3 @8", "3-4 1x1 @8"]
    assert data["step_s"] == pytest.approx(sum(x["total_s"] for x in data["layers"]) + data["else_s"])
    assert data["else_s"] > 0
    for layer in data["layers"]:
        parts = [s for of in layer["seconds"].values() for s in of.values()]
        assert layer["total_s"] == pytest.approx(sum(parts))
        assert layer["share_of_floor"] == layer["floor_s"] / layer["total_s"]
    assert set(data["layers"][0]["seconds"]["backward"]) == {"fold", "convolve", "rest"}
    assert set(data["layers"][1]["seconds"]["backward"]) == {*STAGES, "rest"}
    assert profile_tables.text(data) in out
    assert Path("out/profile.md").read_text() == profile_tables.markdown(data)


@pytest.mark.usefixtures("nets")
def test_a_stale_step_is_profiled_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile("--model", "nets:pixels", "--size", "8") == 0
    assert "a fresh training step (with its batch's statistics; " in " ".join(capsys.readouterr().out.split())
    fresh = saved()
    assert profile("--model", "nets:pixels", "--size", "8", "--step", "stale") == 0
    out, stale = " ".join(capsys.readouterr().out.split()), saved()
    assert "a stale training step (with the running statistics; forward and backward) of 4 x 2 x 8 x 8" in out
    assert "fold conv rest fold conv rest total" in out
    assert not {"mom.", "root", "inverse_sqrt:"} & set(out.split())
    assert (fresh["step"], stale["step"]) == ("fresh", "stale")
    for before, layer in zip(fresh["layers"], stale["layers"], strict=True):
        for direction in ("forward", "backward"):
            assert set(layer["seconds"][direction]) == {"fold", "convolve", "rest"}
            assert set(layer["floors"][direction]) == {"fold", "convolve"}
        assert set(layer["how"]) == {"fold", "convolve"}
        assert layer["floor_s"] < before["floor_s"]
    assert "# Where a training step's time goes" in Path("out/profile.md").read_text()


@pytest.mark.usefixtures("nets")
def test_the_trace_names_layers_stages_and_directions(capfd: pytest.CaptureFixture[str]) -> None:
    assert profile("--model", "nets:pixels", "--size", "8") == 0
    assert "profiler" not in capfd.readouterr().err  # its library is talkative
    events = json.loads(Path("out/trace.json").read_text())["traceEvents"]
    ranges = {e["name"]: e for e in events if e.get("cat") == "user_annotation" and ": " in e["name"]}
    named = {f"3: {stage} {d}" for stage in (*STAGES, "layer") for d in ("forward", "backward")}
    assert named <= set(ranges)
    whole, inner = ranges["3: layer backward"], ranges["3: inverse_sqrt backward"]
    assert whole["ts"] <= inner["ts"] <= inner["ts"] + inner["dur"] <= whole["ts"] + whole["dur"]
    assert "0: inverse_sqrt backward" not in ranges


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_layout(dtype: str) -> None:
    assert profile("--model", "nets:pixels", "--size", "8", "--dtype", dtype, "--layout", "contiguous") == 0
    worked_in = "float32" if dtype == "float16" else dtype  # on a CPU
    assert {layer["dtype"] for layer in saved()["layers"]} == {worked_in}
    assert (saved()["dtype"], saved()["layout"]) == (dtype, "contiguous")


@pytest.mark.usefixtures("nets")
def test_the_reference_backend_gives_whole_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile("--model", "nets:pixels", "--size", "8", "--backend", "reference") == 0
    data = saved()
    assert all(set(x["seconds"][d]) == {"rest"} for x in data["layers"] for d in ("forward", "backward"))
    assert "reference: asked for by --backend [1-2]" in capsys.readouterr().out


@pytest.mark.usefixtures("nets")
def test_a_model_with_deconvolution_layers_stays_as_it_is() -> None:
    assert profile("--model", "nets:ready", "--size", "6") == 0
    assert not saved()["converted"]
    assert [(x["name"], x["type"]) for x in saved()["layers"]] == [("0", "FastDeconv")]


@pytest.mark.usefixtures("nets")
def test_linear_layers_when_asked_for() -> None:
    assert profile("--model", "nets:features", "--linear") == 0
    assert saved()["input"] == [4, 6]
    assert [x["type"] for x in saved()["layers"]] == ["Delinear", "Delinear"]


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "nets:nobody"], "--model 'nets:nobody' cannot be made"),
        (["--model", "resnet81"], "--model 'resnet81': torchvision has no such model"),
        (["--model", "nets:features"], "--model 'nets:features' has no layer that can be converted: "),
        (["--model", "nets:pixels", "--device", "cuda"], "--device cuda: PyTorch sees no GPU here"),
        (["--model", "nets:picky", "--size", "9"], "on an input of shape (4, 3, 9, 9): mat1 and mat2 shapes cannot be"),
        (["--model", "nets:pixels", "--out", "nets.py/x"], "--out nets.py/x cannot be written to: Not a directory"),
        (["--model", "nets:pixels", "--out", "nets.py"], "--out nets.py cannot be written to: it is a file"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_message(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(*options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tdeconv profile: ")
    assert text in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not Path("out").exists()


@pytest.mark.usefixtures("nets")
def test_triton_without_a_gpu_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert profile("--model", "nets:pixels", "--backend", "triton") == 2
    assert capsys.readouterr().err.startswith("tdeconv profile: --backend triton cannot run: on CPU")
    assert not Path("out").exists()


@pytest.mark.usefixtures("nets")
def test_a_full_disk_keeps_earlier_files(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    Path("out/profile.json").write_text("earlier")

    def full(files: dict[Path, str]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling, "publish", full)
    assert profile("--model", "nets:pixels", "--size", "8") == 2
    assert "--out out cannot be written to: No space left on device" in capsys.readouterr().err
    assert [p.name for p in Path("out").iterdir()] == ["profile.json"]
    assert Path("out/profile.json").read_text() == "earlier"


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--batch", "0"], ["--dtype", "float64"], []])
def test_refused_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["profile", *(["--model", "resnet18", *options] if options else [])])
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err
