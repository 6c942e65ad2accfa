"""Variants of one computation: what each backend can run, and how a group of them is built, checked and timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import semi_structured
from ..agreement import check_close, poison
from ..bench import DTYPES, Effort, failed_row, interleave, timing_row
from ..clocks import Clock
from ..convert import to_block_sparse
from ..kernels import named
from ..mlp import BlockSparseMLP

DENSE_TOO = "+dense"
"""Behind a backend's name: the layers that stay dense run on it as well (``to_block_sparse(dense_backend=...)``), and
behind ``"cpu"`` attention on our kernel."""


FUSED_MLP = "+mlp"
"""Behind a backend's name: the two layers of an MLP run as one kernel (``to_block_sparse(fuse_mlp=...)``)."""


TF32_ONLY = ("blksprs",)
"""Backends that multiply float32 as TF32 whatever the user allows: none would keep within the tolerance of fp32."""


def convert(model: nn.Module, name: str, block_size: int) -> nn.Module:
    """``model``, which holds zero blocks, on the contender ``name``, in place; returns it.

    Raises:
        RuntimeError: its MLPs were to run as one kernel each, and one does not.
    """
    backend, fuse = backend_of(name), name.endswith(FUSED_MLP)
    dense_backend = backend if name.endswith(DENSE_TOO) else None
    model = to_block_sparse(model, block_size, backend, dense_backend=dense_backend, fuse_mlp=fuse)
    fused = [module for module in model.modules() if isinstance(module, BlockSparseMLP)]
    if fuse and (not fused or any(module.min_tokens is None for module in fused)):
        raise RuntimeError("not every MLP runs as one kernel: see blockvit.BlockSparseMLP for when it does")
    for module in fused:
        module.min_tokens = 0  # also where it is expected to be slower: that is to be measured
    return model


def backend_of(name: str) -> str:
    """The backend of a contender's name, without what stands behind a ``+``."""
    return name.partition("+")[0]


def refusal(name: str, device: torch.device, precision: str, block_size: int) -> str | None:
    """Why a contender cannot run such weights there, or None; an unknown name raises ``ValueError``."""
    backend, plus, how = name.partition("+")
    if plus and plus + how not in (DENSE_TOO, FUSED_MLP):
        raise ValueError(
            f"{name!r} ends in {plus + how!r}; expected {DENSE_TOO!r}, {FUSED_MLP!r}, or a backend's name alone"
        )
    if plus + how == FUSED_MLP and backend != "triton":
        return "only the backend 'triton' runs an MLP as one kernel"
    if backend in TF32_ONLY and precision == "fp32":
        return f"{backend} multiplies float32 as TF32 only, which is the class tf32"
    return named(backend).refusal(device, DTYPES[precision], block_size)


def runnable(backends: Iterable[str], device: torch.device, precision: str, block_size: int) -> list[str]:
    """Those of ``backends`` that can run here; unknown names raise, and so does the baseline's."""
    able = []
    for name in backends:
        if name == "dense":
            raise ValueError("backend 'dense' is the baseline that every case measures; leave it out of `backends`")
        if refusal(name, device, precision, block_size) is None:
            able.append(name)
    return able


def refusals(
    names: Iterable[str], device: torch.device | str, precisions: Iterable[str], block_sizes: Iterable[int]
) -> list[str]:
    """A line for each reason why some of these cells cannot be measured, with the cells that it holds for."""
    device = torch.device(device)
    cells: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, precision, block_size in itertools.product(dict.fromkeys(names), precisions, block_sizes):
        if name == semi_structured.BACKEND:
            reason = semi_structured.refusal(device, DTYPES[precision])
        else:
            reason = refusal(name, device, precision, block_size)
        if reason:
            cells.setdefault((name, reason), []).append((precision, block_size))
    return [
        f"not measured: {name} in {', '.join(dict.fromkeys(p for p, _ in held))}, blocks of "
        f"{', '.join(str(b) for b in dict.fromkeys(b for _, b in held))}: {reason}"
        for (name, reason), held in cells.items()
    ]


def latency_key(precision: str, seed: int, **columns: Any) -> dict[str, Any]:
    """The key columns of an eager variant's latency; ``columns`` add to them or say otherwise."""
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    common = {"dtype": dtype, "precision": precision, "compile": "eager", "seed": seed, "metric": "latency"}
    return common | columns


@dataclass(frozen=True)
class Variant:
    """One way to compute a case's result.

    ``build`` makes it and gives the call to time; ``expected`` gives what the call must return, within the tolerance
    of the precision class. The first variant of a group is the baseline, which has nothing to be compared with.
    """

    key: dict[str, Any]
    build: Callable[[], Callable[[], Tensor]]
    expected: Callable[[], Tensor] | None = None

    def __str__(self) -> str:
        told = ("backend", "model", "scope", "precision", "batch_size", "tokens", "block_size", "sparsity", "compile")
        return ", ".join(f"{name} {self.key[name]}" for name in told if self.key.get(name) is not None)


def measure_group(
    variants: Sequence[Variant], precision: str, clock: Clock, effort: Effort, *, tails: bool = False
) -> tuple[list[dict[str, Any]], dict[int, Callable[[], Tensor]]]:
    """Build, check and time ``variants`` interleaved; gives their rows, and the calls by the variant's place.

    A variant that raises or computes something else costs its own row only, which then says that it failed: kernels
    of others may lack memory, a size or a precision. The baseline must run, so its errors are raised. What is not run
    eagerly has no row if ``effort.deadline`` has passed before it is built: a later run measures it. ``tails`` adds
    rows of the 90th and the 99th percentile.
    """
    calls: dict[int, Callable[[], Tensor]] = {}
    failed = []
    for place, variant in enumerate(variants):
        if variant.key.get("compile", "eager") != "eager" and time.perf_counter() >= effort.deadline:
            continue
        try:
            call = variant.build()
            if variant.expected is None:
                call()
            else:
                expected = variant.expected()
                poison(expected)
                check_close(call(), expected, precision, f"backend {variant.key['backend']!r}")
            calls[place] = call
        except Exception as error:
            if place == 0:
                raise
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises if the GPU is lost to this process: no fault of what comes next
            failed.append(failed_row(error, str(variant), **variant.key))
    timings = interleave({str(place): call for place, call in calls.items()}, clock=clock, effort=effort)
    rows = []
    for place in calls:
        key, timing = variants[place].key, timings[str(place)]
        rows.append(timing_row(timing, **key))
        for percent in TAILS if tails else ():
            value, repeats = float(np.quantile(timing.samples, percent / 100)), len(timing.samples)
            rows.append({**key, "metric": tail_metric(percent), "value": value, "unit": "s", "repeats": repeats})
    return rows + failed, calls


TAILS = (90, 99)
"""Percentiles of a distribution of latencies that have rows of their own, besides the median."""


def tail_metric(percent: int) -> str:
    """What the tables call a percentile of the latency."""
    return f"latency_p{percent}"
