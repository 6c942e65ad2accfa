"""Gather and batched matmul in plain PyTorch: the fallback that runs everywhere.

Block rows with the same number of blocks, k, form one group. For a group, the input blocks that its rows read are
gathered side by side, and one batched product does all of its rows:

    (rows, b, k * b) @ (rows, k * b, tokens) -> (rows, b, tokens)

Activations are held feature-major, ``(in / b, b, tokens)``, so that a gathered block is one contiguous run of memory
and the product is long in the tokens: measured 2x to 3x faster on CPU than gathering token-major.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bsr import BSRMatrix
from .registry import ACTIVATIONS, Backend, register

TOKENS_AT_ONCE = 384
"""On a CPU, so that the gathered blocks stay in cache: 1.3x to 2x faster at 1576 tokens than all at once; 256 to 512
tokens are within 10% of each other."""

BREAK_EVEN = ((64, 0.65), (32, 0.8), (0, 0.88))
"""From which sparsity on it beats a dense layer, for blocks of at least a size: ViT-B/16's layers on a CPU (03, 04)."""

TOKENS_AT_ONCE_ON_GPU = 1 << 15
"""On a GPU only memory limits it: gathering multiplies the activations by the number of blocks in a row."""


@register
class Gather(Backend):
    """Pure PyTorch; any device that computes, any dtype and block size; differentiable in ``x`` and ``bias``."""

    name = "gather"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """Refuses what holds no numbers; it is the fallback everywhere else."""
        if device.type == "meta":
            return "rows are grouped by their number of blocks, which tensors on the meta device do not hold"
        return None

    @classmethod
    def preference(cls, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0) -> float:
        """Ahead of dense from its measured break-even sparsity on; behind PyTorch's Triton kernels on CUDA."""
        edge = next(edge for size, edge in BREAK_EVEN if block_size >= size)
        return 1.0 if sparsity >= edge else -0.5

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """For each count k of blocks in a row: ``cols_k`` ``(rows * k,)`` and ``values_k`` ``(rows, b, k * b)``.

        ``order`` maps each block row to its place in the groups' concatenated output; empty rows, which have no
        group, all map to the one block of zeros behind them (``zeros``: ``(b, 0)`` carries the block size).
        """
        counts = weight.crow_indices.long().diff()
        b = weight.block_size
        packed: dict[str, Tensor] = {"zeros": weight.values.new_empty(b, 0)}
        order = torch.empty_like(counts)
        placed = 0
        for k in counts.unique().tolist():
            if k == 0:
                continue
            rows = (counts == k).nonzero().flatten()
            order[rows] = torch.arange(placed, placed + len(rows), device=rows.device)
            placed += len(rows)
            blocks = weight.crow_indices.long()[rows, None] + torch.arange(k, device=rows.device)  # (rows, k)
            packed[f"cols_{k}"] = weight.col_indices.long()[blocks].flatten()
            packed[f"values_{k}"] = weight.values[blocks].transpose(1, 2).reshape(len(rows), b, k * b).contiguous()
        order[counts == 0] = placed
        return {**packed, "order": order}

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``."""
        at_once = TOKENS_AT_ONCE if x.device.type == "cpu" else TOKENS_AT_ONCE_ON_GPU
        # A traced graph may be asked to take any number of tokens, which a branch on their number would forbid.
        if not torch.compiler.is_compiling() and x.shape[0] > at_once:
            return torch.cat([Gather.linear(part, packed, bias, activation) for part in x.split(at_once)])
        tokens, b = x.shape[0], packed["zeros"].shape[0]
        x_blocks = x.t().reshape(-1, b, tokens)
        parts = []
        for key, values in packed.items():
            if key.startswith("values_"):
                gathered = x_blocks.index_select(0, packed[key.replace("values", "cols")])
                parts.append(torch.bmm(values, gathered.view(values.shape[0], values.shape[2], tokens)))
        # The block of zeros for empty rows, as a product with nothing: in the dtype of the others under autocast, and
        # part of the autograd graph where all rows are empty.
        nothing = (packed["zeros"] @ x.t()[:0]).unsqueeze(0)
        y = torch.cat([*parts, nothing]).index_select(0, packed["order"])
        y = y.view(-1, tokens)
        return ACTIVATIONS[activation](y if bias is None else y + bias.unsqueeze(1)).t()
