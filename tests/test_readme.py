"""Every piece of Python in the README runs as it stands."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_code_runs(code: str, tmp_path: Path) -> None:
    """In a process of its own, outside the tree, as a reader would run it."""
    command = [sys.executable, "-c", code]
    with socket.socket() as free:  # another run of the tests may have the port that the README names
        free.bind(("localhost", 0))
        env = os.environ | {"MASTER_PORT": str(free.getsockname()[1])}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr


def test_there_is_code_to_run() -> None:
    text = "\n".join(BLOCKS)
    for name in ("FastDeconv", "convert_deconv", "compile", "autocast", "fuse_deconv_eval", "convert_sync_deconv"):
        assert name in text
    assert "checkpoint_contexts" in text
