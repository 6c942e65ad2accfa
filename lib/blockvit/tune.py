"""Finding launch parameters for this machine's GPU: ``python -m blockvit.tune``.

One case after the other is searched within a time limit, and what is found is stored at once (``kernels.tuning``),
where the backend reads it. For ``torch_tuned``, PyTorch's BSR kernel, which knows good parameters for a few shapes on
an A100 only, its own search is run, ``torch.sparse._triton_ops_meta.tune_bsr_dense_addmm``; ``triton`` is our kernel.

    python -m blockvit.tune                                          # ViT-B/16's layers, five minutes
    python -m blockvit.tune --backend triton --tokens 50432 197      # our kernel, a large batch and a single image
    python -m blockvit.tune --backend triton_mlp                     # our fused MLP, against the layers one by one
    python -m blockvit.tune --block-sizes 64 --dtypes bfloat16 --tokens 197 --seconds 60

Exit codes: 0 done, as far as the time allowed; 1 no parameters work for a case; 2 wrong arguments; 3 no GPU.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .bsr import BSRMatrix
from .convert import random_block_mask_
from .kernels import resolve, torch_tuned, tuning
from .kernels.torch_bsr import bsr_limits, bsr_tensor, pad_tokens
from .kernels.triton import packing, parameters
from .masks import num_kept

WARMUP_MS, REP_MS = 25, 50
"""How long one set of parameters is warmed up and timed during the search, in milliseconds; PyTorch has 500 and 100."""

SEARCH_SECONDS = 30
"""After how many a search ends with the best so far: candidates are many, and some take seconds to compile."""

UNROLLED = 64
"""Sums of a float32 tile a thread, in the search for PyTorch's kernel: it unrolls them into single multiply-adds, and
with 128 one candidate compiles for ten seconds or minutes, which no time limit can interrupt."""

SHAPES = ((3072, 768), (768, 3072), (768, 768), (2304, 768))
"""``(out, in)`` of ViT-B/16: the MLP first, which has most of the work, then out_proj and qkv."""

TOKENS = 256 * 197
"""A batch of 256 images, as in the published end-to-end measurement."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One product to tune for: a weight of a shape, block size, dtype and sparsity, and a number of tokens."""

    out_features: int
    in_features: int
    tokens: int
    block_size: int
    dtype: torch.dtype
    sparsity: float

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.out_features}x{self.in_features}, {self.tokens} tokens, blocks of {self.block_size}, {dtype}, "
            f"sparsity {self.sparsity:g}"
        )


@dataclass(frozen=True)
class Found:
    """What a search found: launch parameters, and the median milliseconds with them and with the defaults.

    ``default_ms`` is None if the kernel does not run with its defaults.
    """

    parameters: dict[str, int]
    ms: float
    default_ms: float | None


@dataclass(frozen=True)
class Tuned:
    """A case that was searched, and how long that took. ``found`` is None if no parameters work."""

    case: Case
    found: Found | None
    seconds: float

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.case}: no parameters work, {self.seconds:.0f} s"
        ms, default_ms = self.found.ms, self.found.default_ms
        if default_ms is None:
            gain = "where the defaults do not run"
        else:
            gain = f"{default_ms / ms:.2f}x over the defaults' {default_ms:.3f} ms"
        return f"{self.case}: {ms:.3f} ms, {gain}, found in {self.seconds:.0f} s"


def make_cases(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    *,
    block_sizes: Iterable[int] = (64, 32, 16),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    tokens: Iterable[int] = (TOKENS,),
    sparsities: Iterable[float] = (0.9,),
) -> list[Case]:
    """All combinations, for when the time does not suffice for all: each in the given order, most important first.

    Every dtype and block size is done for the first shape before the next shape begins: what a shape lacks is taken
    from the nearest, but a block size or dtype that has nothing cannot run. Within a shape every block size is done in
    the first dtype before the next dtype begins.
    """
    dtypes, sizes = list(dtypes), list(dict.fromkeys(block_sizes))
    return [
        Case(rows, cols, count, size, dtype, sparsity)
        for rows, cols in shapes
        for count in tokens
        for sparsity in sparsities
        for dtype in dtypes
        for size in sizes
    ]


@dataclass(frozen=True)
class Tuner:
    """How the parameters of one backend are found. Any kind of case will do that ``key`` and ``search`` understand."""

    name: str
    """What they are stored under."""
    key: Callable[[Any], dict[str, Any]]
    """The key that a case is stored under."""
    search: Callable[[Any, torch.device], Found | None]
    """What was found for a case on a device, or None if no parameters work."""
    shapes: Sequence[tuple[int, int]] = SHAPES
    """Which are tuned for where none are asked for."""


def tune(
    tuner: Tuner,
    cases: Iterable[Any],
    device: torch.device | str = "cuda",
    *,
    seconds: float | None = None,
    force: bool = False,
    report: Callable[[Tuned], None] = lambda tuned: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Tuned]:
    """Search parameters for ``cases`` in turn, and store each as soon as it is found.

    Args:
        tuner: whose parameters, and how to find them; see ``TUNERS``.
        cases: most important first.
        device: the GPU to run on.
        seconds: begin no further case when so much time has passed; None: do all. The last case may run over it.
        force: search again what has been stored before, instead of leaving it out.
        report: called with each case as soon as it is done.
        clock: seconds.

    Returns:
        What was searched in this call, with the seconds that each case took.
    """
    device = torch.device(device)
    name, start, done = tuning.device_name(device), clock(), []
    for case in cases:
        key = tuner.key(case)
        if not force and tuning.find(name, tuner.name, key):
            continue
        began = clock()
        if seconds is not None and began - start >= seconds:
            break
        found = tuner.search(case, device)
        tuned = Tuned(case, found, clock() - began)
        if found is not None:
            tuning.store(
                name,
                tuner.name,
                key,
                found.parameters,
                ms=found.ms,
                default_ms=found.default_ms,
                seconds=tuned.seconds,
            )
        done.append(tuned)
        report(tuned)
    return done


def tune_torch_bsr(
    cases: Iterable[Case],
    device: torch.device | str = "cuda",
    *,
    search: Callable[[Case, torch.device], Found | None] | None = None,
    **options: Any,
) -> list[Tuned]:
    """``tune`` for PyTorch's BSR kernel; ``search`` is ``search_torch_bsr``, except in tests."""
    return tune(Tuner(torch_tuned.NAME, case_key, search or search_torch_bsr), cases, device, **options)


def case_key(case: Case) -> dict[str, Any]:
    """The key that a case is stored under for PyTorch's kernel."""
    rows, cols, nnz = _padded(case)
    return tuning.key(rows, cols, case.tokens, case.block_size, case.dtype, nnz)


def triton_key(case: Case) -> dict[str, Any]:
    """The key that a case is stored under for our kernel; float32 is another case while TF32 is allowed."""
    rows, cols, nnz = _padded(case)
    precision = parameters.precision(case.dtype)
    return tuning.key(rows, cols, case.tokens, case.block_size, case.dtype, nnz, precision)


def _padded(case: Case) -> tuple[int, int, int]:
    b = case.block_size
    block_rows, block_cols = -(-case.out_features // b), -(-case.in_features // b)
    # As many blocks as `random_block_mask_` leaves.
    return block_rows * b, block_cols * b, num_kept(block_rows * block_cols, case.sparsity)


def search_torch_bsr(case: Case, device: torch.device) -> Found | None:
    """PyTorch's own search for a case: the best parameters with their time, or None if none work.

    Ends with the best so far after ``SEARCH_SECONDS``.
    """
    if bsr_limits("PyTorch's Triton BSR kernels", case.dtype, case.block_size):
        return None
    import triton
    from torch.sparse._triton_ops import bsr_dense_addmm_meta
    from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm

    x, matrix, bias = make_operands(case, device)
    x = pad_tokens(x, case.block_size)
    rows, cols = matrix.padded_shape
    weight = bsr_tensor(matrix.crow_indices, matrix.col_indices, matrix.values, rows, cols)
    y = x.new_empty(x.shape[0], rows)
    with short_benchmarks(seconds=SEARCH_SECONDS), quick_to_compile():
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
        try:
            ms = triton.testing.do_bench(lambda: torch_tuned.launch(x, weight, bias, meta), return_mode="median")
        except triton.TritonError:  # big float32 blocks, or more stages than fit into shared memory
            return None
        return Found({name: int(value) for name, value in meta.items()}, ms, None)

    best, plain = measured(found) if found else None, measured(default)
    if best is None or (plain is not None and plain.ms < best.ms):
        best = plain  # the search's short timings are noisy: what it found is kept only where it is no slower
    return None if best is None else Found(best.parameters, best.ms, plain.ms if plain is not None else None)


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


LEAST_REGISTERS = 48
"""A thread of the fused MLP needs so many whatever its sums are: with 32 the assembler gives up."""

MLP_CHOICES = {
    "BLOCK_M": (32, 64, 128, 256),
    "PROGRAMS": (1, 2, 3, 4),
    "num_warps": (4, 8, 16),
    "num_stages": (2, 3, 4, 5),
}
"""The same of our fused MLP."""


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


def descend(
    start: Mapping[str, int],
    neighbours: Callable[[Mapping[str, int]], Iterable[dict[str, int]]],
    measure: Callable[[Mapping[str, int]], float | None],
) -> dict[str, int] | None:
    """What is reached from ``start`` by going to the first neighbour that is faster, until none is.

    Nothing is measured twice, ``start`` first. None if no time of ``start`` nor of what lies around it can be measured.
    """
    times: dict[tuple[int, ...], float] = {}

    def time_of(candidate: Mapping[str, int]) -> float:
        place = tuple(candidate.values())
        if place not in times:
            ms = measure(candidate)
            times[place] = math.inf if ms is None else ms
        return times[place]

    best = dict(start)
    while faster := next((other for other in neighbours(best) if time_of(best) > time_of(other)), None):
        best = faster
    return None if time_of(best) == math.inf else best


def in_time(
    measure: Callable[[Mapping[str, int]], float | None], clock: Callable[[], float] = time.perf_counter
) -> Callable[[Mapping[str, int]], float | None]:
    """``measure`` for ``SEARCH_SECONDS`` from now; then nothing, so that a search ends with the best so far."""
    end = clock() + SEARCH_SECONDS
    return lambda candidate: measure(candidate) if clock() < end else None


def search_triton(case: Case, device: torch.device) -> Found | None:
    """Parameters of our kernel for a case, the size of its groups among them; None if none work.

    From the defaults to ever better neighbours. To compile one takes a second or two, once in a process for all cases.
    """
    import triton

    from .kernels.triton import linear

    x, matrix, bias = make_operands(case, device)
    b, itemsize, precision = case.block_size, case.dtype.itemsize, parameters.precision(case.dtype)
    resources = parameters.resources(device)
    packed = functools.cache(lambda group: packing.pack(matrix, group))

    def measured(candidate: Mapping[str, int], **effort: int) -> float | None:
        p = packed(candidate["GROUP"])
        too_few_rows = p.values.shape[1] != candidate["GROUP"] * b
        if too_few_rows or p.values.numel() > packing.MEMORY * matrix.values.numel():
            return None
        options = {
            "precision": precision,
            "rows": p.rows,
            "out_features": matrix.padded_shape[0],
            "parameters": {name: value for name, value in candidate.items() if name != "GROUP"},
        }
        try:
            return triton.testing.do_bench(
                lambda: linear.launch(x, p.crow, p.col, p.values, bias, **options), return_mode="median", **effort
            )
        except triton.TritonError:  # it does not compile, or takes more than the GPU has
            return None

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
    if default_ms is not None and default_ms <= ms:
        best, ms = default, default_ms  # the search's short timings are noisy
    return Found(best, ms, default_ms)


def search_mlp(case: Case, device: torch.device) -> Found | None:
    """Parameters of our fused MLP: its first layer is that of the case, its second leads back. None if none work.

    Its default is not to be used: ``default_ms`` is the time of the layers one by one, with what was tuned for them.
    """
    import triton

    from .kernels.triton import mlp

    backend = resolve(parameters.LINEAR, device, case.dtype, case.block_size)
    x, first, bias1 = make_operands(case, device)
    _, second, bias2 = make_operands(
        replace(case, out_features=case.in_features, in_features=case.out_features), device
    )
    weights = [backend.pack(matrix) for matrix in (first, second)]
    packed = [packing.Packed(*map(weight.get, ("crow", "col", "values", "rows"))) for weight in weights]
    height = max(p.values.shape[1] for p in packed)
    precision, shared = parameters.precision(case.dtype), parameters.resources(device)["shared"]
    schedules = mlp.schedules(*packed)

    def fused(candidate: Mapping[str, int]) -> Tensor:
        return mlp.launch(
            x,
            schedules[0],
            packed[0].values,
            bias1,
            schedules[1],
            packed[1].values,
            bias2,
            sizes=(first.padded_shape[0], second.padded_shape[0]),
            activations=("gelu", None),
            precision=precision,
            parameters=candidate,
        )

    def one_by_one() -> Tensor:
        return backend.linear(backend.linear(x, weights[0], bias1, "gelu"), weights[1], bias2, None)

    def time_of(call: Callable[[], Tensor], **effort: int) -> float | None:
        try:
            return triton.testing.do_bench(call, return_mode="median", **effort)
        except triton.TritonError:  # it does not compile, or takes more than the GPU has
            return None

    def fits(candidate: Mapping[str, int]) -> bool:
        tile = candidate["BLOCK_M"], height, parameters.TILE_BYTES // case.dtype.itemsize, candidate["num_stages"]
        sums = candidate["BLOCK_M"] * height // (32 * candidate["num_warps"])
        registers = mlp.max_registers(candidate)
        enough = registers >= LEAST_REGISTERS and registers >= 2 * sums
        return enough and parameters.shared_bytes(*tile, case.dtype.itemsize) <= shared

    best = descend(
        mlp.default_parameters(height, case.dtype.itemsize, shared),
        lambda candidate: filter(fits, neighbours(candidate, MLP_CHOICES)),
        in_time(lambda candidate: time_of(lambda: fused(candidate), warmup=WARMUP_MS, rep=REP_MS)),
    )
    return None if best is None else Found(best, time_of(lambda: fused(best)), time_of(one_by_one))


TUNERS = {
    torch_tuned.NAME: Tuner(torch_tuned.NAME, case_key, lambda case, device: search_torch_bsr(case, device)),
    parameters.LINEAR: Tuner(parameters.LINEAR, triton_key, lambda case, device: search_triton(case, device)),
    parameters.MLP: Tuner(parameters.MLP, triton_key, lambda case, device: search_mlp(case, device), SHAPES[:1]),
}
"""By the name of the backend."""


def make_operands(case: Case, device: torch.device) -> tuple[Tensor, BSRMatrix, Tensor]:
    """Activations ``(tokens, padded in)``, a weight with that many random blocks, and a bias ``(padded out,)``."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(case.out_features, case.in_features, generator=generator)
    random_block_mask_(dense, case.sparsity, case.block_size, generator)
    matrix = BSRMatrix.from_dense(dense.to(device, case.dtype), case.block_size)
    rows, cols = matrix.padded_shape
    x = torch.randn(case.tokens, cols, device=device, dtype=case.dtype)
    return x, matrix, torch.randn(rows, device=device, dtype=case.dtype)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no NVIDIA GPU: torch.cuda.is_available() is False, and kernels are tuned on one", file=sys.stderr)
        return 3
    cases = make_cases(
        options.shapes or TUNERS[options.backend].shapes,
        block_sizes=options.block_sizes,
        dtypes=[DTYPES[name] for name in options.dtypes],
        tokens=options.tokens,
        sparsities=options.sparsity,
    )
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"tuning {options.backend} on {tuning.device_name(device)}: {len(cases)} cases, {options.seconds:g} s")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    done = tune(
        TUNERS[options.backend],
        cases,
        device,
        seconds=options.seconds,
        force=options.force,
        report=lambda tuned: print(tuned, flush=True),
    )
    print(f"{len(done)} of {len(cases)} cases searched; parameters are in {tuning.path(tuning.device_name(device))}")
    return 1 if any(tuned.found is None for tuned in done) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockvit.tune", description="Find launch parameters of the block-sparse kernels for this GPU."
    )
    parser.add_argument("--backend", default=torch_tuned.NAME, choices=list(TUNERS), help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="OUTxIN", help="default: ViT-B/16's, e.g. 3072x768")
    parser.add_argument("--block-sizes", nargs="+", type=_block_size, default=[64, 32, 16], metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    parser.add_argument(
        "--tokens", nargs="+", type=_positive, default=[TOKENS], metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--sparsity", nargs="+", type=_fraction, default=[0.9], metavar="S", help="default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="begin no further case after this time (default: %(default)s)"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="allow TF32: float32 of the backend triton is tuned for that instead"
    )
    parser.add_argument("--force", action="store_true", help="search again what is in the file already")
    return parser


def _shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    try:
        return _positive(rows), _positive(cols)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected OUTxIN, e.g. 3072x768") from None


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; expected at least 1")
    return number


def _block_size(text: str) -> int:
    if (number := int(text)) < 16 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"{text} is no block size of these kernels; expected 16, 32, 64 or 128")
    return number


def _fraction(text: str) -> float:
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no sparsity; expected at least 0 and below 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
