"""A pytest plugin: the ``gpu``-marked tests from the source tree, a share of them, over memory full of NaN.

``--rows`` is the file of results (see :mod:`bench.gpu.worker`), ``--share I/K`` this process's share of the tests.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import bench.gpu.tree  # noqa: F401  # before tdeconv.kernels
from bench.gpu.worker import begun, write


class _Absent(types.ModuleType):
    """A module that is not installed: whatever is asked of it is there and does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


if importlib.util.find_spec("hypothesis") is None:  # the tests' helpers ask for it, the tests on a GPU do not
    sys.modules["hypothesis"] = _Absent("hypothesis")

POISON = 1 << 30  # bytes
SMALL, SMALL_COUNT = 1 << 19, 64  # below 1 MiB the allocator keeps memory of its own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, required=True)
    parser.addoption("--share", default="0/1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, config.getoption("--share").split("/"))
    before = begun(config.getoption("--rows"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    mine = [item for item in marked[index::count] if item.nodeid not in before]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


@pytest.fixture(autouse=True)
def _memory_full_of_nan() -> None:
    """What the allocator gives next was used before: a kernel that leaves something unwritten shows."""
    if torch.cuda.is_available():
        large = torch.full((POISON // 4,), torch.nan, device="cuda")
        small = [torch.full((SMALL // 4,), torch.nan, device="cuda") for _ in range(SMALL_COUNT)]
        del large, small


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    with item.config.getoption("--rows").open("a", encoding="utf-8") as file:
        write(file, {"begin": item.nodeid})
        result = yield
        write(file, {"done": item.nodeid})
    if not _device_works():
        os._exit(3)  # an error that stays: the rest is for a new process
    return result


def _device_works() -> bool:
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        row = {"unit": item.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["error"] = str(crash.message if crash else report.longrepr)[:500]
        with item.config.getoption("--rows").open("a", encoding="utf-8") as file:
            write(file, row)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        with session.config.getoption("--rows").open("a", encoding="utf-8") as file:
            write(file, {"end": True})
