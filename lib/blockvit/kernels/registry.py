"""The contract every backend keeps, and the registry that picks one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bsr import BlockPattern, BSRMatrix, block_view, dense_from_bsr

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
"""What a linear layer may apply to its output; a backend may fuse it."""

SAMPLED_TOKENS_AT_ONCE = 128
"""Of ``Backend.weight_gradient`` on a CPU, so that the gathered blocks stay in cache: at 1576 tokens up to 3 times as
fast as all at once; 64 to 384 are within the noise of each other at 90% sparsity, above that it is slower at 80%."""

SAMPLED_BREAK_EVEN = ((64, 0.55), (32, 0.7), (0, 0.8))
"""From which sparsity on its products are faster than one dense product, for blocks of at least a size: the MLP of
ViT-B/16 on one core, 197 and 1576 tokens."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why and what can."""


class Backend(ABC):
    """One way to compute ``activation(x @ W.T + bias)`` with a block-sparse ``W``.

    A backend has no state: it is used as a class. What it needs of a weight it packs once, at conversion, into plain
    tensors, which the layer keeps as buffers. Its ``linear`` is made of ``torch.library`` operators (PyTorch's own
    count), so that ``torch.compile`` and ``torch.export`` can trace it.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """Why this backend cannot run such a weight on ``device``, or None if it can."""

    @classmethod
    @abstractmethod
    def preference(cls, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0) -> float:
        """How ``backend="auto"`` ranks it among those that can run a weight of this ``sparsity``: the highest wins."""

    @staticmethod
    @abstractmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """Tensors in the order that ``linear`` reads. May alias ``weight``'s; never changes them."""

    unpack: ClassVar[Callable[[dict[str, Tensor]], Tensor] | None] = None
    """The stored blocks ``(nnz, b, b)`` from what ``pack`` made of them, whose ``"weight"`` has their dtype.

    A backend that has this keeps them in one order only."""

    @staticmethod
    @abstractmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """``activation(x @ W.T + bias)``.

        ``x`` is ``(tokens, padded in)`` with any strides and at least one token, ``bias`` ``(padded out,)`` or None;
        the result is ``(tokens, padded out)``.
        """

    # What training needs, with a weight that is another one in each step: the blocks ``values`` ``(nnz, b, b)`` at a
    # ``pattern`` that lasts. Not differentiable; each has a general form that a backend may have something better for.

    @classmethod
    def product(cls, x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None) -> Tensor:
        """``x @ W.T + bias``: as ``linear``, without an activation. In general: packed anew."""
        matrix = BSRMatrix(pattern.crow, pattern.col, values, ((len(pattern.crow) - 1) * values.shape[1], x.shape[1]))
        return cls.linear(x, cls.pack(matrix), bias, None)

    @classmethod
    def input_gradient(cls, grad: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
        """``grad @ W``, ``(tokens, padded in)``; ``grad`` is ``(tokens, padded out)``. In general: packed anew."""
        transposed = values.index_select(0, pattern.order).transpose(1, 2).contiguous()
        shape = (len(pattern.transposed_crow) - 1) * values.shape[1], grad.shape[1]
        matrix = BSRMatrix(pattern.transposed_crow, pattern.transposed_col, transposed, shape)
        return cls.linear(grad, cls.pack(matrix), None, None)

    @classmethod
    def weight_gradient(cls, grad: Tensor, x: Tensor, pattern: BlockPattern, block_size: int) -> Tensor:
        """The blocks of ``grad.T @ x`` at ``pattern``, a sampled dense-dense product (SDDMM): ``(nnz, b, b)``.

        ``grad`` is ``(tokens, padded out)``, ``x`` is ``(tokens, padded in)``. In general: batched products of blocks,
        or, where many are kept, the dense product.
        """
        blocks_in_all = grad.shape[1] * x.shape[1] // block_size**2
        edge = next(edge for size, edge in SAMPLED_BREAK_EVEN if block_size >= size)
        if len(pattern.col) > (1 - edge) * blocks_in_all:
            return block_view(grad.t() @ x, block_size).transpose(1, 2)[pattern.row, pattern.col]
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        blocks = x.new_zeros(len(pattern.col), block_size, block_size, dtype=wide)
        at_once = SAMPLED_TOKENS_AT_ONCE if x.device.type == "cpu" else x.shape[0]
        for grads, inputs in zip(grad.split(at_once), x.split(at_once), strict=True):
            outputs = grads.unflatten(1, (-1, block_size)).transpose(0, 1).index_select(0, pattern.row)
            sampled = inputs.unflatten(1, (-1, block_size)).transpose(0, 1).index_select(0, pattern.col)
            blocks += torch.bmm(outputs.transpose(1, 2), sampled)
        return blocks.to(x.dtype)


class Baseline(Backend):
    """A backend to compare others with: asked for by name, never ``"auto"``'s choice. Inference only."""

    @classmethod
    def preference(cls, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0) -> float:
        """Behind every other."""
        return float("-inf")


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Class the result of ``function`` as a constant of every traced graph; a decorator.

    What ``torch.compiler.assume_constant_result`` does, but without importing the compiler for it, which would make
    ``import blockvit`` a second or two longer for everyone.
    """
    function._dynamo_marked_constant = True
    return function


def dense_linear(
    x: Tensor, crow: Tensor, col: Tensor, values: Tensor, rows: int, bias: Tensor | None, activation: str | None
) -> Tensor:
    """``Backend.linear`` in PyTorch's own operators, differentiable in every way; ``rows`` is the padded number.

    Makes the dense weight in each call: for what is asked for rarely.
    """
    b = values.shape[1]
    return ACTIVATIONS[activation](F.linear(x, dense_from_bsr(crow, col, values, (rows // b, x.shape[1] // b)), bias))


_BACKENDS: dict[str, type[Backend]] = {}


def register(backend: type[Backend]) -> type[Backend]:
    """Class decorator: make ``backend`` known by its name."""
    if backend.name in _BACKENDS:
        raise ValueError(f"a backend named {backend.name!r} is already registered: {_BACKENDS[backend.name]}")
    _BACKENDS[backend.name] = backend
    return backend


def backends() -> dict[str, type[Backend]]:
    """All registered backends by name."""
    return dict(_BACKENDS)


def named(name: str) -> type[Backend]:
    """The backend of that name, whether it can run here or not.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend is {name!r}; expected 'auto' or one of {sorted(_BACKENDS)}")
    return _BACKENDS[name]


def resolve(
    name: str, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0
) -> type[Backend]:
    """The backend called ``name``, or the preferred one that can run if ``name`` is ``"auto"``.

    ``sparsity`` is the fraction of the weight's blocks that are zero; only ``"auto"`` asks for it.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailableError: it exists but cannot run here; the message says why.
    """
    device = torch.device(device)
    if name == "auto":
        return _preferred(device, dtype, block_size, sparsity)
    backend = named(name)
    if (why := backend.refusal(device, dtype, block_size)) is not None:
        able = [n for n, b in _BACKENDS.items() if b.refusal(device, dtype, block_size) is None]
        raise BackendUnavailableError(
            f"backend {name!r} cannot run {dtype} on {device} in blocks of {block_size}: {why}; "
            f"use backend='auto' or one of {able}"
        )
    return backend


def _preferred(device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float) -> type[Backend]:
    # Asked in the order of preference and no further: to find out whether it can run, a backend may have to be built.
    refusals = {}
    ranked = sorted(_BACKENDS.values(), key=lambda b: -b.preference(device, dtype, block_size, sparsity))
    for backend in ranked:
        why = backend.refusal(device, dtype, block_size)
        if why is None:
            return backend
        refusals[backend.name] = why
    reasons = "; ".join(f"{n}: {why}" for n, why in refusals.items())
    raise BackendUnavailableError(f"no backend runs {dtype} on {device} in blocks of {block_size} ({reasons})")
