"""Supermasks: a trained choice of which blocks of a weight to keep.

Each masked layer learns one score a block. The blocks with the highest scores are kept, the others are multiplied by
zero; the forward pass sees the binary mask, the backward pass treats it as the identity (straight-through), so that a
dropped block still receives a score gradient and can come back.

Sources: Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?" (arXiv:1911.13299) for the scores and
the straight-through gradient; the PyTorch blog post "Speeding up ViTs using Block Sparsity" for the block form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import expose_projections
from .bsr import check_block_size
from .targets import Targets, lookup, matching, replace_modules

BLOG_TARGETS = ("mlp", "out_proj", "head")
"""What the blog post masks in a ViT: both MLP layers, the attention's output projection, the classification head."""


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
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        check_scores(scores)
    order = scores.detach().flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[: num_kept(scores.numel(), sparsity)]] = True
    return mask.view_as(scores)


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


class _MaskBlocks(torch.autograd.Function):
    """``weight * mask``: binary forward, identity backward for the scores.

    One function for both factors, so that backward makes the masked and the block-summed gradient from the same
    saved tensors instead of keeping an element-wise float mask alive.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.block_size = block_size
        return weight * expand_mask(mask, block_size, tuple(weight.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, mask = ctx.saved_tensors
        grad_weight = grad_scores = None
        if ctx.needs_input_grad[0]:
            grad_weight = grad * expand_mask(mask, ctx.block_size, tuple(weight.shape))
        if ctx.needs_input_grad[1]:
            grad_scores = block_sums(grad * weight, ctx.block_size)
        return grad_weight, grad_scores, None, None


class _Supermask:
    """What masked layers share: scores, the mask they choose, and the effective weight."""

    weight: nn.Parameter
    scores: nn.Parameter

    def _init_mask(self, sparsity: float, block_size: int) -> None:
        self.sparsity = check_sparsity(sparsity)
        self.block_size = check_block_size(block_size)
        blocks = [-(-size // self.block_size) for size in self.weight.shape]
        self.scores = nn.Parameter(torch.empty(blocks, device=self.weight.device, dtype=self.weight.dtype))
        self.reset_scores()

    def _adopt(self, dense: nn.Module) -> Any:
        """Take over the parameters of ``dense``; the module was made on the meta device, to draw nothing twice."""
        self.weight, self.bias = dense.weight, dense.bias
        self._init_mask(self.sparsity, self.block_size)
        return self.train(dense.training)

    def reset_scores(self) -> None:
        """Draw the scores as the reference implementation does (Kaiming uniform, a = sqrt 5)."""
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))

    def block_mask(self) -> Tensor:
        """The boolean block mask that the scores choose now, ``ceil(size / block_size)`` in every dimension."""
        return block_mask(self.scores, self.sparsity)

    def effective_weight(self) -> Tensor:
        """The weight with its dropped blocks at zero, differentiable in ``weight`` and ``scores``."""
        return _MaskBlocks.apply(self.weight, self.scores, self.block_mask(), self.block_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity:g}, block_size={self.block_size}"


class SupermaskLinear(_Supermask, nn.Linear):
    """``nn.Linear`` whose weight is masked block by block; the bias is not.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether to learn a bias.
        sparsity: fraction of blocks dropped, in [0, 1).
        block_size: edge length of the square blocks; sizes need not be multiples of it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        block_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_mask(sparsity, block_size)

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, sparsity: float, block_size: int) -> SupermaskLinear:
        """Mask ``linear``; its parameters are shared, not copied."""
        sizes = linear.in_features, linear.out_features
        masked = cls(*sizes, bias=False, sparsity=sparsity, block_size=block_size, device="meta")
        return masked._adopt(linear)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in_features)`` -> ``(..., out_features)``."""
        return F.linear(x, self.effective_weight(), self.bias)


class SupermaskConv2d(_Supermask, nn.Conv2d):
    """``nn.Conv2d`` whose weight ``(out, in / groups, kh, kw)`` is masked in blocks over all four dimensions.

    With the usual kernels, shorter than a block, a block spans the whole kernel: ``block_size`` output channels by
    ``block_size`` input channels. Takes ``nn.Conv2d``'s arguments, ``sparsity`` and ``block_size``.
    """

    def __init__(self, *args: Any, sparsity: float, block_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_mask(sparsity, block_size)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, sparsity: float, block_size: int) -> SupermaskConv2d:
        """Mask ``conv``; its parameters are shared, not copied."""
        masked = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=False,
            padding_mode=conv.padding_mode,
            sparsity=sparsity,
            block_size=block_size,
            device="meta",
        )
        return masked._adopt(conv)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(N, in_channels, H, W)`` -> ``(N, out_channels, H', W')``."""
        return self._conv_forward(x, self.effective_weight(), self.bias)


MASKED_TYPES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SupermaskLinear, nn.Conv2d: SupermaskConv2d}
"""Which layer is masked by which. Exact types only: a subclass may do something else in its forward."""


def sparsify(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | Callable[[str, nn.Module], float] = 0.9,
    block_size: int | Mapping[str, int] | Callable[[str, nn.Module], int] = 32,
    *,
    targets: Targets = BLOG_TARGETS,
    skip: Targets = (),
) -> nn.Module:
    """Give the targeted layers of ``model`` supermasks, in place; returns ``model``.

    Every ``nn.MultiheadAttention`` is first exchanged for one with the same output whose projections are modules
    (see ``attention``): otherwise a mask on ``out_proj`` would never be applied.

    Args:
        model: any module that holds ``nn.Linear`` or ``nn.Conv2d`` layers.
        sparsity: fraction of blocks to drop, in [0, 1); or one for each layer, as a mapping from target to value
            (``{"mlp": 0.9, "out_proj": 0.8}``, first match wins) or as ``f(name, module)``.
        block_size: edge length of the blocks; or one for each layer, as above.
        targets: which layers. Strings match a module's name, one or several neighbouring parts of it between dots
            (``"mlp"`` and ``"encoder_layer_0.mlp"`` match ``encoder.layers.encoder_layer_0.mlp.3``), or as a glob
            (``"*.mlp.0"``); or a predicate ``(name, module) -> bool``. Attention's projections are called
            ``"qkv"`` and ``"out_proj"``.
        skip: layers to leave alone, in the same language, e.g. ``("encoder_layer_0", "head")``.

    Raises:
        ValueError: sparsity outside [0, 1), block size < 1, a target or skip that matches nothing (the message lists
            the layers there are), or a layer that already has a mask.
        TypeError: a block size that is not an integer.
    """
    for value, check in ((sparsity, check_sparsity), (block_size, check_block_size)):
        if not isinstance(value, Mapping) and not callable(value):
            check(value)
    expose_projections(model)
    chosen = matching(model, targets, skip, types=tuple(MASKED_TYPES))
    for name, module in chosen.items():
        if isinstance(module, _Supermask):
            raise ValueError(
                f"{name} already has a supermask ({module}); fold the model first, or start from a new one"
            )

    settings = {  # all looked up before the first layer is exchanged, so that an error leaves none half done
        name: {
            "sparsity": check_sparsity(lookup(sparsity, name, module, what="sparsity")),
            "block_size": check_block_size(lookup(block_size, name, module, what="block_size")),
        }
        for name, module in chosen.items()
    }

    def mask(name: str, module: nn.Module) -> nn.Module:
        return MASKED_TYPES[type(module)].from_dense(module, **settings[name])

    replace_modules(model, {name: partial(mask, name) for name in chosen})
    return model


def supermask_layers(model: nn.Module) -> dict[str, SupermaskLinear | SupermaskConv2d]:
    """The masked layers of ``model`` by name; one that stands at several names is listed at each."""
    layers = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in layers if isinstance(module, _Supermask)}
