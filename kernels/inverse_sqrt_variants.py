"""Every shipped variant of the inverse root's kernels, for the ahead-of-time compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tdeconv.kernels import inverse_sqrt_entries as entries
from tdeconv.kernels import inverse_sqrt_tiny as tiny
from tdeconv.kernels.configs import Config, Limits, Variant
from tdeconv.kernels.inverse_sqrt import CHUNK, PARTS, candidates, small_config, tiny_plan

_NVIDIA, _AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
_LIMITS = {_NVIDIA: Limits(shared=166912), _AMD: Limits(shared=65536, registers=512, warp=64)}
_EXACT = {_NVIDIA: "tf32x3", _AMD: "ieee"}
_SIZES = {"batch": "i32", "D": "i32", "P": "i32", "tiles": "i32"}
_TABLES = {"phases_ptr": "*i32", "ints_ptr": "*i32", "floats_ptr": "*fp32"}


def _floats(*names: str) -> dict[str, str]:
    return {f"{name}_ptr": "*fp32" for name in names}


def _aligned(signature: dict[str, str]) -> tuple[str, ...]:
    """Pointers, and the padded size."""
    return tuple(n for n, kind in signature.items() if kind.startswith("*") or n == "P")


def _expected(targets: tuple[str, ...], block: int) -> dict[str, str]:
    if targets == _AMD:
        return {"gfx942": "mfma"}
    return {"sm_80": "mma", "sm_90": "wgmma" if block >= 64 else "mma"}


def _small() -> Iterator[Variant]:
    pointers = {"fwd": _floats("cov", "root", "basis", "norm"), "bwd": _floats("grad", "basis", "norm", "out")}
    for targets, how in _EXACT.items():
        for n_iter in (5, 15):
            for name, fn in (("fwd", tiny._inverse_sqrt_tiny_fwd_kernel), ("bwd", tiny._inverse_sqrt_tiny_bwd_kernel)):
                yield Variant(
                    f"inverse_sqrt_tiny_{name} n={n_iter} {how}",
                    fn,
                    {**pointers[name], "D": "i32"},
                    {**tiny_plan(n_iter), "PRECISION": how},
                    small_config(9),
                    expected=_expected(targets, 16),
                    targets=targets,
                    default=n_iter == 5,
                )
        if targets == _AMD:
            continue
        more = {**_floats("part", "ws"), "ints_ptr": "*i32", "floats_ptr": "*fp32", "ops": "i32"}
        sizes = {"batch": "i32", "D": "i32"}
        for features in (27, 64):
            config = small_config(features)
            for name, fn, extra in (
                ("fwd", entries._inverse_sqrt_whole_fwd_kernel, {}),
                ("bwd", entries._inverse_sqrt_whole_bwd_kernel, {"result": "i32", "tangent": "i32"}),
            ):
                yield Variant(
                    f"inverse_sqrt_whole_{name} {how}",
                    fn,
                    {**pointers[name], **more, **extra, **sizes},
                    {"CHUNK": CHUNK, "PRECISION": how},
                    config,
                    expected=_expected(targets, config["BLOCK"]),
                    targets=targets,
                )


def _products() -> Iterator[Variant]:
    """Phase by phase, and all in one launch."""
    step = {"first": "i32", "ops": "i32", **_floats("ws", "root", "norm"), **_TABLES, **_SIZES}
    del step["phases_ptr"]
    forward = {**_floats("cov", "root", "basis", "norm", "part", "ws"), **_TABLES, "barrier_ptr": "*i32"}
    forward |= {"phases": "i32", **_SIZES}
    backward = {**_floats("grad", "basis", "norm", "out", "part", "ws"), **_TABLES, "barrier_ptr": "*i32"}
    backward |= {"phases": "i32", "result": "i32", "tangent": "i32", **_SIZES}
    sums = {"PARTS": PARTS, "CHUNK": CHUNK}
    for targets, exact in _EXACT.items():
        for how in (exact, "bf16x3"):
            for config, default in _shipped(_LIMITS[targets]):
                block = config["BLOCK"]
                kernels: list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]] = [
                    ("phase", entries._inverse_sqrt_product_kernel, step, {"TO_ROOT": False}, {})
                ]
                if block <= 64 and targets == _NVIDIA:
                    together: dict[str, Any] = {"launch_cooperative_grid": True}
                    kernels.append(("grid_fwd", entries._inverse_sqrt_cooperative_fwd_kernel, forward, sums, together))
                    kernels.append(("grid_bwd", entries._inverse_sqrt_cooperative_bwd_kernel, backward, sums, together))
                for name, fn, signature, constexprs, options in kernels:
                    yield Variant(
                        f"inverse_sqrt_{name} {how} {block}x{block}",
                        fn,
                        signature,
                        {**constexprs, "PRECISION": how},
                        config,
                        expected=_expected(targets, block),
                        targets=targets,
                        options=options,
                        aligned=_aligned(signature),
                        default=default,
                    )


def _shipped(within: Limits) -> Iterator[tuple[Config, bool]]:
    """Every candidate of any size, and whether it is the first of some."""
    sizes = (100, 576, 2048)
    first = {candidates(d, within)[0] for d in sizes}
    for config in dict.fromkeys(c for d in sizes for c in candidates(d, within)):
        yield config, config in first


def _sums() -> Iterator[Variant]:
    """The kernels without products, the same for every device."""
    tiles, config = {"D": "i32", "P": "i32", "tiles": "i32"}, {b: Config.of(8, 1, BLOCK=b) for b in (32, 64)}
    parts = Config.of(8, 1, PARTS=PARTS, CHUNK=CHUNK)
    yield Variant(
        "inverse_sqrt_square", entries._inverse_sqrt_square_kernel, {**_floats("cov", "part"), "D": "i32"}, {}, parts
    )
    inner = {**_floats("ws", "part"), "result": "i32", "tangent": "i32", "batch": "i32", "P": "i32"}
    yield Variant("inverse_sqrt_inner", entries._inverse_sqrt_inner_kernel, inner, {}, parts)
    for block, blocks in config.items():
        more, size = {"PARTS": PARTS}, f"{block}x{block}"
        signature = {**_floats("cov", "part", "basis", "norm", "ws"), **tiles}
        yield Variant(f"inverse_sqrt_normalise {size}", entries._inverse_sqrt_normalise_kernel, signature, more, blocks)
        signature = {**_floats("basis", "grad", "ws"), "slot": "i32", **_SIZES}
        yield Variant(f"inverse_sqrt_spread {size}", entries._inverse_sqrt_spread_kernel, signature, {}, blocks)
        signature = {**_floats("ws", "part", "norm", "out"), "slot": "i32", **_SIZES}
        yield Variant(f"inverse_sqrt_finish {size}", entries._inverse_sqrt_finish_kernel, signature, more, blocks)


def variants() -> Iterator[Variant]:
    yield from _small()
    yield from _products()
    yield from _sums()
