"""The arguments that build a torchvision ``VisionTransformer`` anew, where the stock one is what the model is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import MultiheadAttention
from .linear import BlockSparseLinear
from .mlp import BlockSparseMLP
from .models import num_classes
from .patches import PatchEmbedding, is_patch_embedding
from .replace import is_hooked

# What torchvision's VisionTransformer keeps of its arguments under their own names.
_KEPT = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "dropout", "attention_dropout", "representation_size")


def arguments_of(model: nn.Module) -> dict[str, Any] | None:
    """The arguments that build a ``VisionTransformer`` like ``model``; None if none would, as of any other model.

    What this library has put in the place of the stock modules is no difference; any other module, setting or hook is,
    because what is built would compute otherwise without a word.
    """
    import torchvision

    if type(model) is not torchvision.models.VisionTransformer or (classes := num_classes(model)) is None:
        return None
    arguments = {name: getattr(model, name) for name in _KEPT}
    arguments |= {"num_classes": classes, "num_layers": len(model.encoder.layers)}
    arguments["num_heads"] = model.encoder.layers[0].num_heads if arguments["num_layers"] else 1
    return arguments if _stands_for(model, build(arguments)) else None


def build(arguments: dict[str, Any]) -> nn.Module:
    """The ``VisionTransformer`` of these arguments, without memory: drawing random weights would take longer."""
    import torchvision

    with torch.device("meta"):
        return torchvision.models.VisionTransformer(**arguments)


def _stands_for(module: nn.Module, stock: nn.Module) -> bool:
    """Whether ``module`` is like ``stock``, or is what loading puts in its place."""
    if is_hooked(module):
        return False
    if isinstance(module, BlockSparseLinear):
        return type(stock) is nn.Linear and _sizes(module) == _sizes(stock)
    if isinstance(module, PatchEmbedding):
        sizes = module.channels, (module.patch_size,) * 2
        return is_patch_embedding(stock) and sizes == (stock.in_channels, stock.kernel_size)
    if type(module) is nn.Identity and type(stock) is nn.GELU:  # which the layer before it applies
        return True
    if type(module) is MultiheadAttention and type(stock) is nn.MultiheadAttention:
        stock = MultiheadAttention.from_torch(stock)
        stock.use_kernel(module.kernel)
    fused = isinstance(module, BlockSparseMLP) and type(stock).forward is nn.Sequential.forward
    return (
        (fused or _settings(module) == _settings(stock))
        and module._modules.keys() == stock._modules.keys()
        and all(_stands_for(child, stock._modules[name]) for name, child in module._modules.items())
    )


def _sizes(linear: nn.Module) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


def _settings(module: nn.Module) -> tuple[Any, ...]:
    # PyTorch's attention tells nothing of itself. What is a module is compared by itself.
    told = [getattr(module, name, None) for name in ("num_heads", "batch_first", "dropout")]
    return type(module), module.extra_repr(), *(None if isinstance(value, nn.Module) else value for value in told)
