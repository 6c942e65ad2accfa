"""Timing: one timer, one way to sweep.

Variants that are to be compared are measured interleaved, one call each a round in an order that changes from round to
round, so that drift of a shared or warming machine falls on all of them alike. A sweep measures groups of variants,
writes each group as soon as it is measured, and leaves out what this working copy has measured before.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from . import machine, results
from .clocks import Clock, Timing
from .results import FAILED

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype that activations and weights have in each precision class."""

OTHERS_ON_GPU = 2 << 30
"""Bytes of GPU memory beyond PyTorch's own pool from which on a sweep warns; a CUDA context alone takes half of it."""

BUSY = 0.1
"""Share of the cores' time that other processes may take before a sweep warns."""


@dataclass(frozen=True)
class Effort:
    """How long to measure a group of variants.

    Rounds go on until each variant has ``min_repeats`` samples and the group has taken ``seconds``, but not beyond
    ``max_repeats``. Each sample lasts ``min_sample`` seconds or more: short calls are repeated within it. From
    ``deadline`` on, by ``time.perf_counter``, nothing is prepared that takes long, as compiling a model does.
    """

    min_repeats: int = 5
    max_repeats: int = 50
    seconds: float = 1.0
    warmup: int = 1
    min_sample: float = 1e-3
    deadline: float = math.inf

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; expected at least 1: first calls compile and allocate")
        if not 1 <= self.min_repeats <= self.max_repeats:
            raise ValueError(
                f"min_repeats is {self.min_repeats}, max_repeats {self.max_repeats}; expected 1 <= min <= max"
            )


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    *,
    clock: Clock | None = None,
    effort: Effort | None = None,
) -> dict[str, Timing]:
    """Time each of ``variants`` in turn, round after round in a changing order; warm-up outside."""
    clock, effort = clock or Clock(), effort or Effort()
    repeats, estimates = {}, {}
    for name, call in variants.items():
        for _ in range(effort.warmup):
            estimates[name] = clock.seconds(call, 1)
        repeats[name] = max(1, math.ceil(effort.min_sample / max(estimates[name], 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(effort.max_repeats):
        if done >= effort.min_repeats and time.perf_counter() - start >= effort.seconds:
            break
        shuffle(order)
        for name in order:
            clock.ready(variants[name], estimates[name])
            samples[name].append(clock.seconds(variants[name], repeats[name]) / repeats[name])
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


@contextmanager
def precision_class(name: str, device: torch.device | str) -> Iterator[torch.dtype]:
    """Run matrix products in precision class ``name``; gives the dtype that tensors must have.

    Raises:
        ValueError: unknown class, or ``tf32`` on a device that has none.
    """
    if name not in DTYPES:
        raise ValueError(f"precision is {name!r}; expected one of {list(DTYPES)}")
    if name == "tf32" and torch.device(device).type != "cuda":
        raise ValueError(f"precision is 'tf32', which {device} does not have; leave it out of `precisions`")
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError as error:  # PyTorch does not let its two ways to set this be mixed
        raise RuntimeError(
            "the precision of float32 was set by torch.backends, e.g. torch.backends.cuda.matmul.fp32_precision; call "
            "torch.set_float32_matmul_precision('highest') or 'high' instead, or after it"
        ) from error
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"  # the patch convolution; on by default, unlike for products
    try:
        yield DTYPES[name]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def device_name(device: torch.device | str) -> str:
    """The processor's name as the tables have it."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_name()


def environment(device: torch.device | str) -> dict[str, Any]:
    """The columns that say where a row was measured: device, threads, torch and triton version."""
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else None
    return {"device": device_name(device), "threads": threads, **machine.versions()}


def peak_memory(call: Callable[[], Any], device: torch.device | str) -> float | None:
    """Bytes that ``call`` needs at its peak beyond what is allocated before it; None where that cannot be measured.

    On CUDA from PyTorch's allocator, on Linux from the kernel's high-water mark of resident memory.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory would still be resident, and be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
        before = _resident("VmRSS")
    except OSError:  # no glibc, or no such file: not Linux
        return None
    call()
    return float(max(0, _resident("VmHWM") - before))


def _resident(field_name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field_name}:")[1].split()[0]) * 1024


class Case(Protocol):
    """A group of variants that are measured together."""

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """The key columns of the rows that must be there for the case to count as measured."""

    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """Measure the group; rows without the columns of ``environment``, failures as ``failed_row`` gives them."""


@dataclass
class SweepReport:
    """What a sweep did: counts of cases, and notes on what could not be measured."""

    measured: int = 0
    kept: int = 0
    left: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    what: str = "groups"

    def __str__(self) -> str:
        lines = [f"{self.measured} {self.what} measured in {self.seconds:.0f} s, {self.kept} were there already"]
        if self.left:
            lines.append(f"{self.left} {self.what} left for the next run: the time budget was spent")
        return "\n".join(lines + self.notes)


def sweep(
    cases: Iterable[Case],
    store: results.Store,
    experiment: str,
    *,
    device: torch.device | str = "cpu",
    effort: Effort | None = None,
    remeasure: bool = False,
    budget_s: float | None = None,
    notes: Sequence[str] = (),
) -> SweepReport:
    """Measure ``cases`` in order and append each one's rows as soon as they are there.

    Args:
        cases: the groups to measure; put those first that make a figure useful early.
        store: where the rows go.
        experiment: the table they go to.
        device: where to run.
        effort: how long to measure each group.
        remeasure: measure again what this working copy has measured before.
        budget_s: seconds after which no further case is begun; a later call goes on. See ``time_limit``.
        notes: what the caller wants the report to say.
    """
    device, effort = torch.device(device), effort or Effort()
    where = {"experiment": experiment, **environment(device)}
    done = results.Measured.none() if remeasure else store.measured(experiment, where["device"])
    report = SweepReport(notes=list(notes))
    budget_s = time_limit(budget_s)
    start = time.perf_counter()
    if budget_s is not None and device.type == "cuda":  # where a group's models may compile for longer than the budget
        effort = replace(effort, deadline=start + budget_s)
    pending, planned = [], results.Measured.none()
    for case in cases:
        keys = [{**where, **key} for key in case.keys(device)]
        if done.together(keys):
            report.kept += 1
        elif keys and not planned.together(keys):  # what a case before this one measures is not measured again
            pending.append(case)
            planned.add(keys)
    if pending:
        report.notes += [*busy_note(), *gpu_note(device)]
    for case in tqdm(pending, desc=experiment, unit="group", leave=False):
        if budget_s is not None and time.perf_counter() - start >= budget_s:
            break
        group = results.new_group()
        rows = case.measure(device, effort)
        report.notes += [note for row in rows if (note := row.pop("note", None)) and note not in report.notes]
        store.append({**where, "group": group, **row} for row in rows)
        report.measured += 1
    report.left = len(pending) - report.measured
    report.seconds = time.perf_counter() - start
    return report


def time_limit(budget_s: float | None) -> float | None:
    """``budget_s``, but no more than ``$BLOCKVIT_BUDGET_S`` seconds: how tests run every cell and measure little."""
    most = os.environ.get("BLOCKVIT_BUDGET_S")
    if not most:
        return budget_s
    try:
        limit = float(most)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ValueError(f"BLOCKVIT_BUDGET_S is {most!r}; expected a number of seconds, 0 or more; or unset it")
    return limit if budget_s is None else min(budget_s, limit)


def busy_note() -> list[str]:
    """A warning if other processes keep this machine's cores busy while this one idles.

    Multi-threaded kernels wait for their slowest thread, so they suffer from it unevenly: ratios shift, not only times.
    """

    def ticks() -> tuple[int, int]:
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, and of them idle or waiting for a disk

    try:
        before = ticks()
        time.sleep(0.3)
        total, idle = (after - start for after, start in zip(ticks(), before, strict=True))
    except OSError:  # not Linux: nothing is known
        return []
    busy = 1 - idle / max(1, total)
    return [f"other processes held {busy:.0%} of the cores when measuring began: ratios may be off"] * (busy > BUSY)


def gpu_note(device: torch.device) -> list[str]:
    """A warning if other processes hold much of the GPU's memory: then they may compute on it, too."""
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return [f"other processes hold {others / 2**30:.0f} GiB of the GPU: ratios may be off"] * (others > OTHERS_ON_GPU)


def failed_row(error: Exception, what: str, **key: Any) -> dict[str, Any]:
    """The row of a variant that could not be measured, so that a rerun does not try it again; its note says why."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    note = f"not measured: {what}: {reason if len(reason) <= 300 else reason[:300] + ' …'}"
    return {**key, "metric": FAILED, "value": 1, "repeats": 1, "note": note}


def timing_row(timing: Timing, **key: Any) -> dict[str, Any]:
    """A row of the tables for a measured time."""
    return {
        **key,
        "value": timing.median,
        "low": timing.low,
        "high": timing.high,
        "unit": "s",
        "repeats": len(timing.samples),
    }
