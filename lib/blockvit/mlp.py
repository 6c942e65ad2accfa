"""``BlockSparseMLP``: two block-sparse linear layers in a row, run as one kernel where that can be."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels.triton.packing import Packed
from .linear import BlockSparseLinear
from .replace import is_hooked, replace_modules
from .transforms import needs_plain_operators

GELU = {"none": "gelu", "tanh": "gelu_tanh"}
"""Activations of ``BlockSparseLinear`` by the ``approximate`` of an ``nn.GELU``."""


class BlockSparseMLP(nn.Sequential):
    """An ``nn.Sequential`` that begins with two block-sparse layers and runs them as one kernel where that can be.

    Its children, their names and so its ``state_dict`` are those of the ``nn.Sequential`` that it stands for, and so
    are its results, within the tolerance of their dtype. The kernel runs if

    - both layers are on the ``"triton"`` backend, in one dtype and block size,
    - at most one ``nn.GELU`` is active between them (an ``nn.Dropout`` counts as active in training mode),
    - no gradient is needed: the hidden activations are not kept,
    - no child that would not be called has forward hooks,
    - there are at least ``min_tokens`` tokens: with fewer, parts of the GPU would have nothing to do.

    Else the children are called one after the other. What follows the second layer always is.

    Args:
        children: as those of ``nn.Sequential``: modules, or one ``OrderedDict`` of them.

    Attributes:
        min_tokens: see above; None where the kernel cannot run these layers. Set whenever the layers come to another
            device, dtype or checkpoint; to be changed at will.
    """

    min_tokens: int | None = None

    def __init__(self, *children: nn.Module | OrderedDict[str, nn.Module]) -> None:
        super().__init__(*children)
        self._schedule()
        self.register_load_state_dict_post_hook(_schedule_again)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):  # one child replaced by another
            self._schedule()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseMLP:
        super()._apply(fn, recurse)
        self._schedule()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if (pattern := _match(self)) and not (pattern.first._scheduled and pattern.second._scheduled):
            self._schedule()  # the layers were packed anew

    def _schedule(self) -> None:
        """Make what the kernel needs besides the layers' own buffers; waits for the device."""
        for name in _SCHEDULES:
            self.register_buffer(name, None, persistent=False)
        self.min_tokens = None
        if (pattern := _match(self)) is None or _refusal(pattern.first, pattern.second) is not None:
            return
        from .kernels.triton import mlp  # not at the top: it imports Triton

        first, second = pattern.first, pattern.second
        packed = _packed(first), _packed(second)
        schedules = mlp.schedules(*packed)
        for name, tensor in zip(_SCHEDULES, (*schedules[0], *schedules[1]), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        first._scheduled = second._scheduled = True
        sizes = first.in_features, first.out_features
        height = max(p.values.shape[1] for p in packed)
        self.min_tokens = mlp.min_tokens(
            first.values.device, sizes, first.block_size, first.values.dtype, first.bsr.nnz, height
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in_features)``, any strides -> ``(..., out_features)``."""
        pattern = None if self.min_tokens is None else _match(self)
        if pattern is None or not self._can_fuse(x, pattern):
            return super().forward(x)
        first, second = pattern.first, pattern.second
        schedules = [self._buffers[name] for name in _SCHEDULES]
        y = torch.ops.blockvit.triton_mlp(
            x.reshape(-1, first.in_features).to(first.values.dtype),
            *schedules[:4],
            first._buffers["_packed_values"],
            first.bias,
            *schedules[4:],
            second._buffers["_packed_values"],
            second.bias,
            first._buffers["_packed_sizes"].shape[1],
            first.out_features,
            second.out_features,
            pattern.activation,
            second.activation,
        )
        y = y.view(*x.shape[:-1], second.out_features)
        for module in pattern.rest:
            y = module(y)
        return y

    def _can_fuse(self, x: Tensor, pattern: _Pattern) -> bool:
        first, second = pattern.first, pattern.second
        trained = any(t is not None and t.requires_grad for t in (x, first.bias, second.bias))
        return (
            first._scheduled
            and second._scheduled
            and not (trained and torch.is_grad_enabled())
            and not needs_plain_operators()
            and all(_may_be_skipped(m) for m in pattern.skipped)
            and (x.dtype == first.values.dtype or torch.is_autocast_enabled(x.device.type))  # which layers cast under
            and x.device == first.values.device
            and x.shape[-1] == first.in_features
            and x.numel() >= max(1, self.min_tokens) * first.in_features
        )

    def extra_repr(self) -> str:
        """From how many tokens on it is one kernel, for ``repr``."""
        return "" if self.min_tokens is None else f"min_tokens={self.min_tokens}"


_SCHEDULES = tuple(f"_{part}{layer}" for layer in (1, 2) for part in ("steps", "columns", "empty", "rows"))


def _schedule_again(mlp: BlockSparseMLP, incompatible_keys: Any) -> None:
    mlp._schedule()


class _Pattern(NamedTuple):
    """The two layers that a sequence begins with, and the activation between them."""

    first: BlockSparseLinear
    second: BlockSparseLinear
    activation: str | None
    skipped: list[nn.Module]
    """Both layers and what lies between: what is not called where one kernel does it all."""
    rest: list[nn.Module]


def _match(sequence: nn.Sequential) -> _Pattern | None:
    """How ``sequence`` begins, or None if not with an MLP."""
    modules = list(sequence._modules.values())
    if not modules or type(modules[0]) is not BlockSparseLinear:
        return None
    activation = modules[0].activation
    for i, module in enumerate(modules[1:], start=1):
        if type(module) is BlockSparseLinear:
            return _Pattern(modules[0], module, activation, modules[: i + 1], modules[i + 1 :])
        if type(module) is nn.GELU and activation is None:
            activation = GELU[module.approximate]
        elif type(module) not in (nn.Identity, nn.Dropout):
            return None
    return None


def _may_be_skipped(module: nn.Module) -> bool:
    """Whether nobody notices that it is not called: it drops nothing and has no hooks."""
    drops = type(module) is nn.Dropout and module.training and module.p > 0
    return not (drops or module._forward_hooks or module._forward_pre_hooks)


def _packed(layer: BlockSparseLinear) -> Packed:
    """The weight as the ``"triton"`` backend packed it."""
    return Packed(*(layer._buffers.get(f"_packed_{part}") for part in ("crow", "col", "values", "rows")))


def _refusal(first: BlockSparseLinear, second: BlockSparseLinear) -> str | None:
    """Why no kernel runs both layers, or None."""
    if {first.backend.name, second.backend.name} != {"triton"}:
        return "the fused kernel is for layers on the backend 'triton'"
    if first.block_size != second.block_size or first.values.dtype != second.values.dtype:
        return "the fused kernel needs one block size and dtype for both layers"
    if first.out_features != second.in_features or first.values.device != second.values.device:
        return "the layers do not follow each other"
    return None


def check_fuse(fuse: bool | str) -> None:
    """Raise ``ValueError`` unless it is True, False or ``"auto"``."""
    if not (isinstance(fuse, bool) or fuse == "auto"):
        raise ValueError(f"fuse_mlp is {fuse!r}; expected True, False or 'auto'")


def fuse_mlps(model: nn.Module, fuse: bool | str = "auto") -> nn.Module:
    """Make each ``nn.Sequential`` of ``model`` that begins like one a ``BlockSparseMLP``, in place; returns ``model``.

    Outputs stay the same within the tolerance of their dtype. The model itself is not replaced, nor are subclasses of
    ``nn.Sequential`` that have their own ``forward``, and sequences with hooks.

    Args:
        model: with ``BlockSparseLinear`` layers.
        fuse: ``"auto"`` those that the kernel can run where they are now; True all, for models that are still to be
            moved to a GPU; False none.

    Raises:
        ValueError: ``fuse`` is something else.
    """
    check_fuse(fuse)
    for module in model.modules():
        if isinstance(module, BlockSparseMLP):  # whose layers may have come to another backend
            module._schedule()

    def wanted(module: nn.Module) -> bool:
        if isinstance(module, BlockSparseMLP) or type(module).forward is not nn.Sequential.forward:
            return False
        pattern = _match(module)
        able = pattern is not None and not is_hooked(module)
        return able and (fuse is True or _refusal(pattern.first, pattern.second) is None)

    def convert(sequence: nn.Sequential) -> BlockSparseMLP:
        fused = BlockSparseMLP(OrderedDict(sequence._modules))
        fused.training = sequence.training  # not train(), which would set the children's too
        return fused

    if fuse is not False:
        named = model.named_modules(remove_duplicate=False)
        replace_modules(model, dict.fromkeys([name for name, m in named if name and wanted(m)], convert))
    return model
