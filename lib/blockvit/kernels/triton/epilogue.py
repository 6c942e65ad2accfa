"""What the kernels share on their way from products to results: how operands are multiplied, bias and GELU."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on tensors in the host's memory."""

_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``; ``PRECISION``, ``ieee``, ``tf32x3`` or ``tf32``, counts for float32 operands only.

    The interpreter multiplies the raw bits of bfloat16 numbers; there they are widened first, which is exact.
    """
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """``y`` in float32 through ``ACTIVATION``: None, ``gelu`` (exact, by erf) or ``gelu_tanh``."""
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y
