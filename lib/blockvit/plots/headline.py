"""How much faster a whole model is, on every machine of the tables at once."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .. import headline
from .rows import one_of, require
from .style import DENSE, WIDTH, as_times, entitle, legend, spread
from .words import images, model_title


def headline_speedups(rows: pd.DataFrame) -> Figure:
    """Speedup over the fastest dense engine by what is sparse, a marker a machine, whiskers its spread.

    Args:
        rows: as ``headline.fastest`` gives them, of one batch size.
    """
    rows = require(rows, "whole models on any machine")
    one_of(rows, "model", "batch_size")
    columns = list(rows["column"].unique())
    cases = headline.cases_of(rows)
    names = [headline.EAGER, *map(_label, cases)]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.5 + (0.16 + 0.13 * len(columns)) * len(names)))
    what = f"{model_title(rows['model'].iloc[0])}, {images(rows['batch_size'].iloc[0])}"
    entitle(figure, f"{what}: dense and block-sparse", "whiskers: 20th to 80th percentile of both times")
    markers = dict(zip(columns, "osD^vP*X", strict=False))
    colours = dict(zip(columns, sns.color_palette("colorblind", len(columns)), strict=True))
    offsets = spread(columns[::-1], 0.16 * (len(columns) - 1))  # the y axis points down
    for column, mine in rows.groupby("column", sort=False):
        style = {"color": colours[column], "marker": markers.get(column, "o"), "markersize": 5}
        axes.plot(headline.eager_speedup(mine), offsets[column], linestyle="none", label=column, **style)
        for place, case in enumerate(cases, 1):
            for cell in headline.of_case(mine, case).itertuples():
                y = place + offsets[column]
                axes.hlines(y, cell.speedup_low, cell.speedup_high, color=style["color"], linewidth=1.2)
                axes.plot(cell.speedup, y, **style)
                axes.annotate(
                    f"{cell.speedup:.2f}×", (cell.speedup_high, y), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=6.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                )  # fmt: skip
    axes.axvline(1, color=DENSE, linewidth=1, zorder=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlim=(0, 1.1 * rows["speedup_high"].max()), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel("speedup over the fastest dense engine")
    axes.xaxis.set_major_formatter(FuncFormatter(as_times))
    axes.grid(False, axis="y")
    legend(figure)
    return figure


def _label(case: headline.Case) -> str:
    title = headline.case_title(*case)
    if case == headline.OURS_DENSE:
        return title
    lost = headline.published_loss(case)
    return f"{title}\n{f'{lost} points lost, as published' if lost else 'no accurate model known'}"
