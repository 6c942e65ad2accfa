"""What sparsity costs in accuracy, by itself and against measured speed."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ..losses import CHEAP, FROZEN, STARTED, surely_fastest
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
    spread,
)
from .words import measured_on, model_setting, trained_model, trained_on, trained_sparse


def accuracy(top1: pd.DataFrame, published_loss: pd.DataFrame) -> Figure:
    """Accuracy, and points lost against dense, by sparsity and block size; a dot a seed, where there are several.

    Block sizes stand side by side, for most of their points would cover one another.

    Args:
        top1: rows with the final test accuracy in percent.
        published_loss: ``block_size``, ``sparsity``, ``lost`` (points of ImageNet top-1) and ``source``.
    """
    rows = require(top1, "accuracies")
    dense = rows.loc[rows["backend"] == "dense", "value"].mean()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    entitle(
        figure, f"{trained_model(rows)}: accuracy by sparsity and block size", trained_on(rows, spread="each a dot")
    )
    blocks = block_sizes(rows)
    sideways = spread(blocks, -0.006 * (len(blocks) - 1))
    for block in blocks:
        cell = rows[rows["block_size"] == block]
        for axes, values in ((left, cell["value"]), (right, dense - cell["value"])):
            of_cell = values.groupby(cell["sparsity"])
            draw_line(axes, of_cell.mean().index + sideways[block], of_cell.mean(), block)
            several = of_cell.transform("size") > 1
            at = cell.loc[several, "sparsity"] + sideways[block]
            axes.plot(at, values[several], ".", markersize=5, markeredgewidth=0, color=COLOURS[block], alpha=0.7)
            axes.vlines(of_cell.min().index + sideways[block], of_cell.min(), of_cell.max(), COLOURS[block], lw=0.7)
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
    """Accuracy by each way to train a model of one block size and sparsity; bars span the seeds, hollow is one seed.

    The reference method is drawn above, in a colour of its own. It and masks left random are lines, too: what other
    ways to train, and what learning masks, have to beat. So are the dense models that they are compared with.

    Args:
        cells: rows of ``losses.points_lost``, all of one block size and sparsity.
    """
    rows = require(cells, "trainings of this block size and sparsity")
    one_of(rows, "model", "recipe", "block_size", "sparsity")
    rows = rows.sort_values(["variant", "top1"], key=lambda c: -c if c.name == "top1" else c != "")
    names, block = _variant_labels(rows), rows["block_size"].iloc[0]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.7 + _row_height(names) * len(rows)))
    hollow = "hollow: one seed" if rows["seeds"].min() == 1 < rows["seeds"].max() else ""
    entitle(figure, f"{trained_sparse(rows)}: accuracy by way to train", trained_on(rows), hollow)
    seeds = [rows["top1"] - rows["low"], rows["high"] - rows["top1"]]
    axes.errorbar(rows["top1"], range(len(rows)), xerr=seeds, fmt="none", color=DENSE, capsize=2, lw=1)
    for i, row in enumerate(rows.itertuples()):
        style = {"label": None} if row.variant else {"label": _REFERENCE, "color": ACCENT, "marker": "o"}
        style |= {"markersize": 5 if row.variant else 7, "linestyle": "none"}
        style |= {"markerfacecolor": "white"} if hollow and row.seeds == 1 else {}
        draw_line(axes, [row.top1], [i], block, **style)
    usual = rows["dense_top1"].mode()[0]
    for dense, those in rows.groupby("dense_top1"):
        label = "dense" if dense == usual else f"dense, {_dense_training(those)}"
        dash = "-" if dense == usual else "--"
        axes.axvline(dense, color=DENSE, linewidth=1, linestyle=dash, zorder=1, label=f"{label}: {dense:.1f}%")
    for variant, colour in (("", ACCENT), (FROZEN, DENSE)):
        for top1 in rows.loc[rows["variant"] == variant, "top1"]:
            label = _PARTS[FROZEN] if variant else None
            axes.axvline(top1, color=colour, linestyle=":", linewidth=0.9, zorder=1, label=label)
    axes.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6), xlabel="test accuracy (%)")
    axes.set_yticklabels(names, fontsize=7.5)
    for label, variant in zip(axes.get_yticklabels(), rows["variant"], strict=True):
        label.set_fontweight("normal" if variant else "bold")
    legend(figure)
    return figure


def _dense_training(rows: pd.DataFrame) -> str:
    """How the dense model was trained that these variants are compared with."""
    return "trained on for as long" if rows["variant"].str.contains(STARTED).all() else "trained for as long"


_REFERENCE = "reference: learnt scores"
_PARTS = {
    FROZEN: "masks left random",
    "method=dense_gradient": "dropped blocks learn, too",
    "method=magnitude": "blocks of largest weights",
    "method=spartan": "Spartan (soft top-k)",
    "scores=constant": "scores start equal",
    "scores=magnitude": "scores start as the weights' size",
    "sparse_weight_grad=kept": "kept blocks alone learn",
    "sparsity_schedule=cubic": "sparsity raised slowly",
}
"""How figures call what a variant does unlike the reference; what is not here bears the name of the recipe's field."""

_PATTERNS = {"sparse_steps": "each mask for {} steps", "distillation_alpha": "taught by the dense model"}
"""Likewise, for fields that have many values."""

LEARNING_RATES = {"digits": 1e-3, "cifar10": 1e-3, "imagenet": 3e-3}
"""Of the recipes, for weights and scores alike: they need torch, figures do not."""


def _variant_labels(rows: pd.DataFrame) -> list[str]:
    """Names of variants, in lines that leave the panel its room; where they start from is in one of its own."""
    parts = [_variant_parts(variant, recipe) for variant, recipe in zip(rows["variant"], rows["recipe"], strict=True)]
    return [":\n".join(_in_lines(part) for part in both if part) for both in parts]


def _in_lines(text: str, width: int = 50) -> str:
    """Broken behind commas."""
    lines: list[str] = []
    for piece in text.split(", "):
        if lines and len(lines[-1]) + len(piece) + 2 <= width:
            lines[-1] += f", {piece}"
        else:
            lines.append(piece)
    return ",\n".join(lines)


def _row_height(names: Sequence[str]) -> float:
    """Inches that a row needs."""
    return 0.17 + 0.08 * max(name.count("\n") + 1 for name in names)


def _variant_parts(variant: str, recipe: str) -> tuple[str, str]:
    """Where a variant starts from and for how long it trains, if unlike the recipe's; and what else it does."""
    fields = dict(pair.split("=", 1) for pair in variant.split())
    start = {"dense": "from the trained dense model"}.get(fields.pop("start", ""), "")
    epochs = fields.pop("epochs", "")
    begins = ", ".join(filter(None, [start, f"{epochs} epochs" if epochs else ""]))
    if not fields:
        return begins, "" if begins else _REFERENCE
    order = sorted(
        fields, key=lambda name: (name == "distillation_alpha", name != "method", name != "sparse_weight_grad")
    )
    return begins, ", ".join(_part(name, fields[name], recipe) for name in order)


def _part(name: str, value: str, recipe: str) -> str:
    dataset, *changes = recipe.split()
    usual = dict(pair.split("=", 1) for pair in changes).get("lr", LEARNING_RATES.get(dataset))
    if name == "scores_lr" and usual:
        times = float(value) / float(usual)
        return f"scores learn {times:g}× faster" if times >= 1 else f"scores learn {1 / times:g}× slower"
    pair = f"{name}={value}"
    return _PATTERNS[name].format(value) if name in _PATTERNS else _PARTS.get(pair, pair)


def mask_changes(masks: pd.DataFrame, order: Sequence[str] = ()) -> Figure:
    """By variant, the share of the kept blocks that the untrained mask had dropped: the layers and their mean.

    Args:
        masks: rows of the table ``masks``, all of one block size and sparsity, with the column ``variant``; those with
            metric ``exchanged`` (%) are drawn, beside what the shares ``kept`` (%) let expect of a mask drawn anew.
        order: variants from top to bottom; others come last.
    """
    rows = require(masks[masks["metric"] == "exchanged"], "masks")
    one_of(rows, "model", "recipe", "block_size", "sparsity")
    found, recipe = set(rows["variant"]), rows["recipe"].iloc[0]
    variants = [*(variant for variant in order if variant in found), *sorted(found - set(order))]
    names = _variant_labels(pd.DataFrame({"variant": variants, "recipe": recipe}))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + _row_height(names) * len(variants)))
    entitle(figure, f"{trained_sparse(rows)}: blocks that training exchanged", trained_on(rows, spread=""))
    for i, variant in enumerate(variants):
        exchanged = rows[rows["variant"] == variant].groupby("scope", sort=False)["value"].mean()
        axes.plot(exchanged, [i] * len(exchanged), "|", color="0.5", ms=7, label=None if i else "a layer")
        axes.plot([exchanged.mean()], [i], "o", color=ACCENT, ms=5, label=None if i else "mean of the layers")
    kept = masks[masks["metric"] == "kept"].groupby("scope")["value"].mean()
    anew = 100 - kept.mean()  # of so many of the blocks that another random mask keeps, this one dropped
    axes.axvline(anew, color=DENSE, linestyle="--", linewidth=1, label="a mask drawn anew")
    axes.set(yticks=range(len(variants)), xlim=(-3, 103), ylim=(len(variants) - 0.4, -0.6))
    axes.set_yticklabels(names, fontsize=7.5)
    axes.set_xlabel("new among the blocks kept")
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    legend(figure)
    return figure


def pareto(points: pd.DataFrame, dense_top1: float) -> Figure:
    """Accuracy against measured speed of one model; whiskers span the seeds, and the timings.

    Ringed is ``losses.surely_fastest``. No line joins the medians at the front: which of them stand there, the whiskers
    leave open.

    Args:
        points: ``block_size``, ``sparsity``, ``speedup`` with ``speedup_low`` and ``speedup_high`` over whichever dense
            variant, and ``top1`` with the ``low`` and ``high`` of its seeds.
        dense_top1: the dense model's accuracy, in percent.
    """
    rows = require(points, "models with both accuracy and speed")
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2))
    title = f"{model_setting(rows)}: accuracy against measured speed"
    entitle(figure, title, measured_on(rows), "whiskers span seeds and timings; labels are sparsities")
    for block in block_sizes(rows):
        cell = rows[rows["block_size"] == block]
        timings = [cell["speedup"] - cell["speedup_low"], cell["speedup_high"] - cell["speedup"]]
        seeds = [cell["top1"] - cell["low"], cell["high"] - cell["top1"]]
        whiskers = {"fmt": "none", "color": COLOURS[block], "lw": 0.8, "alpha": 0.5, "zorder": 1.5}
        axes.errorbar(cell["speedup"], cell["top1"], seeds, timings, **whiskers)
        draw_line(axes, cell["speedup"], cell["top1"], block, linestyle="none", markersize=5.5)
    best = surely_fastest(rows.assign(lost=dense_top1 - rows["top1"]))
    if len(best):
        ring = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "color": "0.15", "linestyle": "none"}
        label = f"highest low end of the speedup, less than {CHEAP:g} points lost"
        axes.plot(best["speedup"], best["top1"], label=label, **ring)
    axes.plot([1], [dense_top1], marker="*", markersize=11, color=DENSE, linestyle="none", label="dense")
    axes.axhline(dense_top1 - CHEAP, color=DENSE, linestyle=":", linewidth=1, label=f"{CHEAP:g} points lost")
    axes.margins(0.05)
    axes.xaxis.set_major_formatter(FuncFormatter(as_times))
    axes.set(xlabel=f"speedup over {baseline(rows)}, measured", ylabel="test accuracy (%)")
    legend(figure)
    labels = [
        (p.speedup, p.top1, f"{p.sparsity:.0%}: {p.speedup_low:.2f}× to {p.speedup_high:.2f}×", "0.15")
        for p in best.itertuples()
    ]  # first, for the first has the best place
    others = rows.drop(best.index).itertuples()
    labels += [(p.speedup, p.top1, f"{p.sparsity:.0%}", COLOURS[int(p.block_size)]) for p in others]
    place_labels(axes, labels, obstacles=[(1, dense_top1)])
    return figure
