"""Entry points of :mod:`tdeconv.kernels.inverse_sqrt_phases`.

One program per small matrix with every phase in it; for larger ones a launch per phase, or one cooperative launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tdeconv.kernels.inverse_sqrt_phases import (
    _finish_work,
    _inner_work,
    _normalise_work,
    _product_work,
    _spread_work,
    _square_work,
)

# --------------------------------------------------------------------------------------- one program, one tile, each


@triton.jit
def _inverse_sqrt_whole_fwd_kernel(  # type: ignore[no-untyped-def]
    cov_ptr, root_ptr, basis_ptr, norm_ptr, part_ptr, ws_ptr, ints_ptr, floats_ptr, ops, batch, D,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The workspace is small enough to stay in the caches; registers hold one product at a time."""
    matrix = tl.program_id(0)
    _square_work(matrix, cov_ptr, part_ptr, D, 1, CHUNK)
    tl.debug_barrier()
    _normalise_work(matrix, cov_ptr, part_ptr, basis_ptr, norm_ptr, ws_ptr, D, BLOCK, 1, BLOCK, 1)
    tl.debug_barrier()
    for op in range(ops - 1):
        _product_work(
            matrix, op, 1, ws_ptr, ints_ptr, floats_ptr, root_ptr, norm_ptr, batch, D, BLOCK, 1, False,
            BLOCK, BLOCK_K, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
    _product_work(
        matrix, ops - 1, 1, ws_ptr, ints_ptr, floats_ptr, root_ptr, norm_ptr, batch, D, BLOCK, 1, True,
        BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit
def _inverse_sqrt_whole_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, basis_ptr, norm_ptr, out_ptr, part_ptr, ws_ptr, ints_ptr, floats_ptr, ops, result, tangent, batch, D,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0)
    _spread_work(matrix, basis_ptr, grad_ptr, ws_ptr, tangent, batch, D, BLOCK, 1, BLOCK)
    tl.debug_barrier()
    for op in range(ops):
        _product_work(
            matrix, op, 1, ws_ptr, ints_ptr, floats_ptr, out_ptr, norm_ptr, batch, D, BLOCK, 1, False,
            BLOCK, BLOCK_K, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
    _inner_work(2 * matrix, ws_ptr, part_ptr, result, tangent, batch, BLOCK, 1, CHUNK)
    _inner_work(2 * matrix + 1, ws_ptr, part_ptr, result, tangent, batch, BLOCK, 1, CHUNK)
    tl.debug_barrier()
    _finish_work(matrix, ws_ptr, part_ptr, norm_ptr, out_ptr, result + tangent, batch, D, BLOCK, 1, BLOCK, 1)


# ------------------------------------------------------------------------------------------------ a launch per phase


@triton.jit
def _inverse_sqrt_square_kernel(cov_ptr, part_ptr, D, PARTS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    _square_work(tl.program_id(0), cov_ptr, part_ptr, D, PARTS, CHUNK)


@triton.jit
def _inverse_sqrt_normalise_kernel(  # type: ignore[no-untyped-def]
    cov_ptr, part_ptr, basis_ptr, norm_ptr, ws_ptr, D, P, tiles, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    _normalise_work(tl.program_id(0), cov_ptr, part_ptr, basis_ptr, norm_ptr, ws_ptr, D, P, tiles, BLOCK, PARTS)


@triton.jit
def _inverse_sqrt_spread_kernel(basis_ptr, grad_ptr, ws_ptr, slot, batch, D, P, tiles, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    _spread_work(tl.program_id(0), basis_ptr, grad_ptr, ws_ptr, slot, batch, D, P, tiles, BLOCK)


@triton.jit
def _inverse_sqrt_product_kernel(  # type: ignore[no-untyped-def]
    first, ops, ws_ptr, ints_ptr, floats_ptr, root_ptr, norm_ptr, batch, D, P, tiles, TO_ROOT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _product_work(
        tl.program_id(0), first, ops, ws_ptr, ints_ptr, floats_ptr, root_ptr, norm_ptr, batch, D, P, tiles, TO_ROOT,
        BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit
def _inverse_sqrt_inner_kernel(  # type: ignore[no-untyped-def]
    ws_ptr, part_ptr, result, tangent, batch, P, PARTS: tl.constexpr, CHUNK: tl.constexpr
):
    _inner_work(tl.program_id(0), ws_ptr, part_ptr, result, tangent, batch, P, PARTS, CHUNK)


@triton.jit
def _inverse_sqrt_finish_kernel(  # type: ignore[no-untyped-def]
    ws_ptr, part_ptr, norm_ptr, out_ptr, slot, batch, D, P, tiles, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    _finish_work(tl.program_id(0), ws_ptr, part_ptr, norm_ptr, out_ptr, slot, batch, D, P, tiles, BLOCK, PARTS)


# -------------------------------------------------------------------------------------------- one cooperative launch


@triton.jit
def _grid_barrier(barrier_ptr, arrivals):  # type: ignore[no-untyped-def]
    """Wait until all programs have arrived ``arrivals / programs`` times; what they wrote before is seen after.

    The counter starts at zero and only grows. It decides when, never what: results do not depend on the order.
    """
    tl.debug_barrier()  # every thread's writes come before the one thread's release
    arrived = tl.atomic_add(barrier_ptr, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < arrivals:
        arrived = tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _inverse_sqrt_cooperative_fwd_kernel(  # type: ignore[no-untyped-def]
    cov_ptr, root_ptr, basis_ptr, norm_ptr, part_ptr, ws_ptr, phases_ptr, ints_ptr, floats_ptr, barrier_ptr,
    phases, batch, D, P, tiles, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    for work in range(pid, PARTS * batch, programs):
        _square_work(work, cov_ptr, part_ptr, D, PARTS, CHUNK)
    _grid_barrier(barrier_ptr, programs)
    for work in range(pid, tiles * batch, programs):
        _normalise_work(work, cov_ptr, part_ptr, basis_ptr, norm_ptr, ws_ptr, D, P, tiles, BLOCK, PARTS)
    _grid_barrier(barrier_ptr, 2 * programs)
    for phase in range(phases - 1):
        first = tl.load(phases_ptr + phase)
        ops = tl.load(phases_ptr + phase + 1) - first
        for work in range(pid, tiles * ops * batch, programs):
            _product_work(
                work, first, ops, ws_ptr, ints_ptr, floats_ptr, root_ptr, norm_ptr, batch, D, P, tiles, False,
                BLOCK, BLOCK_K, PRECISION,
            )  # fmt: skip
        _grid_barrier(barrier_ptr, (3 + phase) * programs)
    first = tl.load(phases_ptr + phases - 1)
    for work in range(pid, tiles * batch, programs):
        _product_work(
            work, first, 1, ws_ptr, ints_ptr, floats_ptr, root_ptr, norm_ptr, batch, D, P, tiles, True,
            BLOCK, BLOCK_K, PRECISION,
        )  # fmt: skip


@triton.jit
def _inverse_sqrt_cooperative_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, basis_ptr, norm_ptr, out_ptr, part_ptr, ws_ptr, phases_ptr, ints_ptr, floats_ptr, barrier_ptr,
    phases, result, tangent, batch, D, P, tiles, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    for work in range(pid, tiles * batch, programs):
        _spread_work(work, basis_ptr, grad_ptr, ws_ptr, tangent, batch, D, P, tiles, BLOCK)
    _grid_barrier(barrier_ptr, programs)
    for phase in range(phases):
        first = tl.load(phases_ptr + phase)
        ops = tl.load(phases_ptr + phase + 1) - first
        for work in range(pid, tiles * ops * batch, programs):
            _product_work(
                work, first, ops, ws_ptr, ints_ptr, floats_ptr, out_ptr, norm_ptr, batch, D, P, tiles, False,
                BLOCK, BLOCK_K, PRECISION,
            )  # fmt: skip
        _grid_barrier(barrier_ptr, (2 + phase) * programs)
    for work in range(pid, 2 * PARTS * batch, programs):
        _inner_work(work, ws_ptr, part_ptr, result, tangent, batch, P, PARTS, CHUNK)
    _grid_barrier(barrier_ptr, (2 + phases) * programs)
    for work in range(pid, tiles * batch, programs):
        _finish_work(work, ws_ptr, part_ptr, norm_ptr, out_ptr, result + tangent, batch, D, P, tiles, BLOCK, PARTS)
