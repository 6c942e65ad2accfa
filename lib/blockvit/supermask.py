"""Supermasks: a trained choice of which blocks of a weight to keep.

Each masked layer keeps the blocks with the highest scores and multiplies the others by zero. By default it learns one
score a block: the forward pass sees the binary mask, the backward pass treats it as the identity (straight-through), so
that a dropped block still receives a score gradient and can come back. ``METHODS`` says what else can be tried.

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

from .attention import expose_projections, exposed_modules
from .bsr import check_block_size
from .masks import (
    block_means,
    block_norms,
    check_sparsity,
    highest,
    masked_linear,
    multiply_blocks,
    num_kept,
    soft_top_k,
)
from .replace import check_not_hooked, replace_modules
from .targets import Targets, matching, per_layer
from .transforms import needs_plain_operators

BLOG_TARGETS = ("mlp", "out_proj", "head")
"""What the blog post masks in a ViT: both MLP layers, the attention's output projection, the classification head."""

METHODS = {
    "supermask": "learned scores; a dropped block's weights get no gradient (the reference, and the default)",
    "dense_gradient": "learned scores; a dropped block's weights get the gradient that they would get if it were kept",
    "magnitude": "the blocks of largest norm, chosen anew at each step; dense gradient",
    "spartan": "the blocks of largest mean magnitude, weighted by a soft top-k that is sharpened; dense gradient",
}
"""What decides which blocks a layer keeps, and what learns.

- ``dense_gradient``: straight-through for the weights too, so that a block that comes back has not stood still in the
  meantime (Bengio et al., arXiv:1308.3432).
- ``magnitude``: the dense weights take the gradient found at their projection onto the block-sparse ones; no scores.
  Lin et al., "Dynamic Model Pruning with Feedback" (arXiv:2006.07253), by blocks; Tai et al. call it dual averaging.
- ``spartan``: Tai et al., "Spartan" (arXiv:2205.14107). As ``magnitude``, but the weights that are kept are multiplied
  by a soft top-k of their magnitudes, whose gradient they get as well. ``set_sharpness`` is its schedule. Unlike
  theirs, the sparsity is each layer's own and the mask is never frozen.
"""

WITH_SCORES = ("supermask", "dense_gradient")
"""The methods that learn scores; the others have none."""

SCORES = ("kaiming", "magnitude", "constant")
"""How scores can start; see ``sparsify``."""

SHARPNESS = (1.0, 20.0)
"""Sharpness of ``spartan``'s soft top-k, first and last, as in the paper. The last is multiplied by the square root of
the number of elements in a block."""


def cubic_sparsity(step: int, begin: int, end: int, initial: float, final: float) -> float:
    """The sparsity of a step: ``initial`` up to ``begin``, ``final`` from ``end`` on, and between them a cubic ramp.

    It rises fast at first, when there is much to choose from, and slowly at last: Zhu and Gupta, "To prune, or not to
    prune" (arXiv:1710.01878). With ``initial=0, final=1`` it is what ``set_sparsity`` takes. Not rounded to a number of
    blocks; ``begin == end`` is a jump.
    """
    if begin > end:
        raise ValueError(f"the ramp begins at step {begin} and ends at {end}; expected begin <= end")
    if step >= end:
        return final
    if step <= begin:
        return initial
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


class _Supermask:
    """What masked layers share: what they choose blocks by, the mask, and the effective weight."""

    weight: nn.Parameter
    scores: nn.Parameter | None
    was_called = False
    """Whether the layer has ever been called: ``fold`` warns of one whose weight seems to be read by others instead."""

    def _init_mask(self, sparsity: float, block_size: int, method: str = "supermask", scores: str = "kaiming") -> None:
        self.sparsity = check_sparsity(sparsity)
        self.block_size = check_block_size(block_size)
        self.method = _one_of("method", method, METHODS)
        self._sparsity_share = self._sharpness_share = 1.0
        self._init_scores(_one_of("scores", scores, SCORES))

    def _init_scores(self, how: str) -> None:
        self._scores_start = how
        self.num_blocks = math.prod(blocks := [-(-size // self.block_size) for size in self.weight.shape])
        self.scores = None
        if self.method in WITH_SCORES:
            self.scores = nn.Parameter(torch.empty(blocks, device=self.weight.device, dtype=self.weight.dtype))
            self.reset_scores(how)
        elif how != "kaiming":
            raise ValueError(f"scores is {how!r}, but method {self.method!r} has no scores; leave it out")
        self._place_settings()

    def _place_settings(self) -> None:
        # Tensors, so that a compiled step is not compiled anew at every change of them. No buffers: what is in force
        # follows from the step, so it is not saved, nor averaged by an exponential moving average.
        device = self.weight.device
        with torch.inference_mode(False):  # a model that is moved there may be trained later
            self._kept = torch.tensor(num_kept(self.num_blocks, self.sparsity_in_force), device=device)
            self._sharpness = torch.tensor(self.sharpness_in_force, device=device, dtype=torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_settings()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._place_settings()  # ``assign=True`` may bring the parameters to another device

    def reset_parameters(self) -> None:
        """As the layer does that is masked, and the scores as they started."""
        super().reset_parameters()
        if getattr(self, "scores", None) is not None:  # they are none yet while the layer is made
            self.reset_scores(self._scores_start)

    def _adopt(self, dense: nn.Module, scores: str) -> Any:
        """Take over the parameters of ``dense``; the module was made on the meta device, to draw nothing twice."""
        self.weight, self.bias = dense.weight, dense.bias
        self._init_scores(scores)
        return self.train(dense.training)

    @torch.no_grad()
    def reset_scores(self, how: str = "kaiming") -> None:
        """Start the scores anew, in one of the ways of ``SCORES``; see ``sparsify``.

        Raises:
            ValueError: another way, or the layer has no scores.
        """
        _one_of("scores", how, SCORES)
        if self.scores is None:
            raise ValueError(
                f"a layer of method {self.method!r} has no scores to start anew: it chooses blocks by their weights"
            )
        bound = self.scores.shape[1:].numel() ** -0.5  # of the Kaiming uniform draw with a = sqrt 5
        if how == "kaiming":
            nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        elif how == "constant":
            nn.init.zeros_(self.scores)
        else:
            norms = block_norms(self.weight, self.block_size).float()
            norms -= norms.mean()
            spread = norms.square().mean().sqrt().clamp_min(1e-12)
            self.scores.copy_(norms / spread * (bound / math.sqrt(3)))

    @property
    def sparsity_in_force(self) -> float:
        """The fraction of blocks dropped now: ``sparsity``, or the share of it that ``set_sparsity`` has set."""
        return self.sparsity * self._sparsity_share

    def _set_sparsity_share(self, share: float) -> None:
        self._sparsity_share = share
        self._kept.fill_(num_kept(self.num_blocks, self.sparsity_in_force))

    @property
    def sharpness_in_force(self) -> float:
        """Of the soft top-k of ``spartan``; see ``set_sharpness``."""
        elements = math.prod(min(self.block_size, size) for size in self.weight.shape)
        first, last = SHARPNESS
        return first + self._sharpness_share * (last * math.sqrt(elements) - first)

    def _number_kept(self) -> int | Tensor:
        return self._kept if torch.compiler.is_compiling() else num_kept(self.num_blocks, self.sparsity_in_force)

    @property
    def dense_gradient(self) -> bool:
        """Whether the weights of dropped blocks get a gradient too; see ``METHODS``."""
        return self.method != "supermask"

    def block_scores(self) -> Tensor:
        """What the blocks are chosen by, ``ceil(size / block_size)`` in every dimension: learned, or of the weights."""
        if self.scores is not None:
            return self.scores
        return (block_means if self.method == "spartan" else block_norms)(self.weight, self.block_size)

    def block_mask(self) -> Tensor:
        """The boolean block mask in force now, ``ceil(size / block_size)`` in every dimension."""
        with torch.no_grad():  # norms of the weight would keep what their gradient needs
            return highest(self.block_scores(), self._number_kept())

    def effective_weight(self) -> Tensor:
        """The weight with its dropped blocks at zero, differentiable in ``weight`` and what the method learns."""
        if self.method == "spartan":
            means = self.block_scores()
            soft = soft_top_k(means, self._kept, self._sharpness)
            factor = soft.detach() * highest(means, self._number_kept())
            return multiply_blocks(self.weight, soft, factor, self.block_size, grad_factor=soft.detach())
        return multiply_blocks(
            self.weight, self.scores, self.block_mask(), self.block_size, dense_gradient=self.dense_gradient
        )

    def extra_repr(self) -> str:
        method = "" if self.method == "supermask" else f", method={self.method!r}"
        return f"{super().extra_repr()}, sparsity={self.sparsity:g}, block_size={self.block_size}{method}"


def _one_of(what: str, name: str, known: Mapping[str, str] | tuple[str, ...]) -> str:
    if name not in known:
        raise ValueError(f"{what} is {name!r}; expected one of {list(known)}")
    return name


class SupermaskLinear(_Supermask, nn.Linear):
    """``nn.Linear`` whose weight is masked block by block; the bias is not.

    On a CPU, while gradients are recorded, it runs through ``masks.masked_linear``; otherwise through
    ``effective_weight``, which it equals.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether to learn a bias.
        sparsity: fraction of blocks dropped, in [0, 1).
        block_size: edge length of the square blocks; sizes need not be multiples of it.
        method: one of ``METHODS``.
        scores: how scores start; see ``sparsify``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        block_size: int,
        method: str = "supermask",
        scores: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_mask(sparsity, block_size, method, scores)

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, scores: str = "kaiming", **settings: Any) -> SupermaskLinear:
        """Mask ``linear``; its parameters are shared, not copied. ``settings``: sparsity, block size, method."""
        masked = cls(linear.in_features, linear.out_features, bias=False, device="meta", **settings)
        return masked._adopt(linear, scores)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in_features)`` -> ``(..., out_features)``."""
        self.was_called = True  # only written here: compiled code that read it would be recompiled when it changes
        if self._takes_gradient_in_place(x):
            parameters = self.weight, self.scores, self.bias
            mask = self.block_mask()
            return masked_linear(x, *parameters, mask, self.block_size, dense_gradient=self.dense_gradient)
        return F.linear(x, self.effective_weight(), self.bias)

    def _takes_gradient_in_place(self, x: Tensor) -> bool:
        # Worth it on a CPU alone, where a few tokens leave a layer bound by its weights. The compiler fuses the plain
        # product itself, and autocast casts its weight.
        return (
            x.device.type == "cpu"
            and self.method != "spartan"
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not needs_plain_operators()
        )


class SupermaskConv2d(_Supermask, nn.Conv2d):
    """``nn.Conv2d`` whose weight ``(out, in / groups, kh, kw)`` is masked in blocks over all four dimensions.

    With the usual kernels, shorter than a block, a block spans the whole kernel: ``block_size`` output channels by
    ``block_size`` input channels. Takes ``nn.Conv2d``'s arguments, and those of ``SupermaskLinear`` for the mask.
    """

    def __init__(
        self,
        *args: Any,
        sparsity: float,
        block_size: int,
        method: str = "supermask",
        scores: str = "kaiming",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_mask(sparsity, block_size, method, scores)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, scores: str = "kaiming", **settings: Any) -> SupermaskConv2d:
        """Mask ``conv``; its parameters are shared, not copied. ``settings``: sparsity, block size, method."""
        return cls(**conv_arguments(conv), **settings)._adopt(conv, scores)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(N, in_channels, H, W)`` -> ``(N, out_channels, H', W')``."""
        self.was_called = True
        return self._conv_forward(x, self.effective_weight(), self.bias)


def conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """What makes a convolution like ``conv``, which is to be given its parameters."""
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
    return {name: getattr(conv, name) for name in names} | {"bias": False, "device": "meta"}


MASKED_TYPES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SupermaskLinear, nn.Conv2d: SupermaskConv2d}
"""Which layer is masked by which. Exact types only: a subclass may do something else in its forward."""


def sparsify(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | Callable[[str, nn.Module], float] = 0.9,
    block_size: int | Mapping[str, int] | Callable[[str, nn.Module], int] = 32,
    *,
    targets: Targets = BLOG_TARGETS,
    skip: Targets | None = (),
    method: str = "supermask",
    scores: str = "kaiming",
    train_scores: bool = True,
) -> nn.Module:
    """Give the targeted layers of ``model`` supermasks, in place; returns ``model``.

    Every ``nn.MultiheadAttention`` is first replaced by one with the same output whose projections are modules
    (see ``attention``): otherwise a mask on ``out_proj`` would never be applied.

    Args:
        model: any module that holds ``nn.Linear`` or ``nn.Conv2d`` layers.
        sparsity: fraction of blocks to drop, in [0, 1); or one for each layer, as a mapping from target to value
            (``{"mlp": 0.9, "out_proj": 0.8}``, first match wins, ``"*"`` for the rest) or as ``f(name, module)``.
        block_size: edge length of the blocks; or one for each layer, as above.
        targets: which layers. Strings match a module's name, one or more consecutive parts of it between dots
            (``"mlp"`` and ``"encoder_layer_0.mlp"`` match ``encoder.layers.encoder_layer_0.mlp.3``), or as a glob
            (``"*.mlp.0"``); or a predicate ``(name, module) -> bool``. Attention's projections are called
            ``"qkv"`` and ``"out_proj"``.
        skip: layers to leave alone, in the same language, e.g. ``("encoder_layer_0", "head")``. None: none.
        method: what decides which blocks stay, and what learns: one of ``METHODS``.
        scores: how learned scores start. ``"kaiming"``: at random, as the reference implementation draws them (Kaiming
            uniform, a = sqrt 5). ``"magnitude"``: the norms of the weight's blocks, shifted and scaled to the mean and
            spread of such a draw, so that the same learning rate fits. ``"constant"``: at zero, so that at first the
            position decides, and then the gradient.
        train_scores: False keeps the masks that the scores choose at the start: a control for what learning them gains.

    Raises:
        ValueError: sparsity outside [0, 1), block size < 1, a target, skip or key of a mapping that matches nothing
            (the message lists the layers there are), a layer that already has a mask, an unknown ``method`` or
            ``scores``, or settings of scores for a method that has none. Also a layer that cannot be replaced: its
            weight is read by the module that holds it instead of being called (torchvision's Swin attention, timm's
            BEiT, subclasses of ``nn.MultiheadAttention``) or computed from others (weight norm, pruning), it holds
            nothing, or has hooks. The model is then as it was.
        TypeError: a block size that is not an integer, a sparsity that is not a number.
    """
    for value, check in ((sparsity, check_sparsity), (block_size, check_block_size)):
        if not isinstance(value, Mapping) and not callable(value):
            check(value)
    _check_scores_setting(method, scores, train_scores)
    if targets is None:
        raise ValueError('targets is None; name the layers to mask, e.g. targets=("mlp", "head"), or "*" for all')
    # Everything is looked up before the first layer is replaced, so that an error leaves the model as it was.
    chosen = matching(model, targets, skip, types=tuple(MASKED_TYPES), modules=exposed_modules(model))
    for name, module in chosen.items():
        if isinstance(module, _Supermask):
            raise ValueError(
                f"{name} already has a supermask ({module}); fold the model first, or start from a new one"
            )

    check_not_hooked(chosen)
    sparsities = per_layer(sparsity, chosen, what="sparsity")
    block_sizes = per_layer(block_size, chosen, what="block_size")
    settings = {
        name: {"sparsity": check_sparsity(sparsities[name]), "block_size": check_block_size(block_sizes[name])}
        for name in chosen
    }
    expose_projections(model)

    def mask(name: str, module: nn.Module) -> nn.Module:
        masked = MASKED_TYPES[type(module)].from_dense(module, method=method, scores=scores, **settings[name])
        if masked.scores is not None:
            masked.scores.requires_grad_(train_scores)
        return masked

    replace_modules(model, {name: partial(mask, name) for name in chosen})
    return model


def _check_scores_setting(method: str, scores: str, train_scores: bool) -> None:
    _one_of("method", method, METHODS)
    _one_of("scores", scores, SCORES)
    if method not in WITH_SCORES and (scores != "kaiming" or not train_scores):
        raise ValueError(
            f"scores={scores!r} and train_scores={train_scores} were given, but method {method!r} has no scores; leave "
            f"them out, or choose one of {list(WITH_SCORES)}"
        )


def set_sparsity(model: nn.Module, share: float) -> None:
    """Let every masked layer of ``model`` drop ``share`` times its ``sparsity``, until this is called again.

    What is in force is no part of the state dict: it should follow from the step, as ``cubic_sparsity`` gives it, so
    call this before each step, and after loading a checkpoint. A new layer drops its whole ``sparsity``, its target,
    which stays as it is. ``fold`` folds what is in force, because it changes no output: a training that was cut short
    within the ramp folds to fewer zeros, unless ``set_sparsity(model, 1)`` comes first. A copy of the model, such as an
    exponential moving average, is another model: it needs a call of its own.

    Cheap enough for every step; neither waits for the device nor makes ``torch.compile`` compile again. A model without
    masked layers is left alone.

    Raises:
        ValueError: ``share`` outside [0, 1].
        TypeError: it is not a number.
    """
    _check_share(share)
    for layer in _distinct_layers(model):
        if layer._sparsity_share != share:
            layer._set_sparsity_share(share)


def set_sharpness(model: nn.Module, share: float) -> None:
    """Set how far the soft top-k of ``spartan`` is on its way from the first of ``SHARPNESS`` (0) to the last (1).

    Its authors raise it linearly with the step over the first four fifths of the training, and reach the target
    sparsity within the first fifth. A new layer has the last. Otherwise as ``set_sparsity``; other methods ignore it.
    """
    _check_share(share)
    for layer in _distinct_layers(model):
        if layer._sharpness_share != share:
            layer._sharpness_share = share
            layer._sharpness.fill_(layer.sharpness_in_force)


def _check_share(share: float) -> None:
    if isinstance(share, bool) or not isinstance(share, Real):
        raise TypeError(f"share is {share!r} ({type(share).__name__}); expected a number in [0, 1]")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a number in [0, 1]: 1 is the target")


def _distinct_layers(model: nn.Module) -> list[_Supermask]:
    return [module for module in model.modules() if isinstance(module, _Supermask)]


def supermask_layers(model: nn.Module) -> dict[str, SupermaskLinear | SupermaskConv2d]:
    """The masked layers of ``model`` by name; one that stands at several names is listed at each."""
    layers = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in layers if isinstance(module, _Supermask)}
