"""Why a layer cannot be replaced: what stood in its place would be ignored, or would lose what the layer is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from .sources import stands_among, uses


def obstacles(modules: Mapping[str, nn.Module], types: tuple[type[nn.Module], ...]) -> dict[str, str]:
    """Why layers of ``types`` among ``modules`` cannot be replaced, by name; of those with an obstacle only."""
    found = {name: _obstacle(name, module, modules) for name, module in modules.items() if isinstance(module, types)}
    return {name: why for name, why in found.items() if why is not None}


def _obstacle(name: str, layer: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    if reader := _reader(name, layer, modules):
        return f"{type(reader).__name__} reads its weight instead of calling it, so what stood there would be ignored"
    if hasattr(layer, "parametrizations"):
        return (
            "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations(layer, name) for each of "
            f"{list(layer.parametrizations)} first"
        )
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    for tensor in ("weight", "bias"):
        if tensor not in layer._parameters:
            return f"its {tensor} is no parameter but computed; {_remedy(layer, tensor)} first"
    if is_lazy(layer.weight):
        return "it is not initialised; call the model once first"
    if 0 in layer.weight.shape:
        return f"its weight has shape {tuple(layer.weight.shape)}, which holds no blocks"
    return None


def _reader(name: str, layer: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module above ``layer`` whose ``forward`` computes with its weight, as far as the source tells."""
    above = _holders(name, modules)
    return next((m for m, rest in above if m is not layer and stands_among(rest, _layers_read_by(m))), None)


def _layers_read_by(module: nn.Module) -> frozenset[str]:
    if isinstance(module, nn.MultiheadAttention):  # a subclass: others have been replaced by one that calls it
        return frozenset({"out_proj"})
    if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):  # their fused paths are turned off
        return frozenset()
    return uses(type(module)).weights


def is_used_in_parts(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a ``forward`` above the module called ``name`` may call one part of it without another."""
    return any(stands_among(rest, uses(type(holder)).parts) for holder, rest in _holders(name, modules))


def _holders(name: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """The modules above ``name``, the nearest first, each with what ``name`` is below it."""
    parts = name.split(".")
    for depth in reversed(range(len(parts) if name else 0)):
        if (holder := modules.get(".".join(parts[:depth]))) is not None:
            yield holder, ".".join(parts[depth:])


def _remedy(layer: nn.Module, tensor: str) -> str:
    """The call that removes the hook which computes this tensor."""
    if hasattr(layer, f"{tensor}_g"):
        return f"call torch.nn.utils.remove_weight_norm(layer, {tensor!r})"
    if hasattr(layer, f"{tensor}_mask"):
        return f"call torch.nn.utils.prune.remove(layer, {tensor!r})"
    if hasattr(layer, f"{tensor}_u"):
        return f"call torch.nn.utils.remove_spectral_norm(layer, {tensor!r})"
    return "make it an nn.Parameter"
