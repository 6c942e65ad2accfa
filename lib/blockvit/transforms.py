"""Which derivatives are being taken: some ask more of an operator than reverse mode does."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether a derivative is being taken in forward mode (``torch.func.jvp``, ``jacfwd``, ``hessian``).

    An operator with autograd registered from Python, or without any, would answer it with zeros and without a word, so
    a backend made of such takes ``dense_linear`` then.
    """
    return forward_ad._current_level >= 0


def inside_functorch() -> bool:
    """Whether a transform of ``torch.func`` (``grad``, ``vmap``, ...) is at work, which many an operator cannot bear.

    Not in compiled code. There is no public question for it; ``torch.autograd.Function.apply`` asks this one.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def needs_plain_operators() -> bool:
    """Whether a derivative is being taken that operators registered from Python do not have."""
    return forward_mode() or inside_functorch()
