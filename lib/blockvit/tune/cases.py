"""The products to tune for, and their operands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..bsr import BSRMatrix
from ..convert import random_block_mask_
from ..kernels import tuning
from ..kernels.triton import parameters
from ..masks import num_kept

SHAPES = ((3072, 768), (768, 3072), (768, 768), (2304, 768))
"""``(out, in)`` of ViT-B/16: the MLP first, which has most of the work, then out_proj and qkv."""

TOKENS = 256 * 197
"""A batch of 256 images, as in the published end-to-end measurement."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One product to tune for: a weight of a shape, block size, dtype and sparsity, and a number of tokens."""

    out_features: int
    in_features: int
    tokens: int
    block_size: int
    dtype: torch.dtype
    sparsity: float

    @property
    def activation(self) -> str | None:
        """The activation that the kernel fuses: a GELU where a layer widens fourfold, as an MLP's first does."""
        return "gelu" if self.out_features == 4 * self.in_features else None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.out_features}x{self.in_features}, {self.tokens} tokens, blocks of {self.block_size}, {dtype}, "
            f"sparsity {self.sparsity:g}"
        )


def make_cases(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    *,
    block_sizes: Iterable[int] = (64, 32, 16),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    tokens: Iterable[int] = (TOKENS,),
    sparsities: Iterable[float] = (0.9,),
) -> list[Case]:
    """All combinations, for when the time does not suffice for all: each in the given order, most important first.

    Every dtype and block size is done for the first shape before the next shape begins: what a shape lacks is taken
    from the nearest, but a block size or dtype that has nothing cannot run. Within a shape every block size is done in
    the first dtype before the next dtype begins.
    """
    dtypes, sizes = list(dtypes), list(dict.fromkeys(block_sizes))
    return [
        Case(rows, cols, count, size, dtype, sparsity)
        for rows, cols in shapes
        for count in tokens
        for sparsity in sparsities
        for dtype in dtypes
        for size in sizes
    ]


def case_key(case: Case) -> dict[str, Any]:
    """The key that a case is stored under for PyTorch's kernel."""
    rows, cols, nnz = _padded(case)
    return tuning.key(rows, cols, case.tokens, case.block_size, case.dtype, nnz)


def triton_key(case: Case) -> dict[str, Any]:
    """The key that a case is stored under for our kernel; float32 is another case while TF32 is allowed."""
    rows, cols, nnz = _padded(case)
    precision = parameters.precision(case.dtype)
    return tuning.key(rows, cols, case.tokens, case.block_size, case.dtype, nnz, precision)


def held_to(dtype: torch.dtype) -> str:
    """The class that a product of our kernel is held to now; see ``agreement.TOLERANCE``."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return "tf32" if parameters.precision(dtype) == "tf32" else names[dtype]


def _padded(case: Case) -> tuple[int, int, int]:
    b = case.block_size
    block_rows, block_cols = -(-case.out_features // b), -(-case.in_features // b)
    # As many blocks as `random_block_mask_` leaves.
    return block_rows * b, block_cols * b, num_kept(block_rows * block_cols, case.sparsity)


def make_operands(case: Case, device: torch.device) -> tuple[Tensor, BSRMatrix, Tensor]:
    """Activations ``(tokens, padded in)``, a weight with that many random blocks, and a bias ``(padded out,)``."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(case.out_features, case.in_features, generator=generator)
    random_block_mask_(dense, case.sparsity, case.block_size, generator)
    matrix = BSRMatrix.from_dense(dense.to(device, case.dtype), case.block_size)
    rows, cols = matrix.padded_shape
    x = torch.randn(case.tokens, cols, device=device, dtype=case.dtype)
    return x, matrix, torch.randn(rows, device=device, dtype=case.dtype)


def expected(x: Tensor, layers: Iterable[tuple[BSRMatrix, Tensor, str | None]]) -> Tensor:
    """What a kernel has to compute of ``x``: layer after layer ``(weight, bias, activation)``, dense, in float32."""
    y = x.float()
    for matrix, bias, activation in layers:
        y = functional.linear(y, matrix.to_dense(padded=True).float(), bias.float())
        y = functional.gelu(y) if activation == "gelu" else y
    return y.to(x.dtype)
