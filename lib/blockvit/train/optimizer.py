"""AdamW's groups of parameters, and the moving average of what it makes of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .recipe import Recipe

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
EMBEDDINGS = ("class_token", "pos_embedding")  # torchvision's names


def ema_decay(recipe: Recipe) -> float:
    """Decay of one update of the moving average, scaled for batch size, update interval and epochs as the reference."""
    return 1 - min(1.0, (1 - recipe.model_ema_decay) * recipe.batch_size * recipe.model_ema_steps / recipe.epochs)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW's groups for the trainable parameters: ``weights``, ``norm``, ``bias``, ``embedding`` and ``scores``.

    ``name`` says which group it is, ``peak_lr`` the learning rate that the schedule scales.
    """
    decays = {
        "weights": recipe.weight_decay,
        "norm": recipe.norm_weight_decay,
        "bias": recipe.bias_weight_decay,
        "embedding": recipe.transformer_embedding_decay,
        "scores": recipe.scores_weight_decay,
    }
    members: dict[str, dict[Tensor, None]] = {name: {} for name in decays}  # ordered, a shared parameter once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                members[_group(module, name)][parameter] = None
    return [
        {
            "name": name,
            "params": list(parameters),
            "weight_decay": recipe.weight_decay if decays[name] is None else decays[name],
            "peak_lr": (name == "scores" and recipe.scores_lr) or recipe.lr,
        }
        for name, parameters in members.items()
        if parameters
    ]


def _group(module: nn.Module, name: str) -> str:
    if name == "scores":
        return "scores"
    if isinstance(module, NORMS):
        return "norm"
    if name in EMBEDDINGS:
        return "embedding"
    return "bias" if name.endswith("bias") else "weights"
