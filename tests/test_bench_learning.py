"""The command that trains converted networks beside the originals: same start, same data, kept, compared."""

from __future__ import annotations

import gzip
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tdeconv
from tdeconv.bench.learning import __main__ as command
from tdeconv.bench.learning import report, store, tasks, train
from tdeconv.bench.learning.networks import NETWORKS, Network
from tdeconv.demo.data import DataSet

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")
SMALL = ("--size", "8", "--batch", "16", "--steps", "2", "--rates", "0.1", "0.2", "--held-out", "40")


class Tiny(Network):
    """A network for digits of 8 pixels, and one that scores pixels."""

    def build(self, classes: int) -> nn.Module:
        pool = [] if self.dense else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        head = nn.Conv2d(4, classes, 1) if self.dense else nn.Linear(4, classes)
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *pool, head)

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", Tiny(""))
    monkeypatch.setitem(NETWORKS, "tiny_dense", Tiny("", dense=True))
    monkeypatch.setattr(store, "describe", lambda device: {"device": "a CPU", "threads": 1, "torch": "2"})


def runs_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"]


def plan(side: str = "original", **changes: Any) -> train.Plan:
    return train.Plan(**{
        "network": "tiny", "side": side, "data": "digits", "size": 8, "batch": 16, "steps": 3,
        "rate": 0.1, "seed": 0, **changes,
    })  # fmt: skip


def trained(of: train.Plan, **options: Any) -> dict[str, Any]:
    task = tasks.Task(tasks.load(of.data, of.size), of.size, NETWORKS[of.network].dense)
    return train.run(of, task, device=torch.device("cpu"), held_out=40, **options)


# what is trained ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["regnety_002", "googlenet", "lraspp_mobilenet_v3_large"])
def test_a_network_has_the_classes_asked_for(name: str) -> None:
    network = NETWORKS[name]
    scores = network.scores(network.build(7).eval(), torch.zeros(2, 3, 64, 64))
    assert scores.shape == ((2, 7, 64, 64) if network.dense else (2, 7))


def test_images_come_in_the_size_and_the_channels_of_networks() -> None:
    data = tasks.load("digits", 20)
    images, labels = (part[:5] for part in data.test)
    x, y = tasks.Task(data, 20, dense=False).prepare(images, labels)
    expected = nn.functional.interpolate(data.normalise(images), (20, 20), mode="bilinear")
    assert torch.equal(x, torch.cat([expected] * 3, 1))
    assert torch.equal(y, labels)


def test_pixels_brighter_than_their_images_mean_have_its_class() -> None:
    image = torch.tensor([[[[0, 0, 0], [0, 255, 0], [0, 200, 10]]]], dtype=torch.uint8)
    data = DataSet("spots", ("a", "b", "c"), lambda generator: (image, torch.tensor([1])), (image, torch.tensor([1])))
    task = tasks.Task(data, 3, dense=True)
    assert task.classes == 4
    assert task.prepare(*data.test).labels.tolist() == [[[3, 3, 3], [3, 1, 3], [3, 1, 3]]]


def test_batches_are_the_seeds_and_those_of_the_next_epoch_follow() -> None:
    task = tasks.Task(tasks.load("digits", 8), 8, dense=False)
    first, again, other = (list(islice(task.batches(seed, 500), 3)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0][1], other[0][1])
    assert [len(labels) for _, labels in first] == [500, 500, 500]  # 1,438 images: two batches an epoch


def test_photographs_are_cropped_in_the_size_asked_for() -> None:
    data = tasks.load("photographs", 12)
    assert data.test[0].shape == (tasks.HELD_OUT, 3, 12, 12)
    assert data.train(torch.Generator())[0].shape == (tasks.EPOCH, 3, 12, 12)


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes())


def test_fashion_mnist_is_read_from_debians_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "DEBIAN", tmp_path)
    images, labels = np.arange(96, dtype=np.uint8).reshape(6, 4, 4), np.arange(6, dtype=np.uint8)
    for part, n in (("train", 6), ("t10k", 2)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images[:n]))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels[:n]))
    data = tasks.load("fashion-mnist", 8)
    assert torch.equal(data.test[0], torch.from_numpy(images[:2]).unsqueeze(1))
    x, y = data.train(torch.Generator().manual_seed(0))
    assert sorted(y.tolist()) == list(range(6))
    assert torch.equal(x, torch.from_numpy(images).unsqueeze(1)[y])
    assert len(data.classes) == 10
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(labels)[:-9])
    with pytest.raises(ValueError, match=r"fashion-mnist in .* cannot be read"):
        tasks.load("fashion-mnist", 8)


# one run --------------------------------------------------------------------------------------------------------------


def test_a_run_is_plain_torchs_training() -> None:
    found = trained(plan())
    torch.manual_seed(0)
    model = NETWORKS["tiny"].build(10)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    task = tasks.Task(tasks.load("digits", 8), 8, dense=False)
    losses, norms, right = [], [], []
    for batch in islice(task.batches(0, 16), 3):
        x, y = task.prepare(*batch)
        scores = model(x)
        loss = nn.functional.cross_entropy(scores, y)
        optimiser.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)))
        optimiser.step()
        losses.append(loss.item())
        right.append((scores.argmax(1) == y).float().mean().item())
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["last_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found["train_accuracies"] == pytest.approx(right, rel=1e-5)
    assert found["gradient"] == pytest.approx(norms[0], rel=1e-5)
    assert found["diverged"] is None


def test_both_sides_start_from_the_same_weights_and_a_run_is_the_same_again() -> None:
    task = tasks.Task(tasks.load("digits", 8), 8, dense=False)
    cpu = torch.device("cpu")
    original, converted = (train._start(plan(side), NETWORKS["tiny"], task, cpu) for side in train.SIDES)
    assert any(isinstance(m, tdeconv.FastDeconv) for m in converted.modules())
    assert torch.equal(original[-1].weight, converted[-1].weight)
    first, again = (trained(plan("converted")) for _ in range(2))
    assert first["losses"] == again["losses"]
    assert first["losses"] != trained(plan("original"))["losses"]


def test_options_reach_the_conversion() -> None:
    task = tasks.Task(tasks.load("digits", 8), 8, dense=False)
    model = train._start(plan("converted", convert={"n_iter": 2}), NETWORKS["tiny"], task, torch.device("cpu"))
    assert 2 in {m.n_iter for m in model.modules() if isinstance(m, tdeconv.FastDeconv)}


def test_a_converted_network_is_calibrated_by_its_first_batch() -> None:
    task = tasks.Task(tasks.load("digits", 8), 8, dense=False)
    start, calibrated = (
        train._start(plan("converted", calibrate=asked), NETWORKS["tiny"], task, torch.device("cpu"))
        for asked in (False, True)
    )
    assert not torch.equal(start[0].weight, calibrated[0].weight)
    tdeconv.calibrate_deconv(start, task.prepare(*next(task.batches(0, 16))).images)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), calibrated.parameters(), strict=True))


@pytest.mark.parametrize("side", train.SIDES)
def test_evaluations_on_the_way_change_nothing(side: str) -> None:
    alone, watched = trained(plan(side)), trained(plan(side), checkpoints=[1, 2])
    assert watched["evaluations"].keys() == {"1", "2", "3"}
    assert watched["losses"] == alone["losses"]
    assert watched["evaluations"]["3"] == alone["evaluations"]["3"]


def test_an_evaluation_is_of_held_out_images_with_statistics_of_training_batches() -> None:
    task = tasks.Task(tasks.load("digits", 8), 8, dense=False)
    torch.manual_seed(0)
    model = NETWORKS["tiny"].build(10)
    found = train.evaluate(model, NETWORKS["tiny"], task, plan(), torch.device("cpu"), 40)
    tdeconv.update_stats(model, (task.prepare(*b).images for b in islice(task.batches(0, 16), 8))).eval()
    x, y = task.prepare(*(part[:40] for part in task.data.test))
    with torch.no_grad():
        scores = model(x)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(scores, y).item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((scores.argmax(1) == y).float().mean().item())


def test_a_run_ends_where_it_diverges() -> None:
    found = trained(plan(rate=1e38, steps=5))
    assert found["diverged"] == len(found["losses"]) < 5
    assert found["losses"][-1] is found["last_loss"] is None
    assert found["evaluations"] == {}


# the command ----------------------------------------------------------------------------------------------------------


def test_a_command_keeps_its_runs_and_the_next_one_makes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs.json"
    assert command.main(["tiny", *SMALL, "--seeds", "0", "--out", str(out)]) == 0
    first = runs_of(out)
    assert [(run["side"], run["rate"]) for run in first] == [
        *(("original", 0.1), ("original", 0.2), ("converted", 0.1), ("converted", 0.2))
    ]
    assert first[0]["machine"]["device"] == "a CPU"
    assert first[0]["versions"].keys() == {"timm", "torchvision"}
    made = []
    monkeypatch.setattr(command, "run", lambda of, *args, **options: made.append(of) or trained(of))
    more = ["tiny", "tiny_dense", *SMALL, "--seeds", "0", "1", "--original", "--out", str(out)]
    assert command.main(more) == 0
    assert [(of.network, of.rate, of.seed) for of in made] == [
        *(("tiny", 0.1, 1), ("tiny", 0.2, 1)),
        *(("tiny_dense", rate, seed) for rate in (0.1, 0.2) for seed in (0, 1)),
    ]
    assert runs_of(out)[:4] == first


def test_other_seeds_run_at_the_rate_that_was_best_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {("original", 0.1): 2.0, ("original", 0.2): 1.0, ("converted", 0.1): 1.5, ("converted", 0.2): None}
    made = []

    def run(of: train.Plan, *args: Any, **options: Any) -> dict[str, Any]:
        made.append((of.side, of.rate, of.seed))
        return {"last_loss": losses[of.side, of.rate]}

    monkeypatch.setattr(command, "run", run)
    arguments = ["tiny", *SMALL, "--rate-seeds", "first", "--out", str(tmp_path / "runs.json")]
    assert command.main(arguments) == 0
    assert made == [
        *(("original", 0.1, 0), ("original", 0.2, 0), ("original", 0.2, 1), ("original", 0.2, 2)),
        *(("converted", 0.1, 0), ("converted", 0.2, 0), ("converted", 0.1, 1), ("converted", 0.1, 2)),
    ]


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["resnet81"], "there is no network 'resnet81' here; choose from resnet26, "),
        (["--rates", "0"], "--rates: must be a positive number, got '0'"),
        (["--rates", "fast"], "--rates: must be a positive number, got 'fast'"),
        (["--seeds", "-1"], "--seeds"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--convert", "n_iter"], "--convert: must be KEY=VALUE, got 'n_iter'"),
        (["--convert", "steps=3"], "convert_deconv has no option 'steps', only "),
        (["--convert", "n_iter=0"], "--convert: n_iter must"),
        (["--checkpoints", "41"], "--checkpoints must be at most --steps 40, got 41"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--plot", "pictures"], "--plot needs --report FILE"),
        (["--report", "absent.json"], "--report absent.json cannot be read: No such file"),
        (["--data", "photographs", "--size", "1000"], "--size must be at most"),
        (["--data", "fashion-mnist"], "--data fashion-mnist needs --root DIR"),
        (["--data", "fashion-mnist", "--root", "absent"], "--root absent is not a folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(
    arguments: list[str],
    refusal: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "DEBIAN", tmp_path / "absent")
    monkeypatch.setattr(command, "run", lambda *args, **options: pytest.fail("a run was made"))
    try:
        status = command.main([*arguments, "--out", "runs.json"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert refusal in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_of_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.json"
    for text, problem in (("[]", "is no file"), ("{", "is no file"), ('{"runs": [{}]}', "a run lacks 'network'")):
        path.write_text(text)
        assert command.main(["tiny", *SMALL, "--out", str(path)]) == 2
        assert problem in capsys.readouterr().err
        assert path.read_text() == text


# the report -----------------------------------------------------------------------------------------------------------


def made(side: str, seed: int, loss: float | None, **changes: Any) -> dict[str, Any]:
    """A run of one loss at all times."""
    losses = [loss] * 12
    result = {
        "losses": losses,
        "train_accuracies": [0.5] * 12,
        "last_loss": loss,
        "gradient": 2.0,
        "diverged": None,
        "evaluations": {"6": {"loss": 1.0, "accuracy": 0.25}, "12": {"loss": 1.0, "accuracy": 0.5}},
        "step_seconds": 0.1,
    }
    plan_changes = {name: changes.pop(name) for name in list(changes) if name not in result}
    run = store.made(plan(side, seed=seed, steps=12, **plan_changes), result, torch.device("cpu"))
    return {**run, **changes}


def test_a_side_stands_at_the_rate_that_all_seeds_ran_at() -> None:
    runs = [made("original", 0, 0.5, rate=0.2), *(made("original", seed, 1.0 + seed, rate=0.1) for seed in (0, 1))]
    ((_, sides),) = report.settings(runs).items()
    side = sides["tiny"]["batch norm"]
    assert (side.rate, side.tried) == (0.1, (0.1, 0.2))
    assert side.losses() == {0: 1.0, 1: 2.0}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, (True, True, True)),
        ({"loss": 1.04}, (True, True, True)),
        ({"loss": 1.06}, (False, True, True)),
        ({"gradient": 6.1}, (True, False, True)),
        ({"gradient": None}, (True, False, True)),
        ({"evaluations": {"12": {"loss": 1.0, "accuracy": 0.4}}}, (True, True, False)),
        ({"evaluations": {"12": {"loss": None, "accuracy": 0.9}}}, (True, True, False)),
        ({"loss": None, "diverged": 12, "evaluations": {}}, (False, True, False)),
    ],
)
def test_verdicts_hold_for_every_seed(changes: dict[str, Any], verdict: tuple[bool, ...]) -> None:
    loss = changes.get("loss", 1.0)
    changes = {name: value for name, value in changes.items() if name != "loss"}
    runs = [made("original", seed, 1.0) for seed in (0, 1)]
    runs += [made("converted", 0, 0.9), made("converted", 1, loss, **changes)]
    ((setting, sides),) = report.settings(runs).items()
    of = sides["tiny"]
    found = report.verdict(of["batch norm"], of["deconvolution"], [setting.steps])
    assert tuple(found.values()) == verdict


def test_no_loss_is_level_with_a_loss_that_diverged() -> None:
    ((_, sides),) = report.settings(made(side, 0, None) for side in train.SIDES).items()
    assert not next(iter(report.verdict(*sides["tiny"].values(), [12]).values()))


@pytest.mark.parametrize(("early", "holds"), [(2.0, True), (2.1, False)])
def test_a_long_run_is_compared_on_its_way_too(early: float, holds: bool) -> None:
    ours = made("converted", 0, 1.0)
    ours["losses"] = [early] * 8 + [1.0] * 8
    theirs = made("original", 0, 1.0)
    theirs["losses"] = [1.95] * 8 + [1.0] * 8
    ((_, sides),) = report.settings([theirs, ours]).items()
    (*_, (sentence, found)) = report.verdict(*sides["tiny"].values(), [8, 16]).items()
    assert sentence == "mean loss at most batch norm's + 0.05 at all of the steps 8, 16"
    assert found == holds


def test_a_report_compares_the_runs_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = tmp_path / "one.json", tmp_path / "two.json"
    options = {"convert": {"n_iter": 2}, "calibrate": True}
    store.save(paths[0], {str(seed): made("original", seed, 1.0 + 0.2 * seed) for seed in (0, 1)})
    ours = [made("converted", seed, 1.0, **options) for seed in (0, 1)]
    store.save(paths[1], {str(index): run for index, run in enumerate([*ours, made("converted", 0, None)])})
    out, pictures = tmp_path / "new" / "table.md", tmp_path / "pictures"
    assert command.main(["--report", *map(str, paths), "--out", str(out), "--plot", str(pictures)]) == 0
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert "## digits, 8 px, batch 16, 12 steps\n" in text
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| tiny")
    ]
    assert cells[0] == ["tiny", "batch norm", "0.1 of 0.1", "1.100 ± 0.141", *["50.0 ± 0.0"] * 2, "2", ""]
    assert cells[1][1:4] == ["deconvolution", "0.1 of 0.1", "1 of 1 diverged"]
    assert cells[2][1:4] == ["deconvolution (n_iter=2, calibrated)", "0.1 of 0.1", "1.000 ± 0.000"]
    assert cells[2][-1] == "1.00"
    assert cells[3] == ["tiny", "batch norm", "1.100 ± 0.141; 25.0 ± 0.0", "1.100 ± 0.141; 50.0 ± 0.0"]
    assert "- deconvolution: loss at most batch norm's + 0.05 for every seed: 0 of 1 networks (not tiny)" in text
    assert "- deconvolution (n_iter=2, calibrated): loss at most batch norm's + 0.05 for every seed: 1 of 1" in text
    assert [path.name for path in pictures.iterdir()] == ["digits-8-px-batch-16-12-steps.svg"]
