"""The accuracy study: one cell is one training, dense or masked, with its rows and its checkpoint."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from . import bench, data, models, results
from .parallel import map_cells
from .supermask import BLOG_TARGETS, sparsify, supermask_layers
from .train import Recipe, fit, recipe_for


@dataclass(frozen=True)
class AccuracyCell:
    """One training: ``sparsity`` and ``block_size`` of its supermasks (None and None: dense), and its ``seed``.

    ``targets`` are masked; the seed sets initial weights, scores, the order of pictures and their augmentation.
    """

    dataset: str
    model: str
    block_size: int | None = None
    sparsity: float | None = None
    seed: int = 0
    targets: tuple[str, ...] = BLOG_TARGETS

    def __post_init__(self) -> None:
        if (self.block_size is None) != (self.sparsity is None):
            raise ValueError(f"{self}: give both block_size and sparsity, or neither for the dense model")

    @property
    def name(self) -> str:
        """The cell as a file name, e.g. ``vit_digits-bs32-sp0.90-seed0``."""
        sparse = "dense" if self.block_size is None else f"bs{self.block_size}-sp{self.sparsity:.2f}"
        return f"{self.model}-{sparse}-seed{self.seed}"

    def key(self, **more: Any) -> dict[str, Any]:
        """The key columns of this cell's rows."""
        return {
            "dataset": self.dataset,
            "model": self.model,
            "scope": "dense" if self.block_size is None else "+".join(self.targets),
            "dtype": "float32",
            "precision": "fp32",
            "block_size": self.block_size,
            "sparsity": self.sparsity,
            "backend": "dense" if self.block_size is None else "supermask",
            "seed": self.seed,
            **more,
        }

    def build(self) -> nn.Module:
        """The untrained model, masks in place."""
        torch.manual_seed(self.seed)
        model = models.create(self.model)
        if self.block_size is not None:
            sparsify(model, self.sparsity, self.block_size, targets=self.targets)
        return model


def cells(
    dataset: str, model: str, block_sizes: Iterable[int], sparsities: Iterable[float], seeds: Sequence[int]
) -> list[AccuracyCell]:
    """The grid, dense models first, then seed by seed: a run cut short has one seed everywhere before a second."""
    grid = [AccuracyCell(dataset, model, seed=seed) for seed in seeds]
    block_sizes, sparsities = list(block_sizes), list(sparsities)
    for seed, sparsity, block_size in itertools.product(seeds, sparsities, block_sizes):
        grid.append(AccuracyCell(dataset, model, block_size, sparsity, seed))
    return grid


def _recipe(cell: AccuracyCell, changes: Mapping[str, Any] | None) -> tuple[Recipe, str]:
    """The cell's recipe, and its description for the tables: the data set's name, and what was changed."""
    changes = dict(changes or {})
    described = " ".join([cell.dataset, *(f"{name}={value}" for name, value in sorted(changes.items()))])
    return replace(recipe_for(cell.dataset, **changes), seed=cell.seed), described


def _checkpoint(folder: str | os.PathLike[str], cell: AccuracyCell, recipe: Recipe) -> Path:
    # Other targets or another recipe are another training: the digest keeps their checkpoints apart.
    digest = hashlib.sha256(repr((cell, asdict(recipe))).encode()).hexdigest()[:8]
    return Path(folder) / cell.dataset / f"{cell.name}-{digest}.pt"


def train_cell(
    cell: AccuracyCell,
    *,
    checkpoints: str | os.PathLike[str],
    data_root: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train a cell, or go on from its checkpoint; returns the model and the rows (without ``environment``'s columns).

    Rows are the final test accuracy in percent (``accuracy``) and the curve, an epoch at a time (``training``).
    """
    folder = Path(checkpoints)
    splits = data.load(cell.dataset, data_root, download=True, cache_dir=folder.parent / "datasets")
    where = {"dataset": data.label(cell.dataset, data_root)}
    model = cell.build()
    how, described = _recipe(cell, recipe)
    history = fit(
        model,
        splits,
        how,
        device=device,
        checkpoint=_checkpoint(folder, cell, how),
        progress=progress,
        num_workers=0 if isinstance(splits.train, data.ImageTensors) else min(16, os.cpu_count() or 1),
    )
    found = {"top1": (100 * history.top1, "%"), "train_seconds": (history.seconds, "s")}
    rows = [
        {**cell.key(metric=metric, unit=unit, **where), "value": value, "repeats": 1, "experiment": "accuracy"}
        for metric, (value, unit) in found.items()
    ]
    for record in history.epochs:
        curve = {"train_loss": (record["train_loss"], "nat"), "top1": (record["test_top1"], "%")}
        rows += [
            {
                **cell.key(epoch=record["epoch"], metric=metric, unit=unit, **where),
                "value": 100 * value if unit == "%" else value,
                "experiment": "training",
            }
            for metric, (value, unit) in curve.items()
            if value is not None
        ]
    return model, [{**row, "recipe": described} for row in rows]


def masks(
    cell: AccuracyCell, checkpoints: str | os.PathLike[str], **arguments: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A cell's block masks by layer, boolean ``(rows, columns)``: before training, that is random, and learnt.

    ``arguments`` go to ``train_cell``, which finds the cell trained or trains it.
    """

    def block_masks(model: nn.Module) -> dict[str, np.ndarray]:
        return {name: layer.block_mask().cpu().numpy() for name, layer in supermask_layers(model).items()}

    return block_masks(cell.build()), block_masks(train_cell(cell, checkpoints=checkpoints, **arguments)[0])


def _train_and_report(cell: AccuracyCell, **arguments: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    # The model stays behind: its checkpoint is on disk, and weights are a lot to send between processes.
    rows = train_cell(cell, **arguments)[1]
    return rows, bench.environment(arguments["device"])


def run(
    grid: Sequence[AccuracyCell],
    store: results.Store,
    *,
    checkpoints: str | os.PathLike[str],
    data_root: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "cpu",
    workers: int | None = None,
    remeasure: bool = False,
    budget_s: float | None = None,
) -> bench.SweepReport:
    """Train the cells of ``grid`` that this working copy has not trained yet; each one's rows are written as it ends.

    On a CPU in parallel processes of one thread each; on a GPU one after another. A run that is killed loses at most
    the current epoch of each cell in progress.

    Args:
        grid: see ``cells``.
        store: where rows go.
        checkpoints: folder for checkpoints, one a cell.
        data_root: folder of the data set, where it needs one.
        recipe: changes to the data set's recipe.
        device: where to train.
        workers: processes on a CPU; None: one a core.
        remeasure: train again from the start.
        budget_s: seconds after which no further cell is begun; cells in progress on a CPU are stopped and go on from
            their last epoch in the next run. At least one cell is trained.
    """
    if not grid:
        return bench.SweepReport()
    where = bench.environment(device)
    threads = 1 if torch.device(device).type == "cpu" else None
    done = results.Measured.none() if remeasure else store.measured("accuracy", where["device"])

    def is_done(cell: AccuracyCell) -> bool:
        label = data.label(cell.dataset, data_root)
        key = cell.key(dataset=label, metric="top1", recipe=_recipe(cell, recipe)[1])
        return {**where, "threads": threads, "experiment": "accuracy", **key} in done

    pending = [cell for cell in grid if not is_done(cell)]
    if remeasure:
        for cell in pending:
            _checkpoint(checkpoints, cell, _recipe(cell, recipe)[0]).unlink(missing_ok=True)
    report = bench.SweepReport(
        kept=len(grid) - len(pending), what="trainings", notes=bench.busy_note() if pending else []
    )
    start = time.perf_counter()
    work = partial(
        _train_and_report, checkpoints=str(checkpoints), data_root=data_root, recipe=dict(recipe or {}), device=device
    )
    finished = map_cells(work, pending, workers) if threads else ((cell, work(cell)) for cell in pending)
    for _, (rows, environment) in tqdm(finished, total=len(pending), desc="accuracy", unit="cell", leave=False):
        group = results.new_group()
        # Beside other processes a training takes longer than it would: what it took then is no property of the cell.
        rows = [row for row in rows if row["metric"] != "train_seconds" or not report.notes]
        store.append({**environment, "group": group, **row} for row in rows)
        report.measured += 1
        if budget_s is not None and time.perf_counter() - start >= budget_s:
            break
    report.left = len(pending) - report.measured
    report.seconds = time.perf_counter() - start
    return report
