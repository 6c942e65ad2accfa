"""Going from launch parameters to better ones, and what counts as better."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..agreement import check_close, poison

WARMUP_MS, REP_MS = 25, 50
"""How long one set of parameters is warmed up and timed during the search, in milliseconds; PyTorch has 500 and 100."""

SEARCH_SECONDS = 30
"""After how many a search ends with the best so far: candidates are many, and some take seconds to compile."""

GAIN = 1.02
"""How many times as fast a candidate must be to count as faster: short timings differ by as much without reason."""


@dataclass(frozen=True)
class Found:
    """What a search found: launch parameters, and the median milliseconds with them and with the defaults.

    ``default_ms`` is None if the kernel does not run with its defaults.
    """

    parameters: dict[str, int]
    ms: float
    default_ms: float | None


def timed(call: Callable[[], Tensor], expected: Tensor, precision: str, **effort: int) -> float | None:
    """Median milliseconds of ``call``; None if it does not run, or does not compute ``expected`` each time alike.

    What the compiler or the GPU cannot do costs this candidate only; a GPU that is lost to the process is an error.

    Args:
        call: launches the kernel once.
        expected: the dense result.
        precision: the class that the result is held to, a key of ``agreement.TOLERANCE``.
        effort: ``warmup`` and ``rep`` of ``triton.testing.do_bench``, in milliseconds.
    """
    import triton

    try:
        results = []
        for _ in range(2):
            poison(expected)
            results.append(call())
            check_close(results[-1], expected, precision, "a candidate")
        if not torch.equal(*results):
            return None
        return triton.testing.do_bench(call, return_mode="median", **effort)
    except (triton.TritonError, RuntimeError, ArithmeticError):
        if expected.is_cuda:
            torch.cuda.synchronize(expected.device)
        return None


def descend(
    start: Mapping[str, int],
    neighbours: Callable[[Mapping[str, int]], Iterable[dict[str, int]]],
    measure: Callable[[Mapping[str, int]], float | None],
) -> dict[str, int] | None:
    """What is reached from ``start`` by going to the first neighbour that is faster (by ``GAIN``), until none is.

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
    while faster := next((other for other in neighbours(best) if time_of(best) > GAIN * time_of(other)), None):
        best = faster
    return None if time_of(best) == math.inf else best


def in_time(
    measure: Callable[[Mapping[str, int]], float | None], clock: Callable[[], float] = time.perf_counter
) -> Callable[[Mapping[str, int]], float | None]:
    """``measure`` for ``SEARCH_SECONDS`` from now; then nothing, so that a search ends with the best so far."""
    end = clock() + SEARCH_SECONDS
    return lambda candidate: measure(candidate) if clock() < end else None
