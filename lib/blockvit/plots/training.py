"""Training with masks: accuracy by epoch, the masks that were learnt, what they keep, and what a step costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .rows import block_sizes, by_block, one_of, require
from .style import (
    ACCENT_TOO,
    COLOURS,
    DENSE,
    WIDTH,
    draw_band,
    draw_line,
    entitle,
    legend,
    reference_line,
    shared_ylabel,
    sizes_axis,
    speedup_axis,
)
from .words import layer_title, measured_on, model_title, trained_model, trained_on


def training_curves(curves: pd.DataFrame) -> Figure:
    """Test accuracy by epoch, a panel a block size, a line a sparsity, the dense model in each; mean over seeds."""
    rows = require(curves[curves["metric"] == "top1"], "training curves")
    blocks = block_sizes(require(rows[rows["block_size"].notna()], "training curves of masked models"))
    figure, panels = plt.subplots(1, len(blocks), figsize=(WIDTH, 2.9), sharey=True, squeeze=False)
    entitle(figure, f"{trained_model(rows)}: test accuracy while training", trained_on(rows, bars=False))
    sparsities = sorted(rows["sparsity"].dropna().unique())
    shades = dict(zip(sparsities, sns.color_palette("viridis_r", len(sparsities)), strict=True))
    dashes = dict(zip(sparsities, itertools.cycle(("-", "--", "-.", ":")), strict=False))
    for axes, block in zip(panels[0], blocks, strict=True):
        dense = rows[rows["backend"] == "dense"].groupby("epoch")["value"].mean()
        axes.plot(dense.index, dense, color=DENSE, linewidth=1.5, label="dense")
        for sparsity in sparsities:
            line = rows[(rows["block_size"] == block) & (rows["sparsity"] == sparsity)].groupby("epoch")["value"].mean()
            axes.plot(
                line.index,
                line,
                color=shades[sparsity],
                linestyle=dashes[sparsity],
                linewidth=1.2,
                label=f"{sparsity:.0%} sparse",
            )
        axes.set(title=f"blocks of {block}×{block}", xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low = rows.groupby("epoch")["value"].mean()
    panels[0, 0].set(ylabel="test accuracy (%)", ylim=(max(0, low.iloc[min(2, len(low) - 1)] - 25), 101))
    panels[0, -1].legend(loc="lower right", fontsize=7)
    return figure


def block_masks(initial: Mapping[str, np.ndarray], learnt: Mapping[str, np.ndarray]) -> Figure:
    """Block masks by layer before training, which are random, above the learnt ones, whose exchanges are coloured."""
    figure, panels = plt.subplots(2, len(learnt), figsize=(WIDTH, 5.4), squeeze=False)
    entitle(figure, "Which blocks training exchanged, by layer")
    colours = ["white", "0.25", COLOURS[64], COLOURS[8]]
    for column, name in enumerate(learnt):
        before, after = initial[name].astype(bool), learnt[name].astype(bool)
        exchanged = np.select([before & after, after & ~before, before & ~after], [1, 2, 3], default=0)
        for axes, image in zip(panels[:, column], (before.astype(int), exchanged), strict=True):
            axes.imshow(
                image, cmap=ListedColormap(colours), vmin=0, vmax=3, interpolation="nearest", aspect="auto"
            )  # fmt: skip
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(True)
        panels[0, column].set_title(f"{name}, {after.shape[0]}×{after.shape[1]} blocks", fontsize=7)
        panels[1, column].set_xlabel("input blocks", fontsize=8)
    for axes, when in zip(panels[:, 0], ("before training", "learnt"), strict=True):
        axes.set_ylabel(f"{when}\noutput blocks")
    labels = ["kept", "kept, not at first", "dropped, kept at first"]
    figure.legend(
        [Patch(facecolor=colour) for colour in colours[1:]], labels, loc="outside lower center", ncols=len(labels)
    )  # fmt: skip
    return figure


def kept_blocks(kept: pd.DataFrame) -> Figure:
    """Share of its blocks that each row of blocks kept: for each kind of layer a box before training and one learnt.

    Args:
        kept: columns ``layer`` (``layer 0 mlp.0``; layers of all depths are one kind), ``mask`` (before training,
            learnt) and ``kept``.
    """
    rows = require(kept, "masks")
    rows = rows.assign(kind=rows["layer"].str.replace(r"^(layer \d+ |heads\.)", "", regex=True))
    kinds = rows["kind"].nunique()
    figure, axes = plt.subplots(figsize=(WIDTH * 0.7, 1.7 + 0.36 * kinds))
    entitle(figure, "How evenly rows of blocks share what a layer keeps", "rows of all layers of a kind")
    sns.boxplot(
        rows, y="kind", x="kept", hue="mask", ax=axes, fliersize=2, linewidth=0.8, width=0.7,
        palette=dict(zip(rows["mask"].unique(), ("0.8", ACCENT_TOO), strict=False)),
    )  # fmt: skip
    axes.set(ylabel="", xlabel="share kept of a row of blocks")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.get_legend().remove()
    legend(figure)
    return figure


def step_overhead(overheads: pd.DataFrame) -> Figure:
    """A masked training step as a multiple of the dense one, against the size of the batch; logarithmic axes.

    A panel a backend (ours first), a line a block size, on one scale.

    Args:
        overheads: as ``comparisons.step_overheads`` gives them, of one model, precision, sparsity and way to compile.
    """
    rows = require(overheads, "training steps of masked models")
    one_of(rows, "model", "precision", "sparsity", "compile")
    of_layer = rows["tokens"].notna().all()
    size = "tokens" if of_layer else "batch_size"
    backends = sorted(rows["backend"].unique(), key=lambda name: (name != "supermask", name))
    figure, panels = plt.subplots(1, len(backends), figsize=(WIDTH, 3.0), sharey=True, squeeze=False)
    entitle(figure, _step_title(rows), measured_on(rows))
    for axes, backend in zip(panels[0], backends, strict=True):
        mine = rows[rows["backend"] == backend].sort_values(size)
        for block, line in by_block(mine):
            draw_line(axes, line[size], 1 + line["overhead"], block)
            draw_band(axes, line[size], 1 + line["overhead_low"], 1 + line["overhead_high"], block)
        reference_line(axes, 1.0, "dense")
        sizes_axis(axes, mine[size])
        axes.tick_params(axis="x", labelsize=7.5)
        speedup_axis(axes)
        axes.set(title=backend, xlabel="tokens" if of_layer else "images a batch")
    legend(figure)
    shared_ylabel(figure, "× the dense step")
    return figure


def _step_title(rows: pd.DataFrame) -> str:
    model, sparsity = rows["model"].iloc[0], rows["sparsity"].iloc[0]
    of = f"the layer {layer_title(model)}" if rows["tokens"].notna().all() else model_title(model)
    return f"A training step of {of}, {sparsity:.0%} sparse, against the dense step"
