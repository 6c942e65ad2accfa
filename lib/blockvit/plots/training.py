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
from .style import ACCENT_TOO, COLOURS, DENSE, WIDTH, draw_band, draw_line, legend, reference_line, sizes_axis


def training_curves(curves: pd.DataFrame) -> Figure:
    """Test accuracy by epoch, a panel a block size, a line a sparsity, the dense model in each; mean over seeds."""
    rows = require(curves[curves["metric"] == "top1"], "training curves")
    blocks = block_sizes(require(rows[rows["block_size"].notna()], "training curves of masked models"))
    figure, panels = plt.subplots(1, len(blocks), figsize=(WIDTH, 2.6), sharey=True, squeeze=False)
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
    figure, panels = plt.subplots(2, len(learnt), figsize=(WIDTH, 5.2), squeeze=False)
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
    """Share of its blocks that each block row kept: columns ``layer``, ``mask`` (before training, learnt), ``kept``."""
    rows = require(kept, "masks")
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    sns.boxplot(
        rows, x="layer", y="kept", hue="mask", ax=axes, fliersize=2, linewidth=0.8,
        palette=dict(zip(rows["mask"].unique(), ("0.8", ACCENT_TOO), strict=False)),
    )  # fmt: skip
    axes.set(xlabel="", ylabel="share kept of a row of blocks")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.tick_params(axis="x", rotation=60, labelsize=7)
    axes.legend(title=None, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def step_overhead(overheads: pd.DataFrame) -> Figure:
    """How much longer a masked training step takes than the dense one, against the size of the batch.

    A panel a backend (ours first), a line a block size, on one scale.

    Args:
        overheads: as ``results.step_overheads`` gives them, of one model, precision, sparsity and way to compile.
    """
    rows = require(overheads, "training steps of masked models")
    one_of(rows, "model", "precision", "sparsity", "compile")
    of_layer = rows["tokens"].notna().all()
    size = "tokens" if of_layer else "batch_size"
    backends = sorted(rows["backend"].unique(), key=lambda name: (name != "supermask", name))
    figure, panels = plt.subplots(1, len(backends), figsize=(WIDTH, 2.6), sharey=True, squeeze=False)
    for axes, backend in zip(panels[0], backends, strict=True):
        mine = rows[rows["backend"] == backend].sort_values(size)
        for block, line in by_block(mine):
            draw_line(axes, line[size], line["overhead"], block)
            draw_band(axes, line[size], line["overhead_low"], line["overhead_high"], block)
        reference_line(axes, 0.0, "dense")
        sizes_axis(axes, mine[size])
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.set(title=backend, xlabel="tokens" if of_layer else "images a batch")
    panels[0, 0].set_ylabel("longer than the dense step")
    legend(figure)
    return figure
