"""Our GPU kernels, in Triton, which is imported by the first weight that asks for them."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

from ...bsr import BlockPattern, BSRMatrix
from ...transforms import needs_plain_operators
from ..registry import ACTIVATIONS, Backend, dense_linear, register
from ..torch_bsr import triton_limits
from . import autograd, packing, parameters


@register
class Triton(Backend):
    """Our block-sparse linear; float32, float16 and bfloat16, block sizes that are powers of two from 16 on.

    float32 is multiplied as three products in TF32, which is as accurate, or in TF32 where the user allows that.
    Differentiable in ``x``, ``bias`` and, once they require a gradient, the layer's ``values``. A NaN or an infinity in
    ``x`` may reach all outputs of a group of block rows (``packing``), as it reaches all outputs of a dense layer.
    """

    name = "triton"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """What the kernel was not written for, and whether Triton and such a GPU are there.

        In Triton's interpreter (``TRITON_INTERPRET=1``), a means to test it, it runs on the CPU and nowhere else.
        """
        if why := triton_limits("our Triton kernels", dtype, block_size) or _no_triton() or _no_device(device):
            return why
        importlib.import_module(f"{__name__}.gradients")  # which registers the operators, those of ``linear`` too
        return None

    @classmethod
    def preference(cls, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0) -> float:
        """Behind PyTorch's kernels on CUDA until a GPU has run it: it is tested in the interpreter, its speed counted.

        Last where it is interpreted.
        """
        return 1.5 if device.type == "cuda" else -2.0

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """``crow``, ``col``, ``values`` and, if there are groups, ``rows``: see ``packing.Packed``.

        ``sizes``: an empty tensor ``(padded out, number of blocks, 0)``, which tells these two numbers. For gradients:
        ``blocks``, the weight's own values, and the indices of a ``BlockPattern``.
        """
        device, (rows, cols) = weight.values.device, weight.padded_shape
        group = parameters.group(device, rows, cols, weight.block_size, weight.values.dtype, weight.nnz)
        packed = packing.pack(weight, group)
        tensors = {"crow": packed.crow, "col": packed.col, "values": packed.values.contiguous()}
        if packed.rows is not None:
            tensors["rows"] = packed.rows
        pattern = BlockPattern.of(weight.crow_indices, weight.col_indices, weight.block_shape[1])
        indices = {f"pattern_{name}": tensor for name, tensor in pattern._asdict().items()}
        return {
            **tensors,
            "sizes": weight.values.new_empty(rows, weight.nnz, 0),
            "blocks": weight.values,
            **indices,
        }

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``."""
        out_features, nnz, _ = packed["sizes"].shape
        weight, blocks = (packed["crow"], packed["col"], packed["values"], packed.get("rows")), packed["blocks"]
        if needs_plain_operators():
            crow, col = packed["pattern_crow"], packed["pattern_col"]
            return dense_linear(x, crow, col, blocks, out_features, bias, activation)
        # Autograd registered from Python costs microseconds a call, also where no gradient is asked for.
        wanted = x.requires_grad or (bias is not None and bias.requires_grad)
        if blocks.requires_grad or (wanted and torch.is_grad_enabled()):
            pattern = BlockPattern(*(packed[f"pattern_{name}"] for name in BlockPattern._fields))
            grouped = None if blocks.requires_grad else (*weight, out_features, nnz)
            return ACTIVATIONS[activation](autograd.linear(x, blocks, bias, pattern, grouped))
        return torch.ops.blockvit.triton_linear.default(x, *weight, bias, out_features, nnz, activation)

    @classmethod
    def product(cls, x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None) -> Tensor:
        """See ``Backend.product``; the values are read in place."""
        return autograd.product(x, values, pattern, bias)

    @classmethod
    def input_gradient(cls, grad: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
        """See ``Backend.input_gradient``; the values are read in place."""
        return autograd.input_gradient(grad, values, pattern)

    @classmethod
    def weight_gradient(cls, grad: Tensor, x: Tensor, pattern: BlockPattern, block_size: int) -> Tensor:
        """See ``Backend.weight_gradient``."""
        return autograd.weight_gradient(grad, x, pattern, block_size)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch's builds for CUDA bring it"
    return None


def _no_device(device: torch.device) -> str | None:
    if _interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set, so Triton runs on the CPU"
    if device.type != "cuda" or torch.version.hip:
        return "our Triton kernels run on NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        major, minor = capability
        return f"our Triton kernels need compute capability 8.0 (A100) or newer; this GPU has {major}.{minor}"
    return None
