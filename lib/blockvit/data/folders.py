"""Folders of images: ``train/`` and ``test/`` or ``val/``, each with one folder of images for every class."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

EVAL_FOLDERS = ("test", "val")
NAMED = 10  # classes in a message; ImageNet has a thousand

Samples = list[tuple[str, int]]
"""Path and label of each image."""


def scan(root: Path) -> tuple[Samples, Samples, list[str]]:
    """The images to train on, those to evaluate on, and the classes in the order of their labels.

    Raises:
        FileNotFoundError, NotADirectoryError: the root or a split is missing or a file.
        ValueError: a split without classes, a class without images, other classes in one split than in the other.
    """
    check_root(root)
    train, test = _split(root / "train"), _split(_eval_folder(root))
    _check_classes(root / "train", train.classes, _eval_folder(root), test.classes)
    return train.samples, test.samples, train.classes


def scan_evaluation(root: Path) -> tuple[Samples, list[str]]:
    """The images to evaluate on and their classes; raises as ``scan``, but images to train on need not be there."""
    check_root(root)
    test = _split(_eval_folder(root))
    if (root / "train").is_dir():
        _check_classes(root / "train", _class_folders(root / "train"), _eval_folder(root), test.classes)
    return test.samples, test.classes


def check_root(root: Path) -> None:
    """Raise if ``root`` is no directory."""
    if not root.exists():
        raise FileNotFoundError(f"data root {root} does not exist; expected a directory with train/ and test/ or val/")
    if not root.is_dir():
        raise NotADirectoryError(f"data root {root} is a file; expected a directory (unpack an archive first)")


def _eval_folder(root: Path) -> Path:
    """The first with classes: ImageNet's own ``test/`` holds images without labels beside its ``val/``."""
    there = [root / name for name in EVAL_FOLDERS if (root / name).is_dir()]
    return next((folder for folder in there if _class_folders(folder)), there[0] if there else root / EVAL_FOLDERS[0])


def _class_folders(split: Path) -> list[str]:
    return sorted(child.name for child in split.iterdir() if child.is_dir())


def _check_classes(train: Path, train_classes: list[str], test: Path, test_classes: list[str]) -> None:
    if train_classes == test_classes:
        return
    only = {train: set(train_classes) - set(test_classes), test: set(test_classes) - set(train_classes)}
    difference = "; ".join(f"only {split.name}/ has {_listed(sorted(names))}" for split, names in only.items() if names)
    raise ValueError(f"{train} and {test} hold different classes: {difference}. Expected the same folders in both")


def _split(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist; expected {folder.parent} to hold train/ and test/ or val/, each with one folder "
            "of images for every class"
        )
    if not _class_folders(folder):
        flat = sum(child.suffix.lower() in IMG_EXTENSIONS for child in folder.iterdir())
        loose = f"{flat} images but " if flat else ""
        raise ValueError(f"{folder} holds {loose}no classes; expected one folder of images for every class")
    split = ImageFolder(folder, allow_empty=True)
    empty = sorted(set(range(len(split.classes))) - set(split.targets))
    if empty:
        names = _listed([split.classes[label] for label in empty])
        raise ValueError(
            f"{folder} holds no images of: {names}; add some (their names end in {', '.join(IMG_EXTENSIONS)}), make "
            "the folders readable, or remove them"
        )
    return split


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
