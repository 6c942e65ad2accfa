"""Images of a data set, as uint8: held in memory, or decoded from files when they are asked for.

An image that cannot be decoded stops nothing and is never passed over in silence. In training the next one in the list
is taken instead, nearly always of the same class, so that batches stay full; in evaluation it bears the label
``DAMAGED``, to be counted neither right nor wrong. ``damage_report`` tells which they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .decode import UndecodableError, decode

Channels = tuple[float, float, float]

NAMED = 3  # of the images that a report counts
DAMAGED = -1
"""The label of an image that cannot be decoded, where it is not exchanged for another."""
MAX_SUBSTITUTES = 16
"""So many images in a row that cannot be decoded are no damaged files but a damaged disk, or a lost mount."""


@dataclass(frozen=True, eq=False)
class ImageTensors(Dataset):
    """Images held in memory.

    Attributes:
        images: uint8 ``(N, 3, S, S)``.
        labels: int64 ``(N,)``.
        mean, std: of each channel, in [0, 1], for ``normalize``.
    """

    images: Tensor
    labels: Tensor
    mean: Channels
    std: Channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """Images and labels at ``index``: an integer, a slice or a tensor of indices."""
        return self.images[index], self.labels[index]

    def to(self, device: torch.device | str) -> ImageTensors:
        """The same images on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset):
    """Images decoded from files when asked for.

    Attributes:
        samples: path and label of each image.
        transform: from a PIL image to a uint8 tensor ``(3, S, S)``; see ``train_transform``, ``eval_transform``.
        mean, std: of each channel, in [0, 1], for ``normalize``.
        substitute: give the next image in the list for one that cannot be decoded, as training wants it; else a
            black one with the label ``DAMAGED``.
        damaged: bool ``(N,)``, which images were asked for and could not be decoded. The copies that ``replace``
            makes and the processes of a ``DataLoader`` all write into this one.
    """

    samples: list[tuple[str, int]]
    transform: Callable[[Any], Tensor]
    mean: Channels
    std: Channels
    substitute: bool = False
    damaged: Tensor = None  # type: ignore[assignment]  # made below

    def __post_init__(self) -> None:
        if self.damaged is None:
            object.__setattr__(self, "damaged", torch.zeros(len(self), dtype=torch.bool).share_memory_())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The transformed image at ``index`` and its label; for one that cannot be decoded, see ``substitute``.

        Raises:
            UndecodableError: it has to be substituted, and none of the next ``MAX_SUBSTITUTES`` can be decoded either.
        """
        for place in range(index, index + 1 + MAX_SUBSTITUTES * self.substitute):
            path, label = self.samples[place % len(self)]
            try:
                image = decode(path)
            except UndecodableError as error:
                self.damaged[place % len(self)] = True
                found = error
            else:
                return self.transform(image), label
        if self.substitute:
            raise UndecodableError(
                f"{self.samples[index][0]} and the {MAX_SUBSTITUTES} images after it cannot be decoded; check the "
                f"disk or mount that they are on. The last one: {found}"
            )
        return self.transform(Image.new("RGB", (1, 1))), DAMAGED


Images = ImageTensors | ImageFiles


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """From uint8 ``(N, 3, S, S)`` to floats with zero mean and unit variance over the data set, on the same device."""
    return (images - _of_channels(mean, images.device)) / _of_channels(std, images.device)


@lru_cache(maxsize=32)  # because making a tensor on a GPU waits for all that was launched there
def _of_channels(values: Channels, device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(3, 1, 1) * 255


def damage_report(images: ImageFiles) -> str | None:
    """A sentence on the images that could not be decoded so far: how many, the first ones and why; None if none."""
    places = images.damaged.nonzero().flatten().tolist()
    if not places:
        return None
    fate = "others were taken in their place" if images.substitute else "they count neither right nor wrong"
    first = [_complaint(images.samples[place][0]) for place in places[:NAMED]]
    return damage_text(len(images), first, fate, count=len(places))


def warn_of_damage(images: Images) -> None:
    """Warn with ``damage_report``, if there is something to report; Python shows the same warning only once."""
    report = damage_report(images) if isinstance(images, ImageFiles) else None
    if report:
        warnings.warn(report, stacklevel=2)


def damage_text(total: int, complaints: list[str], fate: str, *, count: int | None = None) -> str:
    """The sentence of ``damage_report``, of ``count`` images (None: as many as ``complaints``) out of ``total``."""
    count = len(complaints) if count is None else count
    more = ", ..." if count > NAMED else ""
    return (
        f"{count} of {total} images cannot be decoded; {fate}: {', '.join(complaints[:NAMED])}{more}. Replace or "
        "remove the files"
    )


def _complaint(path: str) -> str:
    try:
        decode(path)
    except UndecodableError as error:
        return f"{path} ({error.__cause__})"
    return f"{path} (it can be decoded by now)"
