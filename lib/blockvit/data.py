"""Image classification data: scikit-learn's digits, CIFAR-10, and any ImageFolder (ImageNet).

Every split yields uint8 pictures; training augments and normalises them in batches, where they lie. Small pictures are
held in memory as one tensor (``ImageTensors``), large ones are decoded as they are needed (``ImageFiles``).
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from .models import unknown_name

Channels = tuple[float, float, float]

NAMES = ("digits", "cifar10", "imagenet", "folder")
EVAL_FOLDERS = ("test", "val")

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DIGITS_TEST_SIZE = 360
DIGITS_SPLIT_SEED = 0  # a constant: every seed of every study is tested on the same pictures


@dataclass(frozen=True, eq=False)
class ImageTensors(Dataset):
    """Pictures held in memory.

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
        """Pictures and labels at ``index``: an integer, a slice or a tensor of indices."""
        return self.images[index], self.labels[index]

    def to(self, device: torch.device | str) -> ImageTensors:
        """The same pictures on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset):
    """Pictures decoded from files when asked for.

    Attributes:
        samples: path and label of each picture.
        transform: from a PIL picture to a uint8 tensor ``(3, S, S)``; see ``train_transform``, ``eval_transform``.
        mean, std: of each channel, in [0, 1], for ``normalize``.
    """

    samples: list[tuple[str, int]]
    transform: Callable[[Any], Tensor]
    mean: Channels
    std: Channels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The transformed picture at ``index`` and its label."""
        path, label = self.samples[index]
        return self.transform(_decode(path)), label


Images = ImageTensors | ImageFiles


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready to train on.

    Attributes:
        name: as it was asked for.
        source: where the pictures came from, e.g. ``ImageFolder /data/cifar10-jpeg``.
        train, test: the two splits.
        classes: names, in the order of the labels.
        image_size: edge length S of the square pictures, in pixels.
    """

    name: str
    source: str
    train: Images
    test: Images
    classes: list[str]
    image_size: int


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    download: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> DataSplits:
    """Load a data set.

    ========  =======================================================  ================  =========
    name      root                                                     held as           default S
    ========  =======================================================  ================  =========
    digits    none: comes with scikit-learn; 1437 + 360 pictures       ``ImageTensors``  8
    cifar10   an ImageFolder, or torchvision's ``CIFAR10`` (download)  ``ImageTensors``  32
    imagenet  an ImageFolder                                           ``ImageFiles``    224
    folder    any other ImageFolder                                    ``ImageFiles``    224
    ========  =======================================================  ================  =========

    An ImageFolder is a directory with ``train/`` and ``test/`` (or ``val/``), each holding one folder of pictures for
    every class.

    Args:
        name: see the table.
        root: directory of the pictures.
        image_size: edge length S in pixels; pictures of another size are resized, the longer side cropped centrally.
        download: fetch CIFAR-10 into ``root`` if it is not there.
        cache_dir: keep the decoded pictures of a ``cifar10`` ImageFolder here, in one file that is made anew when a
            picture is added, removed or written. Decoding 60 000 small JPEGs takes about 20 s, reading the file 1 s.

    Raises:
        ValueError: unknown name, no root where one is needed, a split without classes, a class without pictures, or
            other classes in the test split than in the training split.
        FileNotFoundError: the root, a split, or the downloaded files are missing.
        NotADirectoryError: the root is a file.
    """
    if name not in NAMES:
        raise unknown_name("data set", name, list(NAMES))
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is {image_size}; expected the edge length in pixels, at least 1")
    if name == "digits":
        return _digits(image_size or 8)
    if root is None:
        raise ValueError(f"data set {name!r} needs a root, got None; pass the directory that holds its pictures")
    root = Path(root).expanduser()
    if name == "cifar10":
        return _cifar10(root, image_size or 32, download, cache_dir)
    return _folder(name, root, image_size or 224)


def label(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """What tables call a data set: ``name``, or ``cifar10-jpeg`` where ``root`` holds CIFAR-10 as JPEG files.

    JPEG loses some of the original's detail, so accuracies on it are those of another data set.
    """
    if name != "cifar10" or root is None:
        return name
    pictures = (Path(root).expanduser() / "train").glob("*/*")
    first = next((path for path in pictures if path.suffix.lower() in IMG_EXTENSIONS), None)
    return f"{name}-jpeg" if first is not None and first.suffix.lower() in (".jpg", ".jpeg") else name


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """From uint8 ``(N, 3, S, S)`` to floats with zero mean and unit variance over the data set, on the same device."""
    offset, scale = (torch.tensor(c, device=images.device).view(3, 1, 1) * 255 for c in (mean, std))
    return (images - offset) / scale


def train_transform(
    image_size: int, *, hflip: bool = True, auto_augment: str | None = None, ra_magnitude: int = 9
) -> v2.Compose:
    """torchvision's reference preset for training on large pictures: random crop to S, flip, RandAugment."""
    steps: list[Any] = [v2.PILToTensor(), v2.RandomResizedCrop(image_size, antialias=True)]
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    if auto_augment == "ra":
        steps.append(v2.RandAugment(magnitude=ra_magnitude, interpolation=InterpolationMode.BILINEAR))
    return v2.Compose(steps)


def eval_transform(image_size: int) -> v2.Compose:
    """torchvision's reference preset for evaluation: shorter side to S * 256 / 224, central crop to S."""
    shorter = round(image_size * 256 / 224)
    return v2.Compose([v2.PILToTensor(), v2.Resize(shorter, antialias=True), v2.CenterCrop(image_size)])


def save_atomically(state: Any, path: Path) -> None:
    """``torch.save`` under a temporary name, then rename: ``path`` holds the old state or the new one, never a part.

    Raises:
        OSError: the directory cannot be written or is full; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _digits(image_size: int) -> DataSplits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # grey values 0 to 16
    grey = torch.from_numpy(pixels).view(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    images, labels = _resize(grey.expand(-1, 3, -1, -1), image_size), torch.from_numpy(labels).long()
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=DIGITS_TEST_SIZE, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    grey_train = images[train, 0] / 255
    stats = (float(grey_train.mean()),) * 3, (float(grey_train.std()),) * 3
    splits = (ImageTensors(images[part], labels[part], *stats) for part in (train, test))
    return DataSplits("digits", "scikit-learn load_digits", *splits, [str(digit) for digit in range(10)], image_size)


def _cifar10(root: Path, image_size: int, download: bool, cache_dir: str | os.PathLike[str] | None) -> DataSplits:
    if (root / "train").is_dir():
        source = f"ImageFolder {root}"
        train, test, classes = _cached_folder(root, image_size, cache_dir)
    else:
        if not download:
            _check_root(root)
        source = f"torchvision CIFAR10 {root}"
        train, test, classes = _torchvision_cifar10(root, image_size, download)
    splits = (ImageTensors(*part, CIFAR10_MEAN, CIFAR10_STD) for part in (train, test))
    return DataSplits("cifar10", source, *splits, classes, image_size)


def _folder(name: str, root: Path, image_size: int) -> DataSplits:
    train, test, classes = _scan(root)
    transform = eval_transform(image_size)  # training puts its own in place: the recipe says which
    splits = (ImageFiles(samples, transform, IMAGENET_MEAN, IMAGENET_STD) for samples in (train, test))
    return DataSplits(name, f"ImageFolder {root}", *splits, classes, image_size)


Samples = list[tuple[str, int]]
Pictures = tuple[Tensor, Tensor]  # images uint8 (N, 3, S, S), labels int64 (N,)


def _torchvision_cifar10(root: Path, image_size: int, download: bool) -> tuple[Pictures, Pictures, list[str]]:
    try:
        train, test = (CIFAR10(root, train=is_train, download=download) for is_train in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{root} holds no complete CIFAR-10: expected an ImageFolder (train/ and test/ with a folder for each "
            "class) or torchvision's cifar-10-batches-py/; pass download=True to fetch it into that directory"
        ) from error

    def pictures(split: CIFAR10) -> Pictures:
        images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        return _resize(images, image_size), torch.tensor(split.targets)

    return pictures(train), pictures(test), list(train.classes)


def _cached_folder(
    root: Path, image_size: int, cache_dir: str | os.PathLike[str] | None
) -> tuple[Pictures, Pictures, list[str]]:
    train, test, classes = _scan(root)
    if cache_dir is None:
        return _decode_all(train, image_size), _decode_all(test, image_size), classes
    where = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
    path = Path(cache_dir).expanduser() / f"{root.name}-{where}-{image_size}px.pt"
    fingerprint = _fingerprint(root, train + test)
    cache = _read_cache(path)
    if cache.get("fingerprint") != fingerprint:
        splits = {"train": _decode_all(train, image_size), "test": _decode_all(test, image_size)}
        cache = {"fingerprint": fingerprint, **splits}
        save_atomically(cache, path)
    return cache["train"], cache["test"], classes


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return {}  # none yet, or damaged: it is only a cache, so it is made anew


def _fingerprint(root: Path, samples: Samples) -> str:
    digest = hashlib.sha256()
    for path, label in samples:
        stat = os.stat(path)  # noqa: PTH116 (60 000 of them: a Path each would double the time)
        digest.update(f"{os.path.relpath(path, root)} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode_all(samples: Samples, image_size: int) -> Pictures:
    # One after the other: on pictures this small, threads spend more on the interpreter lock than decoding takes.
    images = np.empty((len(samples), image_size, image_size, 3), np.uint8)
    for row, (path, _) in zip(images, samples, strict=True):
        row[:] = _decode(path, image_size)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in samples])


def _decode(path: str, image_size: int | None = None) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
    except OSError as error:
        raise OSError(f"cannot decode {path}: {error}; replace or remove the file") from error
    if image_size is None or rgb.size == (image_size, image_size):
        return rgb
    return ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BICUBIC)


def _resize(images: Tensor, image_size: int) -> Tensor:
    return v2.functional.resize(images, [image_size, image_size], antialias=True).contiguous()


def _scan(root: Path) -> tuple[Samples, Samples, list[str]]:
    """Samples of both splits of an ImageFolder, and their classes."""
    _check_root(root)
    eval_folder = next((root / name for name in EVAL_FOLDERS if (root / name).is_dir()), root / EVAL_FOLDERS[0])
    train, test = _split(root / "train"), _split(eval_folder)
    if train.classes != test.classes:
        extra = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"{train.root} and {test.root} hold different classes: {', '.join(extra)} in only one of them; "
            "expected the same folders in both"
        )
    return train.samples, test.samples, train.classes


def _check_root(root: Path) -> None:
    if not root.exists():
        raise FileNotFoundError(f"data root {root} does not exist; expected a directory with train/ and test/ or val/")
    if not root.is_dir():
        raise NotADirectoryError(f"data root {root} is a file; expected a directory (unpack an archive first)")


def _split(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist; expected {folder.parent} to hold train/ and test/ or val/, each with one folder "
            "of pictures for every class"
        )
    if not any(child.is_dir() for child in folder.iterdir()):
        raise ValueError(f"{folder} holds no classes; expected one folder of pictures for every class")
    split = ImageFolder(folder, allow_empty=True)
    empty = sorted(set(range(len(split.classes))) - set(split.targets))
    if empty:
        missing = ", ".join(split.classes[label] for label in empty)
        raise ValueError(f"{folder} holds no pictures of: {missing}; add some or remove the folders")
    return split
