"""Import this first: it makes the source tree importable as it stands, installed or not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import tdeconv  # noqa: E402

if importlib.util.find_spec("tdeconv.kernels") is None:  # an installation finds it, and tdeconv.bench, by package-dir
    tdeconv.__path__.append(str(ROOT))
