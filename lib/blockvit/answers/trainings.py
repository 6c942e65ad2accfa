"""Notebook 1: whether masked models learn, what their masks became, and what a step costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .. import losses
from .rows import AT

NO_THIRD_SPLIT = (
    "There is no third split: the recipe was chosen on the same test images, so these accuracies compare models; "
    "they are no estimate for new digits."
)


_ACTS_WITH = {
    "lr_warmup_decay": "lr_warmup_epochs",
    "ra_magnitude": "auto_augment",
    "ra_reps": "ra_sampler",
    "model_ema_steps": "model_ema",
    "model_ema_decay": "model_ema",
    "amp_dtype": "amp",
    "sparsity_start": "sparsity_schedule",
    "sparsity_end": "sparsity_schedule",
    "sparse_weight_grad": "sparse_steps",
    "distillation_tau": "distillation_alpha",
}
_OFF = (None, False, 0, "constant")


def recipe_in_force(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``train.Recipe`` that act: without what is off, and what only that would use.

    A decay of 0 acts, where it stands for a group of weights beside ``weight_decay``. The seed is each training's own.
    """

    def acts(name: str, value: Any) -> bool:
        if name == "seed" or (name in _ACTS_WITH and recipe[_ACTS_WITH[name]] in _OFF):
            return False
        return value is not None if name.endswith("_decay") else value not in _OFF

    return {name: value for name, value in recipe.items() if acts(name, value)}


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
    few = dense.mean() - left.min() <= losses.LIMITED_LOSS
    learns = (
        f"{'Yes' if few else 'In part'}, on {dataset}, where at most {losses.LIMITED_LOSS:g} points lost count as yes"
    )
    best, worst = (f"{int(block)}×{int(block)}" for block in (left.idxmax(), left.idxmin()))
    lowest = masked.loc[masked["value"].idxmin()]
    block = f"{lowest['block_size']:.0f}×{lowest['block_size']:.0f}"
    return (
        f"{learns}: {told}; with {sparsity:.0%} of the masked layers' blocks gone accuracy was {left.max():.1f}% in "
        f"blocks of {best} and {left.min():.1f}% in blocks of {worst}. The lowest of all trainings is "
        f"{lowest['value']:.1f}%, in blocks of {block} at {lowest['sparsity']:.0%}."
    )


def short_names(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks of a ViT by shorter names of its layers: ``layer 0 mlp.0``, ``layer 0 out_proj``, ``heads head``."""

    def short(name: str) -> str:
        name = name.replace("encoder.layers.encoder_layer_", "layer ").replace("self_attention.", "")
        return name.replace(".", " ", 1)

    return {short(name): mask for name, mask in masks.items()}


def kept_by_row(initial: Mapping[str, np.ndarray], learnt: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """The share of blocks ``kept`` in each row of each ``layer``, ``mask`` being ``before training`` or ``learnt``.

    Both are boolean arrays ``(rows, columns)`` by layer.
    """
    rows = [
        {"layer": layer, "mask": when, "kept": share}
        for when, masks in (("before training", initial), ("learnt", learnt))
        for layer, mask in masks.items()
        for share in mask.mean(axis=1)
    ]
    return pd.DataFrame(rows, columns=["layer", "mask", "kept"])


def masks_text(
    initial: Mapping[str, np.ndarray], learnt: Mapping[str, np.ndarray], block_size: int, sparsity: float
) -> str:
    """How far training moved the masks of a model, boolean arrays by layer; empty without any."""
    if not learnt:
        return ""
    same = sum(int((initial[n] & learnt[n]).sum()) for n in learnt) / sum(int(mask.sum()) for mask in learnt.values())
    spread = kept_by_row(initial, learnt).groupby(["mask", "layer"])["kept"].std().groupby("mask").mean()
    before, after = spread["before training"], spread["learnt"]
    changed = "a less even share of blocks than" if after > before else "a more even share of blocks than"
    uneven = "as uneven a share of blocks as" if abs(after - before) <= 0.1 * before else changed
    return (
        f"At {sparsity:.0%} in blocks of {block_size}×{block_size}, training changed {1 - same:.0%} of a random mask; "
        f"rows keep {uneven} before (standard deviation {after:.3f}, before {before:.3f})."
    )


def step_text(overheads: pd.DataFrame, step_model: str) -> str:
    """How a masked step compares with the dense one at the most and the fewest tokens or images; empty without any."""
    size, unit = ("tokens", "tokens") if overheads["tokens"].notna().all() else ("batch_size", "images")
    cost = overheads.groupby(["backend", size])["overhead"].median()
    ways = {name: line.droplevel("backend").sort_index() for name, line in cost.groupby("backend")}
    if "supermask" not in ways:
        return ""
    few, many = ways["supermask"].index[[0, -1]]

    def at(count: float, backend: str) -> str:
        cell = overheads[(overheads["backend"] == backend) & (overheads[size] == count)]
        low, high = (f"{round(100 * value)}%" for value in (cell["overhead"].min(), cell["overhead"].max()))
        spread = f"{cell['overhead_low'].min():+.0%} to {cell['overhead_high'].max():+.0%}"
        return f"{low} ({spread})" if low == high else f"{low} to {high} ({spread})"

    text = (
        f"A masked training step of {step_model} takes longer than the dense one by {at(many, 'supermask')} at "
        f"{many:.0f} {unit} and by {at(few, 'supermask')} at {few:.0f}, by block size (in brackets, what the spread of "
        "the timings allows)"
    )
    if "naive" in ways:
        text += f"; with masks that are expanded first, by {at(many, 'naive')} and {at(few, 'naive')}"
    through = [name for name in ("sparse", "sparse-kept") if name in ways]
    if through:
        most = " and ".join(f"{1 / (1 + ways[name][many]):.1f}× (`{name}`)" for name in through)
        fewest = " and ".join(f"{1 / (1 + ways[name][few]):.1f}×" for name in through)
        text += (
            f". Through block-sparse products a step was {most} as fast as the dense one at {many:.0f} {unit}, "
            f"{fewest} at {few:.0f}"
        )
    return f"{text}."
