"""What the tables say, in sentences and small tables: the notebooks' answers, computed. No torch, no drawing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from . import losses
from .comparisons import break_even, fastest_of_each
from .limits import amdahl

AT = 0.9
"""The sparsity at which the post states its speedups."""


NO_THIRD_SPLIT = (
    "There is no third split: the recipe was chosen on the same test images, so these accuracies compare models; "
    "they are no estimate for new digits."
)


def training(
    top1: pd.DataFrame, masks: str, overheads: pd.DataFrame, *, dataset: str, model: str, step_model: str
) -> str:
    """What training showed, as a Markdown list: accuracy, masks, and what a step costs.

    Args:
        top1: accuracies in percent of the dense and the masked models, as ``losses.top1`` gives them.
        masks: what ``masks_text`` says of them; may be empty.
        overheads: of training steps, as ``comparisons.step_overheads`` gives them; may be empty.
        dataset: its label.
        model: what was trained.
        step_model: whose steps were timed.
    """
    told = [accuracy_text(top1, losses.TITLES.get(dataset, dataset), model), masks, step_text(overheads, step_model)]
    return "\n".join(f"- {part}" for part in [*told, NO_THIRD_SPLIT if dataset == "digits" else ""] if part)


def accuracy_text(top1: pd.DataFrame, dataset: str, model: str, sparsity: float = AT) -> str:
    """The dense accuracy, the best and the worst block size's at ``sparsity`` (means over seeds), and the lowest."""
    dense = top1[top1["backend"] == "dense"]["value"]
    masked = top1[top1["backend"] == "supermask"]
    left = masked[masked["sparsity"] == sparsity].groupby("block_size")["value"].mean()
    if dense.empty:
        return "No dense model is trained to its end yet."
    told = (
        f"the dense {model} reached {dense.mean():.1f}% (mean of {len(dense)} seed{'s' * (len(dense) > 1)}, lowest "
        f"{dense.min():.1f}%)"
    )
    if left.empty:
        return f"On {dataset}, {told}; no masked model is trained to {sparsity:.0%} yet."
    learns = "Yes" if dense.mean() - left.min() <= losses.LIMITED_LOSS else "In part"
    best, worst = (f"{int(block)}×{int(block)}" for block in (left.idxmax(), left.idxmin()))
    lowest = masked.loc[masked["value"].idxmin()]
    block = f"{lowest['block_size']:.0f}×{lowest['block_size']:.0f}"
    return (
        f"{learns}, on {dataset}: {told}; with {sparsity:.0%} of the masked layers' blocks gone accuracy was "
        f"{left.max():.1f}% in blocks of {best} and {left.min():.1f}% in blocks of {worst}. The lowest of all "
        f"trainings is {lowest['value']:.1f}%, in blocks of {block} at {lowest['sparsity']:.0%}."
    )


def masks_text(
    initial: Mapping[str, Any], learnt: Mapping[str, Any], kept: pd.DataFrame, block_size: int, sparsity: float
) -> str:
    """How far training moved the masks of a model, boolean arrays by layer; empty without any.

    ``kept`` is the share of blocks ``kept`` in each row of each ``layer``, ``mask`` being ``"before training"`` or
    ``"learnt"``.
    """
    if not learnt:
        return ""
    same = sum(int((initial[n] & learnt[n]).sum()) for n in learnt) / sum(int(mask.sum()) for mask in learnt.values())
    spread = kept.groupby(["mask", "layer"])["kept"].std().groupby("mask").mean()
    return (
        f"At {sparsity:.0%} in blocks of {block_size}×{block_size}, training exchanged {1 - same:.0%} of the blocks "
        f"that a random mask had kept; {same:.0%} of the learnt mask is still the random one. The share of blocks kept "
        f"varies between rows by {spread['learnt']:.3f} (standard deviation, mean of the layers), before training by "
        f"{spread['before training']:.3f}."
    )


def step_text(overheads: pd.DataFrame, step_model: str) -> str:
    """How much longer a masked step takes at the most and the fewest tokens or images; empty without masked steps."""
    size, unit = ("tokens", "tokens") if overheads["tokens"].notna().all() else ("batch_size", "images")
    cost = overheads.groupby(["backend", size])["overhead"].median()
    ways = {name: line.droplevel("backend").sort_index() for name, line in cost.groupby("backend")}
    if "supermask" not in ways:
        return ""
    few, many = ways["supermask"].index[[0, -1]]

    def at(count: float, backend: str) -> str:
        cell = overheads[(overheads["backend"] == backend) & (overheads[size] == count)]
        spread = f"{cell['overhead_low'].min():+.0%} to {cell['overhead_high'].max():+.0%}"
        return f"{ways[backend][count]:.1%} ({spread})"

    text = (
        f"A masked training step of {step_model} takes longer than the dense one by {at(many, 'supermask')} at "
        f"{many:.0f} {unit} and {at(few, 'supermask')} at {few:.0f} (median of the block sizes, and what the spread of "
        "the timings allows)"
    )
    if "naive" in ways:
        text += f"; with masks that are expanded first, by {at(many, 'naive')} and {at(few, 'naive')}"
    through = [f"{1 / (1 + ways[n].iloc[-1]):.1f}× (`{n}`)" for n in ("sparse", "sparse-kept") if n in ways]
    if through:
        told = ", ".join(through)
        text += f". Through block-sparse products a step was {told} as fast as the dense one at {many:.0f} {unit}"
    return f"{text}."


def break_evens(speedups: pd.DataFrame, *, log: bool = False) -> dict[int, str]:
    """Break-even sparsity by block size: ``{16: "86%", 32: "never", 64: "already at 50%"}``; none without a sweep.

    Of several layers or models it is the highest. ``log`` as in ``comparisons.break_even``: text and figure agree.
    Rows of several token counts or batch sizes raise ``ValueError``: their break-evens differ.
    """
    for column in ("tokens", "batch_size"):
        if column in speedups and len(found := sorted(speedups[column].dropna().unique())) > 1:
            held = ", ".join(f"{value:.0f}" for value in found)
            raise ValueError(f"break-even of one {column} at a time, but the rows hold {held}; choose one")
    texts = {}
    for block, cell in speedups.groupby("block_size"):
        lines = [line.groupby("sparsity")["speedup"].median() for _, line in cell.groupby("model")]
        edges = [break_even(list(line.index), list(line), log=log) for line in lines if len(line) > 1]
        if not edges:
            continue
        edge = None if None in edges else max(edges)
        already = "already at " if edge is not None and edge <= cell["sparsity"].min() else ""
        texts[int(block)] = "never" if edge is None else f"{already}{edge:.0%}"
    return texts


def break_even_text(speedups: pd.DataFrame, *, log: bool = False) -> str:
    """As ``break_evens``, in one line: ``16: 86%, 32: never, 64: already at 50%``."""
    return ", ".join(f"{block}: {text}" for block, text in break_evens(speedups, log=log).items())


def linear_summary(speedups: pd.DataFrame, sparsity: float = AT) -> pd.DataFrame:
    """What each backend of ``speedups`` reaches, whose rows are linear layers of one precision and token count.

    How many cells are faster than dense, the median and the range of the speedups at ``sparsity``, and the break-even
    sparsity of the worst layer for each block size.
    """
    lines = []
    for backend, mine in speedups.groupby("backend"):
        line = {"backend": backend, "cells faster": f"{(mine['speedup'] > 1).sum()} of {len(mine)}"}
        at = mine[mine["sparsity"] == sparsity]["speedup"]
        if len(at):
            line[f"median at {sparsity:.0%}"] = f"{at.median():.2f}×"
            line["least to most"] = f"{at.min():.2f}× to {at.max():.2f}×"
        lines.append(line | _break_even_columns(break_evens(mine, log=True)))
    return _table(lines, ["backend"])


def model_summary(speedups: pd.DataFrame, shares: Mapping[str, float], sparsity: float = AT) -> pd.DataFrame:
    """What each backend reaches with each scope of ``speedups``: one model, one batch size, one precision.

    The best speedup at ``sparsity``, what the spread of the timings leaves of it (``speedup_low`` to ``speedup_high``)
    and its block size, what Amdahl's law gives if all arithmetic runs at one rate, and the break-even sparsity for each
    block size.

    Args:
        speedups: may hold several ways to run a backend; the fastest of a cell counts.
        shares: for each scope, the share of the model's arithmetic that it holds.
        sparsity: at which the best speedup is told.
    """
    lines = []
    cells = fastest_of_each(speedups, ["backend", "scope", "block_size", "sparsity"])
    for (scope, backend), mine in cells.groupby(["scope", "backend"]):
        at = mine[mine["sparsity"] == sparsity].sort_values("speedup")
        if at.empty:
            continue
        top = at.iloc[-1]
        line = {
            "sparse layers": scope,
            "backend": backend,
            f"best at {sparsity:.0%}": f"{top['speedup']:.2f}×",
            "spread": f"{top['speedup_low']:.2f}× to {top['speedup_high']:.2f}×",
            "with": f"blocks of {top['block_size']:.0f}" + (f", {top['compile']}" if top["compile"] != "eager" else ""),
            "Amdahl's law": f"{amdahl(sparsity, shares[scope]):.2f}×",
        }
        lines.append(line | _break_even_columns(break_evens(mine)))
    return _table(lines, ["sparse layers", "backend"])


def _break_even_columns(edges: Mapping[int, str]) -> dict[str, str]:
    return {f"break-even, {block}×{block}": text for block, text in edges.items()}


def _table(lines: list[dict[str, str]], index: list[str]) -> pd.DataFrame:
    """A row for each of ``lines``; what one does not have stays empty."""
    return pd.DataFrame(lines, columns=None if lines else index).fillna("").set_index(index)


def model_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Latency (ms), images a second, weights and peak memory (MB) of each variant of one model, fastest first.

    ``rows`` are of one batch size, precision, scope, block size and sparsity, dense ones among them.
    """
    latency = rows[rows["metric"] == "latency"].set_index(["backend", "compile"])
    table = pd.DataFrame(
        {
            "ms": latency["value"] * 1e3,
            "20th percentile": latency["low"] * 1e3,
            "80th percentile": latency["high"] * 1e3,
            "images/s": latency["batch_size"] / latency["value"],
        }
    )
    for column, metric in {"weights MB": "model_bytes", "peak MB": "peak_memory"}.items():
        held = rows[rows["metric"] == metric].set_index(["backend", "compile"])["value"] / 1e6
        table[column] = held.reindex(table.index)
    table = table.sort_values("ms").dropna(axis="columns", how="all").round(2)
    return table.astype(object).where(table.notna(), "")  # engines do not tell what they hold


def batch_line(speedups: pd.DataFrame) -> str:
    """The best speedup of each batch size and what reached it: ``0.81× (1, torch), 1.10× (16, torch_tuned)``."""
    best = fastest_of_each(speedups, ["batch_size"]).sort_values("batch_size")
    return ", ".join(f"{row.speedup:.2f}× ({row.batch_size:.0f}, {row.backend})" for row in best.itertuples())


def trade_text(points: pd.DataFrame, batch_size: int, most: float = 2.0) -> str:
    """The speed to be had for less than ``most`` points, of ``points`` with ``lost`` and a speedup with its spread.

    The one that is surely fastest: the highest low end of the spread, for the highest median is the luckiest one.
    """
    cheap = points[points["lost"] < most]
    if cheap.empty:
        return f"No masked model whose speed was measured lost less than {most:g} points." if len(points) else ""
    top = cheap.loc[cheap["speedup_low"].idxmax()]
    spread = f"{top['speedup_low']:.2f}× to {top['speedup_high']:.2f}×"
    told = (
        f"With less than {most:g} points lost, this model at batch {batch_size} is {top['speedup']:.2f}× as fast as "
        f"eager dense PyTorch (spread {spread}; `{top['backend']}`, blocks of {top['block_size']:.0f}, "
        f"{top['sparsity']:.0%})"
    )
    return f"{told}: no faster, its layers are too short to repay the gathering." if top["speedup"] <= 1 else f"{told}."


def points_lost(lost: pd.DataFrame, compared: pd.DataFrame) -> str:
    """What was lost, as sentences.

    Args:
        lost: cells of ``losses.points_lost``, of one model and recipe, by the reference method.
        compared: those of one block size and sparsity, variants included; may be empty.
    """
    if lost.empty:
        return "no masked model has a dense one to be compared with in the tables."
    dense, worst = lost["dense_top1"].iloc[0], lost.groupby("sparsity")["lost"].max()
    text = f"dense {dense:.1f}%. Most points lost by sparsity, over block sizes (mean of seeds): "
    text += ", ".join(f"{points:.1f} at {s:.0%}" for s, points in worst.items()) + "."
    beside = losses.beside_published(lost)
    if len(beside):
        cells = [
            f"{row.lost:.1f} where {row.published:.2g} are published ({row.block_size:.0f}×{row.block_size:.0f}, "
            f"{row.sparsity:.0%})"
            for row in beside.itertuples()
        ]
        text += f" For scale, beside the published losses on ImageNet: {', '.join(cells)}."
    tuned = compared["variant"].str.contains(losses.STARTED)
    others, base = compared[(compared["variant"] != "") & ~tuned], losses.reference(compared)
    if len(others) and len(base):
        best, learnt = others.loc[others["lost"].idxmin()], base.iloc[0]
        who = "the other" if len(others) == 1 else f"the best of {len(others)} others"
        text += (
            f" At {best['sparsity']:.0%} in blocks of {best['block_size']:.0f} the reference method lost "
            f"{learnt['lost']:.1f} points, {who} {_change(best['lost'])} "
            f"({best['variant']}){_apart(*losses.difference(best, learnt))}."
        )
        text += _learning_text(learnt, others[others["variant"] == losses.FROZEN])
    return text + _tuned_text(compared[tuned])


def _tuned_text(tuned: pd.DataFrame) -> str:
    """What was lost by masks put on a trained dense model, of ``losses.points_lost``; empty without any."""
    if tuned.empty:
        return ""
    best = tuned.loc[tuned["lost"].idxmin()]
    how = " ".join(pair for pair in best["variant"].split() if pair != losses.STARTED)
    error = losses.uncertainty(tuned.loc[[best.name]]).iloc[0]
    return (
        f" Masks put on the trained dense model {_change(best['lost'])} at {best['sparsity']:.0%} in blocks of "
        f"{best['block_size']:.0f}, against that model trained on for as long ({best['dense_top1']:.1f}%)"
        + (f", the best of {len(tuned)} ways" if len(tuned) > 1 else "")
        + (f" ({how})" if how else "")
        + (f"; one standard error is {error:.1f} points." if error == error else ".")
    )


def _change(lost: float) -> str:
    return f"lost {lost:.1f}" if lost >= 0 else f"gained {-lost:.1f}"


def _error_text(error: float) -> str:
    return f"one standard error of the difference is {error:.1f} points"


def _apart(points: float, error: float) -> str:
    """What is behind a difference in prose: its standard error, and whether it is too small to count."""
    if error != error:
        return ""
    return ("; " if abs(points) > 2 * error else ", which does not tell the two apart: ") + _error_text(error)


def _learning_text(learnt: pd.Series, frozen: pd.DataFrame) -> str:
    """Whether masks that are learnt lose less than masks left as they were drawn; empty without any of these."""
    if frozen.empty:
        return ""
    gain, error = losses.difference(learnt, frozen.iloc[0])
    shown = "is shown" if gain > 2 * error else "is not shown"
    text = f" Masks left as they were drawn lost {frozen['lost'].iloc[0]:.1f}: that learning them helps {shown}"
    return text + (f" ({_error_text(error)})." if error == error else ".")
