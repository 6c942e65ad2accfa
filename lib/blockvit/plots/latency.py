"""One image at a time: how long it takes, how long when slow, and what more threads bring."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..comparisons import newest
from ..results import SCOPE_TITLES
from .rows import one_of, require
from .style import (
    WIDTH,
    backend_style,
    engine_style,
    engines_of,
    entitle,
    legend,
    panel_grid,
    round_axis,
    shared_xlabel,
    sizes_axis,
    three_digits,
)
from .words import engine_title, measured_on, model_setting, named_backends, scope_title

TAILS = ("latency", "latency_p90")
"""Metrics of a distribution of latencies: its median and its 90th percentile. The 99th of a hundred samples, which the
tables have as well, is about their maximum and no measurement."""


def latency_tails(rows: pd.DataFrame) -> Figure:
    """Median and 90th percentile of the latency of each variant, the fastest at the top.

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
    kinds = rows.drop_duplicates("variant").set_index("variant")
    figure, axes = plt.subplots(figsize=(WIDTH, 1.4 + 0.22 * len(table)))
    entitle(figure, f"{model_setting(rows)}: how long it takes", measured_on(rows), named_backends(rows["backend"]))
    for place, (variant, (median, slow)) in enumerate(table[list(TAILS)].iterrows()):
        style = _style(kinds.loc[variant])
        axes.hlines(place, median, slow, color=style["color"], linewidth=1)
        axes.plot(median, place, markersize=5, **style)
        axes.plot(slow, place, marker="|", markersize=7, color=style["color"])
        axes.annotate(
            f"{three_digits(median)} / {three_digits(slow)}", (slow, place), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=7,
        )  # fmt: skip
    axes.set_yticks(range(len(table)), table.index, fontsize=7.5)
    axes.set(
        xlabel="milliseconds: median (marker) / 90th percentile (tick)", xlim=(0, 1.16 * table["latency_p90"].max())
    )
    axes.grid(False, axis="y")
    return figure


def threads(rows: pd.DataFrame) -> Figure:
    """Latency and its spread against the number of threads, a panel a scope, dense engines in grey; logarithmic axes.

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
    known = [*SCOPE_TITLES]
    groups = {scope: cell["group"].unique() for scope, cell in rows[rows["backend"] != "dense"].groupby("scope")}
    scopes = sorted(groups, key=lambda scope: (known.index(scope) if scope in known else len(known), scope))
    figure, panels = panel_grid(len(scopes), 2, 2.6, sharey=True)
    entitle(
        figure, f"{model_setting(rows)}: time by number of threads", measured_on(rows), named_backends(rows["backend"])
    )
    for axes, scope in zip(panels, scopes, strict=True):
        together = rows[rows["group"].isin(groups[scope]) & rows["scope"].isin(["dense", scope])]
        dense, ours = together[together["backend"] == "dense"], together[together["backend"] != "dense"]
        for engine in engines_of(dense):
            _line(axes, dense[dense["compile"] == engine], f"dense, {engine_title(engine)}", "--")
        for backend, line in ours.groupby("backend"):
            _line(axes, line, backend, "-")
        sizes_axis(axes, rows["threads"])
        round_axis(axes)
        axes.set_title(scope_title(scope))
    shared_xlabel(panels, "threads")
    panels[0].set_ylabel("milliseconds")
    legend(figure)
    return figure


def _line(axes: Axes, rows: pd.DataFrame, label: str, dash: str) -> None:
    style = {"markersize": 4.5, "linewidth": 1.2, "linestyle": dash, **_style(rows.iloc[0])}
    axes.plot(rows["threads"], rows["value"] * 1e3, label=label, **style)
    axes.fill_between(rows["threads"], rows["low"] * 1e3, rows["high"] * 1e3, color=style["color"], alpha=0.15, lw=0)


def _style(row: pd.Series) -> dict[str, object]:
    return engine_style(row["compile"]) if row["backend"] == "dense" else backend_style(row["backend"])


def _labels(rows: pd.DataFrame) -> list[str]:
    """``dense, OpenVINO`` for an engine, ``cpu, mlp`` for a backend and what of the model is sparse."""
    return [
        f"dense, {engine_title(row.compile)}" if row.backend == "dense"
        else f"{row.backend}, {row.scope} sparse" + ("" if row.compile == "eager" else f", {row.compile}")
        for row in rows.itertuples()
    ]  # fmt: skip
