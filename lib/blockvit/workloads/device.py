"""What a device can do at best, and what it takes to find launch parameters for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import tune
from ..bench import DTYPES, Effort, failed_row, interleave, precision_class
from ..clocks import clock_for
from ..kernels import cpu, torch_tuned, tuning


def fewer_threads(counts: Iterable[int]) -> Iterator[int]:
    """Set PyTorch's number of threads to each of ``counts`` that is smaller, and yield it; at last restore it."""
    everyone = torch.get_num_threads()
    try:
        for count in counts:
            if count < everyone:
                torch.set_num_threads(count)
                yield count
    finally:
        torch.set_num_threads(everyone)


@dataclass(frozen=True)
class CeilingCase:
    """What the device can do at best: a large dense matrix product, and copying memory."""

    precision: str = "fp32"
    size: int | None = None
    """Of the square matrices; None: large enough to reach the peak of the device's kind."""
    copy_bytes: int | None = None
    """None: several times what the caches of the device's kind hold."""

    def _size(self, device: torch.device) -> int:
        return self.size or (8192 if device.type == "cuda" else 2048)

    def _key(self, device: torch.device, metric: str, unit: str) -> dict[str, Any]:
        size = self._size(device)
        return {
            "model": {"copy_bandwidth": "copy", "fma_throughput": "registers"}.get(metric, f"{size}x{size}"),
            "dtype": str(DTYPES[self.precision]).removeprefix("torch."),
            "precision": self.precision,
            "backend": "dense",
            "metric": metric,
            "unit": unit,
        }

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        keys = [self._key(device, "matmul_throughput", "FLOP/s"), self._key(device, "copy_bandwidth", "B/s")]
        return keys + ([self._key(device, "fma_throughput", "FLOP/s")] if self._has_fma(device) else [])

    def _has_fma(self, device: torch.device) -> bool:
        """Whether our own kernel can tell what multiply-adds in registers reach: a roof for any kernel."""
        return self.precision in ("fp32", "bf16") and cpu.CPU.refusal(device, DTYPES[self.precision], 16) is None

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``.

        On a GPU for half a second at least: one that was idle takes a while to reach its clock, and this comes first.
        """
        if device.type == "cuda":
            effort = replace(effort, seconds=max(effort.seconds, 0.5), max_repeats=max(effort.max_repeats, 200))
        size = self._size(device)
        copied = self.copy_bytes or (1 << 30 if device.type == "cuda" else 1 << 28)
        with precision_class(self.precision, device) as dtype:
            # Random numbers: on zeros a GPU's matrix units run faster, because fewer bits flip.
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            source = torch.randn(copied // 4, device=device)
            target = torch.empty_like(source)
            calls = {"matmul_throughput": lambda: a @ b, "copy_bandwidth": lambda: target.copy_(source)}
            timings = interleave(calls, clock=clock_for(device), effort=effort)
        work = {"matmul_throughput": 2 * size**3, "copy_bandwidth": 2 * copied}
        units = {"matmul_throughput": "FLOP/s", "copy_bandwidth": "B/s"}
        fma = {"value": cpu.peak_flops(dtype), "repeats": 1} if self._has_fma(device) else None
        rows = [{**self._key(device, "fma_throughput", "FLOP/s"), **fma}] if fma else []
        return rows + [
            {
                **self._key(device, metric, units[metric]),
                "value": work[metric] / timing.median,
                "low": work[metric] / timing.high,
                "high": work[metric] / timing.low,
                "repeats": len(timing.samples),
            }
            for metric, timing in timings.items()
        ]


@dataclass(frozen=True)
class TuningCase:
    """Finding the parameters that a kernel runs fastest with, for one product; kept with the package.

    What the package has tuned for this GPU already is not tuned again, so it has no row either.
    """

    case: tune.Case
    backend: str = torch_tuned.NAME
    precision: str = "fp32"
    """Which class of the case's dtype: our own kernel multiplies float32 in another way where TF32 is allowed."""

    def _key(self) -> dict[str, Any]:
        return {
            "model": f"{self.case.out_features}x{self.case.in_features}",
            "scope": "linear",
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "precision": self.precision,
            "tokens": self.case.tokens,
            "block_size": self.case.block_size,
            "sparsity": self.case.sparsity,
            "backend": self.backend,
            "metric": "tuning_seconds",
        }

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        with precision_class(self.precision, device):
            key = tune.TUNERS[self.backend].key(self.case)
        return [] if tuning.find(tuning.device_name(device), self.backend, key) else [self._key()]

    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``; a search is timed once, however long it takes."""
        try:
            with precision_class(self.precision, device):
                (tuned,) = tune.tune(tune.TUNERS[self.backend], [self.case], device)
        except Exception as error:  # of a search, which others' code takes part in: costs this case only
            return [failed_row(error, str(self.case), **self._key())]
        if tuned.found is None:
            return [failed_row(RuntimeError("no launch parameters work"), str(self.case), **self._key())]
        return [{**self._key(), "value": tuned.seconds, "unit": "s", "repeats": 1}]


def tuning_cases(
    backends: Iterable[str],
    shapes: Iterable[Sequence[int]],
    tokens: Iterable[int],
    block_sizes: Iterable[int],
    sparsity: float,
    precisions: Sequence[str],
) -> list[TuningCase]:
    """Every product of a grid at one sparsity for those of ``backends`` that can be tuned, ordered as ``make_cases``.

    PyTorch's kernel has the same parameters for all precision classes of a dtype.
    """
    classes = {dtype: [p for p in precisions if DTYPES[p] == dtype] for dtype in (DTYPES[p] for p in precisions)}
    cases = tune.make_cases(
        map(tuple, shapes), block_sizes=block_sizes, dtypes=classes, tokens=tokens, sparsities=[sparsity]
    )
    able = [backend for backend in backends if backend in tune.TUNERS]
    return [
        TuningCase(case, backend, precision)
        for case in cases
        for backend in able
        for precision in classes[case.dtype][: 1 if backend == torch_tuned.NAME else None]
    ]
