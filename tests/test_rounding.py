"""The imitation of another library: what it reaches, how far, and that the same call gives the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# In a Python of its own, which is then not fit for another test.
CODE = """
import torch
import rounding
from cases import CASES
from helpers import difference, randn, run_case

a, b = randn(3, 500), randn(500, 3, seed=1)

def seen():
    case = next(case for case in CASES if case.name == "plain")
    cancels = torch.cat([a, a], 1) @ torch.cat([b, -b])
    exact = a.new_full((1, 1), 3.0).mean(1), a[:, :1] @ b[:1]
    layers = [t for backend in ("torch", "reference") for t in run_case(case, backend, torch.float64)]
    return cancels, exact, [a @ b, a.sum(1), torch.linalg.vector_norm(b, dim=1), *layers]

cancels, exact, others = seen()
rounding.imitate(1)
first, second = seen(), seen()
assert all(torch.equal(t, u) for t, u in zip(first[2], second[2], strict=True))
for t, u in zip(first[2], others, strict=True):
    assert 0 < difference(t, u) < 1e-12
assert all(torch.equal(t, u) for t, u in zip(first[1], exact, strict=True))  # one term has no order
eps, terms = torch.finfo(a.dtype).eps, 2 * a.abs() @ b.abs()
assert 0.1 * eps < difference(first[0], torch.zeros_like(cancels), terms) < eps
"""


def test_every_result_moves_by_its_terms_rounding() -> None:
    """Forward and backward, inside the fast backends' operators and outside them."""
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
