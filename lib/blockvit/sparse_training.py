"""Supermask training through block-sparse products, so that a sparse model is cheaper to train too.

A masked layer multiplies by its dropped blocks three times a step: forward, for the input's gradient, and for the
weight's. Here the first two go through a block-sparse backend (``kernels``) over the kept blocks alone, gathered anew
from the dense master weight in each step. Where the kept blocks lie is worked out when the mask is refreshed, every so
many steps of the optimizer.

The third product cannot be had as cheaply: the straight-through gradient of the scores needs it for dropped blocks
too, or none of them would ever come back. ``weight_grad="dense"`` computes it in every step. ``"kept"`` computes it in
the steps that follow a refresh only, and at the kept blocks in between (as Evci et al., "Rigging the Lottery",
arXiv:1911.11134, do for their regrowth).
"""

from __future__ import annotations

import weakref
from functools import cache
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .bsr import BlockPattern, block_view
from .kernels import Backend, named, resolve
from .kernels.registry import constant_in_graphs
from .linear import autocasts
from .masks import gradients_from, num_kept
from .supermask import SupermaskLinear, supermask_layers
from .transforms import needs_plain_operators

WEIGHT_GRADS = ("dense", "kept")
"""What of the weight's gradient is computed between refreshes of the mask; see ``train_sparse``."""


class How(NamedTuple):
    """What a product needs to know besides its tensors.

    ``everywhere``: compute the weight's gradient at dropped blocks too. ``dense_gradient``: and give it to them.
    """

    block_size: int
    backend: type[Backend]
    everywhere: bool
    dense_gradient: bool


class _SparseProduct(torch.autograd.Function):
    """``x @ (weight * mask).T + bias`` for ``x`` ``(tokens, in)``, with the gradients of a masked layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scores: Tensor | None,
        bias: Tensor | None,
        how: How,
        mask: Tensor,
        *indices: Tensor,
    ) -> Tensor:
        pattern, b = BlockPattern(*indices), how.block_size
        values = blocks_at(weight, pattern, b).to(x.dtype)
        ctx.save_for_backward(x, weight, values, mask, *pattern)
        ctx.how = how
        bias = None if bias is None else _padded(bias, b)
        y = how.backend.product(_padded(x, b), values, pattern, bias).narrow(1, 0, weight.shape[0])
        return y.detach()  # no view to autograd, which forbids changing a function's views in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, mask, *indices = ctx.saved_tensors
        pattern, how, b = BlockPattern(*indices), ctx.how, ctx.how.block_size
        wants_x, wants_weight, wants_scores, wants_bias = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_scores = None
        if wants_x:
            grad_x = how.backend.input_gradient(_padded(grad, b), values, pattern).narrow(1, 0, weight.shape[1])
        if (wants_weight or wants_scores) and how.everywhere:
            effective = (grad.t() @ x).to(weight.dtype)
            factor = None if how.dense_gradient else mask
            grad_weight, grad_scores = gradients_from(effective, weight if wants_scores else None, factor, b)
        elif wants_weight or wants_scores:
            sampled = how.backend.weight_gradient(_padded(grad, b), _padded(x, b), pattern, b).to(weight.dtype)
            grad_scores = _score_gradient(sampled, weight, mask, pattern) if wants_scores else None
            grad_weight = _dense_gradient(sampled, weight, mask, pattern)
        grad_bias = grad.sum(dim=0) if wants_bias else None
        return grad_x, grad_weight, grad_scores, grad_bias, None, None, *[None] * len(pattern)


def _padded(x: Tensor, block_size: int) -> Tensor:
    """``x`` with zeros behind its last dimension up to a multiple of ``block_size``; itself if it is one."""
    missing = -x.shape[-1] % block_size
    return F.pad(x, (0, missing)) if missing else x


def _score_gradient(sampled: Tensor, weight: Tensor, mask: Tensor, pattern: BlockPattern) -> Tensor:
    """What the scores of kept blocks get from the gradient's blocks ``sampled``; zero for the others."""
    sums = (sampled * blocks_at(weight, pattern, sampled.shape[1])).sum(dim=(1, 2))
    places = pattern.row.long() * mask.shape[1] + pattern.col
    return sums.new_zeros(mask.numel()).index_copy_(0, places, sums).view(mask.shape)


def _dense_gradient(sampled: Tensor, weight: Tensor, mask: Tensor, pattern: BlockPattern) -> Tensor:
    """The blocks ``sampled`` at their places in a matrix shaped as ``weight``; zero elsewhere."""
    (block_rows, block_cols), b = mask.shape, sampled.shape[1]
    lines = sampled.new_zeros(block_rows * b * block_cols, b)
    lines.index_copy_(0, _lines(pattern, block_cols, b).long(), sampled.flatten(0, 1))
    return lines.view(block_rows * b, block_cols * b)[: weight.shape[0], : weight.shape[1]]


def blocks_at(weight: Tensor, pattern: BlockPattern, block_size: int) -> Tensor:
    """The blocks of ``weight`` at ``pattern``: ``(nnz, b, b)``."""
    blocks = block_view(weight, block_size)
    # Lines of blocks are contiguous, which makes this 3 to 10 times as fast as indexing blocks (CPU, ViT-B/16's MLP).
    lines = blocks.reshape(-1, block_size).index_select(0, _lines(pattern, blocks.shape[2], block_size))
    return lines.view(-1, block_size, block_size)


def _lines(pattern: BlockPattern, block_cols: int, block_size: int) -> Tensor:
    """Which rows of ``weight.view(-1, block_size)`` make up the blocks at ``pattern``."""
    rows = pattern.row[:, None] * block_size + torch.arange(block_size, device=pattern.row.device, dtype=torch.int32)
    return (rows * block_cols + pattern.col[:, None]).flatten()


class SparseSupermaskLinear(SupermaskLinear):
    """A ``SupermaskLinear`` that trains through block-sparse products; ``train_sparse`` makes them, in place.

    Parameters, state dict and evaluation mode are those of ``SupermaskLinear``. In training mode the mask is that of
    the last refresh. ``refresh`` takes place after every ``refresh_every``-th step of the optimizer, on ``train()``, on
    loading a state dict and when ``set_sparsity`` changes something. So a training that is resumed where ``train()`` is
    called, as ``fit`` does before each epoch, needs no more than the state dict to go on as if it had never stopped.

    A copy, or what is read from a pickle, is a ``SupermaskLinear``: no optimizer's steps are counted for it, so a mask
    of its own would never be refreshed. Call ``train_sparse`` with the copy's own optimizer.
    """

    refresh_every: int
    weight_grad: str
    requested_backend: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called for copies and unpickled layers alone, which are no longer of this class; see above.
        super().__setstate__({name: value for name, value in state.items() if name not in _OPTIONS_AND_STATE})
        self.__class__ = SupermaskLinear

    def start(self, refresh_every: int, weight_grad: str, backend: str) -> None:
        """Take the options of ``train_sparse``, and the mask that the scores choose now."""
        self.refresh_every, self.weight_grad, self.requested_backend = refresh_every, weight_grad, backend
        self.refresh()

    def refresh(self) -> None:
        """Let the scores choose the mask anew."""
        mask = self.block_mask()
        self._mask_and_pattern = mask, *BlockPattern.of_mask(mask, num_kept(mask.numel(), self.sparsity_in_force))
        self._age = 0
        self._everywhere = True

    @property
    def frozen_mask(self) -> Tensor:
        """The block mask of the last refresh, in force in training mode."""
        return self._mask_and_pattern[0]

    def stepped(self) -> None:
        """Called after each step of the optimizer."""
        self._age += 1
        if self._age >= self.refresh_every:
            self.refresh()
        else:
            self._everywhere = self.weight_grad == "dense"

    def _set_sparsity_share(self, share: float) -> None:
        super()._set_sparsity_share(share)
        self.refresh()

    def train(self, mode: bool = True) -> SparseSupermaskLinear:
        """As ``nn.Module.train``; with ``mode`` True the mask is refreshed."""
        super().train(mode)
        if mode:
            self.refresh()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> SparseSupermaskLinear:
        super()._apply(fn, recurse)
        self._mask_and_pattern = tuple(tensor.to(self.weight.device) for tensor in self._mask_and_pattern)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in_features)`` -> ``(..., out_features)``."""
        self.was_called = True
        casts = autocasts(x.device) and self.weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if casts else self.weight.dtype
        backend = _resolve(self.requested_backend, x.device, dtype, self.block_size, self.sparsity)
        fits = x.numel() > 0 and x.shape[-1] == self.in_features and (casts or x.dtype == dtype)
        if not (self.training and fits) or backend == "dense" or needs_plain_operators():
            return super().forward(x)  # which says what is wrong with an input that does not fit
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, self.in_features).to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            how = How(self.block_size, named(backend), self._everywhere, self.dense_gradient)
            y = _SparseProduct.apply(rows, self.weight, self.scores, bias, how, *self._mask_and_pattern)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The masked layer's, and the options of ``train_sparse``."""
        return f"{super().extra_repr()}, refresh_every={self.refresh_every}, weight_grad={self.weight_grad!r}"


@constant_in_graphs  # to find out what can run here is not for a traced graph
def _resolve(name: str, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float) -> str:
    return _resolve_once(name, device, dtype, block_size, sparsity)


@cache
def _resolve_once(*wanted: Any) -> str:
    return resolve(*wanted).name


def train_sparse(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    refresh_every: int = 1,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> nn.Module:
    """Let the ``SupermaskLinear`` layers of ``model`` train through block-sparse products; in place, returns ``model``.

    With the defaults every gradient, and so the training, is that of the masked layers up to rounding. Convolutions
    with masks stay as they are, and so do layers for which ``backend="auto"`` finds no backend faster than dense.

    Args:
        model: a model after ``sparsify``. ``fold``, state dicts and evaluation see no difference.
        optimizer: trains the model; its steps are counted. A copy of the model needs a call of its own.
        refresh_every: steps of the optimizer for which a mask lasts.
        weight_grad: ``"dense"`` computes the gradient of weight and scores at every block in every step, ``"kept"`` in
            the steps that follow a refresh only, in between at the kept blocks. The scores of dropped blocks then get
            a gradient in one step of ``refresh_every``, zero in the others; so do their weights, with methods that give
            them one.
        backend: ``"auto"`` or a registered backend's name.

    Raises:
        ValueError: no supermask layer, a layer that ``train_sparse`` has had already, one of method ``"spartan"``, one
            that ``optimizer`` does not train, or an option out of range.
        BackendUnavailableError: the backend cannot run these weights where they are.
    """
    if isinstance(refresh_every, bool) or not isinstance(refresh_every, Integral) or refresh_every < 1:
        raise ValueError(f"refresh_every is {refresh_every}; expected a number of optimizer steps, at least 1")
    if weight_grad not in WEIGHT_GRADS:
        raise ValueError(f"weight_grad is {weight_grad!r}; expected one of {WEIGHT_GRADS}")
    masked = supermask_layers(model).items()
    layers = {name: layer for name, layer in masked if isinstance(layer, SupermaskLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SupermaskLinear; call blockvit.sparsify(model) first")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if type(layer) is SparseSupermaskLinear:
            raise ValueError(f"{name} is a {type(layer).__name__} already; call train_sparse once for each model")
        if type(layer) is not SupermaskLinear:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, a subclass that something else has made of it; call train_sparse "
                "before fully_shard or a parametrization, or train it with its masks as it is"
            )
        if layer.method == "spartan":
            raise ValueError(f"{name} has method 'spartan', whose kept blocks are weighted; train it as it is")
        weight = layer.weight
        learnt = [p for p in (weight, layer.scores) if p is not None and p.requires_grad]
        if learnt and not any(id(p) in trained for p in learnt):
            raise ValueError(
                f"the optimizer holds neither weight nor scores of {name}, so its steps cannot tell when to choose the "
                "mask anew; pass the optimizer that trains this model (not a copy of it), made after sparsify"
            )
        resolve(backend, weight.device, weight.dtype, layer.block_size, layer.sparsity)
    distinct = [*{id(layer): layer for layer in layers.values()}.values()]
    try:
        for layer in distinct:
            # As PyTorch's own lazy and parametrized modules do: hooks, parameters and shared places stay as they are.
            layer.__class__ = SparseSupermaskLinear
            layer.start(int(refresh_every), weight_grad, backend)
    except BaseException:  # scores that are NaN choose no mask
        end_sparse(model)
        raise
    _count_steps(optimizer, distinct)
    return model


_OPTIONS_AND_STATE = ("refresh_every", "weight_grad", "requested_backend", "_mask_and_pattern", "_age", "_everywhere")
"""What a ``SparseSupermaskLinear`` has besides a ``SupermaskLinear``'s attributes."""


def end_sparse(model: nn.Module) -> nn.Module:
    """Undo ``train_sparse``, in place; returns ``model``. A model that it has not had is left alone."""
    for layer in model.modules():
        if isinstance(layer, SparseSupermaskLinear):
            for counted in _COUNTED.values():
                counted.discard(layer)
            layer.__class__ = SupermaskLinear
            for name in _OPTIONS_AND_STATE:
                vars(layer).pop(name, None)
    return model


_COUNTED: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[SparseSupermaskLinear]]
_COUNTED = weakref.WeakKeyDictionary()
"""The layers whose mask each optimizer's steps age. Weakly: a folded model's masked layers need not outlive it."""


def _count_steps(optimizer: torch.optim.Optimizer, layers: list[SparseSupermaskLinear]) -> None:
    if optimizer not in _COUNTED:
        _COUNTED[optimizer] = weakref.WeakSet()
        optimizer.register_step_post_hook(_stepped)
    _COUNTED[optimizer].update(layers)


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for layer in _COUNTED.get(optimizer, ()):  # none of a copy, which has the hook too
        layer.stepped()
