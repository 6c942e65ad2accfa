"""How close single layers come to what the device can do: arithmetic against bytes, on the roofline of both."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import by_block, one_of, require
from .style import (
    WIDTH,
    draw_line,
    engine_style,
    engines_of,
    entitle,
    legend,
    limit_line,
    panel_grid,
    round_axis,
    shared_xlabel,
    shared_ylabel,
    spread,
)
from .words import backend_title, engine_title, measured_on, named_backends


def roofline(rows: pd.DataFrame, limits: pd.DataFrame, peak: float, bandwidth: float | None = None) -> Figure:
    """Achieved arithmetic against arithmetic a byte (Williams et al. 2009), a panel a backend, a marker a block size.

    The roof is what was measured: the sloping part the copy bandwidth of memory, the flat part the peak. Dense engines
    are a marker a token count, at their median; the line through it spans 20% to 80% of their measurements.

    Args:
        rows: latencies (s) of linear layers in one precision, dense ones among them.
        limits: ``limits.linear_seconds`` of ``rows``, for the operations and bytes of each.
        peak: FLOP/s.
        bandwidth: B/s, bytes read and written; None: nothing slopes, for operands that stay in a CPU's caches.
    """
    rows = require(rows[rows["metric"] == "latency"], "linear layers")
    one_of(rows, "precision")
    at = limits.reindex(rows.index)
    rows = rows.assign(intensity=at["flop"] / at["bytes"], speed=at["flop"] / rows["value"] / 1e9)
    backends = sorted(set(rows["backend"]) - {"dense"})
    figure, panels = panel_grid(len(backends), 3, 2.6, sharex=True, sharey=True)
    whose = f" of {backend_title(backends[0])}" if len(backends) == 1 else ""
    title = f"Linear layers: arithmetic{whose} against what the device can do"
    entitle(figure, title, measured_on(rows), _DENSE_RANGE, named_backends(backends))
    x = np.geomspace(rows["intensity"].min() / 1.5, rows["intensity"].max() * 1.5, 200)
    roof = np.minimum(peak, x * (bandwidth or np.inf)) / 1e9
    for axes, backend in zip(panels, backends, strict=True):
        limit_line(axes, x, roof, "measured roof" if bandwidth else "measured peak")
        _dense_engines(axes, rows[rows["backend"] == "dense"])
        for block, cell in by_block(rows[rows["backend"] == backend]):
            draw_line(axes, cell["intensity"], cell["speed"], block, linestyle="none", markersize=4, alpha=0.8)
        round_axis(axes, "x")
        round_axis(axes, "y")
        if len(backends) > 1:
            axes.set_title(backend)
    shared_xlabel(panels, "FLOP a byte moved")
    legend(figure)
    shared_ylabel(figure, "GFLOP/s on kept blocks")
    return figure


_DENSE_RANGE = "dense engines: median, and 20% to 80% of the measurements"


def _dense_engines(axes: Axes, rows: pd.DataFrame) -> None:
    """A marker an engine and token count at its median, side by side: they have the arithmetic of one another."""
    engines = engines_of(rows)
    sideways = spread(engines, -0.05 * (len(engines) - 1))
    rows = rows.sort_values("compile", key=lambda column: column.map(engines.index))
    for (engine, _), cell in rows.groupby(["compile", "tokens"], sort=False):
        x = cell["intensity"].median() * np.exp(sideways[engine])
        low, middle, high = cell["speed"].quantile([0.2, 0.5, 0.8])
        style = {**engine_style(engine), "zorder": 3, "label": f"dense, {engine_title(engine)}"}
        axes.vlines(x, low, high, color=style["color"], linewidth=1, zorder=3)
        axes.plot([x], [middle], linestyle="none", markersize=5, **style)


_WAYS = {"layer by layer": "sparse, layer by layer", "one kernel": "sparse, one kernel"}


def traffic(ways: pd.DataFrame, parts: Sequence[str], setting: str = "") -> Figure:
    """Bytes that an MLP moves, a bar a way to run it, cut into what is moved; behind each its operations a byte.

    Args:
        ways: ``limits.mlp_traffic``.
        parts: the columns to stack, ``limits.TRAFFIC``.
        setting: tokens, precision, sparsity and block size that were counted with, for the subtitle.
    """
    require(ways, "ways to run an MLP")
    figure, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.42 * len(ways)))
    entitle(figure, "What an MLP has to move, dense and sparse", setting, "counted from the shapes, not measured")
    places = np.arange(len(ways))[::-1]
    start = np.zeros(len(ways))
    for part, colour in zip(parts, sns.color_palette("colorblind", len(parts)), strict=True):
        axes.barh(places, ways[part] / 1e6, left=start / 1e6, height=0.6, color=colour, label=part)
        start += ways[part].to_numpy()
    for place, total, intensity in zip(places, start / 1e6, ways["intensity"], strict=True):
        text = f"{total:,.0f} MB, {intensity:.0f} FLOP a byte"
        axes.annotate(text, (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(places, [_WAYS.get(way, way) for way in ways.index])
    axes.set(xlabel="MB moved", xlim=(0, 1.4 * start.max() / 1e6))
    axes.grid(False, axis="y")
    legend(figure)
    return figure
