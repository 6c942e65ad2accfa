"""The accuracy study: one cell is one training, dense or masked, with its rows and its checkpoint."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import bench, data, models, results
from .losses import HEADLINE, OF_DENSE_TOO, described
from .machine import usable_cores
from .parallel import map_cells
from .supermask import BLOG_TARGETS, sparsify, supermask_layers
from .train import History, Recipe, fit, launch, recipe_for

AT_ONCE_ON_GPU = 4
"""Small models that are trained at once on a GPU: one alone leaves it idle between its kernels. Not measured yet."""

RECIPE_FIELDS = frozenset(field.name for field in fields(Recipe)) - {"seed"}


@dataclass(frozen=True)
class AccuracyCell:
    """One training: ``sparsity`` and ``block_size`` of its supermasks (None and None: dense), and its ``seed``.

    ``targets`` are masked; the seed sets initial weights, scores, the order of images and their augmentation.
    ``variant``, a mapping or pairs, says what this cell does unlike the others of its grid: fields of the recipe,
    arguments of ``sparsify``, and ``start="dense"``: begin with the trained dense model of the grid, which is also the
    teacher if the variant distils.
    """

    dataset: str
    model: str
    block_size: int | None = None
    sparsity: float | None = None
    seed: int = 0
    targets: tuple[str, ...] = BLOG_TARGETS
    variant: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if (self.block_size is None) != (self.sparsity is None):
            raise ValueError(f"{self}: give both block_size and sparsity, or neither for the dense model")
        object.__setattr__(self, "variant", tuple(sorted(dict(self.variant).items())))
        if self.block_size is None and self.mask_options:
            raise ValueError(f"{self}: a dense model has no masks to vary; expected fields of the recipe only")
        begin = dict(self.variant).get("start", "dense")
        if begin != "dense":
            raise ValueError(f"{self}: start is {begin!r}; expected 'dense', or none for an untrained model")
        if "distillation_alpha" in self.recipe_changes and self.start is None:
            raise ValueError(f"{self}: distillation needs a teacher; add start='dense' to the variant")

    @property
    def recipe_changes(self) -> dict[str, Any]:
        """The part of ``variant`` that is the recipe's."""
        return {name: value for name, value in self.variant if name in RECIPE_FIELDS}

    @property
    def mask_options(self) -> dict[str, Any]:
        """The part of ``variant`` that is ``sparsify``'s."""
        return {name: value for name, value in self.variant if name not in RECIPE_FIELDS and name != "start"}

    @property
    def start(self) -> AccuracyCell | None:
        """The dense cell whose trained model this one begins with; None: it begins untrained."""
        if "start" not in dict(self.variant):
            return None
        return replace(self, block_size=None, sparsity=None, variant=())

    @property
    def name(self) -> str:
        """The cell as a file name, e.g. ``vit_digits-bs32-sp0.90-seed0``; its variant is left out."""
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

    def build(self, trained: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The model to train, masks in place: with new weights, or with those of ``trained``, a dense state dict.

        Raises:
            TypeError: ``variant`` names what neither the recipe nor ``sparsify`` knows.
        """
        torch.manual_seed(self.seed)
        model = models.create(self.model)
        if trained is not None:
            model.load_state_dict(trained)
        if self.block_size is not None:
            sparsify(model, self.sparsity, self.block_size, targets=self.targets, **self.mask_options)
        return model


def cells(
    dataset: str, model: str, block_sizes: Iterable[int], sparsities: Iterable[float], seeds: Sequence[int]
) -> list[AccuracyCell]:
    """The grid, in an order that gives a useful figure early, however soon it is cut short.

    Seed by seed, the dense model first; then the sparsities that have published losses, block size by block size; then
    the other sparsities, in the same way. Otherwise in the order given.
    """
    block_sizes, sparsities = list(block_sizes), list(sparsities)
    parts = [s for s in sparsities if s in HEADLINE], [s for s in sparsities if s not in HEADLINE]
    grid = []
    for seed in seeds:
        grid.append(AccuracyCell(dataset, model, seed=seed))
        grid += [AccuracyCell(dataset, model, b, s, seed) for part in parts for b in block_sizes for s in part]
    return grid


def variants(
    dataset: str,
    model: str,
    block_size: int,
    sparsity: float,
    options: Iterable[Mapping[str, Any]],
    seeds: Sequence[int] = (0,),
) -> list[AccuracyCell]:
    """One masked cell for each of ``options`` and each seed, seed by seed; see ``AccuracyCell.variant``.

    Before it stands the dense cell to compare it with, where that is not the grid's: trained for as long, from the same
    start.
    """
    options, found = list(options), {}
    for seed in seeds:
        for option in options:
            if shared := {name: value for name, value in option.items() if name in OF_DENSE_TOO}:
                found[AccuracyCell(dataset, model, seed=seed, variant=shared)] = None
            found[AccuracyCell(dataset, model, block_size, sparsity, seed, variant=option)] = None
    return list(found)


def _recipe(cell: AccuracyCell, changes: Mapping[str, Any] | None) -> tuple[Recipe, str]:
    """The cell's recipe, and its description for the tables."""
    changes = dict(changes or {})
    recipe = recipe_for(cell.dataset, **changes | cell.recipe_changes)
    return replace(recipe, seed=cell.seed), described(cell.dataset, changes, dict(cell.variant))


def _checkpoint(
    folder: str | os.PathLike[str], cell: AccuracyCell, changes: Mapping[str, Any] | None, data_root: str | None
) -> Path:
    recipe, description = _recipe(cell, changes)
    # Other targets, another variant or another recipe are another training: the digest keeps their checkpoints apart.
    digest = hashlib.sha256(repr((cell, asdict(recipe), description)).encode()).hexdigest()[:8]
    return Path(folder) / data.label(cell.dataset, data_root) / f"{cell.name}-{digest}.pt"


def train_cell(
    cell: AccuracyCell,
    *,
    checkpoints: str | os.PathLike[str],
    data_root: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: bool = False,
    stop: Callable[[History], bool] | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train a cell, or go on from its checkpoint; returns the model and the rows (without ``environment``'s columns).

    Rows are the final test accuracy in percent (``accuracy``), the curve, an epoch at a time (``training``), and what
    the masks became, a layer at a time (``masks``). There are none if ``stop`` ended the training, see ``fit``, or that
    of the dense model that the cell begins with.
    """
    settings = {"data_root": data_root, "recipe": recipe, "device": device, "progress": progress, "stop": stop}
    start = None
    if cell.start is not None:
        start, dense_rows = train_cell(cell.start, checkpoints=checkpoints, **settings)
        if not dense_rows:
            return start, []
    folder = Path(checkpoints)
    splits = _load(cell.dataset, data_root, folder)
    model = cell.build(None if start is None else start.state_dict())
    before = block_masks(model)
    how, description = _recipe(cell, recipe)
    history = fit(
        model,
        splits,
        how,
        device=device,
        checkpoint=_checkpoint(folder, cell, recipe, data_root),
        progress=progress,
        num_workers=0 if isinstance(splits.train, data.ImageTensors) else min(16, usable_cores()),
        stop=stop,
        teacher=start if how.distillation_alpha else None,
    )
    if len(history.epochs) < how.epochs:
        return model, []
    where = {"dataset": data.label(cell.dataset, data_root), "recipe": description}
    rows = [*_accuracy_rows(history), *_curve_rows(history), *_mask_rows(before, block_masks(model))]
    return model, [{**cell.key(**where), **row} for row in rows]


def _load(dataset: str, data_root: str | None, checkpoints: Path) -> data.DataSplits:
    return data.load(dataset, data_root, download=True, cache_dir=checkpoints.parent / "datasets")


def _accuracy_rows(history: History) -> list[dict[str, Any]]:
    found = {"top1": (100 * history.top1, "%"), "train_seconds": (history.seconds, "s")}
    return [
        {"experiment": "accuracy", "metric": metric, "value": value, "unit": unit, "repeats": 1}
        for metric, (value, unit) in found.items()
    ]


def _curve_rows(history: History) -> list[dict[str, Any]]:
    rows = []
    for record in history.epochs:
        row = {"experiment": "training", "epoch": record["epoch"]}
        rows.append({**row, "metric": "train_loss", "value": record["train_loss"], "unit": "nat"})
        if record["test_top1"] is not None:
            rows.append({**row, "metric": "top1", "value": 100 * record["test_top1"], "unit": "%"})
    return rows


def _mask_rows(before: Mapping[str, np.ndarray], learnt: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Of each layer, its name as ``scope``: how evenly its block rows keep their blocks, and what training exchanged.

    Percentages: ``kept`` and ``kept_before`` are of the blocks of a row, median and range over the rows; ``exchanged``
    is of the blocks kept, those that the untrained mask had dropped.
    """
    rows = []
    for layer, mask in learnt.items():
        row = {"experiment": "masks", "scope": layer, "unit": "%", "repeats": len(mask)}
        for metric, shares in (("kept", mask.mean(axis=1)), ("kept_before", before[layer].mean(axis=1))):
            low, median, high = np.percentile(100 * shares, [20, 50, 80])
            rows.append({**row, "metric": metric, "value": median, "low": low, "high": high})
        exchanged = (mask & ~before[layer]).sum() / mask.sum()
        rows.append({**row, "metric": "exchanged", "value": 100 * exchanged, "repeats": 1})
    return rows


def block_masks(model: nn.Module) -> dict[str, np.ndarray]:
    """The block masks of ``model`` by layer, boolean ``(rows, columns)``; empty for a dense model."""
    return {name: layer.block_mask().cpu().numpy() for name, layer in supermask_layers(model).items()}


def masks(
    cell: AccuracyCell, checkpoints: str | os.PathLike[str], **arguments: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The block masks by layer, see ``block_masks``, of a cell that begins untrained: random ones, and learnt ones.

    ``arguments`` go to ``train_cell``, which finds the cell trained or trains it.
    """
    return block_masks(cell.build()), block_masks(train_cell(cell, checkpoints=checkpoints, **arguments)[0])


_epoch_seconds: dict[str, float] = {}
"""Of what this process has trained so far, by model: how long the first epoch of its next training may take."""


@dataclass(frozen=True)
class _Deadline:
    """True if the next epoch would not end before ``at`` (monotonic seconds), judged by the two before it."""

    model: str
    at: float

    def __call__(self, history: History) -> bool:
        past = [epoch["seconds"] for epoch in history.epochs[-2:]] or [_epoch_seconds.get(self.model, 0.0)]
        _epoch_seconds[self.model] = max(past)
        return time.monotonic() + max(past) >= self.at


_Trained = tuple[list[dict[str, Any]], dict[str, Any]]
"""What a worker brings back: a cell's rows, and the environment that it was trained in."""


def _train_and_report(cell: AccuracyCell, *, deadline: float | None, **arguments: Any) -> _Trained:
    # The model stays behind: its checkpoint is on disk, and weights are a lot to send between processes.
    if deadline is not None and time.monotonic() >= deadline:
        return [], {}
    stop = None if deadline is None else _Deadline(cell.model, deadline)
    return train_cell(cell, stop=stop, **arguments)[1], bench.environment(arguments["device"])


def _train_only(cell: AccuracyCell, arguments: dict[str, Any]) -> None:
    train_cell(cell, **arguments)


def _train_together(cell: AccuracyCell, *, num_processes: int, deadline: float | None, **arguments: Any) -> _Trained:
    """As ``_train_and_report``, which here only finds the checkpoint of what the processes have trained."""
    if deadline is None or time.monotonic() < deadline:
        stop = None if deadline is None else _Deadline(cell.model, deadline)
        launch(_train_only, cell, {**arguments, "stop": stop}, num_processes=num_processes)
    return _train_and_report(cell, deadline=deadline, **arguments)


def run(
    grid: Sequence[AccuracyCell],
    store: results.Store,
    *,
    checkpoints: str | os.PathLike[str],
    data_root: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "cpu",
    workers: int | None = None,
    num_processes: int = 1,
    remeasure: bool = False,
    budget_s: float | None = None,
) -> bench.SweepReport:
    """Train the cells of ``grid`` that this working copy has not trained yet; each one's rows are written as it ends.

    Cells start in the order given, in parallel processes, on a CPU of one thread each. A run that is killed loses at
    most the current epoch of each cell in progress. The seconds that a training took are written only if it had its
    core or GPU for itself: not if other processes kept the machine busy when the run began, nor if trainings share a
    GPU.

    Args:
        grid: see ``cells``.
        store: where rows go.
        checkpoints: folder for checkpoints, one a cell.
        data_root: folder of the data set, where it needs one.
        recipe: changes to the data set's recipe.
        device: where to train.
        workers: processes; None: one a core on a CPU, on a GPU ``AT_ONCE_ON_GPU`` for small models and one for others.
        num_processes: processes that train each model together, one a GPU; more than one train one model at a time.
        remeasure: train again from the start.
        budget_s: seconds to end within: an epoch that would last longer, judged by those before it, is not begun.
            What is unfinished goes on from its last epoch in the next run.
    """
    start = time.monotonic()
    if not grid:
        return bench.SweepReport(what="trainings")
    where = bench.environment(device)
    alone = 1 if num_processes == 1 else where["threads"]  # a worker's threads, or this process's
    threads = alone if torch.device(device).type == "cpu" else None
    done = results.Measured.none() if remeasure else store.measured("accuracy", where["device"])

    def is_done(cell: AccuracyCell) -> bool:
        label = data.label(cell.dataset, data_root)
        key = cell.key(dataset=label, metric="top1", recipe=_recipe(cell, recipe)[1])
        return {**where, "threads": threads, "experiment": "accuracy", **key} in done

    pending = [cell for cell in grid if not is_done(cell)]
    report = bench.SweepReport(kept=len(grid) - len(pending), left=len(pending), what="trainings")
    if not pending:
        return report
    if remeasure:
        for cell in pending:
            _checkpoint(checkpoints, cell, recipe, data_root).unlink(missing_ok=True)
    workers = 1 if num_processes > 1 else workers or _workers(device, pending)
    if bench.busy_note():
        report.notes.append("other processes kept the cores busy when the run began: its times are not written")
    elif threads is None and workers > 1:
        report.notes.append("trainings shared the GPU: their times are not written")
    timed = not report.notes
    for dataset in {cell.dataset for cell in pending}:
        _load(dataset, data_root, Path(checkpoints))  # downloads or decodes once, not in every process at once
    work = partial(
        _train_and_report,
        checkpoints=str(checkpoints),
        data_root=data_root,
        recipe=dict(recipe or {}),
        device=device,
        deadline=None if budget_s is None else start + budget_s,
    )
    together = partial(_train_together, num_processes=num_processes, **work.keywords)

    def train(cells: list[AccuracyCell]) -> Iterator[tuple[AccuracyCell, _Trained]]:
        return map_cells(work, cells, workers) if num_processes == 1 else ((cell, together(cell)) for cell in cells)

    # Dense models that others begin with come first: two cells that begin with one would both train it.
    starts = list(dict.fromkeys(cell.start for cell in pending if cell.start is not None))
    # A checkpoint is there from the first epoch on: that a model is trained out, the tables say.
    starts = [c for c in starts if not (is_done(c) and _checkpoint(checkpoints, c, recipe, data_root).exists())]
    others = [cell for cell in pending if cell not in starts]
    finished = chain(train(starts), train(others))
    bar = tqdm(finished, total=len(starts) + len(others), desc="accuracy", unit="cell", leave=False)
    for cell, (rows, environment) in bar:
        if not rows or cell not in pending:
            continue  # the budget was spent; or the model is in the tables and was only needed again
        rows = [row for row in rows if timed or row["metric"] != "train_seconds"]
        group = results.new_group()
        store.append({**environment, "group": group, **row} for row in rows)
        report.measured += 1
    report.left -= report.measured
    report.seconds = time.monotonic() - start
    return report


def _workers(device: str, grid: Sequence[AccuracyCell]) -> int | None:
    if torch.device(device).type == "cpu":
        return None  # one a core
    small = all(cell.model in models.SMALL_MODELS for cell in grid)
    return max(1, min(AT_ONCE_ON_GPU, usable_cores() // 2)) if small else 1
