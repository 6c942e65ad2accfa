"""Choosing layers of a model by name or predicate, and what holds for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from .obstacles import obstacles

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
    not. None for ``targets`` means every layer that can be replaced. ``modules``: use these instead of the modules of
    ``model`` (its names after a planned replacement).

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


def _is_a(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    return type(module) in types or (isinstance(module, types) and type(module).__module__.startswith("blockvit."))


def _named_by(targets: Targets, layers: Mapping[str, nn.Module], what: str) -> dict[str, nn.Module]:
    if isinstance(targets, type):
        raise TypeError(
            f"{what} is the class {targets.__name__}; to choose layers by their class, pass a function: "
            f"{what}=lambda name, module: type(module) is {targets.__module__}.{targets.__qualname__}"
        )
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
