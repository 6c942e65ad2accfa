"""Putting modules in the place of others, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody has changed what calling ``module`` does: by hooks, or a ``forward`` of this instance alone."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def check_not_hooked(modules: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` if a module to be replaced has hooks or a ``forward`` of its own, which would be lost."""
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

    Tensors are not copied: the block may replace modules but must not write into parameters.
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
