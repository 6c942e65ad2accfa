"""Why a layer cannot be replaced: what stood in its place would be ignored, or would lose what the layer is made of."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from functools import cache

from torch import nn
from torch.nn.parameter import is_lazy


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


_METADATA = ("dtype", "device", "shape", "ndim", "requires_grad", "is_meta")
"""What a module may ask of a layer's weight without computing with it."""


def _reader(name: str, layer: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module above ``layer`` whose ``forward`` computes with its weight, as far as the source tells."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        holder = modules.get(".".join(parts[:depth]))
        if holder is not layer and ".".join(parts[depth:]) in _layers_read_by(holder):
            return holder
    return None


def _layers_read_by(module: nn.Module | None) -> frozenset[str]:
    if isinstance(module, nn.MultiheadAttention):  # a subclass: others have been replaced by one that calls it
        return frozenset({"out_proj"})
    if module is None or isinstance(module, nn.TransformerEncoderLayer):  # its fused path is turned off
        return frozenset()
    return _layers_read_in(type(module))


@cache
def _layers_read_in(kind: type[nn.Module]) -> frozenset[str]:
    """Names, below a module of ``kind``, of what its ``forward`` and the methods that this calls read a weight of."""
    read, known, ahead = set(), set(), ["forward"]
    while ahead:
        known.add(method := ahead.pop())
        attributes = [node for node in ast.walk(_source_of(kind, method)) if isinstance(node, ast.Attribute)]
        asked = {id(node.value) for node in attributes if node.attr in _METADATA}
        for node in attributes:
            holder = ast.unparse(node.value)
            if node.attr == "weight" and id(node) not in asked and re.fullmatch(r"self(\.\w+)+", holder):
                read.add(holder.removeprefix("self."))
            elif holder == "self" and node.attr not in known and not hasattr(nn.Module, node.attr):
                ahead.append(node.attr)
    return frozenset(read)


def _source_of(kind: type, name: str) -> ast.AST:
    """A method or property as its source has it; empty if it is neither, or there is no source at hand."""
    found = inspect.getattr_static(kind, name, None)
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(found.fget if isinstance(found, property) else found)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _remedy(layer: nn.Module, tensor: str) -> str:
    """What takes off what computes a layer's tensor from others by a hook."""
    if hasattr(layer, f"{tensor}_g"):
        return f"call torch.nn.utils.remove_weight_norm(layer, {tensor!r})"
    if hasattr(layer, f"{tensor}_mask"):
        return f"call torch.nn.utils.prune.remove(layer, {tensor!r})"
    if hasattr(layer, f"{tensor}_u"):
        return f"call torch.nn.utils.remove_spectral_norm(layer, {tensor!r})"
    return "make it an nn.Parameter"
