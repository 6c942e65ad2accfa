"""A published checkpoint from file to accuracy: loaded, folded, converted, evaluated before and after.

    python -m blockvit.published sp0.80-ts32.pth --data /imagenet

``make reproduce PROFILE=imagenet DATA=/imagenet CHECKPOINT=/path/sp0.80-ts32.pth`` does the same in notebook 02.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import data, models, superblock
from .convert import layer_fates, to_block_sparse
from .extras import of_the_study
from .files import check_file
from .linear import BlockSparseLinear
from .machine import usable_cores
from .supermask import BLOG_TARGETS
from .targets import name_matches

with of_the_study():
    import pandas as pd

    from . import bench, results
    from .train import evaluate as top1_of

RECIPE = "published checkpoint"
"""The ``recipe`` of its rows, in the tables."""

APPLIED, LEFT_OUT, NO_MASK = "applied", "left out: the reference never applied it", ""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A SuperBlock checkpoint and what has to be known to read it.

    Attributes:
        path: the file.
        sparsity: that it was trained with.
        block_size: of its masks.
        model: the architecture, by its name in ``models``.
        dataset: what it was trained on, for the tables.
        apply_out_proj_masks: apply the masks of attention output projections, which the reference never did.
    """

    path: Path
    sparsity: float
    block_size: int
    model: str = "vit_b_16"
    dataset: str = "imagenet"
    apply_out_proj_masks: bool = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        sparsity: float | None = None,
        block_size: int | None = None,
        model: str = "vit_b_16",
        dataset: str = "imagenet",
        apply_out_proj_masks: bool = False,
    ) -> PublishedCheckpoint:
        """Take ``sparsity`` and ``block_size`` from the file's name, where they are not given.

        Raises:
            FileNotFoundError: no such file.
            IsADirectoryError: it is a folder.
            ValueError: neither given nor in the name.
        """
        path = Path(path).expanduser()
        check_file(path, "expected a checkpoint named like sp0.80-ts32.pth")
        named = superblock.read_name(path) or (None, None)
        sparsity, block_size = (
            known if given is None else given for given, known in zip((sparsity, block_size), named, strict=True)
        )
        if sparsity is None or block_size is None:
            raise ValueError(
                f"{path.name} does not tell sparsity and block size, as names like sp0.80-ts32.pth do; pass them: "
                "--sparsity 0.8 --block-size 32, or to notebooks checkpoint_sparsity=0.8 checkpoint_block_size=32"
            )
        return cls(path, sparsity, block_size, model, dataset, apply_out_proj_masks)

    @property
    def name(self) -> str:
        """What it is, as a file name: ``vit_b_16-published-bs32-sp0.80``."""
        return f"{self.model}-published-bs{self.block_size}-sp{self.sparsity:.2f}"

    def images(self, root: str | os.PathLike, **how: Any) -> tuple[data.ImageFiles, list[str]]:
        """The images of ``root/val``, cropped to the size that the model takes; see ``data.evaluation``."""
        with torch.device("meta"):
            size = models.create(self.model).image_size
        return data.evaluation(root, val_crop_size=size, **how)

    def load(self, num_classes: int, *, fold: bool = True) -> nn.Module:
        """The model, in evaluation mode; its masks folded into the weights, or still there.

        Raises:
            ValueError: another number of classes; and what ``load_superblock`` refuses.
        """
        state = superblock.read_superblock(self.path)
        head = state.get("heads.head.weight")
        if head is not None and len(head) != num_classes:
            raise ValueError(
                f"{self.path.name} was trained on {len(head)} classes, but there are {num_classes} to evaluate on; "
                "pass the data set that it was trained on"
            )
        return superblock.load_superblock(
            state,
            models.create(self.model, num_classes=num_classes),
            sparsity=self.sparsity,
            block_size=self.block_size,
            apply_out_proj_masks=self.apply_out_proj_masks,
            fold=fold,
        )

    @cached_property
    def masks(self) -> dict[str, str]:
        """What becomes of each mask in the file, by layer: ``APPLIED`` or ``LEFT_OUT``."""
        return {
            name: LEFT_OUT if superblock.is_left_out(name, self.apply_out_proj_masks) else APPLIED
            for name in superblock.masked_layers(superblock.read_superblock(self.path))
        }

    def key(self, **more: Any) -> dict[str, Any]:
        """The key columns of its rows; ``scope`` names the layers whose masks are applied."""
        applied = [name for name, what in self.masks.items() if what == APPLIED]
        scope = [target for target in BLOG_TARGETS if any(name_matches(name, target) for name in applied)]
        return {
            "dataset": self.dataset,
            "model": self.model,
            "scope": "+".join(scope),
            "dtype": "float32",
            "precision": "fp32",
            "block_size": self.block_size,
            "sparsity": self.sparsity,
            "recipe": RECIPE,
            **more,
        }


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        top1: accuracy in percent by backend: ``folded`` (dense layers that hold the masked weights), and the one that
            the converted layers run on.
        images: how many were counted.
        damaged: how many more could not be decoded, and so were not.
        layers: a row a layer: ``name``, ``kind``, ``shape``, ``sparsity``, ``fate``, ``reason`` as in ``layer_fates``,
            and ``mask``: applied, left out, or empty where the checkpoint has none.
    """

    top1: dict[str, float]
    images: int
    damaged: int
    layers: pd.DataFrame

    def rows(self, checkpoint: PublishedCheckpoint, device: torch.device | str) -> list[dict[str, Any]]:
        """Rows for the tables: the accuracy before and after conversion, and of how many images."""
        where = {"experiment": "accuracy", **bench.environment(device), "group": results.new_group()}
        found = [(backend, "top1", value, "%") for backend, value in self.top1.items()]
        found.append(("folded", "images", self.images, "images"))
        return [
            {
                **where,
                **checkpoint.key(backend=backend, metric=metric, unit=unit),
                "value": value,
                "repeats": 1,
            }
            for backend, metric, value, unit in found
        ]


def evaluate(
    checkpoint: PublishedCheckpoint,
    root: str | os.PathLike,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    num_workers: int | None = None,
    **how: Any,
) -> Evaluation:
    """Accuracy of a published checkpoint on the images of ``root/val``, folded and converted.

    Args:
        checkpoint: see ``PublishedCheckpoint.open``.
        root: an ImageFolder with ``val/`` (or ``test/``), a folder for each class; ``train/`` is not needed.
        backend: for the converted layers.
        device: where to evaluate.
        batch_size: images at a time.
        num_workers: processes that decode; None: one a core, at most 16.
        how: ``val_resize_size`` and ``interpolation``, see ``data.evaluation``.

    Raises:
        ValueError: a damaged file, one of another architecture or of other classes than the folder's, or a folder
            without images.
        BackendUnavailableError: the backend cannot run on ``device``.
    """
    images, classes = checkpoint.images(root, **how)
    model = checkpoint.load(len(classes)).to(device)
    workers = min(16, usable_cores()) if num_workers is None else num_workers
    run = {"device": device, "batch_size": batch_size, "num_workers": workers}
    layers = pd.DataFrame(map(asdict, layer_fates(model, checkpoint.block_size)))
    layers["mask"] = layers["name"].map(checkpoint.masks).fillna(NO_MASK)
    converted = to_block_sparse(copy.deepcopy(model), checkpoint.block_size, backend)  # what it refuses, it refuses now
    compared = {"folded": model, _backends(converted): converted}
    top1 = {name: 100 * top1_of(each, images, **run)["top1"] for name, each in compared.items()}
    damaged = int(images.damaged.sum())
    return Evaluation(top1, len(images) - damaged, damaged, layers)


def _backends(model: nn.Module) -> str:
    names = {module.backend.name for module in model.modules() if isinstance(module, BlockSparseLinear)}
    return "+".join(sorted(names))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: prints accuracies and the table of layers, and writes the rows; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        store = results.Store()  # first: where results go is to be known before hours are spent on them
        checkpoint = PublishedCheckpoint.open(
            options.checkpoint,
            sparsity=options.sparsity,
            block_size=options.block_size,
            model=options.model,
            apply_out_proj_masks=options.apply_out_proj_masks,
        )
        found = evaluate(
            checkpoint,
            options.data,
            backend=options.backend,
            device=options.device,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
        )
        store.append(found.rows(checkpoint, options.device))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found.layers.drop(columns="kind").to_string(index=False))
    for backend, value in found.top1.items():
        print(f"{checkpoint.name}, {backend}: {value:.2f}% of {found.images} images")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockvit.published", description="Evaluate a published SuperBlock checkpoint."
    )
    parser.add_argument("checkpoint", help="a file named like sp0.80-ts32.pth")
    parser.add_argument("--data", required=True, metavar="PATH", help="folder with val/, a folder for each class")
    parser.add_argument("--model", default="vit_b_16", help="the architecture (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, help="where the file's name does not tell, or tells wrongly")
    parser.add_argument("--block-size", type=int, help="likewise")
    parser.add_argument(
        "--apply-out-proj-masks", action="store_true", help="apply the masks that the reference never applied"
    )
    parser.add_argument("--backend", default="auto", help="of the converted layers (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, help="processes that decode (default: one a core, at most 16)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
