"""What the published grid of trainings costs, on paper: GPU-hours from images per second that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from ..results import IMAGES_PER_SECOND, Store

IMAGENET_IMAGES = 1_281_167
GRID_EPOCHS = 300
GRID_BLOCK_SIZES = (16, 32, 64)
GRID_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def grid_cost(
    rows: pd.DataFrame,
    *,
    block_sizes: Sequence[int] = GRID_BLOCK_SIZES,
    sparsities: Sequence[float] = GRID_SPARSITIES,
    epochs: int = GRID_EPOCHS,
    images: int = IMAGENET_IMAGES,
) -> pd.DataFrame:
    """GPU-hours of training a dense model and one for each block size and sparsity; evaluation is left out.

    A sparsity that was not measured takes the slowest speed measured with its block size: how fast a supermask trains
    hangs on the size of the mask, hardly on what it drops.

    Args:
        rows: speeds of training on one GPU, as the experiment ``training_step`` has them: those of
            ``IMAGES_PER_SECOND`` count, of the dense model and of supermasks. One device, model, precision, batch size
            and way to compile.
        block_sizes, sparsities: the grid.
        epochs: of each training.
        images: in an epoch.

    Returns:
        One row a training, the dense one first: ``block_size``, ``sparsity``, ``images_per_s``, ``measured`` (False
        for a speed of another sparsity), ``gpu_hours``.

    Raises:
        ValueError: rows of different setups, no speed of the dense model or of a block size, or one that is not a
            positive number.
    """
    rows = rows[(rows["metric"] == IMAGES_PER_SECOND) & rows["backend"].isin(["dense", "supermask"])]
    for column in ("device", "model", "precision", "batch_size", "compile"):
        if rows[column].nunique() > 1:
            raise ValueError(f"rows are of {column} {rows[column].unique().tolist()}; expected those of one")
    if not (rows["value"] > 0).all():
        raise ValueError(f"images per second are {rows['value'].tolist()}; expected positive numbers")
    cells = [(math.nan, math.nan), *((size, sparsity) for size in block_sizes for sparsity in sparsities)]
    table = [{"block_size": size, "sparsity": sparsity, **_speed(rows, size, sparsity)} for size, sparsity in cells]
    costs = pd.DataFrame(table)
    costs["gpu_hours"] = epochs * images / costs["images_per_s"] / 3600
    return costs


def _speed(rows: pd.DataFrame, block_size: float, sparsity: float) -> dict[str, float | bool]:
    dense = math.isnan(block_size)
    of_size = rows[rows["block_size"].isna() if dense else rows["block_size"] == block_size]
    if of_size.empty:
        what = "the dense model" if dense else f"block size {block_size}"
        raise ValueError(
            f"no training speed of {what} was measured; expected one for the dense model and each block size"
        )
    if dense:
        return {"images_per_s": of_size["value"].median(), "measured": True}
    medians = of_size.groupby("sparsity")["value"].median()
    measured = sparsity in medians.index
    return {"images_per_s": medians[sparsity] if measured else medians.min(), "measured": measured}


def days_on_nodes(costs: pd.DataFrame, nodes: int, gpus_per_node: int = 8, efficiency: float = 1.0) -> float:
    """Days that all trainings of ``costs`` take on a cluster, each on a node of its own, the longest first.

    Trainings do not talk to each other, so nodes add up without loss; within a node ``efficiency`` is the speed of its
    GPUs together over that of one times their number, an assumption until it is measured.

    Raises:
        ValueError: fewer than one node or GPU, or an efficiency outside (0, 1].
    """
    for name, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency is {efficiency}; expected a fraction in (0, 1]")
    busy = [0.0] * nodes
    for hours in sorted(costs["gpu_hours"] / (gpus_per_node * efficiency), reverse=True):
        busy[busy.index(min(busy))] += hours
    return max(busy) / 24


MODEL = "vit_b_16"


def readme(store: Store) -> str:
    """What the published grid costs on each GPU that has measured a training step of ViT-B/16, as Markdown.

    Of a GPU's setups (precision, batch size, way to compile) that have all block sizes, the one that trains fastest.
    """
    rows = store.read("training_step")
    rows = rows[(rows["model"] == MODEL) & (rows["metric"] == IMAGES_PER_SECOND) & rows["threads"].isna()]
    lines = [line for device, mine in rows.groupby("device") if (line := _told(str(device), mine))]
    return "\n".join(lines) or (
        "No GPU has measured a training step of ViT-B/16 yet, so no cost is stated here. `PROFILE=imagenet` measures "
        "it (notebook 1), and the pipeline then writes the GPU-hours into this place."
    )


def _told(device: str, rows: pd.DataFrame) -> str:
    fastest = ""
    best = 0.0
    for (precision, batch_size, mode), setup in rows.groupby(["precision", "batch_size", "compile"]):
        try:
            costs = grid_cost(setup)
        except ValueError:
            continue  # not all block sizes: no grid
        dense, sparse = costs["images_per_s"].iloc[0], costs["images_per_s"].iloc[1:].median()
        if sparse <= best:
            continue
        best, hours = sparse, costs["gpu_hours"].sum()
        fastest = (
            f"- {device}, {precision}, batches of {batch_size:.0f}, {mode}: {dense:,.0f} images/s dense, {sparse:,.0f} "
            f"with supermasks. The grid of {len(costs) - 1} trainings and the dense one costs {hours:,.0f} GPU-hours: "
            f"{days_on_nodes(costs, 1):,.0f} days on one node of 8 GPUs, {days_on_nodes(costs, 4):,.0f} on four, if "
            "the 8 GPUs of a node train 8 times as fast as one."
        )
    return fastest
