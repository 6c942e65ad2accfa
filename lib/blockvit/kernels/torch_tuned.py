"""PyTorch's BSR kernel with launch parameters tuned for the GPU at hand: what a careful user gets out of it.

``F.linear`` launches ``torch.sparse._triton_ops.bsr_dense_addmm`` with parameters that PyTorch knows for a few shapes
on an A100 and guesses elsewhere. This backend calls the same kernel with those that ``python -m blockvit.tune`` found
(``tuning``). Everything else is as in ``F.linear``, which hands the kernel views too: the activations transposed, the
bias expanded, the output row-major. Inference only: it has no gradients. float32 is multiplied as IEEE float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bsr import BSRMatrix
from . import tuning
from .registry import ACTIVATIONS, Baseline, register
from .torch_bsr import TorchBSR, bsr_limits, bsr_tensor, pad_tokens

NAME = "torch_tuned"

WASTE = 8
"""A tile taken over from another number of tokens may add an eighth of the tokens as padding; else it is halved."""


def fit(entry: tuning.Entry, tokens: int) -> tuple[dict[str, int], int]:
    """``(launch parameters, padded tokens)`` of an entry for ``tokens``, which may differ from the entry's own.

    PyTorch's parameter ``SPLIT_N`` is the number of tiles along the tokens; the length of a tile, ``BN``, is what was
    tuned. So ``BN`` is kept and ``SPLIT_N`` counted anew. Only where that would pad much more than a multiple of the
    block size does, ``BN`` is halved until it does not.

    Raises:
        ValueError: the entry's tile is no power of two, which no kernel can have run.
    """
    block_size, parameters = entry["key"]["block_size"], dict(entry["parameters"])
    tuned_tokens = _round_up(entry["key"]["tokens"], block_size)
    tile, rest = divmod(tuned_tokens, parameters["SPLIT_N"])
    if rest or tile & (tile - 1):
        raise ValueError(
            f"the tuned SPLIT_N={parameters['SPLIT_N']} cuts {tuned_tokens} tokens into tiles of "
            f"{tuned_tokens / parameters['SPLIT_N']:g}; expected a power of two. Tune again: "
            "python -m blockvit.tune --force"
        )
    least = _round_up(tokens, block_size)
    while tile > block_size and (_round_up(tokens, tile) - least) * WASTE > tokens:
        tile //= 2
    padded = _round_up(tokens, tile)
    return {**parameters, "SPLIT_N": padded // tile}, padded


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@tuning.remembered
def _launch(
    device: torch.device,
    out_features: int,
    in_features: int,
    tokens: int,
    block_size: int,
    dtype: torch.dtype,
    nnz: int,
) -> tuple[dict[str, int], int]:
    """Parameters and padded tokens of a call."""
    key = tuning.key(out_features, in_features, tokens, block_size, dtype, nnz)
    entry = tuning.nearest(tuning.entries(device, NAME), key)
    if entry is None:
        raise RuntimeError(_untuned(tuning.device_name(device), dtype, block_size))
    return fit(entry, tokens)


def _untuned(device_name: str, dtype: torch.dtype, block_size: int) -> str:
    short = str(dtype).removeprefix("torch.")
    return (
        f"no parameters were tuned for {short} in blocks of {block_size} on {device_name}; "
        f"make some: python -m blockvit.tune --block-sizes {block_size} --dtypes {short}"
    )


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    meta: Mapping[str, int] | None,
) -> Tensor:
    """PyTorch's kernel on ``x`` ``(tokens, in)``, as ``F.linear`` would call it -> ``(tokens, out)``, contiguous.

    ``weight`` is a BSR tensor; the number of tokens has to be a multiple of the tile's. ``meta`` None: its defaults.
    """
    from torch.sparse._triton_ops import bsr_dense_addmm  # not at the top: it needs Triton

    y = x.new_empty(x.shape[0], weight.shape[0])
    beta = 0 if bias is None else 1
    added = y.t() if bias is None else bias.unsqueeze(1).expand(-1, x.shape[0])  # not read when beta is 0
    bsr_dense_addmm(added, weight, x.t(), beta=beta, alpha=1, out=y.t(), meta=meta)
    return y


@torch.library.custom_op("blockvit::torch_tuned_linear", mutates_args=())
def _linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    tokens, columns = x.shape
    nnz, block_size, _ = values.shape
    meta, padded = _launch(x.device, rows, columns, tokens, block_size, x.dtype, nnz)
    return launch(pad_tokens(x, padded), bsr_tensor(crow, col, values, rows, columns), bias, meta)[:tokens]


@_linear.register_fake
def _(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@register
class TorchTuned(Baseline):
    """PyTorch's Triton BSR kernel, tuned: a baseline for our own kernels. Inference only."""

    name = NAME

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """PyTorch's limits on CUDA, and whether anything was tuned for this GPU, dtype and block size."""
        if device.type != "cuda":
            return "PyTorch's Triton BSR kernels run on NVIDIA GPUs only"
        if limits := bsr_limits("PyTorch's Triton BSR kernels", dtype, block_size):
            return limits
        if not torch.cuda.is_available():
            return "torch.cuda.is_available() is False: there is no GPU that parameters could have been tuned for"
        name, short = tuning.device_name(device), str(dtype).removeprefix("torch.")
        try:
            entries = tuning.load(name).get(NAME, [])
        except tuning.TuningFileError as error:
            return str(error)
        tuned = any((e["key"]["block_size"], e["key"]["dtype"]) == (block_size, short) for e in entries)
        return None if tuned else _untuned(name, dtype, block_size)

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """As ``TorchBSR.pack``."""
        return TorchBSR.pack(weight)

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``."""
        y = _linear(x, packed["crow"], packed["col"], packed["values"], packed["rows"].shape[0], bias)
        return ACTIVATIONS[activation](y)
