"""Block masks: which blocks a score keeps, and weights multiplied block by block.

A weight of any number of dimensions is cut into blocks of ``block_size`` elements a side; a tensor with one value a
block has ``ceil(size / block_size)`` entries in every dimension, the last of which may stand for a partial block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforms import inside_functorch, needs_plain_operators


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` as a ``float``; no number (``TypeError``) or outside [0, 1) (``ValueError``) raises."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"sparsity is {sparsity!r} ({type(sparsity).__name__}); expected a number in [0, 1)")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is {sparsity}; expected the fraction of blocks to drop, in [0, 1): 0.9 keeps one block in ten"
        )
    return float(sparsity)


def num_kept(num_blocks: int, sparsity: float) -> int:
    """How many of ``num_blocks`` blocks stay: ``n - round(sparsity * (n - 1))``, at least 1.

    This is the reference implementation's percentile threshold, so its checkpoints fold to the same masks. It is
    computed through percent as there: 0.01 * (0.7 * 100) is a little more than 0.7, which decides ties of ``round``.
    """
    return num_blocks - round(0.01 * (sparsity * 100) * (num_blocks - 1))


def block_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Boolean mask, shaped as ``scores``: True for exactly ``num_kept`` of the highest scores.

    Ties break by position (the earlier block stays), so the count is exact whatever the scores. NaN scores raise
    ``ValueError`` on the CPU; on other devices they are not looked for, because a look would wait for the device in
    every forward pass (``fold`` looks there too).
    """
    return highest(scores, num_kept(scores.numel(), sparsity))


def highest(scores: Tensor, kept: int | Tensor) -> Tensor:
    """As ``block_mask``, for a number of blocks to keep; it may be a tensor, for compiled code in which it changes."""
    scores = scores.detach()
    looks = scores.device.type == "cpu" and not torch.compiler.is_compiling() and not inside_functorch()  # at values
    if looks and isinstance(kept, int):
        check_scores(scores)
        return _above_threshold(scores.flatten(), kept).view_as(scores)
    order = scores.flatten().sort(descending=True, stable=True).indices
    among_first = torch.arange(scores.numel(), device=scores.device) < kept
    return torch.empty_like(order, dtype=torch.bool).scatter_(0, order, among_first).view_as(scores)


def _above_threshold(scores: Tensor, kept: int) -> Tensor:
    # Linear in the number of scores, where a stable sort takes one and a half per cent of a layer's training step.
    lowest = scores.kthvalue(scores.numel() - kept + 1).values
    above, tied = scores > lowest, scores == lowest
    return above | (tied & (tied.cumsum(0) <= kept - above.sum()))


def check_scores(scores: Tensor) -> None:
    """Raise ``ValueError`` if any score is NaN."""
    bad = int(scores.isnan().sum())
    if bad:
        raise ValueError(
            f"{bad} of {scores.numel()} mask scores are NaN, so no mask can be chosen; the training diverged "
            "(lower the learning rate, clip gradients) or the checkpoint is damaged"
        )


def _block_lengths(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    # A dimension shorter than a block (a 3x3 kernel's) holds one block of its own length: same mask, no padding.
    return tuple(min(block_size, size) for size in shape)


def expand_mask(mask: Tensor, block_size: int, shape: tuple[int, ...]) -> Tensor:
    """Blow a block mask up to the elements of a weight of ``shape``; partial edge blocks are cut off."""
    return _spread(mask, block_size, shape, range(len(shape)))


def _spread(values: Tensor, block_size: int, shape: tuple[int, ...], dims: range) -> Tensor:
    """Repeat ``values``, one a block of a tensor of ``shape``, for each element along ``dims``."""
    lengths = _block_lengths(shape, block_size)
    for dim in reversed(dims):  # the last first, so that what is repeated is contiguous
        repeated = values.unsqueeze(dim + 1).expand(*values.shape[: dim + 1], lengths[dim], *values.shape[dim + 1 :])
        values = repeated.flatten(dim, dim + 1).narrow(dim, 0, shape[dim])
    return values


def _rows_of_blocks(tensor: Tensor, block_size: int) -> list[Tensor]:
    """Views ``(rows of blocks, elements down a block, elements along a row)``: of the whole blocks, and of the rest."""
    matrix = tensor.flatten(1)
    length = min(block_size, len(matrix))
    whole = len(matrix) // length * length
    parts = [matrix[:whole].unflatten(0, (-1, length))]
    return parts if whole == len(matrix) else [*parts, matrix[whole:].unsqueeze(0)]


def _along_rows(factor: Tensor, tensor: Tensor, block_size: int) -> Tensor:
    """``factor``, one value a block of ``tensor``, for each element along a row: ``(rows of blocks, 1, elements)``."""
    along = _spread(factor.to(tensor.dtype), block_size, tuple(tensor.shape), range(1, tensor.dim()))
    return along.flatten(1).unsqueeze(1)


def scale_blocks(tensor: Tensor, factor: Tensor, block_size: int) -> Tensor:
    """``tensor`` times ``factor``, which has one value a block.

    The factors are spread along one row of each row of blocks only, not over all elements: on a CPU, that is four to
    twenty times as fast as multiplying by an expanded mask.
    """
    parts = _rows_of_blocks(tensor, block_size)
    factors = _along_rows(factor, tensor, block_size).split([len(part) for part in parts])
    scaled = [(part * f).flatten(0, 1) for part, f in zip(parts, factors, strict=True)]
    return (scaled[0] if len(scaled) == 1 else torch.cat(scaled)).view(tensor.shape)


CHUNK_BYTES = 4 << 20
"""Bytes of products summed at a time on a CPU, so that they stay in its cache: a third faster."""


def _sum_blocks(
    elementwise: Callable[..., Tensor], tensors: Sequence[Tensor], block_size: int, factor: Tensor | None = None
) -> Tensor:
    """Sum of ``elementwise(*tensors)`` over each block: shape ``ceil(size / b)`` in every dimension.

    ``elementwise`` is given a few rows of blocks at a time, ``(rows of blocks, elements down a block, elements along a
    row)``, followed by the matching rows of ``factor``, if given, as ``_along_rows`` has it. Half precision is summed
    in single precision.
    """
    rows, start = [], 0
    for parts in zip(*(_rows_of_blocks(tensor, block_size) for tensor in tensors), strict=True):
        for chunks in zip(*(part.split(_chunk_rows(part)) for part in parts), strict=True):
            end = start + len(chunks[0])
            values = elementwise(*chunks) if factor is None else elementwise(*chunks, factor[start:end])
            rows.append(values.sum(1, dtype=torch.promote_types(values.dtype, torch.float32)))
            start = end
    row_sums = torch.cat(rows).unflatten(1, tensors[0].shape[1:])
    lengths = _block_lengths(tuple(row_sums.shape), block_size)
    for dim in range(1, row_sums.dim()):
        if padding := (-row_sums.shape[dim]) % lengths[dim]:
            row_sums = F.pad(row_sums, (0, 0) * (row_sums.dim() - 1 - dim) + (0, padding))
        row_sums = row_sums.unflatten(dim, (-1, lengths[dim])).sum(dim + 1)
    return row_sums


def _chunk_rows(part: Tensor) -> int:
    if part.device.type != "cpu" or torch.compiler.is_compiling():  # there kernels are launched, or fused
        return len(part)
    return max(1, CHUNK_BYTES // (part[0].numel() * part.element_size()))


def block_dots(a: Tensor, b: Tensor, block_size: int) -> Tensor:
    """Sum of ``a * b`` over each block."""
    return _sum_blocks(torch.mul, [a, b], block_size).to(a.dtype)


def block_norms(tensor: Tensor, block_size: int) -> Tensor:
    """Euclidean (Frobenius) norm of each block of ``tensor``."""
    wide = torch.promote_types(tensor.dtype, torch.float32)  # a square of half precision may be too large for it
    return _sum_blocks(lambda part: part.to(wide).square(), [tensor], block_size).sqrt().to(tensor.dtype)


def block_means(tensor: Tensor, block_size: int) -> Tensor:
    """Mean magnitude of each block of ``tensor``, over the elements that a partial block has."""
    counts = torch.ones((), device=tensor.device, dtype=torch.promote_types(tensor.dtype, torch.float32))
    for size, length in zip(tensor.shape, _block_lengths(tuple(tensor.shape), block_size), strict=True):
        starts = torch.arange(0, size, length, device=tensor.device)
        counts = counts[..., None] * (size - starts).clamp_max(length)
    return (_sum_blocks(torch.abs, [tensor], block_size) / counts).to(tensor.dtype)


class _MultiplyBlocks(torch.autograd.Function):
    generate_vmap_rule = True  # with setup_context, what torch.func asks for

    @staticmethod
    def forward(
        weight: Tensor,
        scores: Tensor | None,
        factor: Tensor,
        grad_factor: Tensor | None,
        dense_gradient: bool,
        block_size: int,
    ) -> Tensor:
        return scale_blocks(weight, factor, block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, _, factor, grad_factor, dense_gradient, block_size = inputs
        if grad_factor is None and not dense_gradient:
            grad_factor = factor
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, grad_factor)
        ctx.block_size = block_size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, grad_factor = ctx.saved_tensors
        grad_weight = grad_scores = None
        if ctx.needs_input_grad[0]:
            grad_weight = grad if grad_factor is None else scale_blocks(grad, grad_factor, ctx.block_size)
        if ctx.needs_input_grad[1]:
            grad_scores = block_dots(grad, weight, ctx.block_size)
        return grad_weight, grad_scores, None, None, None, None


def multiply_blocks(
    weight: Tensor,
    scores: Tensor | None,
    factor: Tensor,
    block_size: int,
    *,
    grad_factor: Tensor | None = None,
    dense_gradient: bool = False,
) -> Tensor:
    """``weight`` times ``factor``, one factor a block, with a straight-through gradient.

    Args:
        weight: what to multiply. Its gradient is the result's times ``grad_factor``.
        scores: one a block; they get the gradient that the factors would get, the sum over each block of the result's
            gradient times ``weight``. Their values do not matter. None: nothing gets it.
        factor: boolean or floating point, one a block; takes no gradient.
        block_size: edge length of the blocks.
        grad_factor: of the weight's gradient; None: ``factor``.
        dense_gradient: leave the weight's gradient as it is, whatever the factors.
    """
    if not needs_plain_operators():
        return _MultiplyBlocks.apply(weight, scores, factor, grad_factor, dense_gradient, block_size)
    # In forward mode too. A `jvp` of the function would say the same, and keep torch.compile from tracing it.
    passed = factor if grad_factor is None and not dense_gradient else grad_factor
    product = weight if passed is None else scale_blocks(weight, passed, block_size)
    if passed is not factor:
        product = product + (scale_blocks(weight, factor, block_size) - product).detach()
    return product if scores is None else product + scale_blocks(weight, scores - scores.detach(), block_size)


def gradients_from(
    grad: Tensor, weight: Tensor | None, factor: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the weight and of the scores, from ``grad``, that of ``multiply_blocks``' result.

    May overwrite ``grad``: use only what is returned. ``weight``: None if the scores need no gradient. ``factor``: of
    the weight's gradient; None leaves it as it is.
    """
    if weight is None:
        return grad if factor is None else scale_blocks(grad, factor, block_size), None
    if factor is None:
        return grad, block_dots(grad, weight, block_size)

    def product(grad: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        products = grad * weight
        grad.mul_(factor)
        return products

    sums = _sum_blocks(product, [grad, weight], block_size, _along_rows(factor, grad, block_size))
    return grad, sums.to(grad.dtype)


class _MaskedLinear(torch.autograd.Function):
    """``masked_linear`` of ``x`` ``(tokens, in)``. Changes its gradient in place, so it is not for ``torch.func``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scores: Tensor | None,
        bias: Tensor | None,
        mask: Tensor,
        block_size: int,
        dense_gradient: bool,
    ) -> Tensor:
        effective = scale_blocks(weight, mask, block_size)
        ctx.save_for_backward(x, weight, scores, effective, mask)
        ctx.block_size, ctx.dense_gradient = block_size, dense_gradient
        return F.linear(x, effective, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _MaskedLinear._to_differentiate if torch.is_grad_enabled() else _MaskedLinear._in_place
        grad_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        return *gradients(ctx, grad), grad_bias, None, None, None

    @staticmethod
    def _in_place(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _, effective, mask = ctx.saved_tensors
        wants_x, wants_weight, wants_scores = ctx.needs_input_grad[:3]
        grad_x = grad @ effective if wants_x else None
        grad_weight = grad_scores = None
        if wants_weight or wants_scores:
            factor = None if ctx.dense_gradient else mask
            weight = weight if wants_scores else None
            grad_weight, grad_scores = gradients_from(grad.t() @ x, weight, factor, ctx.block_size)
        return grad_x, grad_weight, grad_scores

    @staticmethod
    def _to_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd asks for gradients that can be differentiated in their turn (create_graph), so they need a graph.
        x, weight, scores, _, mask = ctx.saved_tensors
        y = F.linear(x, multiply_blocks(weight, scores, mask, ctx.block_size, dense_gradient=ctx.dense_gradient))
        wanted = [t for t, wants in zip((x, weight, scores), ctx.needs_input_grad, strict=False) if wants]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True) if wanted else ())
        return tuple(next(found) if wants else None for wants in ctx.needs_input_grad[:3])


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    block_size: int,
    *,
    dense_gradient: bool = False,
) -> Tensor:
    """``F.linear(x, multiply_blocks(weight, scores, mask, block_size, ...), bias)``, with a cheaper backward pass.

    The gradient of the product's weight is nobody else's here, so it becomes the weight's in place, in the pass that
    finds the scores'. That counts where few tokens leave a layer bound by memory. All tensors are of one floating
    point type; arguments otherwise as of ``multiply_blocks``.
    """
    # In two dimensions: F.linear returns a view in three, and autograd forbids changing a function's views in place.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _MaskedLinear.apply(rows, weight, scores, bias, mask, block_size, dense_gradient)
    return y.view(*x.shape[:-1], y.shape[1])


def soft_top_k(values: Tensor, kept: Tensor, sharpness: Tensor) -> Tensor:
    """A differentiable stand-in for the mask of the ``kept`` highest ``values``: numbers in (0, 1) that add up to it.

    The solution of the entropy-regularised transport problem of Tai et al., "Spartan" (arXiv:2205.14107):
    ``sigmoid(sharpness * values + shift)``. They find the one unknown, the shift, by Sinkhorn's iteration; here it is
    enclosed ever more narrowly, because the sum grows with it. The gradient is that of implicit differentiation, as
    there.

    Args:
        values: any shape.
        kept: how many, a tensor without dimensions.
        sharpness: a tensor without dimensions; the larger it is, the closer to the hard mask.
    """
    z = sharpness * (values if values.dtype == torch.float64 else values.float())
    fixed = z.detach()  # which forward mode heeds; it does not heed no_grad
    shift = _soft_top_k_shift(fixed.flatten(), kept)
    soft = torch.sigmoid(fixed + shift)
    slope = soft * (1 - soft)
    share = slope / slope.sum().clamp_min(torch.finfo(slope.dtype).tiny)
    # The sum stays: what the sigmoids would gain together, the shift takes off. Its value does not change by this.
    shift = shift - (share * (z - fixed)).sum()
    return torch.sigmoid(z + shift).where(kept < values.numel(), 1).to(values.dtype)  # an infinite shift keeps all


PROBES, ROUNDS = 16, 6
"""How many shifts are tried at once, and how often: 16^6 is finer than single precision."""


def _soft_top_k_shift(z: Tensor, kept: Tensor) -> Tensor:
    """The shift for which ``sigmoid(z + shift)`` adds up to ``kept``, of the flat ``z``."""
    at_mean = torch.logit((kept.to(z.dtype) / z.numel()).clamp_max(1 - 1e-6))
    low, high = at_mean - z.max(), at_mean - z.min()  # all sigmoids below the mean that is asked for, or all above it
    steps = torch.linspace(0, 1, PROBES + 1, device=z.device, dtype=z.dtype)
    for _ in range(ROUNDS):
        probes = torch.lerp(low, high, steps)
        too_low = torch.sigmoid(z + probes[:, None]).sum(1) <= kept
        below = (too_low.sum() - 1).clamp(0, PROBES - 1).view(1)
        low, high = probes.gather(0, below)[0], probes.gather(0, below + 1)[0]
    return low
