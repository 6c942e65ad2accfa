"""How close single layers come to what the device can do: arithmetic against bytes, on the roofline of both."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .rows import by_block, one_of, require
from .style import DENSE, WIDTH, draw_line, legend, limit_line, panel_grid, shared_xlabel, shared_ylabel


def roofline(rows: pd.DataFrame, limits: pd.DataFrame, peak: float, bandwidth: float) -> Figure:
    """Achieved arithmetic against arithmetic a byte (Williams et al. 2009), a panel a backend, a marker a block size.

    The roof is what was measured: the sloping part the copy bandwidth of memory, the flat part the peak. Operands that
    stay in a cache may lie above the slope.

    Args:
        rows: latencies (s) of linear layers in one precision, dense ones among them.
        limits: ``limits.linear_seconds`` of ``rows``, for the operations and bytes of each.
        peak: FLOP/s.
        bandwidth: B/s, bytes read and written.
    """
    rows = require(rows[rows["metric"] == "latency"], "linear layers")
    one_of(rows, "precision")
    at = limits.reindex(rows.index)
    rows = rows.assign(intensity=at["flop"] / at["bytes"], speed=at["flop"] / rows["value"])
    dense = rows[rows["backend"] == "dense"]
    backends = sorted(set(rows["backend"]) - {"dense"})
    figure, panels = panel_grid(len(backends), 3, 2.6, sharex=True, sharey=True)
    x = np.geomspace(rows["intensity"].min() / 1.5, rows["intensity"].max() * 1.5, 200)
    for axes, backend in zip(panels, backends, strict=True):
        limit_line(axes, x, np.minimum(peak, bandwidth * x) / 1e9, "measured roof")
        axes.plot(
            dense["intensity"], dense["speed"] / 1e9, linestyle="none", marker=".", markersize=3, color=DENSE,
            alpha=0.6, label="dense engines", zorder=1.5,
        )  # fmt: skip
        for block, cell in by_block(rows[rows["backend"] == backend]):
            draw_line(axes, cell["intensity"], cell["speed"] / 1e9, block, linestyle="none", markersize=4, alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(backend)
    shared_xlabel(panels, "FLOP a byte moved")
    legend(figure)
    shared_ylabel(figure, "GFLOP/s on kept blocks")
    return figure


def traffic(ways: pd.DataFrame, parts: Sequence[str]) -> Figure:
    """Bytes that an MLP moves, a bar a way to run it, cut into what is moved; behind each its operations a byte.

    Args:
        ways: ``limits.mlp_traffic``.
        parts: the columns to stack, ``limits.TRAFFIC``.
    """
    require(ways, "ways to run an MLP")
    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + 0.42 * len(ways)))
    places = np.arange(len(ways))[::-1]
    start = np.zeros(len(ways))
    for part, colour in zip(parts, sns.color_palette("colorblind", len(parts)), strict=True):
        axes.barh(places, ways[part] / 1e6, left=start / 1e6, height=0.6, color=colour, label=part)
        start += ways[part].to_numpy()
    for place, total, intensity in zip(places, start / 1e6, ways["intensity"], strict=True):
        text = f"{total:,.0f} MB, {intensity:.0f} FLOP a byte"
        axes.annotate(text, (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(places, ways.index)
    axes.set(ylabel="how it is run", xlabel="MB moved", xlim=(0, 1.4 * start.max() / 1e6))
    axes.grid(False, axis="y")
    legend(figure)
    return figure
