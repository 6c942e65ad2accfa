"""Which derivatives are being taken: some ask more of an operator than reverse mode does."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def inside_functorch() -> bool:
    """Whether a transform of ``torch.func`` (``grad``, ``vmap``, ...) is at work, which many an operator cannot bear.

    Not in compiled code. There is no public question for it; ``torch.autograd.Function.apply`` asks this one.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def needs_plain_operators() -> bool:
    """Whether a derivative is being taken by ``torch.func``, or in forward mode (``jvp``, ``jacfwd``, ``hessian``).

    An operator with autograd registered from Python, or without any, would answer forward mode with zeros and without a
    word, so a backend made of such takes ``dense_linear`` then.
    """
    return forward_ad._current_level >= 0 or inside_functorch()
