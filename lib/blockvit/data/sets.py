"""The data sets by name."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from ..files import save_atomically
from ..models import unknown_name
from . import folders
from .decode import UndecodableError, decode
from .folders import Samples
from .images import ImageFiles, Images, ImageTensors, damage_text
from .transforms import eval_transform

NAMES = ("digits", "cifar10", "imagenet", "folder")

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DIGITS_TEST_SIZE = 360
DIGITS_SPLIT_SEED = 0  # a constant: every seed of every study is tested on the same images


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready to train on.

    Attributes:
        name: as it was asked for.
        source: where the images came from, e.g. ``ImageFolder /data/cifar10-jpeg``.
        train, test: the two splits.
        classes: names, in the order of the labels.
        image_size: edge length S of the square images, in pixels.
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
    digits    none: comes with scikit-learn; 1437 + 360 images       ``ImageTensors``  8
    cifar10   an ImageFolder, or torchvision's ``CIFAR10`` (download)  ``ImageTensors``  32
    imagenet  an ImageFolder                                           ``ImageFiles``    224
    folder    any other ImageFolder                                    ``ImageFiles``    224
    ========  =======================================================  ================  =========

    An ImageFolder is a directory with ``train/`` and ``test/`` (or ``val/``), each holding one folder of images for
    every class.

    Args:
        name: see the table.
        root: directory of the images. ``digits`` has no files: neither this, ``download`` nor ``cache_dir`` is looked
            at, so that they may be given for any data set.
        image_size: edge length S in pixels. Images held in memory are resized to it, the longer side cropped centrally;
            those read from files are resized to S * 256 / 224 along the shorter side, then cropped centrally.
        download: fetch CIFAR-10 into ``root`` if it is not there.
        cache_dir: keep the decoded images of a ``cifar10`` ImageFolder here, in one file that is made anew when an
            image is added, removed or written. Decoding 60 000 small JPEGs takes about 20 s, reading the file 1 s.
            Nothing is kept if an image cannot be decoded: it may be repaired by the next time.

    Raises:
        ValueError: unknown name, no root where one is needed, a split without classes, a class without images,
            other classes in the test split than in the training split, or no image that can be decoded.
        FileNotFoundError: the root, a split, or the downloaded files are missing.
        NotADirectoryError: the root is a file.
    """
    if name not in NAMES:
        raise unknown_name("data set", name, list(NAMES))
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is {image_size}; expected the edge length in pixels, at least 1")
    if name == "digits":
        return _digits(image_size or 8)
    root = _given(repr(name), root)
    if name == "cifar10":
        return _cifar10(root, image_size or 32, download, cache_dir)
    return _folder(name, root, image_size or 224)


def _given(what: str, root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        raise ValueError(f"data set {what} needs a root, got None; pass the directory that holds its images")
    return Path(root).expanduser()


def label(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """What tables call a data set: ``name``, or ``cifar10-jpeg`` where ``root`` holds CIFAR-10 as JPEG files.

    JPEG loses some of the original's detail, so accuracies on it are those of another data set.
    """
    if name != "cifar10" or root is None:
        return name
    files = (Path(root).expanduser() / "train").glob("*/*")
    first = next((path for path in files if path.suffix.lower() in IMG_EXTENSIONS), None)
    return f"{name}-jpeg" if first is not None and first.suffix.lower() in (".jpg", ".jpeg") else name


def evaluation(
    root: str | os.PathLike[str] | None,
    *,
    val_crop_size: int = 224,
    val_resize_size: int | None = None,
    interpolation: str = "bilinear",
) -> tuple[ImageFiles, list[str]]:
    """The images of an ImageFolder's ``test/`` or ``val/`` alone, and its classes; there need be no ``train/``.

    For the sizes and the interpolation, see ``eval_transform``; for errors, ``load``.
    """
    samples, classes = folders.scan_evaluation(_given("to evaluate on", root))
    transform = eval_transform(val_crop_size, val_resize_size, interpolation=interpolation)
    return ImageFiles(samples, transform, IMAGENET_MEAN, IMAGENET_STD), classes


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
            folders.check_root(root)
        source = f"torchvision CIFAR10 {root}"
        train, test, classes = _torchvision_cifar10(root, image_size, download)
    splits = (ImageTensors(*part, CIFAR10_MEAN, CIFAR10_STD) for part in (train, test))
    return DataSplits("cifar10", source, *splits, classes, image_size)


def _folder(name: str, root: Path, image_size: int) -> DataSplits:
    train, test, classes = folders.scan(root)
    transform = eval_transform(image_size)  # training puts its own in place: the recipe says which
    splits = (
        ImageFiles(train, transform, IMAGENET_MEAN, IMAGENET_STD, substitute=True),
        ImageFiles(test, transform, IMAGENET_MEAN, IMAGENET_STD),
    )
    return DataSplits(name, f"ImageFolder {root}", *splits, classes, image_size)


Labelled = tuple[Tensor, Tensor]  # images uint8 (N, 3, S, S), labels int64 (N,)


def _torchvision_cifar10(root: Path, image_size: int, download: bool) -> tuple[Labelled, Labelled, list[str]]:
    try:
        train, test = (CIFAR10(root, train=is_train, download=download) for is_train in (True, False))
    except (RuntimeError, OSError) as error:  # an OSError: it could not be fetched
        remedy = (
            f"fetching it failed ({error}); put one of these there"
            if download
            else "pass download=True to fetch it into that directory"
        )
        raise FileNotFoundError(
            f"{root} holds no complete CIFAR-10: expected an ImageFolder (train/ and test/ with a folder for each "
            f"class) or torchvision's cifar-10-batches-py/; {remedy}"
        ) from error

    def labelled(split: CIFAR10) -> Labelled:
        images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        return _resize(images, image_size), torch.tensor(split.targets)

    return labelled(train), labelled(test), list(train.classes)


def _cached_folder(
    root: Path, image_size: int, cache_dir: str | os.PathLike[str] | None
) -> tuple[Labelled, Labelled, list[str]]:
    train, test, classes = folders.scan(root)
    path = None
    if cache_dir is not None:
        where = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
        path = Path(cache_dir).expanduser() / f"{root.name}-{where}-{image_size}px.pt"
        fingerprint = _fingerprint(root, train + test)
        cache = _read_cache(path)
        if cache.get("fingerprint") == fingerprint:
            return cache["train"], cache["test"], classes
    splits = {"train": _decode_all(train, image_size), "test": _decode_all(test, image_size)}
    # With images left out nothing is kept: they may be readable the next time, and are to be told of again if not.
    if path is not None and all(len(splits[name][1]) == len(part) for name, part in (("train", train), ("test", test))):
        save_atomically({"fingerprint": fingerprint, **splits}, path)
    return splits["train"], splits["test"], classes


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return {}  # none yet, or damaged: it is only a cache, so it is made anew


def _fingerprint(root: Path, samples: Samples) -> str:
    digest = hashlib.sha256()
    for path, label in samples:
        try:
            stat = os.stat(path)  # noqa: PTH116 (60 000 of them: a Path each would double the time)
        except OSError:
            continue  # it cannot be decoded either, and then nothing is kept
        digest.update(f"{os.path.relpath(path, root)} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode_all(samples: Samples, image_size: int) -> Labelled:
    # One after the other: on images this small, threads spend more on the interpreter lock than decoding takes.
    images = np.empty((len(samples), image_size, image_size, 3), np.uint8)
    labels, complaints = [], []
    for path, label in samples:
        try:
            images[len(labels)] = _fit(decode(path), image_size)
        except UndecodableError as error:
            complaints.append(f"{path} ({error.__cause__})")
        else:
            labels.append(label)
    if not labels:
        raise ValueError(f"none of {len(samples)} images can be decoded, the first of them {complaints[0]}")
    if complaints:
        text = damage_text(len(samples), complaints, "they are left out")
        warnings.warn(text, stacklevel=2)
    return torch.from_numpy(images[: len(labels)]).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _fit(image: Image.Image, image_size: int) -> Image.Image:
    if image.size == (image_size, image_size):
        return image
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)


def _resize(images: Tensor, image_size: int) -> Tensor:
    return v2.functional.resize(images, [image_size, image_size], antialias=True).contiguous()
