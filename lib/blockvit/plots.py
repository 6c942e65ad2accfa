"""Every figure of the study, drawn from tables alone: no torch, no measuring, one shared style.

Block sizes differ by colour, marker and dash, so that the figures read in grey and by colour-blind readers. A figure
takes rows as ``results.Store.read`` gives them (or ``results.speedups`` of them) and returns a matplotlib figure. Rows
without a block size (2:4 sparsity) are drawn hollow and grey. What no kernel can beat is dashed; figures of linear
layers take it as ``limits``, which ``limits.linear_seconds`` makes of the very rows that are drawn.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

from .limits import amdahl, kept_share
from .results import dense_throughput

_BLOCKS = (8, 16, 32, 64, 128, 4, 256)
_COLOURS = dict(zip(_BLOCKS, sns.color_palette("colorblind", len(_BLOCKS)), strict=True))
_MARKERS = dict(zip(_BLOCKS, "vosD^P*", strict=True))
_DASHES = dict(zip(_BLOCKS, ((1, 1), (5, 1.5), (), (3, 1, 1, 1), (7, 2, 2, 2), (2, 2), (9, 2)), strict=True))
_DENSE = "0.35"
_NO_BLOCKS = "2:4, no blocks"
_MODES = {"eager": "o", "max-autotune": "s", "cudagraph": "^", "compile": "D"}
WIDTH = 7.2  # inches: a notebook's or README's column


def set_style() -> None:
    """The look that all figures share."""
    sns.set_theme(
        context="paper",
        style="ticks",
        palette="colorblind",
        rc={
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 9,
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "grid.color": "0.9",
            "legend.frameon": False,
            "savefig.dpi": 200,
            "svg.fonttype": "none",
            "svg.hashsalt": "blockvit",  # the same figure gives the same file
        },
    )


def save(figure: Figure, folder: Path, name: str) -> Figure:
    """Write ``<folder>/<name>.png`` and ``.svg`` and close the figure; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)  # the notebook shows the returned figure; left open, it would be shown twice
    return figure


def _require(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    if rows.empty:
        raise ValueError(f"nothing to draw: no {what} in the tables; run the notebook that measures it first")
    return rows


def _one_of(rows: pd.DataFrame, *columns: str) -> None:
    """Raise if rows differ in ``columns``: medians over precisions or models would look like measurements."""
    for column in columns:
        if len(found := sorted(rows[column].dropna().unique())) > 1:
            raise ValueError(f"one {column} a figure, but the rows hold {', '.join(map(str, found))}; choose one")


def _one_token_count(rows: pd.DataFrame) -> None:
    for _, layer in rows.groupby("model"):
        _one_of(layer, "tokens")


def _blocks(rows: pd.DataFrame) -> list[int]:
    return sorted(int(b) for b in rows["block_size"].dropna().unique())


def _shapes(rows: pd.DataFrame) -> list[str]:
    return sorted(rows["model"].unique(), key=lambda shape: [int(n) for n in re.findall(r"\d+", shape)])


def _by_block(rows: pd.DataFrame) -> Iterator[tuple[int | None, pd.DataFrame]]:
    """The rows of each block size, then under None those that are sparse without blocks."""
    for block in _blocks(rows):
        yield block, rows[rows["block_size"] == block]
    without = _without_blocks(rows)
    if len(without):
        yield None, without


def _without_blocks(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["block_size"].isna() & (rows["backend"] != "dense")]


def _style(block_size: float | None) -> dict[str, object]:
    if block_size is None or np.isnan(block_size):
        return {"color": "0.2", "marker": "X", "markerfacecolor": "white", "label": _NO_BLOCKS, "linestyle": ":"}
    block = int(block_size)
    style = {"color": _COLOURS[block], "marker": _MARKERS[block], "label": f"{block}×{block}"}
    return {**style, "dashes": _DASHES[block]} if _DASHES[block] else style


def _line(axes: Axes, x: Iterable[float], y: Iterable[float], block_size: float | None, **style: object) -> None:
    style = {"markersize": 4.5, **_style(block_size), **style}
    if style.get("linestyle") == "none":
        style.pop("dashes", None)  # they would be drawn in the legend all the same
    axes.plot(list(x), list(y), **style)


def _band(axes: Axes, x: Iterable[float], low: Iterable[float], high: Iterable[float], block: int | None) -> None:
    axes.fill_between(list(x), list(low), list(high), color=_style(block)["color"], alpha=0.15, lw=0)


def _limit_line(axes: Axes, x: Iterable[float], y: Iterable[float], label: str) -> None:
    axes.plot(list(x), list(y), color=_DENSE, linestyle="--", linewidth=1, zorder=1.5, label=label)


def _panels(count: int, columns: int, height: float, **shared: object) -> tuple[Figure, list[Axes]]:
    """``count`` panels in rows of at most ``columns``, each row ``height`` inches high."""
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(WIDTH, 0.8 + height * lines), squeeze=False, **shared)
    for i, axes in enumerate(grid.flat):
        if i >= count:
            axes.remove()
        elif i + columns >= count:
            axes.tick_params(labelbottom=True)  # nothing below it, be it in the last row or not
    return figure, list(grid.flat[:count])


def _ylabel(figure: Figure, text: str) -> None:
    """One label for the y axes of all panels, at their middle; to be written after the legend, which takes room."""
    figure.draw_without_rendering()
    heights = [axes.get_position() for axes in figure.axes]
    middle = (min(box.y0 for box in heights) + max(box.y1 for box in heights)) / 2
    figure.supylabel(text, y=middle, fontsize="medium")


def _xlabel(panels: Sequence[Axes], text: str) -> None:
    """The label of the x axes, below each panel of the last row.

    Not ``Figure.supxlabel``, which a legend outside the panels would cover.
    """
    last = panels[-1].get_subplotspec().rowspan
    for axes in panels:
        if axes.get_subplotspec().rowspan == last:
            axes.set_xlabel(text)


def _reference_line(axes: Axes, y: float = 1.0, label: str | None = None) -> None:
    axes.axhline(y, color=_DENSE, linewidth=1, zorder=1, label=label)


def _published_point(axes: Axes, sparsity: float, value: float, block_size: float) -> None:
    hollow = {"markersize": 7, "markerfacecolor": "none", "linestyle": "none", "label": None}
    _line(axes, [sparsity], [value], block_size, **hollow)


def _legend(figure: Figure, published: str | None = None) -> None:
    """One legend below all panels, with a hollow marker for ``published`` points if there are any."""
    entries: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    order = sorted(
        entries, key=lambda n: (0, int(n.split("×")[0])) if "×" in n else (1 if n == _NO_BLOCKS else 2, 0)
    )  # fmt: skip
    handles, labels = [entries[label] for label in order], [f"blocks {n}" if "×" in n else n for n in order]
    if published:
        handles.append(Line2D([], [], marker="o", markersize=6, markerfacecolor="none", color=_DENSE, linestyle="none"))
        labels.append(published)
    figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels, figure.get_figwidth()))


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many columns as fit into ``width`` inches, balanced: entries fill one column after the other."""
    for lines in range(1, len(labels) + 1):
        columns = [labels[i : i + lines] for i in range(0, len(labels), lines)]
        if sum(0.6 + 0.065 * max(map(len, column)) for column in columns) <= width:  # handle and gap, then letters
            return len(columns)
    return 1


def _percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _times(value: float, _: object = None) -> str:
    return f"{value:g}×"


def _ratios(value: float, _: object = None) -> str:
    """For logarithmic axes to base 2: a quarter is as far from 1 as four, and should look it."""
    return f"{value:g}×" if value >= 1 else f"1/{1 / value:g}×"


def _speedup_axis(axes: Axes) -> None:
    """Speedups on a logarithmic y axis."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(_ratios))
    axes.yaxis.set_minor_locator(NullLocator())


def _sizes_axis(axes: Axes, sizes: Iterable[float]) -> None:
    """Batch or matrix sizes on a logarithmic x axis, each one a tick."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(sizes)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _over(speedups: pd.DataFrame) -> str:
    """What the speedups are over: eager dense PyTorch, or the fastest of several variants."""
    variants = set(speedups["dense_compile"].dropna()) if "dense_compile" in speedups else set()
    return "dense" if not variants else "eager dense" if variants == {"eager"} else "the fastest dense"


def _setting(rows: pd.DataFrame) -> str:
    """What all rows share, for a title: model, precision, batch size."""
    shared = [(name, rows[name].dropna().unique()) for name in ("model", "precision", "batch_size")]
    texts = [f"batch {found[0]:.0f}" if name == "batch_size" else found[0] for name, found in shared if len(found) == 1]
    return ", ".join(texts)


def _fastest(speedups: pd.DataFrame, cell: Sequence[str]) -> pd.DataFrame:
    """The fastest row of each cell, whatever its compile mode."""
    return speedups.sort_values("speedup").drop_duplicates(list(cell), keep="last")


def _limits(speedups: pd.DataFrame, limits: pd.DataFrame) -> pd.Series:
    """By sparsity, the speedup that the least time of any block size would be over the median dense time."""
    least = limits["seconds"].reindex(speedups.index)[speedups["block_size"].notna()]
    return (speedups["dense_value"].median() / least.groupby(speedups["sparsity"]).min()).dropna()


def break_even(sparsity: Sequence[float], speedup: Sequence[float], *, log: bool = False) -> float | None:
    """Lowest sparsity from which on the speedup stays above 1, interpolated between measured points.

    None if it is not above 1 at the highest sparsity; the lowest measured sparsity if it is above 1 everywhere.

    Args:
        sparsity: in any order.
        speedup: over dense, for each sparsity.
        log: interpolate the speedup's logarithm: the place where a line drawn on a logarithmic axis crosses 1. Without
            it the speedup itself is interpolated, which is where a line on a linear axis does, and what the published
            break-even sparsities are compared with. The two differ by what lies between two measured points at most.
    """
    order = np.argsort(sparsity)
    s, v = np.asarray(sparsity, dtype=float)[order], np.asarray(speedup, dtype=float)[order]
    if not len(v) or v[-1] <= 1:
        return None
    below = np.flatnonzero(v <= 1)
    if not len(below):
        return float(s[0])
    i = below[-1]
    height = np.log(v) if log else v - 1  # above break-even
    return float(s[i] - height[i] / (height[i + 1] - height[i]) * (s[i + 1] - s[i]))


# --- training -------------------------------------------------------------------------------------------------------


def training_curves(curves: pd.DataFrame) -> Figure:
    """Test accuracy by epoch, a panel a block size, a line a sparsity, the dense model in each; mean over seeds."""
    rows = _require(curves[curves["metric"] == "top1"], "training curves")
    blocks = _blocks(_require(rows[rows["block_size"].notna()], "training curves of masked models"))
    figure, panels = plt.subplots(1, len(blocks), figsize=(WIDTH, 2.6), sharey=True, squeeze=False)
    sparsities = sorted(rows["sparsity"].dropna().unique())
    shades = dict(zip(sparsities, sns.color_palette("viridis_r", len(sparsities)), strict=True))
    dashes = dict(zip(sparsities, itertools.cycle(("-", "--", "-.", ":")), strict=False))
    for axes, block in zip(panels[0], blocks, strict=True):
        dense = rows[rows["backend"] == "dense"].groupby("epoch")["value"].mean()
        axes.plot(dense.index, dense, color=_DENSE, linewidth=1.5, label="dense")
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
    colours = ["white", "0.25", _COLOURS[64], _COLOURS[8]]
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
    rows = _require(kept, "masks")
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    sns.boxplot(
        rows, x="layer", y="kept", hue="mask", ax=axes, fliersize=2, linewidth=0.8,
        palette=dict(zip(rows["mask"].unique(), ("0.8", _COLOURS[16]), strict=False)),
    )  # fmt: skip
    axes.set(xlabel="", ylabel="share kept of a row of blocks")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.tick_params(axis="x", rotation=60, labelsize=7)
    axes.legend(title=None)
    return figure


# --- folding --------------------------------------------------------------------------------------------------------


def conversion(sizes: Mapping[str, float], seconds: Mapping[str, float]) -> Figure:
    """Bytes of each form of the model, and seconds to convert it once and to load it again."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.4))
    for axes, values, unit, scale in ((left, sizes, "MB", 1e6), (right, seconds, "s", 1.0)):
        names = list(values)
        heights = [values[n] / scale for n in names]
        bars = axes.barh(names, heights, color=[_DENSE, *[_COLOURS[16]] * (len(names) - 1)], height=0.6)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axes.set(xlabel=unit, xlim=(0, max(heights) * 1.18))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    left.set_title("size")
    right.set_title("time, once")
    return figure


# --- linear layers --------------------------------------------------------------------------------------------------


def speedup_heatmaps(speedups: pd.DataFrame, backend: str) -> Figure:
    """Speedup over dense of one backend: a panel a block size, a row a shape and token count, a column a sparsity."""
    rows = _require(speedups[speedups["backend"] == backend], f"linear layers through {backend!r}")
    rows = rows.assign(layer=rows["model"] + ", " + rows["tokens"].astype(int).astype(str) + " tokens")
    layers = sorted(rows["layer"].unique(), key=lambda s: [int(n) for n in re.findall(r"\d+", s)][::-1])
    blocks = list(_by_block(rows))
    figure, panels = plt.subplots(1, len(blocks), figsize=(WIDTH, 1.1 + 0.24 * len(layers)), sharey=True, squeeze=False)
    _one_of(rows, "precision")
    norm = TwoSlopeNorm(vcenter=0, vmin=min(-0.01, *_log_range(rows)), vmax=max(0.01, *_log_range(rows)))
    for axes, (block, cells) in zip(panels[0], blocks, strict=True):
        table = cells.pivot_table(index="layer", columns="sparsity", values="speedup", aggfunc="median")
        table = table.reindex(layers)
        table.columns = [f"{s:.0%}" for s in table.columns]
        labels = table.map(lambda v: "" if np.isnan(v) else f"{v:.2f}" if v < 9.995 else f"{v:.0f}")
        sns.heatmap(
            np.log2(table), annot=labels, fmt="", cmap="PuOr", norm=norm, cbar=False, ax=axes, linewidths=0.5,
            annot_kws={"fontsize": 7 if table.shape[1] * len(blocks) <= 16 else 5.5},
        )  # fmt: skip
        axes.set(title=f"blocks of {block}×{block}" if block else _NO_BLOCKS, xlabel="sparsity", ylabel="")
        axes.tick_params(axis="y", rotation=0)
    panels[0, 0].set_ylabel("layer, out×in")
    figure.suptitle(f"speedup of {backend!r} over dense: above 1 purple, below 1 orange", fontsize=9)
    return figure


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

    The ticks at 1× are the break-evens of the lines as drawn, straight on the logarithmic axis (``break_even(...,
    log=True)``). Backends without blocks (2:4) have no row: their point stands in every panel of its shape.

    Args:
        speedups: of one precision, and one token count a shape.
        backends: those to draw, in this order; what was not measured is left out.
        limits: ``limits.linear_seconds`` of ``speedups``, by the same index; what no kernel can beat, drawn dashed.
        headline: a published speedup, drawn dotted.
    """
    rows = _require(speedups[speedups["backend"].isin(backends)], "linear layers")
    _one_of(rows, "precision")
    _one_token_count(rows)
    shapes = _shapes(rows)
    blocked = set(rows.loc[rows["block_size"].notna(), "backend"])
    present = [b for b in backends if b in (blocked or set(rows["backend"]))]
    figure, panels = plt.subplots(
        len(present), len(shapes), figsize=(WIDTH, 1.0 + 1.3 * len(present)), sharex=True, sharey="row", squeeze=False
    )
    sparsities = sorted(rows.loc[rows["block_size"].notna() | (not blocked), "sparsity"].unique())
    for row, backend in enumerate(present):
        for axes, shape in zip(panels[row], shapes, strict=True):
            of_shape = rows[rows["model"] == shape]
            cell = of_shape[(of_shape["backend"] == backend) & of_shape["block_size"].notna()]
            for block in _blocks(cell):
                line = cell[cell["block_size"] == block].groupby("sparsity")["speedup"].median()
                _line(axes, line.index, line, block)
                edge = break_even(list(line.index), list(line), log=True)
                if edge is not None and edge > line.index.min():
                    axes.plot([edge], [1], marker="|", markersize=10, color=_COLOURS[block], zorder=4)
            _points_without_blocks(axes, of_shape)
            _reference_line(axes)
            if limits is not None:
                bound = _limits(of_shape, limits)
                _limit_line(axes, bound.index, bound, "limit of arithmetic and bytes")
            if headline:
                label = "published headline, large matmuls"
                axes.axhline(headline, color=_DENSE, linewidth=0.8, linestyle=":", label=label)
            if cell.empty and len(blocked):
                axes.text(0.5, 0.1, "not measured", transform=axes.transAxes, ha="center", fontsize=6, color=_DENSE)
            _speedup_axis(axes)
            axes.set_xticks(sparsities)
            axes.tick_params(axis="x", labelsize=6, rotation=90)
            axes.tick_params(axis="y", labelsize=7)
            _percent(axes)
            if row == 0:
                axes.set_title(shape)
        panels[row, 0].set_ylabel(backend)
    panels[-1, len(shapes) // 2].set_xlabel("sparsity (ticks on the line at 1×: break-even)")
    _legend(figure)
    _ylabel(figure, f"speedup over {_over(rows)}")
    return figure


def _points_without_blocks(axes: Axes, rows: pd.DataFrame, y: str = "speedup") -> None:
    """A hollow point at the sparsity of each backend that is sparse without blocks."""
    line = _without_blocks(rows).groupby("sparsity")[y].median()
    if len(line):
        _line(axes, line.index, line, None, linestyle="none", markersize=5.5)


def contenders(
    speedups: pd.DataFrame, sparsity: float, by: str = "model", limits: pd.DataFrame | None = None
) -> Figure:
    """Who is fastest: a row a backend, the fastest at the top, a marker a block size, a panel a shape or a precision.

    A marker is the median over the panel's rows, the line through it their 20% to 80% range of repeats (median of each
    end). Backends without blocks (2:4) are drawn at the one sparsity that they have, which their name tells.

    Args:
        speedups: of one precision, unless ``by`` is ``"precision"``; over whichever dense variant they are.
        sparsity: of the block-sparse backends.
        by: the column that panels differ in, ``"model"`` (a shape) or ``"precision"``.
        limits: ``limits.linear_seconds`` of ``speedups``; what no kernel can beat at ``sparsity``, drawn dashed; only
            where panels are shapes.
    """
    if limits is not None and by != "model":
        raise ValueError(f"limits are those of a shape, and panels differ in {by!r}; leave out limits, or by")
    blocked = np.isclose(speedups["sparsity"], sparsity) & speedups["block_size"].notna()
    _require(speedups[blocked], f"block-sparse layers at {sparsity:.0%}")
    rows = speedups[blocked | speedups.index.isin(_without_blocks(speedups).index)]
    if by != "precision":
        _one_of(rows, "precision")
        _one_token_count(rows)
    names = {
        backend: backend if cell["block_size"].notna().any() else f"{backend} ({cell['sparsity'].iloc[0]:.0%})"
        for backend, cell in rows.groupby("backend")
    }
    backends = list(rows.groupby("backend")["speedup"].median().sort_values().index)
    blocks = _blocks(rows)
    offsets = _spread(blocks, 0.66)
    values = _shapes(rows) if by == "model" else sorted(rows[by].unique(), key=_precision_rank)
    height = 0.4 + (0.1 + 0.08 * len(blocks)) * len(backends)
    figure, panels = _panels(len(values), 3, height, sharex=True, sharey=True)
    for axes, value in zip(panels, values, strict=True):
        panel = rows[rows[by] == value]
        for place, backend in enumerate(backends):
            for block, cell in _by_block(panel[panel["backend"] == backend]):
                y = place + offsets.get(block, 0.0)
                colour = _style(block)["color"]
                axes.hlines(y, cell["speedup_low"].median(), cell["speedup_high"].median(), color=colour, lw=0.9)
                _line(axes, [cell["speedup"].median()], [y], block, linestyle="none")
        axes.axvline(1, color=_DENSE, linewidth=1, zorder=1)
        if limits is not None:
            bound = _limits(panel[panel["block_size"].notna()], limits).median()
            axes.axvline(bound, color=_DENSE, linestyle="--", linewidth=1, label="limit of arithmetic and bytes")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(_ratios))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(range(len(backends)), [names[b] for b in backends])
        axes.set(title=value, ylim=(-0.6, len(backends) - 0.4))
        axes.tick_params(labelsize=7.5)
    _xlabel(panels, f"speedup over {_over(rows)}")
    figure.suptitle(f"blocks {sparsity:.0%} sparse", fontsize=9)
    _legend(figure)
    _ylabel(figure, "backend")
    return figure


def _spread(items: Sequence[object], width: float) -> dict[object, float]:
    """Offsets that set items side by side within ``width``, the first uppermost."""
    return dict(zip(items, np.linspace(width / 2, -width / 2, len(items)) if len(items) > 1 else [0.0], strict=True))


def _precision_rank(precision: str) -> tuple[int, str]:
    known = ("fp32", "tf32", "bf16", "fp16")
    return known.index(precision) if precision in known else len(known), precision


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
    rows = _require(speedups.assign(size=sizes[0])[square], "large square products")
    blocked = _require(rows[rows["block_size"].notna()], "large square products with blocks")
    _one_of(blocked, "precision" if by == "backend" else "backend")
    values = list(dict.fromkeys(blocked[by])) if by == "backend" else sorted(blocked[by].unique(), key=_precision_rank)
    sparsities = sorted(blocked["sparsity"].unique())
    figure, panels = plt.subplots(
        len(values), len(sparsities), figsize=(WIDTH, 1.3 + 1.2 * len(values)), sharex=True, sharey=True, squeeze=False
    )
    for line_of_panels, value in zip(panels, values, strict=True):
        for axes, sparsity in zip(line_of_panels, sparsities, strict=True):
            cell = blocked[(blocked[by] == value) & (blocked["sparsity"] == sparsity)]
            for block in _blocks(cell):
                line = cell[cell["block_size"] == block].groupby("size")["speedup"].median()
                _line(axes, line.index, line, block)
            without = _without_blocks(rows if by == "backend" else rows[rows[by] == value])
            if len(line := without.groupby("size")["speedup"].median()):
                _line(axes, line.index, line, None, label=f"{_NO_BLOCKS}, at {without['sparsity'].iloc[0]:.0%}")
            if limits is not None:
                bound = pd.Series(
                    {size: _limits(at, limits).median() for size, at in cell.groupby("size")}, dtype=float
                )
                _limit_line(axes, bound.index, bound, "limit of arithmetic and bytes")
            if headline:
                axes.axhline(headline, color=_DENSE, linewidth=0.8, linestyle=":", label="published headline")
            _reference_line(axes)
            _speedup_axis(axes)
            _sizes_axis(axes, rows["size"])
            axes.tick_params(labelsize=7)
        line_of_panels[0].set_ylabel(value)
    for axes, sparsity in zip(panels[0], sparsities, strict=True):
        axes.set_title(f"{sparsity:.0%} sparse")
    _xlabel(panels[-1], "matrix size")
    _legend(figure)
    _ylabel(figure, f"speedup over {_over(rows)}")
    return figure


def linear_throughput(rows: pd.DataFrame, peak: float, limits: pd.DataFrame | None = None) -> Figure:
    """Useful arithmetic of each backend, as a share of the device's measured dense peak, against sparsity.

    Useful is what the kept blocks need (``limits.kept_share``), padding excluded. A line is the median over layers,
    the shaded range spans 20% to 80% of them. Backends without blocks (2:4) are a point in every panel.

    Args:
        rows: latency rows of linear layers in one precision.
        peak: the device's measured dense throughput in it, FLOP/s; see ``limits.peak``.
        limits: ``limits.linear_seconds`` of ``rows`` with a bandwidth; the share of the peak that it leaves to the
            median layer, drawn dashed.
    """
    rows = _require(rows[rows["metric"] == "latency"], "linear layers")
    _one_of(rows, "precision")
    rows = rows.assign(share=dense_throughput(rows) * kept_share(rows) / peak)
    backends = _require(rows[rows["block_size"].notna()], "block-sparse linear layers")["backend"].unique()
    dense = rows.loc[rows["backend"] == "dense", "share"].median()
    figure, panels = _panels(len(backends), 3, 1.9, sharex=True, sharey=True)
    for axes, backend in zip(panels, sorted(backends), strict=True):
        cell = rows[rows["backend"] == backend]
        for block in _blocks(cell):
            line = cell[cell["block_size"] == block].groupby("sparsity")["share"]
            _line(axes, line.median().index, line.median(), block)
            _band(axes, line.median().index, line.quantile(0.2), line.quantile(0.8), block)
        _points_without_blocks(axes, rows, "share")
        if limits is not None:
            at = limits.reindex(cell.index)
            bound = (at["flop"] / at["seconds"] / peak).groupby(cell["sparsity"]).median()
            _limit_line(axes, bound.index, bound, "limit of arithmetic and bytes, median")
        if not np.isnan(dense):
            _reference_line(axes, dense, "dense layers, median")
        axes.set(title=backend, ylim=(0, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        _percent(axes)
    _xlabel(panels, "sparsity")
    _legend(figure)
    _ylabel(figure, "of the measured dense peak")
    return figure


# --- whole models ---------------------------------------------------------------------------------------------------


def model_speedup(
    speedups: pd.DataFrame, backend: str, shares: Mapping[str, float], published: pd.DataFrame | None = None
) -> Figure:
    """End-to-end speedup against sparsity, a panel a scope, a line a block size, Amdahl's bound drawn in.

    Where a cell was measured in several compile modes, its fastest is drawn. 2:4 sparsity is a point, if it is there.

    Args:
        speedups: of one model, precision and batch size.
        backend: whose.
        shares: for each scope, the share of the model's arithmetic that it holds.
        published: published speedups with ``scope``, ``block_size``, ``sparsity``, ``value`` and ``device``, drawn
            hollow: those of ``results.published_speedups`` that compare with this model and precision.
    """
    of_scopes = speedups[speedups["scope"].isin(shares)]
    mine = _require(of_scopes[of_scopes["backend"] == backend], f"whole models through {backend!r}")
    _one_of(mine, "model", "precision", "batch_size")
    rows = _fastest(of_scopes, ("backend", "scope", "block_size", "sparsity")).sort_values("sparsity")
    scopes = [s for s in shares if s in set(mine["scope"])]
    figure, panels = _panels(len(scopes), 3, 2.4)
    devices: set[str] = set()
    for axes, scope in zip(panels, scopes, strict=True):
        cell = rows[(rows["scope"] == scope) & (rows["backend"] == backend)]
        for block in _blocks(cell):
            line = cell[cell["block_size"] == block]
            _line(axes, line["sparsity"], line["speedup"], block)
            _band(axes, line["sparsity"], line["speedup_low"], line["speedup_high"], block)
        _points_without_blocks(axes, rows[rows["scope"] == scope])
        s = np.linspace(cell["sparsity"].min(), cell["sparsity"].max(), 100)
        _limit_line(axes, s, amdahl(s, shares[scope]), "Amdahl's bound")
        points = [] if published is None else published[published["scope"] == scope].dropna(subset="sparsity")
        for point in points.itertuples() if len(points) else ():
            _published_point(axes, point.sparsity, point.value, point.block_size)
            devices.add(str(point.device))
        _reference_line(axes)
        _percent(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(_times))
        axes.set(title=f"{scope} sparse", xlabel="sparsity", ylim=(0, None))
    panels[0].set_ylabel(f"speedup over {_over(mine)}")
    figure.suptitle(": ".join(filter(None, (backend, _setting(mine)))), fontsize=9)
    _legend(figure, f"published ({', '.join(sorted(devices))})" if devices else None)
    return figure


def batch_sizes(
    speedups: pd.DataFrame, backends: Sequence[str], bound: float | None = None, published_from: float | None = None
) -> Figure:
    """End-to-end speedup against batch size at one sparsity, a panel a backend, a line a block size.

    Where a cell was measured in several compile modes, its fastest is drawn.

    Args:
        speedups: of one model, precision, scope and sparsity.
        backends: those to draw, in this order; what was not measured is left out.
        bound: Amdahl's, drawn dashed; see ``limits.amdahl``.
        published_from: the batch size from which on the published models are faster than dense, a thin line.
    """
    rows = _require(speedups[speedups["backend"].isin(backends)], "batch sizes")
    _one_of(rows, "model", "precision", "scope")
    rows = _fastest(rows, ("backend", "batch_size", "block_size"))
    present = [b for b in backends if b in set(rows["backend"])]
    figure, panels = _panels(len(present), 3, 2.0, sharex=True, sharey=True)
    for axes, backend in zip(panels, present, strict=True):
        for block, cell in _by_block(rows[rows["backend"] == backend]):
            line = cell.sort_values("batch_size")
            _line(axes, line["batch_size"], line["speedup"], block)
        _reference_line(axes)
        if bound:
            axes.axhline(bound, color=_DENSE, linestyle="--", linewidth=1, label="Amdahl's bound")
        if published_from:
            label = f"published: faster from batch {published_from:g}"
            axes.axvline(published_from, color=_DENSE, linestyle=":", linewidth=0.9, label=label)
        _sizes_axis(axes, rows["batch_size"])
        axes.yaxis.set_major_formatter(FuncFormatter(_times))
        axes.set(title=backend, ylim=(0, None))
        axes.tick_params(labelsize=7.5)
    _xlabel(panels, "batch size (images)")
    _legend(figure)
    _ylabel(figure, f"speedup over {_over(rows)}")
    return figure


def execution_modes(rows: pd.DataFrame) -> Figure:
    """Images a second, dense and through each backend, run eagerly, compiled and as a CUDA graph.

    Dense is at the top, the others below it, the fastest first. A marker is a way to run (``compile``), at the median
    time; whiskers span its 20% to 80% range; the dashed line is the fastest dense variant.

    Args:
        rows: of one model, batch size and precision, the sparse ones of one scope and sparsity (2:4 besides them);
            those with metric ``latency`` (s) are drawn.
    """
    rows = _require(rows[rows["metric"] == "latency"], "latencies of whole models")
    _one_of(rows, "model", "batch_size", "precision")
    _one_of(rows[rows["block_size"].notna()], "scope", "sparsity")
    rows = rows.assign(variant=_variants(rows))
    times = rows.groupby(["variant", "compile"])[["value", "low", "high"]].median()
    speed = rows["batch_size"].iloc[0] / times
    best = speed["value"].groupby("variant").max().sort_values()
    order = [*(v for v in best.index if v != "dense"), *(["dense"] if "dense" in best else [])]
    blocks = rows.groupby("variant")["block_size"].first()
    present = set(rows["compile"])
    modes = [*(m for m in _MODES if m in present), *sorted(present - set(_MODES))]
    markers = {**dict(zip(modes, itertools.cycle("vP*<>"), strict=False)), **_MODES}
    offsets = _spread(modes, 0.56)
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + (0.11 + 0.095 * len(modes)) * len(order)))
    for place, variant in enumerate(order):
        colour = _DENSE if variant == "dense" else _style(blocks[variant])["color"]
        for mode, cell in speed.loc[variant].iterrows():
            y = place + offsets[mode]
            fill = "white" if mode == "eager" else colour
            if cell["low"] == cell["low"]:  # the slow end of the times is the low end of the speed
                axes.hlines(y, cell["high"], cell["low"], color=colour, linewidth=1, zorder=2)
            axes.plot(
                cell["value"], y, marker=markers[mode], markersize=4.5, color=colour, markerfacecolor=fill, zorder=3
            )  # fmt: skip
            text = f"{cell['value']:,.0f}" if cell["value"] >= 99.5 else f"{cell['value']:.3g}"
            right = np.nanmax([cell["value"], cell["low"]])
            axes.annotate(
                text, (right, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=6, color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )  # fmt: skip
    if "dense" in best:
        axes.axvline(best["dense"], color=_DENSE, linestyle="--", linewidth=0.9, zorder=1, label="fastest dense")
    axes.set_yticks(range(len(order)), order)
    axes.set(
        xlabel="images a second", xlim=(0, 1.1 * np.nanmax(speed[["value", "low"]])), ylim=(-0.55, len(order) - 0.45)
    )  # fmt: skip
    axes.set_ylabel("backend, block size")
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_title(_setting(rows))
    for mode in modes:
        fill = "white" if mode == "eager" else _DENSE
        axes.plot([], [], marker=markers[mode], color=_DENSE, markerfacecolor=fill, linestyle="none", label=mode)
    _legend(figure)
    return figure


def _variants(rows: pd.DataFrame) -> list[str]:
    """Backend and block size of each row, as a label."""
    return [
        backend if np.isnan(block) else f"{backend} {int(block)}×{int(block)}"
        for backend, block in zip(rows["backend"], rows["block_size"].astype(float), strict=True)
    ]


def memory(rows: pd.DataFrame) -> Figure:
    """Model bytes and peak memory of one forward pass, dense and by backend and block size, in MB.

    Args:
        rows: those with metric ``model_bytes`` or ``peak_memory`` (bytes) are drawn; of one model and precision.
    """
    rows = _require(rows[rows["metric"].isin(("model_bytes", "peak_memory"))], "memory")
    _one_of(rows, "model", "precision")
    rows = rows.assign(variant=_variants(rows))
    named = rows.drop_duplicates("variant").sort_values(["backend", "block_size"], na_position="first")
    named = pd.concat([named[named["backend"] == "dense"], named[named["backend"] != "dense"]])
    starts = named["backend"] != named["backend"].shift()
    places = np.arange(len(named)) + 0.6 * (starts.cumsum() - 1)  # a gap between two backends
    height = max(1.8, 0.8 + 0.16 * (places.iloc[-1] + 1))
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, height), sharey=True)
    titles = {"model_bytes": "weights held", "peak_memory": "peak of one forward pass, beyond the weights"}
    colours = [_DENSE if np.isnan(block) else _COLOURS[int(block)] for block in named["block_size"].astype(float)]
    hollow = named["variant"].isin(_without_blocks(named)["variant"])
    fills = ["white" if empty else colour for empty, colour in zip(hollow, colours, strict=True)]
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        cell = rows[rows["metric"] == metric].groupby("variant")["value"].median().reindex(named["variant"]) / 1e6
        bars = axes.barh(places, cell, color=fills, edgecolor=colours, linewidth=0.8, height=0.8)
        labels = ["" if np.isnan(v) else f"{v:.0f}" if v >= 9.5 else f"{v:.2g}" for v in cell]
        axes.bar_label(bars, labels, fontsize=6, padding=2)
        if "dense" in cell and cell["dense"] == cell["dense"]:
            axes.axvline(cell["dense"], color=_DENSE, linewidth=0.8, linestyle="--", zorder=0.5)
        axes.set(xlabel="MB", xlim=(0, 1.14 * (cell.max() if cell.notna().any() else 1)))
        axes.set_title(title, fontsize=8)
        axes.grid(False, axis="y")
    panels[0].set_yticks(places, named["variant"], fontsize=7)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("backend, block size")
    return figure


# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy(top1: pd.DataFrame, published_loss: pd.DataFrame) -> Figure:
    """Accuracy, and points lost against dense, by sparsity and block size; error bars span the seeds.

    Args:
        top1: rows with the final test accuracy in percent.
        published_loss: ``block_size``, ``sparsity``, ``lost`` (points of ImageNet top-1) and ``source``.
    """
    rows = _require(top1, "accuracies")
    dense = rows.loc[rows["backend"] == "dense", "value"].mean()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    for block in _blocks(rows):
        by_sparsity = rows[rows["block_size"] == block].groupby("sparsity")["value"].agg(["mean", "min", "max"])
        for axes, values in ((left, by_sparsity), (right, dense - by_sparsity)):
            spread = [abs(values["mean"] - values["min"]), abs(values["max"] - values["mean"])]
            _line(axes, values.index, values["mean"], block)
            axes.errorbar(values.index, values["mean"], spread, fmt="none", color=_COLOURS[block], capsize=2, lw=1)
    _reference_line(left, dense, f"dense {dense:.1f}%")
    _reference_line(right, 0)
    for point in published_loss.itertuples():
        _published_point(right, point.sparsity, point.lost, point.block_size)
    left.set(xlabel="sparsity", ylabel="test accuracy (%)")
    right.set(xlabel="sparsity", ylabel="points lost against dense")
    right.invert_yaxis()
    for axes in (left, right):
        _percent(axes)
    _legend(figure, "published, ImageNet" if len(published_loss) else None)
    return figure


def pareto(points: pd.DataFrame, dense_top1: float) -> Figure:
    """Accuracy against measured speed of one model: columns ``block_size``, ``sparsity``, ``speedup``, ``top1``.

    Each point bears its sparsity, in its own colour and where it covers no other.
    """
    rows = _require(points, "models with both accuracy and speed")
    figure, axes = plt.subplots(figsize=(WIDTH * 0.7, 3.4))
    for block in _blocks(rows):
        cell = rows[rows["block_size"] == block].sort_values("sparsity")
        _line(axes, cell["speedup"], cell["top1"], block, linewidth=0)
    axes.plot([1], [dense_top1], marker="*", markersize=11, color=_DENSE, linestyle="none", label="dense")
    axes.axhline(dense_top1 - 2, color=_DENSE, linestyle=":", linewidth=1, label="2 points lost")
    axes.margins(0.08)
    axes.xaxis.set_major_formatter(FuncFormatter(_times))
    axes.set(xlabel="speedup over dense, measured", ylabel="test accuracy (%)")
    _legend(figure)
    _place_labels(
        axes,
        [
            (p.speedup, p.top1, f"{p.sparsity:.0%}", _COLOURS[int(p.block_size)])
            for p in rows.dropna(subset="block_size").sort_values(["top1", "speedup"], ascending=False).itertuples()
        ],
        obstacles=[(1, dense_top1)],
    )
    return figure


def _place_labels(
    axes: Axes, labels: Sequence[tuple[float, float, str, object]], obstacles: Sequence[tuple[float, float]]
) -> None:
    """Write each ``(x, y, text, colour)`` beside its point, at the place that overlaps least with points and labels."""
    figure, size = axes.figure, 6.0
    figure.draw_without_rendering()  # the layout decides where a point lies
    scale = figure.dpi / 72

    def box(x: float, y: float, width: float, height: float) -> Bbox:
        return Bbox.from_bounds(x * scale, y * scale, width * scale, height * scale)

    def at(x: float, y: float) -> np.ndarray:
        return axes.transData.transform((x, y)) / scale  # points

    taken = [box(*(at(x, y) - 2.5), 5, 5) for x, y in [*((x, y) for x, y, *_ in labels), *obstacles]]
    for x, y, text, colour in labels:
        width, height = 0.62 * size * len(text), 1.1 * size
        sides = ((3, 2), (3, -2 - height), (-3 - width, 2), (-3 - width, -2 - height))
        rings = [(-width / 2, 5), (-width / 2, -5 - height), (6, -height / 2), (-6 - width, -height / 2)]
        rings += [(dx, dy * far) for far in (4, 7) for dx, dy in ((3, 2), (3, -3), (-3 - width, 2), (-3 - width, -3))]

        def overlap(
            offset: tuple[float, float], x: float = x, y: float = y, w: float = width, h: float = height
        ) -> float:
            mine = box(*(at(x, y) + offset), w, h)
            hits = (Bbox.intersection(mine, other) for other in taken)
            outside = not (axes.bbox.x0 <= mine.x0 and mine.x1 <= axes.bbox.x1 + 6 * scale)
            return sum(hit.width * hit.height for hit in hits if hit) + 1e6 * outside

        best = min([*sides, *rings], key=overlap)  # the first of equals: beside the point
        taken.append(box(*(at(x, y) + best), width, height))
        axes.annotate(
            text, (x, y), xytext=best, textcoords="offset points", fontsize=size, color=colour, va="bottom", ha="left"
        )  # fmt: skip
