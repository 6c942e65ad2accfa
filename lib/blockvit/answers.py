"""What the tables say, in sentences and small tables: the notebooks' answers, computed. No torch, no drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from .limits import amdahl
from .losses import TITLES
from .results import break_even

AT = 0.9
"""The sparsity at which the post states its speedups."""


NO_THIRD_SPLIT = (
    "There is no third split: the recipe was chosen on the same test pictures, so these accuracies compare models; "
    "they are no estimate for new digits."
)


def training(
    top1: pd.DataFrame, masks: str, overheads: pd.DataFrame, *, dataset: str, model: str, step_model: str
) -> str:
    """What training showed: accuracy, masks, and what a step costs.

    Args:
        top1: accuracies in percent of the dense and the masked models, as ``losses.top1`` gives them.
        masks: what ``masks_text`` says of them; may be empty.
        overheads: of training steps, as ``results.step_overheads`` gives them; may be empty.
        dataset: its label.
        model: what was trained.
        step_model: whose steps were timed.
    """
    told = [accuracy_text(top1, TITLES.get(dataset, dataset), model), masks, step_text(overheads, step_model)]
    return " ".join(part for part in [*told, NO_THIRD_SPLIT if dataset == "digits" else ""] if part)


def accuracy_text(top1: pd.DataFrame, dataset: str, model: str, sparsity: float = AT) -> str:
    """The dense accuracy, and the best and the worst block size's at ``sparsity``, each the mean over its seeds."""
    dense = top1[top1["backend"] == "dense"]["value"]
    masked = top1[(top1["backend"] == "supermask") & (top1["sparsity"] == sparsity)]
    left = masked.groupby("block_size")["value"].mean()
    text = "No dense model is trained to its end yet."
    if len(dense):
        text = (
            f"On {dataset}, the dense {model} reached {dense.mean():.1f}% (mean of {len(dense)} "
            f"seed{'s' * (len(dense) > 1)}, lowest {dense.min():.1f}%)."
        )
    if len(left):
        best, worst = (f"{int(block)}×{int(block)}" for block in (left.idxmax(), left.idxmin()))
        text += (
            f" With {sparsity:.0%} of the blocks gone, {left.max():.1f}% was left in blocks of {best} and "
            f"{left.min():.1f}% in blocks of {worst}."
        )
    return text


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
        f"varies between rows by {spread['learnt']:.3f} (standard deviation, mean of the layers), "
        f"{spread['before training']:.3f} before training."
    )


def step_text(overheads: pd.DataFrame, step_model: str) -> str:
    """How much longer a masked step takes at the most and the fewest tokens or images; empty without masked steps."""
    size, unit = ("tokens", "tokens") if overheads["tokens"].notna().all() else ("batch_size", "images")
    cost = overheads.groupby(["backend", size])["overhead"].median()
    ways = {name: line.droplevel("backend").sort_index() for name, line in cost.groupby("backend")}
    if "supermask" not in ways:
        return ""
    ours, naive = ways["supermask"], ways.get("naive")
    few, many = ours.index[0], ours.index[-1]
    text = (
        f"A masked training step of {step_model} took {ours[many]:.1%} longer than the dense one at {many:.0f} {unit} "
        f"and {ours[few]:.1%} at {few:.0f} (median of the block sizes)"
    )
    if naive is not None:
        text += f"; masks that are expanded first, {naive.iloc[-1]:.1%} and {naive.iloc[0]:.1%}"
    through = [f"{1 / (1 + ways[n].iloc[-1]):.1f}× (`{n}`)" for n in ("sparse", "sparse-kept") if n in ways]
    if through:
        told = ", ".join(through)
        text += f". Through block-sparse products a step was {told} as fast as the dense one at {many:.0f} {unit}"
    return f"{text}."


def break_even_text(speedups: pd.DataFrame, *, log: bool = False) -> str:
    """Break-even sparsity by block size: ``16: 86%, 32: never, 64: at 50% or below``; empty without a sweep.

    The speedup at a sparsity is the median over the rows that have it; ``log`` as in ``results.break_even``, so that
    text and figure agree. Rows of several token counts or batch sizes raise ``ValueError``: their break-evens differ.
    """
    for column in ("tokens", "batch_size"):
        if column in speedups and len(found := sorted(speedups[column].dropna().unique())) > 1:
            held = ", ".join(f"{value:.0f}" for value in found)
            raise ValueError(f"break-even of one {column} at a time, but the rows hold {held}; choose one")
    texts = []
    for block, cell in speedups.groupby("block_size"):
        line = cell.groupby("sparsity")["speedup"].median()
        if len(line) < 2:
            continue
        edge = break_even(list(line.index), list(line), log=log)
        below = edge is not None and edge <= line.index.min()
        text = "never" if edge is None else f"at {edge:.0%} or below" if below else f"{edge:.0%}"
        texts.append(f"{block:.0f}: {text}")
    return ", ".join(texts)


def linear_lines(speedups: pd.DataFrame, sparsity: float = AT) -> Iterator[str]:
    """A Markdown line for each backend of ``speedups``, whose rows are linear layers of one precision."""
    for backend, mine in speedups.groupby("backend"):
        at = mine[mine["sparsity"] == sparsity]["speedup"]
        line = f"- `{backend}`: {(mine['speedup'] > 1).sum()} of {len(mine)} cells are faster than dense"
        if len(at):
            line += f"; at {sparsity:.0%} the median speedup is {at.median():.2f}× ({at.min():.2f}× to {at.max():.2f}×)"
        edges = break_even_text(mine, log=True)
        yield line + (f". Break-even sparsity of the median layer by block size: {edges}." if edges else ".")


def model_lines(speedups: pd.DataFrame, shares: Mapping[str, float], sparsity: float = AT) -> Iterator[str]:
    """A Markdown line for each backend and scope of ``speedups``: one model, one batch size, one precision.

    Args:
        speedups: may hold several ways to run a backend; the fastest of a cell counts.
        shares: for each scope, the share of the model's arithmetic that it holds.
        sparsity: at which the best speedup is told.
    """
    cell = ["backend", "scope", "block_size", "sparsity"]
    fastest = speedups.sort_values("speedup").drop_duplicates(cell, keep="last")
    for (backend, scope), mine in fastest.groupby(["backend", "scope"]):
        at = mine[mine["sparsity"] == sparsity].sort_values("speedup")
        if at.empty:
            continue
        top, edges = at.iloc[-1], break_even_text(mine)
        yield (
            f"- `{backend}`, {scope}: at {sparsity:.0%} at best {top['speedup']:.2f}× (20% to 80%: "
            f"{top['speedup_low']:.2f}× to {top['speedup_high']:.2f}×) with blocks of {top['block_size']:.0f}"
            f"{'' if top['compile'] == 'eager' else ', ' + top['compile']}; "
            f"by Amdahl's law, all arithmetic at one rate, {amdahl(sparsity, shares[scope]):.2f}×."
            + (f" Break-even sparsity by block size: {edges}." if edges else "")
        )


def model_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Latency (ms), images a second, weights and peak memory (MB) of each variant of one model, fastest first.

    ``rows`` are of one batch size, precision, scope, block size and sparsity, dense ones among them.
    """
    latency = rows[rows["metric"] == "latency"].set_index(["backend", "compile"])
    table = pd.DataFrame(
        {
            "ms": latency["value"] * 1e3,
            "20%": latency["low"] * 1e3,
            "80%": latency["high"] * 1e3,
            "images/s": latency["batch_size"] / latency["value"],
        }
    )
    for column, metric in {"weights MB": "model_bytes", "peak MB": "peak_memory"}.items():
        held = rows[rows["metric"] == metric].set_index(["backend", "compile"])["value"] / 1e6
        table[column] = held.reindex(table.index)
    return table.sort_values("ms").dropna(axis="columns", how="all").round(2)


def batch_line(speedups: pd.DataFrame) -> str:
    """The best speedup of each batch size and what reached it: ``0.81× (1, torch), 1.10× (16, torch_tuned)``."""
    best = speedups.sort_values("speedup").drop_duplicates("batch_size", keep="last").sort_values("batch_size")
    return ", ".join(f"{row.speedup:.2f}× ({row.batch_size:.0f}, {row.backend})" for row in best.itertuples())
