"""From result files to tables, page and README. All results here are made up: nothing was measured."""

from __future__ import annotations

import argparse
import copy
import html.parser
import json
import random
import re
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tdeconv import cli
from tdeconv.bench import results
from tdeconv.bench.reports import answer, plots, ratios, readme, stage_tables, tables
from tdeconv.bench.reports import command as report

CPU = {"device": "AMD EPYC", "cores": 2, "threads": 2, "driver": None, "triton": None}
GPU = {"device": "NVIDIA H200", "cores": 16, "threads": 8, "driver": "575.1", "triton": "3.7.1"}
VGG = {  # case: input channels, output channels, size, count
    "3-64 3x3 at 32": (3, 64, 32, 1),
    "64-128 3x3 at 16": (64, 128, 16, 1),
    "128-256 3x3 at 8": (128, 256, 8, 1),
    "256-256 3x3 at 8": (256, 256, 8, 1),
    "512-512 3x3 at 2": (512, 512, 2, 2),
}
COST = {  # made up: a training step over that of conv + BN + ReLU
    "conv_bn_relu": 1.0,
    "conv_bn_relu_compiled": 0.9,
    "reference": 2.4,
    "paper": 2.3,
    "torch": 1.25,
    "torch_compiled": 1.2,
    "torch stale": 0.9,
    "triton": 1.0,
    "triton_compiled": 0.95,
}
SHARE = {"patches": 0.05, "moments": 0.15, "inverse_sqrt": 0.2, "fold": 0.1, "convolve": 0.45, "rest": 0.05}
CEILINGS = {"memory": 2e10, "launch": 1e-6, "matmul": {"float32": 1.5e11}}
EXPONENT = {"batch": 0.8, "channels": 1.7, "kernel_size": 2.2, "image_size": 1.6, "block": 0.9, "n_iter": 0.1}


def _stats(seconds: float, rounds: int, rng: random.Random) -> dict[str, Any]:
    data = [seconds * (1 + abs(rng.gauss(0, 0.08))) for _ in range(rounds)]
    q1, median, q3 = statistics.quantiles(data, n=4)
    return {"median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "rounds": rounds, "data": data}


def _row(seconds: float, rng: random.Random, rounds: int = 12, **info: Any) -> dict[str, Any]:
    about = {"count": 1, "batch": 128, "dtype": "float32", "layout": "contiguous", "commit": "d7cc6e7e884f", **info}
    name = " ".join(str(about[k]) for k in ("suite", "case", "implementation"))
    return {
        "group": about["case"],
        "name": name,
        "params": {},
        "stats": _stats(seconds, rounds, rng),
        "extra_info": about,
    }


def _layer_rows(network: str, cases: dict[str, Any], names: list[str], rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for case, (c, o, size, count) in cases.items():
        work = 128 * size * size * c * o * 18
        base = 3 * work / 1.2e11 + 0.004
        for name in names:
            seconds = base * COST[name] * rng.uniform(0.8, 1.2)
            saved = 4 * 128 * size * size * (c if "conv" not in name else c + 2 * o)
            info = {"suite": "layer", "network": network, "case": case, "count": count, "implementation": name}
            more = {"saved_bytes": saved, "peak_bytes": 3 * saved, "allocations": 40 + len(name), "error": 1e-6}
            rows += [_row(seconds * f, rng, kind=k, **info, **more) for k, f in (("forward", 0.35), ("step", 1.0))]
    return rows


def _stage_rows(network: str, cases: dict[str, Any], names: list[str], rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for case, (c, o, size, count) in cases.items():
        work = 128 * size * size * c * o * 18
        for name in [n for n in names if n in ("reference", "torch", "triton")]:
            base = (3 * work / 1.2e11 + 0.004) * COST[name]
            for stage, part in SHARE.items():
                for direction, of in (("forward", 0.4), ("backward", 0.6)):
                    if name == "reference" and stage == "rest":
                        continue
                    seconds = base * part * of * rng.uniform(0.7, 1.3)
                    info = {"suite": "stage", "network": network, "case": case, "count": count}
                    info |= {"implementation": name, "stage": stage, "direction": direction}
                    if stage not in ("patches", "rest"):
                        operations = seconds * 1.5e11 * rng.uniform(0.2, 0.85)
                        moved = operations / rng.uniform(2, 15) ** 2
                        floor = max(operations / 1.5e11, moved / 2e10)
                        bound = "memory" if moved / 2e10 > operations / 1.5e11 else "arithmetic"
                        info |= {"operations": operations, "bytes": moved, "floor_s": floor, "bound": bound}
                        seconds = max(seconds, 1.05 * floor)
                    rows.append(_row(seconds, rng, **info))
    return rows


def _model_rows(names: list[str], rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for model, seconds in (("vgg11", 1.1), ("resnet18", 1.6), ("resnet50", 4.0), ("mobilenet_v2", 2.2)):
        for name in names:
            info = {"suite": "model", "network": model, "case": model, "implementation": name, "batch": 16}
            rows += [_row(seconds * COST[name] * f, rng, kind=k, **info) for k, f in (("forward", 0.3), ("step", 1))]
    return rows


def _scaling_rows(names: list[str], rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for axis, exponent in EXPONENT.items():
        for value in (1, 3, 5, 7, 15) if axis in ("kernel_size", "n_iter") else (8, 16, 32, 64, 128):
            for name in [n for n in names if not n.endswith("compiled")]:
                info = {"suite": "scaling", "network": "scaling", "case": f"{axis} {value}", "implementation": name}
                info |= {"axis": axis, "value": value, "kind": "step", "floor_s": 1e-4 * value ** (exponent + 0.1)}
                rows.append(_row(3e-4 * COST[name] * value**exponent * rng.uniform(0.9, 1.1), rng, **info))
    return rows


def _memory() -> list[dict[str, Any]]:
    rows = []
    for model, of in (("vgg11", 80e6), ("resnet50", 88e6)):
        for dtype, batch in ((d, b) for d in ("float32", "bfloat16") for b in (1, 8, 64, 256)):
            about = {"model": model, "batch": batch, "size": 224, "dtype": dtype}
            full = of * batch / (2 if dtype == "bfloat16" else 1)
            rows.append({**about, "implementation": "conv_bn_relu", "saved_bytes": int(full)})
            rows.append({**about, "implementation": "torch", "saved_bytes": int(0.58 * full + 9e7)})
    return rows


def made_up(machine: dict[str, Any] = CPU, name: str = "layers", **suites: bool) -> dict[str, Any]:
    """A result file's content; ``layer=False`` and the like leave a suite out."""
    rng = random.Random(f"{machine['device']} {name}")
    ours = ["torch", "torch_compiled"] if machine["driver"] is None else ["torch", "triton", "triton_compiled"]
    names = [*tables.BASELINES, *ours]
    rows = []
    if suites.get("layer", True):
        rows += _layer_rows("vgg11", VGG, names, rng)
    if suites.get("stage", True):
        rows += _stage_rows("vgg11", VGG, names, rng)
    if suites.get("model", True):
        rows += _model_rows([n for n in names if n not in ("paper", "reference")], rng)
    if suites.get("scaling", True):
        rows += _scaling_rows([n for n in names if n != "paper"], rng)
    info = {
        **machine,
        "torch": "2.13.0+cpu",
        "python_version": "3.11.7",
        "ceilings": CEILINGS,
        "cpu": {"flags": ["sse"]},
    }
    memory = _memory() if suites.get("memory", True) else []
    return {"machine_info": info, "set": name, "datetime": "2026-11-22T23:59:00", "memory": memory, "benchmarks": rows}


def timed(case: str, implementation: str, seconds: float, **info: Any) -> dict[str, Any]:
    """A row whose numbers are known exactly."""
    about = {"suite": "layer", "network": "vgg11", "case": case, "count": 1, "implementation": implementation}
    about |= {"kind": "step", "batch": 8, "dtype": "float32", "layout": "contiguous", "commit": "d7cc6e7e884f-dirty"}
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds, "iqr": 0.2 * seconds, "rounds": 3}
    return {"name": case, "stats": {**stats, "data": [seconds] * 3}, "extra_info": {**about, **info}}


def run_of(*rows: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {**made_up(layer=False, stage=False, model=False, scaling=False, memory=False), "benchmarks": [*rows], **top}


def saved(path: Path, data: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------ result files


def _without(*path: str) -> str:
    """A good file's text with one field taken out."""
    data = run_of(timed("a", "torch", 1.0))
    inner: Any = data["benchmarks"][0] if path[0] in ("stats", "extra_info") else data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "no JSON of pytest-benchmark"),
        ("[1, 2]", "needs 'machine_info' and 'benchmarks'"),
        ('{"rows": []}', "needs 'machine_info' and 'benchmarks'"),
        (json.dumps(run_of()), "holds no benchmarks"),
        (_without("set"), "'set' missing"),
        (_without("machine_info", "cores"), "machine_info: 'cores' missing"),
        (_without("extra_info", "case"), r"benchmarks\[0\]: extra_info: 'case' missing"),
        (_without("extra_info", "kind"), r"benchmarks\[0\]: extra_info: 'kind' missing"),
        (_without("stats", "median"), r"benchmarks\[0\]: stats.median must be a number of seconds, got None"),
        (json.dumps(run_of(timed("a", "torch", 1.0, suite="tests"))), "suite must be one of .* got 'tests'"),
        (json.dumps(run_of(timed("a", "torch", 1.0), memory=[{"model": "vgg11"}])), r"memory\[0\]: 'batch', 'size'"),
        (json.dumps(run_of({"name": "a"})), "needs 'stats' and 'extra_info'"),
    ],
)
def test_what_is_no_result_file_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"x\.json .*{message}"):
        results.load(path)


def test_a_folder_stands_for_its_result_files(tmp_path: Path) -> None:
    first = saved(tmp_path / "b" / "1.json", run_of(timed("a", "torch", 1.0)))
    second = saved(tmp_path / "a" / "2.json", run_of(timed("a", "torch", 2.0)))
    saved(tmp_path / "a" / "aot.json", {"rows": []})
    (tmp_path / "a" / "binary.json").write_bytes(b"\xff\x00")
    assert list(results.found([tmp_path])) == [second, first]
    assert [data["benchmarks"][0]["stats"]["median"] for data in results.found([first, tmp_path / "a"]).values()] == [
        1,
        2,
    ]


def test_nothing_found_says_where_and_how_to_make_results(tmp_path: Path) -> None:
    saved(tmp_path / "aot.json", {"rows": []})
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no result files; make results with: python -m tdeconv"):
        results.found([tmp_path])
    with pytest.raises(ValueError, match=r"gone\.json does not exist; make results with"):
        results.found([tmp_path / "gone.json"])


def test_devices_are_told_apart() -> None:
    cpu, gpu = made_up(CPU), made_up(GPU)
    assert (results.device_of(cpu), results.folder_name(cpu)) == ("AMD EPYC, 2 cores", "amd-epyc-2-cores")
    assert (results.device_of(gpu), results.folder_name(gpu)) == ("NVIDIA H200", "nvidia-h200")
    assert results.same_device(cpu, made_up(CPU, "models"))
    for other in (GPU, {**CPU, "threads": 1}, {**CPU, "cores": 4}, {**GPU, "driver": "1"}):
        assert not results.same_device(made_up(GPU if other["driver"] == "1" else CPU), made_up(other))


def test_a_kept_run_is_compact_and_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "x.json", made_up(name="layers"))
    kept = tmp_path / "results" / "amd-epyc-2-cores" / "layers.json"
    assert results.main([str(path), "--root", str(tmp_path / "results")]) == 0
    assert f"kept: {kept}" in capsys.readouterr().out
    assert kept.stat().st_size < 0.8 * path.stat().st_size
    assert tables.summary(results.load(kept)) == tables.summary(results.load(path))


def test_what_cannot_be_kept_leaves_what_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = results.keep(saved(tmp_path / "x.json", made_up()), tmp_path)
    before = kept.read_text(encoding="utf-8")
    empty = saved(tmp_path / "empty.json", run_of(set="layers"))
    assert results.main([str(empty), "--root", str(tmp_path)]) == 2
    assert "tdeconv.bench.results: " in capsys.readouterr().err
    assert kept.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_runs_are_kept_all_or_none(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = saved(tmp_path / "x.json", made_up())
    assert results.main([str(good), str(tmp_path / name), "--root", str(tmp_path / "root")]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err
    assert not (tmp_path / "root").exists()
    assert results.main([str(good), "--root", str(good)]) == 2
    assert f"--root {good} cannot be written to: it is a file" in capsys.readouterr().err


def test_a_report_is_not_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = saved(tmp_path / "x.json", made_up())
    assert cli.main(["report", str(good), "--out", str(good)]) == 2
    said = capsys.readouterr().err
    assert said == f"tdeconv report: --out {good} cannot be written to: it is a file; give another folder\n"


def test_a_readme_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, problem in ((tmp_path / "absent", "No such file or directory"), (tmp_path, "Is a directory")):
        assert readme.main(["--readme", str(path)]) == 2
        said = capsys.readouterr().err
        assert said == f"tdeconv.bench.reports.readme: --readme {path} cannot be read: {problem}\n"


def test_files_are_written_all_or_none(tmp_path: Path) -> None:
    earlier = tmp_path / "a.md"
    earlier.write_text("earlier", encoding="utf-8")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        results.publish({earlier: "new", tmp_path / "file" / "b.md": "new"})
    assert earlier.read_text(encoding="utf-8") == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.md", "file"]


# ------------------------------------------------------------------------------------------------------------ tables


def test_a_sum_over_layers_counts_each_as_often_as_the_network_has_it() -> None:
    rows = [timed("a", "conv_bn_relu", 1.0), timed("a", "torch", 3.0)]
    rows += [timed("b", "conv_bn_relu", 2.0, count=4), timed("b", "torch", 1.0, count=4)]
    one = ratios.ratios(run_of(*rows))[0]
    assert one.value == pytest.approx((3 + 4 * 1) / (1 + 4 * 2))
    assert (ratios.subject(one), one.partial) == ("VGG-11, 5 layers", "")
    table = tables.ratio_table(rows, "torch")
    assert table is not None
    assert table.rows[1:] == [["a", "3.00"], ["b (x4)", "0.50"], ["all 5 layers", "0.78"]]


def test_a_ratio_is_of_the_layers_that_both_have_and_says_so() -> None:
    rows = [timed("a", "paper", 2.0), timed("a", "torch", 1.0), timed("b", "torch", 50.0, count=2)]
    (one,) = ratios.ratios(run_of(*rows))
    assert (one.value, one.partial) == (0.5, "1 of 3 layers")
    table = tables.headline(run_of(*rows))
    assert table is not None
    assert table.rows[1] == ["VGG-11, 3 layers: training step, torch", "0.50 (1 of 3 layers)"]


def _kinds_of_step(baseline: float = 4.0, intervals: tuple[int, ...] = (10, 4), **info: Any) -> list[dict[str, Any]]:
    """Of a layer: a fresh step of 8 seconds, a stale one of 2."""
    return [
        timed("a", "conv_bn_relu", baseline, **info),
        timed("a", "torch", 8.0, saved_bytes=9, **info),
        timed("a", "torch stale", 2.0, saved_bytes=5, stats_intervals=list(intervals), **info),
    ]


def test_fresh_and_stale_steps_and_their_means_are_compared_alike() -> None:
    data = run_of(*_kinds_of_step())
    found = {one.ours: one.value for one in ratios.ratios(data)}
    assert found == {
        "torch": 8 / 4,
        "torch stale": 2 / 4,
        "torch mean of 4 steps": pytest.approx((8 + 3 * 2) / 4 / 4),
        "torch mean of 10 steps": pytest.approx((8 + 9 * 2) / 10 / 4),
    }
    table = tables.headline(data)
    assert table is not None
    assert table.rows[1:] == [
        ["VGG-11, one layer: training step, torch", "2.00"],
        ["VGG-11, one layer: training step, torch, stale", "0.50"],
        ["VGG-11, one layer: training step, torch, mean of 4 steps", "0.88"],
        ["VGG-11, one layer: training step, torch, mean of 10 steps", "0.65"],
    ]
    assert "K-1 stale ones" in table.caption
    by_title = {table.title: table.rows for table in tables.layer_tables(data["benchmarks"])}
    assert by_title["Training step, ms"] == [
        ["layer", "conv+BN+ReLU", "torch", "torch, stale", "torch, mean of 4 steps", "torch, mean of 10 steps"],
        ["a", "4000", "8000", "2000", "3500", "2600"],
    ]
    assert by_title["Training step, torch, mean of 10 steps over the others"][1:] == [["a", "0.65"]]
    assert by_title["Kept for backward, MB"][0] == ["layer", "torch", "torch, stale"]  # no mean is kept


def test_there_is_no_mean_without_both_kinds_of_step_measured_alike() -> None:
    baseline, fresh, stale = _kinds_of_step()
    for rows in ([baseline, stale], [baseline, {**fresh, "extra_info": {**fresh["extra_info"], "batch": 3}}, stale]):
        assert not any("mean" in one.ours for one in ratios.ratios(run_of(*rows)))
    forward = [{**row, "extra_info": {**row["extra_info"], "kind": "forward"}} for row in _kinds_of_step()]
    assert [one.ours for one in ratios.ratios(run_of(*forward))] == ["torch", "torch stale"]


def test_files_without_stale_steps_say_nothing_of_them() -> None:
    data = made_up()
    assert all("stale" not in table.markdown(2) for table in tables.tables(data))
    assert tables.block_table(data) is None


def test_cost_is_shown_by_block_and_by_interval() -> None:
    rows = [
        row
        for block, baseline in ((16, 4.0), (64, 1.0))
        for row in _kinds_of_step(baseline, suite="model", network=f"resnet18 block {block}", shape=[8, 3, 128, 128])
    ]
    data = run_of(*rows)
    table = tables.block_table(data)
    assert table is not None
    assert table.rows == [
        ["training step", "fresh", "stale", "mean of 4 steps", "mean of 10 steps"],
        ["ResNet-18, block 16 at 128, whole", "2.00", "0.50", "0.88", "0.65"],
        ["ResNet-18, block 64 at 128, whole", "8.00", "2.00", "3.50", "2.60"],
    ]
    assert "Cost by block and by how often statistics are taken" in tables.summary(data)


def test_the_answer_has_the_mean_step() -> None:
    steps = answer.steps_of([run_of(*_kinds_of_step())])
    assert answer.lead("this CPU", steps, "torch") == (
        "On this CPU, a training step with deconvolution (torch) takes 2.00 times as long as with conv+BN+ReLU, in a "
        "mean of 4 steps 0.88, in a mean of 10 steps 0.65."
    )
    table = answer.answer_table(steps, "torch")
    assert table.rows == [
        [
            "training step of torch, over that of",
            "conv+BN+ReLU",
            "conv+BN+ReLU: stale",
            "conv+BN+ReLU: mean of 4 steps",
            "conv+BN+ReLU: mean of 10 steps",
        ],
        ["VGG-11, one layer", "2.00", "0.50", "0.88", "0.65"],
    ]


def test_only_what_was_measured_alike_is_compared() -> None:
    rows = [timed("a", "conv_bn_relu", 1.0, batch=8), timed("a", "torch", 3.0, batch=16)]
    assert ratios.ratios(run_of(*rows)) == []
    rows.append(timed("a", "torch", 4.0, batch=8))
    (one,) = ratios.ratios(run_of(*rows))
    assert (one.group.batch, one.value) == (8, 4.0)


def test_rows_say_the_conditions_in_which_they_differ_and_captions_the_others() -> None:
    rows = [timed("a", name, 1.0, batch=b) for b in (8, 16) for name in ("conv_bn_relu", "torch")]
    table = tables.headline(run_of(*rows))
    assert table is not None
    assert table.caption.endswith("Float32, contiguous.")
    assert [row[0].partition(":")[0] for row in table.rows[1:]] == [
        "VGG-11, one layer (batch 8)",
        "VGG-11, one layer (batch 16)",
    ]


def _stages() -> list[dict[str, Any]]:
    def row(stage: str, direction: str, seconds: float, **info: Any) -> dict[str, Any]:
        return timed("a", "torch", seconds, suite="stage", stage=stage, direction=direction, count=2, **info)

    return [
        row("inverse_sqrt", "forward", 0.004, floor_s=0.001, bound="arithmetic"),
        row("convolve", "forward", 0.003, floor_s=0.004, bound="memory"),  # with less arithmetic than the formulas
        row("rest", "backward", 0.001, floor_s=None),
    ]


def test_stages_stand_beside_their_floors() -> None:
    first, *_ = stage_tables.stage_tables(_stages())
    assert first.rows[1:] == [
        ["inverse_sqrt", "forward", "8.00", "50%", "2.00", "25%", "38%", "arithmetic"],
        ["convolve", "forward", "6.00", "38%", "8.00", "133%", "0%", "memory"],
        ["rest", "backward", "2.00", "12%", "-", "-", "12%", "-"],
        ["all", "", "16.0", "100%", "10.0", "62%", "50%", ""],
    ]
    assert stage_tables.floor_sentence(run_of(*_stages())) == (
        "A training step of VGG-11's layers takes 16.0 ms; the formulas' bytes and arithmetic take 10.0 ms at this "
        "machine's ceilings. 50% of the step lies above the stages' floors, most of it in inverse_sqrt: 38%."
    )


def test_memory_is_shown_as_ratios_batch_by_batch() -> None:
    table = tables.memory_table(made_up())
    assert table is not None
    assert table.rows[0] == ["model", "batch 1", "batch 8", "batch 64", "batch 256"]
    assert table.rows[1] == ["VGG-11 at 224, float32", "1.71", "0.72", "0.60", "0.58"]
    assert tables.memory_table(run_of(timed("a", "torch", 1.0))) is None


def test_fitted_exponents_stand_beside_the_predicted_ones() -> None:
    rows = [
        timed(f"batch {n}", "torch", 1e-3 * n**0.5, suite="scaling", axis="batch", value=n, floor_s=1e-4 * n)
        for n in (4, 16, 64)
    ]
    table = tables.scaling_table(run_of(*rows))
    assert table is not None
    assert table.rows[1:] == [["batch", "4", "64", "torch", "step", "0.50", "1.00", "1.00"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (1234.5, "1234"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.01234, "0.01"),
        (7, "7"),
    ],
)
def test_numbers_have_about_three_digits(value: float | None, text: str) -> None:
    assert ratios.number(value) == text


def test_every_table_says_what_smaller_and_larger_mean() -> None:
    for data in (made_up(CPU), made_up(GPU)):
        for table in tables.tables(data):
            assert re.search(r"[Ss]maller is better|larger|A ratio below 1 is a saving", table.caption), table.title
            assert len({len(row) for row in table.rows}) == 1, table.title


def test_the_summary_is_short_and_explains_itself() -> None:
    text = tables.summary(made_up(name="quick", model=False, scaling=False))
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 140
    opening = " ".join(text.splitlines()[:14])
    for word in ("conv+BN+ReLU", "deconvolution", "training step is", "A ratio", "AMD EPYC, 2 cores", "d7cc6e7"):
        assert word in text[: text.index("\n|")], word
    assert "interleaved rounds" in opening


@pytest.mark.parametrize("suite", ["layer", "stage", "model", "scaling"])
def test_a_run_of_one_suite_has_its_summary(suite: str) -> None:
    others = dict.fromkeys({"layer", "stage", "model", "scaling", "memory"} - {suite}, False)
    text = tables.summary(made_up(**others))
    assert ("above the stages' floors" in text) == (suite == "stage")
    assert ("How the cost grows" in text) == (suite == "scaling")
    assert ("Time with deconvolution" in text) == (suite in ("layer", "model"))


# ------------------------------------------------------------------------------------------------------------- plots


def _drawn(monkeypatch: pytest.MonkeyPatch, plot: Any, *args: Any) -> Any:
    """The figure of a plot, laid out."""
    figures = []

    def keep(name: str, height: float, draw: Any) -> str:
        with plots.mpl.rc_context(plots.STYLE):
            figure = plots.Figure((plots.WIDTH, height), layout="constrained")
            draw(figure)
            figure.draw_without_rendering()
        figures.append(figure)
        return ""

    monkeypatch.setattr(plots, "_svg", keep)
    plot(*args)
    return figures[0]


def _boxes(figure: Any) -> list[tuple[str, Any]]:
    """Tick labels, axis labels, titles and legend texts, and where they are."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in (a for a in figure.axes if a.get_visible()):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_visible()]
            texts.append(axis.label)
    return [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]


LONG = {f"{c}-{c} {k}x{k} at {s}, stride 2, groups {c}": (c, c, s, n) for c in (64, 128, 256, 512) for k, s, n in
        ((1, 7, 1), (3, 14, 12), (7, 112, 1))}  # fmt: skip


@pytest.mark.parametrize("plot", ["layers", "stages", "memory", "scaling", "roofline", "spread"])
def test_labels_do_not_overlap(monkeypatch: pytest.MonkeyPatch, plot: str) -> None:
    rng = random.Random(0)
    layers = _layer_rows("vgg11", LONG, list(COST), rng)
    stages = _stage_rows("vgg11", LONG, ["reference", "torch", "triton"], rng)
    data = made_up()
    calls: dict[str, Any] = {
        "layers": (plots.layer_bars, layers),
        "stages": (plots.stage_bars, stages),
        "memory": (plots.memory_bars, data["memory"]),
        "scaling": (plots.scaling, [f for f in tables.fits(data) if f.stage == "step"], "implementation"),
        "roofline": (plots.roofline, [r for r in stages if r["extra_info"]["implementation"] == "torch"], CEILINGS),
        "spread": (plots.spread, layers),
    }
    figure = _drawn(monkeypatch, *calls[plot])
    boxes = _boxes(figure)
    assert len(boxes) > 5
    page = figure.bbox
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= page.x0 - 1, text
        assert box.x1 <= page.x1 + 1, text
        for other, another in boxes[i + 1 :]:
            shared = (
                min(box.x1, another.x1) - max(box.x0, another.x0),
                min(box.y1, another.y1) - max(box.y0, another.y0),
            )
            assert min(shared) < 1.5, f"{text!r} and {other!r} overlap"


def test_a_roofline_needs_floors_and_ceilings() -> None:
    rows = [r for r in made_up()["benchmarks"] if r["extra_info"]["suite"] == "stage"]
    assert plots.roofline(rows, {}) is None
    bare = copy.deepcopy(rows)
    for row in bare:
        row["extra_info"].pop("operations", None)
    assert plots.roofline(bare, CEILINGS) is None
    assert plots.roofline(rows, {"memory": 2e10}) is not None  # this dtype's products were not measured


# ------------------------------------------------------------------------------------------------------------ report


def _report(out: Path, *paths: Path) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([*map(str, paths), "--out", str(out)]))


class _Page(html.parser.HTMLParser):
    """What a page asks for from elsewhere, its headings, and whether its tags are closed in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "img"):
            self.fetched.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3", "h4"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Page and Markdown of a CPU's and a GPU's run."""
    folder = tmp_path_factory.mktemp("report")
    saved(folder / "in" / "cpu.json", made_up(CPU))
    saved(folder / "in" / "gpu.json", made_up(GPU, model=False, stage=False, scaling=False))
    assert _report(folder / "out", folder / "in") == 0
    read = [(folder / "out" / f"report.{end}").read_text(encoding="utf-8") for end in ("html", "md")]
    return read[0], read[1]


def test_the_page_is_one_file_that_needs_nothing_else(both: tuple[str, str]) -> None:
    page = _Page(both[0])
    assert page.open == []
    assert page.fetched == []
    assert not re.search(r"url\((?!#)|@import|@font-face", both[0])


def test_every_plot_is_drawn_and_explained(both: tuple[str, str]) -> None:
    svgs = re.findall(r"<svg.*?</svg>", both[0], flags=re.DOTALL)
    assert len(svgs) == 8 + 2  # bars and spread (twice on the CPU); on the CPU stages, roofline, scaling; once memory
    for svg in svgs:
        assert ET.fromstring(svg).get("role") == "img"
        assert plots.INK not in svg
        assert "currentColor" in svg
    assert both[0].count("<figcaption>") == both[0].count("<figure>") == len(svgs)
    ids = re.findall(r' id="([^"]*)"', both[0])
    assert len(ids) == len(set(ids))  # a plot with another one's ids would be cut by that one's frame
    assert set(re.findall(r"(?:url\(#|href=\"#)([^\")]*)", both[0])) <= set(ids)


def test_the_answer_comes_first_and_devices_stand_side_by_side(both: tuple[str, str]) -> None:
    for text in both:
        assert text.index("On AMD EPYC, 2 cores, 2 threads, a training step") < text.index("Devices side by side")
        assert "takes " in text
    head = next(line for line in both[1].splitlines() if line.startswith("| time of a training step"))
    assert [cell.strip() for cell in head.split("|")[2:4]] == [
        "AMD EPYC, 2 cores, 2 threads: torch",
        "NVIDIA H200, driver 575.1: triton",
    ]
    row = next(
        line for line in both[1].splitlines() if line.startswith("| VGG-11, 6 layers (batch 128), over reference")
    )
    for machine, ours, cell in zip((CPU, GPU), ("torch", "triton"), row.split("|")[2:4], strict=True):
        data = made_up(machine) if machine is CPU else made_up(machine, model=False, scaling=False)
        (one,) = [r for r in ratios.ratios(data) if r[3:6] == ("step", ours, "reference") and r.suite == "layer"]
        assert cell.strip() == f"{one.value:.2f}"


def test_what_was_not_measured_is_left_out(both: tuple[str, str]) -> None:
    headings = _Page(both[0]).headings
    gpu = headings[headings.index("NVIDIA H200, driver 575.1") :]
    assert any("Layers of VGG-11" in h for h in gpu)
    assert not any("Scaling" in h or "Whole models" in h for h in gpu)
    assert "Scaling" in headings


@pytest.mark.parametrize("suite", ["layer", "stage", "model", "scaling"])
def test_a_run_of_one_suite_has_its_report(tmp_path: Path, suite: str) -> None:
    others = dict.fromkeys({"layer", "stage", "model", "scaling", "memory"} - {suite}, False)
    assert _report(tmp_path, saved(tmp_path / "x.json", made_up(**others))) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert ("Memory of whole networks" in text, "\n\n\n\n" in text) == (False, False)
    assert text.count("####") >= 2


def test_names_from_a_file_cannot_become_markup(tmp_path: Path) -> None:
    rows = [timed("<script>a</script>", name, 1.0, network="timm:<b>&") for name in ("torch", "conv_bn_relu")]
    assert _report(tmp_path, saved(tmp_path / "x.json", run_of(*rows))) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert _Page(text).fetched == []
    assert "&lt;script&gt;" in text


def test_of_two_runs_of_a_device_the_surer_one_answers(tmp_path: Path) -> None:
    quick = run_of(timed("a", "torch", 9.0), timed("a", "conv_bn_relu", 1.0), datetime="2027-01-01T00:00:00")
    long = run_of(timed("a", "torch", 2.0), timed("a", "conv_bn_relu", 1.0))
    for row in long["benchmarks"]:
        row["stats"]["rounds"] = 30
    saved(tmp_path / "quick.json", quick)
    saved(tmp_path / "long.json", long)
    assert _report(tmp_path / "out", tmp_path) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "takes 2.00 times as long" in text
    assert "9.00" in text  # in its own section


def test_bad_requests_get_a_message_and_leave_the_earlier_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = saved(tmp_path / "in" / "x.json", run_of(timed("a", "torch", 2.0), timed("a", "conv_bn_relu", 1.0)))
    assert _report(tmp_path / "out", good) == 0
    before = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "empty").mkdir()
    assert _report(tmp_path / "out", tmp_path / "empty") == 2
    assert re.search(r"^tdeconv report: .*empty holds no result files", capsys.readouterr().err, re.MULTILINE)
    assert _report(good, good) == 2  # the output folder is a file
    assert "tdeconv report: " in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == before


# ------------------------------------------------------------------------------------------------------------ README


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a README and kept results of a CPU and a GPU."""
    text = f"# Title\n\nBefore {1.23}.\n\n{readme.BEGIN}\nold 9.99\n{readme.END}\n\nAfter.\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    for machine in (GPU, CPU):
        for name, left_out in (("layers", "model"), ("models", "layer")):
            path = saved(tmp_path / "x.json", made_up(machine, name, scaling=False, **{left_out: False}))
            results.keep(path, tmp_path / "bench" / "results")
    return tmp_path


def _readme(project: Path, *options: str) -> int:
    where = ["--readme", str(project / "README.md"), "--results", str(project / "bench" / "results")]
    return readme.main([*options, *where])


def test_the_readme_is_written_between_its_marks_from_the_files(project: Path) -> None:
    assert _readme(project) == 0
    text = (project / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nBefore 1.23.\n\n<!-- results: begin -->\n\n")
    assert text.endswith("\n\n<!-- results: end -->\n\nAfter.\n")
    assert "9.99" not in text
    assert text.index("AMD EPYC") < text.index("NVIDIA H200")
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    for name in ("amd-epyc-2-cores/layers", "amd-epyc-2-cores/models", "nvidia-h200/layers", "nvidia-h200/models"):
        assert f"`bench/results/{name}.json`: torch 2.13.0" in text
        data = results.load(project / "bench" / "results" / f"{name}.json")
        ours = "torch" if data["machine_info"]["driver"] is None else "triton"
        for one in (r for r in ratios.ratios(data) if r.kind == "step" and r.ours == ours):
            assert f" {one.value:.2f} |" in text, one
    for cell in ("2026-11-22", "commit d7cc6e7", "12 interleaved\n  rounds", "| ResNet-50 at 224, bfloat16 |"):
        assert re.sub(r"\s+", " ", cell) in re.sub(r"\s+", " ", text), cell


def test_check_tells_a_stale_readme_and_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (project / "README.md").read_text(encoding="utf-8")
    assert _readme(project, "--check") == 1
    seen = capsys.readouterr()
    assert "-old 9.99" in seen.out
    assert "run python -m tdeconv.bench.reports.readme" in seen.err
    assert (project / "README.md").read_text(encoding="utf-8") == before
    assert [_readme(project), _readme(project, "--check")] == [0, 0]
    text = (project / "README.md").read_text(encoding="utf-8")
    (project / "README.md").write_text(text.replace("| VGG-11", "| vgg 11", 1), encoding="utf-8")
    assert _readme(project, "--check") == 1


def test_absent_files_are_absent_rows(project: Path) -> None:
    for name in ("amd-epyc-2-cores/models", "nvidia-h200/models", "nvidia-h200/layers"):
        (project / "bench" / "results" / f"{name}.json").unlink()
    assert _readme(project) == 0
    text = (project / "README.md").read_text(encoding="utf-8")
    assert "H200" not in text
    assert ", whole" not in text
    assert "VGG-11, 6 layers" in text


@pytest.mark.parametrize("text", ["nothing", readme.BEGIN, readme.END + readme.BEGIN, 2 * (readme.BEGIN + readme.END)])
def test_a_readme_without_its_marks_is_left_alone(project: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "README.md").write_text(text, encoding="utf-8")
    assert _readme(project) == 2
    assert "README: it needs one line <!-- results: begin -->" in capsys.readouterr().err
    assert (project / "README.md").read_text(encoding="utf-8") == text


def test_no_kept_results_are_an_error(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "none").mkdir()
    status = readme.main(["--readme", str(project / "README.md"), "--results", str(project / "none")])
    assert (status, "holds no result files" in capsys.readouterr().err) == (2, True)
