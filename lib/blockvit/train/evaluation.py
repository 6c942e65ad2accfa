"""Evaluation: every image once, however many processes share them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ..data import DAMAGED, Images, ImageTensors, normalize, warn_of_damage
from ..data.sampling import eval_indices
from .batches import Batch
from .processes import Alone


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    num_workers: int = 0,
    processes: Alone | None = None,
) -> dict[str, float]:
    """Cross-entropy and accuracy of ``model`` on ``images``: ``{"loss": mean, "top1": fraction in [0, 1], ...}``.

    The model is moved to ``device``, evaluated in eval mode, and put back into the modes that it and its parts were in.
    Several ``processes`` evaluate a part each, on their own devices, and every image counts once, also where their
    number does not divide that of the images; without them this process evaluates all.

    Loss and accuracy are of the images that can be decoded; ``damaged`` counts the others, and a warning tells which.

    Raises:
        ValueError: there is no image, or none that can be decoded.
    """
    if len(images) == 0:
        raise ValueError("there are no images to evaluate on; expected at least one")
    processes = processes or Alone(device)
    device = processes.device
    modes = {module: module.training for module in model.modules()}  # a frozen part may be in another than the model
    model.to(device).eval()
    try:
        sums = _sums(model, images, batch_size, num_workers, processes)
    finally:
        for module, mode in modes.items():
            module.training = mode
    tell_damage(images, processes)
    loss, correct, count = processes.sum(sums).tolist()
    if count == 0:
        raise ValueError(f"none of {len(images)} images can be decoded, so there is no accuracy; see the warning")
    return {"loss": loss / count, "top1": correct / count, "damaged": len(images) - int(count)}


def _sums(model: nn.Module, images: Images, batch_size: int, num_workers: int, processes: Alone) -> torch.Tensor:
    """Of the losses, of the correct answers and of the images that this process evaluates."""
    device = processes.device
    sums = torch.zeros(3, device=device)
    part = eval_indices(len(images), rank=processes.rank, world_size=processes.count)
    for batch, labels in _in_order(placed(images, device), part, batch_size, num_workers):
        labels = labels.to(device, non_blocking=True)
        logits = model(normalize(batch.to(device, non_blocking=True), images.mean, images.std)).float()
        sums[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=DAMAGED)
        sums[1] += (logits.argmax(1) == labels).sum()
        sums[2] += (labels != DAMAGED).sum()
    return sums


def placed(images: Images, device: torch.device) -> Images:
    """``images`` on ``device``, if they are held in memory."""
    return images.to(device) if isinstance(images, ImageTensors) else images


def tell_damage(images: Images, processes: Alone) -> None:
    """Let the main process warn of the images that any process could not decode."""
    if isinstance(images, ImageTensors):
        return
    anywhere = processes.sum(images.damaged.to(processes.device, torch.int32)) > 0
    images.damaged.copy_(anywhere)
    if processes.is_main:
        warn_of_damage(images)


def _in_order(images: Images, indices: range, batch_size: int, num_workers: int) -> Iterable[Batch]:
    """Batches of the images at ``indices``; uint8."""
    if isinstance(images, ImageTensors):
        starts = range(0, len(indices), batch_size)
        return (images[part.start : part.stop : part.step] for part in (indices[i : i + batch_size] for i in starts))
    return DataLoader(replace(images, substitute=False), batch_size, sampler=indices, num_workers=num_workers)
