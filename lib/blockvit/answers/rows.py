"""Which rows of the tables a notebook's figures, tables and sentences are about."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..comparisons import fastest_of_each, fullest_group, where

AT = 0.9
"""The sparsity at which the post states its speedups."""


def with_dense(rows: pd.DataFrame, **columns: Any) -> pd.DataFrame:
    """As ``where``, but the dense rows all stay."""
    dense = rows["backend"] == "dense"
    return rows[dense | rows.index.isin(where(rows[~dense], **columns).index)]


def timed_alone(rows: pd.DataFrame) -> pd.DataFrame:
    """The groups that have one way to run dense PyTorch: the threads of other engines disturb it where it is eager."""
    ways = where(rows, backend="dense").groupby("group")["compile"].nunique()
    return rows[rows["group"].map(ways) == 1]


def timed_together(rows: pd.DataFrame, cell: pd.DataFrame) -> pd.DataFrame:
    """Those of ``rows`` that were timed in turn with the fullest group of ``cell``, the dense ones among them."""
    return rows[rows["group"].isin(fullest_group(cell)["group"])]


def by_threads(rows: pd.DataFrame, **cell: Any) -> pd.DataFrame:
    """Of each scope and number of threads the fullest group of a cell; without what ``torch.compile`` made.

    A compiled model is timed with all threads only.
    """
    rows = with_dense(rows[rows["compile"] != "compile"], **cell)
    sparse = rows[rows["backend"] != "dense"]
    groups = [fullest_group(line)["group"].iloc[0] for _, line in sparse.groupby(["scope", "threads"])]
    return rows[rows["group"].isin(groups)]


def with_speed(lost: pd.DataFrame, speedups: pd.DataFrame) -> pd.DataFrame:
    """The fastest of ``speedups`` in each block size and sparsity that ``lost`` has, with what was lost there.

    Args:
        lost: cells of ``losses.points_lost``, of one model.
        speedups: of the same model, one batch size and precision.
    """
    cell = ["block_size", "sparsity"]
    fastest = fastest_of_each(speedups, cell).drop(columns=["low", "high"])
    return fastest.merge(lost[[*cell, "top1", "low", "high", "lost"]], on=cell)
