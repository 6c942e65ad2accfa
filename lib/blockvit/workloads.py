"""What the study times: single linear layers, whole Vision Transformers, and the device's ceilings.

Each case builds a group of variants of one computation: dense PyTorch as it comes, dense PyTorch compiled, and the
same weights block-sparse through each backend. Every sparse variant's output is checked against the dense one before
its time is taken.
"""

from __future__ import annotations

import copy
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import models
from .attention import expose_projections
from .bench import DTYPES, Effort, Timing, check_close, clock_for, interleave, peak_memory, precision_class, timing_row
from .checkpoint import load, save
from .fold import model_bytes, random_block_mask_, to_block_sparse
from .kernels import BackendUnavailableError, resolve
from .linear import BlockSparseLinear
from .supermask import BLOG_TARGETS
from .targets import matching

VIT_B_16_TOKENS = 197
"""Tokens of one 224x224 image in ViT-B/16: 196 patches and the class token."""

VIT_B_16_SHAPES = ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1000, 768))
"""``(out, in)`` of ViT-B/16's linear layers: out_proj, qkv, mlp.0, mlp.3, head."""

SCOPES: dict[str, tuple[str, ...]] = {
    "mlp": ("mlp",),
    "mlp+attention": ("mlp", "qkv", "out_proj"),
    "blog": BLOG_TARGETS,
    "all": ("mlp", "qkv", "out_proj", "head"),
}
"""Which layers of a ViT are block-sparse, as targets."""


def runnable(backends: Iterable[str], device: torch.device, precision: str, block_size: int) -> list[str]:
    """Those of ``backends`` that can run here; unknown names raise, and so does the baseline's."""
    able = []
    for name in backends:
        if name == "dense":
            raise ValueError("backend 'dense' is the baseline that every case measures; leave it out of `backends`")
        try:
            able.append(resolve(name, device, DTYPES[precision], block_size).name)
        except BackendUnavailableError:
            continue
    return able


def refusals(
    backends: Iterable[str], device: torch.device | str, precisions: Iterable[str], block_sizes: Iterable[int]
) -> list[str]:
    """A line for each backend that cannot run some of these cells, saying why."""
    reasons: dict[str, None] = {}
    for name, precision, block_size in itertools.product(backends, precisions, block_sizes):
        try:
            resolve(name, torch.device(device), DTYPES[precision], block_size)
        except BackendUnavailableError as error:
            reasons[f"not measured: {error}"] = None
    return list(reasons)


@dataclass(frozen=True)
class LinearCase:
    """One linear layer of ``shape`` ``(out, in)`` on ``tokens`` rows, dense and block-sparse through each backend."""

    shape: tuple[int, int]
    tokens: int
    block_size: int
    sparsity: float
    precision: str = "fp32"
    backends: tuple[str, ...] = ("torch", "gather")
    seed: int = 0

    def _key(self, **variant: Any) -> dict[str, Any]:
        return {
            "model": f"{self.shape[0]}x{self.shape[1]}",
            "scope": "linear",
            "dtype": str(DTYPES[self.precision]).removeprefix("torch."),
            "precision": self.precision,
            "tokens": self.tokens,
            "compile": "eager",
            "seed": self.seed,
            "metric": "latency",
            **variant,
        }

    def _sparse_key(self, backend: str) -> dict[str, Any]:
        return self._key(backend=backend, block_size=self.block_size, sparsity=self.sparsity)

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        return [self._sparse_key(b) for b in runnable(self.backends, device, self.precision, self.block_size)]

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        generator = torch.Generator().manual_seed(self.seed)
        with precision_class(self.precision, device) as dtype:
            linear = nn.Linear(self.shape[1], self.shape[0])
            random_block_mask_(linear.weight, self.sparsity, self.block_size, generator)
            linear = linear.to(device, dtype)
            x = torch.randn(self.tokens, self.shape[1], generator=generator).to(device, dtype)
            calls: dict[str, Callable[[], Tensor]] = {"dense": lambda: linear(x)}
            expected = linear(x)
            for name in runnable(self.backends, device, self.precision, self.block_size):
                layer = BlockSparseLinear.from_dense(linear, self.block_size, backend=name)
                check_close(layer(x), expected, self.precision, f"backend {name!r} on {self}")
                calls[name] = lambda layer=layer: layer(x)
            timings = interleave(calls, clock=clock_for(device), effort=effort)
        keys = {name: self._key(backend="dense") if name == "dense" else self._sparse_key(name) for name in calls}
        return [timing_row(timings[name], **keys[name]) for name in calls]


def linear_cases(
    shapes: Iterable[Sequence[int]],
    tokens: Iterable[int],
    block_sizes: Iterable[int],
    sparsities: Iterable[float],
    precisions: Iterable[str],
    backends: Sequence[str],
) -> list[LinearCase]:
    """The full grid; ordered so that a sweep cut short has covered all block sizes of some shapes and token counts."""
    grid = itertools.product(precisions, tokens, shapes, sparsities, block_sizes)
    return [LinearCase(tuple(shape), t, b, s, p, tuple(backends)) for p, t, shape, s, b in grid]


@cache
def _dense_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(name)
    # torchvision's head starts at zero: every logit would be 0, whatever a backend computes, and no check could fail.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return expose_projections(model).eval().to(device, dtype)


@cache
def _compiled(name: str, device: torch.device, dtype: torch.dtype, mode: str) -> Callable[[Tensor], Tensor]:
    """The dense model compiled for inference; ``mode`` is ``torch.compile``'s, or ``"compile"`` for its default."""
    # On machines without a GPU Inductor warns of that, once, in the middle of a notebook.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if device.type == "cpu":  # freezing is what makes Inductor pack weights for the CPU; it goes with no mode
        return torch.compile(_dense_model(name, device, dtype), options={"freezing": True})
    return torch.compile(_dense_model(name, device, dtype), mode=None if mode == "compile" else mode)


@dataclass(frozen=True)
class ModelCase:
    """One ViT on a batch of images: dense, dense compiled, and its ``scope`` block-sparse through each backend.

    The masks are random blocks: the speed depends on how many blocks stay, and hardly on which.
    """

    model: str
    scope: str
    batch_size: int
    block_size: int
    sparsity: float
    precision: str = "fp32"
    backends: tuple[str, ...] = ("gather",)
    dense_compile: tuple[str, ...] = ()
    memory: bool = False
    seed: int = 0

    def _key(self, **variant: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "scope": "dense",
            "dtype": str(DTYPES[self.precision]).removeprefix("torch."),
            "precision": self.precision,
            "batch_size": self.batch_size,
            "compile": "eager",
            "seed": self.seed,
            "metric": "latency",
            **variant,
        }

    def _sparse_key(self, backend: str) -> dict[str, Any]:
        sparse = {"scope": self.scope, "block_size": self.block_size, "sparsity": self.sparsity}
        return self._key(backend=backend, **sparse)

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        able = runnable(self.backends, device, self.precision, self.block_size)
        sparse = [self._sparse_key(backend) for backend in able]
        dense = [self._key(backend="dense", compile=mode) for mode in self.dense_compile]
        return sparse + dense + [{**key, "metric": "model_bytes"} for key in sparse if self.memory]

    def sparse_model(self, device: torch.device) -> nn.Module:
        """The dense model with random blocks of its scope set to zero: dense still, to be converted."""
        model = copy.deepcopy(_dense_model(self.model, device, DTYPES[self.precision]))
        generator = torch.Generator().manual_seed(self.seed)
        for layer in matching(model, SCOPES[self.scope], types=(nn.Linear,)).values():
            random_block_mask_(layer.weight.data, self.sparsity, self.block_size, generator)
        return model

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        with precision_class(self.precision, device) as dtype:
            dense = _dense_model(self.model, device, dtype)
            size = dense.image_size
            x = torch.randn(self.batch_size, 3, size, size, generator=torch.Generator().manual_seed(self.seed))
            x = x.to(device, dtype)
            calls: dict[str, Callable[[], Tensor]] = {"dense": lambda: dense(x)}
            keys = {"dense": self._key(backend="dense")}
            weights = {"dense": dense}
            for mode in self.dense_compile:
                compiled = _compiled(self.model, device, dtype, mode)
                check_close(compiled(x), dense(x), self.precision, f"the compiled {self.model}")
                calls[mode] = lambda compiled=compiled: compiled(x)
                keys[mode] = self._key(backend="dense", compile=mode)
            folded = self.sparse_model(device)
            expected = folded(x)
            for name in runnable(self.backends, device, self.precision, self.block_size):
                model = to_block_sparse(copy.deepcopy(folded), self.block_size, name)
                check_close(model(x), expected, self.precision, f"backend {name!r} on {self}")
                calls[name] = lambda model=model: model(x)
                keys[name] = self._sparse_key(name)
                weights[name] = model
            timings = interleave(calls, clock=clock_for(device), effort=effort)
            rows = [timing_row(timings[name], **keys[name]) for name in calls]
            if self.memory:
                rows += self._memory_rows(weights, calls, keys, device)
        return rows

    @staticmethod
    def _memory_rows(
        weights: dict[str, nn.Module],
        calls: dict[str, Callable[[], Tensor]],
        keys: dict[str, dict[str, Any]],
        device: torch.device,
    ) -> list[dict[str, Any]]:
        rows = []
        for name, model in weights.items():
            measures = {"model_bytes": model_bytes(model), "peak_memory": peak_memory(calls[name], device)}
            rows += [
                {**keys[name], "metric": metric, "value": value, "unit": "B", "repeats": 1}
                for metric, value in measures.items()
                if value is not None
            ]
        return rows


@dataclass(frozen=True)
class CeilingCase:
    """What the device can do at best: a large dense matrix product, and copying memory."""

    precision: str = "fp32"
    size: int = 2048
    copy_bytes: int = 1 << 28

    def _key(self, metric: str, unit: str) -> dict[str, Any]:
        return {
            "model": f"{self.size}x{self.size}" if metric == "matmul_throughput" else "copy",
            "dtype": str(DTYPES[self.precision]).removeprefix("torch."),
            "precision": self.precision,
            "backend": "dense",
            "metric": metric,
            "unit": unit,
        }

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        return [self._key("matmul_throughput", "FLOP/s"), self._key("copy_bandwidth", "B/s")]

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        with precision_class(self.precision, device) as dtype:
            a, b = (torch.randn(self.size, self.size, device=device).to(dtype) for _ in range(2))
            source = torch.ones(self.copy_bytes // 4, device=device)
            target = torch.empty_like(source)
            calls = {"matmul_throughput": lambda: a @ b, "copy_bandwidth": lambda: target.copy_(source)}
            timings = interleave(calls, clock=clock_for(device), effort=effort)
        work = {"matmul_throughput": 2 * self.size**3, "copy_bandwidth": 2 * self.copy_bytes}
        units = {"matmul_throughput": "FLOP/s", "copy_bandwidth": "B/s"}
        return [
            {
                **self._key(metric, units[metric]),
                "value": work[metric] / timing.median,
                "low": work[metric] / timing.high,
                "high": work[metric] / timing.low,
                "repeats": len(timing.samples),
            }
            for metric, timing in timings.items()
        ]


@dataclass(frozen=True)
class ConversionCase:
    """What it takes to convert a model once and to load it again: seconds and bytes, random masks in ``scope``."""

    model: str
    block_size: int
    sparsity: float
    scope: str = "all"
    seed: int = 0

    def _key(self, metric: str, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "scope": self.scope,
            "dtype": "float32",
            "block_size": self.block_size,
            "sparsity": self.sparsity,
            "backend": "auto",
            "seed": self.seed,
            "metric": metric,
            **more,
        }

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        return [self._key("convert_seconds"), self._key("load_seconds"), self._key("file_bytes")]

    @torch.inference_mode(False)
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``; each step is timed ``min_repeats`` times, on a fresh copy of the model."""
        dense = _dense_model(self.model, device, torch.float32)
        folded = ModelCase(self.model, self.scope, 1, self.block_size, self.sparsity, seed=self.seed).sparse_model(
            device
        )
        seconds: dict[str, list[float]] = {"build_seconds": [], "convert_seconds": [], "load_seconds": []}
        clock = clock_for(device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            for _ in range(effort.min_repeats):
                copied = copy.deepcopy(folded)
                seconds["build_seconds"].append(clock.seconds(lambda: models.create(self.model), 1))
                seconds["convert_seconds"].append(
                    clock.seconds(lambda m=copied: to_block_sparse(m, self.block_size), 1)
                )
                save(copied, path)
                seconds["load_seconds"].append(clock.seconds(lambda: load(path), 1))
            file_bytes = path.stat().st_size
        rows = [timing_row(Timing(tuple(samples)), **self._key(metric)) for metric, samples in seconds.items()]
        sizes = {"dense_bytes": model_bytes(dense), "sparse_bytes": model_bytes(copied), "file_bytes": file_bytes}
        return rows + [
            {**self._key(metric), "value": value, "unit": "B", "repeats": 1} for metric, value in sizes.items()
        ]


@cache
def sparse_share(model: str, scope: str) -> float:
    """Fraction of a model's floating-point operations that its linear layers in ``scope`` do, counted by PyTorch.

    By Amdahl's law, dropping a fraction s of them speeds the model up by at most ``1 / (1 - s * share)``.
    """
    with torch.device("meta"):
        vit = expose_projections(models.create(model)).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        vit(torch.empty(1, 3, vit.image_size, vit.image_size, device="meta"))
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    chosen = matching(vit, SCOPES[scope], types=(nn.Linear,))
    return sum(counts[f"{type(vit).__name__}.{name}"] for name in chosen) / counter.get_total_flops()
