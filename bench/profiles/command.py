"""``python -m tdeconv profile``: where a model's training step spends its time, layer by layer and stage by stage."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from tqdm import tqdm

import tdeconv
from tdeconv import backends, checks
from tdeconv.arguments import check_writable, nonempty_path, positive_int, why
from tdeconv.bench import machine
from tdeconv.bench.clock import Clock, clock_of
from tdeconv.bench.memory import no_stderr
from tdeconv.bench.profiles import facts as layer_facts
from tdeconv.bench.profiles import tables as profile_tables
from tdeconv.bench.profiles.facts import Facts
from tdeconv.bench.profiles.observe import Observer, Part, layers_of, with_rest
from tdeconv.bench.results import publish
from tdeconv.bench.roofline import Ceilings
from tdeconv.bench.stages import DIRECTIONS
from tdeconv.bench.steps import autocast
from tdeconv.named_models import FORMS, load_model, random_input, some_loss, to_layout
from tdeconv.schedule import every_step

OUT = Path("bench-out") / "profile"
WARM_UP = 1  # rounds, behind a first step
BATCH = {"cpu": 16, "cuda": 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=FORMS)
    add(
        "--batch",
        type=positive_int,
        metavar="N",
        help="images (default {cuda} on a GPU, {cpu} on a CPU)".format(**BATCH),
    )
    add(
        "--size", type=positive_int, metavar="N", help="their height and width (default 224, or what a timm model says)"
    )
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="float32", help="half precision by autocast (default %(default)s)")
    layouts = ("channels_last", "contiguous")
    add("--layout", choices=layouts, default="channels_last", help="of images and weights (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    kinds = "fresh takes its batch's statistics, stale uses the running ones (default %(default)s)"
    add("--step", choices=("fresh", "stale"), default="fresh", help=kinds)
    add("--backend", choices=checks.BACKENDS, help="default: the fastest that can run, as the layers choose it")
    add("--rounds", type=positive_int, default=5, metavar="N", help="steps to take medians of (default %(default)s)")
    add("--linear", action="store_true", help="convert linear layers too")
    add(
        "--out",
        type=nonempty_path,
        default=OUT,
        metavar="DIR",
        help="for profile.json, .md and trace.json (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Profile, print and write as asked for by the options of :func:`add_arguments`.

    Returns:
        0 when all files are written; 2 for a request that cannot be served, with a message on stderr and all files as
        they were.

    Raises:
        ModuleNotFoundError: the model's library is not installed.
    """
    try:
        content, trace = _profile(args, _device(args))
        text = profile_tables.text(content)
        files = {"profile.json": json.dumps(content, indent=1) + "\n", "trace.json": trace}
        files["profile.md"] = profile_tables.markdown(content)
        _write(args.out, files)
    except ValueError as error:
        print(f"tdeconv profile: {error}", file=sys.stderr)
        return 2
    print(text)
    print(f"saved in {args.out}: profile.json, profile.md, and trace.json for chrome://tracing or ui.perfetto.dev")
    return 0


# --------------------------------------------------------------------------------------------------------- requests


def _device(args: argparse.Namespace) -> torch.device:
    """The device; the backend asked for can run on it."""
    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        raise ValueError("--device cuda: PyTorch sees no GPU here; leave it out to profile on the CPU")
    device = torch.device(args.device or ("cuda" if available else "cpu"))
    if args.backend == "triton" and (missing := backends.why_no_triton(device)) is not None:
        raise ValueError(f"--backend triton cannot run: {missing}")
    return device


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        publish({folder / name: content for name, content in files.items()})
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written to: {why(error)}") from error


def _model(args: argparse.Namespace) -> tuple[nn.Module, bool]:
    """The model, and whether it was converted: one that has deconvolution layers already stays as it is."""
    model = load_model(args.model, argument="--model")
    if layers_of(model):
        return model, False
    report = tdeconv.ConversionReport()
    tdeconv.convert_deconv(model, linear=args.linear, report=report)
    if not layers_of(model):
        reasons = "; ".join(dict.fromkeys(row.why for row in report.left))
        raise ValueError(f"--model {args.model!r} has no layer that can be converted: {reasons or report}")
    return model, True


def _input_shape(model: nn.Module, args: argparse.Namespace, device: torch.device) -> tuple[int, ...]:
    """Images for the first convolution; features for the first linear layer of a model that has no convolution."""
    batch = args.batch or BATCH[device.type]
    said: Any = getattr(model, "default_cfg", None) or {}  # timm's
    size = args.size or said.get("input_size", (3, 224, 224))[-1]
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return batch, module.in_channels, *(size,) * len(module.kernel_size)
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    return (batch, 3, size, size) if linear is None else (batch, linear.in_features)


# ------------------------------------------------------------------------------------------------------------ steps


class Step:
    """A training step without the optimiser, fresh or stale."""

    def __init__(self, model: nn.Module, x: Tensor, dtype: torch.dtype, clock: Clock, stale: bool = False) -> None:
        self.model, self.x, self._dtype, self._clock, self._stale = model, x, dtype, clock, stale

    def __call__(self) -> tuple[Any, Any]:
        """The marks of its start and end."""
        self.model.zero_grad(set_to_none=True)
        with every_step(self.model.modules(), fresh=not self._stale):
            self._clock.ready()
            start = self._clock.mark()
            with autocast(self.x.device, self._dtype):
                output = self.model(self.x)
            some_loss(output).backward()
            return start, self._clock.mark()

    def first(self) -> dict[str, Facts]:
        """Run it for the first time; what its layers are.

        Raises:
            ValueError: the model refuses the input.
        """
        try:
            return layer_facts.look(self.model, self, self._stale)
        except Exception as error:
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            shape = tuple(self.x.shape)
            raise ValueError(
                f"--model cannot take a training step on an input of shape {shape}: {why}; try other --batch and --size"
            ) from error


@dataclasses.dataclass
class Rounds:
    """Seconds, a number for each round: of the layers' parts, of all else, of the whole step, and of one unwatched."""

    parts: list[dict[Part, float]] = dataclasses.field(default_factory=list)
    other: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    unwatched: list[float] = dataclasses.field(default_factory=list)


def _measure(step: Step, clock: Clock, rounds: int) -> Rounds:
    """Steps watched and not, in turns: the watching takes time, too."""
    observer, result = Observer(step.model, clock), Rounds()
    for i in tqdm(range(WARM_UP + rounds), desc="training steps", disable=None, leave=False, ncols=80):
        unwatched = clock.seconds(*step())
        with observer.watching():
            whole = clock.seconds(*step())
            parts, other = with_rest(observer.take(), whole)
        if i >= WARM_UP:
            result.parts.append(parts)
            result.other.append(other)
            result.whole.append(whole)
            result.unwatched.append(unwatched)
    return result


def _trace(step: Step, clock: Clock, device: torch.device) -> str:
    """One more step as a Chrome trace, with a range for every part of a layer."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    observer = Observer(step.model, clock, ranges=True)
    profiler = torch.profiler.profile(activities=activities)
    with observer.watching():
        with no_stderr():
            profiler.start()
        try:
            step()
            observer.take()
        finally:
            with no_stderr():
                profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- result


def _profile(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], str]:
    """What ``profile.json`` and ``trace.json`` hold."""
    model, converted = _model(args)
    check_writable(args.out)
    shape = _input_shape(model, args, device)
    dtype, clock = getattr(torch, args.dtype), clock_of(device)
    model = to_layout(model.to(device).train(), args.layout)
    with backends.use_backend(args.backend or "auto"):
        step = Step(model, random_input(shape, args.layout, device), dtype, clock, args.step == "stale")
        facts = step.first()
        rounds = _measure(step, clock, args.rounds)
        trace = _trace(step, clock, device)
    ceilings = machine.ceilings(device, tuple(sorted({_name(f.dtype) for f in facts.values()})))
    layers = [_layer(i, name, f, rounds.parts, ceilings) for i, (name, f) in enumerate(facts.items(), 1)]
    other = statistics.median(rounds.other)
    total = sum(layer["total_s"] for layer in layers) + other
    for layer in layers:
        layer["share_of_step"] = layer["total_s"] / total
    content = {
        "model": args.model,
        "converted": converted,
        "step": args.step,
        "input": list(shape),
        "dtype": args.dtype,
        "layout": args.layout,
        "rounds": args.rounds,
        "device_type": device.type,
        **machine.describe(device),
        "python_version": platform.python_version(),
        "tdeconv": tdeconv.__version__,
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "ceilings": machine.as_json(ceilings),
        "step_s": total,
        "step_median_s": statistics.median(rounds.whole),
        "unwatched_s": statistics.median(rounds.unwatched),
        "else_s": other,
        "not_called": [name for name in layers_of(model) if name not in facts],
        "layers": layers,
    }
    return content, trace


def _layer(
    number: int, name: str, facts: Facts, parts: Sequence[dict[Part, float]], ceilings: Ceilings
) -> dict[str, Any]:
    """A layer's row, without its share of the step."""
    keys = dict.fromkeys(key for part in parts for key in part if key.layer == name)
    seconds: dict[str, dict[str, float]] = {direction: {} for direction in DIRECTIONS}
    for key in keys:
        seconds[key.direction][key.stage] = statistics.median(part.get(key, 0.0) for part in parts)
    total = sum(s for of in seconds.values() for s in of.values())
    floors: dict[str, dict[str, Any]] = {direction: {} for direction in DIRECTIONS}
    for (stage, direction), floor in facts.floors(ceilings).items():
        floors[direction][stage] = floor
    floor_s = sum(f["seconds"] for of in floors.values() for f in of.values()) if facts.shapes else None
    return {
        "number": number,
        "name": name,
        "type": facts.type,
        "shape": facts.label,
        "input": facts.input,
        "calls": facts.calls,
        "dtype": _name(facts.dtype),
        "backend": facts.backend,
        "why": facts.why.replace("tdeconv.use_backend", "--backend"),
        "how": facts.how,
        "seconds": seconds,
        "total_s": total,
        "floors": floors,
        "floor_s": floor_s,
        "share_of_floor": None if floor_s is None else floor_s / total,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
