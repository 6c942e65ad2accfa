"""blksprs, a maintained block-sparse library in Triton (MIT, github.com/FelixSchoen/blksprs): a baseline.

Its product takes both operands in its own compressed form, so activations are cut into blocks, multiplied with the
compressed transposed weight, and put together again, by its own functions and with all layouts known beforehand.
Inference only: it has no gradients. Its kernel calls ``tl.dot`` with Triton's default precision: float32 is multiplied
in TF32, so its float32 times belong beside TF32 ones.

blksprs is imported at the first call. Its kernels are autotuned at the first call for a block size and dtype, for
whatever sizes that call has, and keep the result: warm up with the sizes that matter. Its validation of arguments is
switched off in each thread that calls it here, for that thread's own use of the library too.
"""

from __future__ import annotations

import importlib.util
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..bsr import BSRMatrix
from .registry import ACTIVATIONS, Baseline, register
from .torch_bsr import pad_tokens, triton_limits


@cache
def _library() -> ModuleType:
    # Importing it sets an option of the compiler for the whole process, which would change how others are compiled.
    config = torch._dynamo.config
    before = config.capture_scalar_outputs
    import blksprs

    config.capture_scalar_outputs = before
    return blksprs


@lru_cache(maxsize=64)
def _layouts(device: torch.device, token_blocks: int, in_blocks: int, out_blocks: int) -> dict[str, Any]:
    """Layouts of dense activations and of a dense result, and what the library derives from them.

    Building them waits for the device, so they are kept: the first call with a number of tokens must not be captured
    in a CUDA graph.
    """
    from blksprs.ops.conversion import row_striped_build_layout_cache, to_dense_build_layout_cache
    from blksprs.ops.matmul import matmul_build_layout_cache

    x = torch.ones(1, token_blocks, in_blocks, dtype=torch.bool, device=device)
    weight = torch.ones(1, in_blocks, out_blocks, dtype=torch.bool, device=device)  # replaced in every call
    y = torch.ones(1, token_blocks, out_blocks, dtype=torch.bool, device=device)
    return {
        "x": x,
        "y": y,
        "to_sparse": row_striped_build_layout_cache({}, x),
        "matmul": matmul_build_layout_cache({}, x, weight, y),
        "to_dense": to_dense_build_layout_cache({}, y),
    }


@torch.library.custom_op("blockvit::blksprs_linear", mutates_args=())
def _product(x: Tensor, values: Tensor, layout: Tensor, packed_indices: Tensor) -> Tensor:
    ops, utils = _library().ops, _library().utils
    utils.disable_validation()  # which waits for the device; a setting of the thread, so it cannot be made once for all
    tokens, block_size = x.shape[0], values.shape[1]
    x = pad_tokens(x, block_size)
    known = _layouts(x.device, x.shape[0] // block_size, layout.shape[1], layout.shape[2])
    # Of the library's two ways into its compressed form the one for rows of blocks that are all there: a single copy.
    x_sparse = ops.to_sparse_row_striped(x.unsqueeze(0), known["x"], block_size, layout_cache=known["to_sparse"])
    y_sparse = ops.matmul(
        x_sparse,
        known["x"],
        values,
        layout,
        known["y"],
        block_size,
        layout_cache={**known["matmul"], "packed_indices_y": packed_indices},
    )
    y = ops.to_dense(y_sparse, known["y"], block_size, layout_cache=known["to_dense"])
    return y.as_subclass(Tensor)[0, :tokens]


@_product.register_fake
def _(x: Tensor, values: Tensor, layout: Tensor, packed_indices: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], layout.shape[2] * values.shape[1])


@register
class Blksprs(Baseline):
    """blksprs 2.5's product of block-sparse matrices: a baseline for our own kernels. Inference only."""

    name = "blksprs"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """The library's limits, and whether it is installed."""
        if device.type != "cuda":
            return "blksprs' Triton kernels run on NVIDIA GPUs only"
        if limits := triton_limits("blksprs' Triton kernels", dtype, block_size):
            return limits
        if importlib.util.find_spec("blksprs") is None:
            return "blksprs 2.5 is not installed: pip install 'blockvit[baselines]'"
        return None

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """The transposed weight in the library's form.

        ``values`` ``(nnz, b, b)``: the blocks of ``W.T`` in row-major order; ``layout`` ``(1, in / b, out / b)``, bool:
        where they are; ``packed_indices`` ``(in / b * out / b,)``: which one is there, or -1.
        """
        block_rows, block_cols = weight.block_shape
        col = weight.col_indices.long()
        row = torch.repeat_interleave(
            torch.arange(block_rows, device=col.device), weight.crow_indices.long().diff(), output_size=weight.nnz
        )
        place = col * block_rows + row
        order = place.argsort()
        packed_indices = torch.full((block_cols * block_rows,), -1, dtype=torch.long, device=col.device)
        packed_indices[place[order]] = torch.arange(weight.nnz, device=col.device)
        return {
            "values": weight.values[order].transpose(1, 2).contiguous(),
            "layout": (packed_indices >= 0).view(1, block_cols, block_rows),
            "packed_indices": packed_indices,
        }

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``."""
        y = _product(x, packed["values"], packed["layout"], packed["packed_indices"])
        return ACTIVATIONS[activation](y if bias is None else y + bias)
