"""What is trained, on what, how, and how it is kept: one JSON file of runs and of times of steps, one a line."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdeconv.arguments import read
from tdeconv.bench.learning import tasks
from tdeconv.bench.learning.store import commit
from tdeconv.bench.machine import describe
from tdeconv.bench.results import publish
from tdeconv.demo.data import DataSet, digits, fixed, photographs
from tdeconv.demo.models import METHODS, Line
from tdeconv.demo.options import Settings
from tdeconv.demo.train import Learner, batches_of
from tdeconv.schedule import every_step

Run = dict[str, Any]
BATCH = 64
NETWORKS = {"slim": 300, "resnet": 200, "vgg11": 80}  # by name of the demo's: steps of training
BLOCKS = (8, 16, 32, 64)
NETWORKS_BY_BLOCK = {f"resnet-{block}": NETWORKS["resnet"] for block in BLOCKS}
INTERVALS = (1, 2, 4, 10, 30)
RATES = (0.01, 0.03, 0.1)
TEST = 2000  # images at most that a network is tested on
LAST = 30  # steps at the end whose mean loss stands for a run


@dataclass(frozen=True)
class Plan:
    """What tells a run apart from all others; one on ``held_out`` images of the training set chooses a rate."""

    data: str
    network: str
    method: str
    stats_interval: int
    steps: int
    rate: float
    seed: int
    held_out: bool = False

    @property
    def line(self) -> Line:
        return Line(self.method, self.stats_interval)


LINES = (Line("batch_norm"), *(Line("deconvolution", interval) for interval in INTERVALS))


# ---------------------------------------------------------------------------------------------------------------- data


def _fashion_mnist(root: Path | None) -> DataSet:
    """All of its training images, and the first of its test images; of Debian's package, if that is there."""
    data = tasks.load("fashion-mnist", 28, None if tasks.DEBIAN.is_dir() else root)
    return DataSet(data.name, data.classes, data.train, (data.test[0][:TEST], data.test[1][:TEST]))


def _mnist(root: Path | None) -> DataSet:
    """The 10,000 test images of MNIST alone, 8,000 of them, always the same, to train on."""
    if root is None:
        raise ValueError("--data mnist needs --root DIR, the folder with MNIST in torchvision's layout")
    try:
        images, labels = tasks.read_labelled(root / "MNIST" / "raw", "t10k")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"--root {root}: the test images of MNIST cannot be read: {error}") from error
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2020))
    test, train = order[:TEST], order[TEST:]
    return fixed("mnist", tuple("0123456789"), (images[train], labels[train]), (images[test], labels[test]))


DATA: dict[str, Callable[[Path | None], DataSet]] = {
    "photographs": lambda _: photographs(),
    "digits": lambda _: digits(),
    "fashion-mnist": _fashion_mnist,
    "mnist": _mnist,
}


def held_out(data: DataSet) -> DataSet:
    """The training images alone, a part of them to test on: rates are not to be chosen by the test images."""
    if data.name == "photographs":
        return photographs(train=(0.0, 0.4), test=(0.4, 0.5))
    images, labels = data.train(torch.Generator().manual_seed(2020))
    test = min(TEST, len(labels) // 5)
    return fixed(data.name, data.classes, (images[test:], labels[test:]), (images[:test], labels[:test]))


def _batches(data: DataSet, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of one epoch after the other, the same for every line."""
    return chain.from_iterable(batches_of(data, seed, epoch, BATCH) for epoch in count(1))


# ------------------------------------------------------------------------------------------------------------ training


def train(plan: Plan, data: DataSet) -> Run:
    """Train and evaluate as the demo does: SGD with momentum, the rate falling to zero along a cosine."""
    learner = Learner(plan.line, plan.seed, data, _settings(plan.network, plan.rate), plan.steps)
    batches = list(islice(_batches(data, plan.seed), plan.steps))
    end = learner.train_epoch(1, batches, lambda *_: None)
    return {
        **asdict(plan),
        "last_loss": _number(statistics.fmean(learner.run.step_loss[-LAST:])),
        "test_loss": _number(end.test_loss),
        "test_accuracy": _number(end.test_accuracy),
        "test_images": len(data.test[1]),
        "step_seconds": _number(end.mean_step_seconds),
        **_made(),
    }


def plans(network: str, seed: int, data: str, runs: dict[str, Run] | None) -> Iterator[Plan]:
    """A network's runs on a data set in turn: first those that choose each method's rate, by the loss on images held
    out and the same for all seeds, then every line with it. ``runs``, which have grown by then, are looked up; None:
    any rate."""
    lines = tuple(Line("deconvolution", k) for k in (1, 4, 10)) if network in NETWORKS_BY_BLOCK else LINES
    steps, rates = (NETWORKS | NETWORKS_BY_BLOCK)[network], {}
    for method in dict.fromkeys(line.method for line in lines):
        usual = network.partition("-")[0]  # whose rates a network has with other blocks, too
        tried = [Plan(data, usual, method, 1, steps // 3, rate, 0, held_out=True) for rate in RATES]
        yield from tried
        rates[method] = RATES[0] if runs is None else min(tried, key=lambda plan: _loss(runs[key(plan)])).rate
    for line in lines:
        yield Plan(data, network, line.method, line.stats_interval, steps, rates[line.method], seed)


def _loss(run: Run) -> float:
    return math.inf if run["test_loss"] is None else run["test_loss"]


def _settings(network: str, rate: float) -> Settings:
    return Settings(network, 1, BATCH, dict.fromkeys(METHODS, rate), (), ())


# -------------------------------------------------------------------------------------------------------------- timing


def time_steps(data: DataSet, network: str, rounds: int) -> Run:
    """Median seconds of a training step of each kind, measured in turn, so that all meet the same machine.

    A fresh step is one in which every layer takes statistics; in a stale one, only the classifier does.
    """
    rate = RATES[0]
    learners = {
        kind: Learner(Line(method), 0, data, _settings(network, rate), rounds + 2)
        for kind, method in (("batch_norm", "batch_norm"), ("fresh", "deconvolution"), ("stale", "deconvolution"))
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in learners}
    for images, labels in islice(_batches(data, 0), rounds + 2):
        for kind, learner in learners.items():
            *layers, classifier = learner.model.modules()
            with every_step(layers, fresh=kind != "stale"), every_step([classifier], fresh=True):
                seconds[kind].append(learner.step(images, labels)[1])
    medians = {kind: _number(statistics.median(times[2:])) for kind, times in seconds.items()}  # the first two warm up
    return {"data": data.name, "network": network, **medians, "rounds": rounds, **_made()}


# ------------------------------------------------------------------------------------------------------------- keeping


def key(run: Plan | Run) -> str:
    """What tells a run apart from others: equal for a run and its plan."""
    plan = asdict(run) if isinstance(run, Plan) else {name: run[name] for name in Plan.__dataclass_fields__}
    return json.dumps(plan, sort_keys=True)


def load(paths: Iterable[Path], argument: str) -> tuple[dict[str, Run], dict[str, Run]]:
    """The runs of all files by :func:`key`, and the times by data set and network; of equal ones, the last file's.

    Raises:
        ValueError: a file cannot be read, or is none of :func:`save`'s.
    """
    runs, times = {}, {}
    for path in paths:
        try:
            found = json.loads(read(path, argument))
            runs.update({key(run): run for run in found["runs"]})
            times.update({f"{time['data']} {time['network']}": time for time in found["times"]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{argument} {path} is no file of tdeconv.bench.intervals: {error!r}") from None
    return runs, times


def save(path: Path, runs: dict[str, Run], times: dict[str, Run]) -> None:
    """Write all; the file is complete or stays what it was."""
    parts = (
        f'"{name}":[\n' + ",\n".join(json.dumps(one, separators=(",", ":")) for one in of.values()) + "\n]"
        for name, of in (("runs", runs), ("times", times))
    )
    publish({path: "{" + ",\n".join(parts) + "}\n"})


def _made() -> Run:
    return {"machine": describe(torch.device("cpu")), "commit": commit()}


def _number(value: float) -> float | None:
    """For JSON, which has no infinity; five digits are more than a seed leaves the same."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
