"""What becomes of a decoded image before it is normalised: torchvision's reference presets for large images.

Their "tensor" backend: the same as on Pillow's images but for rounding, and faster.
"""

from __future__ import annotations

from typing import Any

from torchvision.transforms import InterpolationMode, v2

from ..models import unknown_name

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")  # those that a tensor can be resized with


def train_transform(
    train_crop_size: int,
    *,
    interpolation: str = "bilinear",
    hflip: bool = True,
    auto_augment: str | None = None,
    ra_magnitude: int = 9,
) -> v2.Compose:
    """torchvision's reference preset for training on large images: random crop, flip, RandAugment.

    Args:
        train_crop_size: edge length S of the crop, which ``RandomResizedCrop`` draws and scales.
        interpolation: ``"bilinear"`` (the reference's default), ``"bicubic"``, ``"nearest"`` or ``"nearest-exact"``.
        hflip: mirror every other image.
        auto_augment: ``"ra"`` for RandAugment, or ``None``.
        ra_magnitude: of RandAugment, 0 to 30.
    """
    how = _interpolation(interpolation)
    steps: list[Any] = [v2.PILToTensor(), v2.RandomResizedCrop(train_crop_size, interpolation=how, antialias=True)]
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    if auto_augment not in (None, "ra"):
        raise unknown_name("auto_augment", auto_augment, ["ra"])
    if auto_augment == "ra":
        steps.append(v2.RandAugment(magnitude=ra_magnitude, interpolation=how))
    return v2.Compose(steps)


def eval_transform(
    val_crop_size: int, val_resize_size: int | None = None, *, interpolation: str = "bilinear"
) -> v2.Compose:
    """torchvision's reference preset for evaluation: resize the shorter side, then crop centrally.

    Args:
        val_crop_size: edge length S of the crop; 224 in the recipe of vit_b_16.
        val_resize_size: of the shorter side before it; ``None``: S * 256 / 224, in that recipe 256.
        interpolation: as in ``train_transform``.

    Raises:
        ValueError: the crop is larger than what it is taken from, or an unknown interpolation.
    """
    shorter = round(val_crop_size * 256 / 224) if val_resize_size is None else val_resize_size
    if not 1 <= val_crop_size <= shorter:
        raise ValueError(
            f"val_crop_size is {val_crop_size} and val_resize_size {shorter}; expected a crop of at least 1 pixel, and "
            "no larger than the shorter side that it is taken from"
        )
    resize = v2.Resize(shorter, interpolation=_interpolation(interpolation), antialias=True)
    return v2.Compose([v2.PILToTensor(), resize, v2.CenterCrop(val_crop_size)])


def _interpolation(name: str) -> InterpolationMode:
    if name not in INTERPOLATIONS:
        raise unknown_name("interpolation", name, list(INTERPOLATIONS))
    return InterpolationMode(name)
