"""What result files say, in numbers and words: ratios, sums over layers, labels, where and how it was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tdeconv.bench.results import Group, Result, Row, counts, device_of, grouped, on_gpu, rows

OURS = ("torch", "torch_compiled", "triton", "triton_compiled")  # a name may go on: " stale", " mean of 10 steps"
STALE = " stale"
BASELINES = ("conv_bn_relu", "conv_bn_relu_compiled", "reference", "paper")
IMPLEMENTATIONS = (*BASELINES, *OURS)
LABELS = {
    "conv_bn_relu": "conv+BN+ReLU",
    "conv_bn_relu_compiled": "conv+BN+ReLU, compiled",
    "reference": "reference",
    "paper": "paper's code",
    "torch": "torch",
    "torch_compiled": "torch, compiled",
    "triton": "triton",
    "triton_compiled": "triton, compiled",
}
WHO = {  # for somebody who has never seen this project
    "reference": "deconvolution as its formulas stand, plain PyTorch",
    "paper": "deconvolution by the code of the paper's authors",
    "torch": "deconvolution by this project on any device",
    "triton": "deconvolution by this project's kernels for GPUs",
}
NETWORKS = {"vgg11": "VGG-11", "resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}
KINDS = {"step": "training step", "forward": "forward in training"}
STAGES = ("patches", "moments", "inverse_sqrt", "fold", "convolve", "rest")
DIRECTIONS = ("forward", "backward")
RATIO = "A ratio below 1 is a saving: 0.50 is half, 1.00 the same, 2.00 twice as much."
KINDS_OF_STEP = (
    " A stale step uses the running statistics; a mean of K steps is of one that takes its batch's and K-1 stale ones, "
    "as stats_interval=K has them."
)
Values = dict[str, dict[str, float]]  # by case and implementation (or stage)
Count = dict[str, int]


class Ratio(NamedTuple):
    """Time of one implementation over that of another, summed over the cases that both have."""

    suite: str
    group: Group
    layers: int
    kind: str
    ours: str
    baseline: str
    value: float
    partial: str  # "5 of 8 layers" where one of the two lacks some, else empty
    size: int | None  # a whole model's images' height and width


# ------------------------------------------------------------------------------------------------------------ words


def network(name: str) -> str:
    """``resnet18 block 16`` is ResNet-18 in blocks of 16 channels."""
    name, block, channels = name.partition(" block ")
    return NETWORKS.get(name, name) + (f",{block}{channels}" if block else "")


def label(name: str) -> str:
    """Of an implementation: ``"torch, compiled, stale"``; an unknown name as it is."""
    who, _, kind = name.partition(" ")
    return LABELS[who] + (f", {kind}" if kind else "") if who in LABELS else name


def kinds_of_step(names: Iterable[str]) -> str:
    """What a caption says of them, if they are among the names."""
    return KINDS_OF_STEP if any(" " in name for name in names) else ""


def lowered(title: str) -> str:
    """A title behind another word."""
    return title[0].lower() + title[1:]


def conditions(group: Group) -> str:
    return ", ".join(_conditions(group))


def _conditions(group: Group) -> tuple[str, ...]:
    return f"batch {group.batch}", group.dtype, group.layout.replace("_", " ")


def told_apart(groups: Iterable[Group]) -> tuple[str, dict[Group, str]]:
    """What all groups have in common, for a caption, and in brackets what each has of its own, for its row."""
    words = {group: _conditions(group) for group in groups}
    columns = list(zip(*words.values(), strict=True))
    alike = [len(set(column)) == 1 for column in columns]
    common = ", ".join(column[0] for column, same in zip(columns, alike, strict=True) if same)
    own = {g: ", ".join(w for w, same in zip(of, alike, strict=True) if not same) for g, of in words.items()}
    return f" {common[0].upper()}{common[1:]}." if common else "", {g: f" ({w})" if w else "" for g, w in own.items()}


def number(value: float | None, digits: int = 3) -> str:
    """About three digits, without exponents: ``123``, ``12.3``, ``1.23``, ``0.012``; whole numbers as they are."""
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, digits - whole)}f}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def order(names: Iterable[str], known: Sequence[str] = IMPLEMENTATIONS) -> list[str]:
    """Names in the order that everything uses, unknown ones last; of steps fresh, stale, means of few and of many."""
    place = {name: number for number, name in enumerate(known)}
    return sorted(dict.fromkeys(names), key=lambda n: (place.get(n.partition(" ")[0], len(known)), len(n), n))


def ours_of(names: Iterable[str]) -> list[str]:
    """Those of this project, in that order."""
    return [name for name in order(names) if name.partition(" ")[0] in OURS]


# ----------------------------------------------------------------------------------------------------------- values


def milliseconds(row: Row) -> float:
    return 1e3 * row["stats"]["median"]


def extra(field: str, scale: float = 1.0) -> Callable[[Row], float | None]:
    """A number from ``extra_info``, None where it was not measured."""

    def value(row: Row) -> float | None:
        found = row["extra_info"].get(field)
        return None if found is None else scale * found

    return value


def pivot(mine: Iterable[Row], value: Callable[[Row], float | None], by: str = "implementation") -> Values:
    """Values by case and by a field of ``extra_info``; what was not measured is left out."""
    values: Values = {}
    for row in mine:
        if (one := value(row)) is not None:
            values.setdefault(row["extra_info"]["case"], {})[row["extra_info"][by]] = one
    return values


def total(values: Values, count: Count) -> dict[str, float]:
    """Sums over the network's layers, of the names that all cases have."""
    names = [n for n in order(n for of in values.values() for n in of) if all(n in of for of in values.values())]
    return {n: sum(count[case] * of[n] for case, of in values.items()) for n in names}


def ratio(values: Values, count: Count, ours: str, baseline: str) -> tuple[float, int] | None:
    """Ratio of the sums over the cases that both have, and how many layers those are; None without any."""
    both = {case: of for case, of in values.items() if ours in of and baseline in of}
    below = sum(count[case] * of[baseline] for case, of in both.items())
    if below <= 0:
        return None
    return sum(count[case] * of[ours] for case, of in both.items()) / below, sum(count[case] for case in both)


def with_means(mine: Sequence[Row]) -> list[Row]:
    """A suite's rows, and for each interval of a stale training step the mean step: one fresh, the others stale."""
    fields = ("suite", *Group._fields, "case", "kind", "count", "shape")
    by_what = {_what(row): row["stats"]["median"] for row in mine}
    means = []
    for row in mine:
        info, stale = row["extra_info"], row["stats"]["median"]
        name = info["implementation"].removesuffix(STALE)
        fresh = by_what.get((*_what(row)[:-1], name))
        for k in info.get("stats_intervals", ()) if fresh is not None and info["kind"] == "step" else ():
            about = {field: info[field] for field in fields if field in info}
            about["implementation"] = f"{name} mean of {k} steps"
            means.append({"stats": {"median": fresh / k + (1 - 1 / k) * stale}, "extra_info": about})
    return [*mine, *means]


def _what(row: Row) -> tuple[Any, ...]:
    """What a row is of; the implementation is last."""
    return tuple(row["extra_info"][field] for field in (*Group._fields, "case", "kind", "implementation"))


def ratios(data: Result) -> list[Ratio]:
    """Ours over everything else: whole models first, then sums over a network's layers; training steps first."""
    found = []
    for suite in ("model", "layer"):
        for group, mine in grouped(rows(data, suite)).items():
            count, size = counts(mine), _size(mine) if suite == "model" else None
            for kind in KINDS:
                values = pivot([r for r in with_means(mine) if r["extra_info"]["kind"] == kind], milliseconds)
                names = ours_of(name for of in values.values() for name in of)
                for ours, baseline in ((o, b) for o in names for b in BASELINES):
                    if one := ratio(values, count, ours, baseline):
                        layers = sum(count.values())
                        partial = "" if one[1] == layers else f"{one[1]} of {layers} layers"
                        found.append(Ratio(suite, group, layers, kind, ours, baseline, one[0], partial, size))
    return found


def _size(mine: Sequence[Row]) -> int | None:
    shape = mine[0]["extra_info"].get("shape")
    return int(shape[-1]) if shape else None


def main_implementation(names: Iterable[str]) -> str | None:
    """Ours that a user of this machine runs: triton where it was measured."""
    known = set(names)
    return next((n for n in ("triton", "torch") if n in known), None)


def cell(one: Ratio) -> str:
    """A ratio in a table, with what it is not about."""
    return times(one.value) + (f" ({one.partial})" if one.partial else "")


def subject(one: Ratio) -> str:
    """What a ratio is about: a whole model, or the sum over a network's layers."""
    name = network(one.group.network)
    if one.suite == "model":
        return f"{name}{f' at {one.size}' if one.size else ''}, whole"
    return f"{name}, {one.layers} layers" if one.layers > 1 else f"{name}, one layer"


def counted(case: str, count: Count) -> str:
    name = network(case)  # a model's case is its name
    return name if count[case] == 1 else f"{name} (x{count[case]})"


def all_of(count: Count) -> str:
    return f"all {sum(count.values())} layers"


# ----------------------------------------------------------------------------------------------------- about the run


def spread(benchmarks: Iterable[Row]) -> float | None:
    """Of a typical row: how much of the median the middle half of its rounds spans."""
    rows = [r["stats"] for r in benchmarks if r["stats"]["median"] > 0 and r["stats"].get("iqr") is not None]
    return statistics.median(s["iqr"] / s["median"] for s in rows) if rows else None


def versions(data: Result) -> str:
    machine = data["machine_info"]
    triton = f", triton {machine['triton']}" if on_gpu(data) and machine.get("triton") else ""
    return f"torch {machine['torch'].partition('+')[0]}{triton}, Python {machine['python_version']}"


def commit(data: Result) -> str:
    """``"commit d7cc6e7, with changes"``, or nothing where the run was not in a checkout."""
    known = (r["extra_info"].get("commit") for r in data["benchmarks"])
    name, _, dirty = str(next((c for c in known if c), "")).partition("-")
    return f"commit {name[:7]}{', with changes' if dirty else ''}" if name and name != "unversioned" else ""


def device_title(data: Result) -> str:
    """The device with what else must be alike for times to be comparable."""
    machine = data["machine_info"]
    return device_of(data) + (f", driver {machine['driver']}" if on_gpu(data) else f", {machine['threads']} threads")


def where(data: Result) -> str:
    """Device, threads or driver, versions, commit and date in a line."""
    return "; ".join(filter(None, (device_title(data), versions(data), commit(data), data["datetime"][:10])))


def measured(data: Result) -> str:
    """``"medians of 12 interleaved rounds; in a typical row ..."``."""
    rounds = sorted({r["stats"].get("rounds", 0) for r in data["benchmarks"]})
    said = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    middle = spread(data["benchmarks"])
    noise = (
        "" if middle is None else f"; in a typical row the middle half of the rounds spans {middle:.0%} of the median"
    )
    return f"medians of {said} interleaved rounds{noise}"


def how(data: Result) -> str:
    """How it was measured, in two sentences."""
    said = measured(data)
    interleaved = "A round runs everything once, in a new random order, so that all meet the same machine."
    return f"{interleaved} {said[0].upper()}{said[1:]}."
