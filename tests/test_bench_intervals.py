"""The command that trains the demo's networks at several intervals: same start, same data, kept, compared."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tdeconv.bench.intervals import __main__ as command
from tdeconv.bench.intervals import report, runs
from tdeconv.demo.data import DataSet
from tdeconv.demo.models import Line

pytestmark = pytest.mark.usefixtures("one_thread", "short")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, and a machine that need not be asked."""
    monkeypatch.setattr(runs, "NETWORKS", {"slim": 6, "resnet": 3})
    monkeypatch.setattr(
        runs, "_made", lambda: {"machine": {"device": "a CPU", "threads": 1, "torch": "2"}, "commit": "abc"}
    )


def digits() -> DataSet:
    return runs.DATA["digits"](None)


def train(out: Path, *argv: str) -> dict[str, Any]:
    assert command.main(["slim", "--data", "digits", "--out", str(out), *argv]) == 0
    return json.loads(out.read_text())


# runs -----------------------------------------------------------------------------------------------------------------


def test_every_line_is_trained_at_its_methods_best_rate(tmp_path: Path) -> None:
    found = train(tmp_path / "runs.json", "--seeds", "0", "1")["runs"]
    tried = [run for run in found if run["held_out"]]
    kept = [run for run in found if not run["held_out"]]
    assert [(run["method"], run["rate"], run["steps"], run["seed"]) for run in tried] == [
        (method, rate, 2, 0) for method in ("batch_norm", "deconvolution") for rate in runs.RATES
    ]
    assert [(run["seed"], run["method"], run["stats_interval"]) for run in kept] == [
        (seed, line.method, line.stats_interval) for seed in (0, 1) for line in runs.LINES
    ]
    for run in kept:
        of_method = [other for other in tried if other["method"] == run["method"]]
        assert run["rate"] == min(of_method, key=lambda other: other["test_loss"])["rate"]
        assert (run["steps"], run["test_images"]) == (6, 359)
        assert 0 < run["test_accuracy"] <= 1
        assert run["last_loss"] > 0


def test_a_run_that_the_file_holds_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train(tmp_path / "runs.json", "--seeds", "0")
    made: list[runs.Plan] = []
    whole = runs.train

    def counted(plan: runs.Plan, data: DataSet) -> runs.Run:
        made.append(plan)
        return whole(plan, data)

    monkeypatch.setattr(runs, "train", counted)
    assert train(tmp_path / "runs.json", "--seeds", "0") == before
    assert made == []
    after = train(tmp_path / "runs.json", "--seeds", "0", "1")
    assert after["runs"][: len(before["runs"])] == before["runs"]
    assert [plan.seed for plan in made] == [1] * len(runs.LINES)


def test_a_diverged_run_is_kept_and_its_rate_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = list(runs.plans("slim", 0, "digits", None))
    losses = {0.01: None, 0.03: 0.5, 0.1: 0.4}
    made = {runs.key(plan): {"test_loss": losses[plan.rate]} for plan in plans}
    assert {plan.rate for plan in runs.plans("slim", 0, "digits", made) if not plan.held_out} == {0.1}
    assert runs._number(math.nan) is None


def test_rates_are_chosen_without_the_test_images() -> None:
    data = digits()
    held_out = runs.held_out(data)
    parts = [data.test[0], held_out.test[0], held_out.train(torch.Generator())[0]]
    test, chosen_by, learnt = ({image.numpy().tobytes() for image in part} for part in parts)
    assert len(chosen_by) == 1438 // 5
    assert len(learnt) == 1438 - 1438 // 5
    assert not test & chosen_by
    assert not test & learnt
    assert not chosen_by & learnt


def write_mnist(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (raw / f"t10k-{name}-ubyte").write_bytes(head + array.tobytes())


def test_mnists_test_images_are_split_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TEST", 2)
    images, labels = np.arange(160, dtype=np.uint8).reshape(10, 4, 4), np.arange(10, dtype=np.uint8)
    write_mnist(tmp_path, images, labels)
    data = runs.DATA["mnist"](tmp_path)
    x, y = data.train(torch.Generator().manual_seed(0))
    assert (len(y), len(data.test[1])) == (8, 2)
    assert sorted([*y.tolist(), *data.test[1].tolist()]) == list(range(10))
    assert torch.equal(x, torch.from_numpy(images).unsqueeze(1)[y])


# times ----------------------------------------------------------------------------------------------------------------


def test_steps_of_each_kind_are_measured_and_kept_beside_the_runs(tmp_path: Path) -> None:
    before = train(tmp_path / "runs.json", "--seeds", "0")
    after = train(tmp_path / "runs.json", "--time", "3")
    assert after["runs"] == before["runs"]
    (time,) = after["times"]
    assert (time["data"], time["network"], time["rounds"]) == ("digits", "slim", 3)
    assert all(time[kind] > 0 for kind in ("batch_norm", "fresh", "stale"))


def test_a_measured_step_is_of_the_kind_that_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[bool]]] = []

    def step(learner: runs.Learner, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        *layers, classifier = [m for m in learner.model.modules() if hasattr(m, "stats_interval")] or [None]
        seen.append((learner.run.line.method, [layer._given for layer in (*layers, classifier) if layer is not None]))
        return 0.0, 1.0

    monkeypatch.setattr(runs.Learner, "step", step)
    runs.time_steps(digits(), "slim", 1)
    assert seen[:3] == [
        ("batch_norm", []), ("deconvolution", [True] * 6), ("deconvolution", [False] * 5 + [True]),
    ]  # fmt: skip
    assert len(seen) == 3 * 3  # the first two of each warm up


# report ---------------------------------------------------------------------------------------------------------------


def run(interval: int, seed: int, accuracy: float, loss: float | None = 0.5) -> runs.Run:
    """Of batch norm with interval 0."""
    method = "deconvolution" if interval else "batch_norm"
    plan = {"data": "digits", "network": "slim", "method": method, "stats_interval": max(interval, 1), "steps": 6}
    result = {"last_loss": loss, "test_loss": loss, "test_accuracy": accuracy, "test_images": 1000}
    return {**plan, "rate": 0.1, "seed": seed, "held_out": False, **result, "step_seconds": 1.0, **runs._made()}


def keyed(*found: runs.Run) -> dict[str, runs.Run]:
    return {runs.key(one): one for one in found}


def lines_of(base: list[float], ours: list[float]) -> report.Lines:
    found = [run(k, seed, value) for k, values in ((1, base), (10, ours)) for seed, value in enumerate(values)]
    (lines,) = report.settings(keyed(*found)).values()
    return lines


@pytest.mark.parametrize(
    ("base", "ours", "within"),
    [
        ([0.90, 0.92], [0.90, 0.92], True),
        ([0.90, 0.92], [0.95, 0.97], True),  # better is no fault
        ([0.90, 0.92], [0.89, 0.91], True),  # standard deviation .014, difference .010
        ([0.90, 0.92], [0.88, 0.90], False),  # .014, .020
        ([0.90, 0.90], [0.899, 0.899], True),  # no spread, and a single image of 1,000
        ([0.90, 0.90], [0.898, 0.898], False),
        ([0.90], [0.899], True),
        ([0.90], [0.898], False),
    ],
)
def test_an_interval_is_within_the_spread_unless_it_is_below(
    base: list[float], ours: list[float], within: bool
) -> None:
    assert report.within(lines_of(base, ours), 10) is within


def test_differences_are_paired_by_the_seeds_that_both_have() -> None:
    lines = lines_of([0.5, 0.6, 0.7], [0.4, 0.8])
    assert report.differences(lines, 10) == pytest.approx([-0.1, 0.2])
    assert report.differences(lines, 4) == []


def test_the_report_says_where_an_interval_does_not_hold() -> None:
    found = keyed(
        run(0, 0, 0.5), run(0, 1, 0.7), run(1, 0, 0.9), run(1, 1, 0.92), run(4, 0, 0.91), run(4, 1, 0.91),
        run(10, 0, 0.1, None), run(10, 1, 0.92), {**run(1, 0, 0.2), "held_out": True},
    )  # fmt: skip
    time = {"data": "digits", "network": "slim", "batch_norm": 0.01, "fresh": 0.03, "stale": 0.005, **runs._made()}
    text = report.text(found, {"digits slim": time})
    assert "- Interval 4: within the seeds' spread of interval 1 in 1 of 1 settings; over all, +0.00 points" in text
    assert "- Interval 10: within the seeds' spread of interval 1 in 0 of 1 settings (not digits with slim)" in text
    assert "Interval 30" not in text
    rows = {
        cells[1]: cells[2:-1] for line in text.splitlines() if len(cells := [c.strip() for c in line.split("|")]) > 2
    }
    assert rows["batch norm"] == ["0.1", "2", "60.0 ± 14.1", "", "", "0.500 ± 0.000"]
    assert rows[Line("deconvolution", 10).title][2:] == [
        "51.0 ± 58.0",
        "-40.0 ± 56.6",
        "**below**",
        "0.500 (1 diverged)",
    ]
    assert rows["slim, digits"] == ["10.0 ms", "30.0 ms", "5.0 ms", "3.00", "1.75", "1.12", "0.75", "0.58"]


def test_files_are_compared_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a.json", 0), ("b.json", 1)):
        runs.save(tmp_path / name, keyed(run(1, seed, 0.9), run(4, seed, 0.9)), {})
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert command.main(["--report", *files, "--out", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert [line.split("|")[3].strip() for line in text.splitlines() if "every 4th" in line] == ["2"]


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["alexnet"], "there is no network 'alexnet' here; choose from slim, resnet"),
        (["--seeds", "-1"], "--seeds must be whole numbers from 0 to 2**32 - 1, got -1"),
        (["--data", "mnist"], "--data mnist needs --root DIR, the folder with MNIST in torchvision's layout"),
        (["--data", "mnist", "--root", "nowhere"], "--root nowhere: the test images of MNIST cannot be read"),
        (["--data", "mnist", "--root", "damaged"], "--root damaged: the test images of MNIST cannot be read"),
        (["--report", "nowhere.json"], "--report nowhere.json cannot be read"),
        (["--report", "other.json"], "--report other.json is no file of tdeconv.bench.intervals"),
    ],
)
def test_bad_requests_are_one_line(
    argv: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"runs":[{}]}')
    write_mnist(Path("damaged"), np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8))
    Path("damaged/MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"")
    monkeypatch.setattr(runs, "train", lambda *a: pytest.fail("training started"))
    assert command.main([*argv, "--out", "out.json"]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("out.json").exists()


def test_batches_go_on_with_the_next_epoch() -> None:
    batches = list(islice(runs._batches(digits(), 0), 1438 // runs.BATCH + 1))
    assert all(len(labels) == runs.BATCH for _, labels in batches)
    assert not torch.equal(batches[0][0], batches[-1][0])
