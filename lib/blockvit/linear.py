"""``BlockSparseLinear``: one module for every backend."""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bsr import BSRMatrix
from .kernels import ACTIVATIONS, Backend, named, resolve

_PROCESS = uuid.uuid4().hex
"""Tells this process and its forks from others, which a process id in a file does not."""


def dense_warning(layer: BlockSparseLinear) -> str:
    """What to say where ``"auto"`` found nothing better for a converted layer than to multiply by its zeros."""
    return (
        f"block-sparse layers run on the backend 'dense', which multiplies by the zeros too: no other can run, or is "
        f"known to be faster with, {layer.values.dtype} on {layer.values.device.type} in blocks of {layer.block_size}; "
        "take another dtype or block_size, or ask for a backend by name"
    )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is at work on ``device``; PyTorch raises where there is none to ask for."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class BlockSparseLinear(nn.Module):
    """``activation(x @ W.T + bias)`` with a frozen block-sparse ``W``.

    The checkpoint is the weight in BSR form: ``crow_indices``, ``col_indices``, ``values``. It is packed once into the
    order that the backend reads; where the values can be read back from that (``Backend.unpack``), they are not kept
    beside it but unpacked whenever they are asked for. Moving the module to another device or dtype packs it again.
    Differentiable in ``x`` and ``bias``. Under autocast it computes in the weight's own dtype: convert the module to
    bfloat16 to run in it.

    Args:
        weight: the block-sparse matrix, ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None; kept as given, so a Parameter stays trainable.
        backend: a backend's name, or ``"auto"`` for the preferred one that can run where the weight is.
        preferred: what ``"auto"`` takes before all others wherever it can run, found by measuring; None: nothing.
        activation: None, ``"gelu"`` or ``"gelu_tanh"``, applied to the output.

    Raises:
        ValueError: unknown backend or activation.
        BackendUnavailableError: the backend asked for cannot run this weight on its device.
    """

    preferred_backend: str | None = None  # of what an older version pickled

    def __init__(
        self,
        weight: BSRMatrix,
        bias: Tensor | None = None,
        *,
        backend: str = "auto",
        preferred: str | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},), one an output")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {list(ACTIVATIONS)}")
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.requested_backend, self.preferred_backend = backend, preferred
        if preferred is not None:
            named(preferred)
        self.register_buffer("crow_indices", weight.crow_indices)
        self.register_buffer("col_indices", weight.col_indices)
        self.register_buffer("values", weight.values)
        if bias is None or isinstance(bias, nn.Parameter):
            self.bias = bias
        else:
            self.register_buffer("bias", bias)
        self._packed_names: tuple[str, ...] = ()
        self._pack()

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        block_size: int,
        *,
        backend: str = "auto",
        preferred: str | None = None,
        activation: str | None = None,
    ) -> BlockSparseLinear:
        """Convert ``linear``; blocks that are all zero are left out, the bias is shared."""
        weight = BSRMatrix.from_dense(linear.weight, block_size)
        new = cls(weight, linear.bias, backend=backend, preferred=preferred, activation=activation)
        return new.train(linear.training)

    def _resolve(self, like: Tensor) -> type[Backend]:
        if self.requested_backend == "auto" and self.preferred_backend is not None:
            preferred = named(self.preferred_backend)
            if preferred.refusal(like.device, like.dtype, self.block_size) is None:
                return preferred
        return resolve(self.requested_backend, like.device, like.dtype, self.block_size, self.sparsity)

    @property
    def _held(self) -> Tensor:
        """The weight in the order in which it is held, for its dtype and device."""
        return self._buffers[self._holder]

    def _packed(self) -> dict[str, Tensor]:
        # From the dict of buffers: looking one up as an attribute costs a microsecond, ten times as much.
        return {name.removeprefix("_packed_"): self._buffers[name] for name in self._packed_names}

    def _pack(self) -> None:
        weight = self.bsr
        self.block_size = weight.block_size
        padded_out, padded_in = weight.padded_shape
        self._pad_in, self._pad_out = padded_in - self.in_features, padded_out - self.out_features
        self.backend = self._resolve(weight.values)
        packed = self.backend.pack(weight)
        for name in self._packed_names:
            delattr(self, name)
        indices = {id(tensor) for tensor in (self.crow_indices, self.col_indices)}
        for key, tensor in packed.items():  # as tensors of their own: torch.jit.trace takes no buffer of two names
            tensor = tensor.view_as(tensor) if id(tensor) in indices else tensor
            self.register_buffer(f"_packed_{key}", tensor, persistent=False)
        self._packed_names = tuple(f"_packed_{key}" for key in packed)
        # Not as attributes, which PyTorch would look up first, and they would be unpacked for that.
        self._buffers["values"] = weight.values if self.backend.unpack is None else None
        self._holder = "values" if self.backend.unpack is None else "_packed_weight"
        self._packed_in = _PROCESS
        self._scheduled = False  # what a BlockSparseMLP made for the blocks that were here before

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """If what is done within fails, as packing may for want of memory, the layer is as it was and still runs.

        Only what was loaded into the bias stays.
        """
        attributes = vars(self).copy()
        contents = [(held, held.copy()) for held in (self._buffers, self._parameters, self._non_persistent_buffers_set)]
        learnt = [p for p in self._parameters.values() if p is not None]
        tensors = [(t, t.data) for p in learnt for t in (p, p.grad) if t is not None]
        try:
            yield
        except BaseException:
            vars(self).update(attributes)
            for held, before in contents:
                held.clear()
                held.update(before)
            for tensor, data in tensors:
                tensor.data = data
            raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseLinear:
        # .to(), .cuda(), .half(): what was packed for one device or dtype may be laid out wrongly for another.
        before, backend = (self._held.device, self._held.dtype), self.backend
        there = fn(self.col_indices.new_empty(0, 0, 0, dtype=self._held.dtype))
        self._resolve(there)  # if no backend can run there, say so before anything has moved
        changed = (there.device, there.dtype) != before
        with self._all_or_nothing():
            if changed:
                self._buffers["values"] = self.values
            super()._apply(fn, recurse)
            if before[0].type == "meta":
                self._fill_indices()
            if changed:
                self._pack()
            else:  # .to(memory_format=...) is about images
                for name in self._packed_names:
                    self._buffers[name] = self._buffers[name].contiguous()
        multiplies_zeros = self.backend.name == "dense" and self.sparsity > 0
        if changed and self.requested_backend == "auto" and multiplies_zeros and backend.name != "dense":
            warnings.warn(dense_warning(self), stacklevel=2)  # said once for all layers
        return self

    def _fill_indices(self) -> None:
        """Make the indices those of some matrix of as many blocks: after ``to_empty`` they are what memory held."""
        block_cols = -(-self.in_features // self.block_size)
        for name, index in (("crow_indices", lambda i: i * block_cols), ("col_indices", lambda i: i % block_cols)):
            places = torch.arange(len(self._buffers[name]), device=self._buffers[name].device)
            self._buffers[name] = index(places).clamp(max=len(self.col_indices)).int()

    def use_backend(self, name: str) -> None:
        """Let another backend run the weight, or ``"auto"`` choose one; if it cannot, the layer stays as it is."""
        with self._all_or_nothing():
            self.requested_backend = name
            self._pack()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Number and size of the stored blocks belong to the checkpoint, not to the module that it is loaded into.
        parts = ("crow_indices", "col_indices", "values")
        given = {name: state_dict[prefix + name] for name in parts if prefix + name in state_dict}
        if not given:  # nothing of the weight: it need not be unpacked, nor packed again
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        own = {name: getattr(self, name) for name in parts if name not in given}
        try:
            BSRMatrix(**own | given, shape=(self.out_features, self.in_features)).check_indices()
        except ValueError as error:
            # PyTorch raises what is appended, of all modules together; this one stays as it was.
            args[-1].append(f"{prefix.rstrip('.') or type(self).__name__}: no BSR weight of this layer: {error}")
            return
        like = {"crow_indices": self.crow_indices, "col_indices": self.col_indices, "values": self._held}
        with self._all_or_nothing():
            for name in parts:
                self._buffers[name] = like[name].new_empty(given[name].shape) if name in given else own[name]
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._pack()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        held = self._buffers["values"]
        try:
            self._buffers["values"] = self.values
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._buffers["values"] = held

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Unpickled elsewhere: this process may not have the backend's operators loaded, or even be able to run it, and
        # its CPU may want another order. A copy made in the same process keeps what is packed.
        if self._resolve(self._held) is not self.backend or state.get("_packed_in") != _PROCESS:
            self._pack()

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # no property: an AttributeError of one would be replaced by nn.Module's
            raise AttributeError(
                "BlockSparseLinear has no dense weight; a module that reads it instead of calling the layer cannot "
                "hold one: leave the layer out of blockvit.to_block_sparse with skip= (bsr.to_dense() makes a copy)"
            )
        if name == "values" and self._buffers.get(name) is None:
            return self.backend.unpack(self._packed())
        return super().__getattr__(name)

    @property
    def sparsity(self) -> float:
        """Fraction of blocks that are not stored, in [0, 1]."""
        block_rows, block_cols = len(self.crow_indices) - 1, -(-self.in_features // self.block_size)
        return 1.0 - len(self.col_indices) / max(1, block_rows * block_cols)

    @property
    def bsr(self) -> BSRMatrix:
        """The weight as a BSR matrix; its indices are the module's buffers."""
        return BSRMatrix(self.crow_indices, self.col_indices, self.values, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in_features)``, any strides -> ``(..., out_features)``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input's last size is {x.shape[-1]}; expected in_features={self.in_features}")
        if autocasts(x.device):
            # The packed weight has one dtype; casting it in every call, as autocast would, costs more than it saves.
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.to(self._held.dtype))
        if x.dtype != (dtype := self._buffers[self._holder].dtype):
            raise ValueError(
                f"the input is {x.dtype}, the weight {dtype}; use x.to({dtype}), or model.to({x.dtype}) to convert "
                "the model"
            )
        leading = x.shape[:-1]
        if math.prod(leading) == 0:
            # A product with nothing, so that the result hangs in the autograd graph as a dense layer's does.
            return F.linear(x, x.new_zeros(self.out_features, self.in_features), self.bias)
        x = x.reshape(-1, self.in_features)
        if self._pad_in:
            x = F.pad(x, (0, self._pad_in))
        bias = F.pad(self.bias, (0, self._pad_out)) if self._pad_out and self.bias is not None else self.bias
        y = self.backend.linear(x, self._packed(), bias, self.activation)
        if self._pad_out:
            y = y.narrow(1, 0, self.out_features)
        return y.reshape(*leading, self.out_features)

    def extra_repr(self) -> str:
        """Sizes, sparsity and backend, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, sparsity={self.sparsity:.3f}, backend={self.backend.name!r}"
            + (f", activation={self.activation!r}" if self.activation else "")
        )
