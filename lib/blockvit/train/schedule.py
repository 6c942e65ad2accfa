"""What changes from step to step: the learning rate, and how much supermasks drop and how sharply."""

from __future__ import annotations

import math

from torch import nn

from ..supermask import cubic_sparsity, set_sharpness, set_sparsity, supermask_layers
from .recipe import Recipe

SHARPENED_AFTER = 0.8
"""Fraction of the training after which ``spartan``'s soft top-k is as sharp as it gets: as its authors have it."""


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run: linear warm-up, then a cosine to ``lr_min``."""
    warmup = recipe.lr_warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (recipe.lr_warmup_decay + (1 - recipe.lr_warmup_decay) * step / warmup)
    done = (step - warmup) / (recipe.epochs * steps_per_epoch - warmup)
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * done)) / 2


def sparsity_share(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The share of their sparsity that supermasks have at a step, counted from 0 over the whole run."""
    if recipe.sparsity_schedule == "constant":
        return 1.0
    total = recipe.epochs * steps_per_epoch
    begin, end = round(recipe.sparsity_start * total), round(recipe.sparsity_end * total)
    return cubic_sparsity(step, begin, end, initial=0.0, final=1.0)


class MaskSchedule:
    """Puts the recipe's sparsity, and the sharpness of ``spartan`` layers, into force on a model and its copies."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps_per_epoch: int) -> None:
        layers = supermask_layers(model).values()
        self._masked, self._soft = bool(layers), any(layer.method == "spartan" for layer in layers)
        self._recipe, self._steps = recipe, steps_per_epoch
        self._in_force: dict[nn.Module, tuple[float, float]] = {}

    def apply(self, model: nn.Module, step: int) -> None:
        """Set the masks of ``model`` to those of a step."""
        sparsity = sparsity_share(self._recipe, step, self._steps)
        sharpness = min(1.0, step / (SHARPENED_AFTER * self._recipe.epochs * self._steps)) if self._soft else 1.0
        if self._masked and self._in_force.get(model) != (sparsity, sharpness):
            set_sparsity(model, sparsity)
            if self._soft:
                set_sharpness(model, sharpness)
            self._in_force[model] = sparsity, sharpness
