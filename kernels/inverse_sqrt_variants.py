"""Every shipped variant of the inverse root's kernels, for the ahead-of-time compiler."""

from __future__ import annotations

from collections.abc import Iterator

from tdeconv.kernels import inverse_sqrt_entries as entries
from tdeconv.kernels import inverse_sqrt_tiny as tiny
from tdeconv.kernels.configs import Config, Limits, Variant
from tdeconv.kernels.inverse_sqrt import BLOCK_K, CHUNK, PARTS, candidates, small_config, tiny_plan
from tdeconv.kernels.shipped import AMD, NVIDIA, by_config

_EXACT = {NVIDIA: "tf32x3", AMD: "ieee"}
_SIZES = {"batch": "i32", "D": "i32", "P": "i32", "tiles": "i32"}
_TABLES = {"phases_ptr": "*i32", "ints_ptr": "*i32", "floats_ptr": "*fp32"}


def _floats(*names: str) -> dict[str, str]:
    return {f"{name}_ptr": "*fp32" for name in names}


def _aligned(signature: dict[str, str]) -> tuple[str, ...]:
    """Pointers, and the padded size."""
    return tuple(n for n, kind in signature.items() if kind.startswith("*") or n == "P")


def _expected(targets: tuple[str, ...], block: int) -> dict[str, str]:
    if targets == AMD:
        return {"gfx942": "mfma"}
    return {"sm_80": "mma", "sm_90": "wgmma" if block >= 64 else "mma"}


def _small() -> Iterator[Variant]:
    pointers = {"fwd": _floats("cov", "root", "basis", "norm"), "bwd": _floats("grad", "basis", "norm", "out")}
    for targets, how in _EXACT.items():
        for n_iter in (1, 2, 5, 15) if targets == NVIDIA else (5,):
            for name, fn in (("fwd", tiny._inverse_sqrt_tiny_fwd_kernel), ("bwd", tiny._inverse_sqrt_tiny_bwd_kernel)):
                yield Variant(
                    f"inverse_sqrt_tiny_{name} n={n_iter} {how}",
                    fn,
                    {**pointers[name], "D": "i32"},
                    {**tiny_plan(n_iter), "PRECISION": how},
                    small_config(9),
                    expected=_expected(targets, 16) if n_iter > 1 else {},  # one step multiplies nothing
                    targets=targets,
                )
        if targets == AMD:
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
                    f"inverse_sqrt_whole_{name} {how} d={features}",
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
    for targets, exact in _EXACT.items():
        for how in (exact, "bf16x3"):
            for config, first, where in by_config(_candidates, targets):
                block = config["BLOCK"]
                default = first or config == Config.of(8, 3, BLOCK=64, BLOCK_K=BLOCK_K)  # of large matrices
                if not default and how != exact:
                    continue  # compiles as the default's
                for last in (False, True) if default and targets == NVIDIA else (False,):
                    yield Variant(
                        f"inverse_sqrt_phase{' last' if last else ''} {how} {block}x{block}",
                        entries._inverse_sqrt_product_kernel,
                        step,
                        {"TO_ROOT": last, "PRECISION": how},
                        config,
                        expected=_expected(targets, block),
                        targets=where,
                        aligned=_aligned(step),
                        default=default,
                    )
                if default and targets == NVIDIA:
                    yield from _at_once(how, config, where)


def _at_once(how: str, config: Config, targets: tuple[str, ...]) -> Iterator[Variant]:
    forward = {**_floats("cov", "root", "basis", "norm", "part", "ws"), **_TABLES, "barrier_ptr": "*i32"}
    forward |= {"phases": "i32", **_SIZES}
    backward = {**_floats("grad", "basis", "norm", "out", "part", "ws"), **_TABLES, "barrier_ptr": "*i32"}
    backward |= {"phases": "i32", "result": "i32", "tangent": "i32", **_SIZES}
    block = config["BLOCK"]
    for name, fn, signature in (
        ("fwd", entries._inverse_sqrt_cooperative_fwd_kernel, forward),
        ("bwd", entries._inverse_sqrt_cooperative_bwd_kernel, backward),
    ):
        yield Variant(
            f"inverse_sqrt_grid_{name} {how} {block}x{block}",
            fn,
            signature,
            {"PARTS": PARTS, "CHUNK": CHUNK, "PRECISION": how},
            config,
            expected=_expected(NVIDIA, block),
            targets=targets,
            options={"launch_cooperative_grid": True},
            aligned=_aligned(signature),
            default=False,
        )


def _candidates(within: Limits) -> tuple[Config, ...]:
    """Every candidate of any size, the heuristic choice for small ones first."""
    return tuple(dict.fromkeys(c for features in (100, 576) for c in candidates(features, within)))


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
