"""Which images a step sees, and what chance does to them: the same however many processes share the step.

Everything random about an image hangs on the recipe's seed, the epoch, and the image's place in the epoch's order;
never on the process or the worker that handles it. A global batch is cut into equal passes, one or more for each
process; mixup and cutmix pair neighbours in groups of the global batch, so a pass that begins within a group takes the
image before it along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from ..data import ImageFiles, Images, ImageTensors, normalize
from ..data.sampling import Draw, DrawnImages, OrderSampler, RepeatedAugSampler
from .augment import Draws, augment
from .processes import Alone
from .recipe import Recipe

LARGEST_PASS = 512
"""Images of a forward pass unless the caller says otherwise: torchvision's ViT-B/16 recipe on a GPU of 80 GB."""

MIX_GROUP = 512
"""Images that share a draw of mixup or cutmix: a batch of one process in torchvision's recipe."""

AUGMENT_AHEAD = 8192
"""Images held in memory that are augmented in one go: enough that the host launches little, few enough to store."""

Batch = tuple[Tensor, Tensor]  # normalised images (N, 3, S, S), and labels (N,) or, if mixed, (N, classes)


class Chance(IntEnum):
    """What a seed is for. From 1, and always with the same numbers after it: SeedSequence ignores zeros at the end."""

    AUGMENTATION = 1
    MIXING = 2
    MODEL = 3


def seed_of(chance: Chance, *numbers: int) -> int:
    """A seed for what these numbers name together: the recipe's seed, the epoch, ..."""
    return int(np.random.SeedSequence((chance, *numbers)).generate_state(1, np.uint64)[0])


def order_of(count: int, recipe: Recipe, epoch: int) -> OrderSampler:
    """The order in which an epoch (from 0) goes through ``count`` training images."""
    if recipe.ra_sampler:
        sampler = RepeatedAugSampler(count, repeats=recipe.ra_reps, seed=recipe.seed)
    else:
        sampler = OrderSampler(count, seed=recipe.seed)
    sampler.set_epoch(epoch)
    return sampler


def steps_per_epoch(count: int, recipe: Recipe) -> int:
    """Steps that an epoch of ``count`` training images has."""
    return len(order_of(count, recipe, 0)) // recipe.batch_size


def epoch_order(count: int, recipe: Recipe, epoch: int) -> Tensor:
    """Indices into ``count`` training images, ``(steps, batch_size)``: what each step of an epoch (from 0) sees."""
    indices = order_of(count, recipe, epoch).indices()
    return indices[: len(indices) // recipe.batch_size * recipe.batch_size].view(-1, recipe.batch_size)


def accumulation(batch_size: int, processes: int, accumulate: int | None = None) -> int:
    """Forward passes of each process in a step: as given, or the fewest of at most ``LARGEST_PASS`` images.

    Raises:
        ValueError: ``batch_size`` cannot be cut into equal passes.
    """
    if accumulate is None:
        fewest = max(1, math.ceil(batch_size / (LARGEST_PASS * processes)))
        candidates = range(fewest, batch_size // processes + 1)
    else:
        candidates = [accumulate]
    for passes_each in candidates:
        if passes_each >= 1 and batch_size % (processes * passes_each) == 0:
            return passes_each
    raise ValueError(
        f"batch_size is {batch_size} for {processes} processes"
        + ("" if accumulate is None else f" with accumulate={accumulate}")
        + "; expected a multiple of processes times passes, because it is that of all together. Change one of them "
        "(and lr with batch_size)"
    )


@dataclass(frozen=True)
class Piece:
    """What a pass holds of a group that is mixed: where its rows lie in the pass, and whether the first is borrowed."""

    group: int
    rows: slice
    borrowed: bool


@dataclass(frozen=True)
class Pass:
    """What a forward pass takes of a global batch.

    Attributes:
        rows: places in the global batch, those of borrowed images included.
        pieces: what is mixed; empty for no mixing.
    """

    rows: Tensor
    pieces: tuple[Piece, ...]


def passes(recipe: Recipe, processes: Alone, accumulate: int) -> list[Pass]:
    """The passes of this process in any step."""
    size = recipe.batch_size // (processes.count * accumulate)
    first = processes.rank * accumulate * size
    places = torch.arange(recipe.batch_size)
    if recipe.ra_sampler:
        # Copies of an image far apart: mixing pairs neighbours, and an image with itself is no mixture.
        places = torch.cat([places[copy :: recipe.ra_reps] for copy in range(recipe.ra_reps)])
    parts = [_pass(start, start + size, recipe) for start in range(first, first + accumulate * size, size)]
    return [replace(part, rows=places[part.rows]) for part in parts]


def _pass(start: int, stop: int, recipe: Recipe) -> Pass:
    if not (recipe.mixup_alpha or recipe.cutmix_alpha):
        return Pass(torch.arange(start, stop), ())
    rows, pieces = [], []
    for group in range(start // MIX_GROUP, (stop - 1) // MIX_GROUP + 1):
        low, high = group * MIX_GROUP, min((group + 1) * MIX_GROUP, recipe.batch_size)
        inside = list(range(max(low, start), min(high, stop)))
        borrowed = len(inside) < high - low
        if borrowed:  # mixing pairs each image with the one before it, the group's first with its last
            inside.insert(0, inside[0] - 1 if inside[0] > low else high - 1)
        pieces.append(Piece(group, slice(len(rows), len(rows) + len(inside)), borrowed))
        rows += inside
    return Pass(torch.tensor(rows), tuple(pieces))


def mixing(recipe: Recipe, num_classes: int) -> nn.Module | None:
    """Mixup and cutmix as the recipe says, for a batch and its labels; ``None`` for neither."""
    alphas = ((v2.MixUp, recipe.mixup_alpha), (v2.CutMix, recipe.cutmix_alpha))
    choices = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in alphas if alpha > 0]
    return v2.RandomChoice(choices) if choices else None


def batches(
    images: Images, num_classes: int, recipe: Recipe, epoch: int, processes: Alone, accumulate: int, num_workers: int
) -> Iterator[Batch]:
    """This process's passes through an epoch (from 0), ready for the model: ``accumulate`` of them for each step."""
    own = passes(recipe, processes, accumulate)
    mix = mixing(recipe, num_classes)
    if isinstance(images, ImageTensors):
        parts = _held(images, own, recipe, epoch)
    else:
        parts = _decoded(images, own, recipe, epoch, processes.device, num_workers)
    for number, (batch, labels) in enumerate(parts):
        step, part = divmod(number, accumulate)
        if mix is None:
            yield batch, labels
        else:
            yield _mixed(batch, labels, own[part], mix, (recipe.seed, epoch, step))


def _mixed(images: Tensor, labels: Tensor, part: Pass, mix: nn.Module, when: tuple[int, ...]) -> Batch:
    mixed = []
    for piece in part.pieces:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(Chance.MIXING, *when, piece.group))
            both = mix(images[piece.rows], labels[piece.rows])
        mixed.append([kept[1:] for kept in both] if piece.borrowed else both)
    return tuple(torch.cat(kept) for kept in zip(*mixed, strict=True))


def _held(images: ImageTensors, own: list[Pass], recipe: Recipe, epoch: int) -> Iterator[Batch]:
    """Passes over images in memory, on their device: augmented many passes at a time."""
    order = epoch_order(len(images), recipe, epoch)
    generator = torch.Generator().manual_seed(seed_of(Chance.AUGMENTATION, recipe.seed, epoch))
    draws = Draws.make(order.numel(), recipe, generator)
    index = order.flatten().to(images.images.device)
    places = [step * recipe.batch_size + part.rows for step in range(len(order)) for part in own]
    ahead = max(1, AUGMENT_AHEAD // len(own[0].rows))
    for first in range(0, len(places), ahead):
        some = places[first : first + ahead]
        rows = torch.cat(some)
        batch, labels = images[index[rows.to(index.device)]]
        batch = normalize(augment(batch, draws[rows], recipe), images.mean, images.std)
        sizes = [len(place) for place in some]
        yield from zip(batch.split(sizes), labels.split(sizes), strict=True)


def _decoded(
    images: ImageFiles, own: list[Pass], recipe: Recipe, epoch: int, device: torch.device, num_workers: int
) -> Iterator[Batch]:
    """Passes over images that workers decode."""

    def draws() -> Iterator[list[Draw]]:
        order = iter(order_of(len(images), recipe, epoch))
        for _ in range(steps_per_epoch(len(images), recipe)):
            batch = list(islice(order, recipe.batch_size))
            for part in own:
                yield [batch[row] for row in part.rows.tolist()]

    loader: Iterable[Batch] = DataLoader(
        DrawnImages(images), batch_sampler=draws(), num_workers=num_workers, pin_memory=device.type == "cuda"
    )
    for batch, labels in loader:
        batch, labels = (part.to(device, non_blocking=True) for part in (batch, labels))
        yield normalize(batch, images.mean, images.std), labels
