"""``tdeconv bench`` as typed: what it measures, saves, compares and refuses, on a layer too small to time."""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tdeconv import cli
from tdeconv.bench import results, run, sets

SMALL = ["--batch", "2", "--rounds", "3", "--select", "test_layer and 3-64 and not compiled"]
THREADS = str(torch.get_num_threads())  # this process's, for that of the measurement
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", THREADS)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def bench(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return run.run(parser.parse_args([str(one) for one in argv]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run's results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", THREADS)
        out = tmp_path_factory.mktemp("bench")
        assert bench(*SMALL, "--out", out) == 0
    return out


def test_a_run_measures_and_saves(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["quick.json", "quick.md"]
    data = results.load(folder / "quick.json")
    rows = {(r["extra_info"]["implementation"], r["extra_info"]["kind"]): r for r in data["benchmarks"]}
    names = ("conv_bn_relu", "reference", "torch", "torch stale")
    assert set(rows) == {(name, kind) for name in names for kind in ("forward", "step")}
    assert data["set"] == "quick"
    assert data["machine_info"]["node"] == ""
    assert data["machine_info"]["ceilings"]["matmul"]["float32"] > 1e8
    for (name, kind), row in rows.items():
        info = row["extra_info"]
        assert len(row["stats"]["data"]) == 3
        assert row["params"] == {"case": "vgg11 3-64 3x3 at 32", "implementation": name, "layout": "contiguous",
                                 "dtype": "float32", "part": kind}  # fmt: skip
        assert (info["network"], info["case"], info["count"], info["batch"]) == ("vgg11", "3-64 3x3 at 32", 1, 2)
        assert info["share"] == pytest.approx(info["floor_s"] / row["stats"]["median"])
        assert info["torch"] == torch.__version__
        assert info["commit"]
        assert info["saved_bytes"] > 0
        assert info["allocations"] > 0
    assert [name for (name, _), r in rows.items() if r["extra_info"].get("stats_intervals") == [10]] == [names[-1]] * 2
    for name in names:
        forward, step = (min(rows[name, kind]["stats"]["data"]) for kind in ("forward", "step"))
        assert 0 < forward < step  # the fastest, as other programs can only slow a round down
    assert {row["group"] for row in rows.values()} == {"vgg11 3-64 3x3 at 32 forward", "vgg11 3-64 3x3 at 32 step"}
    memory = {(m["model"], m["implementation"]) for m in data["memory"]}
    assert memory == {(model, one) for model in ("vgg11", "resnet50") for one in ("conv_bn_relu", "torch")}


def test_the_tables_are_printed_and_saved(folder: Path) -> None:
    text = (folder / "quick.md").read_text(encoding="utf-8")
    assert "training step" in text
    assert "torch, mean of 10 steps" in text
    assert "conv+BN+ReLU" in text


def _with_medians(folder: Path, path: Path, change: Callable[[float], float]) -> Path:
    data = json.loads((folder / "quick.json").read_text(encoding="utf-8"))
    for row in data["benchmarks"]:
        row["stats"]["median"] = change(row["stats"]["median"])
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_slower_than_before_fails_and_keeps_both(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    faster = _with_medians(folder, tmp_path / "faster.json", lambda s: s / 1000)
    before = faster.read_bytes()
    assert bench(*SMALL, "--out", tmp_path, "--compare", faster, "--fail-above", "10%") == 1
    out, err = capfd.readouterr()
    assert "Performance has regressed" in err
    assert "Traceback" not in out + err
    assert "machine_info is different" not in err
    assert results.load(tmp_path / "quick.json")["set"] == "quick"
    assert faster.read_bytes() == before


def test_as_fast_as_before_passes(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before there were stale steps, too."""
    slower = _with_medians(folder, tmp_path / "slower.json", lambda s: s * 1000)
    data = json.loads(slower.read_text(encoding="utf-8"))
    data["benchmarks"] = [r for r in data["benchmarks"] if r["extra_info"]["implementation"] != "torch stale"]
    slower.write_text(json.dumps(data), encoding="utf-8")
    assert bench(*SMALL, "--out", tmp_path, "--compare", slower, "--fail-above", "10") == 0
    assert "Comparing against benchmarks" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: object) -> str:
    """What is said of arguments that are refused before anything is measured."""
    monkeypatch.setattr(run, "_measure", lambda args: pytest.fail("it was measured"))
    assert bench(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tdeconv bench: ")
    assert err.count("\n") == 1
    return err


def test_results_of_another_device_are_not_compared_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.json"
    data = json.loads((folder / "quick.json").read_text(encoding="utf-8"))
    data["machine_info"] |= {"device": "NVIDIA H200", "driver": "580"}
    other.write_text(json.dumps(data), encoding="utf-8")
    said = refused(capsys, monkeypatch, "--compare", other, "--out", tmp_path / "out")
    assert "is from another device: device / cores / threads / driver there NVIDIA H200 / " in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["no json", "[]", '{"benchmarks": []}', '{"machine_info": {}, "benchmarks": []}'])
def test_a_file_without_results_is_not_compared_with(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    assert "x.json" in refused(capsys, monkeypatch, "--compare", path, "--out", tmp_path)


def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv, words in {
        (
            "--model",
            "torchvision:resnet19",
        ): "--model 'torchvision:resnet19': torchvision has no such model; similar: res",
        ("--fail-above", "10%"): "--fail-above needs --compare FILE",
        ("--paper-code", tmp_path): "--paper-code must be a checkout of the paper's repository",
        ("--model", ""): "--model '': torchvision has no such model",
        ("--scaling", "--block", "8"): "--block is one of the sizes that --scaling varies",
        (
            "--compare",
            tmp_path / "absent",
        ): f"--compare {tmp_path / 'absent'} cannot be read: No such file or directory",
        ("--compare", tmp_path): f"--compare {tmp_path} cannot be read: Is a directory",
    }.items():
        assert words in refused(capsys, monkeypatch, *argv, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@no_gpu
def test_without_a_gpu_what_needs_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = refused(capsys, monkeypatch, "--backend", "triton", "--out", tmp_path)
    assert "backend 'triton' was asked for by the backend argument but cannot run: " in triton
    assert "torch sees no GPU" in refused(capsys, monkeypatch, "--device", "cuda", "--out", tmp_path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--rounds", "0"), "--rounds: must be at least 1, got 0"),
        (("--rounds", "many"), "--rounds: must be a whole number, got 'many'"),
        (("--out", ""), "--out: must not be empty"),
        (("--compare", ""), "--compare: must not be empty"),
        (("--batch", "-3"), "--batch: must be at least 1, got -3"),
        (("--block", "0"), "--block: must be at least 1, got 0"),
        (("--stats-interval", "0"), "--stats-interval: must be at least 1, got 0"),
        (("--fail-above", "0%"), "--fail-above: must be a whole percentage from 1% to 99%, got 0%"),
        (("--fail-above", "2.5%"), "--fail-above: must be a whole percentage from 1% to 99%, got 2.5%"),
        (("--quick", "--layers"), "not allowed with"),
        (("--backend", "cuda"), "invalid choice: 'cuda'"),
    ],
)
def test_arguments_are_checked(argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench(*argv)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ("zzz", r"matches none of the \d+ rows; their names are like 'test_layer\[vgg11 3-64 3x3 at 32-conv_bn_relu-"),
        ("3-64 and and", r"cannot be read: at column \d+: expected not OR left parenthesis OR identifier; got and"),
    ],
)
def test_a_selection_of_nothing_is_refused(
    select: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_measure", lambda args: pytest.fail("it was measured"))
    assert bench("--select", select, "--out", "new/folder") == 2
    out, err = capfd.readouterr()
    assert re.match(f"tdeconv bench: --select '{select}' {words}", err)
    assert (out, err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_its_results_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench(*SMALL, "--rounds", "1") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-out"]
    assert sorted(path.name for path in (tmp_path / "bench-out").iterdir()) == ["quick.json", "quick.md"]


def test_a_folder_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    said = refused(capsys, monkeypatch, "--out", tmp_path / "file" / "folder")
    assert f"--out {tmp_path / 'file' / 'folder'} cannot be written to: Not a directory" in said
    said = refused(capsys, monkeypatch, "--out", tmp_path / "file")
    assert f"--out {tmp_path / 'file'} cannot be written to: it is a file; give another folder" in said


def test_a_run_that_fails_keeps_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick.json").write_text("earlier", encoding="utf-8")
    monkeypatch.setattr(run, "_measure", lambda args: (3, ""))
    assert bench("--out", tmp_path) == 3
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("quick.json", "earlier")]


FULL = """
import argparse, resource, sys
from pathlib import Path
from tdeconv.bench import run
text = Path(sys.argv[1]).read_text()
run._measure = lambda args: (0, text)
run.check = lambda args: None  # the disk was not full yet
parser = argparse.ArgumentParser()
run.add_arguments(parser)
args = parser.parse_args(["--out", sys.argv[2]])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(run.run(args))
"""


def test_a_full_disk_is_said_and_earlier_results_stay(folder: Path, tmp_path: Path) -> None:
    """The limit on a file's size makes writing fail half-way, as a full disk does."""
    earlier = {"quick.json": "earlier", "quick.md": "tables"}
    for name, text in earlier.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", FULL, str(folder / "quick.json"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"tdeconv bench: the results cannot be written to {tmp_path}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == earlier


def test_a_disk_that_is_full_already_is_noticed_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        said = refused(capsys, monkeypatch, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"--out {tmp_path} cannot be written to: File too large" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_of_timm_s_is_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "timm:mobilenetv3_small_050", "--batch", "16", "--size", "32", "--rounds", "1"]
    assert bench(*argv, "--select", "not compiled", "--out", tmp_path) == 0
    data: dict[str, Any] = results.load(tmp_path / "model-timm-mobilenetv3_small_050.json")
    assert {row["extra_info"]["network"] for row in data["benchmarks"]} == {"timm:mobilenetv3_small_050"}
    assert {row["extra_info"]["suite"] for row in data["benchmarks"]} == {"model"}
    capfd.readouterr()
    assert bench(*argv[:3], "1", *argv[4:], "--out", tmp_path) == 2  # one image has no statistics to normalise by
    out, err = capfd.readouterr()
    assert "--model timm:mobilenetv3_small_050 does not take images (1, 3, 32, 32)" in out
    assert "Traceback" not in out + err


def test_without_torchvision_the_quick_set_has_layers_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "has_torchvision", lambda: False)
    monkeypatch.setattr(run, "has_torchvision", lambda: False)
    monkeypatch.setattr(run, "_measure", lambda args: (5, ""))
    assert sets.plan("quick", torch.device("cpu"), sets.Options()).networks == {}
    assert sets.plan("quick", torch.device("cpu"), sets.Options()).layers
    assert bench("--out", tmp_path) == 5
    assert "pip install 'tdeconv[vision]'" in capsys.readouterr().out


def test_without_torchvision_networks_end_in_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it then raises ModuleNotFoundError
    assert cli.main(["bench", "--models", "--out", str(tmp_path)]) == 1
    assert "pip install 'tdeconv[" in capsys.readouterr().err
