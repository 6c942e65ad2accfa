"""What sparsity costs in accuracy, by itself and against measured speed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ..losses import FROZEN
from .rows import baseline, block_sizes, one_of, require
from .style import (
    ACCENT,
    COLOURS,
    DENSE,
    WIDTH,
    as_times,
    draw_line,
    entitle,
    legend,
    percent_axis,
    place_labels,
    published_point,
    reference_line,
)
from .words import measured_on, model_setting, trained_model, trained_on


def accuracy(top1: pd.DataFrame, published_loss: pd.DataFrame) -> Figure:
    """Accuracy, and points lost against dense, by sparsity and block size; error bars span the seeds.

    Args:
        top1: rows with the final test accuracy in percent.
        published_loss: ``block_size``, ``sparsity``, ``lost`` (points of ImageNet top-1) and ``source``.
    """
    rows = require(top1, "accuracies")
    dense = rows.loc[rows["backend"] == "dense", "value"].mean()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    entitle(figure, f"{trained_model(rows)}: accuracy by sparsity and block size", trained_on(rows))
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
        percent_axis(axes, rows["sparsity"].dropna())
    legend(figure, "published: ViT-B/16, ImageNet" if len(published_loss) else None)
    return figure


def variants(cells: pd.DataFrame) -> Figure:
    """Points lost by each way to train a model of one block size and sparsity; bars span the seeds.

    Args:
        cells: rows of ``losses.points_lost``, all of one block size and sparsity; the reference method is drawn above,
            random masks left as drawn as a dotted line too: what learning masks has to beat.
    """
    rows = require(cells, "trainings of this block size and sparsity")
    one_of(rows, "model", "recipe", "block_size", "sparsity")
    rows = rows.sort_values(["variant", "lost"], key=lambda c: c if c.name == "lost" else c != "")
    names, block = _variant_labels(rows), rows["block_size"].iloc[0]
    figure, axes = plt.subplots(
        figsize=(WIDTH, 1.7 + (0.32 if any("\n" in name for name in names) else 0.25) * len(rows))
    )
    at = f"{rows['sparsity'].iloc[0]:.0%} sparse in blocks of {block:.0f}"
    entitle(figure, f"{trained_model(rows)}, {at}: what each way to train loses", trained_on(rows))
    spread = [rows["high"] - rows["top1"], rows["top1"] - rows["low"]]
    style = {"fmt": "none", "color": DENSE, "capsize": 2, "lw": 1}
    axes.errorbar(rows["lost"], range(len(rows)), xerr=spread, **style)
    for i, (lost, variant) in enumerate(zip(rows["lost"], rows["variant"], strict=True)):
        draw_line(axes, [lost], [i], block, label=None, alpha=1 if variant else 0.5)
    dense = rows["dense_top1"].unique()
    axes.axvline(0, color=DENSE, linewidth=1, zorder=1, label=f"dense, {dense[0]:.1f}%" if len(dense) == 1 else "dense")
    for lost in rows.loc[rows["variant"] == FROZEN, "lost"]:
        axes.axvline(lost, color=DENSE, linestyle=":", linewidth=0.9, zorder=1, label=_PARTS[FROZEN])
    axes.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6), xlabel="points lost against dense")
    axes.set_yticklabels(names, fontsize=7.5)
    legend(figure)
    return figure


_PARTS = {
    FROZEN: "random masks, left as drawn",
    "sparsity_schedule=cubic": "sparsity raised slowly",
    "sparse_weight_grad=kept": "sparse products",
}
"""What of a variant would not be understood as the recipe's fields have it."""

_PATTERNS = {"sparse_steps": "mask for {} steps", "distillation_alpha": "distilled"}
"""Likewise, for fields that have many values."""


def _variant_labels(rows: pd.DataFrame) -> list[str]:
    """Names of variants, with the dense accuracy where rows are compared with different ones; in two lines if long."""
    several = rows["dense_top1"].nunique() > 1
    told = [f" (dense {dense:.1f}%)" if several else "" for dense in rows["dense_top1"]]
    labels = []
    for variant, dense in zip(rows["variant"], told, strict=True):
        start, rest = _variant_parts(variant)
        head, tail = f"{start}{dense}" if start else "", f"{rest}" if start else f"{rest}{dense}"
        labels.append(f"{head}:\n{tail}" if head and tail else head or tail)
    return labels


def _variant_name(variant: str) -> str:
    return ":\n".join(filter(None, _variant_parts(variant)))


def _variant_parts(variant: str) -> tuple[str, str]:
    """Where a variant starts from and for how long it trains, if unlike the recipe's; and what else it does."""
    fields = dict(pair.split("=", 1) for pair in variant.split())
    start = {"dense": "from the trained dense model"}.get(fields.pop("start", ""), "")
    epochs = fields.pop("epochs", "")
    begins = ", ".join(filter(None, [start, f"{epochs} epochs" if epochs else ""]))
    if not fields:
        return begins, "" if begins else "reference"
    order = sorted(
        fields, key=lambda name: (name == "distillation_alpha", name != "method", name != "sparse_weight_grad")
    )
    return begins, ", ".join(_part(name, fields[name]) for name in order)


def _part(name: str, value: str) -> str:
    pair = f"{name}={value}"
    return _PATTERNS[name].format(value) if name in _PATTERNS else _PARTS.get(pair, pair)


def mask_changes(masks: pd.DataFrame) -> Figure:
    """By variant, the share of the kept blocks that the untrained mask had dropped: the layers and their mean.

    Args:
        masks: rows of the table ``masks``, all of one block size and sparsity, with the column ``variant``; those with
            metric ``exchanged`` (%) are drawn.
    """
    rows = require(masks[masks["metric"] == "exchanged"], "masks")
    one_of(rows, "model", "recipe", "block_size", "sparsity")
    variants = sorted(rows["variant"].unique())
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + 0.26 * len(variants)))
    sparsity, block = rows["sparsity"].iloc[0], rows["block_size"].iloc[0]
    at = f"{sparsity:.0%} sparse in blocks of {block:.0f}"
    entitle(figure, f"{trained_model(rows)}, {at}: blocks that training exchanged", trained_on(rows, bars=False))
    for i, variant in enumerate(variants):
        exchanged = rows[rows["variant"] == variant].groupby("scope", sort=False)["value"].mean()
        axes.plot(exchanged, [i] * len(exchanged), "|", color="0.5", ms=7, label=None if i else "a layer")
        axes.plot([exchanged.mean()], [i], "o", color=ACCENT, ms=5, label=None if i else "mean of the layers")
    axes.axvline(100 * sparsity, color=DENSE, linestyle="--", linewidth=1, label="a mask drawn anew")
    axes.set(yticks=range(len(variants)), xlim=(-3, 103), ylim=(len(variants) - 0.4, -0.6))
    axes.set_yticklabels([_variant_name(variant) for variant in variants], fontsize=7.5)
    axes.set_xlabel("kept blocks that training chose")
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    legend(figure)
    return figure


def pareto(points: pd.DataFrame, dense_top1: float) -> Figure:
    """Accuracy against measured speed of one model; whiskers span the seeds, and the timings.

    Points that no other one passes in both bear their sparsity, in their own colour and where it covers no other; the
    others are faint.

    Args:
        points: ``block_size``, ``sparsity``, ``speedup`` with ``speedup_low`` and ``speedup_high`` over whichever dense
            variant, and ``top1`` with the ``low`` and ``high`` of its seeds.
        dense_top1: the dense model's accuracy, in percent.
    """
    rows = require(points, "models with both accuracy and speed")
    best = _undominated(rows)
    figure, axes = plt.subplots(figsize=(WIDTH * 0.8, 3.8))
    entitle(
        figure,
        f"{model_setting(rows)}: accuracy against measured speed",
        measured_on(rows),
        "whiskers span seeds and timings",
    )
    for block in block_sizes(rows):
        for of_cell, style in ((best, {"alpha": 1.0}), (~best, {"alpha": 0.35, "label": None})):
            cell = rows[(rows["block_size"] == block) & of_cell]
            draw_line(axes, cell["speedup"], cell["top1"], block, linewidth=0, **style)
            timings = [cell["speedup"] - cell["speedup_low"], cell["speedup_high"] - cell["speedup"]]
            seeds = [cell["top1"] - cell["low"], cell["high"] - cell["top1"]]
            whiskers = {"fmt": "none", "color": COLOURS[block], "lw": 0.7, "alpha": 0.4 * style["alpha"]}
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
            for p in rows[best].sort_values(["top1", "speedup"], ascending=False).itertuples()
        ],
        obstacles=[(1, dense_top1), *rows.loc[~best, ["speedup", "top1"]].itertuples(index=False, name=None)],
    )
    return figure


def _undominated(points: pd.DataFrame) -> pd.Series:
    """Of points with blocks, those that no other one equals or passes in both speed and accuracy."""
    order = points.dropna(subset="block_size").sort_values(["speedup", "top1"], ascending=False)
    passed = order["top1"] <= order["top1"].cummax().shift(fill_value=-float("inf"))
    return (~passed).reindex(points.index, fill_value=False)
