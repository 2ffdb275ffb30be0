"""What the runs say: tables of both sides, and in how many networks the converted one keeps up."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tdeconv.bench.learning.store import Run
from tdeconv.bench.learning.train import LAST
from tdeconv.bench.markdown import Table

MARGIN = 0.05  # of the loss: as much above batch norm's counts as level
STEEPER = 3.0  # how many times batch norm's gradient a network may start with
BATCH_NORM = "batch norm"
INTRODUCTION = (
    "Public networks with random weights, trained with their batch norms and converted: the same weights at the start, "
    "the same batches in the same order, plain SGD with momentum 0.9 at one rate, without warm-up, decay, weight decay "
    "or clipping. Each side has the rate that was best for it. Loss and training accuracy are means over the last "
    f"{LAST} steps; the test accuracy is taken after the running statistics were estimated anew on {LAST} training "
    "batches; the gradient is its norm before the first step. Means and standard deviations are over seeds."
)


class Setting(NamedTuple):
    """Runs that may be compared: the same images and number of steps."""

    data: str
    size: int
    batch: int
    steps: int

    def __str__(self) -> str:
        return f"{self.data}, {self.size} px, batch {self.batch}, {self.steps} steps"


@dataclass(frozen=True)
class Side:
    """A network's runs with one kind of layers at the rate that was best, by seed."""

    rate: float
    tried: tuple[float, ...]  # rates
    runs: Mapping[int, Run]

    def losses(self) -> dict[int, float]:
        return {seed: last_loss(run) for seed, run in self.runs.items()}

    def loss_before(self, step: int) -> list[float]:
        """The mean losses of the last steps up to one, for each seed; infinite if the run had diverged."""
        parts = [run["losses"][max(0, step - LAST) : step] for run in self.runs.values()]
        return [
            statistics.fmean(part) if len(part) == min(LAST, step) and None not in part else math.inf for part in parts
        ]

    def accuracy(self, step: int) -> list[float]:
        """Test accuracies at a step; 0 of a run that came to nothing by then."""
        return [_evaluation(run, step).get("accuracy") or 0.0 for run in self.runs.values()]

    def finite(self, step: int) -> bool:
        return all(_evaluation(run, step).get("loss") is not None for run in self.runs.values())


def _evaluation(run: Run, step: int) -> dict[str, Any]:
    return run["evaluations"].get(str(step), {})


Sides = dict[str, dict[str, Side]]  # by network, by kind of layers


def last_loss(run: Run) -> float:
    """The mean loss of the last steps; infinite if the run diverged."""
    value = run["last_loss"]
    return math.inf if value is None else value


def settings(runs: Iterable[Run]) -> dict[Setting, Sides]:
    """All runs, sorted: by setting, network, kind of layers, and of these the ones at the best rate."""
    found: dict[Setting, dict[str, dict[str, list[Run]]]] = {}
    for run in runs:
        networks = found.setdefault(Setting(*(run[name] for name in Setting._fields)), {})
        networks.setdefault(run["network"], {}).setdefault(_layers(run), []).append(run)
    return {
        setting: {network: {name: _best(of) for name, of in sides.items()} for network, sides in networks.items()}
        for setting, networks in found.items()
    }


def _layers(run: Run) -> str:
    if run["side"] == "original":
        return BATCH_NORM
    options = [f"{name}={value}" for name, value in sorted(run["convert"].items())]
    options += ["calibrated"] if run["calibrate"] else []
    return "deconvolution" + (f" ({', '.join(options)})" if options else "")


def _best(runs: Sequence[Run]) -> Side:
    """Of the rates with the most seeds (the others were only tried), the one of the least mean loss."""
    rates: dict[float, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        rates.setdefault(run["rate"], {})[run["seed"]] = run

    def order(rate: float) -> tuple[int, float]:
        return -len(rates[rate]), statistics.fmean(map(last_loss, rates[rate].values()))

    rate = min(rates, key=order)
    return Side(rate, tuple(sorted(rates)), rates[rate])


# ------------------------------------------------------------------------------------------------------------- judging


def verdict(original: Side, converted: Side, steps: Sequence[int]) -> dict[str, bool]:
    """Whether a converted network keeps up with batch norm, in sentences that hold or do not.

    Args:
        steps: those where the accuracy was taken, the last of them at the end. Seeds that both have are compared.
    """
    end, theirs, ours = steps[-1], original.losses(), converted.losses()
    accuracies = (statistics.fmean(side.accuracy(end)) for side in (converted, original))
    found = {
        f"loss at most batch norm's + {MARGIN} for every seed": all(
            _level(ours[seed], theirs[seed]) for seed in theirs.keys() & ours.keys()
        ),
        f"gradient at the start at most {STEEPER:g} times batch norm's for every seed": all(
            ratio <= STEEPER for ratio in ratios(original, converted)
        ),
        "test loss finite, test accuracy at least batch norm's in the mean": converted.finite(end)
        and operator.ge(*accuracies),
    }
    if len(steps) > 1:
        found[f"mean loss at most batch norm's + {MARGIN} at all of the steps {', '.join(map(str, steps))}"] = all(
            _level(*(statistics.fmean(side.loss_before(step)) for side in (converted, original))) for step in steps
        )
    return found


def _level(ours: float, theirs: float) -> bool:
    return math.isfinite(ours) and ours <= theirs + MARGIN


def ratios(original: Side, converted: Side) -> list[float]:
    """Gradient norms at the start over the original's, by seed; infinite where one is not finite."""
    norms = [
        (converted.runs[seed]["gradient"], original.runs[seed]["gradient"])
        for seed in original.runs.keys() & converted.runs.keys()
    ]
    return [ours / theirs if ours is not None and theirs else math.inf for ours, theirs in norms]


def verdicts(setting: Setting, sides: Sides) -> str:
    """For each kind of layers, in how many networks each sentence holds, and in which it does not."""
    lines = []
    for name in dict.fromkeys(name for of in sides.values() for name in of if name != BATCH_NORM):
        both = {n: (of[BATCH_NORM], of[name]) for n, of in sides.items() if BATCH_NORM in of and name in of}
        judged = {network: verdict(*pair, _steps(setting, sides)) for network, pair in both.items()}
        for sentence in next(iter(judged.values()), ()):
            failed = [network for network, found in judged.items() if not found[sentence]]
            not_in = f" (not {', '.join(failed)})" if failed else ""
            lines.append(f"- {name}: {sentence}: {len(judged) - len(failed)} of {len(judged)} networks{not_in}")
    return "\n".join(lines)


def _steps(setting: Setting, sides: Sides) -> list[int]:
    """The steps where the accuracy was taken, and the last one in any case."""
    runs = [run for of in sides.values() for side in of.values() for run in side.runs.values()]
    return sorted({int(step) for run in runs for step in run["evaluations"]} | {setting.steps})


# -------------------------------------------------------------------------------------------------------------- tables


def text(runs: Sequence[Run]) -> str:
    """The whole report, in Markdown."""
    parts = ["# Do converted networks learn?", INTRODUCTION, _made(runs)]
    for setting, sides in settings(runs).items():
        parts += [_table(setting, sides).markdown().rstrip(), verdicts(setting, sides)]
        if (course := _course(setting, sides)) is not None:
            parts.append(course.markdown(3).rstrip())
    return "\n\n".join(filter(None, parts)) + "\n"


def _made(runs: Sequence[Run]) -> str:
    """Where and with what the runs were made: one line for each such place."""
    lines = {
        "- {device}, {threads} threads, torch {torch}".format(**run["machine"])
        + "".join(f", {name} {version}" for name, version in run["versions"].items())
        + (f", commit {run['commit']}" if run["commit"] else "")
        for run in runs
    }
    return "\n".join(sorted(lines))


def _table(setting: Setting, sides: Sides) -> Table:
    head = ["network", "layers", "rate", "loss", "training accuracy", "test accuracy", "gradient", "ratio"]
    body = []
    for network, of in sides.items():
        for name, side in sorted(of.items()):
            runs = side.runs.values()
            training = [statistics.fmean(run["train_accuracies"][-LAST:]) for run in runs if not run["diverged"]]
            compared = ratios(of[BATCH_NORM], side) if name != BATCH_NORM and BATCH_NORM in of else []
            gradients = [math.inf if run["gradient"] is None else run["gradient"] for run in runs]
            body.append([
                network,
                name,
                f"{side.rate:g} of {', '.join(f'{rate:g}' for rate in side.tried)}",
                _spread(side.losses().values()),
                _spread(training, 100, 1),
                _spread(side.accuracy(setting.steps), 100, 1) if side.finite(setting.steps) else "not finite",
                f"{statistics.fmean(gradients):.3g}",
                f"{max(compared):.2f}" if compared else "",
            ])  # fmt: skip
    caption = "Accuracy in percent; the ratio of gradients is the largest of all seeds'."
    return Table(str(setting), caption, [head, *body])


def _course(setting: Setting, sides: Sides) -> Table | None:
    """Loss and test accuracy at the steps where that was taken, of runs that were evaluated on their way."""
    steps = _steps(setting, sides)
    if len(steps) < 2:
        return None
    body = []
    for network, of in sides.items():
        for name, side in sorted(of.items()):
            cells = (f"{_spread(side.loss_before(n))}; {_spread(side.accuracy(n), 100, 1)}" for n in steps)
            body.append([network, name, *cells])
    caption = f"Mean loss of the {LAST} steps before; test accuracy in percent."
    head = ["network", "layers", *(f"after {step} steps" for step in steps)]
    return Table(f"{setting}: on the way", caption, [head, *body])


def _spread(values: Iterable[float], scale: float = 1, digits: int = 3) -> str:
    """Mean and standard deviation of what is finite, and how many are not."""
    values = list(values)
    kept = [scale * value for value in values if math.isfinite(value)]
    lost = f"{len(values) - len(kept)} of {len(values)} diverged" if len(kept) < len(values) else ""
    mean = f"{statistics.fmean(kept):.{digits}f}" if kept else ""
    deviation = f" ± {statistics.stdev(kept):.{digits}f}" if len(kept) > 1 else ""
    return ", ".join(filter(None, (mean + deviation, lost))) or "-"
