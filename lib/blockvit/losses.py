"""Points of accuracy lost to sparsity: trained models beside the dense one of the same data, model and recipe.

From the tables alone; no torch. A training's recipe is a line of text there: the data set's, what was changed for all
trainings of a grid and, behind a plus sign, what a variant does unlike the others:
``cifar10 epochs=60 + method=spartan``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from . import literature
from .comparisons import newest

HEADLINE = (0.7, 0.8, 0.9)
"""The sparsities that the claims are about and the published losses were measured at."""

TITLES = {"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG)", "imagenet": "ImageNet"}
"""How prose and figures call a data set; one that is not here bears its own name."""

TEST_IMAGES = {"digits": 360, "cifar10": 10_000, "cifar10-jpeg": 10_000, "imagenet": 50_000}
"""Of data sets whose split is known; it bounds how well two models can be told apart."""

SMALL_LOSS, LIMITED_LOSS = 1.0, 5.0
"""Points: the most that is "no meaningful loss" and "limited loss". The post gives no numbers for its words; the
published losses (0.7 to 5 points at 80%, 2 to 19 at 90%) fit these."""

CHEAP = 2.0
"""Points: less than this is what the post's headline lost."""

FROZEN = "train_scores=False"
"""The variant that learns no masks."""

OF_DENSE_TOO = ("epochs", "start")
"""What of a variant its dense model has as well: to be trained for as long, from the same start."""

STARTED = "start=dense"
"""What a variant says that begins with the trained dense model."""

MODEL = ["dataset", "model", "recipe"]
CELL = [*MODEL, "scope", "variant", "block_size", "sparsity"]


def described(dataset: str, changes: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    """The line of text for a recipe: ``cifar10 epochs=60 + method=spartan``."""

    def pairs(values: Mapping[str, Any]) -> list[str]:
        return [f"{name}={value}" for name, value in sorted(values.items())]

    return " ".join([dataset, *pairs(changes), *(["+", *pairs(variant)] if variant else [])])


def with_variants(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with the variant, empty for the reference method, in a column of its own instead of in ``recipe``."""
    parts = [recipe.partition(" + ") for recipe in rows["recipe"].astype(str)]
    return rows.assign(recipe=[recipe for recipe, _, _ in parts], variant=[variant for _, _, variant in parts])


def of_recipe(rows: pd.DataFrame, changes: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of trainings whose recipe is the data set's with ``changes``; variants of it are among them."""
    wanted = described("", changes, {}).strip()
    recipes = with_variants(rows)["recipe"].map(lambda recipe: recipe.partition(" ")[2])
    return rows[recipes == wanted]


def top1(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The accuracies among the rows of the table ``accuracy``, the newest of each training; see ``with_variants``.

    A training counts once, on however many devices it ran: none changes what it comes to, but for rounding.
    """
    return with_variants(newest(accuracy[accuracy["metric"] == "top1"], ignore=("device", "threads")))


def points_lost(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Points lost against the dense model of the same data set, model and recipe, by cell and variant.

    A variant that starts from a trained model, or trains for another time, is compared with a dense model that does so.

    Args:
        accuracy: rows of the table of that name.

    Returns:
        ``CELL``, and ``top1`` with the ``low`` and ``high`` of the seeds, their number ``seeds`` and ``seed_variance``
        (of one training, in points squared, from all cells of the model with that sparsity; NaN where none has two
        seeds), ``dense_top1``, ``dense_seeds``, ``dense_seed_variance`` and ``lost``. Cells without a dense model to
        compare with are left out.
    """
    rows = top1(accuracy)
    is_dense = rows["backend"] == "dense"
    counterpart = [*MODEL, "dense_variant"]
    dense = rows[is_dense].rename(columns={"variant": "dense_variant"})
    dense = dense.groupby(counterpart, as_index=False)["value"].agg(["mean", "count", "var"])
    sparse = rows[~is_dense].groupby(CELL, as_index=False)["value"].agg(["mean", "min", "max", "count", "var"])
    cells = sparse.rename(columns={"mean": "top1", "min": "low", "max": "high", "count": "seeds"})
    freedom = cells["seeds"] - 1
    parts = cells.assign(squares=cells["var"] * freedom, freedom=freedom)
    # Pooled, for two seeds of one cell alone tell little.
    pooled = parts.groupby([*MODEL, "sparsity"])[["squares", "freedom"]].transform("sum")
    cells = cells.drop(columns="var").assign(seed_variance=pooled["squares"] / pooled["freedom"])
    names = {"mean": "dense_top1", "count": "dense_seeds", "var": "dense_seed_variance"}
    cells = cells.assign(dense_variant=cells["variant"].map(_of_dense))
    cells = cells.merge(dense.rename(columns=names), on=counterpart)
    return cells.assign(lost=cells["dense_top1"] - cells["top1"])


def _of_dense(variant: str) -> str:
    """The variant of the dense model that a variant is compared with."""
    return " ".join(pair for pair in variant.split() if pair.partition("=")[0] in OF_DENSE_TOO)


def reference(cells: pd.DataFrame) -> pd.DataFrame:
    """Of rows with a ``variant``, those of the reference method."""
    return cells[cells["variant"] == ""]


def beside_published(lost: pd.DataFrame) -> pd.DataFrame:
    """The cells of ``points_lost`` that have a published loss at their block size and sparsity, with it.

    Returns:
        Their rows with ``published`` (points of ImageNet top-1) and ``source``.
    """
    goals = literature.losses().rename(columns={"lost": "published"})
    return lost.merge(goals, on=["block_size", "sparsity"])


def uncertainty(lost: pd.DataFrame) -> pd.Series:
    """One standard error of ``lost``, in points; NaN where neither the test images nor seeds tell it.

    Each of the two accuracies has two errors: what the number of test images leaves open, which no further seed makes
    smaller, for all see the same images; and what seeds differ by, over their number. The two models are taken to err
    independently of one another, which is too careful by as much as they err on the same images. ``lost`` is as of
    ``points_lost``.
    """
    return (_variance(lost) + _variance(lost, "dense_")) ** 0.5


def _variance(lost: pd.DataFrame, of: str = "") -> pd.Series:
    """Of the mean accuracies ``top1`` or, ``of`` the ``"dense_"`` models, ``dense_top1``; in points squared."""
    top1, images = lost[f"{of}top1"], lost["dataset"].map(TEST_IMAGES).astype(float)
    errors = [top1 * (100 - top1) / images, lost[f"{of}seed_variance"] / lost[f"{of}seeds"]]
    return pd.concat(errors, axis=1).sum(axis=1, min_count=1)


def missing(
    rows: pd.DataFrame, block_sizes: Iterable[int], sparsities: Iterable[float], seeds: Iterable[int]
) -> dict[int, list[str]]:
    """Which trainings of a grid ``rows`` (see ``top1``) lack, by seed: ``{1: ["dense", "32×32 at 80%, 90%"]}``."""
    there = set(reference(rows)[["seed", "block_size", "sparsity"]].fillna(0).itertuples(index=False, name=None))
    sparsities, found = list(sparsities), {}
    for seed in seeds:
        found[seed] = [] if (seed, 0, 0) in there else ["dense"]
        for block in block_sizes:
            lacking = [f"{s:.0%}" for s in sparsities if (seed, block, s) not in there]
            found[seed] += [f"{block}×{block} at {', '.join(lacking)}"] if lacking else []
    return {seed: cells for seed, cells in found.items() if cells}


def setting(dataset: str, model: str, recipe: str) -> str:
    """What was trained, for prose: ``CIFAR-10 (JPEG), vit_cifar_small, 6 epochs``; epochs where they were changed."""
    epochs = re.search(r"\bepochs=(\d+)", recipe)
    return ", ".join([TITLES.get(dataset, dataset), model, *([f"{epochs[1]} epochs"] if epochs else [])])


def difference(one: pd.Series, other: pd.Series) -> tuple[float, float]:
    """How many points more ``other`` lost than ``one``, and one standard error of that; rows of ``points_lost``."""
    variances = _variance(pd.DataFrame([one, other]).infer_objects())
    return other["lost"] - one["lost"], variances.sum(skipna=False) ** 0.5


def surely_fastest(points: pd.DataFrame, most: float = CHEAP) -> pd.DataFrame:
    """Of models that ``lost`` less than ``most`` points the one that is surely fastest: one row, or none.

    The highest low end of the speedup's spread, for the highest median is the luckiest one.
    """
    return points[points["lost"] < most].nlargest(1, "speedup_low")
