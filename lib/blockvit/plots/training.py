"""Training with masks: accuracy by epoch, the masks that were learnt, what they keep, and what a step costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
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
    spread,
)
from .words import (
    layer_title,
    measured_on,
    model_title,
    named_backends,
    trained_model,
    trained_on,
    trained_sparse,
)


def training_curves(curves: pd.DataFrame) -> Figure:
    """Test accuracy by epoch, a panel a block size, a line a sparsity, the dense model in each; mean over seeds.

    Each seed is a thin line. The first epochs, far below the others, are cut off, which is said.
    """
    rows = require(curves[curves["metric"] == "top1"], "training curves")
    blocks = block_sizes(require(rows[rows["block_size"].notna()], "training curves of masked models"))
    figure, panels = plt.subplots(1, len(blocks), figsize=(WIDTH, 2.9), sharey=True, squeeze=False)
    settled = rows.loc[rows["epoch"] >= min(3, rows["epoch"].max()), "value"].mean()
    floor = max(0, 10 * math.floor((settled - 25) / 10))
    low, high = rows["value"].min(), rows["value"].max()
    cut = f"cut below {floor}%" if low < floor else ""
    entitle(
        figure, f"{trained_model(rows)}: test accuracy while training", trained_on(rows, spread="each a thin line"), cut
    )
    sparsities = sorted(rows["sparsity"].dropna().unique())
    shades = dict(zip(sparsities, sns.color_palette("viridis_r", len(sparsities)), strict=True))
    dashes = dict(zip(sparsities, itertools.cycle(("-", "--", "-.", ":")), strict=False))
    for axes, block in zip(panels[0], blocks, strict=True):
        _curves(axes, rows[rows["backend"] == "dense"], "dense", color=DENSE, linewidth=1.5)
        for sparsity in sparsities:
            of_cell = rows[(rows["block_size"] == block) & (rows["sparsity"] == sparsity)]
            style = {"color": shades[sparsity], "linestyle": dashes[sparsity], "linewidth": 1.2}
            _curves(axes, of_cell, f"{sparsity:.0%} sparse", **style)
        axes.set(title=f"blocks of {block}×{block}", xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0, 0].set(ylabel="test accuracy (%)", ylim=(floor, min(101, high + 0.1 * (high - floor))))
    legend(figure)
    return figure


def _curves(axes: Axes, rows: pd.DataFrame, label: str, **style: object) -> None:
    if rows["seed"].nunique() > 1:
        for _, line in rows.groupby("seed"):
            axes.plot(line["epoch"], line["value"], color=style["color"], linewidth=0.5, alpha=0.5)
    mean = rows.groupby("epoch")["value"].mean()
    axes.plot(mean.index, mean, label=label, **style)


def block_masks(
    initial: Mapping[str, np.ndarray], learnt: Mapping[str, np.ndarray], rows: pd.DataFrame | None = None
) -> Figure:
    """Block masks by layer before training, which are random, above the learnt ones, whose exchanges are coloured.

    Args:
        initial: before training, by layer.
        learnt: after it; the layers to draw.
        rows: the trained model's in the table ``accuracy``, for the title.
    """
    figure, panels = plt.subplots(2, len(learnt), figsize=(WIDTH, 5.4), squeeze=False)
    entitle(figure, *_of_masks("which blocks training exchanged", rows))
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
        panels[0, column].set_title(f"{name}:\n{after.shape[0]} rows × {after.shape[1]} columns of blocks", fontsize=7)
        panels[1, column].set_xlabel("blocks of inputs", fontsize=8)
    for axes, when in zip(panels[:, 0], ("before training", "learnt"), strict=True):
        axes.set_ylabel(f"{when}\nblocks of outputs")
    labels = ["kept", "kept, not at first", "dropped, kept at first"]
    figure.legend(
        [Patch(facecolor=colour) for colour in colours[1:]], labels, loc="outside lower center", ncols=len(labels)
    )  # fmt: skip
    return figure


def _of_masks(title: str, rows: pd.DataFrame | None) -> list[str]:
    """Title and subtitle of a figure of masks; ``rows`` are those of one trained model, if it is known."""
    if rows is None:
        return [title[0].upper() + title[1:]]
    return [f"{trained_sparse(rows)}: {title}", trained_on(rows, spread="")]


def kept_blocks(kept: pd.DataFrame, rows: pd.DataFrame | None = None) -> Figure:
    """Share of its blocks that each row of blocks kept: for each kind of layer a box before training and one learnt.

    Args:
        kept: columns ``layer`` (``layer 0 mlp.0``; layers of all depths are one kind), ``mask`` (before training,
            learnt) and ``kept``.
        rows: the trained model's in the table ``accuracy``, for the title.
    """
    kept = require(kept, "masks")
    kept = kept.assign(kind=kept["layer"].str.replace(r"^(layer \d+ |heads[. ])", "", regex=True))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.7 + 0.36 * kept["kind"].nunique()))
    title = _of_masks("how evenly rows of blocks share what is kept", rows)
    entitle(figure, *title, "a box: all rows of blocks of the layers of that name")
    sns.boxplot(
        kept, y="kind", x="kept", hue="mask", ax=axes, fliersize=2, linewidth=0.8, width=0.7,
        palette=dict(zip(kept["mask"].unique(), ("0.8", ACCENT_TOO), strict=False)),
    )  # fmt: skip
    axes.set(ylabel="", xlabel="share of its blocks that a row keeps")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.get_legend().remove()
    legend(figure)
    return figure


def step_overhead(overheads: pd.DataFrame) -> Figure:
    """A masked training step as a multiple of the dense one, against the size of the batch; logarithmic axes.

    A panel a backend (ours first), a line a block size, on one scale; the lines side by side, for some coincide.

    Args:
        overheads: as ``comparisons.step_overheads`` gives them, of one model, precision, sparsity and way to compile.
    """
    rows = require(overheads, "training steps of masked models")
    one_of(rows, "model", "precision", "sparsity", "compile")
    of_layer = rows["tokens"].notna().all()
    size = "tokens" if of_layer else "batch_size"
    backends = sorted(rows["backend"].unique(), key=lambda name: (name != "supermask", name))
    figure, panels = plt.subplots(1, len(backends), figsize=(WIDTH, 3.0), sharey=True, squeeze=False)
    entitle(figure, _step_title(rows), measured_on(rows), named_backends(backends))
    blocks = block_sizes(rows)
    sideways = spread(blocks, -0.04 * len(blocks))
    for axes, backend in zip(panels[0], backends, strict=True):
        mine = rows[rows["backend"] == backend].sort_values(size)
        for block, line in by_block(mine):
            at = line[size] * np.exp(sideways.get(block, 0.0))
            draw_line(axes, at, 1 + line["overhead"], block)
            draw_band(axes, at, 1 + line["overhead_low"], 1 + line["overhead_high"], block)
        reference_line(axes, 1.0, "dense")
        sizes_axis(axes, mine[size])
        axes.tick_params(axis="x", labelsize=7.5)
        speedup_axis(axes)
        axes.set(title=backend, xlabel="tokens" if of_layer else "images a batch")
    legend(figure)
    shared_ylabel(figure, "time, × the dense step (lower is faster)")
    return figure


def _step_title(rows: pd.DataFrame) -> str:
    model, sparsity = rows["model"].iloc[0], rows["sparsity"].iloc[0]
    of = f"the layer {layer_title(model)}" if rows["tokens"].notna().all() else model_title(model)
    return f"A training step of {of}, {sparsity:.0%} sparse, against the dense step"
