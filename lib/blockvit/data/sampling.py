"""Which pictures an epoch takes, in what order, and which of them each process takes.

An epoch is one list of positions, the same for any number of processes. Training asks for the whole list and deals each
global batch out itself (``train.batches``). For a ``DataLoader`` of one's own, process r of W takes the positions r,
r + W, r + 2W, ...: the k-th batches of all processes together are the k-th batch of a single process that takes W times
as many pictures a step. No position is taken twice, and each brings the seed of its own augmentation, so that what is
drawn depends neither on the number of processes nor on that of data-loading workers.
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
    """One use of a picture in training: ``index`` says which picture, ``seed`` how it is augmented."""

    index: int
    seed: int


class OrderSampler(Sampler[Draw]):
    """The pictures of an epoch in random order, each once; one process's share of them.

    What is left over when the pictures are dealt out to the processes is left out, so that all have equally many.

    Args:
        num_pictures: how many there are.
        seed: of all epochs.
        rank: this process, from 0.
        world_size: number of processes.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, num_pictures: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        _check_rank(rank, world_size)
        if num_pictures < world_size:
            raise ValueError(f"{num_pictures} pictures cannot be dealt out to {world_size} processes")
        self.num_pictures, self.seed, self.rank, self.world_size = num_pictures, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration is of."""
        self.epoch = epoch

    def indices(self) -> Tensor:
        """This process's pictures in order, int64 ``(len(self),)``: for pictures that are augmented in batches."""
        return self._share(self._order(self._generator()))

    def __len__(self) -> int:
        """Pictures that this process takes in an epoch."""
        return self._epoch_length() // self.world_size

    def __iter__(self) -> Iterator[Draw]:
        generator = self._generator()
        indices = self._share(self._order(generator))
        seeds = self._share(torch.randint(2**62, (self._epoch_length(),), generator=generator))
        return map(Draw, indices.tolist(), seeds.tolist())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))

    def _epoch_length(self) -> int:
        return self.num_pictures

    def _order(self, generator: torch.Generator) -> Tensor:
        """The pictures of the whole epoch, all processes'."""
        return torch.randperm(self.num_pictures, generator=generator)

    def _share(self, positions: Tensor) -> Tensor:
        return positions[self.rank :: self.world_size][: len(self)]


class RepeatedAugSampler(OrderSampler):
    """Repeated augmentation: a picture comes ``repeats`` times in a row, so that a step sees it augmented differently.

    An epoch is as long as one without repeats and so takes only every ``repeats``-th picture. As in torchvision's
    reference, its length is cut to a multiple of 256 pictures; a set smaller than that is taken whole (the reference
    would take none of it).

    Source: Hoffer et al., "Augment Your Batch" (CVPR 2020); ``RASampler`` of DeiT and of torchvision's references.

    Args:
        num_pictures: how many there are.
        repeats: how often a picture comes in an epoch that takes it; the last one taken may come less often.
        seed: of all epochs.
        rank: this process, from 0.
        world_size: number of processes.
    """

    def __init__(
        self, num_pictures: int, *, repeats: int = 3, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(num_pictures, seed=seed, rank=rank, world_size=world_size)
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; expected how often a picture is to come, at least 1")
        self.repeats = repeats

    def _epoch_length(self) -> int:
        return self.num_pictures // RA_LENGTH_MULTIPLE * RA_LENGTH_MULTIPLE or self.num_pictures

    def _order(self, generator: torch.Generator) -> Tensor:
        length = self._epoch_length()
        pictures = super()._order(generator)[: -(-length // self.repeats)]
        return pictures.repeat_interleave(self.repeats)[:length]


class DrawnPictures(Dataset):
    """Pictures asked for by ``Draw``: what their transforms draw from torch's CPU generator comes from its seed."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __getitem__(self, draw: Draw) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.seed)
            return self.images[draw.index]


def eval_indices(num_pictures: int, *, rank: int = 0, world_size: int = 1) -> range:
    """One process's pictures to evaluate: every picture is some process's once, none is padded, shares may differ."""
    _check_rank(rank, world_size)
    return range(rank, num_pictures, world_size)


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's randomness."""
    # SeedSequence, because seed + epoch would give run 0's epoch 1 and run 1's epoch 0 the same order.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])


def _check_rank(rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of world size {world_size}; expected a rank from 0 to world_size - 1")
