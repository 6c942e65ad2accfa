"""Single linear layers, dense and block-sparse through each backend."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import semi_structured
from ..bench import DTYPES, Effort, precision_class
from ..clocks import clock_for
from ..convert import random_block_mask_
from ..linear import BlockSparseLinear
from .modes import dense_call, runnable_modes
from .variants import Variant, latency_key, measure_group, runnable


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
        case = {"model": f"{self.shape[0]}x{self.shape[1]}", "scope": "linear", "tokens": self.tokens}
        return latency_key(self.precision, self.seed, **case | variant)

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
                Variant(key, partial(dense_call, full, key["compile"], x), partial(full, x)) for key in modes[1:]
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
