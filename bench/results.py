"""Result files: read, checked, told apart by device, kept. Only the JSON is read: nothing here measures.

``python -m tdeconv.bench.results FILE...`` puts runs into ``bench/results/<device>/``, to be committed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tdeconv.arguments import check_writable, nonempty_path

RESULTS = Path(__file__).parent / "results"
HINT = "make results with: python -m tdeconv bench --quick"
SUITES = {  # what tells a suite's rows apart
    "layer": ("kind",),
    "model": ("kind",),
    "stage": ("stage", "direction"),
    "scaling": ("axis", "value"),
}
_TOP = ("set", "datetime")
_MACHINE = ("device", "cores", "threads", "torch", "python_version")
_MEMORY = ("model", "batch", "size", "dtype", "implementation", "saved_bytes")
_INFO = ("network", "case", "implementation", "dtype", "layout", "batch")
Result = dict[str, Any]
Row = dict[str, Any]


class Group(NamedTuple):
    """Rows that may be compared and added up: one network under the same conditions."""

    network: str
    batch: int
    dtype: str
    layout: str


# ---------------------------------------------------------------------------------------------------------- reading


def load(path: Path) -> Result:
    """A result file of ``tdeconv bench``.

    Raises:
        ValueError: it is no JSON of pytest-benchmark, holds no benchmarks, or lacks a field that reports need.
        OSError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is no JSON of pytest-benchmark: {error}") from None
    if not isinstance(data, dict) or not _is(data, "benchmarks", list) or not _is(data, "machine_info", dict):
        raise ValueError(f"{path} is no JSON of pytest-benchmark: it needs 'machine_info' and 'benchmarks'; {HINT}")
    if not data["benchmarks"]:
        raise ValueError(f"{path} holds no benchmarks: its run ended before anything was measured; {HINT}")
    if problem := _problem(data):
        raise ValueError(f"{path} is no result file of tdeconv bench: {problem}; {HINT}")
    return data


def _is(mapping: Mapping[str, Any], key: str, kind: type) -> bool:
    return isinstance(mapping.get(key), kind)


def _problem(data: Result) -> str:
    """What a file of pytest-benchmark lacks to be a result file, or nothing."""
    if missing := _missing(data, _TOP):
        return missing
    if missing := _missing(data["machine_info"], _MACHINE):
        return f"machine_info: {missing}"
    for index, row in enumerate(data.get("memory") or ()):
        if missing := _missing(row, _MEMORY):
            return f"memory[{index}]: {missing}"
    for index, row in enumerate(data["benchmarks"]):
        if problem := _row_problem(row):
            return f"benchmarks[{index}]: {problem}"
    return ""


def _row_problem(row: Any) -> str:
    if not isinstance(row, dict) or not _is(row, "stats", dict) or not _is(row, "extra_info", dict):
        return "needs 'stats' and 'extra_info'"
    median, info = row["stats"].get("median"), row["extra_info"]
    if not isinstance(median, int | float) or not math.isfinite(median):
        return f"stats.median must be a number of seconds, got {median!r}"
    if info.get("suite") not in SUITES:
        return f"extra_info.suite must be one of {', '.join(SUITES)}, got {info.get('suite')!r}"
    missing = _missing(info, (*_INFO, *SUITES[info["suite"]]))
    return f"extra_info: {missing}" if missing else ""


def _missing(mapping: Mapping[str, Any], keys: Iterable[str]) -> str:
    missing = [key for key in keys if key not in mapping]
    return f"{', '.join(map(repr, missing))} missing" if missing else ""


def found(paths: Iterable[Path]) -> dict[Path, Result]:
    """Result files by path. A folder stands for all result files in it and below; its other JSON is passed over.

    Raises:
        ValueError: a path is absent, a file is no result file, or a folder holds none.
    """
    results: dict[Path, Result] = {}
    for path in paths:
        if path.is_dir():
            inside = _inside(path)
            if not inside:
                raise ValueError(f"the folder {path} holds no result files; {HINT}")
            results.update(inside)
        elif path.exists():
            results[path] = load(path)
        else:
            raise ValueError(f"{path} does not exist; {HINT}")
    return results


def _inside(folder: Path) -> dict[Path, Result]:
    results = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            results[path] = load(path)
        except ValueError:  # something else that is kept there, such as what compilers say of the kernels
            continue
    return results


# ---------------------------------------------------------------------------------------------------------- devices


def on_gpu(data: Result) -> bool:
    """Whether it was measured on a GPU: only those have a driver."""
    return data["machine_info"].get("driver") is not None


def device_of(data: Result) -> str:
    """``"AMD EPYC, 2 cores"``; a GPU goes by its name alone: the cores beside it are its host's."""
    machine = data["machine_info"]
    return str(machine["device"]) if on_gpu(data) else f"{machine['device']}, {machine['cores']} cores"


def folder_name(data: Result) -> str:
    """The device as a folder's name, ``amd-epyc-2-cores``."""
    return _slug(device_of(data))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def identity(data: Result) -> tuple[Any, ...]:
    """What must be alike for times to be comparable: device, cores, threads, driver."""
    return tuple(data["machine_info"].get(key) for key in ("device", "cores", "threads", "driver"))


def same_device(a: Result, b: Result) -> bool:
    """Whether two runs' times may be compared."""
    return identity(a) == identity(b)


def by_device(results: Mapping[Path, Result]) -> list[dict[Path, Result]]:
    """Files of one device together, the older run first."""
    devices: dict[tuple[Any, ...], dict[Path, Result]] = {}
    for path, data in sorted(results.items(), key=lambda item: (item[1]["datetime"], str(item[0]))):
        devices.setdefault(identity(data), {})[path] = data
    return list(devices.values())


# ------------------------------------------------------------------------------------------------------------- rows


def rows(data: Result, suite: str, **where: Any) -> list[Row]:
    """The benchmarks of a suite whose ``extra_info`` has these values."""
    wanted = {"suite": suite, **where}
    return [r for r in data["benchmarks"] if all(r["extra_info"].get(k) == v for k, v in wanted.items())]


def grouped(benchmarks: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by what may be compared and added up, in the file's order."""
    groups: dict[Group, list[Row]] = {}
    for row in benchmarks:
        groups.setdefault(Group(*(row["extra_info"][field] for field in Group._fields)), []).append(row)
    return groups


def counts(benchmarks: Iterable[Row]) -> dict[str, int]:
    """How often the network has each case: sums over its layers weigh with it."""
    return {row["extra_info"]["case"]: row["extra_info"].get("count") or 1 for row in benchmarks}


# ---------------------------------------------------------------------------------------------------------- writing


def publish(files: Mapping[Path, str]) -> None:
    """Write all files: each under a temporary name first, and only when all are complete under their own.

    Raises:
        OSError: one cannot be written. What was there before stays.
    """
    waiting = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, temporary in waiting.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(files[path], encoding="utf-8")
        for path, temporary in waiting.items():
            os.replace(temporary, path)
    finally:
        for temporary in waiting.values():
            temporary.unlink(missing_ok=True)


def keep(path: Path, root: Path = RESULTS) -> Path:
    """Put a run into ``root/<device>/<set>.json``, compact, to be committed. Returns that file.

    Raises:
        ValueError: ``path`` is no result file.
        OSError: it cannot be read, or its copy not written.
    """
    data = load(path)
    data["machine_info"].get("cpu", {}).pop("flags", None)  # long, and no report reads it
    target = root / folder_name(data) / f"{_slug(data['set'])}.json"
    publish({target: json.dumps(_rounded(data), separators=(",", ":")) + "\n"})
    return target


def _rounded(value: Any) -> Any:
    """Six digits of every number are more than any clock here tells."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    about = "Put runs into bench/results/<device>/, to be committed."
    parser = argparse.ArgumentParser(prog="python -m tdeconv.bench.results", description=about)
    parser.add_argument("files", nargs="+", type=nonempty_path, metavar="FILE", help="a result file of tdeconv bench")
    parser.add_argument("--root", type=nonempty_path, default=RESULTS, metavar="DIR", help="default %(default)s")
    args = parser.parse_args(argv)
    try:
        for file in args.files:  # all or none are kept
            load(file)
        check_writable(args.root, "--root")
        for file in args.files:
            print(f"kept: {keep(file, args.root)}")
    except (ValueError, OSError) as error:
        print(f"tdeconv.bench.results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
