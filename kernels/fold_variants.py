"""Every shipped variant of the fold's kernels, for the ahead-of-time compiler."""

from __future__ import annotations

from collections.abc import Iterator

from tdeconv.kernels.configs import Variant
from tdeconv.kernels.fold import (
    _BIAS,
    _FINISH,
    _fold_bias_kernel,
    _fold_bwd_finish_kernel,
    _fold_bwd_statistics_kernel,
    _fold_product_kernel,
    product_config,
    statistics_config,
)
from tdeconv.kernels.shipped import AMD, NVIDIA, variant


def _shipped() -> Iterator[tuple[int, int, int, str, bool, bool]]:
    """Rows, features, kernel positions and pointer type of a weight, whether its gradient, whether in one tile."""
    for rows, features in ((1, 9), (64, 27), (512, 576)):
        yield rows, features, 1, "*fp32", False, features <= 64
        yield rows, features, 9, "*fp32", True, False
    yield 512, 576, 9, "*bf16", False, False
    yield 512, 576, 9, "*fp16", False, False


def variants() -> Iterator[Variant]:
    """Every kernel as shipped, at the widths of layers, for weights of either layout."""
    for precision, targets in (("tf32x3", NVIDIA), ("ieee", AMD)):
        for rows, features, taps, dtype, gradient, whole in _shipped():
            config = product_config(rows, features)
            yield variant(
                f"fold_product {dtype[1:]}{' gradient' if gradient else ''} rows={rows} d={features} {precision}",
                _fold_product_kernel,
                config,
                {
                    "A_TAPS": taps,
                    "OUT_TAPS": 9,
                    "GRADIENT": gradient,
                    "HAS_BIAS": True,
                    "WHOLE": int(whole),
                    "INPUT_PRECISION": precision,
                    "stride_dk" if gradient else "stride_df": 1,
                },
                pointers={"a_ptr": dtype, "bias_ptr": dtype},
                aligned=[*_aligned(features), "stride_df" if gradient else "stride_dk"],
                targets=targets,
                wgmma=config["BLOCK_R"] == config["BLOCK_F"] == 64,
            )
        for features in (9, 576):
            yield variant(
                f"fold_bwd_statistics d={features} {precision}",
                _fold_bwd_statistics_kernel,
                statistics_config(features),
                {"W_TAPS": 9, "GRAD_TAPS": 9, "INPUT_PRECISION": precision},
                aligned=_aligned(features),
                targets=targets,
                wgmma=features >= 64,
            )
    yield variant("fold_bias", _fold_bias_kernel, _BIAS, {"HAS_BIAS": True})
    yield variant("fold_bwd_finish", _fold_bwd_finish_kernel, _FINISH, {})


def _aligned(features: int) -> list[str]:
    return ["features"] if features % 16 == 0 else []
