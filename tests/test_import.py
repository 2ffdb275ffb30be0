"""What ``import tdeconv`` costs and loads, and that every folder of code is in the package."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The processor time of either import in seconds, which other programs on the machine disturb less than the clock's; and
# the least of several least of all.
COSTS = """
import json, time
start = time.process_time()
import torch
middle = time.process_time()
import tdeconv
print(json.dumps([middle - start, time.process_time() - middle]))
"""

LOADED = """
import json, sys
import torch
before = set(sys.modules)
import tdeconv
print(json.dumps(sorted(set(sys.modules) - before)))
"""


# A finder as setuptools leaves it in an environment: it serves the subpackages of the checkout that is installed there.
BESIDE_ANOTHER_CHECKOUT = """
import json, sys
from importlib.util import spec_from_file_location

class Installed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = dict([("tdeconv.bench", "bench"), ("tdeconv.kernels", "kernels")]).get(name)
        return folder and spec_from_file_location(name, f"{sys.argv[1]}/{folder}/__init__.py")

sys.meta_path.append(Installed)
import tdeconv, tdeconv.bench, tdeconv.kernels
print(json.dumps([module.__file__ for module in (tdeconv, tdeconv.bench, tdeconv.kernels)]))
"""


def run(code: str, *argv: object, cwd: Path = ROOT) -> list:
    """The list that ``code`` prints as JSON in a Python of its own, which imports from the folder ``cwd`` first."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def loaded() -> list[str]:
    """The modules that ``import tdeconv`` loads after ``import torch``."""
    return run(LOADED)


@pytest.mark.usefixtures("loaded")  # the first import compiles, and fills the disk's cache
def test_import_costs_little_beside_torch() -> None:
    costs = [run(COSTS) for _ in range(3)]
    torch_s, tdeconv_s = (min(column) for column in zip(*costs, strict=True))
    # a compiler or a plotting library would cost more than torch; a twentieth was measured, and machines differ
    assert tdeconv_s <= 0.1 * torch_s, f"import tdeconv took {tdeconv_s:.3f} s beside torch's {torch_s:.3f} s"


def test_import_loads_nothing_but_itself_torch_and_the_standard_library(loaded: list[str]) -> None:
    names = {module.partition(".")[0] for module in loaded}
    assert "tdeconv" in names
    assert names - {"tdeconv", "torch"} - sys.stdlib_module_names == set()


def test_import_leaves_alone_what_is_loaded_on_first_use(loaded: list[str]) -> None:
    lazy = (
        "tdeconv.bench",
        "tdeconv.cli",
        "tdeconv.demo",
        "tdeconv.kernels",
        "tdeconv.torch_backend",
        "torch._dynamo",
        "torch._inductor",
    )
    assert [module for module in loaded if module.startswith(lazy)] == []


def test_every_folder_of_code_is_shipped() -> None:
    """The packages are listed by name: one left out would be missing from the wheel, and only there."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = ("tdeconv", *setuptools["package-dir"].values())
    folders = {path.parent.relative_to(ROOT) for top in tops for path in ROOT.glob(f"{top}/**/*.py")}
    folders.remove(Path("bench", "gpu"))  # for those who work on the kernels: of the source tree alone
    packages = {".".join(f.parts if f.parts[0] == "tdeconv" else ("tdeconv", *f.parts)) for f in folders}
    assert packages == set(setuptools["packages"])


def _checkout(folder: Path) -> Path:
    """A second source tree, as small as it can be: this one's layers beside a bench and kernels of its own."""
    for name in ("bench", "kernels"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
    (folder / "tdeconv").symlink_to(ROOT / "tdeconv")
    return folder


@pytest.mark.parametrize("installed", ["this one", "the other"])
def test_a_checkout_never_mixes_with_the_one_that_is_installed(installed: str, tmp_path: Path) -> None:
    other = _checkout(tmp_path)
    imported, elsewhere = (other, ROOT) if installed == "this one" else (ROOT, other)
    files = [imported / folder / "__init__.py" for folder in ("tdeconv", "bench", "kernels")]
    assert run(BESIDE_ANOTHER_CHECKOUT, elsewhere, cwd=imported) == list(map(str, files))


def test_a_wheel_looks_for_its_subpackages_in_itself_alone(tmp_path: Path) -> None:
    """Beside a wheel's folder lie the environment's other packages, and one of them is called `kernels`."""
    package = tmp_path / "tdeconv"
    package.mkdir()
    for path in (ROOT / "tdeconv").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("bench", "kernels"):
        (package / name).symlink_to(ROOT / name)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = "import json, tdeconv, tdeconv.kernels; print(json.dumps([*tdeconv.__path__, tdeconv.kernels.__file__]))"
    assert run(code, cwd=tmp_path) == [str(package), str(package / "kernels" / "__init__.py")]
