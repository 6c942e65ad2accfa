"""Our GPU kernels, in Triton, which is imported by the first weight that asks for them."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

from ...bsr import BSRMatrix
from ..registry import Backend, register
from ..torch_bsr import triton_limits
from . import packing, parameters


@register
class Triton(Backend):
    """Our block-sparse linear; float32, float16 and bfloat16, block sizes that are powers of two from 16 on.

    float32 is multiplied as three products in TF32, which is as accurate, or in TF32 where the user allows that.
    Differentiable in ``x`` and ``bias``. A NaN or an infinity in ``x`` may reach all outputs of a group of block rows
    (``packing``), as it reaches all outputs of a dense layer.
    """

    name = "triton"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """What the kernel was not written for, and whether Triton and such a GPU are there.

        In Triton's interpreter (``TRITON_INTERPRET=1``), a means to test it, it runs on the CPU and nowhere else.
        """
        if why := triton_limits("our Triton kernels", dtype, block_size) or _no_triton() or _no_device(device):
            return why
        importlib.import_module(f"{__name__}.linear")  # which registers the operators
        return None

    @classmethod
    def preference(cls, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0) -> float:
        """First on CUDA; last where it is interpreted."""
        return 3.0 if device.type == "cuda" else -2.0

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """``crow``, ``col``, ``values`` and, if there are groups, ``rows``: see ``packing.Packed``.

        ``sizes``: an empty tensor ``(padded out, number of blocks, 0)``, which tells these two numbers.
        """
        device, (rows, cols) = weight.values.device, weight.padded_shape
        group = parameters.group(device, rows, cols, weight.block_size, weight.values.dtype, weight.nnz)
        packed = packing.pack(weight, group)
        tensors = {"crow": packed.crow, "col": packed.col, "values": packed.values.contiguous()}
        if packed.rows is not None:
            tensors["rows"] = packed.rows
        return {**tensors, "sizes": weight.values.new_empty(rows, weight.nnz, 0)}

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``."""
        operator = torch.ops.blockvit.triton_linear.default
        # Autograd registered from Python costs microseconds a call, also where no gradient is asked for. A traced graph
        # leaves it out by itself.
        if not torch.compiler.is_compiling():
            wanted = x.requires_grad or (bias is not None and bias.requires_grad)
            if not (wanted and torch.is_grad_enabled()):
                operator = torch.ops.blockvit.triton_linear_no_grad.default
        out_features, nnz, _ = packed["sizes"].shape
        return operator(
            x,
            packed["crow"],
            packed["col"],
            packed["values"],
            packed.get("rows"),
            bias,
            out_features,
            nnz,
            activation,
        )


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
        return f"our Triton kernels need compute capability 8.0 (A100) or newer; this GPU has {capability}"
    return None
