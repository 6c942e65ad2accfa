"""Ways to run a model besides eagerly: compiled, recorded in a CUDA graph, or in another engine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import engines
from ..bench import DTYPES

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


def mode_refusal(mode: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model cannot be run in ``mode`` there, or None: engines are for CPUs, CUDA graphs for GPUs."""
    if mode in engines.ENGINES:
        return engines.refusal(mode, device, dtype)
    if mode == CUDA_GRAPH and device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the device is {device}"
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
