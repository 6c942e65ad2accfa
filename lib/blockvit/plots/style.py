"""The look that all figures share: titles, what a block size and an engine look like, axes, legend, labels, saving.

A title in words stands at the upper left; below it, small and grey, where and how was measured. Block sizes differ by
colour, marker and dash, so that the figures read in grey and by colour-blind readers. Rows without a block size (2:4
sparsity) are drawn hollow and grey, published numbers hollow. What no kernel can beat is dashed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, Locator, NullLocator, PercentFormatter, ScalarFormatter
from matplotlib.transforms import Bbox, ScaledTranslation

from .rows import without_blocks

_BLOCKS = (8, 16, 32, 64, 128, 4, 256)
COLOURS = dict(zip(_BLOCKS, sns.color_palette("colorblind", len(_BLOCKS)), strict=True))
_MARKERS = dict(zip(_BLOCKS, "vosD^P*", strict=True))
_DASHES = dict(zip(_BLOCKS, ((1, 1), (5, 1.5), (), (3, 1, 1, 1), (7, 2, 2, 2), (2, 2), (9, 2)), strict=True))
DENSE = "0.35"
ACCENT, ACCENT_TOO = "#54278f", "#9e6fce"
"""Of what is ours but of no block size: a colour that no block size has, and a lighter one beside it."""

ENGINES = {
    "eager": ("o", "0.15"),
    "compile": ("D", "0.5"),
    "onnxruntime": ("v", "0.35"),
    "openvino": ("P", "0.6"),
    "max-autotune": ("s", "0.5"),
    "cudagraph": ("^", "0.35"),
}
"""Marker and grey of each way to run a model or layer, in the order of legends."""

NO_BLOCKS = "2:4, no blocks"
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
    figure.set_layout_engine("none")  # it is laid out; doing so again for each further format takes as long as drawing
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)  # the notebook shows the returned figure; left open, it would be shown twice
    return figure


_TITLE, _TOLD = 10, 7.5  # points


def entitle(figure: Figure, title: str, *told: str) -> None:
    """Say what is shown, at the upper left, and below it in small grey what else a reader has to know.

    Before anything that needs the layout, for both take room from the panels.

    Args:
        figure: whose.
        title: what is shown, in words; broken into lines that fit.
        told: where and how it was measured; what is empty is left out, and what is long broken likewise.
    """

    def fit(text: str, size: float) -> str:
        return textwrap.fill(text, int(figure.get_figwidth() * 72 / (0.53 * size)))

    title = fit(title, _TITLE)
    figure.suptitle(title, x=0.008, ha="left", fontsize=_TITLE, linespacing=1.1)
    if not (text := fit("; ".join(filter(None, told)), _TOLD)):
        return
    below = 3 + 1.15 * _TITLE * (1 + title.count("\n"))  # points
    place = figure.transFigure + ScaledTranslation(0, -below / 72, figure.dpi_scale_trans)
    figure.text(0.008, 1, text, transform=place, va="top", fontsize=_TOLD, color="0.45", linespacing=1.1)
    if engine := figure.get_layout_engine():
        lines = 0.25 + 1.15 * (1 + text.count("\n"))
        engine.set(rect=(0, 0, 1, 1 - lines * _TOLD / 72 / figure.get_figheight()))


def engines_of(rows: pd.DataFrame) -> list[str]:
    """The ways to run (``compile``) that rows hold, in the order of legends."""
    present = set(rows["compile"].dropna())
    return [*(engine for engine in ENGINES if engine in present), *sorted(present - set(ENGINES))]


def engine_style(engine: str) -> dict[str, object]:
    """Arguments of ``Axes.plot`` for a way to run a dense model or layer, the same in every figure."""
    marker, grey = ENGINES.get(engine, ("*", DENSE))
    return {"marker": marker, "color": grey}


def backend_style(backend: str) -> dict[str, object]:
    """Arguments of ``Axes.plot`` for a backend, where lines are not of block sizes."""
    second = "+" in backend
    return {"marker": ">" if second else "<", "color": ACCENT_TOO if second else ACCENT}


def block_style(block_size: float | None) -> dict[str, object]:
    """Arguments of ``Axes.plot`` for lines of a block size; None or NaN: of what is sparse without blocks."""
    if block_size is None or np.isnan(block_size):
        return {"color": "0.2", "marker": "X", "markerfacecolor": "white", "label": NO_BLOCKS, "linestyle": ":"}
    block = int(block_size)
    style = {"color": COLOURS[block], "marker": _MARKERS[block], "label": f"{block}×{block}"}
    return {**style, "dashes": _DASHES[block]} if _DASHES[block] else style


def draw_line(axes: Axes, x: Iterable[float], y: Iterable[float], block_size: float | None, **style: object) -> None:
    """A line or points in the style of a block size, which ``style`` changes."""
    style = {"markersize": 4.5, **block_style(block_size), **style}
    if style.get("linestyle") == "none":
        style.pop("dashes", None)  # they would be drawn in the legend all the same
    axes.plot(list(x), list(y), **style)


def draw_band(axes: Axes, x: Iterable[float], low: Iterable[float], high: Iterable[float], block: int | None) -> None:
    """A range around a line, in the colour of its block size."""
    axes.fill_between(list(x), list(low), list(high), color=block_style(block)["color"], alpha=0.15, lw=0)


def limit_line(axes: Axes, x: Iterable[float], y: Iterable[float], label: str) -> None:
    """What no kernel can beat, dashed."""
    axes.plot(list(x), list(y), color=DENSE, linestyle="--", linewidth=1, zorder=1.5, label=label)


def reference_line(axes: Axes, y: float = 1.0, label: str | None = None) -> None:
    """The height of dense, across the panel."""
    axes.axhline(y, color=DENSE, linewidth=1, zorder=1, label=label)


def published_point(axes: Axes, sparsity: float, value: float, block_size: float) -> None:
    """A published number, hollow; ``legend`` tells what it is."""
    hollow = {"markersize": 7, "markerfacecolor": "none", "linestyle": "none", "label": None}
    draw_line(axes, [sparsity], [value], block_size, **hollow)


def points_without_blocks(axes: Axes, rows: pd.DataFrame, y: str = "speedup") -> None:
    """A hollow point at the sparsity of each backend that is sparse without blocks."""
    line = without_blocks(rows).groupby("sparsity")[y].median()
    if len(line):
        draw_line(axes, line.index, line, None, linestyle="none", markersize=5.5)


def panel_grid(count: int, columns: int, height: float, **shared: object) -> tuple[Figure, list[Axes]]:
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


def shared_xlabel(panels: Sequence[Axes], text: str) -> None:
    """The label of the x axes, below each panel of the last row.

    Not ``Figure.supxlabel``, which a legend outside the panels would cover.
    """
    last = panels[-1].get_subplotspec().rowspan
    for axes in panels:
        if axes.get_subplotspec().rowspan == last:
            axes.set_xlabel(text)


def shared_ylabel(figure: Figure, text: str) -> None:
    """One label for the y axes of all panels, at their middle; to be written after the legend, which takes room."""
    figure.draw_without_rendering()
    heights = [axes.get_position() for axes in figure.axes]
    low, high = min(box.y0 for box in heights), max(box.y1 for box in heights)
    label = figure.supylabel(text, y=(low + high) / 2, fontsize="medium", ma="center")
    if label.get_window_extent().height > (high - low) * figure.bbox.height:
        label.set_text(textwrap.fill(text, 4 + math.ceil(len(text) / 2)))


def percent_axis(axes: Axes, sparsities: Iterable[float] | None = None) -> None:
    """Sparsities on the x axis, each of ``sparsities`` a tick."""
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    if sparsities is not None:
        ticks = sorted(set(sparsities))
        axes.set_xticks(ticks)
        gap = np.diff(ticks).min() / np.ptp(ticks) if len(ticks) > 1 else 1.0
        close = gap * axes.bbox.width / axes.figure.dpi < 0.24  # inches, into which "95%" would not fit
        axes.tick_params(axis="x", labelsize=7, rotation=90 if close else 0)


def as_times(value: float, _: object = None) -> str:
    """For linear axes: how many times as fast."""
    return f"{value:g}×"


def as_ratios(value: float, _: object = None) -> str:
    """For logarithmic axes to base 2: a quarter is as far from 1 as four, and should look it."""
    return f"{value:g}×" if value >= 1 else f"1/{1 / value:g}×"


class _Ratios(Locator):
    """1, which the others are read against, and powers of two, evenly spaced; if these are too few, finer ratios."""

    def __call__(self) -> list[float]:
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        low, high = math.ceil(math.log2(vmin)), math.floor(math.log2(vmax))
        step = max(1, math.ceil((high - low) / max(2, self.axis.get_tick_space())))
        ticks = [2.0**power for power in range(low, high + 1) if power % step == 0]
        for finer in (0.5, 0.2, 0.1, 0.05):
            if len(ticks) >= 3:
                break
            ratios = 1 + finer * np.arange(1 / finer + 1)
            ticks = [r for r in sorted({*ratios, *(1 / ratios)}) if vmin <= r <= vmax]
        return ticks


class _Rounds(Locator):
    """Round numbers, as few to a decade as give three in sight."""

    def __call__(self) -> list[float]:
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        decades = range(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
        for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), np.arange(1, 10, 0.5)):
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            if len(ticks := [tick for tick in ticks if vmin <= tick <= vmax]) >= 3:
                break
        return ticks


def speedup_axis(axes: Axes, which: str = "y") -> None:
    """Speedups on a logarithmic axis."""
    _log_axis(axes, which, _Ratios(), as_ratios)


def round_axis(axes: Axes, which: str = "y") -> None:
    """Times or rates on a logarithmic axis."""
    _log_axis(axes, which, _Rounds(), lambda value, _: f"{value:g}")


def _log_axis(axes: Axes, which: str, locator: Locator, formatter: Callable[[float, object], str]) -> None:
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(formatter))
    axis.set_minor_locator(NullLocator())


def sizes_axis(axes: Axes, sizes: Iterable[float]) -> None:
    """Batch or matrix sizes on a logarithmic x axis, each one a tick."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(sizes)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def three_digits(value: float) -> str:
    """A measured number, with its zeros: they were measured, too."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def spread(items: Sequence[object], width: float) -> dict[object, float]:
    """Offsets that set items side by side within ``width``, the first uppermost."""
    places = np.linspace(width / 2, -width / 2, len(items)) if len(items) > 1 else [0.0] * len(items)
    return dict(zip(items, places, strict=True))


def legend(figure: Figure, published: str | None = None) -> None:
    """One legend below all panels, with a hollow marker for ``published`` points if there are any."""
    entries: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    order = sorted(
        entries, key=lambda n: (0, int(n.split("×")[0])) if "×" in n else (1 if n == NO_BLOCKS else 2, 0)
    )  # fmt: skip
    handles, labels = [entries[label] for label in order], [f"blocks {n}" if "×" in n else n for n in order]
    if published:
        handles.append(Line2D([], [], marker="o", markersize=6, markerfacecolor="none", color=DENSE, linestyle="none"))
        labels.append(published)
    figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels, figure.get_figwidth()))


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many columns as fit into ``width`` inches, balanced: entries fill one column after the other."""
    for lines in range(1, len(labels) + 1):
        columns = [labels[i : i + lines] for i in range(0, len(labels), lines)]
        if sum(0.6 + 0.065 * max(map(len, column)) for column in columns) <= width - 0.3:  # handle, gap; letters
            return len(columns)
    return 1


def place_labels(
    axes: Axes, labels: Sequence[tuple[float, float, str, object]], obstacles: Sequence[tuple[float, float]]
) -> None:
    """Write each ``(x, y, text, colour)`` beside its point, at the place that overlaps least with points and labels."""
    figure, size = axes.figure, 6.5
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
            text, (x, y), xytext=best, textcoords="offset points", fontsize=size, color=colour, va="bottom", ha="left",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2, "alpha": 0.8},
        )  # fmt: skip
