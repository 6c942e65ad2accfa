"""Block-sparse linear, forward: ``activation(x @ W.T + bias)`` with a block-sparse ``W``.

A program computes a tile of tokens x the outputs of one group of block rows (``packing``) and walks along the group's
blocks. Each step gathers a tile of ``x``, in place and with any strides, from the columns that the indices name.

What bounds it, counted for an H100, not measured: ViT-B/16's MLP at 90%, 256 images (50432 tokens), bfloat16, default
parameters. Either layer keeps 24 GFLOP and has to move 0.39 GB, nearly all of it activations: 0.13 ms at 3.0 TB/s, what
a copy reaches. Beside that stand the bytes that programs read from the L2 cache, at 5.5 TB/s, and the products, zeros
within groups included, at 650 TFLOP/s:

    layer           block  group  outputs  tiles   L2: x   L2: weight         products         bound by
    3072x768 (fc1)     16      4       64    2.9  0.89 GB     0.44 GB  0.24 ms   57 GFLOP  0.09 ms  L2
                       32      2       64    1.7  0.53        0.26     0.14      34        0.05     L2, memory
                       64      2      128    1.7  0.26        0.26     0.10      33        0.05     memory
                      128      1      128    1.2  0.19        0.19     0.07      25        0.04     memory
    768x3072 (fc2)     16      2       32    8.4  1.31        0.33     0.30      42        0.06     L2
                       32      1       32    4.8  0.75        0.19     0.17      24        0.04     L2
                       64      1       64    4.8  0.37        0.19     0.10      24        0.04     memory
                      128      1      128    5.0  0.19        0.19     0.07      25        0.04     memory

``group``: block rows in one; ``outputs``: of a program; ``tiles``: steps of a program on average. Without groups fc1 in
blocks of 16 would read 1.49 GB of ``x``, and in tiles a quarter as wide. What 155 million exact GELUs take, see
``epilogue``. In float32, by three products in TF32, memory takes 0.26 ms and the products 0.22 ms of either layer.

Steps are few, so a program spends most of its time waiting for its first tile: what hides that are several programs on
a multiprocessor, which is why tiles are no larger and no more of them on their way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import parameters as tuned
from .epilogue import INTERPRETED, activate, multiply_add

MOST_TILES = 65535
"""The second index of a grid ends here (CUDA)."""


@triton.jit(do_not_specialize=["tokens"])  # or other numbers of tokens would be compiled anew
def _linear_kernel(
    x_ptr,
    crow_ptr,
    col_ptr,
    order_ptr,
    values_ptr,
    rows_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    stride_xt,
    stride_xi,
    stride_yt,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs start in the order of the first index: those that share a token tile follow each other, so the tile comes
    # from memory once. Tiles take two indices, because the second has an end.
    SLICES: tl.constexpr = ROWS // BLOCK_N
    group = tl.program_id(0) // SLICES
    tile = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    first = tl.load(crow_ptr + group)
    end = tl.load(crow_ptr + group + 1)

    n = tl.program_id(0) % SLICES * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # In 64 bits: tokens times features may exceed 2^31. Past the last token it is read again: no mask at every load.
    token = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x_ptr + (tl.minimum(token, tokens - 1) * stride_xt)[:, None]

    out = group * ROWS + n
    real = n < ROWS
    if rows_ptr is not None:
        row = tl.load(rows_ptr + group * (ROWS // COLS) + n // COLS)
        out = row * COLS + n % COLS
        real = row >= 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias_ptr is not None:  # first, so that it has come by the time the sums are done
        acc += tl.load(bias_ptr + out, mask=real, other=0.0).to(tl.float32)[None, :]

    # A step in K takes a piece of a block, or joins several blocks that are narrower than a tile: so tensor cores get
    # whole tiles of every block size, and nothing is multiplied in vain. Indices are read a step ahead; the loads that
    # they lead to are then pipelined as in a dense product.
    PIECES: tl.constexpr = max(COLS // BLOCK_K, 1)
    JOINED: tl.constexpr = max(BLOCK_K // COLS, 1)
    which = k // COLS if JOINED > 1 else 0
    block = first + which
    col = tl.load(col_ptr + block, mask=block < end, other=0)
    if order_ptr is not None:
        place = tl.load(order_ptr + block, mask=block < end, other=0)
    for step in range(0, (end - first) * PIECES if JOINED == 1 else tl.cdiv(end - first, JOINED)):
        within = k % COLS if JOINED > 1 else step % PIECES * BLOCK_K + k
        start = first + step // PIECES * JOINED
        there = start + which < end
        x_ptrs = x_rows + ((col * COLS + within).to(tl.int64) * stride_xi)[None, :]
        if order_ptr is None:
            w_k = values_ptr + start.to(tl.int64) * (ROWS * COLS) + which * (ROWS * COLS)
        else:
            w_k = values_ptr + place.to(tl.int64) * (ROWS * COLS)
        if TRANSPOSED:
            w_ptrs = (w_k + within * ROWS)[:, None] + n[None, :]
        else:
            w_ptrs = (w_k + within)[:, None] + n[None, :] * COLS
        if JOINED > 1:
            x = tl.load(x_ptrs, mask=there[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=there[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)

        block = first + (step + 1) // PIECES * JOINED + which
        col = tl.load(col_ptr + block, mask=block < end, other=0)
        if order_ptr is not None:
            place = tl.load(order_ptr + block, mask=block < end, other=0)
        acc = multiply_add(x, w, acc, PRECISION)

    y = activate(acc, ACTIVATION, y_ptr.dtype.element_ty == tl.float32).to(y_ptr.dtype.element_ty)
    y_ptrs = y_ptr + (token * stride_yt)[:, None] + out[None, :]
    tl.store(y_ptrs, y, mask=(token < tokens)[:, None] & real[None, :])


def launch(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    precision: str,
    rows: Tensor | None = None,
    out_features: int | None = None,
    nnz: int | None = None,
    order: Tensor | None = None,
    parameters: Mapping[str, int] | None = None,
) -> Tensor:
    """``y[t, g * R + i] = activation(sum x[t, col[k] * C + j] * B[k][i, j] + bias[g * R + i])``, contiguous.

    The sum is over ``k`` from ``crow[g]`` to ``crow[g + 1]`` and ``j``. Block ``B[k]`` ``(R, C)`` is ``values[k]`` or,
    with an ``order``, the transpose of ``values[order[k]]``: a product with the transposed matrix needs other indices,
    but no copy of the values. Reads nothing back: no wait for the device.

    Args:
        x: ``(tokens, in)``, any strides, at least one token.
        crow: int32 ``(groups + 1,)``.
        col: int32 ``(blocks,)``.
        values: ``(blocks, R, C)``, contiguous, in ``x``'s dtype; sizes are powers of two from 16 on.
        bias: ``(out,)`` in any dtype, contiguous.
        activation: None, ``"gelu"`` or ``"gelu_tanh"``.
        precision: how float32 is multiplied: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``; other dtypes ignore it.
        rows: int32 ``(groups, R / C)``: group ``g`` makes the outputs ``rows[g, i] * C`` to ``rows[g, i] * C + C - 1``
            instead, nothing where that is -1. Together they have to make each output once.
        out_features: number of outputs; needed with ``rows``, where the groups may have more.
        nnz: blocks ``(C, C)`` of the weight before it was put in groups, by which parameters are looked up.
        order: int32 ``(blocks,)``.
        parameters: ``BLOCK_M``, ``BLOCK_N``, ``BLOCK_K``, ``num_warps``, ``num_stages``; None: see ``parameters``.
    """
    tokens, (height, width) = x.shape[0], values.shape[1:]
    if order is not None:
        height, width = width, height
    groups = crow.shape[0] - 1
    out_features = groups * height if out_features is None else out_features
    if parameters is None:
        entries, group = values.shape[0], height // width
        weight = out_features, x.shape[1], width, x.dtype, entries if nnz is None else nnz
        parameters = tuned.linear(x.device, tokens, *weight, precision, group, entries)
    y = x.new_empty(tokens, out_features)
    tiles = triton.cdiv(tokens, parameters["BLOCK_M"])
    grid = (groups * (height // parameters["BLOCK_N"]), min(tiles, MOST_TILES), triton.cdiv(tiles, MOST_TILES))
    with torch.cuda.device_of(x):
        _linear_kernel[grid](
            x,
            crow,
            col,
            order,
            values,
            rows,
            bias,
            y,
            tokens,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            ROWS=height,
            COLS=width,
            TRANSPOSED=order is not None,
            ACTIVATION=activation,
            PRECISION=precision,
            enable_fp_fusion=True,  # Triton's default, which 3.9 warns of when it is not said
            **parameters,
        )
    return y


# Registered with the dispatcher itself: `custom_op` adds some 10 us of Python to a call, as much as a small layer takes
# at batch size 1. Not as a `triton_op` that the compiler sees through: it fuses nothing into a foreign kernel, and the
# launch parameters, which depend on the number of tokens, would make a graph out of every number.
_library = torch.library.Library("blockvit", "FRAGMENT")
_SIGNATURE = (
    "(Tensor x, Tensor crow, Tensor col, Tensor values, Tensor? rows, Tensor? bias, int out_features, int nnz, "
    "str? activation) -> Tensor"
)


def _linear(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    nnz: int,
    activation: str | None,
) -> Tensor:
    return launch(
        x,
        crow,
        col,
        values,
        bias,
        activation,
        precision=tuned.precision(x.dtype),
        rows=rows,
        out_features=out_features,
        nnz=nnz,
    )


def _fake(x, crow, col, values, rows, bias, out_features, nnz, activation) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


_library.define("triton_linear" + _SIGNATURE)
_library.impl("triton_linear", _linear, "CPU" if INTERPRETED else "CUDA")
torch.library.register_fake("blockvit::triton_linear", _fake, lib=_library)
