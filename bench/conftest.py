"""Options, the measurements that the tests replay, and what is recorded beside the times."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info
from tqdm import tqdm

from tdeconv.bench import measure, stages, steps
from tdeconv.bench.cases import BATCH, BY_NAME
from tdeconv.bench.implementations import Implementation, implementations

IMPLEMENTATIONS = pytest.StashKey[tuple[Implementation, ...]]()
Key = tuple[str, str, str]  # test, layer, implementation


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tdeconv bench")
    group.addoption("--rounds", type=int, default=12, help="rounds of every measurement")
    group.addoption("--batch", type=int, default=BATCH, help="batch size")
    oracle = "what answers are checked against: the method's reference in this dtype"
    group.addoption("--oracle", choices=("float64", "float32"), default="float64", help=oracle)
    group.addoption("--paper-code", type=Path, metavar="DIR", help="checkout of the paper's repository, to measure too")


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[IMPLEMENTATIONS] = implementations(config.getoption("--paper-code"))
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", [one.name for one in metafunc.config.stash[IMPLEMENTATIONS]])


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    # replaying is instant: the measurements' progress bars say more than dots
    return ("passed", "", "PASSED") if report.passed and report.when == "call" else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["node"] = ""  # a host's name is nobody's business
    machine_info["device"] = machine_info["cpu"].get("brand_raw", "unknown CPU")
    machine_info["cores"] = os.cpu_count()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__


@pytest.fixture(scope="session")
def provenance(pytestconfig: pytest.Config) -> dict[str, Any]:
    """What every row says about where it was measured."""
    machine = pytestconfig.hook.pytest_benchmark_generate_machine_info(config=pytestconfig)
    commit = get_commit_info()
    return {
        "dtype": "float32",
        "batch": pytestconfig.getoption("--batch"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit["id"] + ("-dirty" if commit.get("dirty") else ""),
        "cpu": machine["cpu"].get("brand_raw", "unknown CPU"),
    }


class Measurements:
    """The layers that the selected tests ask for, checked and measured all together."""

    def __init__(self, config: pytest.Config, wanted: Iterable[tuple[str, str]]) -> None:
        self._batch = config.getoption("--batch")
        self._oracle = getattr(torch, config.getoption("--oracle"))
        self._implementations = config.stash[IMPLEMENTATIONS]
        self.info: dict[Key, dict[str, Any]] = {}
        works: dict[Key, measure.Work] = {}
        for test, name in tqdm(list(wanted), desc="checking answers", unit="layer", ncols=80):
            for implementation, work in self._works(test, name).items():
                works[test, name, implementation] = work
        bar = functools.partial(tqdm, desc="measuring", unit="run", ncols=80, mininterval=1)
        self.seconds = measure.interleaved(works, config.getoption("--rounds"), progress=bar)

    @functools.cache  # noqa: B019 - one object, one session: a layer's tests start from the same problem
    def _problem(self, name: str) -> steps.Problem:
        return steps.problem(BY_NAME[name], self._batch)

    def _works(self, test: str, name: str) -> Mapping[str, measure.Work]:
        if test == "test_stage":
            return stages.prepare(self._problem(name))
        works, errors = steps.prepare(self._problem(name), self._implementations, self._oracle)
        for one, work in works.items():
            self.info[test, name, one] = {"saved_bytes": work.saved_bytes, "error": errors[one]}
        return works


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Measurements:
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    return Measurements(request.config, dict.fromkeys((t.originalname, t.callspec.params["layer"]) for t in tests))


@pytest.fixture
def replay(
    request: pytest.FixtureRequest, benchmark: Any, measurements: Measurements, provenance: dict[str, Any]
) -> Callable[..., None]:
    """``replay(layer, implementation, part, **extra_info)``: that measurement becomes this test's benchmark."""

    def replay(layer: str, implementation: str, part: str, **extra: Any) -> None:
        key = (request.node.originalname, layer, implementation)
        about = {"layer": layer, "count": BY_NAME[layer].count, "implementation": implementation}
        benchmark.group = f"{layer} {part}"
        benchmark.extra_info.update({**about, **extra, **measurements.info.get(key, {}), **provenance})
        measure.replay(benchmark, measurements.seconds[key][part])

    return replay
