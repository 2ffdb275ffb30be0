"""The n-step Newton-Schulz polynomial as a program of symmetric products: data, no arithmetic.

Two steps multiply Z by ``q(M) = (36 - 39M + 27M^2 - 9M^3 + M^4) / 16``, which takes two products: ``B = M M`` and
``q = (B R - 39M + 36I) / 16`` with ``R = B - 9M + 27I``. Then ``K = q M``, ``M <- K q``, ``Z <- Z q``. A single step
has the factor ``T = (3I - M) / 2`` instead. All factors are polynomials of one symmetric matrix: every product is
symmetric, so that its upper triangle is enough.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# Where a matrix lives in the workspace. Its tangent, the gradient's, lives TANGENT further on.
A, M, B, R, Q, K, Z0, Z1 = range(8)
TANGENT = 8


class Op(NamedTuple):
    """``out = alpha sum(x y) + beta c + gamma I``; then, if wanted, ``out2 = alpha2 out + beta2 c + gamma2 I``."""

    factors: tuple[tuple[int, int], ...]
    c: int
    out: int
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    out2: int = -1
    alpha2: float = 0.0
    beta2: float = 0.0
    gamma2: float = 0.0

    def tangent(self) -> Op:
        """By the product rule: one product of twice the inner dimension."""
        factors = tuple(pair for x, y in self.factors for pair in ((x + TANGENT, y), (x, y + TANGENT)))
        out2 = self.out2 if self.out2 < 0 else self.out2 + TANGENT
        moved = self._replace(factors=factors, c=self.c + TANGENT, out=self.out + TANGENT, out2=out2)
        return moved._replace(gamma=0.0, gamma2=0.0)


class Program(NamedTuple):
    """Phases of independent operations, and the slot of the result."""

    phases: tuple[tuple[Op, ...], ...]
    result: int

    def with_tangents(self) -> Program:
        """Value and tangent side by side: a chain as long as the value's alone."""
        return self._replace(phases=tuple((*ops, *(op.tangent() for op in ops)) for ops in self.phases))


def plan(n_iter: int) -> tuple[int, ...]:
    """How many steps are taken at a time; never a single one first, unless it is all there is."""
    return (2, 1, 2) if n_iter == 5 else (2,) * (n_iter // 2) + (1,) * (n_iter % 2)


@functools.cache
def program(n_iter: int) -> Program:
    """The products of ``n_iter`` steps from the normalised covariance in slot A."""
    steps = plan(n_iter)
    if steps == (1,):
        return Program(((Op((), A, Z0, beta=-0.5, gamma=1.5),),), Z0)
    m, z, phases = A, -1, list[tuple[Op, ...]]()
    for i, step in enumerate(steps):
        last, factor = i + 1 == len(steps), R
        if step == 2:
            factor = Z0 if z < 0 else Q
            phases.append((Op(((m, m),), m, B, out2=R, alpha2=1.0, beta2=-9.0, gamma2=27.0),))
            phases.append((Op(((B, R),), m, factor, alpha=1 / 16, beta=-39 / 16, gamma=36 / 16),))
        after = []
        if not last:
            after.append(Op(((factor, m),), m, K))
        if z < 0:
            z = factor
        else:
            other = Z1 if z == Z0 else Z0
            after.append(Op(((z, factor),), factor, other))
            z = other
        if after:
            phases.append(tuple(after))
        if not last:
            advance, m = Op(((K, factor),), K, M), M
            if steps[i + 1] == 1:
                # not into R, which this very product may be reading as its factor
                assert factor != R
                advance = advance._replace(out2=R, alpha2=-0.5, gamma2=1.5)
            phases.append((advance,))
    return Program(tuple(phases), z)
