"""The block-sparse linear layer with its gradients, made of operators. Imports no Triton, so that it is quick."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...bsr import BlockPattern
from ..registry import Backend

WIDEST_SAMPLED = 128
"""The largest block that a tile of ``gradients`` holds."""


def product(x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias``, ``W`` having the blocks ``values`` at ``pattern``."""
    return torch.ops.blockvit.triton_product(x, pattern.crow, pattern.col, values, None, bias)


def input_gradient(grad: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
    """``grad @ W``, by the transposed pattern; the values are read in place."""
    crow, col = pattern.transposed_crow, pattern.transposed_col
    return torch.ops.blockvit.triton_product(grad, crow, col, values, pattern.order, None)


def weight_gradient(grad: Tensor, x: Tensor, pattern: BlockPattern, block_size: int) -> Tensor:
    """The blocks of ``grad.T @ x`` at ``pattern``; blocks larger than the kernel's tiles by PyTorch's products."""
    if block_size > WIDEST_SAMPLED:
        return Backend.weight_gradient(grad, x, pattern, block_size)
    return torch.ops.blockvit.triton_sampled(grad, x, *pattern, block_size)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, grouped: tuple[Any, ...] | None, *pattern: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, values, *pattern)
        if grouped is None:
            return product(x, values, BlockPattern(*pattern), bias)
        *weight, out_features, nnz = grouped
        return torch.ops.blockvit.triton_linear(x, *weight, bias, out_features, nnz, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *indices = ctx.saved_tensors
        pattern = BlockPattern(*indices)
        wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
        grad_x = input_gradient(grad, values, pattern) if wants_x else None
        grad_values = weight_gradient(grad, x, pattern, values.shape[1]) if wants_values else None
        return grad_x, grad_values, grad.sum(dim=0) if wants_bias else None, None, *[None] * len(pattern)


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern, grouped: tuple[Any, ...] | None = None
) -> Tensor:
    """``x @ W.T + bias``, differentiable in ``x``, in the blocks ``values`` of ``W`` at ``pattern``, and in ``bias``.

    Forward by ``grouped``, what ``triton_linear`` takes besides ``x``, bias and activation, or, without it, by
    ``values``: groups are a copy, which a step of the optimizer would leave behind.

    Without an activation: PyTorch's own behind it keeps what its gradient needs, the numbers before it. A fused one
    would have to compute them again in the backward pass, a third product of the layer's size.
    """
    return _Linear.apply(x, values, bias, grouped, *pattern)
