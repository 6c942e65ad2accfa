"""Checkpoints of a training: the state after a whole epoch, and which run it belongs to.

The state is that of the run, not of a process: how many processes there are, and how each cuts its part of a batch, may
change from one start to the next.
"""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from ..data import DataSplits
from .recipe import Recipe


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another run."""


def identity_of(model: nn.Module, data: DataSplits, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What makes two trainings the same run."""
    about = {
        "name": data.name,
        "training images": len(data.train),
        "classes": ", ".join(data.classes),
        "image_size": data.image_size,
    }
    return {"recipe": asdict(recipe), "data": about, "model": _architecture(model)}


def _architecture(model: nn.Module) -> dict[str, str]:
    """What makes up a model, by name: each module with its settings (sparsity and block size too), each parameter."""
    modules = {name or "(model)": f"{type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules()}
    return modules | {name: f"{p.dtype} {tuple(p.shape)}" for name, p in model.named_parameters()}


def difference(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> tuple[str, Any, Any] | None:
    """The first thing in which two identities differ, with its value in each; ``None`` if they are the same."""
    for kind, values in other.items():
        for name in values | one[kind]:
            if one[kind].get(name) != values.get(name):
                return f"{kind}: {name}", one[kind].get(name), values.get(name)
    return None


def read(path: Path, identity: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A checkpoint of the run ``identity``: its ``state`` and its ``history``.

    Raises:
        CheckpointError: the file is damaged, or of another run.
    """
    with path.open("rb") as file:  # outside the try: a file that may not be opened is not a damaged one
        saved = _unpickled(file, path)
    found = difference(saved["identity"], identity)
    if found is not None:
        what, there, here = found
        raise CheckpointError(
            f"{path} belongs to another run: {what} is {there!r} there and {here!r} here; train as it was "
            "trained, name another place for the checkpoint, or delete it to train from the start"
        )
    return saved


def _unpickled(file: BinaryIO, path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("identity", "state", "history")}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is truncated or no checkpoint of this library ({type(error).__name__}: {error}); delete it "
            "to train from the start"
        ) from error
