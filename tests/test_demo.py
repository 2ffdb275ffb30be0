"""The demo: its data, its networks, what it draws and reports, and how it ends when it cannot."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tdeconv
from helpers import randn
from tdeconv import cli
from tdeconv.demo import data, main, models, options, report, train, whitening
from tdeconv.demo.errors import DemoError

PICTURES = {"training.png", "covariance.png", "kernels.png", "photographs.png", "densities.png"}
BASE = "batch_norm"
NAMES = [BASE, "deconvolution_1", "deconvolution_4", "deconvolution_10"]
TINY = ("--data", "digits", "--epochs", "3", "--seeds", "0")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings_for(*argv: str) -> options.Settings:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.settings_of(parser.parse_args(argv))


# the whole ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small demo's folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert cli.main(["demo", *TINY, "--out", str(folder)]) == 0
    return folder, out.getvalue()


def test_a_demo_writes_its_pictures_and_results_and_says_where(tiny: tuple[Path, str]) -> None:
    folder, out = tiny
    assert {path.name for path in folder.iterdir()} == PICTURES | {"results.json"}
    for name in PICTURES:
        with Image.open(folder / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) >= 500
        assert pixels.std() > 10, f"{name} is blank"
    *_, where, names = out.rstrip().splitlines()
    assert where == f"Written to {folder.resolve()}:"
    assert set(names.split()) == PICTURES | {"results.json"}


def test_a_demo_prints_a_row_per_epoch_with_all_lines(tiny: tuple[Path, str]) -> None:
    head, below = tiny[1].splitlines()[1:3]
    assert head.split() == ["batch", "norm", *["deconvolution"] * 3]
    assert below.split() == ["every", "step", "every", "4th", "step", "every", "10th", "step"]
    rows = [line.split() for line in tiny[1].splitlines() if line.split()[1:2] in (["1/3"], ["2/3"], ["3/3"])]
    assert [row[1] for row in rows] == ["1/3", "2/3", "3/3"]
    for row in rows:  # seed, epoch, then loss, accuracy, step time of each
        assert (row[4::5], row[6::5]) == (["%"] * 4, ["ms"] * 4)
        assert all(float(value) > 0 for start in (2, 3, 5) for value in row[start::5])


def test_a_demo_concludes_with_each_line_by_its_title(tiny: tuple[Path, str]) -> None:
    for line in settings_for(*TINY).lines:
        assert sum(row.startswith(f"  {line.title}  ") for row in tiny[1].splitlines()) == 1 + (line.name != BASE)


def test_results_hold_every_epoch_and_step_of_every_run(tiny: tuple[Path, str]) -> None:
    results = json.loads((tiny[0] / "results.json").read_text())
    assert results["format"] == "tdeconv-demo/2"
    assert results["versions"]["torch"] == torch.__version__
    assert results["settings"]["seeds"] == [0]
    assert results["settings"]["backend"] == "torch"
    assert results["data"] == {"name": "digits", "classes": list("0123456789"), "image": [1, 8, 8], "test_images": 359}
    assert results["settings"]["intervals"] == [1, 4, 10]
    assert [(run["line"], run["seed"]) for run in results["runs"]] == [(name, 0) for name in NAMES]
    assert list(results["summary"]) == NAMES
    for run in results["runs"]:
        assert [epoch["number"] for epoch in run["epochs"]] == [1, 2, 3]
        assert len(run["step_loss"]) == len(run["step_seconds"]) == 3 * (1438 // 64)
        assert run["step_seconds"] == sorted(run["step_seconds"])
        last = run["epochs"][-1]
        assert last["seconds"] == run["step_seconds"][-1]
        assert last["train_loss"] == pytest.approx(np.mean(run["step_loss"][-22:]))
        begin = run["epochs"][-2]["seconds"]
        assert last["mean_step_seconds"] == pytest.approx((last["seconds"] - begin) / 22)
        summary = results["summary"][run["line"]]["test_accuracy"]
        assert summary == {"mean": last["test_accuracy"], "std": None, "values": [last["test_accuracy"]]}


def test_all_lines_learn_the_digits(tiny: tuple[Path, str]) -> None:
    results = json.loads((tiny[0] / "results.json").read_text())
    for run in results["runs"]:
        assert run["epochs"][-1]["test_accuracy"] > 0.95
        assert run["epochs"][-1]["train_loss"] < 0.3 * run["epochs"][0]["train_loss"]


# data ---------------------------------------------------------------------------------------------------------------


def test_train_and_test_crops_come_from_disjoint_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the left half black and the right half white, no crop mixes them or is from the wrong side."""
    picture = torch.zeros(3, 60, 101, dtype=torch.uint8)
    picture[..., 50:] = 255
    monkeypatch.setattr(data, "read_photograph", lambda name: picture)
    images = data.photographs(train_size=200, test_size=200)
    left, right = images.train(generator())[0].float().mean((1, 2, 3)), images.test[0].float().mean((1, 2, 3))
    assert left.max() < 110
    assert right.min() > 145


def test_the_photographs_are_ten_colour_pictures_larger_than_two_crops() -> None:
    shapes = [data.read_photograph(name).shape for name in data.PHOTOGRAPHS]
    assert len(shapes) == 10
    assert all(c == 3 and h >= 48 and w >= 48 for c, h, w in shapes)
    assert set(data.SCENES) < set(data.PHOTOGRAPHS)


def test_random_crops_are_labelled_balanced_and_varied() -> None:
    pictures = [torch.full((3, 40, 50), value, dtype=torch.uint8) for value in (60, 130, 200)]
    images, labels = data.random_crops(pictures, 300, 24, generator())
    assert images.shape == (300, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [100, 100, 100]
    assert labels.tolist() != sorted(labels.tolist())
    brightness = images.float().mean((1, 2, 3))
    means = [float(brightness[labels == k].mean()) for k in range(3)]
    assert means == sorted(means)
    assert all(brightness[labels == k].std() > 5 for k in range(3))
    assert images.float().std((1, 2, 3)).median() > 4  # noise


def test_random_crops_are_mirrored_half_of_the_time() -> None:
    ramp = torch.arange(0, 240, 2, dtype=torch.uint8).expand(3, 40, 120)
    images, _ = data.random_crops([ramp], 400, 24, generator())
    rises = (images[..., 12:].float().mean((1, 2, 3)) > images[..., :12].float().mean((1, 2, 3))).float().mean()
    assert 0.4 < rises < 0.6


@pytest.mark.parametrize("name", ["photographs", "digits"])
def test_a_seed_decides_the_images_and_their_order(name: str) -> None:
    images = data.photographs(train_size=100, test_size=50) if name == "photographs" else data.load(name)
    (x, y), (again, y_again), (other, _) = (images.train(generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(x, again)
    assert torch.equal(y, y_again)
    assert not torch.equal(x, other)
    z = images.normalise(images.train(generator())[0])
    assert z.mean((0, 2, 3)).abs().max() < 0.05
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_batches_are_the_same_for_all_lines_and_differ_between_epochs_and_seeds() -> None:
    images = data.load("digits")
    first, again = (train.batches_of(images, 1, 1, 64) for _ in range(2))
    assert len(first) == 1438 // 64 == train.steps_per_epoch(images, 64)
    assert all(len(y) == 64 for _, y in first)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    for seed, epoch in ((1, 2), (2, 1)):
        assert not torch.equal(first[0][0], train.batches_of(images, seed, epoch, 64)[0][0])
    assert [len(y) for _, y in train.batches_of(images, 1, 1, 5000)] == [1438]


def test_no_digit_is_in_both_parts() -> None:
    images = data.load("digits")
    seen = {image.numpy().tobytes() for image in images.train(generator())[0]}
    assert len(images.test[0]) + 1438 == 1797
    assert not any(image.numpy().tobytes() in seen for image in images.test[0])


def test_shifts_move_by_at_most_the_reach_and_flip() -> None:
    images = torch.zeros(400, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4], images[:, 0, 4, 5] = 200, 100
    moved = data.shift_and_flip(images, generator(), reach=2)
    places = {tuple(divmod(int(image.flatten().argmax()), 9)) for image in moved}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    mirrored = sum(int(image[0, row, column - 1]) == 100 for image in moved for row, column in [brightest(image)])
    assert 150 < mirrored < 250


def brightest(image: Tensor) -> tuple[int, int]:
    row, column = divmod(int(image.flatten().argmax()), 9)
    return row, column


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, parts: dict[bool, tuple[Any, Any]]) -> None:
    """A stand-in whose data sets hold ``parts[train]``."""

    class Images:
        classes = ("a", "b")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            if train not in parts:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            self.data, self.targets = parts[train]

    package, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    for name in data.TORCHVISION.values():
        setattr(datasets, name, Images)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_torchvisions_images_become_channels_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grey = torch.randint(256, (6, 28, 28), dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0, 1])
    colour = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3), [0, 1, 1, 0]
    fake_torchvision(monkeypatch, {True: grey, False: grey})
    images = data.load("mnist", tmp_path)
    assert torch.equal(images.test[0], grey[0].unsqueeze(1))
    assert images.classes == ("a", "b")
    fake_torchvision(monkeypatch, {True: colour, False: colour})
    images = data.load("cifar10", tmp_path)
    assert images.test[0].shape == (4, 3, 32, 32)
    assert images.test[0][1, 2, 3, 4] == colour[0][1, 3, 4, 2]
    assert images.test[1].tolist() == [0, 1, 1, 0]
    assert images.train(generator())[0].shape == (4, 3, 32, 32)


def test_missing_training_images_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grey = torch.zeros(6, 28, 28, dtype=torch.uint8), torch.zeros(6, dtype=torch.long)
    fake_torchvision(monkeypatch, {False: grey})
    with pytest.raises(DemoError, match=r"the training images of mnist cannot be read under .*--download"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no picture, and no label", bytes(64)])
def test_damaged_images_are_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    assert cli.main(["demo", "--data", "mnist", "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("tdeconv demo: the training images of mnist cannot be read under --root ")
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "out").exists()


# networks -----------------------------------------------------------------------------------------------------------


LINES = (models.Line("batch_norm"), models.Line("deconvolution"), models.Line("deconvolution", 10))


@pytest.mark.parametrize("arch", ["slim", "resnet", "vgg11"])
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 24, 24)])
def test_networks_score_images_of_any_size(arch: str, shape: tuple[int, ...]) -> None:
    for line in LINES:
        network = models.build(arch, line, shape[1], 7).eval()
        assert network(torch.rand(shape)).shape == (2, 7)


def layers_of(line: models.Line, arch: str) -> tuple[torch.nn.Module, list[Any]]:
    torch.manual_seed(5)
    network = models.build(arch, line, 3, 10)
    kinds = (torch.nn.Conv2d, torch.nn.Linear, tdeconv.FastDeconv)
    return network, [layer for layer in network.modules() if isinstance(layer, kinds)]


@pytest.mark.parametrize(("arch", "groups"), [("slim", [1, 2, 2, 4, 8]), ("resnet", [1, 2, 2, 2, 4, 2, 4, 8, 4])])
def test_the_lines_start_from_equal_weights_and_normalise_once(arch: str, groups: list[int]) -> None:
    (base, plain), (network, ours), (_, sparse) = (layers_of(line, arch) for line in LINES)
    for a, *others in zip(plain, ours, sparse, strict=True):
        for b in others:
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.bias, b.bias)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in base.modules()) == len(groups)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
    assert [layer.in_channels // layer.block for layer in ours[:-1]] == groups
    assert isinstance(ours[-1], tdeconv.Delinear)
    assert (ours[0].freeze, ours[0].n_iter) == (True, 15)
    assert not any(layer.freeze for layer in ours[1:-1])
    assert {layer.stats_interval for layer in ours} == {1}
    assert [layer.stats_interval for layer in sparse] == [10] * len(groups) + [1]


def test_a_residual_block_adds_its_input_where_the_shapes_allow_it() -> None:
    network, _ = layers_of(LINES[0], "resnet")
    same, narrower, _ = (module for module in network.modules() if isinstance(module, models.Residual))
    x = randn(2, 32, 9, 9).float()
    torch.testing.assert_close(same(x), torch.relu(same.body(x) + x))
    assert narrower(x).shape == (2, 64, 5, 5)
    assert narrower.shortcut[0].kernel_size == (1, 1)


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (22, "22nd"), (112, "112th")]
)
def test_ordinals(number: int, text: str) -> None:
    assert models.ordinal(number) == text


def test_training_at_long_intervals_stays_near_that_of_every_step() -> None:
    """Within the first 60 steps, at the rate that is the default: no loss is far above the first."""
    images = data.photographs(test_size=20)
    settings = settings_for("--epochs", "2")
    for interval in (1, 10):
        learner = train.Learner(models.Line("deconvolution", interval), 0, images, settings, 100)
        batches = train.batches_of(images, 0, 1, 64) + train.batches_of(images, 0, 2, 64)[:10]
        end = learner.train_epoch(1, batches, lambda *a: None)
        assert max(learner.run.step_loss) < 1.5 * learner.run.step_loss[0], interval
        assert end.train_loss < 1.5


def test_training_again_gives_the_same_losses() -> None:
    images = data.load("digits")
    settings = settings_for(*TINY, "--epochs", "1", "--batch-size", "400")
    first, again = (list(train.train(images, settings, lambda *a: None)) for _ in range(2))
    for a, b in zip(first[0], again[0], strict=True):
        assert a.step_loss == pytest.approx(b.step_loss, rel=1e-4)
        assert a.epochs[0].test_accuracy == pytest.approx(b.epochs[0].test_accuracy, abs=0.01)


# what deconvolution does to photographs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> list[Tensor]:
    return [data.read_photograph(name).float() / 255 for name in data.SCENES]


@pytest.fixture(scope="module")
def deconvolution(scenes: list[Tensor]) -> whitening.PixelDeconvolution:
    return whitening.pixel_deconvolution(scenes)


def rings(kernel: Tensor) -> tuple[float, float, float]:
    """The weight at the centre, the sum of the 8 around it and of the 16 around these."""
    c = kernel.shape[-1] // 2
    inner, outer = (float(kernel[c - r : c + r + 1, c - r : c + r + 1].sum()) for r in (1, 2))
    centre = float(kernel[c, c])
    return centre, inner - centre, outer - inner


@pytest.mark.parametrize("channel", range(3), ids="RGB")
def test_kernels_of_photographs_are_centre_surround(deconvolution: whitening.PixelDeconvolution, channel: int) -> None:
    kernels = deconvolution.kernels[channel]
    assert kernels.shape == (3, 15, 15)
    own = kernels[channel]
    centre, surround, beyond = rings(own)
    # an on-centre cell: one weight dominates, all its neighbours oppose it, strongly beside and less around
    assert centre == own.abs().max() == kernels.abs().max()
    others = own.clone()
    others[7, 7] = 0
    assert centre > 5 * others.abs().max()
    assert own[6:9, 6:9].flatten()[[0, 1, 2, 3, 5, 6, 7, 8]].max() < 0
    assert -centre < surround < -0.2 * centre
    assert surround < beyond < 0
    # what is the same everywhere is not seen: centre and surround cancel, over the other colours too
    assert abs(float(kernels.sum())) < 0.05 * centre
    assert all(kernels[other, 7, 7] < 0 for other in range(3) if other != channel)
    # and it is local
    offsets = torch.arange(15) - 7
    near = offsets[:, None] ** 2 + offsets**2 <= 4
    assert (kernels[:, near] ** 2).sum() > 0.95 * (kernels**2).sum()
    assert (own[near] ** 2).sum() > 0.95 * (own**2).sum()


def test_kernels_of_white_noise_have_no_surround() -> None:
    noise = [torch.rand(3, 150, 150, generator=generator(k)) for k in range(3)]
    for channel, kernels in enumerate(whitening.pixel_deconvolution(noise, kernel_size=5, stride=2).kernels):
        centre, surround, _ = rings(kernels[channel])
        assert centre > 0
        assert abs(surround) < 0.05 * centre


def neighbour_correlation(picture: Tensor) -> float:
    """Between horizontal neighbours, all channels."""
    left, right = picture[..., :-1].flatten(), picture[..., 1:].flatten()
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])


def test_deconvolution_decorrelates_pixels_and_makes_them_sparse(
    scenes: list[Tensor], deconvolution: whitening.PixelDeconvolution
) -> None:
    for before in scenes:
        after = deconvolution(before)
        assert after.shape == (3, before.shape[1] - 14, before.shape[2] - 14)
        assert neighbour_correlation(before) > 0.9
        assert abs(neighbour_correlation(after)) < 0.5
        assert whitening.density(after).kurtosis > whitening.density(before).kurtosis + 3


def test_pooled_moments_are_those_of_all_patches() -> None:
    pictures = [randn(2, 9, 12, seed=1), randn(2, 7, 8, seed=2) + 3]
    mean, cov = whitening.pooled_moments(pictures, 3, 2)
    patches = torch.cat([torch.nn.functional.unfold(p[None], 3, stride=2)[0].T for p in pictures])
    torch.testing.assert_close(mean, patches.mean(0))
    torch.testing.assert_close(cov, torch.cov(patches.T, correction=0))


def test_the_patches_covariance_becomes_the_identity() -> None:
    images = data.photographs(train_size=100, test_size=10)
    found = whitening.patch_whitening(images.normalise(images.test[0].repeat(10, 1, 1, 1)))
    assert found.cov.shape == (27, 27)
    eye = torch.eye(27, dtype=found.cov.dtype)
    assert (found.whitened - eye).norm() < 0.05 * eye.norm()
    before, few = (torch.linalg.eigvalsh(m) for m in (found.cov, found.few))
    assert before.max() > 50 * before.median()
    assert few.max() < 1.1  # five steps: the large ones are there, the small ones on their way
    assert few.max() / few.min() < before.max() / before.min() / 5


def test_density_is_a_density() -> None:
    found = whitening.density(randn(200_000) * 7 + 3)
    assert float(found.height.sum() * (found.centres[1] - found.centres[0])) == pytest.approx(1, abs=1e-3)
    assert found.kurtosis == pytest.approx(0, abs=0.1)
    assert float(found.height.max()) == pytest.approx(1 / math.sqrt(2 * math.pi), rel=0.05)


# report -------------------------------------------------------------------------------------------------------------


def run_of(interval: int, seed: int, accuracies: list[float], step: float) -> train.Run:
    """A run of two steps an epoch: batch norm's (interval 0), or deconvolution's."""
    line = models.Line("deconvolution", interval) if interval else models.Line(BASE)
    epochs = [train.Epoch(n, 0.5, 0.6, accuracy, step, 2 * n * step) for n, accuracy in enumerate(accuracies, 1)]
    return train.Run(line, seed, epochs, [0.6, 0.4], [step, 2 * step])


def test_the_summary_is_paired_by_seed_and_has_a_spread() -> None:
    runs = [
        run_of(0, 0, [0.5], 0.02), run_of(4, 0, [0.4], 0.03),
        run_of(0, 1, [0.7], 0.02), run_of(4, 1, [0.8], 0.03),
    ]  # fmt: skip
    summary = report.summarise(runs)
    assert list(summary) == [BASE, "deconvolution_4"]
    assert summary[BASE]["test_accuracy"]["mean"] == pytest.approx(0.6)
    assert summary[BASE]["test_accuracy"]["std"] == pytest.approx(0.2 / math.sqrt(2))
    found = summary["deconvolution_4"]["against_batch_norm"]
    assert found["test_accuracy"]["values"] == pytest.approx([-0.1, 0.1])
    assert found["test_accuracy"]["mean"] == pytest.approx(0)
    assert found["step_time_ratio"] == pytest.approx(1.5)
    text = report.conclusion(summary, settings_for("--seeds", "0", "1", "--intervals", "4"))
    assert "60.0 +- 14.1 %" in text
    assert "deconvolution, statistics every 4th step  +0.0 +- 14.1 points of accuracy, at 1.50 times" in text


@pytest.mark.parametrize(
    ("ours", "step", "least"),
    [
        # batch norm ends epochs at seconds 2, 4 and 6, with accuracies .5, .6 and .7
        ([0.6, 0.7, 0.9], 1.0, 0.1),
        ([0.6, 0.7, 0.9], 2.0, -0.1),  # at second 6, one epoch behind: .6 against .7
        ([0.9, 0.9], 4.0, 0.2),  # the first epoch, up to second 8, does not count; batch norm stays at .7 from 6 on
        ([0.8, 0.4, 0.8], 0.1, 0.1),  # all of it is done before batch norm's first epoch
    ],
)
def test_the_least_lead_is_at_the_worst_second_after_both_first_epochs(
    ours: list[float], step: float, least: float
) -> None:
    base = run_of(0, 0, [0.5, 0.6, 0.7], 1.0)
    assert report.least_lead([base], [run_of(10, 0, ours, step)]) == pytest.approx(least)


def test_whether_a_line_is_always_ahead_is_said_either_way() -> None:
    runs = [run_of(0, 0, [0.5, 0.6], 1.0), run_of(1, 0, [0.4, 0.9], 1.0), run_of(10, 0, [0.6, 0.8], 1.0)]
    summary = report.summarise(runs)
    text = report.conclusion(summary, settings_for("--seeds", "0", "--intervals", "1", "10"))
    assert "after both first epochs not ahead at every moment: at worst 10.0 points behind" in text
    assert "after both first epochs ahead at every moment, by 10.0 points at least" in text
    lead = summary["deconvolution_10"]["against_batch_norm"]["least_lead"]
    assert (lead["of_means"], lead["values"]) == (pytest.approx(0.1), pytest.approx([0.1]))


def test_one_seed_claims_no_spread_and_a_loss_is_said() -> None:
    runs = [run_of(0, 0, [0.5], 0.02), run_of(1, 0, [0.4], 0.03)]
    text = report.conclusion(report.summarise(runs), settings_for("--seeds", "0", "--intervals", "1"))
    assert "a single seed" in text
    assert "+-" not in text
    assert "-10.0 points" in text


def test_a_diverged_run_is_null_in_the_results() -> None:
    runs = [run_of(interval, 0, [0.1], 0.02) for interval in (0, 1)]
    runs[1].epochs[0].train_loss = math.nan
    runs[1].step_loss[1] = math.inf
    images = data.photographs(train_size=10, test_size=10)
    content = report.as_json(runs, report.summarise(runs), images, settings_for("--seeds", "0"), ["results.json"])
    found = json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["runs"][1]["epochs"][0]["train_loss"] is None
    assert found["runs"][1]["step_loss"] == [0.6, None]


def test_files_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.publish(tmp_path, {"a": b"1", "b": b"2"})
    write = Path.write_bytes

    def fails_at_b(path: Path, content: bytes) -> int:
        if path.name.startswith(".b"):
            write(path, content[:1])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fails_at_b)
    with pytest.raises(DemoError, match=r"cannot be written to .*No space left on device"):
        main._write(tmp_path, {"a": b"new", "b": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}


# refusals and interruptions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--lr", "0"], "--lr must be one or two positive numbers, got 0.0"),
        (["--lr", "nan"], "--lr must be one or two positive numbers, got nan"),
        (["--lr", "1", "2", "3"], "--lr must be one or two positive numbers, got 1.0 2.0 3.0"),
        (["--seeds", "-1"], "--seeds must be different integers from 0 to"),
        (["--seeds", "3", "3"], "--seeds must be different integers from 0 to"),
        (["--intervals", "0"], "--intervals must be different positive integers, got 0"),
        (["--intervals", "4", "1", "4"], "--intervals must be different positive integers, got 4 1 4"),
        (["--device", "toaster"], "--device 'toaster' cannot be used"),
        (["--device", "meta"], "--device 'meta' cannot be used: Tensor.item() cannot be called on meta tensors"),
        (["--data", "mnist"], "--data mnist needs --root DIR"),
        (["--data", "cifar10", "--root", "nowhere"], "--root nowhere is not a folder"),
        (["--data", "cifar10", "--root", "."], "the training images of cifar10 cannot be read under --root .: "),
    ],
)
def test_a_bad_request_is_refused_before_training(
    argv: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda *a: pytest.fail("training started"))
    assert cli.main(["demo", *argv, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [["--seeds", "one"], ["--epochs", "1.5"], ["--intervals", "1.5"], ["--data", "imagenet"], ["--arch", "x"]]
)
def test_what_is_no_number_or_choice_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *option])
    assert stopped.value.code == 2
    assert "invalid" in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "text"), [("triton", "cannot run"), ("toaster", "must be one of")])
def test_a_backend_that_cannot_run_is_refused(
    backend: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDECONV_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["demo"]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "folder"])
def test_an_unwritable_folder_is_refused(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main(["demo", *TINY, "--out", str(tmp_path / "file" / below)]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_learning_rates_are_one_for_both_or_one_each() -> None:
    assert settings_for("--lr", "0.2").lr == {"batch_norm": 0.2, "deconvolution": 0.2}
    assert settings_for("--lr", "0.2", "0.3").lr == {"batch_norm": 0.2, "deconvolution": 0.3}
    assert tuple(settings_for().lr.values()) == options.DEFAULTS["photographs"].lr


def test_the_options_need_none_of_the_extra_packages() -> None:
    code = """
        import argparse, sys
        for name in ("matplotlib", "PIL", "skimage", "sklearn", "tqdm", "torchvision"):
            sys.modules[name] = None
        import tdeconv.demo
        tdeconv.demo.add_arguments(argparse.ArgumentParser())
        from tdeconv import cli
        sys.exit(cli.main(["demo"]))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(tdeconv.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "is not installed; pip install 'tdeconv[demo]'" in process.stderr
    assert "Traceback" not in process.stderr


def test_an_interrupted_demo_leaves_the_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("earlier")
    calls = iter(range(100))
    step = train.Learner.step

    def interrupted(learner: train.Learner, x: Tensor, y: Tensor) -> tuple[float, float]:
        if next(calls) == 10:  # within the second epoch
            raise KeyboardInterrupt
        return step(learner, x, y)

    monkeypatch.setattr(train.Learner, "step", interrupted)
    assert cli.main(["demo", *TINY, "--batch-size", "400", "--out", str(tmp_path)]) == 130
    assert "interrupted before it was complete; nothing was written" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"results.json": "earlier"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_demo_without_a_file(number: signal.Signals, status: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tdeconv",
        "demo",
        "--data",
        "digits",
        "--epochs",
        "100000",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(tdeconv.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "1/100000" in line:
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    assert "nothing was written" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
