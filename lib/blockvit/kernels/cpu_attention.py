"""Attention on CPUs by our own kernel: what most time goes to, once the linear layers of a ViT are sparse.

The kernel (``csrc/attention.h``) multiplies with the tiles of the linear layers' kernel. PyTorch's leaves its products,
which are small, to a library that does not suit every CPU: on a Zen 5, at 197 tokens, it took 1.4 (with AVX2) to 2.8
times (AVX-512) as long.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transforms import needs_plain_operators
from . import cpu
from .registry import constant_in_graphs


@constant_in_graphs
def _is_loaded() -> bool:
    return cpu.load() is None


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``attend`` takes these: float32 or bfloat16 on a CPU, at least one key, and no derivative asked for."""
    if any(t.device.type != "cpu" or t.dtype not in cpu.DTYPES or t.dtype != q.dtype for t in (q, k, v)):
        return False
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return not wanted and k.shape[2] > 0 and not needs_plain_operators() and _is_loaded()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q @ k.T / sqrt(size)) @ v`` as ``F.scaled_dot_product_attention``, without a mask; inference only.

    Args:
        q: ``(N, heads, L, size)``, with any strides, as are ``k`` and ``v``, ``(N, heads, S, size)``.
        k: see ``q``.
        v: see ``q``.

    Returns:
        ``(N, heads, L, size)``, the heads of a token side by side in memory.
    """
    return torch.ops.blockvit.cpu_attention(q, k, v).transpose(1, 2)


def beats_pytorch(heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is faster than PyTorch's at one image's tokens; measured once for each number of threads."""
    return _beats_pytorch(heads, size, dtype, torch.get_num_threads())


@cache
def _beats_pytorch(heads: int, size: int, dtype: torch.dtype, threads: int) -> bool:
    if dtype not in cpu.DTYPES or not _is_loaded():
        return False
    q, k, v = torch.full((1, cpu.TOKENS, 3, heads, size), 0.01, dtype=dtype, device="cpu").permute(2, 0, 3, 1, 4)
    return cpu.beats(lambda: attend(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v))
