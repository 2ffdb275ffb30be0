"""Products of float32 tiles, as exact as the policy wants (see :mod:`tdeconv.kernels.precision`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _as_bfloat16(x):  # type: ignore[no-untyped-def]
    """Rounded to bfloat16, to nearest even, in float32: the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``acc + x y``. ``"bf16x3"``: upper and lower halves of the mantissa, all but the product of the two lower ones.

    Written out rather than asked of ``tl.dot``, so that ``"bf16x3 emulated"`` lets the interpreter round as a GPU does.
    """
    if PRECISION == "bf16x3":
        x_high, y_high = x.to(tl.bfloat16), y.to(tl.bfloat16)
        x_low, y_low = (x - x_high.to(tl.float32)).to(tl.bfloat16), (y - y_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(x_low, y_high, acc, input_precision="ieee")  # as it is for bfloat16: said, not left open
        acc = tl.dot(x_high, y_low, acc, input_precision="ieee")
        return tl.dot(x_high, y_high, acc, input_precision="ieee")
    elif PRECISION == "bf16x3 emulated":
        x_high, y_high = _as_bfloat16(x), _as_bfloat16(y)
        x_low, y_low = _as_bfloat16(x - x_high), _as_bfloat16(y - y_high)
        acc = tl.dot(x_low, y_high, acc, input_precision="ieee")
        acc = tl.dot(x_high, y_low, acc, input_precision="ieee")
        return tl.dot(x_high, y_high, acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)
