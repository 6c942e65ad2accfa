"""What the kernels share on their way from products to results: how operands are multiplied, and GELU."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on tensors in the host's memory."""

_WIDEN = tl.constexpr(INTERPRETED)

_FARTHEST = tl.constexpr(6.0)
"""From here on GELU is ReLU to within 6e-9."""


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``; ``PRECISION``, ``ieee``, ``tf32x3`` or ``tf32``, counts for float32 operands only.

    The interpreter multiplies the raw bits of bfloat16 numbers; there they are widened first, which is exact.
    """
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, EXACT: tl.constexpr = True):
    """``y`` in float32 through ``ACTIVATION``: None, ``gelu`` (by erf) or ``gelu_tanh``.

    ``EXACT``: to float32's accuracy; otherwise to half precision's, a little cheaper.
    """
    if ACTIVATION == "gelu":
        y = _gelu(y, EXACT)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z), and sigmoid(u) = 1 / (1 + 2^(-u / ln 2))
        z = y * (-2.302208198 - 0.1029432397 * y * y)
        y = tl.fdiv(y, 1 + tl.exp2(z))
    return y


@triton.jit
def _gelu(y, EXACT: tl.constexpr):
    """``gelu(y) = relu(y) - a Q(a)``, where ``a = |y|`` and Q is the Gaussian tail, here as 2 to a polynomial.

    The polynomials are minimax in the error of the result: 2e-9 of degree 9 and 6e-8 of degree 6, beside float32's own
    rounding; relative to a small positive ``y`` it is 2e-7 and 5e-6. With the library's ``erf`` a GELU takes 34
    instructions of an H100, this way 10 (degree 6): 0.18 and 0.05 ms for the 155 million of 50432 tokens x 3072
    outputs, which take 0.10 ms to write (counted, every core of the GPU busy; not measured).
    """
    a = tl.minimum(tl.abs(y), _FARTHEST)
    if EXACT:
        log = 3.66887062e-7
        log = log * a - 7.36897667e-6
        log = log * a + 6.14130011e-5
        log = log * a - 2.39383236e-4
        log = log * a - 7.19382266e-5
        log = log * a + 7.03106612e-3
        log = log * a - 5.25015735e-2
        log = log * a - 4.59197218e-1
        log = log * a - 1.15110838e0
        log = log * a - 9.99999772e-1
    else:
        log = 3.30927796e-5 * a - 7.69219379e-4
        log = log * a + 8.08071542e-3
        log = log * a - 5.34121024e-2
        log = log * a - 4.58770975e-1
        log = log * a - 1.15120170e0
        log = log * a - 9.99993061e-1
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(log)
