"""Whether two ways to compute one thing agree: what a kernel must pass before it is timed or tuned."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 3e-2, "fp16": 5e-3}
"""Largest accepted error against the dense result, relative to the largest dense output, by precision class."""


def check_close(actual: Tensor, expected: Tensor, precision: str, what: str) -> None:
    """Raise ``ArithmeticError`` if a variant's output is not the dense one within its precision class's tolerance."""
    if actual.shape != expected.shape:
        raise ArithmeticError(f"{what} has shape {tuple(actual.shape)}; the dense result has {tuple(expected.shape)}")
    error = float((actual.float() - expected.float()).abs().max())
    scale = float(expected.float().abs().max())
    if not error <= TOLERANCE[precision] * scale:  # NaN must fail
        raise ArithmeticError(
            f"{what} differs from the dense result by {error:.3g} (largest output {scale:.3g}); expected at most "
            f"{TOLERANCE[precision]:g} of it in {precision}: the backend is wrong, nothing was written"
        )


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next result like this one is likely to get.

    PyTorch's allocator on a GPU hands out again what was freed last. That may hold an earlier, correct result, so that
    a kernel which leaves outputs unwritten would pass.
    """
    torch.full_like(like, float("nan"))
