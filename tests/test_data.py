import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from blockvit import data

CIFAR_CLASSES = ["cat", "dog"]


def write_folder(root, splits=("train", "test"), classes=CIFAR_CLASSES, count=3, size=32, mode="RGB"):
    """An ImageFolder whose picture i of class c is of one colour, 40 * c + i."""
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = 40 * label + i
                Image.new(mode, (size, size), colour if mode == "L" else (colour,) * 3).save(folder / f"{i}.png")
    return root


def write_cifar_pickles(root, count=4):
    """torchvision's own CIFAR-10 layout, ``count`` pictures a batch."""
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    batches = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in batches:
        entry = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": list(range(count))}
        (base / name).write_bytes(pickle.dumps(entry))
    classes = {"label_names": [f"class{i}" for i in range(10)]}
    (base / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(classes))
    return root


@pytest.mark.parametrize(("suffix", "label"), [("jpg", "cifar10-jpeg"), ("JPEG", "cifar10-jpeg"), ("png", "cifar10")])
def test_label_of_cifar10_comes_from_its_files(tmp_path, suffix, label):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    (folder / "readme.txt").touch()
    (folder / f"0.{suffix}").touch()
    assert data.label("cifar10", tmp_path) == label


def test_label_of_what_is_no_folder_of_cifar10_is_its_name(tmp_path):
    assert data.label("cifar10", write_cifar_pickles(tmp_path)) == "cifar10"
    assert data.label("cifar10") == data.label("cifar10", tmp_path / "missing") == "cifar10"
    assert data.label("imagenet", tmp_path) == "imagenet"


def test_digits_split_is_fixed_stratified_and_disjoint():
    first, again = data.load("digits"), data.load("digits")
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert torch.equal(first.test.images, again.test.images)
    assert first.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    train, test = ({p.numpy().tobytes() for p in split.images} for split in (first.train, first.test))
    assert not train & test


def test_digits_are_normalised_and_grey():
    digits = data.load("digits")
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.shape[1:] == (3, 8, 8)
    assert digits.train.images.max() == 255
    assert torch.equal(digits.train.images[:, 0], digits.train.images[:, 2])
    floats = data.normalize(digits.train.images, digits.train.mean, digits.train.std)
    assert floats.mean().item() == pytest.approx(0, abs=1e-4)
    assert floats.std().item() == pytest.approx(1, abs=1e-3)


def test_digits_of_another_size():
    digits = data.load("digits", image_size=16)
    assert digits.image_size == 16
    assert digits.train.images.shape[1:] == (3, 16, 16)


def test_normalize_takes_each_channel_by_its_own():
    images = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    result = data.normalize(images, (0.5, 0.5, 0.1), (0.5, 0.25, 0.1))
    assert torch.allclose(result.flatten(), torch.tensor([1.0, -2.0, 1.0]))


def test_splits_index_like_datasets():
    digits = data.load("digits")
    image, label = digits.test[3]
    assert image.shape == (3, 8, 8)
    assert label.ndim == 0
    assert digits.test[torch.tensor([1, 3])][0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("eval_folder", ["test", "val"])
def test_cifar10_from_a_folder(tmp_path, eval_folder):
    cifar = data.load("cifar10", write_folder(tmp_path, ("train", eval_folder)))
    assert (cifar.name, cifar.source) == ("cifar10", f"ImageFolder {tmp_path}")
    assert cifar.classes == CIFAR_CLASSES
    assert cifar.train.images.shape == (6, 3, 32, 32)
    assert cifar.train.images.dtype == torch.uint8
    assert cifar.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert cifar.train.images[:, 1, 5, 7].tolist() == [0, 1, 2, 40, 41, 42]


def test_cifar10_folder_of_other_sizes_and_grey_pictures(tmp_path):
    cifar = data.load("cifar10", write_folder(tmp_path, size=40, mode="L"), image_size=16)
    assert cifar.image_size == 16
    assert cifar.test.images[:, 2, 8, 8].tolist() == [0, 1, 2, 40, 41, 42]


def test_cifar10_from_torchvisions_files(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    cifar = data.load("cifar10", write_cifar_pickles(tmp_path))
    assert cifar.source == f"torchvision CIFAR10 {tmp_path}"
    assert cifar.train.images.shape == (20, 3, 32, 32)
    assert cifar.train.labels.tolist() == [0, 1, 2, 3] * 5
    assert cifar.classes[9] == "class9"
    stored = pickle.loads((tmp_path / CIFAR10.base_folder / "test_batch").read_bytes())["data"]
    assert np.array_equal(cifar.test.images.numpy().reshape(4, 3072), stored)


@pytest.fixture
def decodes(monkeypatch):
    calls = []
    original = data._decode_all
    monkeypatch.setattr(data, "_decode_all", lambda *args: calls.append(args) or original(*args))
    return calls


def test_cache_is_used_until_the_folder_changes(tmp_path, decodes):
    root, cache = write_folder(tmp_path / "set"), tmp_path / "cache"
    first = data.load("cifar10", root, cache_dir=cache)
    second = data.load("cifar10", root, cache_dir=cache)
    assert len(decodes) == 2  # a call for each split, all by the first load
    assert torch.equal(first.train.images, second.train.images)
    assert len(list(cache.iterdir())) == 1

    changed = root / "train" / "cat" / "0.png"
    Image.new("RGB", (32, 32), (200,) * 3).save(changed)
    os.utime(changed, ns=(1, 1))  # the new file may have the old one's size
    third = data.load("cifar10", root, cache_dir=cache)
    assert len(decodes) == 4
    assert third.train.images[0, 0, 0, 0] == 200
    assert len(list(cache.iterdir())) == 1

    (root / "train" / "dog" / "0.png").unlink()
    assert len(data.load("cifar10", root, cache_dir=cache).train) == 5


def test_damaged_cache_is_made_anew(tmp_path, decodes):
    root, cache = write_folder(tmp_path / "set"), tmp_path / "cache"
    data.load("cifar10", root, cache_dir=cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:100], b""):
        file.write_bytes(damage)
        assert len(data.load("cifar10", root, cache_dir=cache).train) == 6
    assert len(decodes) == 8


def test_cache_of_another_folder_is_not_taken(tmp_path):
    one, two = write_folder(tmp_path / "a" / "set"), write_folder(tmp_path / "b" / "set", count=2)
    assert len(data.load("cifar10", one, cache_dir=tmp_path / "cache").train) == 6
    assert len(data.load("cifar10", two, cache_dir=tmp_path / "cache").train) == 4


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_large_pictures_are_decoded_when_asked_for(tmp_path, name):
    splits = data.load(name, write_folder(tmp_path, ("train", "val"), size=60), image_size=48)
    assert (splits.name, splits.source, splits.classes) == (name, f"ImageFolder {tmp_path}", CIFAR_CLASSES)
    image, label = splits.test[4]
    assert (image.shape, image.dtype, label) == ((3, 48, 48), torch.uint8, 1)
    assert image.unique().tolist() == [41]


def test_imagenet_is_224_pixels_by_default(tmp_path):
    splits = data.load("imagenet", write_folder(tmp_path, count=1))
    assert splits.image_size == 224
    assert splits.train[0][0].shape == (3, 224, 224)


def test_train_transform_varies_eval_transform_does_not():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    train, evaluate = data.train_transform(32, auto_augment="ra"), data.eval_transform(32)
    assert train(picture).shape == (3, 32, 32)
    assert train(picture).dtype == torch.uint8
    assert not torch.equal(train(picture), train(picture))
    assert torch.equal(evaluate(picture), evaluate(picture))
    names = [type(step).__name__ for step in data.train_transform(32, hflip=False).transforms]
    assert names == ["PILToTensor", "RandomResizedCrop"]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown data set 'cifar' \(did you mean 'cifar10'\?\).*digits"):
        data.load("cifar")


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "folder"])
def test_root_is_needed(name):
    with pytest.raises(ValueError, match=f"'{name}' needs a root, got None; pass the directory"):
        data.load(name)


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_root_missing_or_a_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected a directory with train/"):
        data.load(name, tmp_path / "nowhere")
    archive = tmp_path / "archive.tar"
    archive.touch()
    with pytest.raises(NotADirectoryError, match=r"archive.tar is a file; expected a directory"):
        data.load(name, archive)


def test_cifar10_neither_folder_nor_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no complete CIFAR-10.*download=True"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_split_is_missing(tmp_path, missing):
    shutil.rmtree(write_folder(tmp_path) / missing)
    with pytest.raises(FileNotFoundError, match=rf"{missing} does not exist; expected .* train/ and test/ or val/"):
        data.load("folder", tmp_path)


def test_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train holds no classes; expected one folder of pictures"):
        data.load("cifar10", tmp_path)


def test_class_without_pictures(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match="holds no pictures of: eel; add some or remove"):
        data.load("folder", tmp_path)


def test_splits_with_different_classes(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "dogs")
    with pytest.raises(ValueError, match="different classes: dog, dogs in only one of them"):
        data.load("folder", tmp_path)


def test_damaged_picture_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test" / "dog" / "1.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"cannot decode .*dog/1.png.*replace or remove"):
        data.load("cifar10", tmp_path)


def test_image_size_must_be_positive():
    with pytest.raises(ValueError, match="image_size is 0; expected the edge length in pixels"):
        data.load("digits", image_size=0)


def test_save_atomically_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "new" / "state.pt"
    data.save_atomically({"a": 1}, path)

    class Unpicklable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        data.save_atomically({"big": torch.zeros(1000), "bad": Unpicklable()}, path)
    assert torch.load(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]
