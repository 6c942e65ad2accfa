"""What the compiler makes of our kernels with their default parameters, on GPUs that need not be there: a table.

For notebooks and for tests; imports Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch

from ...bsr import BSRMatrix
from . import linear as linear_kernel
from . import offline, packing, parameters

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MULTIPROCESSORS = {80: 108, 90: 132}
"""Of an A100 and an H100, by compute capability."""

GPUS = {80: "A100", 90: "H100"}

SHAPE, SPARSITY = (3072, 768), 0.9
"""Of the weight that ``table`` is about: ViT-B/16's first MLP layer."""


def linear(
    arch: int,
    dtype: str,
    block_size: int,
    group: int = 1,
    precision: str = "tf32x3",
    *,
    tokens: int = 50432,
    out_features: int = 3072,
    length: float = 300.0,
    activation: str | None = "gelu",
    transposed: bool = False,
    **changes: int,
) -> tuple[offline.Report, dict[str, int]]:
    """The block-sparse linear layer, compiled; and the parameters that it was compiled with.

    Args:
        arch: compute capability times ten, 80 or 90.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        block_size: of the weight.
        group: block rows a program, see ``packing``.
        precision: of float32, see ``linear.launch``.
        tokens: rows of the input.
        out_features: of the layer.
        length: inputs that a group reads on average.
        activation: fused, see ``linear.launch``.
        transposed: with the weight's transpose instead, as the input's gradient is computed.
        changes: to the default parameters.
    """
    height = group * block_size
    resources = {"multiprocessors": MULTIPROCESSORS[arch], "shared": offline.SHARED_BYTES[arch]}
    groups = out_features // height
    sizes = parameters.default(height, length, DTYPES[dtype].itemsize, precision, tokens, groups, **resources) | changes
    tensors = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr"), dtype)
    indices = {"crow_ptr": True, "col_ptr": True, "rows_ptr": group > 1, "order_ptr": transposed}
    tensors |= dict.fromkeys([name for name, there in indices.items() if there], "i32")
    constants = {
        **{name: None for name, there in indices.items() if not there},
        "ROWS": height,
        "COLS": block_size,
        "TRANSPOSED": transposed,
        "ACTIVATION": activation,
        "PRECISION": precision,
        **{name: value for name, value in sizes.items() if name.startswith("BLOCK")},
    }
    strides = {"tokens": tokens, "stride_xt": 768, "stride_xi": 1, "stride_yt": out_features}
    how = {"num_warps": sizes["num_warps"], "num_stages": sizes["num_stages"]}
    return offline.compile_for(linear_kernel._linear_kernel, arch, tensors, strides, constants, **how), sizes


def packed(dtype: str, block_size: int) -> packing.Packed:
    """A weight of ``SHAPE`` and random blocks, grouped as a conversion would group it where nothing was tuned."""
    blocks = [size // block_size for size in SHAPE]
    kept = torch.rand(blocks, generator=torch.Generator().manual_seed(0)) >= SPARSITY
    weight = kept.to(DTYPES[dtype]).repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return packing.pack(BSRMatrix.from_dense(weight, block_size))


def table(archs: Iterable[int], dtypes: Iterable[str], block_sizes: Iterable[int]) -> pd.DataFrame:
    """A row a case of ViT-B/16's first MLP layer at 90%: block rows a program, its tile, and what it needs of the GPU.

    ``rows`` are the block rows a program computes, ``packed`` is how many times the blocks of the weight its packing
    holds, ``spills`` are bytes a thread, ``KiB`` is shared memory, ``programs`` is how many one multiprocessor holds at
    once, and ``cores`` the tensor cores' instruction. float32 is ``tf32x3``. Takes a second or two a row.
    """
    rows: list[dict[str, Any]] = []
    for arch, dtype, block_size in itertools.product(archs, dtypes, block_sizes):
        weight = packed(dtype, block_size)
        entries, height, _ = weight.values.shape
        length = entries * block_size / (weight.crow.numel() - 1)
        report, sizes = linear(arch, dtype, block_size, height // block_size, length=length)
        rows.append(
            {
                "GPU": GPUS[arch],
                "dtype": dtype if dtype != "fp32" else "tf32x3",
                "block": block_size,
                "rows": height // block_size,
                "packed": round(weight.values.numel() / max(1, int((weight.values != 0).sum())), 1),
                "tile": "×".join(str(sizes[f"BLOCK_{side}"]) for side in "MNK"),
                "warps": sizes["num_warps"],
                "stages": sizes["num_stages"],
                "registers": report.registers,
                "spills": report.spills,
                "KiB": round(report.shared / 1024, 1),
                "programs": report.programs_at_once(arch),
                "cores": "wgmma" if report.wgmma else "mma" if report.tensor_cores else "none",
            }
        )
    return pd.DataFrame(rows)
