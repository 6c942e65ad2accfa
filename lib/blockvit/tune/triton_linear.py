"""Parameters of our block-sparse linear kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.triton import packing, parameters
from .cases import Case, expected, held_to, make_operands
from .search import REP_MS, WARMUP_MS, Found, descend, in_time, timed

CHOICES = {
    "GROUP": (1, 2, 4, 8),
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128),
    "num_stages": (1, 2, 3, 4, 5),
    "num_warps": (2, 4, 8),
    "BLOCK_K": (16, 32, 64, 128),
}
"""What may be chosen of our kernel, those that are expected to matter most first."""

SUMS = 128
"""Sums that a thread may hold: with more, of its 255 registers none are left for what it computes with."""


def neighbours(
    candidate: Mapping[str, int], choices: Mapping[str, Sequence[int]] = CHOICES
) -> Iterator[dict[str, int]]:
    """Candidates that differ in one choice by one step; with the size of the groups the width of a tile changes too."""
    for name, values in choices.items():
        for step in (1, -1):
            if 0 <= (at := values.index(candidate[name]) + step) < len(values):
                other = {**candidate, name: values[at]}
                if name == "GROUP":
                    wide = candidate["BLOCK_N"] * other["GROUP"] // candidate["GROUP"]
                    other["BLOCK_N"] = min(max(wide, CHOICES["BLOCK_N"][0]), CHOICES["BLOCK_N"][-1])
                yield other


def fits(candidate: Mapping[str, int], block_size: int, itemsize: int, precision: str, shared: int) -> bool:
    """Whether it is worth compiling: a tile lies within a group, and shared memory and registers suffice by count."""
    block_m, block_n, block_k = (candidate[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    height = candidate["GROUP"] * block_size
    emulated = itemsize == 4 and precision != "tf32"
    # Emulated float32 holds the tile of x in registers too, in two parts.
    held = block_m * block_n + (2 * block_m * block_k if emulated else 0)
    return (
        block_n <= height
        and (candidate["GROUP"] == 1 or height * itemsize <= packing.WIDEST_BYTES)
        and 32 <= block_k * itemsize <= 2 * parameters.TILE_BYTES
        and parameters.shared_bytes(block_m, block_n, block_k, candidate["num_stages"], itemsize) <= shared
        and held <= SUMS * 32 * candidate["num_warps"]
    )


def find(case: Case, device: torch.device) -> Found | None:
    """Parameters of our kernel for a case, the size of its groups among them; None if none work.

    From the defaults to ever better neighbours. To compile one takes a second or two, once in a process for all cases.
    """
    from ..kernels.triton import linear

    x, matrix, bias = make_operands(case, device)
    wanted = expected(x, [(matrix, bias, case.activation)])
    b, itemsize, precision = case.block_size, case.dtype.itemsize, parameters.precision(case.dtype)
    resources = parameters.resources(device)
    packed = functools.cache(lambda group: packing.pack(matrix, group))

    def measured(candidate: Mapping[str, int], **effort: int) -> float | None:
        p = packed(candidate["GROUP"])
        if p.values.shape[1] != candidate["GROUP"] * b:  # too few rows, or too much memory for such groups
            return None
        options = {
            "precision": precision,
            "rows": p.rows,
            "out_features": matrix.padded_shape[0],
            "parameters": {name: value for name, value in candidate.items() if name != "GROUP"},
        }

        def call() -> Tensor:
            return linear.launch(x, p.crow, p.col, p.values, bias, case.activation, **options)

        return timed(call, wanted, held_to(case.dtype), **effort)

    counted = packing.pack(matrix)
    groups, (entries, height, _) = counted.crow.shape[0] - 1, counted.values.shape
    tiles = parameters.default(height, entries * b / groups, itemsize, precision, case.tokens, groups, **resources)
    default = {"GROUP": height // b, **tiles}
    best = descend(
        default,
        lambda candidate: (n for n in neighbours(candidate) if fits(n, b, itemsize, precision, resources["shared"])),
        in_time(lambda candidate: measured(candidate, warmup=WARMUP_MS, rep=REP_MS)),
    )
    if best is None:
        return None
    ms, default_ms = measured(best), measured(default)
    if ms is None or (default_ms is not None and default_ms <= ms):
        best, ms = default, default_ms  # the search's short timings are noisy, and a race shows only sometimes
    return None if ms is None else Found(best, ms, default_ms)
