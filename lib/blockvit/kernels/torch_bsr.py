"""PyTorch's own BSR kernels: the path of the blog post, ``nn.Linear`` with a ``torch.sparse_bsr`` weight.

On an NVIDIA GPU PyTorch runs Triton kernels (``torch.sparse._triton_ops``), on a CPU it calls MKL.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bsr import BSRMatrix, dense_from_bsr
from ..transforms import needs_plain_operators
from .registry import ACTIVATIONS, Backend, dense_linear, register


def triton_limits(kernels: str, dtype: torch.dtype, block_size: int) -> str | None:
    """What PyTorch's Triton BSR kernels, and the others written like them, cannot run; None if they can."""
    if block_size < 16 or block_size & (block_size - 1):
        return f"{kernels} need a block size that is a power of two and at least 16"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{kernels} take float32, float16 and bfloat16 only"
    return None


WIDEST_FLOAT32 = 64
"""Of PyTorch's Triton BSR kernel. It unrolls a float32 product into single multiply-adds, whose sums are float64: in
blocks of 128 they take tens of KB of stack, and half a minute or minutes to compile, for each number of tokens."""


def bsr_limits(kernels: str, dtype: torch.dtype, block_size: int) -> str | None:
    """``triton_limits``, and what PyTorch's Triton BSR kernel and its copies take too long to compile for."""
    if why := triton_limits(kernels, dtype, block_size):
        return why
    if dtype == torch.float32 and block_size > WIDEST_FLOAT32:
        return f"{kernels} take minutes to compile for float32 in blocks larger than {WIDEST_FLOAT32}"
    return None


def pad_tokens(x: Tensor, multiple: int) -> Tensor:
    """``x`` ``(tokens, features)`` with rows of zeros behind it up to a ``multiple`` of tokens; itself if it is one."""
    missing = -x.shape[0] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


@cache
def _hear_warnings() -> None:
    # "Sparse BSR tensor support is in beta state" is said once by the README instead, and that the indices are not
    # checked is meant. PyTorch says either once in a process, so it is heard here, not in every call.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_bsr_tensor([0, 0], [], torch.empty(0, 1, 1), size=(1, 1), check_invariants=False)


def bsr_tensor(crow: Tensor, col: Tensor, values: Tensor, rows: int, cols: int) -> Tensor:
    """The BSR tensor ``(rows, cols)`` of its parts; copies nothing and checks nothing."""
    _hear_warnings()
    return torch.sparse_bsr_tensor(crow, col, values, size=(rows, cols), check_invariants=False)


# A sparse tensor cannot pass through torch.compile or torch.export; its three parts can. So the operator takes the
# parts and puts the BSR tensor together inside, which copies nothing.
@torch.library.custom_op("blockvit::torch_bsr_linear", mutates_args=())
def _linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    weight = bsr_tensor(crow, col, values, rows, x.shape[1])
    if x.is_cuda:
        # The Triton kernel cuts the tokens into tiles as long as a block and sees the activations as whole tiles with
        # `.view`, which fails for any other number of tokens (torch.sparse._triton_ops.tile_to_blocksize).
        return F.linear(pad_tokens(x, values.shape[1]), weight, bias)[: x.shape[0]]
    return F.linear(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _save_weight(ctx, inputs, output) -> None:
    x, crow, col, values, rows, _ = inputs
    ctx.save_for_backward(crow, col, values)
    ctx.block_shape = rows // values.shape[1], x.shape[1] // values.shape[1]


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    # PyTorch has no product with a transposed BSR matrix; the gradient goes through the dense weight.
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dense_from_bsr(*ctx.saved_tensors, ctx.block_shape)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(dim=0)
    return grad_x, None, None, None, None, grad_bias


_linear.register_autograd(_backward, setup_context=_save_weight)


@register
class TorchBSR(Backend):
    """The published path; float32 and float64 on CPU, half precisions too on CUDA."""

    name = "torch"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """PyTorch's limits, by device."""
        if device.type == "cpu":
            if not torch.backends.mkl.is_available():
                return "PyTorch's BSR product on CPU needs MKL, which this build of PyTorch lacks"
            if dtype not in (torch.float32, torch.float64):
                return "PyTorch's BSR product on CPU takes float32 and float64 only"
            return None
        if device.type == "cuda":
            return bsr_limits("PyTorch's Triton BSR kernels", dtype, block_size)
        return "PyTorch has BSR products for cpu and cuda only"

    @classmethod
    def preference(cls, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0) -> float:
        """First on CUDA among the backends there are; on CPU slower than dense at every setting measured (03)."""
        return 2.0 if device.type == "cuda" else -1.0

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """The BSR parts as they are, and an empty tensor whose first size tells the padded number of rows."""
        rows = weight.values.new_empty(weight.padded_shape[0], 0)
        return {"crow": weight.crow_indices, "col": weight.col_indices, "values": weight.values, "rows": rows}

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``."""
        weight = packed["crow"], packed["col"], packed["values"], packed["rows"].shape[0]
        if needs_plain_operators():
            return dense_linear(x, *weight, bias, activation)
        y = _linear(x, *weight, bias)
        return ACTIVATIONS[activation](y)
