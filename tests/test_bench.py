"""The benchmarks' machinery, on layers too small to time: what it measures and reports is right."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tdeconv.bench import implementations, measure, run, stages, steps, table
from tdeconv.bench.cases import BATCH, VGG11, Layer, activations

TINY = Layer(8, 6, 7)
TINY_FIRST = Layer(3, 4, 7, input_grad=False)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads only wait for each other on layers so small, here and in the run that is started."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ measuring


class _Tick:
    """A work of known cost on a clock of its own."""

    def __init__(self, name: str, log: list[str], cost: float) -> None:
        self.name, self.log, self.cost = name, log, cost

    def run(self, timer: Callable[[], float]) -> dict[str, float]:
        self.log.append(self.name)
        return {"part": self.cost * self.log.count(self.name)}


def test_every_round_runs_each_work_once_in_changing_order() -> None:
    log: list[str] = []
    works = {name: _Tick(name, log, cost) for name, cost in (("a", 1.0), ("b", 10.0), ("c", 100.0))}
    recorded = measure.interleaved(works, 9)
    rounds = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert len(rounds) == 9
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2
    assert recorded["b"]["part"] == [10.0 * i for i in range(1, 10)]


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


def test_saved_bytes_counts_each_storage_once_and_no_parameters() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    conv = nn.Conv2d(3, 5, 3, bias=False)
    assert measure.forward_counted(conv, x)[1] == x.nbytes
    # tanh keeps its output, which is also the second convolution's input
    twice = nn.Sequential(conv, nn.Tanh(), nn.Conv2d(5, 4, 3))
    assert measure.forward_counted(twice, x)[1] == x.nbytes + 2 * 5 * 6 * 6 * 4
    flat, none = measure.forward_counted(nn.Flatten(), x)
    assert flat.shape == (2, 192)
    assert none == 0


def test_check_refuses_wrong_and_undefined_answers() -> None:
    good = torch.ones(4, dtype=torch.float64)
    assert measure.check("x", [good.float()], [good]) == 0
    with pytest.raises(AssertionError, match="x: relative errors"):
        measure.check("x", [good.float(), good.float() * 1.001], [good, good])
    with pytest.raises(AssertionError, match="nan"):
        measure.check("x", [torch.full((4,), torch.nan)], [good])


# ------------------------------------------------------------------------------------------------------------ cases


def test_vgg11_has_eight_layers_at_the_paper_s_batch() -> None:
    assert sum(layer.count for layer in VGG11) == 8
    assert [layer.input_grad for layer in VGG11] == [False] + [True] * 6
    assert all(a.out_channels == b.in_channels for a, b in itertools.pairwise(VGG11))
    assert BATCH == 128


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


@pytest.mark.parametrize("layer", [TINY, TINY_FIRST], ids=["hidden", "first"])
def test_all_implementations_agree_and_are_timed(layer: Layer, checkout: Path) -> None:
    everyone = implementations.implementations(checkout)
    assert tuple(one.name for one in everyone) == table.NAMES
    works, errors = steps.prepare(steps.problem(layer, 3), everyone)
    assert set(works) == set(errors) == set(table.NAMES)
    assert all(0 < error < measure.TOLERANCE for error in errors.values())
    for work in works.values():
        seconds = work.run(itertools.count().__next__)
        assert seconds == {"forward": 1, "step": 2}
        assert (work.x.grad is not None) == layer.input_grad
    assert works["torch_channels_last"].grad.is_contiguous(memory_format=torch.channels_last)
    assert works["torch"].saved_bytes > works["torch"].x.nbytes


def test_an_implementation_with_wrong_answers_is_not_timed() -> None:
    def wrong(layer: Layer) -> nn.Module:
        module = implementations.REFERENCE.build(layer)
        module.n_iter = 4
        return module

    with pytest.raises(AssertionError, match="wrong: relative errors"):
        steps.prepare(steps.problem(TINY, 3), [implementations.Implementation("wrong", "deconv", wrong)])


@pytest.mark.parametrize("layer", [TINY, TINY_FIRST], ids=["hidden", "first"])
@pytest.mark.parametrize("backend", stages.BACKENDS)
def test_stages_are_timed_inside_a_step_that_is_right(layer: Layer, backend: str) -> None:
    work = stages.prepare(steps.problem(layer, 3))[backend]
    seconds = work.run(itertools.count().__next__)
    expected = {f"{part} {direction}" for part, direction in stages.parts(backend, layer)}
    assert set(seconds) == expected
    assert ("inverse_sqrt backward" in expected) == layer.input_grad
    assert all(s > 0 for s in seconds.values())


def test_a_folder_without_the_paper_s_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no models.deconv\.py in"):
        implementations.implementations(tmp_path)


def test_rounds_and_batch_are_positive(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--rounds", "--batch"):
        with pytest.raises(SystemExit):
            run.main([option, "0"])
        assert f"{option}: must be at least 1, got 0" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- tables


def _row(median: float, **extra: Any) -> dict[str, Any]:
    stats = {"median": median, "iqr": 0.1 * median, "rounds": 5}
    about = {"batch": 128, "dtype": "float32", "commit": "0123456789abcdef-dirty"}
    return {"stats": stats, "extra_info": {**about, **extra}}


def _step(layer: str, count: int, name: str, median: float, saved: int) -> dict[str, Any]:
    return _row(median, layer=layer, count=count, implementation=name, kind="step", saved_bytes=saved)


def _stage(layer: str, count: int, stage: str, median: float) -> dict[str, Any]:
    more = {"implementation": "torch", "stage": stage, "direction": "forward"}
    return _row(median, layer=layer, count=count, **more)


@pytest.fixture
def results() -> dict[str, Any]:
    machine = {"device": "Some CPU @ 2.0GHz", "cores": 2, "threads": 2, "torch": "2.13", "python_version": "3.12"}
    rows = [
        _step("a", 1, "conv_bn", 0.010, 1_000_000),
        _step("a", 1, "torch", 0.015, 500_000),
        _step("b", 2, "conv_bn", 0.020, 2_000_000),
        _step("b", 2, "torch", 0.060, 3_000_000),
        _stage("a", 1, "patch_moments", 0.005),
        _stage("a", 1, "moments", 0.002),
        _stage("b", 2, "patch_moments", 0.003),
        _stage("b", 2, "moments", 0.001),
        _stage("b", 2, "fold", 0.004),
    ]
    return {"machine_info": machine, "datetime": "2026-01-02T03:04:05", "benchmarks": rows}


def _cells(report: str, section: str, number: int) -> list[list[str]]:
    """The cells of a section's n-th table."""
    after = report.partition(f"## {section}")[2]
    blocks = after.partition("\n## ")[0].split("\n\n")
    lines = [block for block in blocks if block.startswith("|")][number].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_ratios_are_of_medians_and_sums_count_repeated_layers(results: dict[str, Any]) -> None:
    report = table.markdown(results)
    ratios, times = (_cells(report, "Training step", i) for i in range(2))
    assert ratios == [
        ["layer", "torch / conv_bn"],
        ["a", "1.50"],
        ["b (x2)", "3.00"],
        ["all 3 layers", "2.70"],  # (15 + 2 * 60) / (10 + 2 * 20)
    ]
    assert times[-1] == ["all 3 layers", "50.0", "135.0"]
    assert _cells(report, "Saved for backward", 0)[-1] == ["all 3 layers", "1.30"]  # 6.5 MB / 5 MB
    assert "commit 0123456789ab with changes" in report


def test_patches_are_what_patch_moments_take_beyond_moments(results: dict[str, Any]) -> None:
    assert _cells(table.markdown(results), "Stages of torch, forward", 0) == [
        ["layer", "patches", "moments", "fold", "sum"],
        ["a", "3.0", "2.0", "-", "5.0"],
        ["b (x2)", "2.0", "1.0", "4.0", "7.0"],
        ["all 3 layers", "7.0", "4.0", "8.0", "19.0"],
    ]


def test_kept_results_carry_their_device_and_make_the_same_report(results: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "vgg11.json"
    source.write_text(json.dumps(results), encoding="utf-8")
    folder = table.keep(source, tmp_path / "results")
    assert folder.name == "some-cpu-2-0ghz-2-cores"
    assert json.loads((folder / "vgg11.json").read_text(encoding="utf-8")) == results
    assert (folder / "vgg11.md").read_text(encoding="utf-8") == table.markdown(results)


@pytest.mark.parametrize("text", ["no json", "[]", '{"benchmarks": []}'])
def test_a_file_without_results_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        table.main([str(path)])
    assert "x.json" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the run


def test_a_run_measures_saves_and_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path), "--batch", "2", "--rounds", "3"]
    assert run.main([*options, "--select", "3-64-32x32"]) == 0
    printed = capfd.readouterr().out
    data = table.load(tmp_path / "vgg11.json")
    assert (tmp_path / "vgg11.md").read_text(encoding="utf-8") in printed
    rows = data["benchmarks"]
    assert len(rows) == 2 * 5 + sum(len(stages.parts(backend, VGG11[0])) for backend in stages.BACKENDS)
    assert all(len(row["stats"]["data"]) == 3 for row in rows)
    info = [row["extra_info"] for row in rows]
    assert all(i["commit"] and i["cpu"] and i["torch"] == torch.__version__ and i["threads"] > 0 for i in info)
    layers = [row for row in rows if "kind" in row["extra_info"]]
    assert all(row["extra_info"]["saved_bytes"] > 0 for row in layers)
    median = {(r["extra_info"]["implementation"], r["extra_info"]["kind"]): r["stats"]["median"] for r in layers}
    assert all(0 < median[name, "forward"] < median[name, "step"] for name, _ in median)
    assert {row["group"] for row in layers} == {"3-64-32x32 forward", "3-64-32x32 step"}


def test_a_run_that_fails_keeps_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = tmp_path / "vgg11.json"
    earlier.write_text("earlier", encoding="utf-8")

    def fail(args: Any, json_path: Path) -> int:
        json_path.write_text("half", encoding="utf-8")
        return 3

    monkeypatch.setattr(run, "_measure", fail)
    assert run.main(["--out", str(tmp_path)]) == 3
    assert earlier.read_text(encoding="utf-8") == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["vgg11.json"]
