"""Block masks: which blocks a score keeps, and weights multiplied block by block.

A weight of any number of dimensions is cut into blocks of ``block_size`` elements a side; a tensor with one value a
block has ``ceil(size / block_size)`` entries in every dimension, the last of which may stand for a partial block.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """As ``block_mask``, for a number of blocks to keep; it may be a tensor on the device of ``scores``."""
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        check_scores(scores)
    order = scores.detach().flatten().sort(descending=True, stable=True).indices
    among_first = torch.arange(scores.numel(), device=scores.device) < kept
    return torch.empty_like(among_first).scatter_(0, order, among_first).view_as(scores)


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
    for dim, (length, size) in enumerate(zip(_block_lengths(shape, block_size), shape, strict=True)):
        mask = mask.repeat_interleave(length, dim).narrow(dim, 0, size)
    return mask


def block_sums(tensor: Tensor, block_size: int) -> Tensor:
    """Sum of each block of ``tensor``, partial edge blocks included: shape ``ceil(size / b)`` in every dimension."""
    lengths = _block_lengths(tuple(tensor.shape), block_size)
    padding = [(-size) % length for size, length in zip(tensor.shape, lengths, strict=True)]
    if any(padding):
        tensor = F.pad(tensor, [p for pad in reversed(padding) for p in (0, pad)])
    split = [n for size, length in zip(tensor.shape, lengths, strict=True) for n in (size // length, length)]
    return tensor.reshape(split).sum(dim=tuple(range(1, 2 * len(lengths), 2)))


def block_norms(tensor: Tensor, block_size: int) -> Tensor:
    """Euclidean (Frobenius) norm of each block of ``tensor``."""
    return block_sums(tensor.square(), block_size).sqrt()


def block_means(tensor: Tensor, block_size: int) -> Tensor:
    """Mean magnitude of each block of ``tensor``, over the elements that a partial block has."""
    counts = torch.ones((), device=tensor.device, dtype=tensor.dtype)
    for size, length in zip(tensor.shape, _block_lengths(tuple(tensor.shape), block_size), strict=True):
        starts = torch.arange(0, size, length, device=tensor.device)
        counts = counts[..., None] * (size - starts).clamp_max(length)
    return block_sums(tensor.abs(), block_size) / counts


class _MultiplyBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor | None,
        factor: Tensor,
        grad_factor: Tensor | None,
        dense_gradient: bool,
        block_size: int,
    ) -> Tensor:
        if grad_factor is None and not dense_gradient:
            grad_factor = factor
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, grad_factor)
        ctx.block_size = block_size
        return weight * expand_mask(factor, block_size, tuple(weight.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, grad_factor = ctx.saved_tensors
        grad_weight = grad_scores = None
        if ctx.needs_input_grad[0]:
            grad_weight = grad
            if grad_factor is not None:
                grad_weight = grad * expand_mask(grad_factor, ctx.block_size, tuple(grad.shape))
        if ctx.needs_input_grad[1]:
            grad_scores = block_sums(grad * weight, ctx.block_size)
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
    return _MultiplyBlocks.apply(weight, scores, factor, grad_factor, dense_gradient, block_size)


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
    with torch.no_grad():
        shift = _soft_top_k_shift(z.flatten(), kept)
        soft = torch.sigmoid(z + shift)
        slope = soft * (1 - soft)
        share = slope / slope.sum().clamp_min(torch.finfo(slope.dtype).tiny)
    # The sum stays: what the sigmoids would gain together, the shift takes off. Its value does not change by this.
    shift = shift - (share * (z - z.detach())).sum()
    return torch.sigmoid(z + shift).where(kept < values.numel(), 1).to(values.dtype)  # an infinite shift keeps all


PROBES, ROUNDS = 16, 6
"""How many shifts are tried at once, and how often: 16^6 is finer than single precision."""


def _soft_top_k_shift(z: Tensor, kept: Tensor) -> Tensor:
    """The shift for which ``sigmoid(z + shift)`` adds up to ``kept``, of the flat ``z``."""
    at_mean = torch.logit((kept / z.numel()).clamp_max(1 - 1e-6))
    low, high = at_mean - z.max(), at_mean - z.min()  # all sigmoids below the mean that is asked for, or all above it
    steps = torch.linspace(0, 1, PROBES + 1, device=z.device, dtype=z.dtype)
    for _ in range(ROUNDS):
        probes = torch.lerp(low, high, steps)
        too_low = torch.sigmoid(z + probes[:, None]).sum(1) <= kept
        below = (too_low.sum() - 1).clamp(0, PROBES - 1).view(1)
        low, high = probes.gather(0, below)[0], probes.gather(0, below + 1)[0]
    return low
