"""Notebook 5: what sparsity costs in accuracy, whether learnt masks help, and what speed there is for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from .. import losses
from .rows import AT


def accuracy(
    lost: pd.DataFrame, compared: pd.DataFrame, points: pd.DataFrame, *, setting: str, batch_size: int, missing: bool
) -> str:
    """What the speed costs in accuracy: a line, and a Markdown list of what it rests on.

    Args:
        lost: cells of ``losses.points_lost``, of one model and recipe, by the reference method.
        compared: those of one block size and sparsity, variants included; may be empty.
        points: cells with a speed, as ``with_speed`` gives them; may be empty.
        setting: what was trained, see ``losses.setting``.
        batch_size: at which the speed was measured.
        missing: whether some of the trainings are not measured yet.
    """
    told = {"Accuracy": accuracy_lost(lost), "Do learnt masks help?": learning(compared)}
    told["Speed"] = trade_text(points, batch_size)
    if missing:
        told["Accuracy"] += " Parts of this profile's trainings are not measured yet; they are named above."
    items = [f"- **{title}{'' if title.endswith('?') else '.'}** {text}" for title, text in told.items() if text]
    return "\n".join([f"{_cost(lost, points, setting)}", "", *items])


def _cost(lost: pd.DataFrame, points: pd.DataFrame, setting: str, sparsity: float = AT) -> str:
    """The answer in a line: what was lost at ``sparsity``, and what speed was had for little."""
    at = lost[lost["sparsity"] == sparsity]["lost"]
    if at.empty:
        return f"{setting}: not known; no masked model at {sparsity:.0%} has a dense one to be compared with."
    text = f"{setting}: at {sparsity:.0%} sparsity at most {max(at.max(), 0):.1f} points of top-1 are lost"
    for top in losses.surely_fastest(points).itertuples():
        text += (
            f"; of the models that lost less than {losses.CHEAP:g} points the surely fastest (highest low end of the "
            f"spread) is {top.speedup:.2f}× as fast as eager dense PyTorch"
        )
    return f"{text}."


def accuracy_lost(lost: pd.DataFrame) -> str:
    """What was lost by sparsity, and beside the published losses."""
    if lost.empty:
        return "No masked model has a dense one to be compared with in the tables."
    dense, worst = lost["dense_top1"].iloc[0], lost.groupby("sparsity")["lost"].max()
    text = f"Dense {dense:.1f}%. Most points lost by sparsity, over block sizes (mean of seeds): "
    text += ", ".join(f"{points:.1f} at {s:.0%}" for s, points in worst.items()) + "."
    beside = losses.beside_published(lost)
    if len(beside):
        cells = [
            f"{row.lost:.1f} where {row.published:.2g} are published ({row.block_size:.0f}×{row.block_size:.0f}, "
            f"{row.sparsity:.0%})"
            for row in beside.itertuples()
        ]
        text += f" For scale, beside the published losses on ImageNet: {', '.join(cells)}."
    return text


def learning(compared: pd.DataFrame) -> str:
    """What other ways to train the masks lost, and whether learning them helps; empty without any.

    ``compared`` are cells of ``losses.points_lost`` of one block size and sparsity.
    """
    if compared.empty:
        return ""
    text, tuned = "", compared["variant"].str.contains(losses.STARTED)
    others, base = compared[(compared["variant"] != "") & ~tuned], losses.reference(compared)
    if len(others) and len(base):
        best, learnt = others.loc[others["lost"].idxmin()], base.iloc[0]
        who = "the other" if len(others) == 1 else f"the best of {len(others)} others"
        text = (
            f"At {best['sparsity']:.0%} in blocks of {best['block_size']:.0f} the reference method lost "
            f"{learnt['lost']:.1f} points, {who} {_change(best['lost'])} "
            f"({best['variant']}){_apart(*losses.difference(best, learnt))}."
        )
        text += _learning_text(learnt, others[others["variant"] == losses.FROZEN])
    return (text + _tuned_text(compared[tuned])).strip()


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


def trade_text(points: pd.DataFrame, batch_size: int, most: float = losses.CHEAP) -> str:
    """The speed to be had for less than ``most`` points, of ``points`` with ``lost`` and a speedup with its spread."""
    fastest = losses.surely_fastest(points, most)
    if fastest.empty:
        return f"No masked model whose speed was measured lost less than {most:g} points." if len(points) else ""
    top = fastest.iloc[0]
    spread = f"{top['speedup_low']:.2f}× to {top['speedup_high']:.2f}×"
    told = (
        f"With less than {most:g} points lost, this model at batch {batch_size} is {top['speedup']:.2f}× as fast as "
        f"eager dense PyTorch (spread {spread}; `{top['backend']}`, blocks of {top['block_size']:.0f}, "
        f"{top['sparsity']:.0%})"
    )
    return f"{told}: no faster, its layers are too short to repay the gathering." if top["speedup"] <= 1 else f"{told}."


def missing_variants(
    trained: pd.DataFrame, variants: Iterable[Mapping[str, Any]], seeds: Iterable[int]
) -> dict[int, list[str]]:
    """Which of the variants of a notebook's profile were not trained, by seed; see ``losses.described``.

    ``trained`` are rows of ``losses.top1``, of one block size and sparsity.
    """
    names = [losses.described("", {}, variant).partition("+ ")[2] for variant in variants]
    there = set(trained[["seed", "variant"]].itertuples(index=False, name=None))
    found = {seed: [name for name in names if (seed, name) not in there] for seed in seeds}
    return {seed: lacking for seed, lacking in found.items() if lacking}
