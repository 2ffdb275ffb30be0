"""Second stage: the inverse root, exactly the n-step Newton-Schulz polynomial of the covariance, by products.

Tiny matrices: one program each, every step in registers. Small ones: one program each, one product after another.
Larger ones: a chain of phases over upper tiles, a launch per phase. The gradient is the tangent of the same products (a
polynomial of a symmetric matrix is its own adjoint); backward keeps the normalised covariance and recomputes the values
beside the tangents, which lengthens no chain.

On NVIDIA all phases can be one cooperative launch with a barrier between them, for who sets ``TDECONV_COOPERATIVE=1``:
no GPU has run it yet, and a barrier that fails does not raise, it hangs.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdeconv import torch_backend
from tdeconv.kernels import inverse_sqrt_entries as entries
from tdeconv.kernels import inverse_sqrt_tiny as tiny
from tdeconv.kernels import precision, tuning
from tdeconv.kernels.configs import Config, Limits, legal, limits, matrix_counted
from tdeconv.kernels.launch import interpreted, launch
from tdeconv.kernels.newton_schulz import TANGENT, Program, plan, program

TINY = 16  # up to here a matrix and all its tangents fit one warp's registers
SMALL = 64  # up to here one program per matrix
COOPERATIVE = 1024  # beyond, a launch per phase is little beside its work
BLOCK_K = 32  # the inner product's order of summation is policy: the same in every candidate
PARTS, CHUNK = 32, 2048  # and so is the norm's
_DENSE: dict[str, Any] = {"dtype": torch.float32, "memory_format": torch.contiguous_format}


def _takes(cov: Tensor) -> bool:
    """Whether the kernels do it: float64, and matrices of elements past counting, are torch_backend's."""
    return cov.dtype != torch.float64 and matrix_counted(cov.shape[-1])


def inverse_sqrt_saved(cov: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """Empty tensors for the normalised covariance ``(b, D, D)`` and the norms ``(b,)``."""
    if not _takes(cov):
        return torch_backend.inverse_sqrt_saved(cov, n_iter)
    return torch.empty_like(cov, **_DENSE), cov.new_empty(cov.shape[0], dtype=torch.float32)


def inverse_sqrt(cov: Tensor, n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The root of ``cov (b, D, D)``, bitwise symmetric, and what its gradient needs."""
    if not _takes(cov):
        return torch_backend.inverse_sqrt(cov, n_iter)
    work = cov.to(torch.float32).contiguous()
    root, (basis, norm) = torch.empty_like(work), inverse_sqrt_saved(cov, n_iter)
    if work.shape[-1] <= _small_limit(work.device):
        pointers = {"cov_ptr": work, "root_ptr": root, "basis_ptr": basis, "norm_ptr": norm}
        _small(False, work, n_iter, pointers)
    else:
        _large("fwd", work, n_iter, functools.partial(_forward, work, root, basis, norm, n_iter))
    return root.to(cov.dtype), basis, norm


def inverse_sqrt_backward(grad: Tensor, basis: Tensor, spectrum: Tensor, n_iter: int) -> Tensor:
    """The covariance's gradient ``(b, D, D)``, bitwise symmetric, from the root's."""
    if not _takes(basis):
        return torch_backend.inverse_sqrt_backward(grad, basis, spectrum, n_iter)
    work = grad.to(torch.float32).contiguous()
    out = torch.empty_like(work)
    if work.shape[-1] <= _small_limit(work.device):
        pointers = {"grad_ptr": work, "basis_ptr": basis, "norm_ptr": spectrum, "out_ptr": out}
        _small(True, work, n_iter, pointers)
    else:
        _large("bwd", work, n_iter, functools.partial(_backward, work, basis, spectrum, out, n_iter))
    return out.to(grad.dtype)


# ------------------------------------------------------------------------------------------- a program per matrix


def _amd(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is not None


def _small_limit(device: torch.device) -> int:
    """AMD's barriers, as Triton compiles them, order shared memory alone: nothing may go by the workspace."""
    return TINY if _amd(device) else SMALL


def small_config(features: int) -> Config:
    """The tile is the matrix, filled up."""
    if features <= TINY:
        return Config.of(1, 1, BLOCK=TINY)
    block = 32 if features <= 32 else 64
    return Config.of(4 if block == 32 else 8, 2, BLOCK=block, BLOCK_K=BLOCK_K)


def tiny_plan(n_iter: int) -> dict[str, int]:
    """The plan as the kernel's constexprs: pairs in its loop, a single step inside, steps at the end."""
    rest = plan(n_iter)[1:]
    inside, last = rest[:-1], rest[-1] if rest else 0
    return {"MIDDLE": inside.count(2), "INNER": inside.count(1), "LAST": last, "N_ITER": n_iter}


def _products(device: torch.device, features: int, n_iter: int) -> str:
    how = precision.root_products(device, features, n_iter)
    return f"{how} emulated" if how == "bf16x3" and interpreted() else how


def _small(backward: bool, work: Tensor, n_iter: int, pointers: dict[str, Tensor]) -> None:
    batch, features, _ = work.shape
    config, device = small_config(features), work.device
    arguments: dict[str, Any] = {**pointers, "D": features, "PRECISION": _products(device, features, n_iter)}
    if features <= TINY:
        kernel = tiny._inverse_sqrt_tiny_bwd_kernel if backward else tiny._inverse_sqrt_tiny_fwd_kernel
        arguments |= tiny_plan(n_iter)
    else:
        kernel = entries._inverse_sqrt_whole_bwd_kernel if backward else entries._inverse_sqrt_whole_fwd_kernel
        lay, tables, slots = _Layout.of(work, config), _tables(n_iter, backward, device), (1 + backward) * TANGENT
        arguments |= {"part_ptr": lay.empty(batch, 2), "ws_ptr": lay.workspace(slots), "batch": batch, "CHUNK": CHUNK}
        arguments |= {"ints_ptr": tables.ints, "floats_ptr": tables.floats, "ops": len(tables.ints)}
        if backward:
            arguments |= {"result": program(n_iter).result, "tangent": TANGENT}
    launch(kernel, (batch,), config=config, device=device, **arguments)


# ---------------------------------------------------------------------------------------------------- large, phases


def candidates(features: int, within: Limits) -> tuple[Config, ...]:
    """The heuristic choice first: small tiles while the device is not full, since the chain's length is what costs."""
    shapes = ((32, 4), (64, 8), (64, 4)) if features <= 256 else ((64, 8), (64, 4), (32, 4))
    options = [Config.of(warps, 3, BLOCK=block, BLOCK_K=BLOCK_K) for block, warps in shapes]
    fitting = [c for c in options if _fits(c, within)]
    return tuple(fitting) or (Config.of(4, 1, BLOCK=32, BLOCK_K=BLOCK_K),)


def _fits(config: Config, within: Limits) -> bool:
    block = config["BLOCK"]
    tile = block * BLOCK_K
    # both factors staged, and again in two halves; the accumulator and the epilogue's operands
    return legal(config, within, staged=2 * tile * 4, kept=2 * tile * 4, held=3 * block * block + 4 * tile)


def _large(direction: str, work: Tensor, n_iter: int, run: Any) -> None:
    batch, features, _ = work.shape
    sizes = tuning.key(batch=batch, features=features, steps=len(program(n_iter).phases))
    options = candidates(features, limits(work.device))
    tuning.run_best(f"inverse_sqrt_{direction}", sizes, options, run, work.device)


class _Layout(NamedTuple):
    """Sizes of the phases' workspace."""

    batch: int
    features: int
    padded: int
    tiles: int  # of the upper triangle
    config: Config
    device: torch.device

    @classmethod
    def of(cls, work: Tensor, config: Config) -> _Layout:
        rows = -(-work.shape[-1] // config["BLOCK"])
        return cls(work.shape[0], work.shape[-1], rows * config["BLOCK"], rows * (rows + 1) // 2, config, work.device)

    def arguments(self, *names: str) -> dict[str, Any]:
        known = {"batch": self.batch, "D": self.features, "P": self.padded, "tiles": self.tiles}
        return {name: known[name] for name in names}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def workspace(self, slots: int) -> Tensor:
        return self.empty(slots, self.batch, self.padded, self.padded)

    def other(self, **blocks: int) -> Config:
        """For the kernels without products."""
        return Config.of(8, 1, **blocks)


class _Tables(NamedTuple):
    """A program as the kernels read it: each phase's first operation, and the operations' integers and floats."""

    phases: Tensor
    ints: Tensor
    floats: Tensor


def encode(what: Program) -> tuple[list[int], list[list[int]], list[list[float]]]:
    """The three tables as lists."""
    ops = [op for phase in what.phases for op in phase]
    first = [0]
    for phase in what.phases:
        first.append(first[-1] + len(phase))
    pairs = [(*op.factors, (0, 0), (0, 0))[:2] for op in ops]
    ints = [[*pair[0], *pair[1], len(op.factors), op.c, op.out, op.out2] for op, pair in zip(ops, pairs, strict=True)]
    floats = [[op.alpha, op.beta, op.gamma, op.alpha2, op.beta2, op.gamma2] for op in ops]
    return first, ints, floats


@functools.cache
def _tables(n_iter: int, tangents: bool, device: torch.device) -> _Tables:
    """On the device, once: the copy waits for nothing afterwards, so a captured graph needs one run before."""
    what = program(n_iter).with_tangents() if tangents else program(n_iter)
    first, ints, floats = encode(what)
    with torch.inference_mode(False):
        return _Tables(
            torch.tensor(first, dtype=torch.int32, device=device),
            torch.tensor(ints, dtype=torch.int32, device=device),
            torch.tensor(floats, dtype=torch.float32, device=device),
        )


def _cooperative(device: torch.device, features: int) -> bool:
    """Whether the phases are one launch: where the environment asks for it; not on AMD, for the same reason."""
    asked = os.environ.get("TDECONV_COOPERATIVE") == "1"
    return asked and device.type == "cuda" and not _amd(device) and features <= COOPERATIVE


def _at_once(kernel: Any, lay: _Layout, most: int, arguments: dict[str, Any]) -> None:
    """One launch of no more programs than run at the same time: they wait for each other."""
    programs = min(torch.cuda.get_device_properties(lay.device).multi_processor_count, most)
    barrier = torch.zeros(1, dtype=torch.int32, device=lay.device)
    sizes = lay.arguments("batch", "D", "P", "tiles")
    options = {"PARTS": PARTS, "CHUNK": CHUNK, "barrier_ptr": barrier, "launch_cooperative_grid": True}
    launch(kernel, (programs,), config=lay.config, device=lay.device, **arguments, **sizes, **options)


def _forward(cov: Tensor, root: Tensor, basis: Tensor, norm: Tensor, n_iter: int, config: Config) -> None:
    lay, tables = _Layout.of(cov, config), _tables(n_iter, False, cov.device)
    parts, ws = lay.empty(lay.batch, PARTS), lay.workspace(TANGENT)
    how = _products(cov.device, lay.features, n_iter)
    phases = program(n_iter).phases
    if _cooperative(cov.device, lay.features):
        arguments: dict[str, Any] = {
            "cov_ptr": cov,
            "root_ptr": root,
            "basis_ptr": basis,
            "norm_ptr": norm,
            "part_ptr": parts,
        }
        arguments |= {"ws_ptr": ws, **_pointers(tables), "phases": len(phases), "PRECISION": how}
        most = lay.batch * max(PARTS, lay.tiles * max(map(len, phases)))
        _at_once(entries._inverse_sqrt_cooperative_fwd_kernel, lay, most, arguments)
        return
    start = functools.partial(launch, device=cov.device)
    start(
        entries._inverse_sqrt_square_kernel,
        (lay.batch * PARTS,),
        config=lay.other(PARTS=PARTS, CHUNK=CHUNK),
        cov_ptr=cov,
        part_ptr=parts,
        D=lay.features,
    )
    start(
        entries._inverse_sqrt_normalise_kernel,
        (lay.batch * lay.tiles,),
        config=lay.other(BLOCK=config["BLOCK"], PARTS=PARTS),
        cov_ptr=cov,
        part_ptr=parts,
        basis_ptr=basis,
        norm_ptr=norm,
        ws_ptr=ws,
        **lay.arguments("D", "P", "tiles"),
    )
    _phase_by_phase(lay, tables, [len(ops) for ops in phases], ws, root, norm, how, to_root=True)


def _pointers(tables: _Tables) -> dict[str, Tensor]:
    return {"phases_ptr": tables.phases, "ints_ptr": tables.ints, "floats_ptr": tables.floats}


def _phase_by_phase(
    lay: _Layout, tables: _Tables, lengths: list[int], ws: Tensor, root: Tensor, norm: Tensor, how: str, to_root: bool
) -> None:
    first = 0
    for phase, ops in enumerate(lengths):
        launch(
            entries._inverse_sqrt_product_kernel,
            (lay.batch * lay.tiles * ops,),
            config=lay.config,
            device=lay.device,
            first=first,
            ops=ops,
            ws_ptr=ws,
            ints_ptr=tables.ints,
            floats_ptr=tables.floats,
            root_ptr=root,
            norm_ptr=norm,
            TO_ROOT=to_root and phase + 1 == len(lengths),
            PRECISION=how,
            **lay.arguments("batch", "D", "P", "tiles"),
        )
        first += ops


def _backward(grad: Tensor, basis: Tensor, norm: Tensor, out: Tensor, n_iter: int, config: Config) -> None:
    lay, tables = _Layout.of(grad, config), _tables(n_iter, True, grad.device)
    parts, ws = lay.empty(lay.batch, 2, PARTS), lay.workspace(2 * TANGENT)
    how = _products(grad.device, lay.features, n_iter)
    what = program(n_iter).with_tangents()
    if _cooperative(grad.device, lay.features):
        arguments: dict[str, Any] = {
            "grad_ptr": grad,
            "basis_ptr": basis,
            "norm_ptr": norm,
            "out_ptr": out,
            "part_ptr": parts,
        }
        arguments |= {"ws_ptr": ws, **_pointers(tables), "phases": len(what.phases), "PRECISION": how}
        arguments |= {"result": what.result, "tangent": TANGENT}
        most = lay.batch * max(2 * PARTS, lay.tiles * max(map(len, what.phases)))
        _at_once(entries._inverse_sqrt_cooperative_bwd_kernel, lay, most, arguments)
        return
    start = functools.partial(launch, device=grad.device)
    start(
        entries._inverse_sqrt_spread_kernel,
        (lay.batch * lay.tiles,),
        config=lay.other(BLOCK=config["BLOCK"]),
        basis_ptr=basis,
        grad_ptr=grad,
        ws_ptr=ws,
        slot=TANGENT,
        **lay.arguments("batch", "D", "P", "tiles"),
    )
    _phase_by_phase(lay, tables, [len(ops) for ops in what.phases], ws, out, norm, how, to_root=False)
    start(
        entries._inverse_sqrt_inner_kernel,
        (lay.batch * 2 * PARTS,),
        config=lay.other(PARTS=PARTS, CHUNK=CHUNK),
        ws_ptr=ws,
        part_ptr=parts,
        result=what.result,
        tangent=TANGENT,
        **lay.arguments("batch", "P"),
    )
    start(
        entries._inverse_sqrt_finish_kernel,
        (lay.batch * lay.tiles,),
        config=lay.other(BLOCK=config["BLOCK"], PARTS=PARTS),
        ws_ptr=ws,
        part_ptr=parts,
        norm_ptr=norm,
        out_ptr=out,
        slot=what.result + TANGENT,
        **lay.arguments("batch", "D", "P", "tiles"),
    )
