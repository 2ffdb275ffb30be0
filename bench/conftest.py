"""Options, the measurements that the tests replay, and what is recorded beside the times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.session import PerformanceRegression
from pytest_benchmark.utils import get_commit_info
from tqdm import tqdm

from tdeconv.backends import BackendUnavailable
from tdeconv.bench import machine, measure, memory, sets, suites
from tdeconv.bench.clock import clock_of
from tdeconv.bench.implementations import OURS, implementations
from tdeconv.bench.measure import Prepared, Row, Variant
from tdeconv.bench.steps import FORMATS

SESSION = pytest.StashKey[suites.Session]()
Key = tuple[str, str, Variant]  # test, case, variant
MEMORY_SETS = ("quick", "models")


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("tdeconv bench").addoption
    add("--set", choices=sets.SETS, default="layers", help="what to measure")
    add("--device", default="cpu", help="cpu or cuda")
    add("--backend", action="append", choices=OURS, default=[], help="one of ours that must run")
    add("--paper-code", type=Path, metavar="DIR", help="checkout of the paper's repository, to measure too")
    add("--model", help="of the set 'model'")
    add("--rounds", type=int, help="of every measurement")
    add("--batch", type=int, help="batch size")
    add("--size", type=int, help="height and width of the images")
    add("--block", action="append", type=int, help="channels whitened together")
    add("--stats-interval", action="append", type=int, help="steps of which one is fresh, for a mean")
    add("--layout", action="append", choices=tuple(FORMATS))
    add("--dtype", action="append", choices=("float32", "bfloat16", "float16"))
    add(
        "--oracle", choices=("float64", "float32"), help="what layers' answers are checked against: the reference in it"
    )


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    device = torch.device(option("--device"))
    try:
        options = sets.Options(
            *(option("--batch"), option("--size"), option("--rounds"), option("--model")),
            blocks=tuple(option("--block") or ()) or None,
            intervals=tuple(option("--stats-interval") or ()) or None,
            layouts=tuple(option("--layout") or ()) or None,
            dtypes=tuple(option("--dtype") or ()) or None,
            oracle=option("--oracle"),
        )
        plan = sets.plan(option("--set"), device, options)
        everyone = implementations(device, backends=option("--backend"), paper_code=option("--paper-code"))
    except (ValueError, FileNotFoundError, BackendUnavailable) as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[SESSION] = suites.Session(plan, device, everyone)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = suites.BY_TEST[metafunc.function.__name__]
    rows = list(suite.rows(metafunc.config.stash[SESSION]))
    metafunc.parametrize("row", [pytest.param(row, id="-".join(row)) for row in rows])


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """A suite without rows has, to pytest, a test that is skipped."""
    items[:] = [item for item in items if isinstance(item.callspec.params["row"], Row)]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    # replaying is instant: the measurements' progress bars say more than dots
    return ("passed", "", "PASSED") if report.passed and report.when == "call" else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    session = config.stash[SESSION]
    machine_info["node"] = ""  # a host's name is nobody's business
    machine_info |= machine.describe(session.device)
    machine_info["ceilings"] = machine.as_json(machine.ceilings(session.device, session.plan.dtypes))


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary() -> Generator[None, Any, Any]:
    """A regression ends the run with its status, not with a traceback."""
    try:
        return (yield)
    except PerformanceRegression as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.TESTS_FAILED)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["set"] = config.stash[SESSION].plan.name
    if output_json["set"] in MEMORY_SETS and sets.has_torchvision():
        output_json["memory"] = memory.network_memory()


@pytest.fixture(scope="session")
def provenance(pytestconfig: pytest.Config) -> dict[str, Any]:
    """What every row says about where it was measured."""
    commit = get_commit_info()
    dirty = "-dirty" if commit.get("dirty") else ""
    return {"commit": commit["id"] + dirty, **machine.describe(pytestconfig.stash[SESSION].device)}


class Measurements:
    """What the selected tests ask for, checked and measured all together."""

    def __init__(self, session: suites.Session, wanted: Iterable[tuple[str, Row]]) -> None:
        by_case: dict[tuple[str, str], list[Variant]] = {}
        for test, row in wanted:
            variants = by_case.setdefault((test, row.case), [])
            if row.variant not in variants:
                variants.append(row.variant)
        self.prepared: dict[Key, Prepared] = {}
        for (test, case), variants in tqdm(by_case.items(), desc="checking answers", unit="case", ncols=80):
            for variant, prepared in suites.BY_TEST[test].prepare(session, case, variants):
                self.prepared[test, case, variant] = prepared
        bar = functools.partial(tqdm, desc="measuring", unit="run", ncols=80, mininterval=1)
        works = {key: prepared.work for key, prepared in self.prepared.items()}
        clock = clock_of(session.device)
        self.seconds = measure.interleaved(works, session.plan.rounds, clock=clock, progress=bar)


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Measurements:
    wanted = [(test.originalname, test.callspec.params["row"]) for test in request.session.items]
    try:
        return Measurements(request.config.stash[SESSION], wanted)
    except ValueError as error:  # an input that a network refuses
        pytest.exit(f"nothing was timed: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    except AssertionError as error:  # a wrong answer
        pytest.exit(f"nothing was timed: {error}", returncode=pytest.ExitCode.TESTS_FAILED)


@pytest.fixture
def replay(
    request: pytest.FixtureRequest, benchmark: Any, measurements: Measurements, provenance: dict[str, Any]
) -> Callable[[Row], None]:
    """That row's measurement becomes this test's benchmark."""
    test, session = request.node.originalname, request.config.stash[SESSION]

    def replay(row: Row) -> None:
        key = (test, row.case, row.variant)
        seconds = measurements.seconds[key]
        ceilings = machine.ceilings(session.device, session.plan.dtypes)
        info = {
            **row._asdict(),
            **suites.BY_TEST[test].about(session, row, ceilings),
            **measurements.prepared[key].info,
        }
        if info.get("floor_s"):
            info["share"] = info["floor_s"] / suites.median(seconds, row.part)
        del info["part"]
        benchmark.group = f"{info['network']} {info['case']} {row.part}"
        benchmark.params = row._asdict()
        benchmark.extra_info.update({**info, **provenance})
        measure.replay(benchmark, seconds[row.part])

    return replay
