"""The training loop, alone or together with other processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..data import DataSplits, Images, ImageTensors, eval_transform, train_transform
from ..files import check_writable, save_atomically
from ..models import num_classes
from ..sparse_training import end_sparse, train_sparse
from ..supermask import supermask_layers
from . import resume as checkpoints
from .batches import Batch, Chance, accumulation, batches, epoch_order, seed_of, steps_per_epoch
from .evaluation import evaluate, placed, tell_damage
from .optimizer import ema_decay, parameter_groups
from .processes import Alone, join
from .recipe import Recipe
from .schedule import MaskSchedule, learning_rate

LOSS_CHECK_STEPS = 16  # looking at the loss waits for the GPU, and for the other processes, so not at every step


class NonFiniteLossError(ArithmeticError):
    """The loss or the weights became NaN or infinite; the last checkpoint is as it was.

    Attributes:
        epoch, step: where, from 0; the step within the epoch.
        lr: the learning rate there.
        images: indices into the training split of the batch that was trained on.
    """

    def __init__(self, message: str, epoch: int, step: int, lr: float, images: list[int]) -> None:
        super().__init__(message)
        self.epoch, self.step, self.lr, self.images = epoch, step, lr, images

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.epoch, self.step, self.lr, self.images)


@dataclass
class History:
    """What happened in each epoch.

    Attributes:
        epochs: one record an epoch, ready for ``pandas.DataFrame``: ``epoch`` (from 1), ``train_loss`` (smoothed and
            mixed, as trained on), ``test_loss`` and ``test_top1`` (``None`` where not evaluated), ``lr`` (at the
            epoch's end), ``seconds`` (training and evaluation), ``images_per_s`` (of all processes, evaluation left
            out), ``data_share`` (fraction of the training time that the main process spent getting its batches: at
            least what its device had to wait for them), ``processes`` and ``accumulate`` (how the epoch was cut).
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
    on_epoch: Callable[[History], None] | None = None,
    progress: bool = True,
    num_workers: int = 0,
    accumulate: int | None = None,
    compile: bool | str = False,
    stop: Callable[[History], bool] | None = None,
    teacher: nn.Module | None = None,
) -> History:
    """Train ``model`` in place.

    Called in each of several processes that ``accelerate launch`` or ``notebook_launcher`` started, with the same
    arguments, it trains one model in all of them. Their number changes the result by no more than rounding, but for
    dropout, which each process draws for itself.

    The caller's random state is left as it was; the initial weights are the caller's (``torch.manual_seed`` before
    the model is made), of several processes the main one's.

    Args:
        model: takes ``(N, 3, S, S)`` floats, returns ``(N, len(data.classes))`` logits.
        data: see ``data.load``.
        recipe: see ``recipe_for``.
        device: where to train, ``"cuda"`` for each of several processes its own GPU; the model and small images are
            moved there.
        checkpoint: file to keep the state in, which the main process writes after each epoch. Never partial: a killed
            run leaves the last whole epoch.
        resume: continue from ``checkpoint`` if it exists. On the CPU the final weights equal those of an uninterrupted
            run bit for bit; if all epochs are done they are loaded, and nothing is trained. Another number of processes
            may go on.
        eval_every: evaluate after every so many epochs, and after the last.
        on_epoch: called after each epoch, in the main process, when its checkpoint is written.
        progress: show a progress bar (the main process does).
        num_workers: processes that decode ``ImageFiles`` for each training process.
        accumulate: forward passes that each process cuts its part of a batch into, to save memory; None: as many as
            hold at most ``batches.LARGEST_PASS`` images each.
        compile: train through ``torch.compile``; a string is its mode, e.g. ``"reduce-overhead"``.
        stop: asked before each epoch, of several processes in the main one; training ends there once it returns True.
            The history is then shorter than the recipe, and a later call goes on from ``checkpoint``.
        teacher: a trained model of the same classes, which ``recipe.distillation_alpha`` asks for: often the dense
            model that ``model`` was made from. It is moved to the device, put into evaluation mode and not trained;
            in each process it is the caller's.

    Raises:
        ValueError: ``eval_every`` below 1, fewer training images than a batch, a batch that cannot be cut into equal
            passes, a model or teacher of other classes, a teacher without ``distillation_alpha`` or the reverse, or
            processes that were called with different things.
        CheckpointError: ``checkpoint`` is damaged, or of another model, recipe or data set (the first difference is
            named).
        NonFiniteLossError: the loss became NaN or infinite (epoch, step and learning rate are named), in every process.
        OSError: the checkpoint cannot be written, as is tried before training; the one before it is as it was.
    """
    processes = join(device)
    end_sparse(model)  # an earlier call may have made it so, with an optimizer that is no more
    _check_run(model, data, recipe, eval_every, teacher)
    accumulate = accumulation(recipe.batch_size, processes.count, accumulate)
    identity = checkpoints.identity_of(model, data, recipe)
    _check_together(processes, identity)
    trainer = _Trainer.make(model, recipe, processes, len(data.train), accumulate, compile, teacher)
    path = None if checkpoint is None else Path(checkpoint).expanduser()
    history = History()
    if path and resume:
        saved = processes.on_main(lambda: checkpoints.read(path, identity) if path.exists() else None)
        if saved is not None:
            trainer.load_state_dict(saved["state"])
            history = History(saved["history"])
    if path and len(history.epochs) < recipe.epochs:
        processes.on_main(lambda: check_writable(path))
    train, test = (placed(split, processes.device) for split in _prepared(data, recipe))
    first, steps = len(history.epochs), trainer.steps
    bar = tqdm(
        total=recipe.epochs * steps,
        initial=first * steps,
        desc="training",
        unit="step",
        disable=not (progress and processes.is_main),
        leave=False,
    )
    with torch.random.fork_rng(_cuda_devices(processes.device)), bar:
        for epoch in range(first, recipe.epochs):
            if stop is not None and processes.on_main(lambda: stop(history)):
                break
            started = time.perf_counter()
            torch.manual_seed(seed_of(Chance.MODEL, recipe.seed, epoch, processes.rank))  # dropout
            parts = batches(train, len(data.classes), recipe, epoch, processes, accumulate, num_workers)
            record = {"epoch": epoch + 1, **trainer.train_epoch(epoch, parts, bar)}
            tell_damage(train, processes)
            if (epoch + 1) % eval_every == 0 or epoch + 1 == recipe.epochs:
                averaged = trainer.averaged(after=epoch + 1)
                result = evaluate(averaged, test, num_workers=num_workers, processes=processes)
                record |= {"test_loss": result["loss"], "test_top1": result["top1"]}
            record["seconds"] = time.perf_counter() - started
            history.epochs.append(record)
            if path:
                state = {"identity": identity, "state": trainer.state_dict(), "history": history.epochs}
                processes.on_main(lambda state=state: save_atomically(state, path))
            if on_epoch and processes.is_main:
                on_epoch(history)
    trainer.hand_over(after=len(history.epochs))
    return history


@dataclass
class _Trainer:
    """Everything that a step changes, and the step."""

    model: nn.Module
    forward: nn.Module  # the same, compiled if asked for, its gradients averaged over the processes
    recipe: Recipe
    processes: Alone
    num_images: int
    steps: int  # in an epoch
    accumulate: int
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    masks: MaskSchedule
    teacher: nn.Module | None

    def __post_init__(self) -> None:
        self.trainable = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @classmethod
    def make(
        cls,
        model: nn.Module,
        recipe: Recipe,
        processes: Alone,
        num_images: int,
        accumulate: int = 1,
        compile: bool | str = False,
        teacher: nn.Module | None = None,
    ) -> _Trainer:
        model.to(processes.device)
        if teacher is not None:
            teacher.to(processes.device).eval()
        compiled = torch.compile(model, mode=compile if isinstance(compile, str) else None) if compile else model
        forward = processes.parallel(compiled)  # before the copy below: now all have the main process's weights
        optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, fused=True)
        if recipe.sparse_steps is not None and supermask_layers(model):
            grad = recipe.sparse_weight_grad
            train_sparse(model, optimizer, refresh_every=recipe.sparse_steps, weight_grad=grad)
        scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.amp and recipe.amp_dtype == "fp16")
        average = get_ema_multi_avg_fn(ema_decay(recipe))
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if recipe.model_ema else None
        steps = steps_per_epoch(num_images, recipe)
        masks = MaskSchedule(model, recipe, steps)
        return cls(
            model, forward, recipe, processes, num_images, steps, accumulate, optimizer, scaler, ema, masks, teacher
        )

    def train_epoch(self, epoch: int, parts: Iterable[Batch], bar: tqdm) -> dict[str, Any]:
        """Train on ``parts``, ``accumulate`` for each step; returns the epoch's record, without the evaluation."""
        self.model.train()
        losses = torch.zeros(self.steps, device=self.processes.device)
        parts, started, checked = _Timed(parts), time.perf_counter(), 0
        for step in range(self.steps):
            losses[step] = self.step(epoch * self.steps + step, parts)
            bar.update()
            if step + 1 - checked == LOSS_CHECK_STEPS or step + 1 == self.steps:
                losses[checked : step + 1] = self.checked(losses[checked : step + 1], epoch, checked)
                bar.set_postfix(epoch=f"{epoch + 1}/{self.recipe.epochs}", loss=f"{losses[step].item():.3f}")
                checked = step + 1
        self.check_weights(epoch)
        seconds = time.perf_counter() - started
        return {
            "train_loss": losses.mean().item(),
            "test_loss": None,
            "test_top1": None,
            "lr": self.lr((epoch + 1) * self.steps - 1),
            "images_per_s": self.steps * self.recipe.batch_size / seconds,
            "data_share": parts.seconds / seconds,
            "processes": self.processes.count,
            "accumulate": self.accumulate,
        }

    def step(self, step: int, parts: Iterator[Batch]) -> Tensor:
        """One step of AdamW, the ``step``-th of the run; returns this process's loss, still on the device."""
        recipe, loss = self.recipe, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step) * group["peak_lr"] / recipe.lr
        self.masks.apply(self.model, step)
        self.optimizer.zero_grad()
        for left in reversed(range(self.accumulate)):
            images, labels = next(parts)
            with self.processes.unsynchronized(self.forward) if left else nullcontext():
                with torch.autocast(self.processes.device.type, self.amp_dtype, enabled=recipe.amp):
                    part = self.loss(images, labels) / self.accumulate
                self.scaler.scale(part).backward()
            loss = loss + part.detach()
        if recipe.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainable, recipe.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None and step % recipe.model_ema_steps == 0:
            self.update_ema(warming_up=step < recipe.lr_warmup_epochs * self.steps)
        return loss

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of ``images``; ``labels`` are classes or, of mixed images, their probabilities."""
        recipe, logits = self.recipe, self.forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            taught = self.teacher(images)
        tau, alpha = recipe.distillation_tau, recipe.distillation_alpha
        student, taught = (F.log_softmax(found / tau, dim=-1) for found in (logits, taught))
        # By tau squared, so that the gradient's size does not depend on the temperature.
        divergence = F.kl_div(student, taught, reduction="batchmean", log_target=True) * tau**2
        return (1 - alpha) * loss + alpha * divergence

    def update_ema(self, warming_up: bool) -> None:
        self.ema.update_parameters(self.model)
        if warming_up:  # as the reference: until then the average is a copy, weights from the start do not count
            self.ema.n_averaged.zero_()

    @property
    def amp_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.recipe.amp_dtype == "bf16" else torch.float16

    def lr(self, step: int) -> float:
        return learning_rate(self.recipe, step, self.steps)

    def checked(self, losses: Tensor, epoch: int, first: int) -> Tensor:
        """``losses`` of the epoch's steps from ``first`` on, averaged over the processes; one not finite raises."""
        losses = self.processes.sum(losses) / self.processes.count
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            raise self.not_finite(f"the loss became {losses[step].item()}", epoch, first + step)
        return losses

    def check_weights(self, epoch: int) -> None:
        """The last step of an epoch can spoil the weights though its loss was finite: no checkpoint of them."""
        if not torch.stack([parameter.detach().sum() for parameter in self.model.parameters()]).isfinite().all():
            raise self.not_finite("a weight is no longer finite", epoch, self.steps - 1)

    def not_finite(self, what: str, epoch: int, step: int) -> NonFiniteLossError:
        lr = self.lr(epoch * self.steps + step)
        images = epoch_order(self.num_images, self.recipe, epoch)[step].tolist()
        return NonFiniteLossError(
            f"{what} in epoch {epoch + 1}, step {step + 1} of {self.steps}, at learning rate {lr:.3g}; expected finite "
            f"numbers. That batch holds training images {', '.join(map(str, images[:4]))}, ... (all: the error's "
            "attribute `images`). Lower lr, warm up longer (lr_warmup_epochs) or set clip_grad_norm; a checkpoint "
            "keeps the last whole epoch",
            epoch,
            step,
            lr,
            images,
        )

    def averaged(self, after: int) -> nn.Module:
        """The model to evaluate after so many epochs."""
        model = self.model if self.ema is None else self.ema.module
        self.masks.apply(model, after * self.steps)
        return model

    def hand_over(self, after: int) -> None:
        """Put the averaged weights into the caller's model, its masks as after so many epochs."""
        self.masks.apply(self.model, after * self.steps)
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


class _Timed(Iterator[Batch]):
    """An iterator that counts the seconds its user waits for it."""

    def __init__(self, parts: Iterable[Batch]) -> None:
        self._parts, self.seconds = iter(parts), 0.0

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return next(self._parts)
        finally:
            self.seconds += time.perf_counter() - started


def _prepared(data: DataSplits, recipe: Recipe) -> tuple[Images, Images]:
    """Both splits, those from files with the recipe's transforms; those in memory are augmented in batches."""
    train, test = data.train, data.test
    if not isinstance(train, ImageTensors):
        transform = train_transform(
            recipe.train_crop_size or data.image_size,
            hflip=recipe.hflip,
            auto_augment=recipe.auto_augment,
            ra_magnitude=recipe.ra_magnitude,
        )
        train = replace(train, transform=transform)
    if not isinstance(test, ImageTensors):
        crop_size = recipe.val_crop_size or data.image_size
        test = replace(test, transform=eval_transform(crop_size, recipe.val_resize_size))
    return train, test


def _check_run(
    model: nn.Module, data: DataSplits, recipe: Recipe, eval_every: int, teacher: nn.Module | None = None
) -> None:
    """Raise ``ValueError`` if ``model``, ``data``, ``recipe`` and ``teacher`` do not go together."""
    if eval_every < 1:
        raise ValueError(f"eval_every is {eval_every}; expected a number of epochs, at least 1")
    if steps_per_epoch(len(data.train), recipe) < 1:
        raise ValueError(
            f"{data.name} has {len(data.train)} training images, fewer than one batch of {recipe.batch_size}; "
            "choose a smaller batch_size"
        )
    if (teacher is None) != (recipe.distillation_alpha == 0):
        there = "no teacher" if teacher is None else "a teacher"
        raise ValueError(
            f"recipe: distillation_alpha is {recipe.distillation_alpha} and there is {there}; expected both a positive "
            "distillation_alpha and a teacher, or neither"
        )
    _check_sizes(model, data, recipe)
    for what, one in {"model": model, "teacher": teacher}.items():
        outputs = None if one is None else num_classes(one)
        if outputs is None:
            outputs = getattr(one, "num_classes", len(data.classes))
        if outputs != len(data.classes):
            raise ValueError(
                f"the {what} has {outputs} classes, {data.name} has {len(data.classes)}; make the {what} with "
                f"num_classes={len(data.classes)}"
            )


def _check_sizes(model: nn.Module, data: DataSplits, recipe: Recipe) -> None:
    """Raise ``ValueError`` if the model takes images of one size, as torchvision's ViTs do, and is given another."""
    wanted = getattr(model, "image_size", None)
    if not isinstance(wanted, int):
        return
    crops = {
        "train_crop_size": (data.train, recipe.train_crop_size),
        "val_crop_size": (data.test, recipe.val_crop_size),
    }
    for name, (images, crop) in crops.items():
        given = data.image_size if isinstance(images, ImageTensors) else crop or data.image_size
        if given != wanted:
            raise ValueError(
                f"the model takes images of {wanted} pixels and {data.name} gives {given} (recipe: {name}={crop}, "
                f"data: image_size={data.image_size}); make both the same"
            )


def _check_together(processes: Alone, identity: dict[str, Any]) -> None:
    """Raise ``ValueError`` in every process if one was asked to train something else than the main one."""
    found = checkpoints.difference(processes.on_main(lambda: identity), identity)
    others = processes.sum(torch.tensor(int(found is not None), device=processes.device))
    if found is not None:
        what, there, here = found
        raise ValueError(
            f"process {processes.rank} of {processes.count} was started for another run than the main process: {what} "
            f"is {there!r} there and {here!r} here; start all with the same arguments and the same data"
        )
    if others > 0:
        raise ValueError(
            f"{int(others)} of {processes.count} processes were started for another run than the main process; their "
            "own errors say in what they differ"
        )


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
