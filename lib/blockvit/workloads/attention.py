"""Attention between the projections of a ViT block: PyTorch's and the dense engines', and our kernel's on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bench import DTYPES, Effort, precision_class
from ..clocks import clock_for
from ..kernels import cpu_attention
from .modes import dense_call, runnable_modes
from .variants import Variant, latency_key, measure_group


@dataclass(frozen=True)
class AttentionCase:
    """``heads`` of ``size`` numbers for the ``tokens`` of ``batch_size`` images: dense engines, and our kernel."""

    tokens: int
    batch_size: int = 1
    precision: str = "fp32"
    dense_modes: tuple[str, ...] = ()
    heads: int = 12
    size: int = 64
    seed: int = 0

    def _key(self, **variant: Any) -> dict[str, Any]:
        case = {"model": f"{self.heads}x{self.size}", "scope": "attention"}
        sizes = {"tokens": self.tokens, "batch_size": self.batch_size}
        return latency_key(self.precision, self.seed, **case | sizes | variant)

    def _dense_keys(self, device: torch.device) -> list[dict[str, Any]]:
        modes = runnable_modes(self.dense_modes, device, self.precision)
        return [self._key(backend="dense", compile=mode) for mode in modes]

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        if not cpu_attention.can_attend(*[torch.empty(1, 1, 1, 1, dtype=DTYPES[self.precision], device=device)] * 3):
            return []
        return [self._key(backend="cpu"), *self._dense_keys(device)[1:]]

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        with precision_class(self.precision, device) as dtype:
            torch.manual_seed(self.seed)
            qkv = torch.randn(self.batch_size, self.tokens, 3 * self.heads * self.size, device=device).to(dtype)
            with torch.inference_mode(False):
                full = _Attention(self.heads, F.scaled_dot_product_attention).eval()
                ours = _Attention(self.heads, cpu_attention.attend).eval()
            expected = partial(full, qkv)
            variants = [
                Variant(key, partial(dense_call, full, key["compile"], qkv), expected if number else None)
                for number, key in enumerate(self._dense_keys(device))
            ]
            variants.append(Variant(self._key(backend="cpu"), lambda: partial(ours, qkv), expected))
            return measure_group(variants, self.precision, clock_for(device), effort)[0]


class _Attention(nn.Module):
    """From what the projection ``qkv`` gives to what ``out_proj`` takes."""

    def __init__(self, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)
