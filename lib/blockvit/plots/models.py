"""Whole models: speed by sparsity, batch size and way to run, and what they cost in bytes and in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..comparisons import fastest_of_each
from ..limits import amdahl
from .rows import baseline, block_sizes, by_block, one_of, require, without_blocks
from .style import (
    ACCENT,
    COLOURS,
    DENSE,
    WIDTH,
    as_times,
    block_style,
    draw_band,
    draw_line,
    engine_style,
    engines_of,
    entitle,
    legend,
    limit_line,
    panel_grid,
    percent_axis,
    points_without_blocks,
    published_point,
    reference_line,
    shared_xlabel,
    shared_ylabel,
    sizes_axis,
    spread,
    three_digits,
)
from .words import backend_title, engine_title, measured_on, model_setting, named_backends, scope_title

AMDAHL = "Amdahl's law at the dense rate"
"""No limit for a kernel that does its arithmetic at a higher rate than the dense one."""


def model_speedup(
    speedups: pd.DataFrame,
    backend: str,
    shares: Mapping[str, float],
    published: pd.DataFrame | None = None,
    published_loss: pd.DataFrame | None = None,
) -> Figure:
    """End-to-end speedup against sparsity, a panel a scope, a line a block size, Amdahl's law drawn in.

    Where a cell was measured in several compile modes, its fastest is drawn. 2:4 sparsity is a point, if it is there.

    Args:
        speedups: of one model, precision and batch size.
        backend: whose.
        shares: for each scope, the share of the model's arithmetic that it holds.
        published: published speedups with ``scope``, ``block_size``, ``sparsity``, ``value`` and ``device``, drawn
            hollow: those of ``literature.speedups`` that compare with this model and precision.
        published_loss: ``literature.losses`` of this model; told below the title where such points are drawn.
    """
    of_scopes = speedups[speedups["scope"].isin(shares)]
    mine = require(of_scopes[of_scopes["backend"] == backend], f"whole models through {backend!r}")
    one_of(mine, "model", "precision", "batch_size")
    rows = fastest_of_each(of_scopes, ("backend", "scope", "block_size", "sparsity")).sort_values("sparsity")
    scopes = [s for s in shares if s in set(mine["scope"])]
    figure, panels = panel_grid(len(scopes), 3, 2.4)
    like = pd.DataFrame(columns=["scope", "sparsity"]) if published is None else published.dropna(subset="sparsity")
    drawn = like[like["scope"].isin(scopes)]
    lost = "" if published_loss is None else _losses(published_loss[published_loss["sparsity"].isin(drawn["sparsity"])])
    entitle(figure, f"{_whole_models(mine)}: speedup of {backend_title(backend)}", measured_on(mine), lost)
    for axes, scope in zip(panels, scopes, strict=True):
        cell = rows[(rows["scope"] == scope) & (rows["backend"] == backend)]
        for block in block_sizes(cell):
            line = cell[cell["block_size"] == block]
            draw_line(axes, line["sparsity"], line["speedup"], block)
            draw_band(axes, line["sparsity"], line["speedup_low"], line["speedup_high"], block)
        points_without_blocks(axes, rows[rows["scope"] == scope])
        s = np.linspace(cell["sparsity"].min(), cell["sparsity"].max(), 100)
        limit_line(axes, s, amdahl(s, shares[scope]), AMDAHL)
        for point in drawn[drawn["scope"] == scope].itertuples():
            published_point(axes, point.sparsity, point.value, point.block_size)
        reference_line(axes)
        percent_axis(axes, cell["sparsity"])
        axes.yaxis.set_major_formatter(FuncFormatter(as_times))
        axes.set(title=scope_title(scope), xlabel="sparsity", ylim=(0, None))
    legend(figure, _published_label(drawn))
    shared_ylabel(figure, f"speedup over {baseline(mine)}")
    return figure


def _published_label(points: pd.DataFrame) -> str | None:
    """Where and over what the points that are drawn were published; None if there are none."""
    if points.empty:
        return None
    devices, batches = sorted(set(points["device"].dropna())), sorted(set(points["batch_size"].dropna()))
    where = [*devices, *(f"batch {batch:.0f}" for batch in batches)]
    return f"published: {', '.join([*where, 'over eager dense'])}"


_OTHER_WEIGHTS = ("torchao superblock",)
"""Sources whose dense accuracy is of weights by another recipe than the sparse models'."""


def _losses(losses: pd.DataFrame) -> str:
    """What the published models lost in accuracy; empty if no loss is known."""
    cells = []
    for block, cell in losses.groupby(losses["block_size"].astype(int)):
        lost = ", ".join(f"{row.lost:.1f} at {row.sparsity:.0%}" for row in cell.itertuples())
        other = ", against other weights" if cell["source"].isin(_OTHER_WEIGHTS).all() else ""
        cells.append(f"{lost} ({_square(block)}{other})")
    return f"published models lost, in points of ImageNet top-1: {'; '.join(cells)}" if cells else ""


def batch_sizes(
    speedups: pd.DataFrame, backends: Sequence[str], bound: float | None = None, published_from: float | None = None
) -> Figure:
    """End-to-end speedup and its spread against batch size at one sparsity, a panel a backend, a line a block size.

    Where a cell was measured in several compile modes, its fastest is drawn.

    Args:
        speedups: of one model, precision, scope and sparsity.
        backends: those to draw, in this order; what was not measured is left out.
        bound: by Amdahl's law, drawn dashed; see ``limits.amdahl``.
        published_from: the batch size from which on the published models are faster than dense, a thin line.
    """
    rows = require(speedups[speedups["backend"].isin(backends)], "batch sizes")
    one_of(rows, "model", "precision", "scope")
    rows = fastest_of_each(rows, ("backend", "batch_size", "block_size"))
    present = [b for b in backends if b in set(rows["backend"])]
    figure, panels = panel_grid(len(present), 3, 2.0, sharex=True, sharey=True)
    entitle(figure, f"{model_setting(rows)}: speedup by batch size", measured_on(rows), named_backends(present))
    for axes, backend in zip(panels, present, strict=True):
        for block, cell in by_block(rows[rows["backend"] == backend]):
            line = cell.sort_values("batch_size")
            draw_line(axes, line["batch_size"], line["speedup"], block)
            draw_band(axes, line["batch_size"], line["speedup_low"], line["speedup_high"], block)
        reference_line(axes)
        if bound:
            axes.axhline(bound, color=DENSE, linestyle="--", linewidth=1, label=AMDAHL)
        if published_from:
            label = f"published: faster from batch {published_from:g}"
            axes.axvline(published_from, color=DENSE, linestyle=":", linewidth=0.9, label=label)
        sizes_axis(axes, rows["batch_size"])
        axes.yaxis.set_major_formatter(FuncFormatter(as_times))
        axes.set_title(backend)
        axes.tick_params(labelsize=7.5)
    panels[0].set_ylim(0, None)  # shared, and fixed by this: only once all lines are drawn
    shared_xlabel(panels, "batch size (images)")
    legend(figure)
    shared_ylabel(figure, f"speedup over {baseline(rows)}")
    return figure


def execution_modes(rows: pd.DataFrame) -> Figure:
    """Images a second, dense and through each backend, run eagerly, compiled and as a CUDA graph.

    Dense is at the top, the others below it, the fastest first. A marker is a way to run (``compile``), at the median
    time; whiskers span its 20% to 80% range; the dashed line is the fastest dense variant.

    Args:
        rows: of one model, batch size and precision, the sparse ones of one scope and sparsity (2:4 besides them);
            those with metric ``latency`` (s) are drawn.
    """
    rows = require(rows[rows["metric"] == "latency"], "latencies of whole models")
    one_of(rows, "model", "batch_size", "precision")
    one_of(rows[rows["block_size"].notna()], "scope", "sparsity")
    rows = rows.assign(variant=_variants(rows))
    times = rows.groupby(["variant", "compile"])[["value", "low", "high"]].median()
    speed = rows["batch_size"].iloc[0] / times
    best = speed["value"].groupby("variant").max().sort_values()
    order = [*(v for v in best.index if v != "dense"), *(["dense"] if "dense" in best else [])]
    blocks = rows.groupby("variant")["block_size"].first()
    modes = engines_of(rows)
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + (0.11 + 0.095 * len(modes)) * len(order)))
    entitle(figure, f"{model_setting(rows)}: every way to run it", measured_on(rows), named_backends(rows["backend"]))
    for place, variant in enumerate(order):
        colour = None if variant == "dense" else block_style(blocks[variant])["color"]
        ways = speed.loc[variant]
        offsets = spread([mode for mode in modes if mode in ways.index], min(0.56, 0.14 * len(ways)))
        for mode, cell in ways.iterrows():
            y = place + offsets[mode]
            style = {**engine_style(mode), **({"color": colour} if colour else {})}
            if cell["low"] == cell["low"]:  # the slow end of the times is the low end of the speed
                axes.hlines(y, cell["high"], cell["low"], color=style["color"], linewidth=1, zorder=2)
            axes.plot(cell["value"], y, markersize=4.5, zorder=3, **style)
            right = np.nanmax([cell["value"], cell["low"]])
            axes.annotate(
                three_digits(cell["value"]), (right, y), xytext=(5, 0), textcoords="offset points", va="center",
                fontsize=6.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )  # fmt: skip
    if "dense" in best:
        axes.axvline(best["dense"], color=DENSE, linestyle="--", linewidth=0.9, zorder=1, label="fastest dense")
    axes.set_yticks(range(len(order)), order)
    axes.set(
        xlabel="images a second", xlim=(0, 1.1 * np.nanmax(speed[["value", "low"]])), ylim=(-0.55, len(order) - 0.45)
    )  # fmt: skip
    axes.set_ylabel("backend, block size")
    axes.tick_params(axis="y", labelsize=7.5)
    for mode in modes:
        axes.plot([], [], linestyle="none", label=engine_title(mode), **engine_style(mode))
    legend(figure)
    return figure


def memory(rows: pd.DataFrame) -> Figure:
    """Model bytes and, on a GPU, peak memory of one forward pass, dense and by backend and block size, in MB.

    Block sizes of a backend that take the same, to three digits, are one bar. On a CPU the peak is left out: that of
    one dense model differs up to twofold from group to group.

    Args:
        rows: those with metric ``model_bytes`` or ``peak_memory`` (bytes) are drawn; of one model, batch size and
            precision, the sparse ones of one scope and sparsity (2:4 besides them).
    """
    rows = require(rows[rows["metric"].isin(("model_bytes", "peak_memory"))], "memory")
    one_of(rows, "model", "precision", "batch_size")
    one_of(rows[rows["block_size"].notna()], "scope", "sparsity")
    rows = rows.assign(variant=_variants(rows))
    titles = {"model_bytes": "weights held", "peak_memory": "peak of one forward pass, beyond the weights"}
    if rows["threads"].notna().any():  # a CPU
        titles.pop("peak_memory")
    named = rows.drop_duplicates("variant").sort_values(["backend", "block_size"], na_position="first")
    named = named.sort_values("backend", key=lambda backend: backend != "dense", kind="stable").set_index("variant")
    held = rows.groupby(["metric", "variant"])["value"].median().unstack("metric").reindex(named.index, columns=titles)
    told = (held / 1e6).map(lambda value: "" if np.isnan(value) else three_digits(value))
    bars = [bar for _, bar in named.groupby([named["backend"], *(told[metric] for metric in titles)], sort=False)]
    first = [bar.index[0] for bar in bars]
    starts = named.loc[first, "backend"].ne(named.loc[first, "backend"].shift())
    places = np.arange(len(bars)) + 0.6 * (starts.cumsum().to_numpy() - 1)  # a gap between two backends
    height = max(1.8, 1.2 + 0.16 * (places[-1] + 1))
    figure, panels = plt.subplots(1, len(titles), figsize=(WIDTH, height), sharey=True, squeeze=False)
    panels = panels[0]
    entitle(figure, f"{model_setting(rows)}: memory it takes", measured_on(rows), named_backends(named["backend"]))
    colours = [_bar_colour(bar) for bar in bars]
    hollow = named.loc[first].index.isin(without_blocks(named).index)
    fills = ["white" if empty else colour for empty, colour in zip(hollow, colours, strict=True)]
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        cell = held.loc[first, metric] / 1e6
        drawn = axes.barh(places, cell, color=fills, edgecolor=colours, linewidth=0.8, height=0.8)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axes.bar_label(drawn, told.loc[first, metric], fontsize=6.5, padding=2, bbox=box)
        if "dense" in cell and cell["dense"] == cell["dense"]:
            axes.axvline(cell["dense"], color=DENSE, linewidth=0.8, linestyle="--", zorder=0.5)
        axes.set(xlabel="MB", xlim=(0, 1.14 * (cell.max() if cell.notna().any() else 1)))
        axes.set_title(title, fontsize=8)
        axes.grid(False, axis="y")
    panels[0].set_yticks(places, [", ".join([bar.index[0], *map(_square, bar["block_size"][1:])]) for bar in bars])
    panels[0].tick_params(axis="y", labelsize=7)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("backend, block size" if len(bars) > 6 else "")
    return figure


def _bar_colour(rows: pd.DataFrame) -> object:
    """That of the block size; of several or none, one that no block size has."""
    if rows["block_size"].isna().any():
        return DENSE
    return ACCENT if len(rows) > 1 else COLOURS[int(rows["block_size"].iloc[0])]


def conversion(sizes: Mapping[str, float], seconds: Mapping[str, float], rows: pd.DataFrame | None = None) -> Figure:
    """Bytes of each form of the model, and seconds to convert it once and to load it again.

    Args:
        sizes: bytes by form; what has "dense" in its name is grey.
        seconds: by step, likewise.
        rows: those that the numbers are from, of one model, for the title.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    of = "A model" if rows is None else model_setting(rows)
    entitle(figure, f"{of}: converted once to blocks", "" if rows is None else measured_on(rows))
    for axes, values, unit, scale in ((left, sizes, "MB", 1e6), (right, seconds, "s", 1.0)):
        names = list(values)
        heights = [values[n] / scale for n in names]
        colours = [DENSE if "dense" in name else ACCENT for name in names]
        bars = axes.barh(names, heights, color=colours, height=0.6)
        axes.bar_label(bars, fmt=three_digits, padding=3, fontsize=8)
        axes.set(xlabel=unit, xlim=(0, max(heights) * 1.18))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    left.set_title("size")
    right.set_title("time")
    return figure


def _whole_models(rows: pd.DataFrame) -> str:
    """What rows of several scopes, sparsities and blocks share: model, batch and precision."""
    return model_setting(rows.assign(block_size=np.nan))


def _variants(rows: pd.DataFrame) -> list[str]:
    """Backend and block size of each row, as a label."""
    return [
        backend if np.isnan(block) else f"{backend} {_square(block)}"
        for backend, block in zip(rows["backend"], rows["block_size"].astype(float), strict=True)
    ]


def _square(block: float) -> str:
    return f"{block:.0f}×{block:.0f}"
