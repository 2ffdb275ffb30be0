"""torchvision beside a PyTorch that it was not built for: from our own code, and in the environment of the Makefile."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOADED = """
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold, int loaded=1) -> Tensor")
"""
DESCRIBED = """
    import torch
    for operator in ("nms", "qnms"):
        torch.library.register_fake(f"torchvision::{operator}")(lambda dets, scores, iou_threshold: dets)
"""


def torchvision_in(folder: Path, loads: bool) -> None:
    """A stand-in that does as torchvision does: load its operators, which may fail, and then describe them."""
    package = folder / "torchvision"
    package.mkdir()
    lines = [
        "import torch",
        *([textwrap.dedent(LOADED)] if loads else []),
        "from torchvision import _meta_registrations",
    ]
    (package / "__init__.py").write_text("\n".join(lines))
    (package / "_meta_registrations.py").write_text(textwrap.dedent(DESCRIBED))


def run(code: str, *path: Path) -> str:
    """What a Python of its own prints, in which every warning is an error. ``path`` comes before what is installed."""
    folders = [*map(str, path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTS = {
    "our own code's": "from tdeconv.vision import torchvision; torchvision()",
    "anybody's, with the hook": "import vision_hook; import torchvision",
}


@pytest.mark.parametrize("whose", IMPORTS)
@pytest.mark.parametrize("loads", [True, False])
def test_operators_that_did_not_load_are_declared(whose: str, loads: bool, tmp_path: Path) -> None:
    torchvision_in(tmp_path, loads)
    schema = (
        "import torch; print(torch.ops.torchvision.nms.default._schema, torch.ops.torchvision.qnms.default._schema)"
    )
    printed = run(f"{IMPORTS[whose]}; {schema}", tmp_path, ROOT / ".ci")
    assert printed.count("loaded=1") == (2 if loads else 0)


def test_the_hook_loads_nothing_when_python_starts() -> None:
    code = "import sys, vision_hook; print([m for m in ('torch', 'torchvision', 'tdeconv') if m in sys.modules])"
    assert run(code, ROOT / ".ci") == "[]\n"


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_it_is_imported_as_anything_else_in_the_environment_of_the_tests(package: str) -> None:
    """Where the Makefile made the environment, its hook is what lets this pass beside a torch for CPUs."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    run(f"import {package}")
