"""One run: a network, as it is or converted, trained for some steps from a seed, and evaluated."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdeconv
from tdeconv.bench.learning.networks import NETWORKS, Network
from tdeconv.bench.learning.tasks import Batch, Task

MOMENTUM = 0.9
LAST = 8  # steps whose mean loss stands for a run
STATISTICS = 8  # training batches that the running statistics are estimated from
SIDES = ("original", "converted")


@dataclass(frozen=True)
class Plan:
    """What tells a run apart from all others. ``convert`` are :func:`tdeconv.convert_deconv`'s options."""

    network: str
    side: str
    data: str
    size: int
    batch: int
    steps: int
    rate: float
    seed: int
    convert: dict[str, Any] = field(default_factory=dict)
    calibrate: bool = False


def run(
    plan: Plan, task: Task, *, device: torch.device, checkpoints: Sequence[int] = (), held_out: int = 1000
) -> dict[str, Any]:
    """Train and evaluate as planned: plain SGD with momentum, at one rate throughout, without decay or clipping.

    Both sides start from the same weights (``torch.manual_seed(seed)``; the conversion draws no random numbers) and see
    the same batches in the same order. A run stops at the first loss that is not finite.

    Args:
        checkpoints: steps after which the model is evaluated too, besides the last.
        held_out: how many test images an evaluation takes.

    Returns:
        ``losses`` and ``train_accuracies`` of all steps, ``last_loss`` (mean of the last 8), ``gradient`` (the norm
        before the first step), ``diverged`` (the step, or None), ``evaluations`` (of :func:`evaluate`, by steps taken)
        and ``step_seconds`` (median). A number that is not finite is None.
    """
    network = NETWORKS[plan.network]
    model = _start(plan, network, task, device)
    optimiser = torch.optim.SGD(model.parameters(), plan.rate, momentum=MOMENTUM)
    losses, accuracies, seconds, evaluations = [], [], [], {}
    gradient, diverged = math.nan, None
    torch.manual_seed(plan.seed)  # dropout's masks
    for step, batch in enumerate(islice(task.batches(plan.seed, plan.batch), plan.steps), 1):
        images, labels = _on(device, task.prepare(*batch))
        start = time.perf_counter()
        scores = network.scores(model, images)
        loss = F.cross_entropy(scores, labels)
        optimiser.zero_grad()
        loss.backward()
        if step == 1:
            gradient = _norm(model)
        optimiser.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        accuracies.append(_accuracy(scores, labels))
        if not math.isfinite(losses[-1]):
            diverged = step
            break
        if step in checkpoints or step == plan.steps:
            evaluations[str(step)] = evaluate(model, network, task, plan, device, held_out)
    last = statistics.fmean(losses[-LAST:])
    return {
        "losses": [_number(loss) for loss in losses],
        "train_accuracies": [_number(accuracy) for accuracy in accuracies],
        "last_loss": _number(last),
        "gradient": _number(gradient),
        "diverged": diverged,
        "evaluations": evaluations,
        "step_seconds": _number(statistics.median(seconds)),
    }


def _start(plan: Plan, network: Network, task: Task, device: torch.device) -> nn.Module:
    torch.manual_seed(plan.seed)
    model = network.build(task.classes)
    if plan.side == "converted":
        model = tdeconv.convert_deconv(model, **plan.convert)
    model.to(device).train()
    if plan.calibrate:
        first = next(task.batches(plan.seed, plan.batch))
        tdeconv.calibrate_deconv(model, _on(device, task.prepare(*first)).images)
    return model


def evaluate(
    model: nn.Module, network: Network, task: Task, plan: Plan, device: torch.device, held_out: int
) -> dict[str, float | None]:
    """``loss`` and ``accuracy`` on held-out images, the running statistics estimated anew on 8 training batches.

    Short runs leave statistics that lag behind. The training is not disturbed: a copy is evaluated.
    """
    model = copy.deepcopy(model)
    again = (_on(device, task.prepare(*b)).images for b in islice(task.batches(plan.seed, plan.batch), STATISTICS))
    tdeconv.update_stats(model, again).eval()
    images, labels = (part[:held_out] for part in task.data.test)
    loss = right = 0.0
    with torch.no_grad():
        for xs, ys in zip(images.split(plan.batch), labels.split(plan.batch), strict=True):
            x, y = _on(device, task.prepare(xs, ys))
            scores = network.scores(model, x)
            loss += F.cross_entropy(scores, y).item() * len(ys)
            right += _accuracy(scores, y) * len(ys)
    return {"loss": _number(loss / len(labels)), "accuracy": _number(right / len(labels))}


def _on(device: torch.device, batch: Batch) -> Batch:
    return Batch(*(part.to(device) for part in batch))


def _norm(model: nn.Module) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).float().mean().item()


def _number(value: float) -> float | None:
    """For JSON, which has no infinity; six digits are more than a rounding leaves the same."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
