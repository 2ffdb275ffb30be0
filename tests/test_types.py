"""What type checkers are told of the functions that take a model and return it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CODE = """
from typing import assert_type

import tdeconv
from torch import nn

class Net(nn.Module):
    classes: int = 10

net = tdeconv.convert_deconv(Net(), block={"head": 256, "*": 64})
assert_type(net, Net)
assert_type(net.classes, int)
assert_type(tdeconv.convert_deconv(nn.Sequential(), block=32), nn.Sequential)
assert_type(tdeconv.convert_sync_deconv(net), Net)
assert_type(tdeconv.fuse_deconv_eval(net), Net)
assert_type(tdeconv.update_stats(net, []), Net)
"""


@pytest.mark.slow
def test_a_model_keeps_its_type(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is installed with [lint]")
    (tmp_path / "user.py").write_text(CODE)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "user.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
