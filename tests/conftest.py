"""The tests' markers, the time they took, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The tests are of the tree that they lie in, whichever checkout is installed, and so are the Pythons that they start.
ROOT = str(Path(__file__).parents[1])
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

# torch.compile keeps its graphs by their code and not by the CPU's capability: one made for wider vectors would be
# taken from the cache (torch 2.13).
if "ATEN_CPU_CAPABILITY" in os.environ:
    cache = Path(tempfile.gettempdir()) / f"torchinductor-{os.getuid()}-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)

# Triton looks when a kernel is defined. Tests of what happens without the interpreter run a Python of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One worker a core (pytest-xdist): threads of several would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--rounding", type=int, metavar="SEED", help="round as another CPU would (tests/rounding.py)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.monotonic()
    if (seed := config.getoption("--rounding")) is not None:
        importlib.import_module("rounding").imitate(seed)  # loads Triton, which must know by now that it interprets
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device")
    config.addinivalue_line("markers", "slow: takes long; runs with --slow only")
    config.addinivalue_line("markers", "exact: of sums that are exact in any order; does not run with --rounding")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = {}
    if not torch.cuda.is_available():  # true on ROCm as well
        absent["gpu"] = pytest.mark.skip(reason="no CUDA or ROCm device")
    if not config.getoption("--slow"):
        absent["slow"] = pytest.mark.skip(reason="slow: runs with --slow")
    if config.getoption("--rounding") is not None:
        absent["exact"] = pytest.mark.skip(reason="exact: no order of summation changes a bit, as --rounding would")
    for item in items:
        for name, skip in absent.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _choices_of_no_cpu() -> Iterator[None]:
    """The same code on every CPU: torch's products, and tdeconv's convolutions."""
    with importlib.import_module("tdeconv.torch_backend.measured").fixed(onednn=False, products=True):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small sizes: threads, LAPACK's above all, wait for one another many times longer than one alone takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)  # after the plugins' summaries, which take time too
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    minutes, seconds = divmod(round(time.monotonic() - config.stash[STARTED]), 60)
    terminalreporter.write_line(f"The tests took {minutes} min {seconds} s.")
