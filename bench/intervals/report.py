"""What the runs say: accuracy, loss and time at every interval, and where an interval costs accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tdeconv.bench.intervals.runs import BATCH, INTERVALS, LAST, LINES, Run
from tdeconv.bench.markdown import Table
from tdeconv.demo.models import Line

JUDGED = (4, 10, 30)
INTRODUCTION = (
    f"The demo's networks, batches of {BATCH}, SGD with momentum 0.9, the rate falling to zero along a cosine. Every "
    "line has the same batches and the same weights at the start; batch norm and deconvolution each have the rate that "
    "was best for them, at interval 1, on training images held out. The classifier takes statistics in every step, and "
    "so do all layers in the first 20. Accuracy in percent on test images, loss the mean of the last "
    f"{LAST} steps; mean ± standard deviation over seeds."
)
WITHIN = (
    "An interval is *within the seeds' spread* unless its mean accuracy is below that of interval 1 by more than the "
    "standard deviation over seeds, pooled over the two, and by more than one image, or one of its runs diverged. With "
    "3 seeds, luck alone puts one in seven outside."
)


class Setting(NamedTuple):
    """Runs that may be compared."""

    data: str
    network: str
    steps: int

    def __str__(self) -> str:
        return f"{self.data}, {self.network}, {self.steps} steps"


Lines = dict[Line, dict[int, Run]]  # the runs of each line, by seed


def settings(runs: Mapping[str, Run]) -> dict[Setting, Lines]:
    """All runs but those that chose rates, sorted."""
    found: dict[Setting, Lines] = {}
    for run in runs.values():
        if not run["held_out"]:
            lines = found.setdefault(Setting(*(run[name] for name in Setting._fields)), {})
            lines.setdefault(Line(run["method"], run["stats_interval"]), {})[run["seed"]] = run
    return found


def text(runs: Mapping[str, Run], times: Mapping[str, Run]) -> str:
    """The whole report, in Markdown."""
    found = settings(runs)
    parts = ["# Statistics every few steps: what they do to training", INTRODUCTION, _made([*runs.values()])]
    parts += ["\n".join(_verdicts(found)), WITHIN]
    parts += [_table(setting, lines).markdown().rstrip() for setting, lines in found.items()]
    if times:
        parts.append(_times([*times.values()]).markdown().rstrip())
        parts.append(_made([*times.values()]))
    return "\n\n".join(filter(None, parts)) + "\n"


def _made(runs: Sequence[Run]) -> str:
    """Where and with what the runs were made: one line for each such place."""
    lines = {
        "- {device}, {threads} threads, torch {torch}".format(**run["machine"]) + f", commit {run['commit']}"
        for run in runs
    }
    return "\n".join(sorted(lines))


# ------------------------------------------------------------------------------------------------------------- judging


def differences(lines: Lines, interval: int) -> list[float]:
    """Accuracy at the interval less that at interval 1, seed by seed; empty if no seed has both."""
    base, ours = (lines.get(Line("deconvolution", k), {}) for k in (1, interval))
    return [ours[seed]["test_accuracy"] - base[seed]["test_accuracy"] for seed in sorted(base.keys() & ours.keys())]


def within(lines: Lines, interval: int) -> bool:
    """Whether the interval's mean accuracy is within the seeds' spread of interval 1's: see :data:`WITHIN`."""
    both = [lines[Line("deconvolution", k)].values() for k in (1, interval)]
    if any(run["test_loss"] is None for run in both[1]):  # diverged: no spread excuses it
        return False
    accuracies = [[run["test_accuracy"] for run in runs] for runs in both]
    variances = [statistics.variance(values) if len(values) > 1 else 0.0 for values in accuracies]
    image = 1 / next(iter(both[0]))["test_images"]
    spread = max(statistics.fmean(variances) ** 0.5, image)
    return statistics.fmean(accuracies[1]) >= statistics.fmean(accuracies[0]) - spread * (1 + 1e-9)


def _verdicts(found: Mapping[Setting, Lines]) -> list[str]:
    """For each interval, in how many settings it keeps interval 1's accuracy, and the mean difference over all."""
    sentences = []
    for interval in JUDGED:
        gaps = {setting: gap for setting, lines in found.items() if (gap := differences(lines, interval))}
        if not gaps:
            continue
        failed = [f"{s.data} with {s.network}" for s in gaps if not within(found[s], interval)]
        means = [100 * statistics.fmean(gap) for gap in gaps.values()]
        error = f" ± {statistics.stdev(means) / len(means) ** 0.5:.2f} (standard error)" if len(means) > 1 else ""
        not_in = f" (not {', '.join(failed)})" if failed else ""
        sentences.append(
            f"- Interval {interval}: within the seeds' spread of interval 1 in {len(gaps) - len(failed)} of "
            f"{len(gaps)} settings{not_in}; over all, {statistics.fmean(means):+.2f}{error} points of accuracy."
        )
    return sentences


# -------------------------------------------------------------------------------------------------------------- tables


def _table(setting: Setting, lines: Lines) -> Table:
    head = ["line", "rate", "seeds", "test accuracy", "against interval 1", "spread", "training loss"]
    body = []
    for line in LINES:
        runs = [lines[line][seed] for seed in sorted(lines.get(line, {}))]
        if not runs:
            continue
        gaps = differences(lines, line.stats_interval) if line.method == "deconvolution" else []
        judged = line.stats_interval in JUDGED and gaps
        diverged = sum(run["last_loss"] is None for run in runs)
        losses = [run["last_loss"] for run in runs if run["last_loss"] is not None]
        body.append([
            line.title,
            f"{runs[0]['rate']:g}",
            str(len(runs)),
            _spread([run["test_accuracy"] for run in runs], 100, 1),
            _spread(gaps, 100, 1, "+") if line.stats_interval > 1 else "",
            ("within" if within(lines, line.stats_interval) else "**below**") if judged else "",
            _spread(losses, 1, 3) + (f" ({diverged} diverged)" if diverged else ""),
        ])  # fmt: skip
    return Table(str(setting), "", [head, *body])


def _spread(values: Sequence[float], scale: float, digits: int, sign: str = "") -> str:
    if not values:
        return "-"
    deviation = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.fmean(values):{sign}.{digits}f}{deviation}"


def _times(times: Sequence[Run]) -> Table:
    head = ["network", "batch norm", "fresh", "stale", *(f"every {k}" for k in INTERVALS)]
    body = [
        [
            f"{time['network']}, {time['data']}",
            *(f"{1e3 * time[kind]:.1f} ms" for kind in ("batch_norm", "fresh", "stale")),
            *(f"{(time['fresh'] + (k - 1) * time['stale']) / k / time['batch_norm']:.2f}" for k in INTERVALS),
        ]
        for time in times
    ]
    caption = (
        "Medians of whole training steps; the mean over an interval as a multiple of batch norm's step. In a fresh "
        "step every layer takes statistics, even the first one, which freezes in training."
    )
    return Table("Time of a step", caption, [head, *body])
