"""Launch parameters of our kernels: tuned for this GPU if they were, else by rules that comments give the reasons of.

Never searched for in a call: ``python -m blockvit.tune`` does that, and ``kernels.tuning`` keeps what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from .. import tuning

LINEAR = "triton"
"""The name that parameters of the block-sparse linear are stored under."""

MLP = "triton_mlp"
"""The name of those of the fused MLP (``mlp``)."""

FLOAT32 = "tf32x3"
"""How float32 is multiplied where TF32 is not allowed: as three products in TF32, as accurate as float32's own.

On tensor cores; an H100 does 3 times 130 TFLOP/s in TF32 where its float32 units do 50 (cuBLAS)."""

TILE_BYTES = 128
"""A tile's length in K, in bytes: the widest that shared memory is swizzled for, so that no bank is hit twice."""

NEAR = 4
"""Parameters are taken over from a number of tokens up to so many times as large or small: a tile of 256 that is best
for 50432 tokens would keep 24 of 132 multiprocessors busy with 197, whatever the rest of them gains."""

SAME_SPARSITY = 0.025
"""How far the sparsity may be from the one that a size of groups was found for."""

HOPPER = {"multiprocessors": 132, "shared": 227 * 1024}
"""What counts where there is no GPU to ask."""


def float32_precision() -> str:
    """How float32 is multiplied now: ``tf32`` if the user allows that for matrix products, else ``FLOAT32``."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else FLOAT32


def precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s precision for operands of ``dtype``; only that of float32 means anything."""
    return float32_precision() if dtype == torch.float32 else "ieee"


@tuning.remembered
def linear(
    device: torch.device,
    tokens: int,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
    nnz: int,
    precision: str,
    group: int,
    entries: int,
) -> Mapping[str, int]:
    """Parameters for a product with a weight in groups of ``group`` block rows, which have ``entries`` in all.

    Tuned for such groups and about so many tokens (``NEAR``), else by rule.
    """
    alike = [
        entry
        for entry in tuning.entries(device, LINEAR)
        if entry["parameters"]["GROUP"] == group and tokens / NEAR <= entry["key"]["tokens"] <= tokens * NEAR
    ]
    entry = tuning.nearest(alike, tuning.key(out_features, in_features, tokens, block_size, dtype, nnz, precision))
    if entry is not None:
        return {name: value for name, value in entry["parameters"].items() if name != "GROUP"}
    height = group * block_size
    groups = -(-out_features // height)
    length = entries * block_size / groups
    return default(height, length, dtype.itemsize, precision, tokens, groups, **resources(device))


def group(
    device: torch.device, out_features: int, in_features: int, block_size: int, dtype: torch.dtype, nnz: int
) -> int | None:
    """How many block rows a group has that was found best on this GPU; None if no weight of this shape was tuned.

    A weight is packed before anyone knows for how many tokens: the largest number that was tuned decides. Taken over
    from no other shape: at 90% in blocks of 64, pairs of rows save fc1 a tenth and cost fc2 a quarter, counted. Nor
    from another sparsity (``SAME_SPARSITY``): rows of a sparser weight have fewer columns in common.
    """
    shape = {"out_features": out_features, "in_features": in_features}
    entries = [e for e in tuning.entries(device, LINEAR) if shape.items() <= e["key"].items()]
    tokens = max((e["key"]["tokens"] for e in entries), default=1)
    wanted = tuning.key(out_features, in_features, tokens, block_size, dtype, nnz, precision(dtype))
    alike = [e for e in entries if abs(e["key"]["sparsity"] - wanted["sparsity"]) <= SAME_SPARSITY]
    entry = tuning.nearest(alike, wanted)
    return None if entry is None else entry["parameters"]["GROUP"]


@cache
def resources(device: torch.device) -> dict[str, int]:
    """``multiprocessors`` of a GPU and ``shared`` bytes that a program can have."""
    if device.type != "cuda":
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": properties.multi_processor_count,
        "shared": properties.shared_memory_per_block_optin,
    }


def default(
    height: int,
    length: float,
    itemsize: int,
    precision: str,
    tokens: int,
    groups: int,
    *,
    multiprocessors: int,
    shared: int,
) -> dict[str, int]:
    """Parameters for a GPU that nothing was tuned for: ``groups`` of ``height`` outputs, ``length`` inputs on average.

    Chosen by counting and by what the compiler says of registers; unmeasured.
    """
    emulated = itemsize == 4 and precision != "tf32"
    # Weights are read once for each token tile, so tiles are long: 128 tokens, two of Hopper's instructions side by
    # side. Emulated float32 keeps the parts of x in registers: there 64, or they spill.
    block_m = 64 if emulated else 128
    block_n = min(height, 64 if emulated else 128)
    # A few tokens in short tiles: every multiprocessor gets two programs if that is possible, for each waits for memory
    # most of the time.
    programs = groups * (height // block_n)
    while block_m > 16 and -(-tokens // block_m) * programs < 2 * multiprocessors:
        block_m //= 2
    block_k = TILE_BYTES // itemsize
    # Two tiles on their way while one is multiplied. A group of one or two tiles has no use for that many; there the
    # shared memory holds another program instead.
    stages = 3 if length > 2 * block_k else 2
    while stages > 1 and shared_bytes(block_m, block_n, block_k, stages, itemsize) > shared:
        stages -= 1
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": 8 if block_m * block_n > 128 * 64 else 4,  # at most 64 sums a thread
        "num_stages": stages,
    }


def shared_bytes(block_m: int, block_n: int, block_k: int, stages: int, itemsize: int) -> int:
    """Shared memory of the tiles on their way, which is all that a program needs."""
    return stages * (block_m + block_n) * block_k * itemsize
