"""What sparsity costs in accuracy, by itself and against measured speed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .rows import block_sizes, require
from .style import (
    COLOURS,
    DENSE,
    WIDTH,
    as_times,
    draw_line,
    legend,
    percent_axis,
    place_labels,
    published_point,
    reference_line,
)


def accuracy(top1: pd.DataFrame, published_loss: pd.DataFrame) -> Figure:
    """Accuracy, and points lost against dense, by sparsity and block size; error bars span the seeds.

    Args:
        top1: rows with the final test accuracy in percent.
        published_loss: ``block_size``, ``sparsity``, ``lost`` (points of ImageNet top-1) and ``source``.
    """
    rows = require(top1, "accuracies")
    dense = rows.loc[rows["backend"] == "dense", "value"].mean()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    for block in block_sizes(rows):
        by_sparsity = rows[rows["block_size"] == block].groupby("sparsity")["value"].agg(["mean", "min", "max"])
        for axes, values in ((left, by_sparsity), (right, dense - by_sparsity)):
            spread = [abs(values["mean"] - values["min"]), abs(values["max"] - values["mean"])]
            draw_line(axes, values.index, values["mean"], block)
            axes.errorbar(values.index, values["mean"], spread, fmt="none", color=COLOURS[block], capsize=2, lw=1)
    reference_line(left, dense, f"dense {dense:.1f}%")
    reference_line(right, 0)
    for point in published_loss.itertuples():
        published_point(right, point.sparsity, point.lost, point.block_size)
    left.set(xlabel="sparsity", ylabel="test accuracy (%)")
    right.set(xlabel="sparsity", ylabel="points lost against dense")
    right.invert_yaxis()
    for axes in (left, right):
        percent_axis(axes)
    legend(figure, "published, ImageNet" if len(published_loss) else None)
    return figure


def pareto(points: pd.DataFrame, dense_top1: float) -> Figure:
    """Accuracy against measured speed of one model: columns ``block_size``, ``sparsity``, ``speedup``, ``top1``.

    Each point bears its sparsity, in its own colour and where it covers no other.
    """
    rows = require(points, "models with both accuracy and speed")
    figure, axes = plt.subplots(figsize=(WIDTH * 0.7, 3.4))
    for block in block_sizes(rows):
        cell = rows[rows["block_size"] == block].sort_values("sparsity")
        draw_line(axes, cell["speedup"], cell["top1"], block, linewidth=0)
    axes.plot([1], [dense_top1], marker="*", markersize=11, color=DENSE, linestyle="none", label="dense")
    axes.axhline(dense_top1 - 2, color=DENSE, linestyle=":", linewidth=1, label="2 points lost")
    axes.margins(0.08)
    axes.xaxis.set_major_formatter(FuncFormatter(as_times))
    axes.set(xlabel="speedup over dense, measured", ylabel="test accuracy (%)")
    legend(figure)
    place_labels(
        axes,
        [
            (p.speedup, p.top1, f"{p.sparsity:.0%}", COLOURS[int(p.block_size)])
            for p in rows.dropna(subset="block_size").sort_values(["top1", "speedup"], ascending=False).itertuples()
        ],
        obstacles=[(1, dense_top1)],
    )
    return figure
