"""The folded dense weight through PyTorch's dense linear: the reference that every backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bsr import BSRMatrix
from .registry import ACTIVATIONS, Backend, register


@register
class Dense(Backend):
    """Stores the zeros and multiplies by them; runs wherever PyTorch does."""

    name = "dense"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """Never refuses."""
        return None

    @classmethod
    def preference(cls, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0) -> float:
        """Zero: sparse backends rank themselves above it where they are faster, below it where they are not."""
        return 0.0

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """``weight``: the padded dense matrix."""
        return {"weight": weight.to_dense(padded=True)}

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``."""
        return ACTIVATIONS[activation](F.linear(x, packed["weight"], bias))
