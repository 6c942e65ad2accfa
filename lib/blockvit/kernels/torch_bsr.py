"""PyTorch's own BSR kernels: the path of the blog post, ``nn.Linear`` with a ``torch.sparse_bsr`` weight.

On an NVIDIA GPU PyTorch runs Triton kernels (``torch.sparse._triton_ops``), on a CPU it calls MKL.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bsr import BSRMatrix, dense_from_bsr
from .registry import ACTIVATIONS, Backend, register


def _bsr_tensor(crow: Tensor, col: Tensor, values: Tensor, rows: int, cols: int) -> Tensor:
    with warnings.catch_warnings():  # "Sparse BSR tensor support is in beta state": said once by the README instead
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support")
        return torch.sparse_bsr_tensor(crow, col, values, size=(rows, cols), check_invariants=False)


# A sparse tensor cannot pass through torch.compile or torch.export; its three parts can. So the operator takes the
# parts and puts the BSR tensor together inside, which copies nothing.
@torch.library.custom_op("blockvit::torch_bsr_linear", mutates_args=())
def _linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    return F.linear(x, _bsr_tensor(crow, col, values, rows, x.shape[1]), bias)


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
            if block_size < 16 or block_size & (block_size - 1):
                return "PyTorch's Triton BSR kernels need a block size that is a power of two and at least 16"
            if dtype not in (torch.float32, torch.float16, torch.bfloat16):
                return "PyTorch's Triton BSR kernels take float32, float16 and bfloat16 only"
            return None
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
        y = _linear(x, packed["crow"], packed["col"], packed["values"], packed["rows"].shape[0], bias)
        return ACTIVATIONS[activation](y)
