"""What sparsity costs in accuracy, by itself and against measured speed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ..losses import FROZEN, TITLES
from .rows import baseline, block_sizes, one_of, require
from .style import (
    ACCENT,
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
    datasets = " and ".join(TITLES.get(name, name) for name in rows["dataset"].unique())
    left.set(xlabel="sparsity", ylabel=f"test accuracy, {datasets} (%)")
    right.set(xlabel="sparsity", ylabel="points lost against dense")
    right.invert_yaxis()
    for axes in (left, right):
        percent_axis(axes)
    legend(figure, "published, ImageNet" if len(published_loss) else None)
    return figure


def variants(cells: pd.DataFrame, published_loss: float | None = None) -> Figure:
    """Points lost by each way to train a model of one block size and sparsity; bars span the seeds.

    Args:
        cells: rows of ``losses.points_lost``, all of one block size and sparsity; the reference method is drawn above.
        published_loss: points of ImageNet top-1 that the reference method lost, for a dashed line; None: none known.
    """
    rows = require(cells, "trainings of this block size and sparsity")
    one_of(rows, "model", "recipe", "block_size", "sparsity")
    rows = rows.sort_values(["variant", "lost"], key=lambda c: c if c.name == "lost" else c != "")
    names = [_variant_name(variant) for variant in rows["variant"]]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.7 + 0.26 * len(rows)))
    spread = [rows["high"] - rows["top1"], rows["top1"] - rows["low"]]
    style = {"fmt": "none", "color": DENSE, "capsize": 2, "lw": 1}
    axes.errorbar(rows["lost"], range(len(rows)), xerr=spread, **style)
    for i, (lost, variant) in enumerate(zip(rows["lost"], rows["variant"], strict=True)):
        draw_line(axes, [lost], [i], rows["block_size"].iloc[0], label=None, alpha=1 if variant else 0.5)
    axes.axvline(0, color=DENSE, linewidth=1, zorder=1, label=f"dense, {rows['dense_top1'].iloc[0]:.1f}%")
    if published_loss is not None:
        axes.axvline(published_loss, color=DENSE, linestyle="--", linewidth=1, zorder=1, label="published, ImageNet")
    cell = f"blocks of {rows['block_size'].iloc[0]:.0f}, {rows['sparsity'].iloc[0]:.0%}"
    axes.set(yticks=range(len(rows)), yticklabels=names, ylim=(-0.6, len(rows) - 0.4))
    axes.set(xlabel="points lost against dense", ylabel=cell)
    axes.invert_yaxis()
    legend(figure)
    return figure


_VARIANTS = {
    FROZEN: "random masks, left as drawn",
    "sparsity_schedule=cubic": "sparsity raised slowly (cubic)",
    "method=magnitude sparsity_schedule=cubic": "method=magnitude, sparsity raised slowly",
    "scores_lr=0.1 sparsity_schedule=cubic": "scores_lr=0.1, sparsity raised slowly",
    "sparse_steps=10 sparse_weight_grad=kept": "sparse products, mask for 10 steps",
}
"""What would not be understood as the recipe's fields have it."""


def _variant_name(variant: str) -> str:
    return _VARIANTS.get(variant, variant.replace(" ", ", ")) if variant else "reference"


def mask_changes(masks: pd.DataFrame) -> Figure:
    """What training did to the masks of one block size and sparsity.

    Left, by layer and of the reference method, the share of its blocks that a row of blocks keeps: median, and 20th to
    80th percentile of the rows. Right, by variant, the share of the kept blocks that the untrained mask had dropped:
    the mean of the layers, and a tick a layer.

    Args:
        masks: rows of the table ``masks``, all of one block size and sparsity, with the column ``variant``.
    """
    rows = require(masks, "masks")
    one_of(rows, "model", "recipe", "block_size", "sparsity")
    layers = list(dict.fromkeys(rows["scope"]))
    variants = sorted(rows["variant"].unique())
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, max(3.6, 1.9 + 0.22 * len(variants))))
    for metric, label, colour, shift in (
        ("kept_before", "before training", "0.6", -0.12),
        ("kept", "learnt", ACCENT, 0.12),
    ):
        cell = _by_layer(rows[(rows["variant"] == "") & (rows["metric"] == metric)])
        x = [layers.index(layer) + shift for layer in cell.index]
        spread = [cell["value"] - cell["low"], cell["high"] - cell["value"]]
        left.errorbar(x, cell["value"], spread, fmt="o", ms=3.5, color=colour, capsize=1.5, lw=1, label=label)
    for i, variant in enumerate(variants):
        exchanged = _by_layer(rows[(rows["variant"] == variant) & (rows["metric"] == "exchanged")])["value"]
        right.plot(exchanged, [i] * len(exchanged), "|", color="0.5", ms=7, label=None if i else "a layer")
        right.plot([exchanged.mean()], [i], "o", color=ACCENT, ms=5, label=None if i else "mean of the layers")
    drawn_anew = 100 * rows["sparsity"].iloc[0]
    right.axvline(drawn_anew, color=DENSE, linestyle="--", linewidth=1, label="a mask drawn anew")
    left.set_xticks(range(len(layers)), [_layer_name(layer) for layer in layers], rotation=90, size=7)
    left.set(ylabel="kept of a row of blocks", ylim=(0, None))
    left.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    right.set(yticks=range(len(variants)), yticklabels=[_variant_name(v) for v in variants], xlim=(-3, 103))
    right.set(xlabel="exchanged of the kept blocks", ylim=(len(variants) - 0.4, -0.6))
    right.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    legend(figure)
    return figure


def _by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over the seeds, the layers in their order."""
    return rows.groupby("scope", sort=False)[["value", "low", "high"]].mean()


def _layer_name(name: str) -> str:
    """A layer of a torchvision ViT, short: ``layer 0 mlp.0``."""
    name = name.replace("encoder.layers.encoder_layer_", "layer ").replace("self_attention.", "")
    return name.replace(".", " ", 1) if name.startswith("layer ") else name


def pareto(points: pd.DataFrame, dense_top1: float) -> Figure:
    """Accuracy against measured speed of one model; whiskers span the seeds, and the timings.

    Each point bears its sparsity, in its own colour and where it covers no other.

    Args:
        points: ``block_size``, ``sparsity``, ``speedup`` with ``speedup_low`` and ``speedup_high`` over whichever dense
            variant, and ``top1`` with the ``low`` and ``high`` of its seeds.
        dense_top1: the dense model's accuracy, in percent.
    """
    rows = require(points, "models with both accuracy and speed")
    figure, axes = plt.subplots(figsize=(WIDTH * 0.7, 3.4))
    for block in block_sizes(rows):
        cell = rows[rows["block_size"] == block].sort_values("sparsity")
        draw_line(axes, cell["speedup"], cell["top1"], block, linewidth=0)
        timings = [cell["speedup"] - cell["speedup_low"], cell["speedup_high"] - cell["speedup"]]
        seeds = [cell["top1"] - cell["low"], cell["high"] - cell["top1"]]
        whiskers = {"fmt": "none", "color": COLOURS[block], "lw": 0.7, "alpha": 0.3}
        axes.errorbar(cell["speedup"], cell["top1"], seeds, timings, **whiskers)
    axes.plot([1], [dense_top1], marker="*", markersize=11, color=DENSE, linestyle="none", label="dense")
    axes.axhline(dense_top1 - 2, color=DENSE, linestyle=":", linewidth=1, label="2 points lost")
    axes.margins(0.08)
    axes.xaxis.set_major_formatter(FuncFormatter(as_times))
    axes.set(xlabel=f"speedup over {baseline(rows)}, measured", ylabel="test accuracy (%)")
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
