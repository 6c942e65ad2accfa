"""One image at a time: how long it takes, how long at worst, and what more threads bring."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ..results import newest
from .rows import one_of, require
from .style import DENSE, WIDTH, legend, sizes_axis

TAILS = {"latency": "o", "latency_p90": "|", "latency_p99": ">"}
"""Metrics of a distribution of latencies and their markers: the median, the 90th and the 99th percentile."""

_NAMES = {"latency": "median", "latency_p90": "90%", "latency_p99": "99%"}
_SPARSE = sns.color_palette("colorblind", 6)


def latency_tails(rows: pd.DataFrame) -> Figure:
    """Median, 90th and 99th percentile of the latency of each variant, the fastest at the top.

    Args:
        rows: of one model, precision, batch size and number of threads, with the metrics of ``TAILS`` (s). A
            distribution is that of the newest group that has all of it.
    """
    rows = rows[rows["metric"].isin(TAILS)].assign(variant=lambda rows: _labels(rows))
    whole = rows.groupby(["group", "variant"])["metric"].transform("nunique") == len(TAILS)
    rows = newest(require(rows[whole], "distributions of latencies"))
    one_of(rows, "model", "precision", "batch_size", "threads")
    table = rows.pivot(index="variant", columns="metric", values="value") * 1e3
    table = table.sort_values("latency", ascending=False)
    dense = rows.groupby("variant")["backend"].first() == "dense"
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.24 * len(table)))
    for place, (variant, times) in enumerate(table.iterrows()):
        colour = DENSE if dense[variant] else _SPARSE[0]
        axes.hlines(place, times["latency"], times["latency_p99"], color=colour, linewidth=1)
        for metric, marker in TAILS.items():
            axes.plot(times[metric], place, marker=marker, color=colour, markersize=6 if marker == "|" else 4.5)
        axes.annotate(
            f"{times['latency']:.3g} / {times['latency_p99']:.3g}", (times["latency_p99"], place), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=6.5, color=colour,
        )  # fmt: skip
    for metric, marker in TAILS.items():
        axes.plot([], [], marker=marker, color=DENSE, linestyle="none", label=_NAMES[metric])
    axes.set_yticks(range(len(table)), table.index, fontsize=7.5)
    axes.set(
        ylabel="engine, or backend", xlabel="milliseconds (median / 99%)", xlim=(0, 1.16 * table["latency_p99"].max())
    )
    axes.grid(False, axis="y")
    axes.set_title(_setting(rows))
    legend(figure)
    return figure


def threads(rows: pd.DataFrame) -> Figure:
    """Latency against the number of threads, dense engines in grey and sparse variants in colour; logarithmic axes.

    Args:
        rows: latencies (s) of one model, precision, batch size, block size and sparsity.
    """
    rows = require(rows[rows["metric"] == "latency"], "latencies by threads")
    one_of(rows, "model", "precision", "batch_size", "block_size", "sparsity")
    rows = rows.assign(variant=_labels(rows), dense=rows["backend"] == "dense").sort_values("threads")
    figure, axes = plt.subplots(figsize=(WIDTH * 0.75, 3.1))
    greys = itertools.cycle(zip(("0.2", "0.4", "0.55", "0.7"), "osD^", strict=True))
    colours = itertools.cycle(zip(_SPARSE, "vP*<>X", strict=True))
    order = sorted(set(zip(~rows["dense"], rows["backend"], rows["variant"], strict=True)))  # dense ones first
    for sparse, _, variant in order:
        line, is_dense = rows[rows["variant"] == variant], not sparse
        colour, marker = next(greys if is_dense else colours)
        axes.plot(
            line["threads"], line["value"] * 1e3, color=colour, marker=marker, markersize=4.5,
            linestyle="--" if is_dense else "-", linewidth=1.2, label=variant,
        )  # fmt: skip
    sizes_axis(axes, rows["threads"])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="threads", ylabel="milliseconds")
    axes.set_title(_setting(rows))
    legend(figure)
    return figure


def _labels(rows: pd.DataFrame) -> list[str]:
    """``dense, openvino`` for an engine, ``cpu, mlp`` for a backend and what of the model is sparse."""
    return [
        f"dense, {row.compile}" if row.backend == "dense"
        else f"{row.backend}, {row.scope} sparse" + ("" if row.compile == "eager" else f", {row.compile}")
        for row in rows.itertuples()
    ]  # fmt: skip


def _setting(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    sparse = rows[rows["backend"] != "dense"].iloc[:1]
    told = [first["model"], first["precision"], f"batch {first['batch_size']:.0f}"]
    told += [f"{row.sparsity:.0%} in blocks of {row.block_size:.0f}" for row in sparse.itertuples()]
    return ", ".join(told)
