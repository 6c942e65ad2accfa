"""Whole Vision Transformers, dense and with a part of their layers block-sparse through each backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import engines, models, semi_structured
from ..attention import expose_projections
from ..bench import DTYPES, Effort, peak_memory, precision_class
from ..clocks import clock_for, cuda_graph
from ..convert import model_bytes, random_block_mask_
from ..results import UNPRUNED
from ..supermask import BLOG_TARGETS
from ..targets import matching
from .modes import CUDA_GRAPH, compiled, runnable_modes
from .variants import TAILS, Variant, convert, latency_key, measure_group, runnable, tail_metric

SCOPES: dict[str, tuple[str, ...]] = {
    "mlp": ("mlp",),
    "mlp+attention": ("mlp", "qkv", "out_proj"),
    "blog": BLOG_TARGETS,
    "all": ("mlp", "qkv", "out_proj", "head"),
}
"""Which layers of a ViT are block-sparse, as targets."""


@cache
def dense_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The dense model called ``name``, one for all cases: not to be changed."""
    torch.manual_seed(0)
    model = models.create(name)
    # torchvision's head starts at zero: every logit would be 0, whatever a backend computes, and no check could fail.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return expose_projections(model).eval().to(device, dtype)


@cache
def _compiled_dense(name: str, device: torch.device, dtype: torch.dtype, mode: str) -> Callable[[Tensor], Tensor]:
    return compiled(dense_model(name, device, dtype), device, mode)


@lru_cache(maxsize=4)  # a sweep goes on with another cell of the same model and batch; each engine holds the weights
def _engine_dense(
    engine: str, name: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], threads: int
) -> Callable[[Tensor], Tensor]:
    example = torch.zeros(shape, device=device, dtype=dtype)
    return engines.prepare(engine, dense_model(name, device, dtype), example, threads)


@dataclass(frozen=True)
class ModelCase:
    """One ViT on a batch of images: dense, and its ``scope`` block-sparse through each backend.

    Each is run eagerly and in the given modes besides: ``"compile"``, a mode of ``torch.compile``, ``"cudagraph"``, and
    for the dense model one of ``engines.ENGINES``. Modes that cannot run here are left out; see ``mode_refusals``.
    The masks are random blocks: the speed depends on how many blocks stay, and hardly on which. ``semi_structured``
    adds the scope pruned to 2:4. The scope ``UNPRUNED``, at sparsity 0, leaves all to what a backend does with layers
    that stay dense.
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
    """Latency samples to take, for rows of percentiles; 0: the usual number, and no such rows."""
    seed: int = 0

    def _key(self, **variant: Any) -> dict[str, Any]:
        case = {"model": self.model, "scope": "dense", "batch_size": self.batch_size}
        return latency_key(self.precision, self.seed, **case | variant)

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
        return copy.deepcopy(dense_model(self.model, device, DTYPES[self.precision]))

    def _layers(self, model: nn.Module) -> list[nn.Linear]:
        return [] if self.scope == UNPRUNED else [*matching(model, SCOPES[self.scope], types=(nn.Linear,)).values()]

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
        size = dense_model(case.model, device, self.dtype).image_size
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
            return dense_model(self.case.model, self.device, self.dtype)
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
        return convert(copy.deepcopy(folded), backend, self.case.block_size)

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
            run = _engine_dense(mode, self.case.model, self.device, self.dtype, shape, threads)
        elif mode != "eager" and backend == "dense":
            run = _compiled_dense(self.case.model, self.device, self.dtype, mode)
        else:
            run = model if mode == "eager" else compiled(model, self.device, mode)
        return lambda: run(images)


def _memory_rows(
    model: nn.Module, call: Callable[[], Tensor], key: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    measures = {"model_bytes": model_bytes(model), "peak_memory": peak_memory(call, device)}
    return [
        {**key, "metric": metric, "value": value, "unit": "B", "repeats": 1}
        for metric, value in measures.items()
        if value is not None
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


def model_shape(model: str) -> str:
    """How large a ViT is, for prose: ``7 blocks of width 384, 32×32 pixels in patches of 4×4``."""
    with torch.device("meta"):
        vit = models.create(model)
    sizes = f"{vit.image_size}×{vit.image_size} pixels in patches of {vit.patch_size}×{vit.patch_size}"
    return f"{len(vit.encoder.layers)} blocks of width {vit.hidden_dim}, {sizes}"
