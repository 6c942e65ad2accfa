"""Recipes: how to train on a data set, as plain values named as in torchvision's reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..models import unknown_name
from ..sparse_training import WEIGHT_GRADS

AMP_DTYPES = ("bf16", "fp16")
SPARSITY_SCHEDULES = ("constant", "cubic")

_DECAYS = (
    "weight_decay",
    "norm_weight_decay",
    "bias_weight_decay",
    "transformer_embedding_decay",
    "scores_weight_decay",
)
_SIZES = ("train_crop_size", "val_resize_size", "val_crop_size")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; plain values, named as in torchvision's reference.

    Attributes:
        epochs: passes over the training images.
        batch_size: images in a step, of all processes and accumulated passes together: what ``lr`` belongs to. The
            last, smaller batch of an epoch is left out.
        lr: peak learning rate of AdamW.
        weight_decay: decay of weights, and of each group below that has none of its own (``None``).
        norm_weight_decay: decay of normalisation layers.
        bias_weight_decay: decay of biases.
        transformer_embedding_decay: decay of the class token and the position embedding.
        scores_weight_decay: decay of supermask scores.
        scores_lr: peak learning rate of supermask scores; ``None``: ``lr``.
        lr_warmup_epochs: linear warm-up from ``lr_warmup_decay * lr``; then a cosine down to ``lr_min``.
        lr_warmup_decay: fraction of ``lr`` to start from.
        lr_min: learning rate at the end.
        label_smoothing: probability spread evenly over all classes, in [0, 1).
        mixup_alpha: 0 for no mixup; with cutmix too, each group of images (``batches.MIX_GROUP``) takes one of them
            by chance.
        cutmix_alpha: 0 for no cutmix.
        auto_augment: ``"ra"`` for RandAugment, or ``None``.
        ra_magnitude: strength of RandAugment, 0 to 30.
        ra_sampler: repeated augmentation (Hoffer et al., arXiv:1901.09335): a batch holds ``ra_reps`` differently
            augmented copies of each image; an epoch keeps its length and so sees fewer distinct images.
        ra_reps: copies of an image, for ``ra_sampler``.
        hflip: mirror every other image.
        random_crop_padding: shift small images (``ImageTensors``) by up to so many pixels; large ones
            (``ImageFiles``) are cropped by ``RandomResizedCrop`` instead.
        train_crop_size: edge length of images from files in training; ``None``: the data set's ``image_size``.
        val_resize_size: shorter side that images from files are resized to in evaluation; ``None``: 256 / 224 of
            ``val_crop_size``.
        val_crop_size: edge length of the central crop out of that; ``None``: the data set's ``image_size``.
        clip_grad_norm: largest norm of the gradient; ``None``: no limit.
        model_ema: keep an exponential moving average of the weights; it is what is evaluated and returned.
        model_ema_steps: steps between two updates of it.
        model_ema_decay: as in the reference, for one update a step and one epoch; ``ema_decay`` scales it.
        amp: automatic mixed precision.
        amp_dtype: ``"bf16"``, or ``"fp16"`` with a gradient scaler.
        sparsity_schedule: ``"constant"``: supermasks have their sparsity from the first step, as the reference;
            ``"cubic"``: it grows from 0 by the cubic ramp of Zhu and Gupta (arXiv:1710.01878).
        sparsity_start: fraction of the epochs until which the ramp stays at 0.
        sparsity_end: fraction of the epochs from which on the sparsity is whole.
        sparse_steps: train supermasks through block-sparse products, with masks that last for so many steps (see
            ``sparse_training.train_sparse``); ``None``: through masked dense weights.
        sparse_weight_grad: while a mask lasts, ``"dense"``: scores and weights learn as if all blocks were there;
            ``"kept"``: those of kept blocks alone.
        distillation_alpha: weight in [0, 1] of the teacher's answers beside the labels, which have the rest; 0: no
            teacher. Soft distillation (Hinton et al., arXiv:1503.02531), named as in DeiT.
        distillation_tau: temperature of both models' logits there.
        seed: seed of all randomness in training; the initial weights are the caller's.

    Raises:
        ValueError: a value outside its range.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    norm_weight_decay: float | None = None
    bias_weight_decay: float | None = None
    transformer_embedding_decay: float | None = None
    scores_weight_decay: float | None = None
    scores_lr: float | None = None
    lr_warmup_epochs: int = 0
    lr_warmup_decay: float = 0.01
    lr_min: float = 0.0
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    auto_augment: str | None = None
    ra_magnitude: int = 9
    ra_sampler: bool = False
    ra_reps: int = 3
    hflip: bool = False
    random_crop_padding: int = 0
    train_crop_size: int | None = None
    val_resize_size: int | None = None
    val_crop_size: int | None = None
    clip_grad_norm: float | None = None
    model_ema: bool = False
    model_ema_steps: int = 32
    model_ema_decay: float = 0.99998
    amp: bool = False
    amp_dtype: str = "bf16"
    sparsity_schedule: str = "constant"
    sparsity_start: float = 0.0
    sparsity_end: float = 0.5
    sparse_steps: int | None = None
    sparse_weight_grad: str = "dense"
    distillation_alpha: float = 0.0
    distillation_tau: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "ra_reps", "model_ema_steps", "sparse_steps", *_SIZES):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        for name in ("lr", "scores_lr", "clip_grad_norm", "distillation_tau"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "a positive number")
        for name in ("lr_min", "mixup_alpha", "cutmix_alpha", "random_crop_padding", "seed", *_DECAYS):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < math.inf, "0 or more")
        self._require("seed", self.seed < 2**63, "a number below 2**63")  # which PyTorch takes
        for name in ("label_smoothing", "model_ema_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._require("distillation_alpha", 0 <= self.distillation_alpha <= 1, "a number in [0, 1]")
        self._require("lr_warmup_decay", 0 < self.lr_warmup_decay <= 1, "a number in (0, 1]")
        self._require(
            "lr_warmup_epochs", 0 <= self.lr_warmup_epochs < self.epochs, f"0 to epochs - 1 ({self.epochs - 1})"
        )
        self._require("lr_min", self.lr_min <= self.lr, f"at most lr ({self.lr})")
        self._require("auto_augment", self.auto_augment in ("ra", None), "'ra' or None")
        self._require("ra_magnitude", 0 <= self.ra_magnitude <= 30, "0 to 30")
        choices = {
            "amp_dtype": AMP_DTYPES,
            "sparsity_schedule": SPARSITY_SCHEDULES,
            "sparse_weight_grad": WEIGHT_GRADS,
        }
        for name, known in choices.items():
            self._require(name, getattr(self, name) in known, " or ".join(map(repr, known)))
        self._require("sparsity_start", 0 <= self.sparsity_start < 1, "a fraction of the epochs in [0, 1)")
        self._require(
            "sparsity_end",
            self.sparsity_start < self.sparsity_end <= 1,
            f"a fraction of the epochs in (sparsity_start, 1], that is ({self.sparsity_start}, 1]",
        )
        if self.val_resize_size is not None and self.val_crop_size is not None:
            self._require(
                "val_resize_size",
                self.val_resize_size >= self.val_crop_size,
                f"at least val_crop_size ({self.val_crop_size})",
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"recipe: {name} is {getattr(self, name)!r}; expected {expected}")


RECIPES: dict[str, Recipe] = {
    # Few epochs, so that a study can train dozens of models on a laptop's CPU: the dense model needs six, a 90% sparse
    # one all twelve. No crops: shifted by one pixel, digits of 8 x 8 lose strokes, and a run this short loses accuracy.
    "digits": Recipe(
        epochs=12,
        batch_size=64,
        lr=1e-3,
        weight_decay=0.05,
        norm_weight_decay=0.0,
        bias_weight_decay=0.0,
        transformer_embedding_decay=0.0,
        lr_warmup_epochs=1,
        label_smoothing=0.1,
        clip_grad_norm=1.0,
    ),
    # After ViT-CIFAR (github.com/omihub777/ViT-CIFAR), with RandAugment for its AutoAugment.
    "cifar10": Recipe(
        epochs=200,
        batch_size=128,
        lr=1e-3,
        weight_decay=5e-5,
        lr_warmup_epochs=5,
        lr_min=1e-5,
        label_smoothing=0.1,
        auto_augment="ra",
        hflip=True,
        random_crop_padding=4,
    ),
    # torchvision's vit_b_16 (references/classification/README.md): there eight processes of 512 images each.
    "imagenet": Recipe(
        epochs=300,
        batch_size=4096,
        lr=0.003,
        weight_decay=0.3,
        lr_warmup_epochs=30,
        lr_warmup_decay=0.033,
        label_smoothing=0.11,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        auto_augment="ra",
        ra_sampler=True,
        hflip=True,
        train_crop_size=224,
        val_resize_size=256,
        val_crop_size=224,
        clip_grad_norm=1.0,
        model_ema=True,
        amp=True,
    ),
}


def recipe_for(name: str, **changes: Any) -> Recipe:
    """The recipe of a data set (``digits``, ``cifar10``, ``imagenet``), with ``changes`` to its fields."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, list(RECIPES))
    return replace(RECIPES[name], **changes)
