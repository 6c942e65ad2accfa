"""Training: the recipe of torchvision's reference (its names too), one loop, checkpoints that resume bit for bit.

All randomness of an epoch (order, augmentation, mixing, dropout) is drawn from a generator seeded by the recipe's seed
and the epoch's number. So a run that was killed and resumed does what an uninterrupted one does, and a checkpoint,
written after each epoch, needs no generator states.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from .data import DataSplits, Images, ImageTensors, normalize, save_atomically, train_transform
from .models import unknown_name

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
EMBEDDINGS = ("class_token", "pos_embedding")  # torchvision's names

RA_GROUP = 16  # pictures that share a draw of RandAugment: one draw a picture costs more than training a small model
LOSS_CHECK_STEPS = 16  # looking at the loss waits for the GPU, so not at every step


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another run."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the last checkpoint is as it was."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; plain values, named as in torchvision's reference.

    Attributes:
        epochs: passes over the training pictures.
        batch_size: pictures in a step; the last, smaller batch of an epoch is left out.
        lr: peak learning rate of AdamW.
        weight_decay: of weights, and of what the next four do not say otherwise (``None``).
        norm_weight_decay: of normalisation layers.
        bias_weight_decay: of biases.
        transformer_embedding_decay: of the class token and the position embedding.
        scores_weight_decay: of supermask scores.
        scores_lr: peak learning rate of supermask scores; ``None``: ``lr``.
        lr_warmup_epochs: linear warm-up from ``lr_warmup_decay * lr``; then a cosine down to ``lr_min``.
        lr_warmup_decay: fraction of ``lr`` to start from.
        lr_min: learning rate at the end.
        label_smoothing: in [0, 1).
        mixup_alpha: 0 for no mixup; with cutmix too, each batch takes one of them by chance.
        cutmix_alpha: 0 for no cutmix.
        auto_augment: ``"ra"`` for RandAugment, or ``None``.
        ra_magnitude: of RandAugment, 0 to 30.
        hflip: mirror every other picture.
        random_crop_padding: shift small pictures (``ImageTensors``) by up to so many pixels; large ones
            (``ImageFiles``) are cropped by ``RandomResizedCrop`` instead.
        clip_grad_norm: largest norm of the gradient; ``None``: no limit.
        model_ema: keep an exponential moving average of the weights; it is what is evaluated and returned.
        model_ema_steps: steps between two updates of it.
        model_ema_decay: as in the reference, for one update a step and one epoch; ``ema_decay`` scales it.
        amp: automatic mixed precision.
        amp_dtype: ``"bf16"``, or ``"fp16"`` with a gradient scaler.
        seed: of all randomness in training; the initial weights are the caller's.

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
    hflip: bool = False
    random_crop_padding: int = 0
    clip_grad_norm: float | None = None
    model_ema: bool = False
    model_ema_steps: int = 32
    model_ema_decay: float = 0.99998
    amp: bool = False
    amp_dtype: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "model_ema_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "scores_lr", "clip_grad_norm"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "a positive number")
        for name in ("lr_min", "mixup_alpha", "cutmix_alpha", "random_crop_padding", "seed", *self._decays()):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < math.inf, "0 or more")
        for name in ("label_smoothing", "model_ema_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._require("lr_warmup_decay", 0 < self.lr_warmup_decay <= 1, "a number in (0, 1]")
        self._require(
            "lr_warmup_epochs", 0 <= self.lr_warmup_epochs < self.epochs, f"0 to epochs - 1 ({self.epochs - 1})"
        )
        self._require("lr_min", self.lr_min <= self.lr, f"at most lr ({self.lr})")
        self._require("auto_augment", self.auto_augment in ("ra", None), "'ra' or None")
        self._require("ra_magnitude", 0 <= self.ra_magnitude <= 30, "0 to 30")
        self._require("amp_dtype", self.amp_dtype in AMP_DTYPES, " or ".join(map(repr, AMP_DTYPES)))

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"recipe: {name} is {getattr(self, name)!r}; expected {expected}")

    @staticmethod
    def _decays() -> tuple[str, ...]:
        groups = ("norm_weight_decay", "bias_weight_decay", "transformer_embedding_decay", "scores_weight_decay")
        return ("weight_decay", *groups)


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
    # torchvision's vit_b_16. Its learning rate belongs to a global batch of 4096: eight processes of 512.
    "imagenet": Recipe(
        epochs=300,
        batch_size=512,
        lr=0.003,
        weight_decay=0.3,
        lr_warmup_epochs=30,
        lr_warmup_decay=0.033,
        label_smoothing=0.11,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        auto_augment="ra",
        hflip=True,
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


@dataclass
class History:
    """What happened in each epoch.

    Attributes:
        epochs: one record an epoch, ready for ``pandas.DataFrame``: ``epoch`` (from 1), ``train_loss`` (smoothed and
            mixed, as trained on), ``test_loss`` and ``test_top1`` (``None`` where not evaluated), ``lr`` (at the
            epoch's end), ``seconds`` (training and evaluation).
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Test accuracy at the end, in [0, 1]."""
        return self.epochs[-1]["test_top1"]

    @property
    def seconds(self) -> float:
        """Time of all epochs, those before an interruption included."""
        return sum(epoch["seconds"] for epoch in self.epochs)


def fit(
    model: nn.Module,
    data: DataSplits,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    eval_every: int = 1,
    progress: bool = True,
    num_workers: int = 0,
    stop: Callable[[History], bool] | None = None,
) -> History:
    """Train ``model`` in place.

    The caller's random state is left as it was; the initial weights are the caller's (``torch.manual_seed`` before
    the model is made).

    Args:
        model: takes ``(N, 3, S, S)`` floats, returns ``(N, len(data.classes))`` logits.
        data: see ``data.load``.
        recipe: see ``recipe_for``.
        device: where to train; the model and small pictures are moved there.
        checkpoint: file to keep the state in, written after each epoch. Never partial: a killed run leaves the last
            whole epoch.
        resume: continue from ``checkpoint`` if it exists. On the CPU the final weights equal those of an uninterrupted
            run bit for bit; if all epochs are done they are loaded, and nothing is trained.
        eval_every: evaluate after every so many epochs, and after the last.
        progress: show a progress bar.
        num_workers: processes that decode ``ImageFiles``.
        stop: asked before each epoch; training ends there once it returns True. The history is then shorter than the
            recipe, and a later call goes on from ``checkpoint``.

    Raises:
        ValueError: ``eval_every`` below 1, fewer training pictures than a batch, or a model of other classes.
        CheckpointError: ``checkpoint`` is damaged, or of another model, recipe or data set (the first difference is
            named).
        NonFiniteLossError: the loss became NaN or infinite (epoch, step and learning rate are named).
    """
    device = torch.device(device)
    steps = _check_run(model, data, recipe, eval_every)
    identity = {"recipe": asdict(recipe), "data": _data_identity(data), "model": _architecture(model)}
    model.to(device)
    trainer = _Trainer.make(model, recipe, device, steps, len(data.classes))
    path = None if checkpoint is None else Path(checkpoint).expanduser()
    history = _restore(path, trainer, identity) if path and resume and path.exists() else History()
    train, test = (_placed(split, device) for split in (_for_training(data, recipe), data.test))
    first = len(history.epochs)
    bar = tqdm(
        total=recipe.epochs * steps,
        initial=first * steps,
        desc="training",
        unit="step",
        disable=not progress,
        leave=False,
    )
    with torch.random.fork_rng(_cuda_devices(device)), bar:
        for epoch in range(first, recipe.epochs):
            if stop is not None and stop(history):
                break
            started = time.perf_counter()
            torch.manual_seed(_epoch_seed(recipe.seed, epoch))
            train_loss = trainer.train_epoch(epoch, _batches(train, recipe, device, num_workers), bar)
            record = {"epoch": epoch + 1, "train_loss": train_loss, "test_loss": None, "test_top1": None}
            if (epoch + 1) % eval_every == 0 or epoch + 1 == recipe.epochs:
                result = evaluate(trainer.averaged, test, device=device, num_workers=num_workers)
                record |= {"test_loss": result["loss"], "test_top1": result["top1"]}
            record |= {"lr": trainer.lr((epoch + 1) * steps - 1), "seconds": time.perf_counter() - started}
            history.epochs.append(record)
            if path:
                save_atomically({"identity": identity, "state": trainer.state_dict(), "history": history.epochs}, path)
    trainer.hand_over()
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    num_workers: int = 0,
) -> dict[str, float]:
    """Cross-entropy and accuracy of ``model`` on all ``images``: ``{"loss": mean, "top1": fraction in [0, 1]}``.

    The model is moved to ``device``, evaluated in eval mode, and put back into the mode that it was in.
    """
    if len(images) == 0:
        raise ValueError("there are no pictures to evaluate on; expected at least one")
    device = torch.device(device)
    was_training = model.training
    model.to(device).eval()
    loss = correct = torch.zeros((), device=device)
    for batch, labels in _in_order(_placed(images, device), batch_size, num_workers):
        labels = labels.to(device)
        logits = model(normalize(batch.to(device), images.mean, images.std)).float()
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        correct = correct + (logits.argmax(1) == labels).sum()
    model.train(was_training)
    return {"loss": loss.item() / len(images), "top1": correct.item() / len(images)}


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run: linear warm-up, then a cosine to ``lr_min``."""
    warmup = recipe.lr_warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (recipe.lr_warmup_decay + (1 - recipe.lr_warmup_decay) * step / warmup)
    done = (step - warmup) / (recipe.epochs * steps_per_epoch - warmup)
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * done)) / 2


def ema_decay(recipe: Recipe) -> float:
    """Decay of one update of the moving average, scaled for batch size, update interval and epochs as the reference."""
    return 1 - min(1.0, (1 - recipe.model_ema_decay) * recipe.batch_size * recipe.model_ema_steps / recipe.epochs)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW's groups for the trainable parameters: ``weights``, ``norm``, ``bias``, ``embedding`` and ``scores``.

    ``name`` says which group it is, ``peak_lr`` the learning rate that the schedule scales.
    """
    decays = {
        "weights": recipe.weight_decay,
        "norm": recipe.norm_weight_decay,
        "bias": recipe.bias_weight_decay,
        "embedding": recipe.transformer_embedding_decay,
        "scores": recipe.scores_weight_decay,
    }
    members: dict[str, dict[Tensor, None]] = {name: {} for name in decays}  # ordered, a shared parameter once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                members[_group(module, name)][parameter] = None
    return [
        {
            "name": name,
            "params": list(parameters),
            "weight_decay": recipe.weight_decay if decays[name] is None else decays[name],
            "peak_lr": (name == "scores" and recipe.scores_lr) or recipe.lr,
        }
        for name, parameters in members.items()
        if parameters
    ]


def _group(module: nn.Module, name: str) -> str:
    if name == "scores":
        return "scores"
    if isinstance(module, NORMS):
        return "norm"
    if name in EMBEDDINGS:
        return "embedding"
    return "bias" if name.endswith("bias") else "weights"


@dataclass
class _Trainer:
    """Everything that a step changes, and the step."""

    model: nn.Module
    recipe: Recipe
    device: torch.device
    steps: int  # in an epoch
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    mixing: nn.Module | None

    @classmethod
    def make(cls, model: nn.Module, recipe: Recipe, device: torch.device, steps: int, num_classes: int) -> _Trainer:
        optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp and recipe.amp_dtype == "fp16")
        average = get_ema_multi_avg_fn(ema_decay(recipe))
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if recipe.model_ema else None
        return cls(model, recipe, device, steps, optimizer, scaler, ema, _mixing(recipe, num_classes))

    def train_epoch(self, epoch: int, batches: Iterable[tuple[Tensor, Tensor]], bar: tqdm) -> float:
        """Train on ``batches``; returns the mean loss."""
        self.model.train()
        losses = torch.zeros(self.steps, device=self.device)
        for step, (images, labels) in enumerate(batches):
            losses[step] = self.step(epoch * self.steps + step, images, labels)
            bar.update()
            if (step + 1) % LOSS_CHECK_STEPS == 0 or step + 1 == self.steps:
                self.check(losses[: step + 1], epoch)
                bar.set_postfix(epoch=f"{epoch + 1}/{self.recipe.epochs}", loss=f"{losses[step].item():.3f}")
        return losses.mean().item()

    def step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """One step of AdamW, the ``step``-th of the run; returns the loss, still on the device."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step) * group["peak_lr"] / recipe.lr
        if self.mixing is not None:
            images, labels = self.mixing(images, labels)
        with torch.autocast(self.device.type, AMP_DTYPES[recipe.amp_dtype], enabled=recipe.amp):
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=recipe.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if recipe.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None and step % recipe.model_ema_steps == 0:
            self.update_ema(warming_up=step < recipe.lr_warmup_epochs * self.steps)
        return loss.detach()

    def update_ema(self, warming_up: bool) -> None:
        self.ema.update_parameters(self.model)
        if warming_up:  # as the reference: until then the average is a copy, weights from the start do not count
            self.ema.n_averaged.zero_()

    def lr(self, step: int) -> float:
        return learning_rate(self.recipe, step, self.steps)

    def check(self, losses: Tensor, epoch: int) -> None:
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            raise NonFiniteLossError(
                f"the loss became {losses[step].item()} in epoch {epoch + 1}, step {step + 1} of {self.steps}, at "
                f"learning rate {self.lr(epoch * self.steps + step):.3g}; expected a finite number. Lower lr, warm up "
                "longer (lr_warmup_epochs) or set clip_grad_norm; a checkpoint keeps the last whole epoch"
            )

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate."""
        return self.model if self.ema is None else self.ema.module

    def hand_over(self) -> None:
        """Put the averaged weights into the caller's model."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "ema": self.ema}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def _mixing(recipe: Recipe, num_classes: int) -> nn.Module | None:
    alphas = ((v2.MixUp, recipe.mixup_alpha), (v2.CutMix, recipe.cutmix_alpha))
    choices = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in alphas if alpha > 0]
    return v2.RandomChoice(choices) if choices else None


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Shift, mirror and RandAugment a batch of small pictures, uint8 ``(N, 3, S, S)``, as ``recipe`` says."""
    if recipe.random_crop_padding:
        images = _random_shift(images, recipe.random_crop_padding)
    if recipe.hflip:
        mirrored = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
        images = torch.where(mirrored, images.flip(3), images)
    if recipe.auto_augment == "ra":
        randomly = v2.RandAugment(magnitude=recipe.ra_magnitude, interpolation=InterpolationMode.BILINEAR)
        images = torch.cat([randomly(group) for group in images.split(RA_GROUP)])
    return images


def _random_shift(images: Tensor, padding: int) -> Tensor:
    """Crop each picture at its own place out of its zero-padded self: one gather for the whole batch."""
    n, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, n, 1)).unbind()
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    index = (
        torch.arange(n).view(-1, 1, 1, 1),
        torch.arange(channels).view(-1, 1, 1),
        rows.view(n, 1, -1, 1),
        columns.view(n, 1, 1, -1),
    )
    return F.pad(images, (padding,) * 4)[tuple(i.to(images.device) for i in index)]


def _batches(images: Images, recipe: Recipe, device: torch.device, num_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The normalised batches of one epoch, in random order, on ``device``."""
    if isinstance(images, ImageTensors):
        order = torch.randperm(len(images)).split(recipe.batch_size)
        whole = (index.to(device) for index in order if len(index) == recipe.batch_size)
        batches = ((augment(images.images[index], recipe), images.labels[index]) for index in whole)
    else:
        # New workers each epoch: those of a persistent loader carry random states that a checkpoint cannot hold.
        pin = device.type == "cuda"
        batches = DataLoader(
            images, recipe.batch_size, shuffle=True, drop_last=True, num_workers=num_workers, pin_memory=pin
        )
    for pictures, labels in batches:
        pictures, labels = (part.to(device, non_blocking=True) for part in (pictures, labels))
        yield normalize(pictures, images.mean, images.std), labels


def _in_order(images: Images, batch_size: int, num_workers: int) -> Iterable[tuple[Tensor, Tensor]]:
    if isinstance(images, ImageTensors):
        return zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True)
    return DataLoader(images, batch_size, num_workers=num_workers)


def _placed(images: Images, device: torch.device) -> Images:
    return images.to(device) if isinstance(images, ImageTensors) else images


def _for_training(data: DataSplits, recipe: Recipe) -> Images:
    if isinstance(data.train, ImageTensors):
        return data.train  # augmented in batches
    transform = train_transform(
        data.image_size, hflip=recipe.hflip, auto_augment=recipe.auto_augment, ra_magnitude=recipe.ra_magnitude
    )
    return replace(data.train, transform=transform)


def _check_run(model: nn.Module, data: DataSplits, recipe: Recipe, eval_every: int) -> int:
    """Steps in an epoch; raises ``ValueError`` if ``model``, ``data`` and ``recipe`` do not go together."""
    if eval_every < 1:
        raise ValueError(f"eval_every is {eval_every}; expected a number of epochs, at least 1")
    if len(data.train) < recipe.batch_size:
        raise ValueError(
            f"{data.name} has {len(data.train)} training pictures, fewer than one batch of {recipe.batch_size}; "
            "choose a smaller batch_size"
        )
    outputs = getattr(model, "num_classes", len(data.classes))
    if outputs != len(data.classes):
        raise ValueError(
            f"the model has {outputs} classes, {data.name} has {len(data.classes)}; make the model with "
            f"num_classes={len(data.classes)}"
        )
    return len(data.train) // recipe.batch_size


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _epoch_seed(seed: int, epoch: int) -> int:
    # SeedSequence, because seed + epoch would give run 0's epoch 1 and run 1's epoch 0 the same order.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])


def _data_identity(data: DataSplits) -> dict[str, Any]:
    return {
        "name": data.name,
        "training pictures": len(data.train),
        "classes": ", ".join(data.classes),
        "image_size": data.image_size,
    }


def _architecture(model: nn.Module) -> dict[str, str]:
    """What makes up a model, by name: each module with its settings (sparsity and block size too), each parameter."""
    modules = {name or "(model)": f"{type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules()}
    return modules | {name: f"{p.dtype} {tuple(p.shape)}" for name, p in model.named_parameters()}


def _restore(path: Path, trainer: _Trainer, identity: dict[str, Any]) -> History:
    """Load a checkpoint of this very run into ``trainer``; returns its history."""
    with path.open("rb") as file:  # outside the try: a file that may not be opened is not a damaged one
        saved = _read(file, path)
    _check_same_run(path, saved["identity"], identity)
    trainer.load_state_dict(saved["state"])
    return History(saved["history"])


def _read(file: BinaryIO, path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("identity", "state", "history")}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is truncated or no checkpoint of this library ({type(error).__name__}: {error}); delete it, or "
            "pass resume=False, to train from the start"
        ) from error


def _check_same_run(path: Path, known: dict[str, Any], identity: dict[str, Any]) -> None:
    for kind, now in identity.items():
        then = known[kind]
        for name in now | then:
            if now.get(name) != then.get(name):
                raise CheckpointError(
                    f"{path} belongs to another run: {kind}: {name} is {then.get(name)!r} there and {now.get(name)!r} "
                    "here; pass another checkpoint path, resume=False to overwrite it, or what it was trained with"
                )
