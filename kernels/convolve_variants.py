"""Every shipped variant of the convolution's kernels, for the ahead-of-time compiler."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from tdeconv.kernels.configs import Config, Limits, Variant
from tdeconv.kernels.convolve import Sizes, _convolve_kernel, candidates, depth
from tdeconv.kernels.convolve_backward import (
    _ADD,
    _add_parts_kernel,
    _convolve_bwd_weight_kernel,
    _flat,
    weight_candidates,
)
from tdeconv.kernels.shipped import AMD, NVIDIA, by_config, variant

ALIGNED = [f"stride_{t}{a}" for t in "xygw" for a in "nco012"] + ["group_x", "group_y", "group_g", "group_w"]
# A network's wide 3x3 layers, and its first.
WIDE = Sizes(rows=1 << 16, columns=256, inner=256, taps=9)
FIRST = Sizes(rows=1 << 16, columns=64, inner=3, taps=49)


# Pointer type, bytes and ``input_precision`` of every product shipped, and for which targets.
PRODUCTS = (
    ("*bf16", 2, "ieee", NVIDIA + AMD),
    ("*fp16", 2, "ieee", NVIDIA + AMD),
    ("*fp32", 4, "tf32", NVIDIA),
    ("*fp32", 4, "tf32x3", NVIDIA),
    ("*fp32", 4, "ieee", AMD),
)


def _shipped(
    options: Callable[[Sizes, int, Limits, bool], Sequence[Config]],
) -> Iterator[tuple[str, Sizes, str, str, Config, bool, tuple[str, ...]]]:
    """Layer, its sizes, pointer type, precision, configuration, whether it is the default, and for which targets.

    float16, which compiles as bfloat16, and narrow layers with the default alone.
    """
    for (dtype, size, how, targets), (layer, sizes) in itertools.product(
        PRODUCTS, {"wide": WIDE, "first": FIRST}.items()
    ):
        exact = size == 4 and how != "tf32"
        for config, default, where in by_config(lambda within: options(sizes, size, within, exact), targets):  # noqa: B023
            if (sizes is WIDE and (default or dtype != "*fp16")) or (default and dtype != "*fp16"):
                yield layer, sizes, dtype, how, config, default, where


def _forward() -> Iterator[Variant]:
    """Every configuration, channels-last: forward, and with the default the input's gradient of wide layers."""
    for layer, sizes, dtype, how, config, default, targets in _shipped(candidates):
        flat = depth(2 if dtype != "*fp32" else 4, sizes.inner, sizes.taps)[1]
        for gradient in (False, True) if sizes is WIDE and default else (False,):
            constexprs: dict[str, object] = {
                "HAS_BIAS": not gradient,
                "RELU": not gradient,
                "FLAT": flat,
                "WIDEN": False,
                "INPUT_PRECISION": how,
                "stride_xc": 1,
                "stride_yc": 1,
                "stride_wo" if gradient else "stride_wc": 1,
            }
            yield variant(
                f"convolve {layer}{' gradient' if gradient else ''} {dtype[1:]} {how}",
                _convolve_kernel,
                config,
                constexprs,
                pointers={f"{p}_ptr": dtype for p in ("x", "w", "bias", "y")},
                aligned=[] if flat else [*ALIGNED, "inner", "columns"],
                targets=targets,
                wgmma=config["BLOCK_M"] >= 64,
                default=default,
            )


def _backward() -> Iterator[Variant]:
    """Every configuration of the weight's gradient, channels-last; the input's is the forward kernel's."""
    for layer, sizes, dtype, how, config, default, targets in _shipped(weight_candidates):
        yield variant(
            f"convolve_bwd_weight {layer} {dtype[1:]} {how}",
            _convolve_bwd_weight_kernel,
            config,
            {
                "FLAT": _flat(sizes, config["BLOCK_N"]),
                "WIDEN": False,
                "INPUT_PRECISION": how,
                "stride_gc": 1,
                "stride_xc": 1,
            },
            pointers={"grad_ptr": dtype, "x_ptr": dtype},
            aligned=[*ALIGNED, "columns"] if sizes is FIRST else [*ALIGNED, "columns", "inner"],
            targets=targets,
            wgmma=config["BLOCK_M"] >= 64,
            default=default,
        )
    yield variant("add_parts", _add_parts_kernel, _ADD, {})


def variants() -> Iterator[Variant]:
    yield from _forward()
    yield from _backward()
