"""Compiling the kernels for GPUs that are not here, in a Python without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


def aot(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "bench.gpu.aot", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_kernel_for_every_target(tmp_path):
    result = aot(tmp_path, "--only", "inverse_sqrt_phase bf16x3 64x64", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())["rows"]
    found = {row["target"]: row for row in rows}
    assert set(found) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert found["sm_90"]["spills"] == 0
    assert found["sm_90"]["instructions"]["wgmma"] >= 3  # passes
    assert found["sm_80"]["instructions"]["mma"] > 0
    assert found["gfx942"]["instructions"]["mfma"] > 0
    assert all(0 < row["registers"] <= 512 and 0 < row["shared"] <= 232448 for row in rows)
    assert "inverse_sqrt_phase" in (tmp_path / "aot.md").read_text()


@pytest.mark.slow
def test_every_kernel_for_sm_90(tmp_path):
    result = aot(tmp_path, "--one", "--target", "sm_90")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\n| ") >= 20


def test_every_kernel_with_sizes_of_one(tmp_path):
    """One row, one channel, one image: Triton compiles such an int as a constant."""
    result = aot(tmp_path, "--only", "sizes=1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\n| ") >= 20


@pytest.mark.parametrize("n_iter", [1, 2])
def test_few_steps_of_a_tiny_root(tmp_path, n_iter):
    """A depthwise layer of a converted network takes one step: nothing is left for the kernel's loop."""
    for direction in ("fwd", "bwd"):
        result = aot(tmp_path, "--only", f"inverse_sqrt_tiny_{direction} n={n_iter} ", "--target", "sm_90")
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_the_cooperative_launch(tmp_path):
    result = aot(tmp_path, "--only", "inverse_sqrt_grid_fwd tf32x3 64x64", "--target", "sm_90")
    assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_by_that_name(tmp_path):
    assert aot(tmp_path, "--only", "no such kernel").returncode == 1


def test_refused_under_the_interpreter(tmp_path):
    result = aot(tmp_path, TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
