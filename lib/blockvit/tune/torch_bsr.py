"""The search that PyTorch has for its own BSR kernel, made short enough to be run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..kernels import torch_tuned
from ..kernels.torch_bsr import bsr_limits, bsr_tensor, pad_tokens
from . import search
from .cases import Case, expected, held_to, make_operands
from .search import REP_MS, WARMUP_MS, Found, timed

UNROLLED = 64
"""Sums of a float32 tile a thread, in the search for PyTorch's kernel: it unrolls them into single multiply-adds, and
with 128 one candidate compiles for ten seconds or minutes, which no time limit can interrupt."""


def find(case: Case, device: torch.device) -> Found | None:
    """PyTorch's own search for a case: the best parameters with their time, or None if none work.

    Ends with the best so far after ``SEARCH_SECONDS``.
    """
    if bsr_limits("PyTorch's Triton BSR kernels", case.dtype, case.block_size):
        return None
    from torch.sparse._triton_ops import bsr_dense_addmm_meta
    from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm

    x, matrix, bias = make_operands(case, device)
    x = pad_tokens(x, case.block_size)
    rows, cols = matrix.padded_shape
    wanted = expected(x, [(matrix, bias, None)])
    weight = bsr_tensor(matrix.crow_indices, matrix.col_indices, matrix.values, rows, cols)
    y = x.new_empty(x.shape[0], rows)
    with short_benchmarks(seconds=search.SEARCH_SECONDS), quick_to_compile():
        # The same views as in `torch_tuned.launch`; `force`, because it returns PyTorch's own A100 parameters at once.
        found = tune_bsr_dense_addmm(
            bias.unsqueeze(1).expand(-1, x.shape[0]), weight, x.t(), beta=1, alpha=1, out=y.t(), store=False, force=True
        )
    default = bsr_dense_addmm_meta(
        rows,
        cols,
        x.shape[0],
        case.block_size,
        case.block_size,
        1,
        1,
        sparsity=round(matrix.sparsity, 2),
        dtype=x.dtype,
    )

    def measured(meta: dict[str, int]) -> Found | None:
        # None for big float32 blocks, or more stages than fit into shared memory.
        ms = timed(lambda: torch_tuned.launch(x, weight, bias, meta), wanted, held_to(case.dtype))
        return None if ms is None else Found({name: int(value) for name, value in meta.items()}, ms, None)

    best, plain = measured(found) if found else None, measured(default)
    if best is None or (plain is not None and plain.ms < best.ms):
        best = plain  # the search's short timings are noisy: what it found is kept only where it is no slower
    return None if best is None else Found(best.parameters, best.ms, plain.ms if plain is not None else None)


@contextmanager
def short_benchmarks(
    warmup: int = WARMUP_MS,
    rep: int = REP_MS,
    *,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[None]:
    """Let ``triton.testing.do_bench`` warm up and repeat for so many milliseconds, whatever its caller asks for.

    PyTorch's search asks for 500 and 100, hard-coded, for each of a hundred or more sets of parameters: minutes a case,
    most of it warm-up of a GPU that is warm. There is no other way to shorten it, and nothing else may run meanwhile.
    After ``seconds`` nothing is compiled and timed any more: a ``RuntimeError``, by which the search, which goes on
    past what fails, comes to its end with the best so far.
    """
    import triton.testing

    original, end = triton.testing.do_bench, clock() + seconds

    def do_bench(fn: Callable[[], Any], **options: Any) -> Any:
        if clock() >= end:
            raise RuntimeError("time is up")
        return original(fn, **{**options, "warmup": warmup, "rep": rep})

    triton.testing.do_bench = do_bench
    try:
        yield
    finally:
        triton.testing.do_bench = original


@contextmanager
def quick_to_compile() -> Iterator[None]:
    """Let PyTorch's search, which goes on past what fails, leave out float32 tiles of more than ``UNROLLED`` sums."""
    import torch.sparse._triton_ops as ops

    original = ops.bsr_dense_addmm

    def bsr_dense_addmm(
        added: Tensor, bsr: Tensor, dense: Tensor, *, meta: Mapping[str, int], **options: Any
    ) -> Tensor:
        tile = bsr.values().shape[-1] * dense.shape[-1] // meta["SPLIT_N"]
        if dense.dtype == torch.float32 and tile > UNROLLED * 32 * meta["num_warps"]:
            raise RuntimeError(f"{tile} sums in {meta['num_warps']} warps take too long to compile")
        return original(added, bsr, dense, meta=meta, **options)

    ops.bsr_dense_addmm = bsr_dense_addmm
    try:
        yield
    finally:
        ops.bsr_dense_addmm = original
