"""Which images an epoch takes, and in what order.

An epoch is one list of positions, the same for any number of processes: ``train.batches`` deals each global batch out.
Each position brings the seed of its own augmentation, so that what is drawn depends neither on the number of processes
nor on that of data-loading workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

RA_LENGTH_MULTIPLE = 256  # the reference cuts an epoch with repeats to a multiple of this


class Draw(NamedTuple):
    """One use of an image in training: ``index`` says which image, ``seed`` how it is augmented."""

    index: int
    seed: int


class OrderSampler(Sampler[Draw]):
    """The images of an epoch in random order, each once.

    Args:
        num_images: how many there are.
        seed: of all epochs.
    """

    def __init__(self, num_images: int, *, seed: int = 0) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration is of."""
        self.epoch = epoch

    def indices(self) -> Tensor:
        """The images in order, int64 ``(len(self),)``: for images that are augmented in batches."""
        return self._order(self._generator())

    def __len__(self) -> int:
        """Images that an epoch takes."""
        return self.num_images

    def __iter__(self) -> Iterator[Draw]:
        generator = self._generator()
        indices = self._order(generator)
        seeds = torch.randint(2**62, (len(self),), generator=generator)
        return map(Draw, indices.tolist(), seeds.tolist())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))

    def _order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.num_images, generator=generator)


class RepeatedAugSampler(OrderSampler):
    """Repeated augmentation: an image comes ``repeats`` times in a row, so that a step sees it augmented differently.

    An epoch is as long as one without repeats and so takes only every ``repeats``-th image. As in torchvision's
    reference, its length is cut to a multiple of 256 images; a set smaller than that is taken whole (the reference
    would take none of it).

    Source: Hoffer et al., "Augment Your Batch" (CVPR 2020); ``RASampler`` of DeiT and of torchvision's references.

    Args:
        num_images: how many there are.
        repeats: how often an image comes in an epoch that takes it; the last one taken may come less often.
        seed: of all epochs.

    Raises:
        ValueError: ``repeats`` is less than 1.
    """

    def __init__(self, num_images: int, *, repeats: int = 3, seed: int = 0) -> None:
        super().__init__(num_images, seed=seed)
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; expected how often an image is to come, at least 1")
        self.repeats = repeats

    def __len__(self) -> int:
        """Images that an epoch takes, repeats counted."""
        return self.num_images // RA_LENGTH_MULTIPLE * RA_LENGTH_MULTIPLE or self.num_images

    def _order(self, generator: torch.Generator) -> Tensor:
        images = super()._order(generator)[: -(-len(self) // self.repeats)]
        return images.repeat_interleave(self.repeats)[: len(self)]


class DrawnImages(Dataset):
    """Images asked for by ``Draw``: what their transforms draw from torch's CPU generator comes from its seed."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __getitem__(self, draw: Draw) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.seed)
            return self.images[draw.index]


def eval_indices(num_images: int, *, rank: int = 0, world_size: int = 1) -> range:
    """One process's images to evaluate: every image is some process's once, none is padded, shares may differ."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of world size {world_size}; expected a rank from 0 to world_size - 1")
    return range(rank, num_images, world_size)


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's randomness."""
    # SeedSequence, because seed + epoch would give run 0's epoch 1 and run 1's epoch 0 the same order.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
