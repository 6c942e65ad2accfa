"""Every figure of the study, drawn from tables alone: no torch, no measuring, one shared style.

Block sizes differ by colour, marker and dash, so that the figures read in grey and by colour-blind readers. A figure
takes rows as ``results.Store.read`` gives them (or ``results.speedups`` of them) and returns a matplotlib figure.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
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
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter, ScalarFormatter

from .results import dense_throughput

_BLOCKS = (8, 16, 32, 64, 128, 4, 256)
_COLOURS = dict(zip(_BLOCKS, sns.color_palette("colorblind", len(_BLOCKS)), strict=True))
_MARKERS = dict(zip(_BLOCKS, "vosD^P*", strict=True))
_DASHES = dict(zip(_BLOCKS, ((1, 1), (5, 1.5), (), (3, 1, 1, 1), (7, 2, 2, 2), (2, 2), (9, 2)), strict=True))
_DENSE = "0.35"
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


def _blocks(rows: pd.DataFrame) -> list[int]:
    return sorted(int(b) for b in rows["block_size"].dropna().unique())


def _line(axes: Axes, x: Iterable[float], y: Iterable[float], block_size: int, **style: object) -> None:
    line_style = {
        "color": _COLOURS[block_size],
        "marker": _MARKERS[block_size],
        "dashes": _DASHES[block_size],
        "markersize": 4.5,
        "label": f"{block_size}×{block_size}",
    }
    if not line_style["dashes"]:
        line_style.pop("dashes")
    axes.plot(list(x), list(y), **{**line_style, **style})


def _reference_line(axes: Axes, y: float = 1.0, label: str | None = None) -> None:
    axes.axhline(y, color=_DENSE, linewidth=1, zorder=1, label=label)


def _published_point(axes: Axes, sparsity: float, value: float, block_size: float) -> None:
    marker = _MARKERS[int(block_size)]
    axes.plot(
        sparsity, value, marker=marker, markersize=7, markerfacecolor="none", color=_COLOURS[int(block_size)]
    )  # fmt: skip


def _legend(figure: Figure, published: str | None = None) -> None:
    """One legend below all panels, with a hollow marker for ``published`` points if there are any."""
    entries: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    order = sorted(entries, key=lambda label: ("×" not in label, int(label.split("×")[0]) if "×" in label else 0))
    handles, labels = [entries[label] for label in order], [f"blocks {n}" if "×" in n else n for n in order]
    if published:
        handles.append(Line2D([], [], marker="o", markersize=6, markerfacecolor="none", color=_DENSE, linestyle="none"))
        labels.append(published)
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if len(labels) <= 4 else 3)


def _percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _times(value: float, _: object = None) -> str:
    return f"{value:g}×"


def _ratios(value: float, _: object = None) -> str:
    """For logarithmic axes to base 2: a quarter is as far from 1 as four, and should look it."""
    return f"{value:g}×" if value >= 1 else f"1/{1 / value:g}×"


def break_even(sparsity: Sequence[float], speedup: Sequence[float]) -> float | None:
    """Lowest sparsity from which on the speedup stays above 1, interpolated between measured points.

    None if it is not above 1 at the highest sparsity; the lowest measured sparsity if it is above 1 everywhere.
    """
    order = np.argsort(sparsity)
    s, v = np.asarray(sparsity, dtype=float)[order], np.asarray(speedup, dtype=float)[order]
    if not len(v) or v[-1] <= 1:
        return None
    below = np.flatnonzero(v <= 1)
    if not len(below):
        return float(s[0])
    i = below[-1]
    return float(s[i] + (1 - v[i]) / (v[i + 1] - v[i]) * (s[i + 1] - s[i]))


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
    blocks = _blocks(rows)
    figure, panels = plt.subplots(1, len(blocks), figsize=(WIDTH, 1.1 + 0.24 * len(layers)), sharey=True, squeeze=False)
    norm = TwoSlopeNorm(vcenter=0, vmin=min(-0.01, *_log_range(rows)), vmax=max(0.01, *_log_range(rows)))
    for axes, block in zip(panels[0], blocks, strict=True):
        table = rows[rows["block_size"] == block].pivot_table(index="layer", columns="sparsity", values="speedup")
        table = table.reindex(layers)
        table.columns = [f"{s:.0%}" for s in table.columns]
        labels = table.map(lambda v: "" if np.isnan(v) else f"{v:.2f}" if v < 9.995 else f"{v:.0f}")
        sns.heatmap(
            np.log2(table), annot=labels, fmt="", cmap="PuOr", norm=norm, cbar=False, ax=axes, linewidths=0.5,
            annot_kws={"fontsize": 7},
        )  # fmt: skip
        axes.set(title=f"blocks of {block}×{block}", xlabel="sparsity", ylabel="")
        axes.tick_params(axis="y", rotation=0)
    panels[0, 0].set_ylabel("layer, out×in")
    figure.suptitle(f"speedup of {backend!r} over dense: above 1 purple, below 1 orange", fontsize=9)
    return figure


def _log_range(rows: pd.DataFrame) -> tuple[float, float]:
    logs = np.log2(rows["speedup"])
    return float(logs.min()), float(logs.max())


def linear_break_even(speedups: pd.DataFrame, backends: Sequence[str], headline: float | None = None) -> Figure:
    """Speedup against sparsity of the MLP's layers, a row a backend, a panel a shape, a line a block size."""
    rows = _require(speedups[speedups["backend"].isin(backends)], "linear layers")
    shapes = sorted(rows["model"].unique(), key=lambda s: [int(n) for n in s.split("x")])
    present = [b for b in backends if b in set(rows["backend"])]
    figure, panels = plt.subplots(
        len(present), len(shapes), figsize=(WIDTH, 0.6 + 1.7 * len(present)), sharex=True, sharey="row", squeeze=False
    )
    for row, backend in enumerate(present):
        for axes, shape in zip(panels[row], shapes, strict=True):
            cell = rows[(rows["backend"] == backend) & (rows["model"] == shape)]
            for block in _blocks(cell):
                line = cell[cell["block_size"] == block].groupby("sparsity")["speedup"].median()
                _line(axes, line.index, line, block)
                edge = break_even(list(line.index), list(line))
                if edge is not None and edge > line.index.min():
                    axes.plot([edge], [1], marker="|", markersize=10, color=_COLOURS[block], zorder=4)
            _reference_line(axes)
            if headline:
                label = "published headline, large matmuls"
                axes.axhline(headline, color=_DENSE, linewidth=0.8, linestyle=":", label=label)
            axes.set_yscale("log", base=2)
            axes.set_xticks(sorted(cell["sparsity"].unique()))
            axes.tick_params(axis="x", labelsize=6, rotation=90)
            axes.yaxis.set_major_formatter(FuncFormatter(_ratios))
            _percent(axes)
            if row == 0:
                axes.set_title(shape)
        panels[row, 0].set_ylabel(f"{backend}\nspeedup over dense")
    panels[-1, len(shapes) // 2].set_xlabel("sparsity (ticks on the line at 1×: break-even)")
    _legend(figure)
    return figure


def linear_throughput(rows: pd.DataFrame, peak: float) -> Figure:
    """Useful arithmetic of each backend, as a share of the device's measured dense peak, against sparsity.

    Args:
        rows: latency rows of linear layers.
        peak: the device's measured dense throughput, FLOP/s.
    """
    rows = _require(rows[rows["metric"] == "latency"], "linear layers")
    rows = rows.assign(share=dense_throughput(rows) * (1 - rows["sparsity"].fillna(0)) / peak)
    backends = sorted(set(rows["backend"]) - {"dense"})
    dense = rows.loc[rows["backend"] == "dense", "share"].median()
    figure, panels = plt.subplots(1, len(backends), figsize=(WIDTH, 2.7), sharey=True, squeeze=False)
    for axes, backend in zip(panels[0], backends, strict=True):
        cell = rows[rows["backend"] == backend]
        for block in _blocks(cell):
            line = cell[cell["block_size"] == block].groupby("sparsity")["share"]
            _line(axes, line.median().index, line.median(), block)
            axes.fill_between(
                line.median().index, line.quantile(0.2), line.quantile(0.8), color=_COLOURS[block], alpha=0.15, lw=0
            )
        _reference_line(axes, dense, "dense layers, median")
        axes.set(title=backend, xlabel="sparsity")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        _percent(axes)
    panels[0, 0].set(ylabel="of the measured dense peak", ylim=(0, 1))
    _legend(figure)
    return figure


# --- whole models ---------------------------------------------------------------------------------------------------


def model_speedup(
    speedups: pd.DataFrame, backend: str, shares: Mapping[str, float], published: pd.DataFrame | None = None
) -> Figure:
    """End-to-end speedup against sparsity, a panel a scope, a line a block size, Amdahl's bound drawn in.

    Args:
        speedups: of one model and one batch size.
        backend: whose.
        shares: for each scope, the share of the model's arithmetic that it holds.
        published: published speedups with ``scope``, ``block_size``, ``sparsity`` and ``value``, drawn hollow.
    """
    wanted = (speedups["backend"] == backend) & speedups["scope"].isin(shares)
    rows = _require(speedups[wanted], f"whole models through {backend!r}")
    scopes = [s for s in shares if s in set(rows["scope"])]
    figure, panels = plt.subplots(1, len(scopes), figsize=(WIDTH, 3.0), squeeze=False)
    for axes, scope in zip(panels[0], scopes, strict=True):
        cell = rows[rows["scope"] == scope]
        for block in _blocks(cell):
            line = cell[cell["block_size"] == block].sort_values("sparsity")
            _line(axes, line["sparsity"], line["speedup"], block)
            axes.fill_between(
                line["sparsity"], line["speedup_low"], line["speedup_high"], color=_COLOURS[block], alpha=0.15, lw=0
            )
        s = np.linspace(cell["sparsity"].min(), cell["sparsity"].max(), 100)
        axes.plot(s, 1 / (1 - s * shares[scope]), color=_DENSE, linestyle="--", linewidth=1, label="Amdahl's bound")
        points = (
            [] if published is None else published[published["scope"] == scope].dropna(subset="sparsity").itertuples()
        )
        for point in points:
            _published_point(axes, point.sparsity, point.value, point.block_size)
        _reference_line(axes)
        _percent(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(_times))
        axes.set(title=f"{scope} sparse", xlabel="sparsity", ylim=(0, None))
    panels[0, 0].set_ylabel(f"speedup over dense ({backend})")
    _legend(figure, None if published is None else f"published ({', '.join(sorted(set(published['device'])))})")
    return figure


def batch_sizes(speedups: pd.DataFrame, backends: Sequence[str]) -> Figure:
    """End-to-end speedup against batch size at one sparsity, a panel a backend, a line a block size."""
    rows = _require(speedups[speedups["backend"].isin(backends)], "batch sizes")
    present = [b for b in backends if b in set(rows["backend"])]
    figure, panels = plt.subplots(1, len(present), figsize=(WIDTH, 2.8), sharey=True, squeeze=False)
    for axes, backend in zip(panels[0], present, strict=True):
        cell = rows[rows["backend"] == backend]
        for block in _blocks(cell):
            line = cell[cell["block_size"] == block].sort_values("batch_size")
            _line(axes, line["batch_size"], line["speedup"], block)
        _reference_line(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(cell["batch_size"].unique()))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(_times))
        axes.set(title=backend, xlabel="batch size (images)", ylim=(0, None))
    panels[0, 0].set_ylabel("speedup over dense")
    _legend(figure)
    return figure


def memory(rows: pd.DataFrame) -> Figure:
    """Model bytes and peak memory of one forward pass, dense and by block size: rows with those two metrics."""
    rows = _require(rows[rows["metric"].isin(("model_bytes", "peak_memory"))], "memory")
    rows = rows.assign(
        variant=[
            "dense" if backend == "dense" else f"{backend}\n{int(block)}×{int(block)}"
            for backend, block in zip(rows["backend"], rows["block_size"].fillna(0), strict=True)
        ]
    ).sort_values(["backend", "block_size"])
    variants = sorted(rows["variant"].unique(), key=lambda v: (v != "dense", v.split("\n")[0], len(v), v))
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    titles = {"model_bytes": "weights held", "peak_memory": "peak of one forward pass, beyond the weights"}
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        cell = rows[rows["metric"] == metric].groupby("variant")["value"].median().reindex(variants) / 1e6
        bars = axes.bar(variants, cell, color=[_DENSE if v == "dense" else _COLOURS[16] for v in variants], width=0.6)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        axes.set(title=title, ylabel="MB")
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(False, axis="x")
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
    """Accuracy against measured speed of one model: columns ``block_size``, ``sparsity``, ``speedup``, ``top1``."""
    rows = _require(points, "models with both accuracy and speed")
    figure, axes = plt.subplots(figsize=(WIDTH * 0.7, 3.2))
    for block in _blocks(rows):
        cell = rows[rows["block_size"] == block].sort_values("sparsity")
        _line(axes, cell["speedup"], cell["top1"], block, linewidth=0)
        for point in cell.itertuples():
            axes.annotate(
                f"{point.sparsity:.0%}", (point.speedup, point.top1), xytext=(3, 3), textcoords="offset points",
                fontsize=6, color=_COLOURS[block],
            )  # fmt: skip
    axes.plot([1], [dense_top1], marker="*", markersize=11, color=_DENSE, linestyle="none", label="dense")
    axes.axhline(dense_top1 - 2, color=_DENSE, linestyle=":", linewidth=1, label="2 points lost")
    axes.xaxis.set_major_formatter(FuncFormatter(_times))
    axes.set(xlabel="speedup over dense, measured", ylabel="test accuracy (%)")
    _legend(figure)
    return figure
