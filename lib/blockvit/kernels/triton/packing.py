"""The weight as the kernel reads it: block rows in groups, each with the union of the block columns they read.

Every block row reads the activations of its block columns, so narrow rows read them often: in blocks of 16 at 90% more
bytes come from the L2 cache than from memory. So ``G`` block rows can be computed by one program. For each block column
that any of them reads, the group keeps a rectangle ``(G * b, b)``, zero where a row lacks that column. This costs
products with zeros and saves reading the activations for each row. Rows that read the same columns lose nothing, so
groups are made of rows that share as many columns as can be found. Along K nothing is filled up: there the kernel joins
narrow blocks to a tile by their indices.

Which ``G`` is best is counted (``cost``). Tensor operations, no Triton: packs on any device, once, at conversion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...bsr import BSRMatrix

WIDEST_BYTES = 256
"""A group's outputs at most, times the bytes of one: as many as one program computes (``parameters.default``)."""

MEMORY = 4
"""A packed weight holds at most so many times the blocks of the weight, which the layer keeps beside it as its
checkpoint; whatever a larger group would save. Without groups nothing is copied."""

TILE_BYTES = 256
"""Tokens of a tile in the count below, times the bytes of a number: how often the weight is read again."""

L2_BYTES = 5.5e12
"""Bytes a second from the L2 cache of an H100, as microbenchmarks report it. Counted with; not measured here."""

PROGRAM_SECONDS = 2e-9
"""What a program costs beside its work: 1 us until its first tile is there, hidden behind 4 others on 132
multiprocessors. An estimate; not measured here."""

TENSOR_FLOPS = {torch.bfloat16: 650e12, torch.float16: 650e12, torch.float32: 325e12 / 3}
"""Operations a second of an H100's tensor cores in a dense product; float32 as three products in TF32."""

FULL_WIDTH = 32
"""Outputs from which on a Hopper tensor core runs at full speed: below, reading x from shared memory takes longer than
multiplying (64 x 16 half-precision numbers take 16 cycles to read, and with n outputs n / 2 cycles to multiply)."""


@dataclass(frozen=True)
class Packed:
    """A weight in groups of block rows.

    Attributes:
        crow: int32 ``(groups + 1,)``; entries of group ``g`` lie at ``crow[g]:crow[g + 1]``.
        col: int32 ``(entries,)``; the block column of each, ascending within a group.
        values: ``(entries, G * b, b)``.
        rows: int32 ``(groups, G)``, the block rows of each group, -1 where it has fewer; None: group g is row g.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    rows: Tensor | None


def pack(weight: BSRMatrix, group: int | None = None) -> Packed:
    """``weight`` in groups of ``group`` block rows, a power of two; None: as many as cost least by ``cost``.

    Fewer where there are no more rows, or ``MEMORY`` allows no more. Deterministic. Groups of one are the weight
    itself, without a copy.
    """
    if group == 1:
        return Packed(weight.crow_indices, weight.col_indices, weight.values, None)
    mask = _mask(weight)
    groupings = _groupings(mask, group or max(1, WIDEST_BYTES // (weight.block_size * weight.values.itemsize)))
    entries = {size: int(_union(mask, rows).sum()) for size, rows in groupings.items()}
    allowed = [size for size in groupings if size == 1 or size * entries[size] <= MEMORY * weight.nnz]
    if group is None:
        dtype = weight.values.dtype
        costs = {n: cost(entries[n], len(groupings[n]), n, weight.block_size, dtype) for n in allowed}
        group = min(costs, key=costs.__getitem__)
    rows = groupings[max(size for size in allowed if size <= group)]
    return pack(weight, 1) if rows.shape[1] == 1 else _packed(weight, rows, _union(mask, rows))


def cost(entries: int, groups: int, group: int, block_size: int, dtype: torch.dtype) -> float:
    """Counted seconds that a tile of tokens takes of an H100, without what every grouping has in common.

    Products by the tensor cores' rate, activations and weights by that of the L2 cache, programs by their number.
    """
    tokens, n = TILE_BYTES // dtype.itemsize, group * block_size
    flop = 2 * tokens * n * block_size * max(1, FULL_WIDTH / n)
    moved = dtype.itemsize * block_size * (tokens + n)
    return entries * (flop / TENSOR_FLOPS[dtype] + moved / L2_BYTES) + groups * PROGRAM_SECONDS


def _mask(weight: BSRMatrix) -> Tensor:
    """Bool ``(block_rows, block_cols)``: which blocks there are; on the CPU, where small steps cost least."""
    crow, col = weight.crow_indices.long().cpu(), weight.col_indices.long().cpu()
    mask = torch.zeros(weight.block_shape, dtype=torch.bool)
    mask[torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff()), col] = True
    return mask


def _groupings(mask: Tensor, most: int) -> dict[int, Tensor]:
    """For each power of two up to ``most`` the groups of so many rows, ``(groups, size)``, -1 where there is none.

    Groups are paired again and again, those first that share most columns: each such pair saves as many columns.
    """
    rows = torch.arange(len(mask)).unsqueeze(1)
    groupings = {1: rows}
    while 2 * rows.shape[1] <= most and len(rows) > 1:
        if len(rows) % 2:
            rows = torch.cat([rows, torch.full_like(rows[:1], -1)])
        union = _union(mask, rows).float()
        rows = rows[_pairs(union @ union.T)].flatten(1)
        groupings[rows.shape[1]] = rows
    return groupings


def _union(mask: Tensor, rows: Tensor) -> Tensor:
    """Bool ``(groups, block_cols)``: the columns that any row of a group has."""
    return (mask[rows.clamp_min(0)] & (rows >= 0).unsqueeze(2)).any(dim=1)


def _pairs(shared: Tensor) -> Tensor:
    """``(n / 2, 2)``: each of ``n`` items in one pair, greedily by the symmetric ``shared`` ``(n, n)``.

    In each round whoever are each other's best become a pair. Ties go to the pair that comes first, so the best pair of
    all is always made, and the rounds end.
    """
    n = len(shared)
    place = torch.arange(n)
    # Scores that are all different and symmetric: what is shared first, then the place in the matrix.
    low, high = torch.minimum(place[:, None], place), torch.maximum(place[:, None], place)
    score = shared.double() * n * n - (low * n + high)
    score.fill_diagonal_(float("-inf"))
    pairs = []
    while sum(map(len, pairs)) < n // 2:
        best = score.argmax(dim=1)
        mutual = (best[best] == place) & (place < best) & score.max(dim=1).values.isfinite()
        found = torch.stack([place[mutual], best[mutual]], dim=1)
        pairs.append(found)
        score[found.flatten()] = float("-inf")
        score[:, found.flatten()] = float("-inf")
    return torch.cat(pairs)


def _packed(weight: BSRMatrix, rows: Tensor, union: Tensor) -> Packed:
    """``weight`` in the groups ``rows``; the groups with most entries first, so that the longest do not come last."""
    longest_first = union.sum(dim=1).argsort(descending=True, stable=True)
    device, b = weight.values.device, weight.block_size
    rows, union = rows[longest_first].to(device), union[longest_first].to(device)
    (groups, size), (block_rows, block_cols) = rows.shape, weight.block_shape

    places = union.nonzero()
    entry = torch.zeros(groups, block_cols, dtype=torch.long, device=device)
    entry[places[:, 0], places[:, 1]] = torch.arange(len(places), device=device)
    group, slot = (rows >= 0).nonzero(as_tuple=True)
    group_of, slot_of = (torch.empty(block_rows, dtype=torch.long, device=device) for _ in range(2))
    group_of[rows[group, slot]], slot_of[rows[group, slot]] = group, slot

    row = torch.repeat_interleave(
        torch.arange(block_rows, device=device), weight.crow_indices.long().diff(), output_size=weight.nnz
    )
    values = weight.values.new_zeros(len(places), size, b, b)
    values[entry[group_of[row], weight.col_indices.long()], slot_of[row]] = weight.values
    crow = torch.cat([places.new_zeros(1), union.sum(dim=1).cumsum(0)])
    return Packed(crow.int(), places[:, 1].int().contiguous(), values.flatten(1, 2), rows.int())
