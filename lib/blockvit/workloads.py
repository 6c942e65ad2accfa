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
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import engines, models, semi_structured, tune
from .attention import expose_projections
from .bench import DTYPES, Effort, check_close, failed_row, interleave, peak_memory, precision_class, timing_row
from .checkpoint import load, save
from .clocks import Clock, Timing, clock_for, cuda_graph
from .fold import model_bytes, random_block_mask_, to_block_sparse
from .kernels import cpu, named, torch_tuned, tuning
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


DENSE_TOO = "+dense"
"""Behind a backend's name: the layers that stay dense run on it as well (``to_block_sparse(dense_backend=...)``)."""


def runnable(backends: Iterable[str], device: torch.device, precision: str, block_size: int) -> list[str]:
    """Those of ``backends`` that can run here; unknown names raise, and so does the baseline's."""
    able = []
    for name in backends:
        if name == "dense":
            raise ValueError("backend 'dense' is the baseline that every case measures; leave it out of `backends`")
        if named(name.removesuffix(DENSE_TOO)).refusal(device, DTYPES[precision], block_size) is None:
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
            reason = named(name.removesuffix(DENSE_TOO)).refusal(device, DTYPES[precision], block_size)
        if reason:
            cells.setdefault((name, reason), []).append((precision, block_size))
    return [
        f"not measured: {name} in {', '.join(dict.fromkeys(p for p, _ in held))}, blocks of "
        f"{', '.join(str(b) for b in dict.fromkeys(b for _, b in held))}: {reason}"
        for (name, reason), held in cells.items()
    ]


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
    of others may lack memory, a size or a precision. The baseline must run, so its errors are raised. ``tails`` adds
    rows of the 90th and the 99th percentile.
    """
    calls: dict[int, Callable[[], Tensor]] = {}
    failed = []
    for place, variant in enumerate(variants):
        try:
            call = variant.build()
            result = call()
            if variant.expected is not None:
                check_close(result, variant.expected(), precision, f"backend {variant.key['backend']!r}")
            calls[place] = call
        except Exception as error:
            if place == 0:
                raise
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


@dataclass(frozen=True)
class LinearCase:
    """One linear layer of ``shape`` ``(out, in)`` on ``tokens`` rows, dense and block-sparse through each backend.

    On a GPU the kernels alone are timed, their operands not in the cache (``clocks.ColdCudaClock``).

    ``semi_structured`` adds the layer pruned to 2:4 where the device has products for that. ``dense_modes`` are further
    ways to run the dense layer: those of ``ModelCase``.
    """

    shape: tuple[int, int]
    tokens: int
    block_size: int
    sparsity: float
    precision: str = "fp32"
    backends: tuple[str, ...] = ("torch", "gather")
    semi_structured: bool = False
    dense_modes: tuple[str, ...] = ()
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

    def _dense_keys(self, device: torch.device) -> list[dict[str, Any]]:
        modes = runnable_modes(self.dense_modes, device, self.precision)
        return [self._key(backend="dense", compile=mode) for mode in modes]

    def _sparse_key(self, backend: str) -> dict[str, Any]:
        return self._key(backend=backend, block_size=self.block_size, sparsity=self.sparsity)

    def _semi_structured_keys(self, device: torch.device) -> list[dict[str, Any]]:
        if not self.semi_structured or semi_structured.refusal(device, DTYPES[self.precision], self.shape):
            return []
        return [self._key(backend=semi_structured.BACKEND, sparsity=0.5)]

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        able = runnable(self.backends, device, self.precision, self.block_size)
        sparse = [self._sparse_key(backend) for backend in able] + self._semi_structured_keys(device)
        return sparse + self._dense_keys(device)[1:] if sparse else []

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        with precision_class(self.precision, device) as dtype:
            linear = copy.deepcopy(_dense_layer(self.shape, device, dtype, self.seed))
            random_block_mask_(
                linear.weight.data, self.sparsity, self.block_size, torch.Generator().manual_seed(self.seed)
            )
            torch.manual_seed(self.seed)
            x = torch.randn(self.tokens, self.shape[1], device=device).to(dtype)

            def through(layer: nn.Module) -> Callable[[], Tensor]:
                return lambda: layer(x)

            def block_sparse(name: str) -> Callable[[], Tensor]:
                return through(BlockSparseLinear.from_dense(linear, self.block_size, backend=name))

            # Dense engines multiply by every weight, so one layer serves all of a grid's masks, prepared once.
            full, modes = _dense_layer(self.shape, device, dtype, self.seed), self._dense_keys(device)
            variants = [Variant(modes[0], lambda: through(linear))]
            variants += [
                Variant(key, partial(_dense_call, full, key["compile"], x, device), partial(full, x))
                for key in modes[1:]
            ]
            variants += [
                Variant(self._sparse_key(name), partial(block_sparse, name), through(linear))
                for name in runnable(self.backends, device, self.precision, self.block_size)
            ]
            for key in self._semi_structured_keys(device):
                pruned = copy.deepcopy(linear)
                pruned.weight.data = semi_structured.prune_2_of_4(linear.weight.data)
                stored = nn.Sequential(copy.deepcopy(pruned))
                build = partial(semi_structured.to_semi_structured, stored, ("0",))
                variants.append(Variant(key, lambda build=build: through(build()), through(pruned)))
            return measure_group(variants, self.precision, clock_for(device, cold=True), effort)[0]


@lru_cache(maxsize=2)  # the MLP's two shapes, whose engines then last over a grid's block sizes and sparsities
def _dense_layer(shape: tuple[int, int], device: torch.device, dtype: torch.dtype, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    with torch.inference_mode(False):  # whether it is measured or exported, whoever asks first
        return nn.Linear(shape[1], shape[0], device=device, dtype=dtype).eval().requires_grad_(False)


def _dense_call(layer: nn.Linear, mode: str, x: Tensor, device: torch.device) -> Callable[[], Tensor]:
    if mode == CUDA_GRAPH:
        return cuda_graph(lambda: layer(x))
    return partial(_dense_engine(layer, mode, tuple(x.shape), device, torch.get_num_threads()), x)


@lru_cache(maxsize=8)
def _dense_engine(
    layer: nn.Linear, mode: str, shape: tuple[int, ...], device: torch.device, threads: int
) -> Callable[[Tensor], Tensor]:
    if mode in engines.ENGINES:
        return engines.prepare(mode, layer, torch.zeros(shape, dtype=layer.weight.dtype), threads)
    return _compiled(layer, device, mode)


def linear_cases(
    shapes: Iterable[Sequence[int]],
    tokens: Iterable[int],
    block_sizes: Sequence[int],
    sparsities: Sequence[float],
    precisions: Iterable[str],
    backends: Sequence[str],
    dense_modes: Sequence[str] = (),
) -> list[LinearCase]:
    """The full grid; ordered so that a sweep cut short has covered all layers at the first sparsities and token counts.

    2:4 sparsity, which has neither block size nor another sparsity, joins the first case of each layer.
    """
    grid = itertools.product(tokens, sparsities, shapes, precisions, block_sizes)
    first = (sparsities[0], block_sizes[0]) if sparsities and block_sizes else None
    return [
        LinearCase(tuple(shape), t, b, s, p, tuple(backends), (s, b) == first, tuple(dense_modes))
        for t, s, shape, p, b in grid
    ]


@cache
def _dense_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(name)
    # torchvision's head starts at zero: every logit would be 0, whatever a backend computes, and no check could fail.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return expose_projections(model).eval().to(device, dtype)


CUDA_GRAPH = "cudagraph"
"""The mode that records an eager model's kernels once and replays them: no launch from Python."""


def _compiled(model: nn.Module, device: torch.device, mode: str) -> Callable[[Tensor], Tensor]:
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


@cache
def _compiled_dense(name: str, device: torch.device, dtype: torch.dtype, mode: str) -> Callable[[Tensor], Tensor]:
    return _compiled(_dense_model(name, device, dtype), device, mode)


@lru_cache(maxsize=4)  # a sweep goes on with another cell of the same model and batch; each engine holds the weights
def _engine_dense(
    engine: str, name: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], threads: int
) -> Callable[[Tensor], Tensor]:
    example = torch.zeros(shape, device=device, dtype=dtype)
    return engines.prepare(engine, _dense_model(name, device, dtype), example, threads)


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


@dataclass(frozen=True)
class ModelCase:
    """One ViT on a batch of images: dense, and its ``scope`` block-sparse through each backend.

    Each is run eagerly and in the given modes besides: ``"compile"``, a mode of ``torch.compile``, ``"cudagraph"``, and
    for the dense model one of ``engines.ENGINES``. Modes that cannot run here are left out; see ``mode_refusals``.
    The masks are random blocks: the speed depends on how many blocks stay, and hardly on which. ``semi_structured``
    adds the scope pruned to 2:4.
    """

    model: str
    scope: str
    batch_size: int
    block_size: int
    sparsity: float
    precision: str = "fp32"
    backends: tuple[str, ...] = ("gather",)
    dense_modes: tuple[str, ...] = ()
    sparse_modes: tuple[str, ...] = ()
    semi_structured: bool = False
    memory: bool = False
    tails: int = 0
    """Samples of the distribution of latencies, of which rows tell percentiles; 0: only the usual ones are taken."""
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

    def _dense_keys(self, device: torch.device) -> list[dict[str, Any]]:
        modes = runnable_modes(self.dense_modes, device, self.precision)
        return [self._key(backend="dense", compile=mode) for mode in modes]

    def _sparse_keys(self, device: torch.device) -> list[dict[str, Any]]:
        able = runnable(self.backends, device, self.precision, self.block_size)
        of_backend = {name: {"block_size": self.block_size, "sparsity": self.sparsity} for name in able}
        if self.semi_structured and not semi_structured.refusal(device, DTYPES[self.precision]):
            of_backend[semi_structured.BACKEND] = {"sparsity": 0.5}
        modes = [mode for mode in self.sparse_modes if mode not in engines.ENGINES]
        return [
            self._key(backend=name, scope=self.scope, compile=mode, **sparse)
            for name, sparse in of_backend.items()
            for mode in runnable_modes(modes, device, self.precision)
        ]

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        sparse = self._sparse_keys(device)
        if not sparse:
            return []
        held = [{**key, "metric": "model_bytes"} for key in sparse if self.memory and key["compile"] == "eager"]
        every = sparse + self._dense_keys(device)[1:]
        return every + held + [{**key, "metric": tail_metric(n)} for key in every if self.tails for n in TAILS]

    def sparse_model(self, device: torch.device) -> nn.Module:
        """The dense model with random blocks of its scope set to zero: dense still, to be converted."""
        generator = torch.Generator().manual_seed(self.seed)
        model = self._copy(device)
        for layer in self._layers(model):
            random_block_mask_(layer.weight.data, self.sparsity, self.block_size, generator)
        return model

    def pruned_model(self, device: torch.device) -> nn.Module:
        """The dense model with its scope pruned to 2:4: dense still, to be converted."""
        model = self._copy(device)
        for layer in self._layers(model):
            layer.weight.data = semi_structured.prune_2_of_4(layer.weight.data)
        return model

    def _copy(self, device: torch.device) -> nn.Module:
        return copy.deepcopy(_dense_model(self.model, device, DTYPES[self.precision]))

    def _layers(self, model: nn.Module) -> list[nn.Linear]:
        return list(matching(model, SCOPES[self.scope], types=(nn.Linear,)).values())

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        with precision_class(self.precision, device):
            contenders = _Contenders(self, device)
            variants = [
                Variant(
                    key,
                    partial(contenders.call, key["backend"], key["compile"]),
                    partial(contenders.expected, key["backend"]),
                )
                for key in [*self._dense_keys(device), *self._sparse_keys(device)]
            ]
            if self.tails:
                effort = replace(effort, min_repeats=self.tails, max_repeats=self.tails)
            rows, calls = measure_group(variants, self.precision, clock_for(device), effort, tails=self.tails > 0)
            eager = [place for place in calls if variants[place].key["compile"] == "eager"]
            for place in eager if self.memory else ():
                key = variants[place].key
                rows += _memory_rows(contenders.model(key["backend"]), calls[place], key, device)
        return rows


class _Contenders:
    """The models of one ``ModelCase`` by backend, each made at its first use, with the images that they are given."""

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        self.case, self.device, self.dtype = case, device, DTYPES[case.precision]
        size = _dense_model(case.model, device, self.dtype).image_size
        generator = torch.Generator().manual_seed(case.seed)
        self.images = torch.randn(case.batch_size, 3, size, size, generator=generator).to(device, self.dtype)
        self._made: dict[tuple[str, str], Any] = {}  # no functools.cache: models are to be freed with this object

    def _once(self, what: str, name: str, build: Callable[[str], Any]) -> Any:
        if (what, name) not in self._made:
            self._made[what, name] = build(name)
        return self._made[what, name]

    def model(self, backend: str) -> nn.Module:
        """The model of ``backend``, which for ``"dense"`` is shared by all cases."""
        return self._once("model", backend, self._model)

    def _folded(self, kind: str) -> nn.Module:
        """The plain model that a contender is converted from."""
        if kind == "dense":
            return _dense_model(self.case.model, self.device, self.dtype)
        build = self.case.pruned_model if kind == semi_structured.BACKEND else self.case.sparse_model
        return build(self.device)

    def _result(self, kind: str) -> Tensor:
        return self._once("folded", kind, self._folded)(self.images)

    @staticmethod
    def _kind(backend: str) -> str:
        return backend if backend in ("dense", semi_structured.BACKEND) else "block-sparse"

    def _model(self, backend: str) -> nn.Module:
        folded = self._once("folded", self._kind(backend), self._folded)
        if backend == "dense":
            return folded
        if backend == semi_structured.BACKEND:
            return semi_structured.to_semi_structured(copy.deepcopy(folded), SCOPES[self.case.scope])
        name = backend.removesuffix(DENSE_TOO)
        dense_backend = name if backend.endswith(DENSE_TOO) else None
        return to_block_sparse(copy.deepcopy(folded), self.case.block_size, name, dense_backend=dense_backend)

    def expected(self, backend: str) -> Tensor:
        """The logits of the plain model that the backend's was converted from."""
        return self._once("result", self._kind(backend), self._result)

    def call(self, backend: str, mode: str) -> Callable[[], Tensor]:
        """What is timed: the backend's model on the images, run in a mode of ``ModelCase``."""
        model, images = self.model(backend), self.images
        if mode == CUDA_GRAPH:
            return cuda_graph(lambda: model(images))
        if mode in engines.ENGINES:
            shape, threads = tuple(images.shape), torch.get_num_threads()
            compiled = _engine_dense(mode, self.case.model, self.device, self.dtype, shape, threads)
        elif mode != "eager" and backend == "dense":
            compiled = _compiled_dense(self.case.model, self.device, self.dtype, mode)
        else:
            compiled = model if mode == "eager" else _compiled(model, self.device, mode)
        return lambda: compiled(images)


def _memory_rows(
    model: nn.Module, call: Callable[[], Tensor], key: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    measures = {"model_bytes": model_bytes(model), "peak_memory": peak_memory(call, device)}
    return [
        {**key, "metric": metric, "value": value, "unit": "B", "repeats": 1}
        for metric, value in measures.items()
        if value is not None
    ]


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
        """Whether our own kernel can tell what multiply-adds in registers reach: its roof, and in fp32 any kernel's."""
        return self.precision == "fp32" and cpu.CPU.refusal(device, torch.float32, 16) is None

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
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
        fma = {"value": cpu.peak_flops(), "repeats": 1} if self._has_fma(device) else None
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
    """Finding the parameters that PyTorch's BSR kernel runs fastest with, for one product; kept with the package.

    What the package has tuned for this GPU already is not tuned again, so it has no row either.
    """

    case: tune.Case

    def _key(self) -> dict[str, Any]:
        return {
            "model": f"{self.case.out_features}x{self.case.in_features}",
            "scope": "linear",
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "tokens": self.case.tokens,
            "block_size": self.case.block_size,
            "sparsity": self.case.sparsity,
            "backend": torch_tuned.NAME,
            "metric": "tuning_seconds",
        }

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        known = tuning.find(tuning.device_name(device), torch_tuned.NAME, tune.case_key(self.case))
        return [] if known else [self._key()]

    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``; a search is timed once, however long it takes."""
        (tuned,) = tune.tune_torch_bsr([self.case], device)
        if tuned.found is None:
            return [failed_row(RuntimeError("no launch parameters work"), str(self.case), **self._key())]
        return [{**self._key(), "value": tuned.seconds, "unit": "s", "repeats": 1}]


def tuning_cases(
    shapes: Iterable[Sequence[int]],
    tokens: Iterable[int],
    block_sizes: Iterable[int],
    sparsity: float,
    precisions: Iterable[str],
) -> list[TuningCase]:
    """Every product of a grid at one sparsity, the largest layers first; precision classes of a dtype share it."""
    largest_first = sorted((tuple(shape) for shape in shapes), key=lambda shape: -shape[0] * shape[1])
    dtypes = dict.fromkeys(DTYPES[precision] for precision in precisions)
    cases = tune.make_cases(largest_first, block_sizes=block_sizes, dtypes=dtypes, tokens=tokens, sparsities=[sparsity])
    return [TuningCase(case) for case in cases]


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
