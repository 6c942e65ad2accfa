"""Block-sparse linear, forward: ``activation(x @ W.T + bias)`` with a block-sparse ``W``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import activate, multiply_add


@triton.jit
def _linear_kernel(
    x_ptr,
    crow_ptr,
    col_ptr,
    order_ptr,
    values_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    programs_a_tile,
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
    # Programs that share a token tile follow each other, so that the tile is read from memory once.
    pid = tl.program_id(0)
    tile, part = pid // programs_a_tile, pid % programs_a_tile
    block_row = part // (ROWS // BLOCK_N)
    n = part % (ROWS // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)  # within the block row
    k = tl.arange(0, BLOCK_K)

    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Tail tokens read the last one again instead of being masked: a predicate less for each load.
    x_rows = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * stride_xt

    first = tl.load(crow_ptr + block_row)
    end = tl.load(crow_ptr + block_row + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, (end - first) * COLS, BLOCK_K):
        # A tile in K is made of several blocks of the row, or is part of one.
        block = first + (start + k) // COLS
        within = (start + k) % COLS
        there = block < end
        col = tl.load(col_ptr + block, mask=there, other=0)
        x = tl.load(x_rows + (col * COLS + within)[None, :] * stride_xi, mask=there[None, :], other=0.0)
        if order_ptr is not None:
            block = tl.load(order_ptr + block, mask=there, other=0)
        base = values_ptr + block.to(tl.int64) * (ROWS * COLS)
        if TRANSPOSED:
            w = tl.load((base + within * ROWS)[:, None] + n[None, :], mask=there[:, None], other=0.0)
        else:
            w = tl.load((base + within)[:, None] + n[None, :] * COLS, mask=there[:, None], other=0.0)
        acc = multiply_add(x, w, acc, PRECISION)

    out = block_row * ROWS + n
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out).to(tl.float32)[None, :]
    y = activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token.to(tl.int64)[:, None] * stride_yt + out[None, :], y, mask=(token < tokens)[:, None])


def launch(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    precision: str,
    order: Tensor | None = None,
    transposed: bool = False,
    parameters: Mapping[str, int] | None = None,
) -> Tensor:
    """``y[t, r * rows + i] = activation(sum x[t, col[k] * cols + j] * B[k][i, j] + bias[r * rows + i])``, contiguous.

    The sum is over ``k`` from ``crow[r]`` to ``crow[r + 1]`` and ``j``. Block ``B[k]`` is ``values[k]``, or
    ``values[order[k]]``; transposed if ``transposed``. So a product with the transposed matrix needs other indices, but
    no copy of the values. Reads nothing back: no wait for the device.

    Args:
        x: ``(tokens, in)``, any strides, at least one token.
        crow: int32 ``(block rows + 1,)``.
        col: int32 ``(blocks,)``.
        values: ``(blocks, rows, cols)``, contiguous, in ``x``'s dtype; sizes are powers of two from 16 on.
        bias: ``(out,)`` in any dtype, contiguous.
        activation: None, ``"gelu"`` or ``"gelu_tanh"``.
        precision: how float32 is multiplied: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``; other dtypes ignore it.
        order: int32 ``(blocks,)``.
        transposed: blocks are the transposes of what ``values`` holds.
        parameters: ``BLOCK_M``, ``BLOCK_N``, ``BLOCK_K``, ``num_warps``, ``num_stages``; None: see ``parameters``.
    """
    tokens, rows, cols = x.shape[0], *values.shape[1:]
    if transposed:
        rows, cols = cols, rows
    block_rows = crow.shape[0] - 1
    if parameters is None:
        parameters = {
            "BLOCK_M": 64,
            "BLOCK_N": min(rows, 64),
            "BLOCK_K": 128 // x.element_size(),
            "num_warps": 4,
            "num_stages": 3,
        }
    y = x.new_empty(tokens, block_rows * rows)
    programs_a_tile = block_rows * (rows // parameters["BLOCK_N"])
    grid = (triton.cdiv(tokens, parameters["BLOCK_M"]) * programs_a_tile,)
    with torch.cuda.device_of(x):
        _linear_kernel[grid](
            x,
            crow,
            col,
            order,
            values,
            bias,
            y,
            tokens,
            programs_a_tile,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            ROWS=rows,
            COLS=cols,
            TRANSPOSED=transposed,
            ACTIVATION=activation,
            PRECISION=precision,
            **parameters,
        )
    return y
