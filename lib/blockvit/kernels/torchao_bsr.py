"""torchao's block-sparse layer, the blog post's second home: a baseline.

torchao 0.14 (BSD-3-Clause) was one of the last releases with ``torchao.sparsity.blocksparse``; its kernel is a copy of
PyTorch's ``bsr_dense_addmm`` with deeper pipelining by default (``num_stages`` 4 where PyTorch takes 1). The operator
is called as torchao's own ``block_sparse_linear`` calls it: the product feature-major, its transpose returned as a
view, the bias added afterwards. Inference only: it has no gradients. float32 is multiplied as IEEE float32.

torchao is imported at the first call, which takes seconds and logs that its C++ extensions are left out under this
version of PyTorch; they are not needed here.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..bsr import BSRMatrix
from .registry import ACTIVATIONS, Baseline, register
from .torch_bsr import TorchBSR, bsr_limits, pad_tokens

MODULE = "torchao.sparsity.blocksparse"


def missing() -> str | None:
    """Why torchao's layer cannot be imported, found out without importing it; None if it is there."""
    spec = importlib.util.find_spec("torchao")
    if spec is None or not spec.submodule_search_locations:
        return "torchao 0.14 is not installed: pip install 'blockvit[baselines]'"
    relative = Path(*MODULE.split(".")[1:]).with_suffix(".py")
    if not any((Path(place) / relative).exists() for place in spec.submodule_search_locations):
        try:
            found = version("torchao")
        except PackageNotFoundError:
            found = "of an unknown version"
        return f"the installed torchao {found} has no {MODULE}; 0.14 has: pip install 'blockvit[baselines]'"
    return None


@cache
def _operator() -> torch._ops.OpOverloadPacket:
    importlib.import_module(MODULE)  # which registers it
    return torch.ops.blocksparse.addmm


@torch.library.custom_op("blockvit::torchao_linear", mutates_args=())
def _product(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, rows: int) -> Tensor:
    # Its tiles are as long as a block, and it fails for any other number of tokens as PyTorch's does; or worse: for
    # more than one and less than two tiles it leaves the tokens behind the 16th unwritten, without an error.
    padded = pad_tokens(x, values.shape[1])
    return _operator()(padded.t(), crow, col, values, rows, x.shape[1], None).t()[: x.shape[0]]


@_product.register_fake
def _(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, rows: int) -> Tensor:
    tokens, block_size = x.shape[0], values.shape[1]
    padded = (tokens + block_size - 1) // block_size * block_size
    return x.new_empty(rows, padded).t()[:tokens]


@register
class TorchAO(Baseline):
    """torchao 0.14's block-sparse kernel: a baseline for our own kernels. Inference only."""

    name = "torchao"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """torchao's limits, which are PyTorch's, and whether it is installed in a version that has the layer."""
        if device.type != "cuda":
            return "torchao's Triton BSR kernels run on NVIDIA GPUs only"
        return bsr_limits("torchao's Triton BSR kernels", dtype, block_size) or missing()

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """As ``TorchBSR.pack``."""
        return TorchBSR.pack(weight)

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``; the result is column-major, as torchao's is."""
        y = _product(x, packed["crow"], packed["col"], packed["values"], packed["rows"].shape[0])
        return ACTIVATIONS[activation](y if bias is None else y + bias)
