"""Training networks side by side, batch norm's and deconvolution's: same data, seed and schedule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tdeconv.demo.data import DataSet
from tdeconv.demo.models import Line, build
from tdeconv.demo.options import Settings

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
OnStep = Callable[[Line, int, int, float], None]  # line, seed, epoch, loss


@dataclass
class Epoch:
    """One epoch of one network; ``seconds`` of training so far exclude evaluation.

    A step's time is the mean: where only some steps take statistics, the median is that of the others.
    """

    number: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    mean_step_seconds: float
    seconds: float


@dataclass
class Run:
    """One network's training: an entry per epoch, and every step's loss and seconds since the start."""

    line: Line
    seed: int
    epochs: list[Epoch] = field(default_factory=list)
    step_loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def by_line(runs: Iterable[Run]) -> dict[Line, list[Run]]:
    """Every line's runs, the lines and the seeds in the order in which they were trained."""
    lines: dict[Line, list[Run]] = {}
    for run in runs:
        lines.setdefault(run.line, []).append(run)
    return lines


class Learner:
    """A network in training: SGD with momentum, the learning rate falling to zero along a cosine."""

    def __init__(self, line: Line, seed: int, data: DataSet, settings: Settings, steps: int) -> None:
        torch.manual_seed(seed)
        self.run = Run(line, seed)
        self.data, self.settings = data, settings
        model = build(settings.arch, line, data.channels, len(data.classes)).to(settings.device)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's gap
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), settings.lr[line.method], momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, steps)
        self.criterion = nn.CrossEntropyLoss()

    def _tensors(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.data.normalise(images).contiguous(memory_format=torch.channels_last)
        return x.to(self.settings.device), labels.to(self.settings.device)

    def step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """One training step on a batch: its loss, and its seconds from when the batch was there."""
        x, y = self._tensors(images, labels)
        start = time.perf_counter()
        loss = self.criterion(self.model(x), y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        return loss.item(), time.perf_counter() - start  # item() waits for the device

    def train_epoch(self, number: int, batches: list[tuple[Tensor, Tensor]], on_step: OnStep) -> Epoch:
        """One pass over the batches, then the test images; the record is also appended to ``self.run``."""
        run, losses = self.run, []
        self.model.train()
        start = elapsed = run.step_seconds[-1] if run.step_seconds else 0.0
        for images, labels in batches:
            loss, seconds = self.step(images, labels)
            losses.append(loss)
            elapsed += seconds
            run.step_seconds.append(elapsed)
            on_step(run.line, run.seed, number, loss)
        run.step_loss += losses
        test_loss, accuracy = self.evaluate()
        mean_seconds = (elapsed - start) / len(losses)
        record = Epoch(number, statistics.fmean(losses), test_loss, accuracy, mean_seconds, elapsed)
        run.epochs.append(record)
        return record

    @torch.no_grad()
    def evaluate(self, batch_size: int = 500) -> tuple[float, float]:
        """Mean loss and share of right answers on the test images."""
        self.model.eval()
        images, labels = self.data.test
        loss, right = 0.0, 0
        for xs, ys in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x, y = self._tensors(xs, ys)
            scores = self.model(x)
            loss += self.criterion(scores, y).item() * len(ys)
            right += int((scores.argmax(1) == y).sum())
        return loss / len(labels), right / len(labels)


def batches_of(data: DataSet, seed: int, epoch: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """An epoch's batches: the same for every line. A last, smaller one is dropped unless it is the only one."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    images, labels = data.train(generator)
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    return batches[:-1] if len(batches) > 1 and len(batches[-1][1]) < batch_size else batches


def steps_per_epoch(data: DataSet, batch_size: int) -> int:
    return len(batches_of(data, 0, 1, batch_size))


def train(data: DataSet, settings: Settings, on_step: OnStep) -> Iterator[list[Run]]:
    """Train every seed's networks, one epoch of each in turn.

    Yields:
        After each epoch: that seed's runs so far, one of each line.
    """
    steps = settings.epochs * steps_per_epoch(data, settings.batch_size)
    for seed in settings.seeds:
        learners = [Learner(line, seed, data, settings, steps) for line in settings.lines]
        for number in range(1, settings.epochs + 1):
            batches = batches_of(data, seed, number, settings.batch_size)
            for learner in learners:
                learner.train_epoch(number, batches, on_step)
            yield [learner.run for learner in learners]
