"""One case after the other, within a time limit; what is found is stored at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import torch_tuned, tuning
from ..kernels.triton import parameters
from . import torch_bsr, triton_linear, triton_mlp
from .cases import SHAPES, Case, case_key, triton_key
from .search import Found


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


TUNERS = {
    torch_tuned.NAME: Tuner(torch_tuned.NAME, case_key, torch_bsr.find),
    parameters.LINEAR: Tuner(parameters.LINEAR, triton_key, triton_linear.find),
    parameters.MLP: Tuner(parameters.MLP, triton_key, triton_mlp.find, SHAPES[:1]),
}
"""By the name of the backend."""
