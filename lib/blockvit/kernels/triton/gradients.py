"""Gradients of the block-sparse linear layer: of its input, and of its weight at the kept blocks.

The input's gradient is the forward product with the transposed pattern: ``linear.launch`` reads the values through a
permutation and transposes each block on its way, so that nothing is copied and nothing is packed twice.

The weight's gradient at the kept blocks is a sampled dense-dense product (SDDMM): block ``(r, c)`` of ``grad.T @ x``
multiplies a column of ``grad`` that is one block wide with such a column of ``x``, over all tokens. Both columns are
read for ``2 b^2`` operations a token, so at ``b = 16`` in bfloat16 a program a block would do 8 operations for each
byte it reads: the second-level cache, not the tensor cores, would set its pace, and a 16-wide tile fills no tensor core
instruction of Hopper's (64 rows). Therefore a program takes several blocks of one block row side by side: it reads
``grad`` once for all of them (at 8 blocks of 16: 14 operations a byte) and multiplies tiles of ``WIDTH x b``, ``WIDTH``
64 or 128 being the first size of the instruction. Where a weight's block columns hold more blocks than its rows, the
product is turned round and its blocks are stored transposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bsr import BlockPattern
from . import linear
from . import parameters as tuned
from .epilogue import INTERPRETED, multiply_add

PROGRAMS = 528
"""To split the tokens for: 4 on each of an H100's 132 multiprocessors. Fewer leave some idle, more write more partial
sums."""

TOKENS = 512
"""At least so many for each split, so that its partial sums, 4 bytes a weight, stay few beside what it reads."""


@triton.jit(do_not_specialize=["tokens", "tokens_a_split"])  # or other numbers of tokens would be compiled anew
def _sampled_kernel(
    lines_ptr,
    others_ptr,
    crow_ptr,
    col_ptr,
    order_ptr,
    out_ptr,
    tokens,
    tokens_a_split,
    block_rows,
    parts,
    stride_lt,
    stride_li,
    stride_ot,
    stride_oi,
    stride_split,
    B: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Programs of one split follow each other: they read the same tokens at the same time, from memory once.
    pid = tl.program_id(0)
    split, row, part = pid // (block_rows * parts), pid // parts % block_rows, pid % parts
    first_token = split * tokens_a_split
    last_token = tl.minimum(first_token + tokens_a_split, tokens)
    i = tl.arange(0, B)
    lane = tl.arange(0, WIDTH)
    own, j = lane // B, lane % B
    t = tl.arange(0, BLOCK_T)

    end = tl.load(crow_ptr + row + 1)
    for start in range(tl.load(crow_ptr + row) + part * (WIDTH // B), end, parts * (WIDTH // B)):
        block = start + own
        there = block < end
        col = tl.load(col_ptr + block, mask=there, other=0)
        acc = tl.zeros((WIDTH, B), tl.float32)
        for token in range(first_token, last_token, BLOCK_T):
            time = (token + t).to(tl.int64)
            inside = time < last_token
            line = tl.load(
                lines_ptr + time[:, None] * stride_lt + (row * B + i).to(tl.int64)[None, :] * stride_li,
                mask=inside[:, None],
                other=0.0,
            )
            other = tl.load(
                others_ptr + time[:, None] * stride_ot + (col * B + j).to(tl.int64)[None, :] * stride_oi,
                mask=inside[:, None] & there[None, :],
                other=0.0,
            )
            acc = multiply_add(tl.trans(other), line, acc, PRECISION)
        if order_ptr is not None:
            block = tl.load(order_ptr + block, mask=there, other=0)
        base = out_ptr + split.to(tl.int64) * stride_split + block.to(tl.int64) * (B * B)
        target = (base + j * B)[:, None] + i[None, :] if TRANSPOSED else (base + j)[:, None] + i[None, :] * B
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=there[:, None])


def default_parameters(block_size: int, blocks_a_row: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch parameters for a weight with so many blocks in a row, full block rows and empty ones averaged.

    From what the compiler makes of them for sm_80 and sm_90: the most numbers in a tile without spilled registers. In
    float32 the tiles are short, because ``tf32x3`` holds each operand in two parts, in registers.
    """
    wide = dtype == torch.float32
    return {
        "WIDTH": max(64, block_size) if blocks_a_row * block_size <= 64 else 128,
        "BLOCK_T": 16 if wide else 64,
        "num_warps": 8 if wide or block_size >= 64 else 4,
        "num_stages": 3,
    }


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    pattern: BlockPattern,
    block_size: int,
    *,
    precision: str,
    parameters: Mapping[str, int] | None = None,
) -> Tensor:
    """The blocks of ``grad.T @ x`` at ``pattern``, ``(nnz, b, b)`` in the dtype of ``x``.

    Sums are float32. Where there are few blocks the tokens are split between programs, whose partial sums a second
    pass adds: always in the same order, so that a training can be repeated to the bit, which atomic additions would
    not allow. Reads nothing back: no wait for the device.

    Args:
        grad: ``(tokens, out)``, any strides, at least one token; ``out`` a multiple of ``block_size``.
        x: ``(tokens, in)``, any strides, in the same dtype.
        pattern: of the ``(out, in)`` weight.
        block_size: a power of two from 16 to 128.
        precision: how float32 is multiplied, see ``linear.launch``.
        parameters: ``WIDTH``, ``BLOCK_T``, ``num_warps``, ``num_stages``; None: see ``default_parameters``.

    Raises:
        ValueError: a block is wider than a tile, which the kernel would never come to the end of.
    """
    if len(pattern.crow) <= len(pattern.transposed_crow):  # fewer rows than columns: more blocks in each
        lines, others, crow, col, order = grad, x, pattern.crow, pattern.col, None
    else:
        lines, others, crow, col, order = x, grad, pattern.transposed_crow, pattern.transposed_col, pattern.order
    tokens, nnz, block_rows, b = lines.shape[0], len(col), len(crow) - 1, block_size
    blocks_a_row = triton.cdiv(max(nnz, 1), block_rows)
    parameters = parameters or default_parameters(b, blocks_a_row, lines.dtype)
    if b > parameters["WIDTH"]:
        raise ValueError(f"block_size is {b}; expected at most WIDTH, which is {parameters['WIDTH']}")
    parts = triton.cdiv(blocks_a_row * b, parameters["WIDTH"])
    splits = max(1, min(triton.cdiv(PROGRAMS, block_rows * parts), tokens // TOKENS))
    a_split = triton.cdiv(triton.cdiv(tokens, splits), parameters["BLOCK_T"]) * parameters["BLOCK_T"]
    out = lines.new_empty(splits, nnz, b, b, dtype=lines.dtype if splits == 1 else torch.float32)
    with torch.cuda.device_of(lines):
        _sampled_kernel[(splits * block_rows * parts,)](
            lines,
            others,
            crow,
            col,
            order,
            out,
            tokens,
            a_split,
            block_rows,
            parts,
            *lines.stride(),
            *others.stride(),
            out.stride(0),
            B=b,
            TRANSPOSED=order is not None,
            PRECISION=precision,
            enable_fp_fusion=True,  # Triton's default, which 3.9 warns of when it is not said
            **parameters,
        )
    return out[0] if splits == 1 else out.sum(dim=0).to(lines.dtype)


# Registered as ``triton_linear`` is, for the same reasons.
_library = torch.library.Library("blockvit", "FRAGMENT")


def _product(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    return linear.launch(x, crow, col, values, bias, precision=tuned.precision(x.dtype), order=order)


def _sampled(
    grad: Tensor,
    x: Tensor,
    row: Tensor,
    col: Tensor,
    crow: Tensor,
    transposed_crow: Tensor,
    transposed_col: Tensor,
    order: Tensor,
    block_size: int,
) -> Tensor:
    pattern = BlockPattern(row, col, crow, transposed_crow, transposed_col, order)
    return weight_gradient(grad, x, pattern, block_size, precision=tuned.precision(x.dtype))


def _fake_product(x, crow, col, values, order, bias) -> Tensor:
    return x.new_empty(x.shape[0], (crow.shape[0] - 1) * values.shape[1])


def _fake_sampled(grad, x, row, col, crow, transposed_crow, transposed_col, order, block_size) -> Tensor:
    return x.new_empty(col.shape[0], block_size, block_size)


for _name, _signature, _implementation, _fake in (
    (
        "triton_product",
        "(Tensor x, Tensor crow, Tensor col, Tensor values, Tensor? order, Tensor? bias) -> Tensor",
        _product,
        _fake_product,
    ),
    (
        "triton_sampled",
        "(Tensor grad, Tensor x, Tensor row, Tensor col, Tensor crow, Tensor transposed_crow, Tensor transposed_col, "
        "Tensor order, int block_size) -> Tensor",
        _sampled,
        _fake_sampled,
    ),
):
    _library.define(_name + _signature)
    _library.impl(_name, _implementation, "CPU" if INTERPRETED else "CUDA")
    torch.library.register_fake(f"blockvit::{_name}", _fake, lib=_library)
