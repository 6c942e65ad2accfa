"""What it takes to convert a model once and to load it again."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..bench import Effort, timing_row
from ..checkpoint import load, save
from ..clocks import Timing, clock_for
from ..convert import model_bytes, to_block_sparse
from .vit import ModelCase, dense_model


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
        dense = dense_model(self.model, device, torch.float32)
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
