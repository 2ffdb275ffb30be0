"""Every piece of Python in the README and the documentation runs as it stands."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
BLOCKS = {
    f"{page}{i}": block
    for page, text in PAGES.items()
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
}


@pytest.mark.parametrize("code", BLOCKS.values(), ids=BLOCKS.keys())
def test_code_runs(code: str, tmp_path: Path) -> None:
    """In a process of its own, outside the tree, as a reader would run it."""
    command = [sys.executable, "-c", code]
    with socket.socket() as free:  # another run of the tests may have the port that the README names
        free.bind(("localhost", 0))
        env = os.environ | {"MASTER_PORT": str(free.getsockname()[1])}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr


def test_there_is_code_to_run() -> None:
    text = "\n".join(BLOCKS.values())
    for name in ("FastDeconv", "convert_deconv", "compile", "autocast", "fuse_deconv_eval", "convert_sync_deconv"):
        assert name in text
    assert "checkpoint_contexts" in text
