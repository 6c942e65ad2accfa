"""What a training step costs: the dense model, the same with supermasks, and with supermasks done plainly.

A step is forward, backward and AdamW. The variants of a case share their weights, gradients and optimiser, and the
learning rate is zero: so all compute with the same numbers, whoever's turn it is, and memory holds one model.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..attention import expose_projections
from ..bench import Effort, precision_class
from ..clocks import clock_for
from ..results import IMAGES_PER_SECOND, STEP_SECONDS
from ..sparse_training import train_sparse
from ..supermask import METHODS, WITH_SCORES, SupermaskConv2d, SupermaskLinear, sparsify, supermask_layers
from .variants import Variant, measure_group
from .vit import SCOPES

NAIVE = "naive"
"""The backend whose mask is expanded to the weight's shape and multiplied by it, its gradients left to autograd."""

SPARSE: dict[str, dict[str, Any]] = {
    "sparse": {"refresh_every": 1, "weight_grad": "dense"},
    "sparse-kept": {"refresh_every": 1 << 31, "weight_grad": "kept"},
}
"""Backends that train through block-sparse products: ``train_sparse`` as it comes, which computes what ``supermask``
does, and the steps between two refreshes with ``weight_grad="kept"``, when the mask and dropped weights stand still."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def naive_effective_weight(layer: SupermaskLinear | SupermaskConv2d) -> Tensor:
    """``layer.effective_weight()`` of the method ``supermask``, as the reference implementation computes it."""
    mask = _StraightThrough.apply(layer.scores, layer.block_mask())
    for dim, size in enumerate(layer.weight.shape):
        mask = mask.repeat_interleave(layer.block_size, dim).narrow(dim, 0, size)
    return layer.weight * mask


def _naive_linear(layer: SupermaskLinear, x: Tensor) -> Tensor:
    return F.linear(x, naive_effective_weight(layer), layer.bias)


def _made_naive(model: nn.Module) -> nn.Module:
    for layer in supermask_layers(model).values():
        if isinstance(layer, SupermaskLinear):  # whose own forward need not ask for the effective weight
            layer.forward = partial(_naive_linear, layer)
        else:
            layer.effective_weight = partial(naive_effective_weight, layer)
    return model


@dataclass(frozen=True)
class TrainingStepCase:
    """A training step of one model, or of one linear layer: dense, and masked in each of ``backends``.

    Args:
        model: a name that ``models.create`` knows, or ``OUTxIN`` for a linear layer.
        batch_size: images; of a linear layer, rows to multiply.
        block_size: of the masks.
        sparsity: of the masks.
        scope: which layers of a model are masked; a key of ``workloads.SCOPES``.
        precision: ``fp32``, ``tf32``, or the type to autocast to. Weights are single precision.
        backends: ``NAIVE``, and names of ``SPARSE`` and of ``supermask.METHODS``.
        modes: ``"eager"``, ``"compile"``; each variant is run in each.
    """

    model: str
    batch_size: int
    block_size: int
    sparsity: float = 0.9
    scope: str = "blog"
    precision: str = "fp32"
    backends: tuple[str, ...] = ("supermask", NAIVE)
    modes: tuple[str, ...] = ("eager",)
    seed: int = 0

    def __post_init__(self) -> None:
        known = [NAIVE, *SPARSE, *METHODS]
        if unknown := [name for name in self.backends if name not in known]:
            raise ValueError(f"backends has {unknown}; expected names among {known}")

    @property
    def shape(self) -> tuple[int, int] | None:
        """``(out, in)`` of a linear layer; None for a model."""
        out_in = self.model.split("x")
        return (int(out_in[0]), int(out_in[1])) if len(out_in) == 2 and all(n.isdigit() for n in out_in) else None

    def _key(self, backend: str, mode: str) -> dict[str, Any]:
        of_masks = {"block_size": self.block_size, "sparsity": self.sparsity}
        scope = self.scope if self.shape is None else "linear"
        return {
            "model": self.model,
            "scope": "dense" if backend == "dense" and self.shape is None else scope,
            "dtype": "float32",
            "precision": self.precision,
            "batch_size" if self.shape is None else "tokens": self.batch_size,
            **({} if backend == "dense" else of_masks),
            "backend": backend,
            "compile": mode,
            "seed": self.seed,
            "metric": STEP_SECONDS,
        }

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        return [self._key(backend, mode) for backend in self.backends for mode in self.modes]

    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        with precision_class(self.precision, device) as dtype, torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            steps = _Steps(self, device, dtype)
            variants = [
                Variant(self._key(backend, mode), partial(steps.call, backend, mode), partial(steps.expected, backend))
                for mode in self.modes
                for backend in ("dense", *self.backends)
            ]
            rows, _ = measure_group(variants, self.precision, clock_for(device), effort)
        if self.shape is not None:
            return rows
        return rows + [_throughput(row, self.batch_size) for row in rows if row["metric"] == STEP_SECONDS]


def _throughput(row: dict[str, Any], images: int) -> dict[str, Any]:
    """The row of images a second that goes with a row of seconds a step."""
    rates = {"value": images / row["value"], "low": images / row["high"], "high": images / row["low"]}
    return {**row, **rates, "metric": IMAGES_PER_SECOND, "unit": "1/s"}


class _Steps:
    """The variants of one ``TrainingStepCase``, made at their first use, and their step."""

    def __init__(self, case: TrainingStepCase, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.dense = _dense(case).to(device)
        self.inputs, self.gradient = self._data()
        # No functools.cache: models are to be freed with this object.
        self._masked: dict[str, nn.Module] = {}
        self._optimizers = {"dense": torch.optim.AdamW(self.dense.parameters(), lr=0.0, fused=True)}

    def _data(self) -> tuple[Tensor, Tensor]:
        n, shape = self.case.batch_size, self.case.shape
        if shape is not None:
            inputs = torch.randn(n, shape[1], device=self.device, requires_grad=True)
            return inputs, torch.randn(n, shape[0], device=self.device)
        size, classes = self.dense.image_size, self.dense.num_classes
        return torch.randn(n, 3, size, size, device=self.device), torch.randn(n, classes, device=self.device) / n

    def model(self, backend: str) -> nn.Module:
        """The module of a backend; all share the dense one's weights."""
        if backend == "dense":
            return self.dense
        if backend not in self._masked:
            case, method = self.case, backend if backend in METHODS else "supermask"
            shared = copy.deepcopy(self.dense, {id(p): p for p in self.dense.parameters()})
            torch.manual_seed(case.seed)  # the same scores for all
            targets = SCOPES[case.scope] if case.shape is None else "*"
            sparsify(shared, case.sparsity, case.block_size, targets=targets, method=method)
            optimizer = torch.optim.AdamW(shared.parameters(), lr=0.0, fused=True)
            optimizer.state = self._optimizers["dense"].state  # one state for the weights that they share
            self._optimizers[backend] = optimizer
            if backend in SPARSE:
                train_sparse(shared, optimizer, **SPARSE[backend])
            self._masked[backend] = _made_naive(shared) if backend == NAIVE else shared
        return self._masked[backend]

    def forward(self, module: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return module(self.inputs)

    def call(self, backend: str, mode: str) -> Callable[[], Tensor]:
        """A whole step, which returns the forward pass's output."""
        module, optimizer = self.model(backend), self._optimizers[backend]
        if mode == "compile":
            module = torch.compile(module, fullgraph=True)

        def step() -> Tensor:
            optimizer.zero_grad()
            self.inputs.grad = None
            output = self.forward(module)
            output.backward(self.gradient.to(output.dtype))
            optimizer.step()
            return output.detach()

        return step

    @torch.no_grad()
    def expected(self, backend: str) -> Tensor:
        """What the forward pass must give: for learned scores, that of the plain implementation."""
        plain = NAIVE if backend in (*WITH_SCORES, *SPARSE, NAIVE) else backend
        return self.forward(self.model(plain))


def _dense(case: TrainingStepCase) -> nn.Module:
    if case.shape is not None:
        return nn.Sequential(nn.Linear(case.shape[1], case.shape[0]))
    model = models.create(case.model)
    # torchvision's head starts at zero: every logit would be 0, whatever a variant computes, and no check could fail.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return expose_projections(model).train()


def step_cases(
    models: Iterable[str], batch_sizes: Iterable[int], block_sizes: Iterable[int], **settings: Any
) -> list[TrainingStepCase]:
    """Every model, or layer ``OUTxIN``, of a grid, the first sizes first; ``settings`` as of ``TrainingStepCase``."""
    grid = itertools.product(batch_sizes, block_sizes, models)
    return [TrainingStepCase(model, size, block, **settings) for size, block, model in grid]
