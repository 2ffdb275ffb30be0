"""The GPU report without a GPU: a whole smoke run, and how it takes children that crash, hang or run out of time."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import cases as gpu_cases
from bench.gpu import nets as gpu_nets
from bench.gpu import problem as gpu_problem
from bench.gpu import report as gpu_report
from bench.gpu import table as gpu_table
from bench.gpu import timing as gpu_time
from bench.gpu.worker import Worker, begun
from tdeconv import torch_backend
from tdeconv.bench import roofline

ROOT = Path(__file__).parents[1]

# A child as the report's are; what it does at each unit is the unit's name.
CHILD = """
import json, os, sys, time
rows, units = sys.argv[-1], sys.argv[1:-2]
before = open(rows).read() if os.path.exists(rows) else ""
with open(rows, "a") as file:
    def write(record):
        file.write(json.dumps(record) + "\\n")
        file.flush()
    for unit in units:
        if json.dumps({"begin": unit}) in before:
            continue
        write({"begin": unit})
        if unit.startswith("hang"):
            time.sleep(600)
        if unit.startswith("tear"):
            file.write('{"unit": "te')
            file.flush()
        if unit.startswith(("crash", "tear")):
            print("last words", flush=True)
            os._exit(7)
        write({"unit": unit, "value": len(unit)})
        write({"done": unit})
    write({"end": True})
"""


@pytest.fixture
def child(tmp_path: Path) -> Path:
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    return path


def worked(child: Path, *units: str, unit_seconds: float = 300, seconds: float = 300) -> tuple[Worker, list[dict]]:
    """A worker run to its end, or stopped after so many seconds; its rows."""
    rows, start = [], time.monotonic()
    worker = Worker([sys.executable, str(child), *units], {}, child.with_name("rows.jsonl"), child.parent, unit_seconds)
    while not worker.finished and time.monotonic() - start < seconds:
        rows += worker.poll()
        time.sleep(0.02)
    return worker, rows + worker.stop()


def test_a_child_that_does_all_its_units(child: Path) -> None:
    worker, rows = worked(child, "a", "bc")
    assert rows == [{"unit": "a", "value": 1}, {"unit": "bc", "value": 2}]
    assert (worker.begun, worker.failed) == (2, "")
    assert begun(worker.rows) == {"a", "bc"}


@pytest.mark.parametrize("bad", ["crash", "tear"])
def test_a_unit_that_kills_its_process_costs_itself_alone(child: Path, bad: str) -> None:
    worker, rows = worked(child, "a", bad, "b")
    errors = [row for row in rows if "error" in row]
    assert [row["unit"] for row in errors] == [bad]
    assert "ended with status 7" in errors[0]["error"]
    assert "last words" in errors[0]["error"]
    assert [row["unit"] for row in rows if "value" in row] == ["a", "b"]
    assert not worker.failed


def test_a_unit_that_hangs_is_stopped(child: Path) -> None:
    start = time.monotonic()
    worker, rows = worked(child, "hang", "b", unit_seconds=3)
    assert time.monotonic() - start < 300  # it would have hung for twice as long
    assert rows == [{"unit": "hang", "error": "stopped: it took more than 3 s"}, {"unit": "b", "value": 1}]
    assert worker.process.poll() is not None


def test_time_that_is_up_stops_the_running_unit(child: Path) -> None:
    worker, rows = worked(child, "hang", "b", seconds=2)
    assert rows == [{"unit": "hang", "error": "stopped: the step's time was up"}]
    assert worker.finished
    assert worker.process.poll() is not None


def test_a_child_that_gets_nowhere_is_given_up(child: Path) -> None:
    child.write_text("raise SystemExit('nothing works here')")
    worker, rows = worked(child, "a")
    assert rows == []
    assert "nothing works here" in worker.failed


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_report.Report:
    monkeypatch.setattr(gpu_report, "_commit", lambda: "abc")
    monkeypatch.setattr(gpu_report, "_driver", lambda: "1.2")
    return gpu_report.Report(tmp_path / "out", {"commit": None, "smoke": False})


def arguments(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"smoke": True, "workers": 2, "minutes": 1.0, "commit": None, **more})


def run_fakes(
    report: gpu_report.Report, child: Path, monkeypatch: pytest.MonkeyPatch, units: list[str], seconds: float = 300
) -> None:
    monkeypatch.setattr(gpu_report.Step, "commands", lambda step, python: [[python, str(child), *step.units]])
    gpu_report.run_step(gpu_report.Step("check", units), seconds, report, arguments())


def test_a_step_keeps_what_it_found_and_says_what_failed(
    report: gpu_report.Report, child: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.add("device", [{"unit": "device", "device": "a GPU", "torch": "2"}])
    run_fakes(report, child, monkeypatch, ["a", "crash", "b"])
    content = json.loads((report.out / "results.json").read_text())
    rows = [row for row in content["rows"] if row["step"] == "check"]
    assert [row["unit"] for row in rows] == ["a", "crash", "b"]
    assert all(
        (row["commit"], row["driver"], row["device"], row["torch"]) == ("abc", "1.2", "a GPU", "2") for row in rows
    )
    (step,) = content["steps"]
    assert (step["state"], step["begun"], step["units"]) == ("done", 3, 3)
    assert report.right() == ["a", "b"]


def test_a_step_that_would_overrun_is_stopped(
    report: gpu_report.Report, child: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_report.STEPS, "check", (1, 600))
    run_fakes(report, child, monkeypatch, ["a", "hang", "b"], seconds=3)
    (step,) = report.content["steps"]
    assert (step["state"], step["begun"], step["units"]) == ("out of time", 2, 3)
    assert [row.get("error", "") for row in report.rows("check")][-1].startswith("stopped: ")


def test_a_step_without_time_starts_nothing(
    report: gpu_report.Report, child: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_fakes(report, child, monkeypatch, ["a"], seconds=0.9)
    (step,) = report.content["steps"]
    assert (step["state"], step["begun"], step["units"]) == ("out of time", 0, 1)
    assert not list(report.work.iterdir())


def test_a_step_whose_children_cannot_start_has_failed(
    report: gpu_report.Report, child: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.write_text("import nothing_of_this_name")
    run_fakes(report, child, monkeypatch, ["a"])
    (step,) = report.content["steps"]
    assert step["state"] == "failed"
    assert "nothing_of_this_name" in step["error"]


def test_later_steps_get_the_time_that_earlier_ones_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its share of what is left; the last one all of it; and a step that fails ends nothing."""
    given = {}

    def instead(step: gpu_report.Step, seconds: float, report: gpu_report.Report, args: argparse.Namespace) -> None:
        given[step.name] = seconds

    monkeypatch.setattr(gpu_report, "run_step", instead)
    gpu_report.run(arguments(out=tmp_path, minutes=1.0))
    assert list(given) == list(gpu_report.STEPS)
    shares = [weight for weight, _ in gpu_report.STEPS.values()]
    assert given["device"] == pytest.approx(60 * shares[0] / sum(shares), rel=0.1)
    assert given["models"] == pytest.approx(60 * shares[-2] / sum(shares[-2:]), rel=0.1)
    assert given["tools"] == pytest.approx(60, rel=0.1)


def test_only_a_barrier_that_was_right_in_time_is_used(report: gpu_report.Report) -> None:
    assert not report.barrier_works()
    report.add("barrier", [{"unit": "576", "outcome": "as phase by phase, bitwise"}])
    assert not report.barrier_works()  # not until the step is done
    report.content["steps"].append({"step": "barrier", "state": "done"})
    assert report.barrier_works()
    report.add("barrier", [{"unit": "96", "error": "stopped: it took more than 45 s"}])
    assert not report.barrier_works()


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def instead(step: gpu_report.Step, seconds: float, report: gpu_report.Report, args: argparse.Namespace) -> None:
        report.add(step.name, [{"unit": "device", "kind": "cpu"}])

    monkeypatch.setattr(gpu_report, "run_step", instead)
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    assert "no CUDA or ROCm device here; --smoke" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- what it is made of


def test_the_children_run_with_the_barrier_off_and_choices_of_their_own(report: gpu_report.Report) -> None:
    for step in gpu_report.STEPS:
        env = gpu_report.environment(step, report, smoke=False)
        assert env["TDECONV_COOPERATIVE"] == "0"
        assert "TRITON_INTERPRET" not in env
        assert env["TDECONV_CACHE"].endswith("candidates" if step == "compile" else "tuning")
    assert gpu_report.environment("check", report, smoke=True)["TRITON_INTERPRET"] == "1"


def on_meta(network: str) -> torch.nn.Module:
    with torch.device("meta"):
        return gpu_nets.OWN[network]()


def test_the_layers_are_the_networks_own() -> None:
    """Every convolution of the written-out networks, once."""
    for network, cases in (("resnet50", gpu_cases.resnet50()), ("vgg11", gpu_cases.vgg11())):
        model, sizes = on_meta(network), set()

        def note(module: Any, args: Any, output: Any, sizes: set = sizes) -> None:
            conv = (module.in_channels, args[0].shape[-1], module.out_channels, module.kernel_size[0], module.stride[0])
            sizes.add(conv)

        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(note)
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
        assert sizes == {(c.channels, c.size, c.out, c.kernel, c.stride) for c in cases}


@pytest.mark.parametrize(("network", "parameters"), [("resnet50", 25_557_032), ("vgg11", 132_868_840)])
def test_the_written_out_networks_are_the_public_ones(network: str, parameters: int) -> None:
    assert sum(p.numel() for p in on_meta(network).parameters()) == parameters


def test_units_have_names_of_their_own() -> None:
    for small in (False, True):
        units = gpu_cases.units(gpu_cases.cases(small), barrier=True) + gpu_cases.tuned_units(small)
        assert len({unit.name for unit in units}) == len(units)
        models = gpu_cases.models(small, barrier=True)
        assert len({model.name for model in models}) == len(models)


@pytest.mark.parametrize("case", [*gpu_cases.smoke(), *gpu_cases.resnet50(), *gpu_cases.vgg11()], ids=lambda c: c.name)
def test_cases_have_the_layers_own_covariances(case: gpu_cases.Case) -> None:
    assert gpu_problem.shape_of(case).geo.features == case.features


@pytest.mark.parametrize("stage", roofline.STAGES)
def test_wrong_answers_are_refused(stage: str) -> None:
    case = list(gpu_cases.smoke())[1]
    problem = gpu_problem.Problem(case, torch.device("cpu"))
    truth = problem.truth(stage)
    for direction in ("forward", "backward"):
        got = problem.call(torch_backend, stage, direction)()
        assert problem.error(stage, direction, got, truth) < 1e-4
        for number, tensor in enumerate(got):
            wrong = [t.clone() for t in got]
            wrong[number] = tensor * 1.01
            with pytest.raises(ValueError, match=f"wrong {direction}: output {number}"):
                problem.error(stage, direction, tuple(wrong), truth)
            wrong[number] = tensor * float("nan")
            with pytest.raises(ValueError, match="relative error nan"):
                problem.error(stage, direction, tuple(wrong), truth)


def test_the_process_that_deals_out_never_loads_torch() -> None:
    code = "import sys; import bench.gpu.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_it_needs_few_packages() -> None:
    """The packages that every file of the report imports, wherever in it."""
    allowed = {"torch", "triton", "pytest", "bench", "tdeconv", "__future__", *sys.stdlib_module_names}
    for path in (ROOT / "bench").glob("gpu_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert {name.partition(".")[0] for name in names} <= allowed, path.name


def pytest_rows(folder: Path, rows: str, *options: str) -> list[dict[str, Any]]:
    """What the plugin writes about the tests in a folder."""
    command = [*gpu_report._pytest(sys.executable), str(folder), f"--rows={rows}", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return [json.loads(line) for line in (folder / rows).read_text().splitlines()]


def test_the_plugin_writes_what_each_test_came_to_and_shares_them_out(tmp_path: Path) -> None:
    code = """
        import pytest

        def test_of_something_else():
            assert False

        @pytest.mark.gpu
        @pytest.mark.parametrize("value", [0, 1, 2, 3])
        def test_value(value):
            assert value != 2, "two is wrong"
    """
    (tmp_path / "test_values.py").write_text(textwrap.dedent(code))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: as here\n")
    first, second = (pytest_rows(tmp_path, f"{i}.jsonl", f"--share={i}/2") for i in range(2))
    name = "test_values.py::test_value[{}]".format
    assert [row["begin"] for row in first if "begin" in row] == [name(0), name(2)]
    assert [row["begin"] for row in second if "begin" in row] == [name(1), name(3)]
    found = {row["unit"]: row for row in first + second if "outcome" in row}
    assert {row["outcome"] for unit, row in found.items() if unit != name(2)} == {"passed"}
    assert found[name(2)]["outcome"] == "failed"
    assert "two is wrong" in found[name(2)]["error"]
    assert first[-1] == second[-1] == {"end": True}
    # started again, it passes over what was begun
    assert pytest_rows(tmp_path, "0.jsonl", "--share=0/2")[len(first) :] == [{"end": True}]


# ------------------------------------------------------------------------------------------- times, on a made-up device


class Clock:
    """A device whose runs take 10 ms each, and that can be asked what it was asked to do."""

    now = 0.0
    capturable = True

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Clock.now

        def elapsed_time(self, other: Clock.Event) -> float:
            return 1e3 * (other.at - self.at)

    class CUDAGraph:
        def replay(self) -> None:
            Clock.now += 0.002

    @staticmethod
    @contextmanager
    def graph(graph: Clock.CUDAGraph) -> Iterator[None]:
        if not Clock.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield


def run_once() -> None:
    Clock.now += 0.010


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_bench(run: Callable[[], None], warmup: int, rep: int, quantiles: list[float]) -> list[float]:
        start = Clock.now
        run()
        return [1e3 * (Clock.now - start)] * len(quantiles)

    stream = argparse.Namespace(wait_stream=lambda other: None)
    monkeypatch.setattr(gpu_time, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(gpu_time, "do_bench", do_bench)
    monkeypatch.setattr(gpu_time.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(Clock, "capturable", True)
    for name, value in {
        "Event": Clock.Event,
        "CUDAGraph": Clock.CUDAGraph,
        "graph": Clock.graph,
        "synchronize": lambda: None,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: nullcontext(),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("made_up_gpu")
def test_a_stage_is_timed_as_a_graph_and_beside_it_as_launched() -> None:
    row = gpu_time.kernel(run_once)
    assert row["timed"] == "graph"
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == pytest.approx((2, 2, 2))
    assert row["eager_p50_ms"] == pytest.approx(10)
    assert gpu_time.peak(run_once) == 250


@pytest.mark.usefixtures("made_up_gpu")
def test_a_stage_that_cannot_be_captured_is_timed_as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "capturable", False)
    row = gpu_time.kernel(run_once)
    assert (row["timed"], row["p50_ms"]) == ("eager", pytest.approx(10))
    assert "when stream is capturing" in row["not_captured"]


@pytest.mark.usefixtures("made_up_gpu")
@pytest.mark.parametrize(("seconds", "rounds"), [(0.075, 7), (60, 20), (0.0, 3)])
def test_steps_are_as_many_as_fit(seconds: float, rounds: int) -> None:
    row = gpu_time.steps(run_once, seconds=seconds)
    assert (row["rounds"], row["timed"]) == (rounds, "events")
    assert row["p50_ms"] == pytest.approx(10)


def test_quantiles_are_of_the_values() -> None:
    assert gpu_time.quantiles([0.003, 0.001, 0.002, 0.005, 0.004, 0.006]) == pytest.approx(
        {"p20_ms": 2.0, "p50_ms": 3.5, "p80_ms": 5.0}
    )
    assert gpu_time.quantiles([0.004]) == pytest.approx({"p20_ms": 4.0, "p50_ms": 4.0, "p80_ms": 4.0})


# ------------------------------------------------------------------------------------------------------------- table


def stage_row(**more: Any) -> dict[str, Any]:
    row = {"step": "kernels", "unit": "u", "network": "resnet50", "shape": "64-64 3x3/1 at 56", "batch": 64}
    row |= {"dtype": "bfloat16", "layout": "channels_last", "stage": "fold", "direction": "forward", "way": "default"}
    row |= {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "floor_ms": 0.5, "share": 0.25, "bound": "memory"}
    return row | {"peak_bytes": 5_000_000, "error_measured": 1e-6} | more


def model_row(variant: str, p50: float) -> dict[str, Any]:
    row = {"step": "models", "unit": variant, "network": "vgg11", "batch": 64, "variant": variant, "kind": "step"}
    row |= {"p20_ms": p50, "p50_ms": p50, "p80_ms": p50, "kept_bytes": 1_000_000, "peak_bytes": 2_000_000}
    return row | {"error_measured": 0.01, "error_plain": 0.02}


CONTENT = {
    "about": {"commit": "abc", "device": "a GPU"},
    "options": {"smoke": False},
    "steps": [{"step": "tests", "state": "done", "seconds": 3.0, "allowed_s": 9.0, "begun": 4, "units": None}],
    "choices": {"convolve: rows=64": {"blocks": {"BLOCK_M": 64}, "num_warps": 4, "num_stages": 3}},
    "rows": [
        *({"step": "tests", "unit": f"t{i}", "outcome": o} for i, o in enumerate(("passed", "passed", "failed"))),
        {"step": "tests", "unit": "t3", "error": "stopped: it took | more\nthan 60 s"},
        {"step": "device", "unit": "device", "ceilings": {"memory": 4e12}},
        model_row("conv_bn compiled", 10.0),
        model_row("triton compiled", 12.5),
        stage_row(),
        stage_row(stage="convolve", p50_ms=8.0, share=0.0625),
    ],
}


def test_the_tables_say_what_was_measured() -> None:
    text = gpu_table.markdown(CONTENT)
    assert "1 failed, 2 passed, 1 stopped." in text
    (row,) = [line for line in text.splitlines() if "triton compiled" in line]
    assert [cell.strip() for cell in row.split("|")[1:6]] == ["vgg11", "64", "triton compiled", "step", "12.5"]
    assert " 1.25 |" in row
    (row,) = [line for line in text.splitlines() if "fold forward" in line]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["fold forward", "default", "1", "2", "3", "0.5", "0.25", "memory", "5", "1e-06"]
    assert "| convolve | rows=64 | BLOCK_M=64 warps=4 stages=3 |" in " ".join(text.split())
    assert "| memory | 4e+12 | bytes/s |" in " ".join(text.split())
    assert "stopped: it took / more than 60 s" in text
    assert "smoke" not in text


def test_the_short_table_begins_with_what_is_furthest_from_its_floor() -> None:
    text = gpu_table.short(CONTENT)
    assert text.index("convolve forward") < text.index("fold forward")
    assert "errors in all: 1" in text


def test_an_empty_report_is_one_too(report: gpu_report.Report, tmp_path: Path) -> None:
    assert "none ran" in gpu_table.markdown(report.content)
    assert "Nothing." in gpu_table.short(report.content)
    assert gpu_table.plots(report.content, tmp_path) == []


# ------------------------------------------------------------------------------------------------------------- smoke


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_smoke(tmp_path: Path) -> None:
    """All steps, end to end, from another folder; every stage and every variant of the network is there, and right."""
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "bench" / "gpu" / "report.py"), "--smoke", "--minutes", "10", "--out", "out"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TDECONV", "TRITON"))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [step["step"] for step in content["steps"]] == list(gpu_report.STEPS)
    assert {step["state"] for step in content["steps"]} == {"done"}, done.stdout
    assert [row for row in content["rows"] if "error" in row] == []
    rows = [row for row in content["rows"] if row["step"] == "kernels"]
    assert {row["stage"] for row in rows} == set(roofline.STAGES)
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)
    assert all(row["share"] > 0 and row["error_measured"] is not None for row in rows)
    expected = {(v, k) for v in gpu_cases.VARIANTS if "barrier" not in v for k in ("forward", "step")}
    assert {(row["variant"], row["kind"]) for row in content["rows"] if row["step"] == "models"} == expected
    provenance = ("commit", "device", "driver", "torch", "triton", "python")
    assert all(name in row for row in content["rows"] if row["step"] != "device" for name in provenance)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "A smoke run: its times mean nothing." in text
    assert "tests: " in done.stdout
