"""Attention on CPUs by our own kernel: what much time goes to, once the linear layers of a ViT are sparse.

The kernel (``csrc/attention.h``) multiplies with the tiles of the linear layers' kernel. PyTorch's leaves its products,
which are small, to a library that does not suit every CPU. Notebook 7 times both.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..transforms import needs_plain_operators
from . import cpu
from .registry import constant_in_graphs


@constant_in_graphs
def _is_loaded() -> bool:
    return cpu.load() is None


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``attend`` takes these: alike but for the number of tokens, on a CPU, in float32 or bfloat16.

    False where a gradient is asked for: then PyTorch's own attention, which keeps what that needs, is faster. But not
    while a program is exported, which is for inference more often than for training; there it is differentiable.
    """
    for t in (q, k, v):
        alike = t.dtype == q.dtype and t.shape[:2] == q.shape[:2] and t.shape[3] == q.shape[3]
        if not (alike and t.device.type == "cpu" and t.dtype in cpu.DTYPES):
            return False
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if learns and not torch.compiler.is_exporting():
        return False
    return k.shape[2] > 0 and not needs_plain_operators() and _is_loaded()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q @ k.T / sqrt(size)) @ v``, as ``F.scaled_dot_product_attention`` without a mask.

    Args:
        q: ``(N, heads, L, size)``, with any strides, as are ``k`` and ``v``, ``(N, heads, S, size)``.
        k: see ``q``.
        v: see ``q``.

    Returns:
        ``(N, heads, L, size)``, the heads of a token side by side in memory.
    """
    operator = torch.ops.blockvit.cpu_attention_no_grad.default
    if torch.compiler.is_compiling():  # a graph may be asked for gradients later; eagerly autograd costs, see cpu.py
        operator = torch.ops.blockvit.cpu_attention.default
    return operator(q, k, v).transpose(1, 2)


@constant_in_graphs
def beats_pytorch(heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is a tenth faster than PyTorch's attention at one image's tokens.

    Measured once for each number of threads, which takes some milliseconds.
    """
    return _beats_pytorch(heads, size, dtype, torch.get_num_threads())


@cache
def _beats_pytorch(heads: int, size: int, dtype: torch.dtype, threads: int) -> bool:
    if dtype not in cpu.DTYPES or not _is_loaded():
        return False
    # Asked by a forward, which may be under export, with tensors that hold nothing, or under autocast.
    with _disable_current_modes(), torch.autocast("cpu", enabled=False):
        q, k, v = torch.full((1, cpu.TOKENS, 3, heads, size), 0.01, dtype=dtype, device="cpu").permute(2, 0, 3, 1, 4)
        return cpu.beats(lambda: attend(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v))
