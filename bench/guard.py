"""Nothing gets slower or larger unseen: ``python -m tdeconv.bench.guard [--check] [--update] [--rounds N]``.

Held exactly, for one thread and one version of PyTorch, of fresh steps and of some stale ones: the bytes that layers
keep for backward, what they ask of the allocator, how many of torch's operators they run. Held by a limit: the memory
of whole networks, and fresh training steps' times against the reference's and conv + batch norm + ReLU's, measured side
by side in one run. A time is never compared with another run's. ``guard.json`` beside this file has all these numbers.

Exits 1 and names what got worse. What got better fails, too, until ``--update`` has put it into the file: so the next
change cannot lose it unseen.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tdeconv.arguments import check_writable, nonempty_path, read
from tdeconv.bench import machine, measure, memory, steps
from tdeconv.bench.cases import Layer
from tdeconv.bench.clock import Clock, CpuClock
from tdeconv.bench.implementations import STALE, Implementation, implementations
from tdeconv.bench.markdown import table
from tdeconv.bench.measure import Variant
from tdeconv.bench.results import publish
from tdeconv.torch_backend import measured

FILE = Path(__file__).with_name("guard.json")
OURS, BASELINES = "torch", ("reference", "conv_bn_relu")
ROUNDS = 25
BEST_OF = 2  # steps of a round: one that the machine was busy with something else in does not count

# One of each kind: first layers, narrow and wide 3x3, tiny maps, strides, 1x1, groups, depthwise.
EXACT_BATCH = 8
EXACT = (
    *(Layer(3, 64, 32, input_grad=False), Layer(64, 128, 16), Layer(256, 256, 8), Layer(512, 512, 2)),
    Layer(3, 64, 64, kernel=7, stride=2, n_iter=15, input_grad=False),
    *(Layer(128, 128, 16, stride=2), Layer(64, 256, 16, kernel=1), Layer(256, 512, 16, kernel=1, stride=2)),
    *(Layer(64, 64, 16, groups=4, n_iter=3), Layer(64, 64, 16, groups=64, n_iter=1)),
)

# In stale steps, too: a first layer, large and tiny maps, 1x1, groups.
EXACT_STALE = (
    *(Layer(3, 64, 32, input_grad=False), Layer(64, 128, 16), Layer(512, 512, 2)),
    *(Layer(64, 256, 16, kernel=1), Layer(64, 64, 16, groups=4, n_iter=3)),
)

# At a batch that training uses; one of a few images is all weights and factors.
NETWORKS, NETWORK_BATCH, NETWORK_LIMIT = ("vgg11", "resnet50"), 64, 0.75

# Steps of 3 ms to 0.3 s; all of a round take two seconds, and a disturbance meets few of the ratios.
TIMED_BATCH = 16
TIMED = (
    *(Layer(3, 64, 32, input_grad=False), Layer(32, 32, 16), Layer(128, 128, 16), Layer(16, 32, 32, stride=2)),
    *(Layer(256, 64, 14, kernel=1), Layer(64, 64, 16, groups=64, n_iter=1)),
)
# Shown, not held: two runs can differ by more than a tenth (short steps that wait for memory).
NOT_HELD = (("256-64 1x1 at 14", "conv_bn_relu"), ("64-64 3x3 in 64 groups at 16", "conv_bn_relu"))
MARGIN = 1.2  # a new limit over what was measured: two runs' ratios differ by up to a tenth

Numbers = dict[str, dict[str, Any]]


# --------------------------------------------------------------------------------------------------------- measured


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is allocated depends on the number of threads, and a busy neighbour slows one down less than all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _implementations(*names: str) -> dict[str, Implementation]:
    found = implementations(torch.device("cpu"), compiled=False)
    return {one.name: one for one in found if one.name in names}


def exact(layer: Layer, name: str = OURS) -> dict[str, int]:
    """What one training step of a layer takes, whatever the machine's speed; ``name`` is an implementation's."""
    with measured.fixed(onednn=False, products=True):  # what a CPU is measured to do best would differ by CPU
        return _exact(layer, name)


def _exact(layer: Layer, name: str) -> dict[str, int]:
    one, variant = _implementations(name)[name], Variant(name, "contiguous", "float32")
    step = steps.step_of(steps.problem(layer, EXACT_BATCH), one, variant)
    step.first_step()
    used = memory.allocations(lambda: step.run(CpuClock()))
    step.forget()
    outputs: list[torch.Tensor] = []
    with step.kind():
        forward = _operators(lambda: outputs.append(step.call(step.x)))
    return {
        "saved_bytes": step.saved_bytes,
        "allocations": used.count,
        "allocated_bytes": used.bytes,
        "peak_bytes": used.peak,
        "forward_operators": forward,
        "backward_operators": _operators(lambda: outputs[0].backward(step.grad)),
    }


def _exact_cases() -> dict[str, tuple[Layer, str]]:
    """By name: a layer, and the implementation that its exact numbers are of."""
    fresh = {layer.name: (layer, OURS) for layer in EXACT}
    return fresh | {layer.name + STALE: (layer, OURS + STALE) for layer in EXACT_STALE}


def _operators(run: Callable[[], object]) -> int:
    """How many of torch's operators run, those inside others too."""
    events = memory.profiled(run).key_averages()
    return sum(event.count for event in events if event.key.startswith(("aten::", "tdeconv::")))


def networks() -> Numbers:
    """Bytes that whole networks keep for backward, by network and dtype, then implementation."""
    found: Numbers = {}
    for row in memory.network_memory(NETWORKS, (NETWORK_BATCH,)):
        found.setdefault(f"{row['model']} {row['dtype']}", {})[row["implementation"]] = row["saved_bytes"]
    return found


class _SideBySide:
    """All implementations of one layer in turn, a few times: a round's ratio is of neighbours, each at its best."""

    def __init__(self, works: Mapping[str, measure.Work]) -> None:
        self._works = works

    def run(self, clock: Clock) -> dict[str, float]:
        turns = [{name: work.run(clock)["step"] for name, work in self._works.items()} for _ in range(BEST_OF)]
        return {name: min(turn[name] for turn in turns) for name in self._works}


def ratios(layers: Iterable[Layer], rounds: int) -> Numbers:
    """By layer and baseline: the median over the rounds of our step's time over the baseline's of the same round.

    Raises:
        AssertionError: an implementation's answers are wrong.
    """
    of = _implementations(OURS, *BASELINES)
    wanted = [(one, Variant(name, "contiguous", "float32")) for name, one in of.items()]
    works = {}
    for layer in layers:
        prepared = steps.prepare(steps.problem(layer, TIMED_BATCH), wanted)
        works[layer.name] = _SideBySide({variant.implementation: one.work for variant, one in prepared})
    bar = partial(tqdm, desc="measuring", unit="layer", ncols=80, mininterval=1, leave=False, disable=None)
    seconds = measure.interleaved(works, rounds, clock=CpuClock(), progress=bar)
    return {name: {base: _ratio(of[OURS], of[base]) for base in BASELINES} for name, of in seconds.items()}


def _ratio(ours: Sequence[float], baseline: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, baseline, strict=True))


# ------------------------------------------------------------------------------------------------------------- held


def platform_name() -> str:
    """What the exact numbers hold for."""
    return f"torch {torch.__version__.partition('+')[0]}, {platform.machine()}"


def device_name() -> str:
    """What the limits on ratios hold for: the CPU's name, family and model.

    The name alone is too little: "AMD EPYC" may be of any generation, and against the faster convolutions of one the
    ratios were up to 1.6 times the limits of another.
    """
    found = import_module("cpuinfo").get_cpu_info()
    numbers = [f"{key} {found[key]}" for key in ("family", "model") if key in found]
    return ", ".join([str(machine.describe(torch.device("cpu"))["device"]), *numbers])


def load(path: Path) -> dict[str, Any]:
    """The numbers held.

    Raises:
        ValueError: there is no such file, or it is not one of this command's.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}: run this in a checkout, or make one with --update")
    text = read(path, "--file")
    try:
        held = json.loads(text)
        if not all(isinstance(held[key], kind) for key, kind in _FIELDS.items()):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        needs = ", ".join(_FIELDS)
        raise ValueError(f"{path} is no JSON object with {needs}: take the committed one, or delete it") from None
    return held


_FIELDS: dict[str, type] = {"platform": str, "exact": dict, "device": str, "limits": dict}


def differences(held: Numbers, found: Numbers) -> list[str]:
    """What is not as it is held, a line each."""
    lines = []
    for name in dict.fromkeys((*held, *found)):
        if name not in held or name not in found:
            lines.append(f"{name}: {'not held yet' if name in found else 'held, but not measured any more'}")
            continue
        for what in dict.fromkeys((*held[name], *found[name])):
            old, new = held[name].get(what, 0), found[name].get(what, 0)
            if old != new:
                word = "worse" if new > old else "better"
                lines.append(f"{name}: {what} {old} -> {new} ({new - old:+d}), {word}")
    return lines


def too_large(found: Numbers) -> list[str]:
    """Networks that keep more than they may."""
    lines = []
    for name, saved in found.items():
        ratio = saved[OURS] / saved["conv_bn_relu"]
        if ratio > NETWORK_LIMIT:
            lines.append(
                f"{name}: keeps {ratio:.3f}x of conv + batch norm + ReLU's bytes for backward, at most {NETWORK_LIMIT}x"
            )
    return lines


def above(limits: Numbers, found: Numbers) -> list[tuple[str, str]]:
    """Layers and baselines whose ratio is above its limit."""
    return [
        (name, base)
        for name, of in found.items()
        for base, ratio in of.items()
        if base in limits[name] and ratio > limits[name][base]
    ]


# ----------------------------------------------------------------------------------------------------------- checks


def _check_exact(held: Mapping[str, Any], found: Numbers) -> list[str]:
    if held["platform"] != platform_name():
        print(
            f"not comparable, skipped: the exact numbers are of {held['platform']}, this is {platform_name()}; "
            "--update makes them anew"
        )
        return []
    if lines := differences(held["exact"], found):
        lines.append(
            "  -> worse: find the change that did it. Better, or meant: python -m tdeconv.bench.guard --update, and "
            f"commit {FILE.name}"
        )
    return lines


def _check_ratios(held: Mapping[str, Any], found: Numbers, rounds: int) -> list[str]:
    """A ratio above its limit is measured a second time before it is called worse."""
    if held["device"] != device_name():
        print(f"not comparable, ratios shown only: their limits are of {held['device']}, this is {device_name()}")
        return []
    limits = held["limits"]
    if unlimited := found.keys() - limits.keys():
        return [f"{name}: no limits on its ratios; put them into {FILE.name}" for name in sorted(unlimited)]
    suspects = above(limits, found)
    names = {name for name, _ in suspects}
    again = ratios([layer for layer in TIMED if layer.name in names], rounds) if names else {}
    lines = []
    for name, base in sorted(set(above(limits, again)) & set(suspects)):
        ratio, limit = again[name][base], limits[name][base]
        lines.append(
            f"{name}: training step {OURS} / {base} {ratio:.2f}, at most {limit:.2f} ({ratio / limit - 1:.0%} above)"
        )
        found[name][base] = ratio
    if lines:
        lines.append(
            "  -> find the change that did it: git bisect run python -m tdeconv.bench.guard. Meant: raise the limit in "
            + FILE.name
        )
    return lines


# ----------------------------------------------------------------------------------------------------------- tables


def _exact_table(found: Numbers) -> str:
    rows = [["layer", "saved KB", "peak KB", "allocations", "operators forward", "backward"]]
    for name, of in found.items():
        cells = [of["saved_bytes"] // 1000, of["peak_bytes"] // 1000, of["allocations"]]
        rows.append([name, *map(str, cells), str(of["forward_operators"]), str(of["backward_operators"])])
    return table(rows)


def _network_table(found: Numbers) -> str:
    rows = [["kept for backward, MB", "conv_bn_relu", OURS, "ratio", "at most"]]
    for name, of in found.items():
        values = [of["conv_bn_relu"], of[OURS]]
        ratio = f"{of[OURS] / of['conv_bn_relu']:.3f}"
        rows.append([name, *(f"{value / 1e6:.0f}" for value in values), ratio, f"{NETWORK_LIMIT}"])
    return table(rows)


def _ratio_table(found: Numbers, limits: Numbers) -> str:
    rows = [["training step", *(cell for base in BASELINES for cell in (f"{OURS} / {base}", "at most"))]]
    for name, of in found.items():
        most = limits.get(name, {})
        cells = [(f"{of[base]:.2f}", f"{most[base]:.2f}" if base in most else "-") for base in BASELINES]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    return table(rows)


# ---------------------------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tdeconv.bench.guard",
        description="Check that memory, allocations and ratios of times are what guard.json holds.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare (what is done without it, too)")
    mode.add_argument(
        "--update", action="store_true", help="write the exact numbers; limits stay, missing ones are set"
    )
    rounds = f"rounds of the timed part, {ROUNDS} by default; 0 leaves it out"
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=rounds)
    parser.add_argument("--file", type=nonempty_path, default=FILE, help=argparse.SUPPRESS)
    return parser


def run(path: Path, rounds: int, update: bool) -> list[str]:
    """Measure, then compare or write. Returns what is wrong, a line each; prints the tables."""
    held = None if update and not path.exists() else load(path)
    if update:
        check_writable(path.parent, "the folder of --file")
    with _one_thread():
        cases = tqdm(_exact_cases().items(), desc="counting", unit="layer", ncols=80, leave=False, disable=None)
        found = {name: exact(*case) for name, case in cases}
        kept = networks()
        times = ratios(TIMED, rounds) if rounds else {}
        problems = too_large(kept)
        if update:
            limits = _update(path, held, found, times)
        else:
            assert held is not None
            limits = held["limits"]
            problems += [*_check_exact(held, found), *_check_ratios(held, times, rounds)]
    for line in problems:
        print(line)
    tables = [_exact_table(found), _network_table(kept), *([_ratio_table(times, limits)] if times else [])]
    print("\n" + "\n\n".join(tables))
    return problems


def _update(path: Path, held: Mapping[str, Any] | None, found: Numbers, times: Numbers) -> Numbers:
    """Write the file. Limits are decisions: those that are there stay."""
    device = device_name()
    limits: Numbers = dict(held["limits"]) if held and held["device"] == device else {}
    for name, of in times.items():
        new = {base: round(MARGIN * ratio, 2) for base, ratio in of.items() if (name, base) not in NOT_HELD}
        limits.setdefault(name, new)
    data = {"platform": platform_name(), "exact": found, "device": device, "limits": limits}
    publish({path: json.dumps(data, indent=2) + "\n"})
    print(f"written: {path}")
    return limits


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.rounds < 0:
            raise ValueError(f"--rounds must be 0 or more, got {args.rounds}")
        return 1 if run(args.file, args.rounds, args.update) else 0
    except AssertionError as error:  # of the answers, checked before anything is timed
        print(f"wrong answers: {error}")
        return 1
    except (ImportError, OSError, ValueError) as error:
        print(f"tdeconv guard: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
