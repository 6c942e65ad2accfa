"""Choosing layers of a model by name or predicate, and putting others in their place."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

Predicate = Callable[[str, nn.Module], bool]
Targets = str | Iterable[str] | Predicate
T = TypeVar("T")


def name_matches(name: str, target: str) -> bool:
    """Whether ``target`` is one or more consecutive parts of a dotted module name, or a glob that matches it."""
    return f".{target}." in f".{name}." or fnmatchcase(name, target)


def matching(
    model: nn.Module,
    targets: Targets | None,
    skip: Targets | None = (),
    *,
    types: tuple[type[nn.Module], ...],
    modules: Mapping[str, nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """The layers of ``model`` of one of ``types`` that ``targets`` name and ``skip`` does not, by name, in order.

    A layer counts if its type is exactly one of ``types`` or a subclass made by this library; the model itself does
    not. None for ``targets`` means every layer that can be replaced. ``modules``: what stands for those of ``model``.

    Raises:
        TypeError: ``targets`` or ``skip`` is neither name nor function, or a list of anything but names.
        ValueError: a string that matches no layer, nothing left (the message lists the layers), or a target that names
            a layer which cannot be replaced (see ``obstacles``).
    """
    modules = dict(model.named_modules(remove_duplicate=False)) if modules is None else modules
    hindered = obstacles(modules, types)
    layers = {name: module for name, module in modules.items() if _is_a(module, types) or name in hindered}
    if not layers or "" in layers:
        raise ValueError(
            f"{type(model).__name__} holds no layers of type {' or '.join(t.__name__ for t in types)} that could be "
            "replaced; pass the model that contains them (a single layer can be wrapped in nn.Sequential)"
        )
    if targets is None:
        chosen = {name: module for name, module in layers.items() if name not in hindered}
    else:
        chosen = _named_by(targets, layers, "targets")
    skipped = {} if not skip else _named_by(skip, layers, "skip")
    left = {name: module for name, module in chosen.items() if name not in skipped}
    if not left:
        raise ValueError(
            f"targets={targets!r} without skip={skip!r} match no layer; the layers are:\n{_listing(layers)}"
        )
    if named := [f"  {name}: {why}" for name, why in hindered.items() if name in left]:
        raise ValueError(
            "layers among the targets cannot be replaced; leave them out with skip=, or mend what is said of each:\n"
            + "\n".join(named)
        )
    return left


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


def _is_a(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    return type(module) in types or (isinstance(module, types) and type(module).__module__.startswith("blockvit."))


def _named_by(targets: Targets, layers: Mapping[str, nn.Module], what: str) -> dict[str, nn.Module]:
    if callable(targets) and not isinstance(targets, nn.Module):
        return {name: module for name, module in layers.items() if targets(name, module)}
    if not isinstance(targets, Iterable):
        raise TypeError(f"{what} is {targets!r}; expected a name, a list of names, or a function of name and module")
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if not isinstance(target, str):
            raise TypeError(
                f"{what} holds {target!r}; expected names of layers only: to choose by a function of name and module, "
                f"pass that function itself as {what}"
            )
        found = [name for name in layers if name_matches(name, target)]
        # In `skip`, a name that exists nowhere is as much a typing error as in `targets`.
        if not found:
            raise ValueError(f"{what}: {target!r} matches no layer; the layers are:\n{_listing(layers)}")
        chosen.update(found)
    return {name: module for name, module in layers.items() if name in chosen}


def _listing(layers: Mapping[str, nn.Module]) -> str:
    return "\n".join(f"  {name}  {type(m).__name__}{_shape(m)}" for name, m in layers.items())


def _shape(layer: nn.Module) -> tuple[int, ...]:
    if is_lazy(getattr(layer, "weight", None)):
        return ()
    return tuple(layer.weight.shape) if hasattr(layer, "weight") else (layer.out_features, layer.in_features)


def per_layer(
    setting: T | Mapping[str, T] | Callable[[str, nn.Module], T], layers: Mapping[str, nn.Module], *, what: str
) -> dict[str, T]:
    """The values of a setting for each of ``layers``: a constant, a mapping from target to value, or a function.

    Raises:
        ValueError: a layer that no key of the mapping matches, or a key that decides for no layer. ``"*"``, for what is
            left, may be left with nothing.
    """
    if not isinstance(setting, Mapping):
        return {name: setting(name, module) if callable(setting) else setting for name, module in layers.items()}
    deciding = {name: next((key for key in setting if name_matches(name, key)), None) for name in layers}
    for name, key in deciding.items():
        if key is None:
            raise ValueError(f"{what} has no entry for {name}; its keys are {list(setting)}: add one that matches")
    if idle := [key for key in setting if key not in deciding.values() and key != "*"]:
        raise ValueError(
            f"{what}: {idle[0]!r} decides for no layer, because it matches none or an earlier key does; "
            f"the layers are:\n{_listing(layers)}"
        )
    return {name: setting[key] for name, key in deciding.items()}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody has changed what calling ``module`` does: by hooks, or a ``forward`` of this instance alone."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def check_not_hooked(modules: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` if one of ``modules``, which are to be replaced, has what would be lost with it."""
    for name, module in modules.items():
        if is_hooked(module):
            what = "a forward set on the instance" if "forward" in vars(module) else "hooks"
            raise ValueError(
                f"{name} ({type(module).__name__}) has {what}, which replacing it would lose; remove that first, "
                "or leave the layer out with skip="
            )


def replace_modules(model: nn.Module, replacements: Mapping[str, Callable[[nn.Module], nn.Module]]) -> None:
    """Replace submodules in place: each name maps to a function from the old module to the new one.

    A module that stands at several names, itself or through a shared parent, is replaced once and shared again. All
    new modules are made before the first is replaced, so that an error leaves the model as it was.

    Raises:
        ValueError: the model itself is to be replaced, or a module that has hooks.
    """
    if "" in replacements:
        raise ValueError(
            f"the model is itself the {type(model).__name__} to be replaced, which cannot be done in place; "
            "wrap it in nn.Sequential"
        )
    old = {name: model.get_submodule(name) for name in replacements}
    check_not_hooked(old)
    made: dict[int, nn.Module] = {}
    for name, make in replacements.items():
        if id(old[name]) not in made:
            made[id(old[name])] = make(old[name])
    for name in replacements:
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, made[id(old[name])])


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If what is done within fails, every submodule of ``model`` stands again where it stood, set as it was.

    Tensors are not copied: what is done within may replace modules, and not write into parameters.
    """
    before = [(module, vars(module).copy(), dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, children in before:
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
        raise
