"""One image at a time: how long it takes, how long at worst, and what more threads bring."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ..results import newest
from .models import scope_title
from .rows import one_of, require
from .style import ACCENT, ACCENT_TOO, DENSE, WIDTH, legend, panel_grid, shared_xlabel, sizes_axis

TAILS = {"latency": "o", "latency_p90": "|", "latency_p99": ">"}
"""Metrics of a distribution of latencies and their markers: the median, the 90th and the 99th percentile."""

_NAMES = {"latency": "median", "latency_p90": "90%", "latency_p99": "99%"}


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
        colour = DENSE if dense[variant] else ACCENT
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
    """Latency against the number of threads, a panel a scope, dense engines in grey; logarithmic axes.

    Args:
        rows: latencies (s) of one model, precision, batch size, block size and sparsity; those of a scope and number
            of threads, the dense ones that it is compared with among them, are of one group.
    """
    rows = require(rows[rows["metric"] == "latency"], "latencies by threads")
    one_of(rows, "model", "precision", "batch_size", "block_size", "sparsity")
    for (scope, count), cell in rows[rows["backend"] != "dense"].groupby(["scope", "threads"]):
        if cell["group"].nunique() > 1:
            raise ValueError(f"one group a scope and number of threads, but {scope} at {count:.0f} has several")
    rows = rows.sort_values("threads")
    scopes = {scope: cell["group"].unique() for scope, cell in rows[rows["backend"] != "dense"].groupby("scope")}
    figure, panels = panel_grid(len(scopes), 2, 2.6, sharey=True)
    engines = sorted(rows.loc[rows["backend"] == "dense", "compile"].unique())
    greys = dict(zip(engines, itertools.cycle(zip(("0.2", "0.4", "0.55", "0.7"), "osD^", strict=True)), strict=False))
    ours = sorted(set(rows["backend"]) - {"dense"})
    colours = dict(zip(ours, itertools.cycle(zip((ACCENT, ACCENT_TOO), "vP", strict=True)), strict=False))
    for axes, (scope, groups) in zip(panels, scopes.items(), strict=True):
        together = rows[rows["group"].isin(groups) & rows["scope"].isin(["dense", scope])]
        for (backend, engine), line in together.groupby(["backend", "compile"], sort=False):
            is_dense = backend == "dense"
            colour, marker = greys[engine] if is_dense else colours[backend]
            axes.plot(
                line["threads"], line["value"] * 1e3, color=colour, marker=marker, markersize=4.5, linewidth=1.2,
                linestyle="--" if is_dense else "-", label=f"dense, {engine}" if is_dense else backend,
            )  # fmt: skip
        sizes_axis(axes, rows["threads"])
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(scope_title(scope))
    shared_xlabel(panels, "threads")
    panels[0].set_ylabel("milliseconds")
    figure.suptitle(_setting(rows), fontsize=9)
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
