"""Block compressed sparse row (BSR) matrices: the one weight format that every kernel starts from.

A weight of shape ``(out_features, in_features)`` is cut into square blocks; only blocks that hold a non-zero are
stored, row of blocks by row of blocks. Sizes that are no multiple of the block size are padded with zeros up to the
next multiple; the unpadded ``shape`` is kept, so nothing outside this module has to think about the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def check_block_size(block_size: int) -> int:
    """Return ``block_size`` as an ``int``; raise if it is no integer (``TypeError``) or below 1 (``ValueError``)."""
    if isinstance(block_size, bool) or not isinstance(block_size, Integral):
        raise TypeError(
            f"block_size is {block_size!r} ({type(block_size).__name__}); expected an integer such as 16, 32 or 64"
        )
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; expected at least 1 (16, 32 and 64 are the usual choices)")
    return int(block_size)


def block_view(matrix: Tensor, block_size: int) -> Tensor:
    """See a 2-D ``(rows, cols)`` tensor as ``(block_rows, b, block_cols, b)``, zero-padded where blocks are partial."""
    rows, cols = matrix.shape
    pad_rows, pad_cols = -rows % block_size, -cols % block_size
    if pad_rows or pad_cols:
        matrix = F.pad(matrix, (0, pad_cols, 0, pad_rows))
    return matrix.reshape(matrix.shape[0] // block_size, block_size, matrix.shape[1] // block_size, block_size)


def zero_blocks(weight: Tensor, block_size: int) -> Tensor:
    """Boolean ``(ceil(out/b), ceil(in/b))``: which blocks of ``weight`` hold nothing but zeros."""
    return ~(block_view(weight.detach(), block_size) != 0).any(dim=3).any(dim=1)


@dataclass(frozen=True, eq=False)
class BSRMatrix:
    """A block-sparse matrix; its shapes are validated when it is made, its indices by ``check_indices``.

    Attributes:
        crow_indices: int32 ``(block_rows + 1,)``; blocks of block row ``i`` lie at ``crow[i]:crow[i + 1]``.
        col_indices: int32 ``(nnz,)``; the block column of each stored block, ascending within a block row.
        values: ``(nnz, b, b)``; the stored blocks.
        shape: ``(out_features, in_features)`` before padding.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.shape[1] != self.values.shape[2]:
            raise ValueError(
                f"values have shape {tuple(self.values.shape)}; expected (stored blocks, block_size, block_size)"
            )
        block_rows = self.block_shape[0]
        if self.crow_indices.shape != (block_rows + 1,):
            raise ValueError(
                f"crow_indices have shape {tuple(self.crow_indices.shape)}; expected ({block_rows + 1},) for a "
                f"{self.shape[0]}x{self.shape[1]} matrix in blocks of {self.block_size}"
            )
        if self.col_indices.shape != (self.nnz,):
            raise ValueError(
                f"col_indices have shape {tuple(self.col_indices.shape)}; expected ({self.nnz},), one a stored block"
            )

    def check_indices(self) -> BSRMatrix:
        """Raise ``ValueError`` unless the indices describe a BSR matrix; returns self.

        Apart from the shape checks at construction because it reads every index (on a GPU: waits for the device).
        Whoever takes indices from outside calls it once.
        """
        for name in ("crow_indices", "col_indices"):
            if (dtype := getattr(self, name).dtype) != torch.int32:
                raise ValueError(f"{name} are {dtype}; expected torch.int32")
        if not self.values.is_floating_point():
            raise ValueError(f"values are {self.values.dtype}; expected a floating point type")
        block_cols = self.block_shape[1]
        crow, col = self.crow_indices.long().cpu(), self.col_indices.long().cpu()
        if crow[0] != 0 or crow[-1] != self.nnz or (crow.diff() < 0).any():
            raise ValueError(f"crow_indices must rise from 0 to the number of stored blocks ({self.nnz}); got {crow}")
        if self.nnz and (col.min() < 0 or col.max() >= block_cols):
            raise ValueError(f"col_indices must lie in [0, {block_cols}); got {int(col.min())} to {int(col.max())}")
        # Ascending within each row <=> (row, col) pairs strictly ascend in storage order.
        flat = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff()) * block_cols + col
        if (flat.diff() <= 0).any():
            raise ValueError("col_indices must ascend within each block row, without repeats; sort the blocks first")
        return self

    @classmethod
    def from_dense(cls, weight: Tensor, block_size: int) -> BSRMatrix:
        """Store the blocks of ``weight`` ``(out_features, in_features)`` that are not all zero."""
        block_size = check_block_size(block_size)
        if weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected 2-D (out_features, in_features)")
        blocks = block_view(weight.detach(), block_size)
        kept = ~zero_blocks(weight, block_size)
        row, col = kept.nonzero(as_tuple=True)
        crow = F.pad(kept.sum(dim=1).cumsum(0), (1, 0))
        return cls(crow.int(), col.int(), blocks[row, :, col, :].contiguous(), tuple(weight.shape))

    @property
    def block_size(self) -> int:
        """Edge length of a block."""
        return self.values.shape[1]

    @property
    def nnz(self) -> int:
        """Number of stored blocks."""
        return self.values.shape[0]

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(block_rows, block_cols)``, partial blocks counted."""
        return -(-self.shape[0] // self.block_size), -(-self.shape[1] // self.block_size)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """``shape`` rounded up to multiples of the block size."""
        block_rows, block_cols = self.block_shape
        return block_rows * self.block_size, block_cols * self.block_size

    @property
    def sparsity(self) -> float:
        """Fraction of blocks that are not stored, in [0, 1]."""
        block_rows, block_cols = self.block_shape
        return 1.0 - self.nnz / max(1, block_rows * block_cols)

    @property
    def nbytes(self) -> int:
        """Bytes of the indices and the stored blocks."""
        return sum(t.numel() * t.element_size() for t in (self.crow_indices, self.col_indices, self.values))

    def to_dense(self, *, padded: bool = False) -> Tensor:
        """The dense matrix, of ``shape`` or, if ``padded``, of ``padded_shape``."""
        dense = dense_from_bsr(self.crow_indices, self.col_indices, self.values, self.block_shape)
        return dense if padded else dense[: self.shape[0], : self.shape[1]].contiguous()


def dense_from_bsr(crow: Tensor, col: Tensor, values: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """The padded dense matrix of a BSR matrix's parts; tensor operations only, so that it can be traced."""
    b = values.shape[1]
    row = torch.repeat_interleave(
        torch.arange(block_shape[0], device=crow.device), crow.long().diff(), output_size=values.shape[0]
    )
    blocks = values.new_zeros(*block_shape, b, b)
    blocks[row, col.long()] = values
    return blocks.transpose(1, 2).reshape(block_shape[0] * b, block_shape[1] * b)


class BlockPattern(NamedTuple):
    """Where the stored blocks of a BSR matrix lie, by rows and by columns, for products with it and its transpose.

    All int32. ``transposed_crow`` and ``transposed_col`` are the indices of the transposed matrix, whose k-th block is
    ``values[order[k]].T``.
    """

    row: Tensor
    col: Tensor
    crow: Tensor
    transposed_crow: Tensor
    transposed_col: Tensor
    order: Tensor

    @classmethod
    def of(cls, crow: Tensor, col: Tensor, block_cols: int) -> BlockPattern:
        """The pattern of a matrix of ``block_cols`` columns of blocks; never waits for the device."""
        rows = torch.arange(len(crow) - 1, device=crow.device, dtype=torch.int32)
        row = rows.repeat_interleave(crow.diff().long(), output_size=len(col))
        sorted_col, order = col.sort(stable=True)  # stable, so that rows ascend within a column
        columns = torch.arange(block_cols + 1, device=col.device, dtype=col.dtype)
        return cls(row, col, crow, torch.searchsorted(sorted_col, columns, out_int32=True), row[order], order.int())

    @classmethod
    def of_mask(cls, mask: Tensor, kept: int) -> BlockPattern:
        """The pattern of a boolean block ``mask`` that is True ``kept`` times; never waits for the device."""
        block_rows, block_cols = mask.shape
        # A stable sort and not nonzero(), whose number of results the host would have to wait for.
        flat = mask.flatten().int().sort(descending=True, stable=True).indices[:kept].int()
        rows = torch.arange(block_rows + 1, device=mask.device, dtype=torch.int32)
        crow = torch.searchsorted(flat // block_cols, rows, out_int32=True)
        return cls.of(crow, flat % block_cols, block_cols)
