"""2:4 semi-structured sparsity: two of every four weights zero, which NVIDIA's sparse tensor cores skip.

The hardware's own alternative to block sparsity, at 50% and no other sparsity; a baseline that the study compares with.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from .targets import Targets, matching

BACKEND = "2:4"
"""What the tables call it."""

DTYPES = (torch.float16, torch.bfloat16)


MULTIPLE = 16
"""What both sizes of a weight must be multiples of, in PyTorch's cuSPARSELt products of half precisions."""


def refusal(device: torch.device, dtype: torch.dtype, shape: tuple[int, int] | None = None) -> str | None:
    """Why a 2:4 sparse product cannot run there, or None if it can; ``shape`` is the weight's, where it matters."""
    if device.type != "cuda":
        return f"2:4 semi-structured sparsity needs an NVIDIA GPU, and the device is {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no sparse tensor cores; they came with compute capability 8.0"
    if dtype not in DTYPES:
        return f"PyTorch's 2:4 products take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if shape and any(size % MULTIPLE for size in shape):
        return f"PyTorch's 2:4 products take sizes that are multiples of {MULTIPLE}, not {shape[0]}x{shape[1]}"
    return None


def prune_2_of_4(weight: Tensor) -> Tensor:
    """``weight`` with the two smallest magnitudes of every four neighbours along a row set to zero.

    Args:
        weight: ``(out, in)``, ``in`` a multiple of 4.
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected two dimensions, the second a multiple of 4")
    fours = weight.reshape(-1, 4)
    kept = fours.abs().topk(2, dim=1, sorted=False).indices
    return torch.zeros_like(fours).scatter(1, kept, fours.gather(1, kept)).view_as(weight)


def to_semi_structured(model: nn.Module, targets: Targets) -> nn.Module:
    """Store the targets' weights, which must be 2:4 sparse, so that their products skip the zeros; in place.

    PyTorch chooses cuSPARSELt, as torchao did, or CUTLASS where it is told to.
    """
    for linear in matching(model, targets, types=(nn.Linear,)).values():
        with warnings.catch_warnings():  # "the API is in prototype stage", once a layer
            warnings.simplefilter("ignore", UserWarning)
            linear.weight = nn.Parameter(to_sparse_semi_structured(linear.weight.detach()), requires_grad=False)
    return model
