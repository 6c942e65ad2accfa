"""Ways to run a model besides eagerly: compiled, recorded in a CUDA graph, or in another engine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import engines
from ..bench import DTYPES
from ..clocks import cuda_graph

CUDA_GRAPH = "cudagraph"
"""The mode that records an eager model's kernels once and replays them: no launch from Python."""


def compiled(model: nn.Module, device: torch.device, mode: str) -> Callable[[Tensor], Tensor]:
    """``model`` compiled for inference; ``mode`` is ``torch.compile``'s, or ``"compile"`` for its default."""
    # On machines without a GPU Inductor warns of that, once, in the middle of a notebook.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Each model and batch size is compiled for itself: past the limit, or with sizes made dynamic, PyTorch would fall
    # back to slower code without an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    how: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    if device.type == "cpu":  # freezing is what makes Inductor pack weights for the CPU; it goes with no mode
        return torch.compile(model, options={"freezing": True}, **how)
    return torch.compile(model, mode=None if mode == "compile" else mode, **how)


def dense_call(model: nn.Module, mode: str, x: Tensor) -> Callable[[], Tensor]:
    """``model(x)``, run in ``mode``: the call that is timed. What is prepared for it is kept for the next cells."""
    if mode == "eager":
        return partial(model, x)
    if mode == CUDA_GRAPH:
        return cuda_graph(lambda: model(x))
    return partial(_prepared(model, mode, tuple(x.shape), x.dtype, x.device, torch.get_num_threads()), x)


@lru_cache(maxsize=8)  # the next cells of a grid have the same dense model; preparing it takes longer than timing it
def _prepared(
    model: nn.Module, mode: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, threads: int
) -> Callable[[Tensor], Tensor]:
    if mode in engines.ENGINES:
        return engines.prepare(mode, model, torch.zeros(shape, dtype=dtype, device=device), threads)
    return compiled(model, device, mode)


def mode_refusal(mode: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model cannot be run in ``mode`` there, or None.

    Engines are for CPUs, CUDA graphs for GPUs, and ``torch.compile`` has one mode on a CPU: see ``compiled``.
    """
    if mode in engines.ENGINES:
        return engines.refusal(mode, device, dtype)
    if mode == CUDA_GRAPH and device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the device is {device}"
    if device.type == "cpu" and mode not in ("eager", "compile"):
        return "on a CPU a model is compiled with frozen weights, which goes with no mode; ask for 'compile'"
    return None


def runnable_modes(modes: Iterable[str], device: torch.device, precision: str) -> list[str]:
    """``"eager"`` and those of ``modes`` that can run there."""
    return ["eager", *(mode for mode in modes if not mode_refusal(mode, device, DTYPES[precision]))]


def mode_refusals(modes: Iterable[str], device: torch.device | str, precisions: Iterable[str]) -> list[str]:
    """A line for each reason why some of ``modes`` cannot be measured, with the precisions that it holds for."""
    device = torch.device(device)
    held: dict[tuple[str, str], list[str]] = {}
    for mode, precision in itertools.product(dict.fromkeys(modes), dict.fromkeys(precisions)):
        if reason := mode_refusal(mode, device, DTYPES[precision]):
            held.setdefault((mode, reason), []).append(precision)
    return [f"not measured: {mode} in {', '.join(those)}: {reason}" for (mode, reason), those in held.items()]
