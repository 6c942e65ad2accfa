"""A fused block-sparse MLP: ``act2(act1(x @ W1.T + b1) @ W2.T + b2)``, its hidden activations kept on the chip.

One by one, the two layers of ViT-B/16 write and read hidden activations that are four times as wide as their input.
Here a program takes a tile of tokens through both: it writes the tile's hidden activations into a slice of scratch
memory that is its own, reads them back, and uses the slice again for its next tile. So scratch memory is as large as
the programs that run at once need it, and what the L2 cache holds of it never goes to device memory.

A step of the loop multiplies one tile in K. Steps run through without a break at the end of a group of block rows, so
that the next loads are under way while a sum is finished: with one or two blocks a row there is nothing to overlap
within a row. Groups of hidden block rows of which the second layer reads nothing are not computed.

Counted for 3072x768 and 768x3072, 90% sparse at random in blocks of 64, 50432 tokens, bfloat16, in groups as
``packing`` makes them. *Predicted, not measured*: with 2.9 TB/s of device memory, ``packing.L2_BYTES`` a second from
the L2 cache to the multiprocessors of an H100, and 650 TFLOP/s.

    ================================  =============================  ===================================
    kilobytes a token                 one by one, 128 tokens a tile  fused, 128 tokens a tile
    ================================  =============================  ===================================
    device memory: x and y            3.1                            3.1
    device memory: hidden activations 12.3                           0 to 11.3 (95 MB of scratch memory)
    L2: activations read              12.3                           11.9
    L2: weights read                  8.6                            8.2
    L2: written                       7.7                            7.2
    ================================  =============================  ===================================
    microseconds by device memory     267                            53 to 249
    microseconds by L2                262                            250
    microseconds by tensor cores      81                             79
    ================================  =============================  ===================================

So fusing takes the load off device memory, and L2 is the bound then, as it nearly was before: the gain to expect is
between none and a tenth in bfloat16 with blocks of 64, and more where both bounds were met at once and got into each
other's way; more with blocks of 128 (267 to 143 microseconds), whose activations are read less often. None is to be
expected with small blocks (609 microseconds by L2 in blocks of 16, either way), nor in float32 (549 to 584, as its
tiles are shorter). A larger gain needs activations that stay in shared memory while blocks stream by, which takes
shared memory indexed at run time: not in Triton. Two other ways were tried or counted: all 768 sums of a tile in
registers, without any scratch memory, spill more than a kilobyte a thread (compiled); products of hidden blocks added
to y by atomics move ten times the bytes (counted).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from . import parameters as tuned
from .epilogue import INTERPRETED, activate, multiply_add
from .packing import Packed

REGISTERS = 64 * 1024
"""Of a multiprocessor, from compute capability 8.0 on."""

LEAST_REGISTERS = 48
"""A thread needs so many whatever its sums are: with 32 the assembler gives up."""


class Schedule(NamedTuple):
    """What to do for one layer, in which order; made once for its pattern of blocks.

    A layer is computed group by group (``packing``), a group in steps that each read a tile's length in K: a piece of a
    block, or several narrow blocks side by side. The result of group ``i`` here are the columns ``i * G * b`` and on.

    Attributes:
        steps: int32 ``(steps + 1, 2)``, group by group: the first entry of the packed weight to multiply with, and the
            group that is complete then, or -1. The last row is read ahead of its time and never used.
        columns: int32 ``(steps + 1, J)``: which block columns of the input these entries are for; -1 where there are
            fewer.
        empty: int32 ``(empty groups,)``: groups without entries, which get the bias alone.
        rows: int32 ``(groups, G)``: the block rows of each group, and so the blocks of the bias; -1 where it has fewer.
    """

    steps: Tensor
    columns: Tensor
    empty: Tensor
    rows: Tensor


def joined(block_size: int, dtype: torch.dtype) -> int:
    """How many blocks a step takes: as many as fill a tile's length in K."""
    return max(1, tuned.TILE_BYTES // (block_size * dtype.itemsize))


def schedules(first: Packed, second: Packed) -> tuple[Schedule, Schedule]:
    """Of a layer and the one that follows. Hidden groups of which the second reads nothing are left out.

    Waits for the device: for conversion, not for every call.
    """
    device, b = first.values.device, first.values.shape[2]
    rows1, rows2 = (
        torch.arange(len(packed.crow) - 1, device=device).unsqueeze(1) if packed.rows is None else packed.rows.long()
        for packed in (first, second)
    )
    groups1 = torch.isin(rows1, second.col.long()).any(dim=1).nonzero().flatten()
    groups2 = torch.arange(len(rows2), device=device)
    place = torch.full((int(rows1.max()) + 1,), -1, device=device)  # of each block row among the hidden columns
    kept = rows1[groups1].flatten()
    place[kept[kept >= 0]] = (kept >= 0).nonzero().flatten()
    columns1, columns2 = first.col.long(), place[second.col.long()]
    j = joined(b, first.values.dtype)
    return _schedule(first.crow, columns1, rows1, groups1, j), _schedule(second.crow, columns2, rows2, groups2, j)


def _schedule(crow: Tensor, columns: Tensor, rows: Tensor, groups: Tensor, joined: int) -> Schedule:
    """Of one layer: ``columns`` says where each entry's input lies, ``groups`` which groups to do, in which order."""
    starts, ends = crow.long()[groups], crow.long()[groups + 1]
    counts = (ends - starts + joined - 1) // joined
    group = torch.arange(len(groups), device=groups.device).repeat_interleave(counts)
    nth = torch.arange(len(group), device=groups.device) - (counts.cumsum(0) - counts)[group]
    entry = starts[group] + joined * nth
    entries = entry.unsqueeze(1) + torch.arange(joined, device=groups.device)
    there = entries < ends[group].unsqueeze(1)
    steps = torch.stack([entry, torch.where(nth == counts[group] - 1, group, -1)], dim=1)
    columns = torch.where(there, columns[torch.where(there, entries, 0)], -1)
    return Schedule(
        F.pad(steps, (0, 0, 0, 1)).int(),
        F.pad(columns, (0, 0, 0, 1)).int(),
        (counts == 0).nonzero().flatten().int(),
        rows[groups].int(),
    )


@triton.jit
def _finish(
    total,
    y,
    inside,
    group,
    rows_ptr,
    bias_ptr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Write the output of a group, of which ``total`` holds the sums of products: bias, activation, rounding."""
    n = tl.arange(0, ROWS)
    row = tl.load(rows_ptr + group * (ROWS // COLS) + (n // COLS if ROWS > COLS else 0))
    feature = row * COLS + n % COLS
    real = (feature >= 0) & (feature < FEATURES)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + feature, mask=real, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = y.dtype.element_ty
    total = activate(total, ACTIVATION, dtype == tl.float32).to(dtype)
    if inside is None:
        tl.store(y + group * ROWS + n[None, :], total)
    else:
        tl.store(y + feature[None, :], total, mask=inside & real[None, :])


@triton.jit
def _layer(
    x,  # (BLOCK_M, 1): where each token's input begins
    stride_f,
    y,  # (BLOCK_M, 1): where its output does
    inside,  # (BLOCK_M, 1): which tokens there are, to put features in their places; None: all, in the groups' order
    steps_ptr,
    steps,
    columns_ptr,
    empty_ptr,
    empty,
    rows_ptr,
    values_ptr,
    bias_ptr,
    IN_FEATURES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One layer for one tile of tokens: see ``Schedule``."""
    PIECES: tl.constexpr = max(COLS // BLOCK_K, 1)
    JOINED: tl.constexpr = max(BLOCK_K // COLS, 1)
    n, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    which = k // COLS if JOINED > 1 else 0
    total = tl.zeros((BLOCK_M, ROWS), tl.float32)
    # Indices are read a step ahead: the loads that they lead to are then pipelined as in a dense product.
    column = tl.load(columns_ptr + which)
    entry = tl.load(steps_ptr)
    complete = tl.load(steps_ptr + 1)
    for i in tl.range(steps * PIECES, num_stages=STAGES):
        within = k % COLS if JOINED > 1 else i % PIECES * BLOCK_K + k
        feature = column * COLS + within
        x_tile = x + (feature.to(tl.int64) * stride_f)[None, :]
        w_tile = values_ptr + (entry + which).to(tl.int64) * (ROWS * COLS)
        w_tile = (w_tile + within)[:, None] + (n * COLS)[None, :]
        if JOINED > 1:
            there = column >= 0
            w = tl.load(w_tile, mask=there[:, None], other=0.0)
            if IN_FEATURES % COLS != 0:
                there = there & (feature < IN_FEATURES)
            a = tl.load(x_tile, mask=there[None, :], other=0.0)
        else:
            w = tl.load(w_tile)
            if IN_FEATURES % COLS != 0:
                a = tl.load(x_tile, mask=(feature < IN_FEATURES)[None, :], other=0.0)
            else:
                a = tl.load(x_tile)
        total = multiply_add(a, w, total, PRECISION)
        if (complete >= 0) & (i % PIECES == PIECES - 1):
            _finish(total, y, inside, complete, rows_ptr, bias_ptr, FEATURES, ROWS, COLS, ACTIVATION)
            total = tl.zeros((BLOCK_M, ROWS), tl.float32)
        following = (i + 1) // PIECES
        column = tl.load(columns_ptr + following * JOINED + which)
        entry = tl.load(steps_ptr + following * 2)
        complete = tl.load(steps_ptr + following * 2 + 1)
    for i in tl.range(empty, num_stages=1):
        nothing = tl.zeros((BLOCK_M, ROWS), tl.float32)
        _finish(nothing, y, inside, tl.load(empty_ptr + i), rows_ptr, bias_ptr, FEATURES, ROWS, COLS, ACTIVATION)


@triton.jit(do_not_specialize=["tokens", "steps1", "empty1", "steps2", "empty2"])
def mlp_kernel(
    x_ptr,
    stride_t,
    stride_f,
    tokens,
    steps1_ptr,
    steps1,
    columns1_ptr,
    empty1_ptr,
    empty1,
    rows1_ptr,
    values1_ptr,
    bias1_ptr,
    steps2_ptr,
    steps2,
    columns2_ptr,
    empty2_ptr,
    empty2,
    rows2_ptr,
    values2_ptr,
    bias2_ptr,
    scratch_ptr,
    hidden,
    y_ptr,
    IN_FEATURES: tl.constexpr,
    HIDDEN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    ROWS1: tl.constexpr,
    ROWS2: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION1: tl.constexpr,
    ACTIVATION2: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Both layers, for every so many tiles of tokens as there are programs."""
    row = tl.arange(0, BLOCK_M)[:, None]
    slice_rows = scratch_ptr + (tl.program_id(0).to(tl.int64) * BLOCK_M + row) * hidden
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.num_programs(0), num_stages=1):
        token = tile * BLOCK_M + row
        # Past the last token it is read again: no mask at every load.
        x_rows = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64) * stride_t
        _layer(
            x_rows, stride_f, slice_rows, None,
            steps1_ptr, steps1, columns1_ptr, empty1_ptr, empty1, rows1_ptr, values1_ptr, bias1_ptr,
            IN_FEATURES, HIDDEN_FEATURES, ROWS1, COLS, BLOCK_M, BLOCK_K, ACTIVATION1, PRECISION, STAGES,
        )  # fmt: skip
        # Each half reads what other threads of this program wrote, or overwrites what they read; no other program does.
        tl.debug_barrier()
        y_rows = y_ptr + token.to(tl.int64) * OUT_FEATURES
        _layer(
            slice_rows, 1, y_rows, token < tokens,
            steps2_ptr, steps2, columns2_ptr, empty2_ptr, empty2, rows2_ptr, values2_ptr, bias2_ptr,
            COLS, OUT_FEATURES, ROWS2, COLS, BLOCK_M, BLOCK_K, ACTIVATION2, PRECISION, STAGES,
        )  # fmt: skip
        tl.debug_barrier()


def launch(
    x: Tensor,
    first: Schedule,
    values1: Tensor,
    bias1: Tensor | None,
    second: Schedule,
    values2: Tensor,
    bias2: Tensor | None,
    *,
    sizes: tuple[int, int],
    activations: tuple[str | None, str | None],
    precision: str,
    parameters: Mapping[str, int],
) -> Tensor:
    """``act2(act1(x @ W1.T + b1) @ W2.T + b2)`` ``(tokens, out_features)``, contiguous, in ``x``'s dtype.

    Reads nothing back: no wait for the device. Scratch memory comes from PyTorch's allocator, as many bytes in every
    call: hidden features times ``BLOCK_M`` tokens for each program.

    Args:
        x: ``(tokens, in_features)``, any strides, at least one token.
        first: the first layer's schedule.
        values1: its packed values ``(entries, G * b, b)``, contiguous, in ``x``'s dtype; powers of two from 16 on.
        bias1: ``(hidden_features,)``, contiguous, any dtype; or None.
        second: as ``first``, ``values2`` as ``values1``, ``bias2`` ``(out_features,)`` as ``bias1``.
        sizes: ``(hidden_features, out_features)``; like ``in_features``, they are those before padding.
        activations: of either layer: None, ``"gelu"`` or ``"gelu_tanh"``.
        precision: how float32 is multiplied: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``; other dtypes ignore it.
        parameters: see ``default_parameters``.
    """
    tokens, (rows1, cols), rows2 = x.shape[0], values1.shape[1:], values2.shape[1]
    block_m, width = parameters["BLOCK_M"], first.rows.shape[0] * rows1
    programs = parameters["PROGRAMS"] * (1 if INTERPRETED else tuned.resources(x.device)["multiprocessors"])
    scratch = x.new_empty(programs, block_m, width)
    y = x.new_empty(tokens, sizes[1])
    with torch.cuda.device_of(x):
        mlp_kernel[(min(programs, triton.cdiv(tokens, block_m)),)](
            x, x.stride(0), x.stride(1), tokens,
            first.steps, first.steps.shape[0] - 1, first.columns, first.empty, first.empty.shape[0], first.rows,
            values1, bias1,
            second.steps, second.steps.shape[0] - 1, second.columns, second.empty, second.empty.shape[0], second.rows,
            values2, bias2,
            scratch, width, y,
            IN_FEATURES=x.shape[1],
            HIDDEN_FEATURES=sizes[0],
            OUT_FEATURES=sizes[1],
            ROWS1=rows1,
            ROWS2=rows2,
            COLS=cols,
            BLOCK_M=block_m,
            BLOCK_K=tuned.TILE_BYTES // x.element_size(),
            ACTIVATION1=activations[0],
            ACTIVATION2=activations[1],
            PRECISION=precision,
            STAGES=parameters["num_stages"],
            num_warps=parameters["num_warps"],
            maxnreg=max_registers(parameters),
            enable_fp_fusion=True,  # Triton's default, which 3.9 warns of when it is not said
        )  # fmt: skip
    return y


def max_registers(parameters: Mapping[str, int]) -> int:
    """Registers that a thread may use so that as many programs run at once as ``parameters`` ask for."""
    return min(255, REGISTERS // (parameters["PROGRAMS"] * 32 * parameters["num_warps"]))


def fits(parameters: Mapping[str, int], height: int, itemsize: int, shared: int) -> bool:
    """Whether launch parameters suit groups of ``height`` outputs: shared memory and registers, by count."""
    block_k = tuned.TILE_BYTES // itemsize
    memory = tuned.shared_bytes(parameters["BLOCK_M"], height, block_k, parameters["num_stages"], itemsize)
    sums = parameters["BLOCK_M"] * height // (32 * parameters["num_warps"])
    return memory <= shared and max_registers(parameters) >= max(LEAST_REGISTERS, 2 * sums)


def default_parameters(height: int, itemsize: int, shared: int) -> dict[str, int]:
    """Launch parameters for a GPU that nothing was tuned on: by counting and by what the compiler says; unmeasured.

    ``BLOCK_M`` tokens a tile, ``PROGRAMS`` a multiprocessor, ``num_warps`` and ``num_stages``. A long tile reads the
    weights less often; how long it can be is a matter of registers. On an H100 as many programs run at once as are
    asked for, and none spills.

    Args:
        height: outputs of a group, in the layer where they are more.
        itemsize: bytes of a number.
        shared: bytes of shared memory that a program can have.
    """
    emulated = itemsize == 4  # three products in TF32 keep parts of x in registers
    block_m, stages = (64, 3) if emulated else (128, 4)
    programs = 1 if height > 64 else 2
    while stages > 1 and tuned.shared_bytes(block_m, height, tuned.TILE_BYTES // itemsize, stages, itemsize) > shared:
        stages -= 1
    warps = 4 if emulated and height <= 64 else 8
    return {"BLOCK_M": block_m, "PROGRAMS": programs, "num_warps": warps, "num_stages": stages}


def key(sizes: tuple[int, int], tokens: int, block_size: int, dtype: torch.dtype, nnz: int, precision: str) -> dict:
    """What launch parameters depend on: the first layer's ``sizes`` ``(in, hidden)`` before padding, and its blocks."""
    in_features, hidden = (-(-size // block_size) * block_size for size in sizes)
    return tuning.key(hidden, in_features, tokens, block_size, dtype, nnz, precision)


@tuning.remembered
def _parameters(
    device: torch.device,
    sizes: tuple[int, int],
    tokens: int,
    block_size: int,
    dtype: torch.dtype,
    nnz: int,
    precision: str,
    height: int,
) -> Mapping[str, int]:
    """Tuned for this GPU, else by rule."""
    entry = tuning.nearest(_suiting(device, height, dtype), key(sizes, tokens, block_size, dtype, nnz, precision))
    if entry is not None:
        return entry["parameters"]
    return default_parameters(height, dtype.itemsize, tuned.resources(device)["shared"])


def _suiting(device: torch.device, height: int, dtype: torch.dtype) -> list[tuning.Entry]:
    """What was tuned, but for lower groups, those of a sparser weight, if it takes more than there is for these."""
    shared = tuned.resources(device)["shared"]
    return [e for e in tuning.entries(device, tuned.MLP) if fits(e["parameters"], height, dtype.itemsize, shared)]


def min_tokens(
    device: torch.device, sizes: tuple[int, int], block_size: int, dtype: torch.dtype, nnz: int, height: int
) -> int:
    """From how many tokens on one kernel is worth it, for layers with these ``sizes``: see ``key``.

    The smallest number that tuning found it faster for than the layers one by one; more than there can be, if it never
    was. Where nothing was tuned, only where the count above promises a gain, in half precision with blocks of 64 or
    more, and from two tiles for every multiprocessor on: with fewer a last round leaves many without work, while the
    layers one by one would share a tile's block rows out among them.
    """
    wanted = key(sizes, 1, block_size, dtype, nnz, tuned.precision(dtype))
    alike = ("block_size", "dtype", "in_features", "out_features")
    entries = _suiting(device, height, dtype)
    entries = [e for e in entries if all(e["key"][name] == wanted[name] for name in alike)]
    if not entries:
        promising = dtype.itemsize == 2 and block_size >= 64
        return 2 * 128 * tuned.resources(device)["multiprocessors"] if promising else sys.maxsize
    faster = [e["key"]["tokens"] for e in entries if e["default_ms"] is None or e["ms"] < e["default_ms"]]
    return min(faster, default=sys.maxsize)


@torch.library.custom_op("blockvit::triton_mlp", mutates_args=())
def mlp(
    x: Tensor,
    steps1: Tensor,
    columns1: Tensor,
    empty1: Tensor,
    rows1: Tensor,
    values1: Tensor,
    bias1: Tensor | None,
    steps2: Tensor,
    columns2: Tensor,
    empty2: Tensor,
    rows2: Tensor,
    values2: Tensor,
    bias2: Tensor | None,
    nnz: int,
    hidden_features: int,
    out_features: int,
    activation1: str | None,
    activation2: str | None,
) -> Tensor:
    """``launch`` with launch parameters for this device and the precision that PyTorch is set to.

    ``nnz`` is the number of the first layer's blocks, by which parameters are looked up. Inference only.
    """
    (height, block_size), precision = values1.shape[1:], tuned.precision(x.dtype)
    like = (x.shape[1], hidden_features), x.shape[0], block_size, x.dtype, nnz, precision
    return launch(
        x,
        Schedule(steps1, columns1, empty1, rows1),
        values1,
        bias1,
        Schedule(steps2, columns2, empty2, rows2),
        values2,
        bias2,
        sizes=(hidden_features, out_features),
        activations=(activation1, activation2),
        precision=precision,
        parameters=_parameters(x.device, *like, max(height, values2.shape[1])),
    )


@mlp.register_fake
def _(x, *rest) -> Tensor:
    out_features = rest[-3]
    return x.new_empty(x.shape[0], out_features)


def _refuse_gradients(ctx, grad: Tensor) -> None:
    raise RuntimeError(
        "the fused block-sparse MLP has no gradients: it does not keep its hidden activations. Call it through "
        "blockvit.BlockSparseMLP, which runs the two layers one by one where a gradient is asked for"
    )


mlp.register_autograd(_refuse_gradients)
