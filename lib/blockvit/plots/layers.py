"""Single linear layers: how fast each backend is, against dense, against the others and against what is possible.

Figures take what no kernel can beat as ``limits``, which ``limits.linear_seconds`` makes of the very rows that are
drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..comparisons import break_even, dense_throughput
from ..limits import kept_share
from .rows import baseline, block_sizes, by_block, one_of, require, without_blocks
from .style import (
    COLOURS,
    DENSE,
    NO_BLOCKS,
    WIDTH,
    block_style,
    draw_band,
    draw_line,
    entitle,
    legend,
    limit_line,
    panel_grid,
    percent_axis,
    points_without_blocks,
    reference_line,
    shared_xlabel,
    shared_ylabel,
    sizes_axis,
    speedup_axis,
    spread,
)
from .words import backend_title, layer_rank, layer_title, layers_title, measured_on, named_backends


def speedup_heatmaps(speedups: pd.DataFrame, backend: str) -> Figure:
    """Speedup over dense of one backend: a panel a block size, a row a shape and token count, a column a sparsity.

    A cell whose spread is wider than ``WIDE`` is grey: its median may be the luck of a disturbed baseline.
    """
    rows = require(speedups[speedups["backend"] == backend], f"linear layers through {backend!r}")
    rows = rows.assign(layer=[_layer(*kind) for kind in rows[["model", "tokens"]].itertuples(index=False)])
    rows = rows.assign(wide=(rows["speedup_high"] / rows["speedup_low"] > WIDE).astype(float))
    kinds = rows[["tokens", "model", "layer"]].drop_duplicates()
    layers = [
        kind[2] for kind in sorted(kinds.itertuples(index=False), key=lambda kind: (kind[0], layer_rank(kind[1])))
    ]
    blocks = list(by_block(rows))
    figure, panels = plt.subplots(1, len(blocks), figsize=(WIDTH, 1.4 + 0.24 * len(layers)), sharey=True, squeeze=False)
    one_of(rows, "precision")
    norm = TwoSlopeNorm(vcenter=0, vmin=min(-0.01, *_log_range(rows)), vmax=max(0.01, *_log_range(rows)))
    decimals = 1 if rows["speedup"].max() >= 9.995 else 2
    for axes, (block, cells) in zip(panels[0], blocks, strict=True):
        cells = cells.pivot_table(index="layer", columns="sparsity", values=["speedup", "wide"], aggfunc="median")
        cells = cells.reindex(layers).rename(columns="{:.0%}".format, level="sparsity")
        table, wide = cells["speedup"], cells["wide"] > 0
        labels = table.map(lambda v: "" if np.isnan(v) else f"{v:.{decimals}f}")
        sns.heatmap(
            np.log2(table), annot=labels.mask(wide, "~" + labels), fmt="", cmap="PuOr", norm=norm, cbar=False, ax=axes,
            linewidths=0.5, annot_kws={"fontsize": 7 if table.shape[1] * len(blocks) <= 16 else 5.5},
        )  # fmt: skip
        grey = np.ma.masked_equal(wide.to_numpy(int), 0)
        axes.pcolormesh(grey, cmap=ListedColormap(["0.85"]), edgecolors="white", linewidth=0.5)
        plt.setp([text for text in axes.texts if text.get_text().startswith("~")], color="0.15")
        axes.set(title=f"blocks of {block}×{block}" if block else NO_BLOCKS, xlabel="sparsity", ylabel="")
        axes.tick_params(axis="x", rotation=90)
        axes.tick_params(axis="y", rotation=0, left=False)
    title = f"Linear layers: speedup of {backend_title(backend)} over {baseline(rows)}"
    spread_told = f"~: spread above {WIDE:g}×" if rows["wide"].any() else ""
    told = "layers as outputs×inputs; purple is faster than dense, orange slower"
    entitle(figure, title, measured_on(rows), told, spread_told)
    return figure


WIDE = 2.0
"""Above this ratio of the ends of its spread a speedup is no measurement to compare with another."""


def _layer(shape: str, tokens: float) -> str:
    return f"{layer_title(shape)}, {tokens:.0f} tokens"


def _log_range(rows: pd.DataFrame) -> tuple[float, float]:
    logs = np.log2(rows["speedup"])
    return float(logs.min()), float(logs.max())


def linear_speedup(
    speedups: pd.DataFrame,
    backends: Sequence[str],
    limits: pd.DataFrame | None = None,
    headline: float | None = None,
) -> Figure:
    """Speedup against sparsity of single layers, a row a backend, a panel a shape, a line a block size.

    A row has one scale, which fits its backend: one that is far slower than the others would flatten theirs.

    The ticks at 1× are the break-evens of the lines as drawn, straight on the logarithmic axis (``break_even(...,
    log=True)``). Backends without blocks (2:4) have no row: their point stands in every panel of its shape.

    Args:
        speedups: of one precision, and one token count a shape.
        backends: those to draw, in this order; what was not measured is left out.
        limits: ``limits.linear_seconds`` of ``speedups``, by the same index; what no kernel can beat, drawn dashed.
        headline: a published speedup, drawn dotted.
    """
    rows = require(speedups[speedups["backend"].isin(backends)], "linear layers")
    one_of(rows, "precision")
    _one_token_count(rows)
    shapes = _shapes(rows)
    blocked = set(rows.loc[rows["block_size"].notna(), "backend"])
    present = [b for b in backends if b in (blocked or set(rows["backend"]))]
    figure, panels = plt.subplots(
        len(present),
        len(shapes),
        figsize=(WIDTH, max(3.0, 1.0 + 1.5 * len(present))),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    scales = "scales differ by row" if len(present) > 1 else ""
    entitle(figure, _speedup_title(rows, present), measured_on(rows), scales, named_backends(present))
    sparsities = sorted(rows.loc[rows["block_size"].notna() | (not blocked), "sparsity"].unique())
    for row, backend in enumerate(present):
        for axes, shape in zip(panels[row], shapes, strict=True):
            of_shape = rows[rows["model"] == shape]
            cell = of_shape[(of_shape["backend"] == backend) & of_shape["block_size"].notna()]
            for block in block_sizes(cell):
                of_block = cell[cell["block_size"] == block].groupby("sparsity")
                line = of_block["speedup"].median()
                draw_line(axes, line.index, line, block)
                low, high = of_block["speedup_low"].median(), of_block["speedup_high"].median()
                draw_band(axes, line.index, low, high, block)
                edge = break_even(list(line.index), list(line), log=True)
                if edge is not None and edge > line.index.min():
                    axes.plot([edge], [1], marker="|", markersize=10, color=COLOURS[block], zorder=4)
                    axes.plot([], [], marker="|", markersize=8, color=DENSE, linestyle="none", label="break-even")
            points_without_blocks(axes, of_shape)
            reference_line(axes)
            if limits is not None:
                bound = _limits(of_shape, limits, fine=True)
                limit_line(axes, bound.index, bound, _limit_name(limits))
            if headline:
                label = "published headline, large matmuls"
                axes.axhline(headline, color=DENSE, linewidth=0.8, linestyle=":", label=label)
            if cell.empty and len(blocked):
                axes.text(0.5, 0.1, "not measured", transform=axes.transAxes, ha="center", fontsize=6, color=DENSE)
            speedup_axis(axes)
            axes.tick_params(axis="y", labelsize=7)
            percent_axis(axes, sparsities)
            if row == 0:
                axes.set_title(layer_title(shape))
        if len(present) > 1:
            panels[row, 0].set_ylabel(backend)
    shared_xlabel(panels[-1], "sparsity")
    legend(figure)
    shared_ylabel(figure, f"speedup over {baseline(rows)}")
    return figure


def _speedup_title(rows: pd.DataFrame, backends: Sequence[str]) -> str:
    whose = f"speedup of {backend_title(backends[0])}" if len(backends) == 1 else "speedup of each backend"
    return f"{layers_title(rows)}: {whose} by sparsity"


def contenders(
    speedups: pd.DataFrame, sparsity: float, by: str = "model", limits: pd.DataFrame | None = None
) -> Figure:
    """Who is fastest: for each shape or precision a row a backend, the fastest at the top, a marker a block size.

    A marker is the median over its rows, the line through it their 20% to 80% range of repeats (median of each end).
    Backends without blocks (2:4) are drawn at the one sparsity that they have, which their name tells.

    Args:
        speedups: of one precision, unless ``by`` is ``"precision"``; over whichever dense variant they are.
        sparsity: of the block-sparse backends.
        by: the column that groups of rows differ in, ``"model"`` (a shape) or ``"precision"``.
        limits: ``limits.linear_seconds`` of ``speedups``; what no kernel can beat at ``sparsity``, drawn dashed; only
            where groups are shapes.
    """
    if limits is not None and by != "model":
        raise ValueError(f"limits are those of a shape, and groups differ in {by!r}; leave out limits, or by")
    blocked = np.isclose(speedups["sparsity"], sparsity) & speedups["block_size"].notna()
    require(speedups[blocked], f"block-sparse layers at {sparsity:.0%}")
    rows = speedups[blocked | speedups.index.isin(without_blocks(speedups).index)]
    if by != "precision":
        one_of(rows, "precision")
        _one_token_count(rows)
    values = _shapes(rows) if by == "model" else sorted(rows[by].unique(), key=_precision_rank)
    ticks = _contenders_ticks(rows, by, values)
    offsets = spread(block_sizes(rows), 0.5)
    figure, axes = plt.subplots(figsize=(WIDTH, 1.5 + 0.155 * len(ticks)))
    title = f"{layers_title(rows)}: which backend is fastest, blocks {sparsity:.0%} sparse"
    entitle(figure, title, measured_on(rows), named_backends(rows["backend"]))
    for (value, backend), y in ticks.items():
        cell = rows[(rows[by] == value) & (rows["backend"] == backend)]
        for block, of_block in by_block(cell):
            _contender(axes, of_block, y - offsets.get(block, 0.0), block)
    if limits is not None:
        for value in values:
            places = [y for (of, _), y in ticks.items() if of == value]
            bound = _limits(rows[(rows[by] == value) & rows["block_size"].notna()], limits).median()
            limit_line(axes, [bound, bound], [min(places), max(places) + 0.5], _limit_name(limits))
    axes.axvline(1, color=DENSE, linewidth=1, zorder=1)
    speedup_axis(axes, "x")
    axes.set(ylim=(max(ticks.values()) + 0.6, -0.7), xlabel=f"speedup over {baseline(rows)}")
    axes.grid(False, axis="y")
    _name_contenders(axes, ticks, rows)
    legend(figure)
    return figure


def _contenders_ticks(rows: pd.DataFrame, by: str, values: Sequence[str]) -> dict[tuple[str, str | None], float]:
    """The height of each group's heading (backend None) and of its backends, in the order of their overall medians."""
    order = rows.groupby("backend")["speedup"].median().sort_values(ascending=False).index
    ticks, y = {}, 0.0
    for value in values:
        there = set(rows.loc[rows[by] == value, "backend"])
        for backend in [None, *(b for b in order if b in there)]:
            ticks[value, backend] = y
            y += 1.0
        y += 0.3
    return ticks


def _contender(axes: Axes, rows: pd.DataFrame, y: float, block: int | None) -> None:
    colour = block_style(block)["color"]
    axes.hlines(y, rows["speedup_low"].median(), rows["speedup_high"].median(), color=colour, lw=0.9)
    draw_line(axes, [rows["speedup"].median()], [y], block, linestyle="none")


def _name_contenders(axes: Axes, ticks: Mapping[tuple[str, str | None], float], rows: pd.DataFrame) -> None:
    """Headings in bold above the names of backends; a backend without blocks has its sparsity in its name."""
    without = without_blocks(rows).groupby("backend")["sparsity"].first()
    told = {backend: f"{backend} ({sparsity:.0%})" for backend, sparsity in without.items()}
    names = [told.get(backend, backend) if backend else layer_title(value) for value, backend in ticks]
    axes.set_yticks(list(ticks.values()), names, fontsize=7.5)
    for label, (_, backend) in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_fontweight("bold" if backend is None else "normal")
    axes.tick_params(axis="y", length=0)


def large_matmuls(
    speedups: pd.DataFrame, headline: float | None = None, by: str = "backend", limits: pd.DataFrame | None = None
) -> Figure:
    """Speedup of large square products against their size, a column a sparsity, a line a block size.

    Args:
        speedups: rows among which are squares: as many tokens as inputs and outputs. The others are left out.
        headline: the published speedup, drawn dotted.
        by: what rows of panels differ in: ``"backend"`` (of one precision) or ``"precision"`` (of one backend).
            Products without blocks (2:4) are drawn into every panel of their precision, at the one sparsity they have.
        limits: ``limits.linear_seconds`` of ``speedups``; what no kernel can beat, drawn dashed.
    """
    sizes = speedups["model"].str.extract(r"^(\d+)x(\d+)$").astype(float)
    square = (sizes[0] == sizes[1]) & (sizes[0] == speedups["tokens"])
    rows = require(speedups.assign(size=sizes[0])[square], "large square products")
    blocked = require(rows[rows["block_size"].notna()], "large square products with blocks")
    one_of(blocked, "precision" if by == "backend" else "backend")
    values = list(dict.fromkeys(blocked[by])) if by == "backend" else sorted(blocked[by].unique(), key=_precision_rank)
    sparsities = sorted(blocked["sparsity"].unique())
    figure, panels = plt.subplots(
        len(values), len(sparsities), figsize=(WIDTH, 1.3 + 1.2 * len(values)), sharex=True, sharey=True, squeeze=False
    )
    whose = f": speedup of {backend_title(values[0])}" if by == "backend" and len(values) == 1 else ": speedup"
    title = f"Large square products{whose} by their size"
    entitle(figure, title, measured_on(blocked), named_backends(blocked["backend"]))
    for line_of_panels, value in zip(panels, values, strict=True):
        for axes, sparsity in zip(line_of_panels, sparsities, strict=True):
            cell = blocked[(blocked[by] == value) & (blocked["sparsity"] == sparsity)]
            for block in block_sizes(cell):
                line = cell[cell["block_size"] == block].groupby("size")["speedup"].median()
                draw_line(axes, line.index, line, block)
            without = without_blocks(rows if by == "backend" else rows[rows[by] == value])
            if len(line := without.groupby("size")["speedup"].median()):
                draw_line(axes, line.index, line, None, label=f"{NO_BLOCKS}, at {without['sparsity'].iloc[0]:.0%}")
            if limits is not None:
                bound = pd.Series(
                    {size: _limits(at, limits).median() for size, at in cell.groupby("size")}, dtype=float
                )
                limit_line(axes, bound.index, bound, _limit_name(limits))
            if headline:
                axes.axhline(headline, color=DENSE, linewidth=0.8, linestyle=":", label="published headline")
            reference_line(axes)
            speedup_axis(axes)
            sizes_axis(axes, rows["size"])
            axes.tick_params(labelsize=7)
        line_of_panels[0].set_ylabel(value)
    for axes, sparsity in zip(panels[0], sparsities, strict=True):
        axes.set_title(f"{sparsity:.0%} sparse")
    shared_xlabel(panels[-1], "matrix size")
    legend(figure)
    shared_ylabel(figure, f"speedup over {baseline(rows)}")
    return figure


def linear_throughput(rows: pd.DataFrame, peak: float, limits: pd.DataFrame | None = None) -> Figure:
    """Useful arithmetic of each backend, as a share of the fastest dense product measured, against sparsity.

    Useful is what the kept blocks need (``limits.kept_share``), padding excluded. A line is the median over layers,
    the shaded range spans 20% to 80% of them. Backends without blocks (2:4) are a point in every panel.

    Args:
        rows: latency rows of linear layers in one precision.
        peak: the device's measured dense throughput in it, FLOP/s; see ``limits.peak``.
        limits: ``limits.linear_seconds`` of ``rows`` with a bandwidth; the share of the peak that it leaves to the
            median layer, drawn dashed.
    """
    rows = require(rows[rows["metric"] == "latency"], "linear layers")
    one_of(rows, "precision")
    rows = rows.assign(share=dense_throughput(rows) * kept_share(rows) / peak)
    backends = require(rows[rows["block_size"].notna()], "block-sparse linear layers")["backend"].unique()
    dense = rows.loc[rows["backend"] == "dense", "share"].median()
    figure, panels = panel_grid(len(backends), 3, 1.9, sharex=True, sharey=True)
    title = f"{layers_title(rows)}: arithmetic on kept blocks, by sparsity"
    entitle(figure, title, measured_on(rows), named_backends(backends))
    for axes, backend in zip(panels, sorted(backends), strict=True):
        cell = rows[rows["backend"] == backend]
        for block in block_sizes(cell):
            line = cell[cell["block_size"] == block].groupby("sparsity")["share"]
            draw_line(axes, line.median().index, line.median(), block)
            draw_band(axes, line.median().index, line.quantile(0.2), line.quantile(0.8), block)
        points_without_blocks(axes, rows, "share")
        if limits is not None:
            at = limits.reindex(cell.index)
            bound = (at["flop"] / at["seconds"] / peak).groupby(cell["sparsity"]).median()
            limit_line(axes, bound.index, bound, f"{_limit_name(limits)}, median")
        if not np.isnan(dense):
            reference_line(axes, dense, "dense layers, median")
        axes.set(title=backend, ylim=(0, max(1.03, 1.03 * rows["share"].max())))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        percent_axis(axes, rows.loc[rows["block_size"].notna(), "sparsity"])
    shared_xlabel(panels, "sparsity")
    legend(figure)
    shared_ylabel(figure, "share of the fastest dense product")
    return figure


def _one_token_count(rows: pd.DataFrame) -> None:
    for _, layer in rows.groupby("model"):
        one_of(layer, "tokens")


def _shapes(rows: pd.DataFrame) -> list[str]:
    return sorted(rows["model"].unique(), key=layer_rank)


def _limit_name(limits: pd.DataFrame) -> str:
    """What bounds: arithmetic alone where ``limits.linear_seconds`` was given no bandwidth."""
    return "limit of arithmetic and bytes" if (limits["bound_by"] == "bytes").any() else "limit of arithmetic"


def _limits(speedups: pd.DataFrame, limits: pd.DataFrame, fine: bool = False) -> pd.Series:
    """By sparsity, the speedup that the least time of any block size would be over the median dense time.

    ``fine``: at sparsities between those of the rows, too. The least time falls in proportion to what is kept.
    """
    least = limits["seconds"].reindex(speedups.index)[speedups["block_size"].notna()]
    least = least.groupby(speedups["sparsity"]).min().dropna()
    if fine and len(least):
        at = np.union1d(least.index, np.linspace(least.index.min(), least.index.max(), 100))
        least = pd.Series(np.interp(at, least.index, least), at)
    return speedups["dense_value"].median() / least


def _precision_rank(precision: str) -> tuple[int, str]:
    known = ("fp32", "tf32", "bf16", "fp16")
    return known.index(precision) if precision in known else len(known), precision
