"""What folding and conversion do to a model's outputs, and what it takes to convert it once and to load it again."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data, models
from ..accuracy import AccuracyCell, train_cell
from ..attention import expose_projections
from ..bench import Effort, timing_row
from ..checkpoint import load, save
from ..clocks import Timing, clock_for
from ..convert import fold, model_bytes, to_block_sparse
from ..published import PublishedCheckpoint
from .vit import ModelCase, dense_model

DIFFERENCES = ("fold_difference", "convert_difference", "load_difference")
"""Metrics: the largest change of a logit by each step from a masked model to one that was saved and loaded again."""


def masked_model(
    cell: AccuracyCell | PublishedCheckpoint,
    *,
    cache: Path,
    data_root: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "cpu",
    count: int = 64,
) -> tuple[nn.Module, Tensor]:
    """A trained model, its masks in place, and the first ``count`` images of its test set, normalised.

    Args:
        cell: a training, which is found in the checkpoints below ``cache`` or done now, or a published checkpoint.
        cache: see ``Study.cache``.
        data_root: folder of the data set, where it needs one.
        recipe: changes to the data set's recipe.
        device: where both are to be.
        count: of images.
    """
    if isinstance(cell, PublishedCheckpoint):
        test, classes = cell.images(data_root)
        masked = cell.load(len(classes), fold=False).to(device)
    else:
        how = {"data_root": data_root, "recipe": recipe, "device": device}
        masked, _ = train_cell(cell, checkpoints=cache / "checkpoints", **how)
        test = data.load(cell.dataset, data_root, download=True, cache_dir=cache / "datasets").test
    images = torch.stack([test[i][0] for i in range(min(count, len(test)))]).to(device)
    return masked.eval(), data.normalize(images, test.mean, test.std)


def fold_differences(masked: nn.Module, images: Tensor, block_size: int) -> tuple[nn.Module, dict[str, float]]:
    """Fold, convert, save and load ``masked``, which stays as it is: the folded model, and ``DIFFERENCES``."""
    folded = fold(copy.deepcopy(masked))
    converted = to_block_sparse(copy.deepcopy(folded), block_size)
    with tempfile.TemporaryDirectory() as folder:
        path = save(converted, Path(folder) / "model.safetensors", source=folded.state_dict())
        loaded = load(path, source=folded.state_dict()).to(images.device)
    with torch.inference_mode():
        logits = [model(images) for model in (masked, folded, converted, loaded)]
    changes = [float((after - before).abs().max()) for before, after in pairwise(logits)]
    return folded, dict(zip(DIFFERENCES, changes, strict=True))


@dataclass(frozen=True)
class ConversionCase:
    """What it takes to convert a model once and to load it again: seconds and bytes, random masks in ``scope``.

    Beside that stands the dense model, loaded from its checkpoint as PyTorch reads one.
    """

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
        metrics = ("convert_seconds", "load_seconds", "dense_load_seconds", "file_bytes")
        return [self._key(metric) for metric in metrics]

    def _load_dense(self, path: Path) -> nn.Module:
        with torch.device("meta"):  # as blockvit.load does: no random weights are drawn first
            model = expose_projections(models.create(self.model))
        model.load_state_dict(torch.load(path, weights_only=True), assign=True)
        return model

    @torch.inference_mode(False)
    def measure(self, device: torch.device, effort: Effort) -> list[dict[str, Any]]:
        """See ``bench.Case``; each step is timed ``min_repeats`` times, on a fresh copy of the model."""
        dense = dense_model(self.model, device, torch.float32)
        folded = ModelCase(self.model, self.scope, 1, self.block_size, self.sparsity, seed=self.seed).sparse_model(
            device
        )
        seconds: dict[str, list[float]] = {"dense_load_seconds": [], "convert_seconds": [], "load_seconds": []}
        clock = clock_for(device)
        with tempfile.TemporaryDirectory() as folder:
            path, dense_path = Path(folder) / "model.safetensors", Path(folder) / "dense.pt"
            torch.save(dense.state_dict(), dense_path)
            for _ in range(effort.min_repeats):
                copied = copy.deepcopy(folded)
                seconds["dense_load_seconds"].append(clock.seconds(partial(self._load_dense, dense_path), 1))
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
