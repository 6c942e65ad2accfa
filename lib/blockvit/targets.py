"""Choosing layers of a model by name or predicate, and putting others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

Predicate = Callable[[str, nn.Module], bool]
Targets = str | Iterable[str] | Predicate
T = TypeVar("T")


def name_matches(name: str, target: str) -> bool:
    """Whether ``target`` is one or several neighbouring parts of a dotted module name, or a glob that matches it."""
    return f".{target}." in f".{name}." or fnmatchcase(name, target)


def matching(
    model: nn.Module, targets: Targets, skip: Targets = (), *, types: tuple[type[nn.Module], ...]
) -> dict[str, nn.Module]:
    """The layers of ``model`` of one of ``types`` that ``targets`` name and ``skip`` does not, by name, in order.

    A layer counts if its type is exactly one of ``types`` or a subclass made by this library; the model itself does
    not. Strings that match no layer raise ``ValueError`` with the list of layers.
    """
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_a(module, types)}
    if not layers or "" in layers:
        raise ValueError(
            f"{type(model).__name__} holds no layers of type {' or '.join(t.__name__ for t in types)} that could be "
            "exchanged; pass the model that contains them (a single layer can be wrapped in nn.Sequential)"
        )
    chosen = _named_by(targets, layers, "targets")
    skipped = _named_by(skip, layers, "skip") if skip != () else {}
    left = {name: module for name, module in chosen.items() if name not in skipped}
    if not left:
        raise ValueError(
            f"targets={targets!r} without skip={skip!r} match no layer; the layers are:\n{_listing(layers)}"
        )
    return left


def _is_a(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    return type(module) in types or (isinstance(module, types) and type(module).__module__.startswith("blockvit."))


def _named_by(targets: Targets, layers: Mapping[str, nn.Module], what: str) -> dict[str, nn.Module]:
    if callable(targets):
        return {name: module for name, module in layers.items() if targets(name, module)}
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        found = [name for name in layers if name_matches(name, target)]
        # In `skip`, a name that exists nowhere is as much a typing error as in `targets`.
        if not found:
            raise ValueError(f"{what}: {target!r} matches no layer; the layers are:\n{_listing(layers)}")
        chosen.update(found)
    return {name: module for name, module in layers.items() if name in chosen}


def _listing(layers: Mapping[str, nn.Module]) -> str:
    return "\n".join(f"  {name}  {type(m).__name__}{tuple(m.weight.shape)}" for name, m in layers.items())


def lookup(
    setting: T | Mapping[str, T] | Callable[[str, nn.Module], T], name: str, module: nn.Module, *, what: str
) -> T:
    """The value of a per-layer setting for one layer: a constant, a mapping from target to value, or a function."""
    if isinstance(setting, Mapping):
        for target, value in setting.items():
            if name_matches(name, target):
                return value
        raise ValueError(f"{what} has no entry for {name}; its keys are {list(setting)}: add one that matches")
    return setting(name, module) if callable(setting) else setting


def replace_modules(model: nn.Module, replacements: Mapping[str, Callable[[nn.Module], nn.Module]]) -> None:
    """Exchange submodules in place: each name maps to a function from the old module to the new one.

    A module that stands at several names, itself or through a shared parent, is exchanged once and shared again.
    """
    if "" in replacements:
        raise ValueError(
            f"the model is itself the {type(model).__name__} to be exchanged, which cannot be done in place; "
            "wrap it in nn.Sequential"
        )
    made: dict[int, tuple[nn.Module, nn.Module]] = {}  # the old module is kept so that its id stays taken
    for name, make in replacements.items():
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        old = getattr(parent, child_name)
        if id(old) not in made:
            new = make(old)
            made[id(old)] = (old, new)
            made[id(new)] = (new, new)  # a shared parent leads here again
        setattr(parent, child_name, made[id(old)][1])
