"""What rows of the tables say beside each other: speedups, overheads, break-even, and which of many rows counts.

Reads what ``results.Store.read`` gives; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .results import KEYS, STEP_SECONDS

_SAME = [column for column in KEYS if column not in ("torch", "triton")]  # what is measured, whatever with


def where(rows: pd.DataFrame, **columns: Any) -> pd.DataFrame:
    """``rows`` narrowed to the given values of columns; a list or tuple means any of them."""
    for column, wanted in columns.items():
        rows = rows[rows[column].isin(wanted if isinstance(wanted, list | tuple) else [wanted])]
    return rows


def speedups(rows: pd.DataFrame, *, baseline: str = "fastest") -> pd.DataFrame:
    """Speed of each sparse latency row over the dense one of its own group, one measurement of each kind only.

    Of several in a run that counts which is beside the most dense variants, or over eager dense PyTorch beside the
    fewest, whose threads disturb it least; of these the one of the most repeats; and at last the newest.

    Args:
        rows: rows with ``metric == "latency"`` among them, as ``Store.read`` gives them.
        baseline: ``"fastest"``, the fastest dense variant of the group, or ``"eager"``, dense PyTorch as it comes.

    Returns:
        The sparse rows with ``speedup`` (dense time / sparse time), its range ``speedup_low`` to ``speedup_high``
        (dense 20th over sparse 80th percentile and the reverse), ``dense_value``, ``dense_compile``, and how many
        dense variants the group has, ``dense_variants``.
    """
    if baseline not in ("fastest", "eager"):
        raise ValueError(f"baseline is {baseline!r}; expected 'fastest' or 'eager'")
    latency = rows[(rows["metric"] == "latency") & (rows["group"] != "")]  # without a group: not to be compared
    is_dense = latency["backend"] == "dense"
    on = ["experiment", "group", "precision"]
    dense = latency[is_dense].assign(dense_variants=latency[is_dense].groupby(on)["compile"].transform("nunique"))
    dense = dense[dense["compile"] == "eager"] if baseline == "eager" else dense
    dense = dense.sort_values("value").drop_duplicates(on)
    columns = {"value": "dense_value", "low": "dense_low", "high": "dense_high", "compile": "dense_compile"}
    pairs = latency[~is_dense].merge(dense[[*on, "dense_variants", *columns]].rename(columns=columns), on=on)
    pairs = pairs.assign(
        speedup=pairs["dense_value"] / pairs["value"],
        speedup_low=pairs["dense_low"] / pairs["high"],
        speedup_high=pairs["dense_high"] / pairs["low"],
    )
    for column, most in (("dense_variants", "max" if baseline == "fastest" else "min"), ("repeats", "max")):
        wanted = pairs.groupby([*_SAME, "run"], dropna=False)[column].transform(most)
        pairs = pairs[(pairs[column] == wanted) | wanted.isna()]
    return newest(pairs)


def beside_most_engines(speedups: pd.DataFrame) -> pd.DataFrame:
    """The speedups over the most dense variants: the other cells were timed beside a weaker field."""
    return speedups[speedups["dense_variants"] == speedups["dense_variants"].max()]


def over_strongest_field(speedups: pd.DataFrame) -> pd.DataFrame:
    """Of each cell the rows over the most dense variants: beside a weaker field a variant must not win by its weakness.

    ``speedups`` are as the function of that name returns them; a cell is what is computed, on one device.
    """
    cell = ["device", "precision", "model", "scope", "tokens", "batch_size", "block_size", "sparsity"]
    most = speedups.groupby(cell, dropna=False)["dense_variants"].transform("max")
    return speedups[speedups["dense_variants"] == most]


def fastest_of_each(speedups: pd.DataFrame, cell: Sequence[str], *, by: str = "speedup") -> pd.DataFrame:
    """Of each cell, rows alike in the columns ``cell``, the one with the highest speedup; the slowest cell first.

    ``by="speedup_low"`` takes the one that is surely fastest: of many medians the highest is the luckiest, too.
    """
    return speedups.sort_values(by).drop_duplicates(list(cell), keep="last")


def step_overheads(rows: pd.DataFrame) -> pd.DataFrame:
    """How much longer each masked training step takes than the dense one of its own group, run in the same way.

    Args:
        rows: of experiment ``training_step``, as ``Store.read`` gives them.

    Returns:
        The masked rows of ``STEP_SECONDS``, newest of each kind, with ``overhead`` (masked time / dense time - 1), its
        range ``overhead_low`` to ``overhead_high`` (20th over dense 80th percentile and the reverse), ``dense_value``.
    """
    steps = rows[(rows["metric"] == STEP_SECONDS) & (rows["group"] != "")]
    is_dense, on = steps["backend"] == "dense", ["group", "compile"]
    columns = {"value": "dense_value", "low": "dense_low", "high": "dense_high"}
    pairs = steps[~is_dense].merge(steps.loc[is_dense, [*on, *columns]].rename(columns=columns), on=on)
    pairs = pairs.assign(
        overhead=pairs["value"] / pairs["dense_value"] - 1,
        overhead_low=pairs["low"] / pairs["dense_high"] - 1,
        overhead_high=pairs["high"] / pairs["dense_low"] - 1,
    )
    return newest(pairs)


def break_even(sparsity: Sequence[float], speedup: Sequence[float], *, log: bool = False) -> float | None:
    """Lowest sparsity from which on the speedup stays above 1, interpolated between measured points.

    None if it is not above 1 at the highest sparsity; the lowest measured sparsity if it is above 1 everywhere.

    Args:
        sparsity: in any order.
        speedup: over dense, for each sparsity.
        log: interpolate the speedup's logarithm: the place where a line drawn on a logarithmic axis crosses 1. Without
            it the speedup itself is interpolated, which is where a line on a linear axis does, and what the published
            break-even sparsities are compared with. Both lie between the same two measured points.
    """
    order = np.argsort(sparsity)
    s, v = np.asarray(sparsity, dtype=float)[order], np.asarray(speedup, dtype=float)[order]
    if not len(v) or v[-1] <= 1:
        return None
    below = np.flatnonzero(v <= 1)
    if not len(below):
        return float(s[0])
    i = below[-1]
    height = np.log(v) if log else v - 1  # above break-even
    return float(s[i] - height[i] / (height[i + 1] - height[i]) * (s[i + 1] - s[i]))


def dense_throughput(rows: pd.DataFrame) -> pd.Series:
    """FLOP/s of each linear layer as if it were dense: ``2 * out * in * tokens`` over its latency."""
    out_in = rows["model"].str.split("x", expand=True).astype(float)
    return 2 * out_in[0] * out_in[1] * rows["tokens"] / rows["value"]


def newest(rows: pd.DataFrame, ignore: Sequence[str] = ()) -> pd.DataFrame:
    """Of rows that measure the same thing (any version, any run), the last one; order kept otherwise.

    Rows that differ only in the key columns of ``ignore`` count as the same, too.
    """
    same = [column for column in _SAME if column not in ignore]
    return rows.sort_values("date", kind="stable").drop_duplicates(same, keep="last").reset_index(drop=True)


def fullest_group(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the newest run's group with the most latencies; of several, the most repeats, and then the newest.

    For tables and figures of times: what stands side by side there was timed in turn.
    """
    latency = rows[(rows["metric"] == "latency") & (rows["group"] != "")]
    if latency.empty:
        return latency
    latency = latency[latency["run"] == latency.sort_values("date", kind="stable")["run"].iloc[-1]]
    groups = latency.groupby("group").agg(size=("value", "size"), repeats=("repeats", "max"), date=("date", "max"))
    return rows[rows["group"] == groups.sort_values(["size", "repeats", "date"]).index[-1]]


def variant(row: pd.Series) -> str:
    """What computed a row: its backend, and how it was run unless that was eagerly: ``cpu``, ``cpu with compile``."""
    return row.backend if row.compile == "eager" else f"{row.backend} with {row.compile}"


def most_threads(rows: pd.DataFrame) -> pd.DataFrame:
    """Of CPU rows those of the largest number of threads, which is what a device is judged by; GPU rows all."""
    return rows[rows["threads"].isna() | (rows["threads"] == rows["threads"].max())]


def newest_machines(rows: pd.DataFrame) -> list[str]:
    """Of each processor, which may have been measured with several numbers of cores, the ``device`` measured last."""
    last = rows.groupby("device")["date"].max().sort_values(kind="stable")
    processor = last.index.str.replace(r" \(\d+ cores?\)$", "", regex=True)
    return list(last.groupby(processor).tail(1).index)
