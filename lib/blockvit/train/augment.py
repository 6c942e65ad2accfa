"""Augmentation of small images where they lie: every image its own draw, every operation one call for many.

Draws are made apart from their use, for the images of a whole epoch, so that each of several processes can apply
those of its own images, and that the device gets a few large calls instead of many small ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from .recipe import Recipe


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment for a batch, with an operation and a direction of its own for each image."""

    def __init__(self, magnitude: int) -> None:
        super().__init__(magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Operations and whether each one's magnitude is negative, ``(count, num_ops)``."""
        size = (count, self.num_ops)
        operations = torch.randint(len(self._AUGMENTATION_SPACE), size, generator=generator)
        return operations, torch.rand(size, generator=generator) <= 0.5

    def forward(self, images: Tensor, operations: Tensor, negative: Tensor) -> Tensor:
        """``images``: uint8 ``(N, 3, S, S)``; the draws lie on the CPU."""
        for layer in range(self.num_ops):
            # Sorted by what is done to them, the images of an operation are a slice: one gather there, one back.
            kinds = 2 * operations[:, layer] + negative[:, layer]
            order = kinds.argsort(stable=True)
            counts = kinds.bincount(minlength=2 * len(self._AUGMENTATION_SPACE)).tolist()
            sorted_images = images[_moved(order, images)].split(counts)
            done = [self._apply(part, *divmod(kind, 2)) for kind, part in enumerate(sorted_images) if len(part)]
            images = torch.cat(done)[_moved(order.argsort(), images)]
        return images

    def _apply(self, images: Tensor, operation: int, negative: int) -> Tensor:
        name = list(self._AUGMENTATION_SPACE)[operation]
        magnitudes_of, signed = self._AUGMENTATION_SPACE[name]
        magnitudes = magnitudes_of(self.num_magnitude_bins, *images.shape[-2:])
        magnitude = 0.0 if magnitudes is None else float(magnitudes[self.magnitude])
        if signed and negative:
            magnitude = -magnitude
        return self._apply_image_or_video_transform(
            images, name, magnitude, interpolation=self.interpolation, fill=self._fill
        )


@dataclass(frozen=True)
class Draws:
    """What chance does to each of N images; ``None``: the recipe leaves it out.

    Attributes:
        shift: row and column that the crop begins at, ``(N, 2)``.
        mirrored: ``(N,)``.
        operations, negative: RandAugment's, ``(N, num_ops)``.
    """

    shift: Tensor | None = None
    mirrored: Tensor | None = None
    operations: Tensor | None = None
    negative: Tensor | None = None

    @classmethod
    def make(cls, count: int, recipe: Recipe, generator: torch.Generator) -> Draws:
        """Draw for ``count`` images."""
        shift = mirrored = operations = negative = None
        if recipe.random_crop_padding:
            shift = torch.randint(2 * recipe.random_crop_padding + 1, (count, 2), generator=generator)
        if recipe.hflip:
            mirrored = torch.rand(count, generator=generator) < 0.5
        if recipe.auto_augment == "ra":
            operations, negative = RandAugment(recipe.ra_magnitude).draw(count, generator)
        return cls(shift, mirrored, operations, negative)

    def __getitem__(self, rows: Tensor) -> Draws:
        return Draws(*(None if part is None else part[rows] for part in vars(self).values()))


def augment(images: Tensor, draws: Draws, recipe: Recipe) -> Tensor:
    """Shift, mirror and RandAugment small images, uint8 ``(N, 3, S, S)`` on any device, as drawn for each."""
    if draws.shift is not None:
        images = _shifted(images, draws.shift, recipe.random_crop_padding)
    if draws.mirrored is not None:
        images = torch.where(_moved(draws.mirrored, images).view(-1, 1, 1, 1), images.flip(3), images)
    if draws.operations is not None:
        images = RandAugment(recipe.ra_magnitude)(images, draws.operations, draws.negative)
    return images


def _shifted(images: Tensor, shift: Tensor, padding: int) -> Tensor:
    """Crop each image at its own place out of its zero-padded self: one gather for the whole batch."""
    n, channels, height, width = images.shape
    device = images.device
    top, left = _moved(shift, images).view(n, 2, 1).unbind(1)
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    index = (
        torch.arange(n, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(-1, 1, 1),
        rows.view(n, 1, -1, 1),
        columns.view(n, 1, 1, -1),
    )
    return F.pad(images, (padding,) * 4)[index]


def _moved(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, non_blocking=True)
