"""A visit to a GPU turned into evidence: ``python bench/gpu/report.py --out DIR --minutes 9``, from the source tree.

One after the other: the device's ceilings; the grid barrier, which would hang if it failed, alone; the ``gpu``-marked
tests; every stage of ResNet-50's and VGG-11's layers, answers first (in several processes), then times (alone on the
device); every candidate compiled, then measured, and the chosen ones timed; the networks' training steps; NVIDIA's
tools. Each step has a share of the time that is left. What fails or would overrun is reported, and the rest still runs.
``DIR/results.json`` grows as results come; ``report.md`` and the plots are made from it at the end.

``--smoke`` tries all of it on a CPU, in Triton's interpreter, on tiny layers; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder is no place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.gpu import cases as gpu_cases
from bench.gpu import table as gpu_table
from bench.gpu.worker import Row, Worker

ROOT = Path(__file__).resolve().parents[2]
# Steps in order, each with its share of the time and the longest that one of its units may take, in seconds. A step's
# unused time is its followers'.
STEPS: dict[str, tuple[float, float]] = {
    "device": (8, 60),  # the first to load everything from disk
    "barrier": (8, 45),
    "tests": (15, 60),
    "check": (11, 45),
    "kernels": (8, 30),
    "compile": (12, 90),
    "tune": (8, 30),
    "tuned": (4, 30),
    "models": (27, 75),
    "tools": (2, 60),
}
POLL = 0.1
LEAST = 1.0  # seconds: with less a step starts nothing


class NoDevice(RuntimeError):
    """There is nothing to report on."""


@dataclass
class Step:
    """A step: its command, without what each child adds, and its units, dealt out to so many children."""

    name: str
    units: list[str]
    workers: int = 1
    arguments: list[str] = field(default_factory=list)

    def commands(self, python: str) -> list[list[str]]:
        if self.name == "tests":
            return [[*_pytest(python), *self.units, f"--share={i}/{self.workers}"] for i in range(self.workers)]
        child = [python, "-m", "bench.gpu.child", self.name, *self.arguments]
        shares = [self.units[i :: self.workers] for i in range(self.workers)]
        return [[*child, "--units", *share] for share in shares if share]


def _pytest(python: str) -> list[str]:
    options = ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "bench.gpu.plugin"]
    return [python, "-m", "pytest", "-q", "-m", "gpu", *options]


class Report:
    """What was found, kept on disk as it comes."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self.out, self.work, self.written = out, out / "children", 0.0
        for old in (self.work, out / "tuning"):
            shutil.rmtree(old, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.about = {"commit": options.pop("commit") or _commit(), "driver": _driver()}
        self.content: dict[str, Any] = {
            "format": 1,
            "about": self.about,
            "options": options,
            "steps": [],
            "rows": [],
            "choices": {},
        }

    def add(self, step: str, rows: list[Row]) -> None:
        """Every row says where it comes from; a stage's times, with which error its answers were right."""
        for row in rows:
            if step == "device":
                self.about |= {k: v for k, v in row.items() if k not in ("unit", "ceilings", "error")}
            if step == "kernels" and "direction" in row:
                row |= {"error_measured": self._measured_error(row)}
            self.content["rows"].append({"step": step, **self.about, **row})
        if rows and time.monotonic() - self.written > 1:
            self.save()

    def _measured_error(self, row: Row) -> float | None:
        same = [r for r in self.rows("check") if r["unit"] == row["unit"] and r.get("direction") == row["direction"]]
        return same[0].get("error_measured") if same else None

    def rows(self, step: str) -> list[Row]:
        return [row for row in self.content["rows"] if row["step"] == step]

    def save(self) -> None:
        self.written = time.monotonic()
        _write(self.out / "results.json", json.dumps(self.content, indent=1) + "\n")

    def right(self) -> list[str]:
        """Units whose answers were checked and right, whole."""
        wrong = {row["unit"] for row in self.rows("check") if "error" in row}
        return list(dict.fromkeys(row["unit"] for row in self.rows("check") if row["unit"] not in wrong))

    def barrier_works(self) -> bool:
        rows = self.rows("barrier")
        return bool(rows) and not any("error" in row for row in rows) and self.state("barrier") == "done"

    def state(self, step: str) -> str:
        return next((s["state"] for s in self.content["steps"] if s["step"] == step), "not run")

    def ceilings(self) -> dict[str, float]:
        return next((row["ceilings"] for row in self.rows("device") if "ceilings" in row), {})

    def read_choices(self) -> None:
        """The tuner's files, a name of a kernel and its sizes -> what it chose."""
        for path in sorted((self.out / "tuning").glob("*.json")):
            self.content["choices"] |= json.loads(path.read_text(encoding="utf-8")).get("entries", {})


def _write(path: Path, text: str) -> None:
    """In one step: whoever reads it finds the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _commit() -> str:
    commit = _said("git", "rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and _said("git", "status", "--porcelain") else commit or "unknown"


def _driver() -> str:
    said = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return said[0] if said else "none"


# ------------------------------------------------------------------------------------------------------------- steps


def plan(report: Report, args: argparse.Namespace) -> Iterator[Step]:
    """The steps in order; what one is made of may depend on what those before it found."""
    small, common = args.smoke, ["--smoke"] if args.smoke else []
    many = args.workers
    yield Step("device", ["device"], arguments=common)
    yield Step("barrier", ["576"] if small else ["576", "147", "96"], arguments=common)
    yield Step("tests", _files_with_gpu_tests(), many)
    barrier = report.barrier_works() and not small  # a CPU has none
    units = gpu_cases.units(gpu_cases.cases(small), barrier)
    yield Step("check", [unit.name for unit in units], many, common)
    measured = [*common, "--ceilings", json.dumps(report.ceilings())]
    yield Step("kernels", report.right(), arguments=measured)
    cases = [case.name for case in gpu_cases.tuned_cases(small)]
    models = [model.name for model in gpu_cases.models(small, barrier)]
    ahead = [f"model {name}" for name in models if " compiled" in name]
    yield Step("compile", [*ahead, *cases[: len(cases) if small else len(cases) // 2]], many, common)
    yield Step("tune", cases, arguments=common)
    report.read_choices()
    yield Step("tuned", [unit.name for unit in gpu_cases.tuned_units(small)], arguments=measured)
    yield Step("models", models, arguments=common)
    yield Step("tools", ["compute-sanitizer memcheck", "compute-sanitizer racecheck", "ncu"], arguments=common)


def _files_with_gpu_tests() -> list[str]:
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def environment(step: str, report: Report, smoke: bool) -> dict[str, str]:
    """What a step's children are told besides: which cache of tuned choices, that the barrier is asked for by name."""
    tuned = report.out / "tuning"
    aside = report.work / "candidates"
    env = {"TDECONV_CACHE": str(aside if step == "compile" else tuned), "TDECONV_COOPERATIVE": "0"}
    env |= {"TORCHINDUCTOR_COMPILE_THREADS": "4"} if step == "compile" else {}  # others compile beside it
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} if step == "tests" else {}  # whatever else is installed
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return env | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if smoke else {})


def run_step(step: Step, seconds: float, report: Report, args: argparse.Namespace) -> None:
    """Run a step's children for at most so many seconds."""
    start, limit = time.monotonic(), min(STEPS[step.name][1], seconds)
    env = environment(step.name, report, args.smoke)
    workers: list[Worker] = []
    commands = step.commands(sys.executable)
    in_time = seconds >= LEAST or not commands
    try:
        for i, command in enumerate(commands if in_time else []):
            workers.append(Worker(command, env, report.work / f"{step.name}-{i}.jsonl", ROOT, limit))
        while in_time and not all(worker.finished for worker in workers):
            for worker in workers:
                report.add(step.name, worker.poll())
            time.sleep(POLL)
            in_time = time.monotonic() - start < seconds
        for worker in workers:
            report.add(step.name, worker.stop())
    finally:
        for worker in workers:
            worker.kill()
    failed = [worker.failed for worker in workers if worker.failed]
    report.content["steps"].append(
        {
            "step": step.name,
            "seconds": round(time.monotonic() - start, 1),
            "allowed_s": round(seconds, 1),
            "state": "failed" if failed else "done" if in_time else "out of time",
            "begun": sum(worker.begun for worker in workers),
            "units": len(step.units) if step.name != "tests" else None,
            **({"error": failed[0]} if failed else {}),
        }
    )
    report.save()


def run(args: argparse.Namespace) -> Report:
    """Every step, each with its share of what time is left."""
    end = time.monotonic() + 60 * args.minutes
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report = Report(args.out, options)
    weights = {name: weight for name, (weight, _) in STEPS.items()}
    for step in plan(report, args):
        seconds = max(0.0, end - time.monotonic()) * weights[step.name] / sum(weights.values())
        del weights[step.name]
        print(f"{step.name}: at most {seconds:.0f} s", flush=True)
        run_step(step, seconds, report, args)
        if step.name == "device" and report.about.get("kind") == "cpu" and not args.smoke:
            raise NoDevice("torch finds no CUDA or ROCm device here; --smoke tries the report without one")
    report.read_choices()
    report.save()
    return report


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu/report.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="results; an earlier run's are replaced")
    add("--minutes", type=float, default=9.0, help="for everything but the tables at the end (default %(default)s)")
    add("--workers", type=int, default=min(12, os.cpu_count() or 1), help="children where nothing is timed")
    add("--commit", help="of the source, where git cannot say")
    add("--smoke", action="store_true", help="try it on a CPU, in Triton's interpreter, on tiny layers")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()  # the children are at work elsewhere
    if not args.minutes > 0 or args.workers < 1:
        parser.error("--minutes must be above 0 and --workers at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        report = run(args)
    except NoDevice as error:
        print(f"gpu/report.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what there is: {args.out / 'results.json'}", file=sys.stderr)
        return 130
    _write(args.out / "report.md", gpu_table.markdown(report.content))
    plots = gpu_table.plots(report.content, args.out)
    print(f"\n{gpu_table.short(report.content)}")
    print(f"saved: {', '.join(str(args.out / name) for name in ('results.json', 'report.md', *plots))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
