"""The MLP of a ViT block on its own: two linear layers with a GELU between, layer by layer or as one kernel."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bench import Effort, precision_class
from ..clocks import clock_for
from ..convert import random_block_mask_
from .modes import dense_call, runnable_modes
from .variants import Variant, convert, latency_key, measure_group, runnable


@dataclass(frozen=True)
class MLPCase:
    """``width -> hidden -> width`` on ``tokens`` rows: dense, and with both weights block-sparse through each backend.

    A backend's name runs the two layers one after the other, with ``+mlp`` behind it as one kernel. As for single
    layers, on a GPU the kernels alone are timed, their operands not in the cache.
    """

    tokens: int
    block_size: int
    sparsity: float
    precision: str = "fp32"
    backends: tuple[str, ...] = ("gather",)
    dense_modes: tuple[str, ...] = ()
    width: int = 768
    hidden: int = 3072
    seed: int = 0

    def _key(self, **variant: Any) -> dict[str, Any]:
        case = {"model": f"{self.width}x{self.hidden}x{self.width}", "scope": "mlp", "tokens": self.tokens}
        return latency_key(self.precision, self.seed, **case | variant)

    def _dense_keys(self, device: torch.device) -> list[dict[str, Any]]:
        return [
            self._key(backend="dense", compile=mode)
            for mode in runnable_modes(self.dense_modes, device, self.precision)
        ]

    def _sparse_keys(self, device: torch.device) -> list[dict[str, Any]]:
        return [
            self._key(backend=backend, block_size=self.block_size, sparsity=self.sparsity)
            for backend in runnable(self.backends, device, self.precision, self.block_size)
        ]

    def keys(self, device: torch.device) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        sparse = self._sparse_keys(device)
        return sparse + self._dense_keys(device)[1:] if sparse else []

    @torch.inference_mode()
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``."""
        with precision_class(self.precision, device) as dtype:
            full = _dense_mlp(self.width, self.hidden, device, dtype, self.seed)
            pruned = copy.deepcopy(full)
            generator = torch.Generator().manual_seed(self.seed)
            for layer in (pruned[0], pruned[2]):
                random_block_mask_(layer.weight.data, self.sparsity, self.block_size, generator)
            torch.manual_seed(self.seed)
            x = torch.randn(self.tokens, self.width, device=device).to(dtype)

            def block_sparse(name: str) -> Callable[[], Tensor]:
                # Inside another module, because a model itself is never replaced by one that runs as one kernel.
                return partial(convert(nn.Sequential(copy.deepcopy(pruned)), name, self.block_size), x)

            variants = [
                Variant(key, partial(dense_call, full, key["compile"], x), partial(full, x) if number else None)
                for number, key in enumerate(self._dense_keys(device))
            ]
            variants += [
                Variant(key, partial(block_sparse, key["backend"]), partial(pruned, x))
                for key in self._sparse_keys(device)
            ]
            return measure_group(variants, self.precision, clock_for(device, cold=True), effort)[0]


@lru_cache(maxsize=1)  # one for all masks of a precision: compiling it takes longer than measuring it
def _dense_mlp(width: int, hidden: int, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    with torch.inference_mode(False):  # whether it is measured or compiled, whoever asks first
        layers = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        return nn.Sequential(*layers).to(device, dtype).eval().requires_grad_(False)


def mlp_cases(
    tokens: Iterable[int],
    block_sizes: Sequence[int],
    sparsities: Sequence[float],
    precisions: Iterable[str],
    backends: Sequence[str],
    dense_modes: Sequence[str] = (),
) -> list[MLPCase]:
    """The full grid; a sweep cut short has covered all block sizes at the first sparsities and token counts."""
    grid = itertools.product(tokens, precisions, sparsities, block_sizes)
    return [MLPCase(t, b, s, p, tuple(backends), tuple(dense_modes)) for t, p, s, b in grid]
