import math
import os
import pickle
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.transforms import InterpolationMode, v2

from blockvit import data, models, train

CIFAR_CLASSES = ["cat", "dog"]


def write_folder(root, splits=("train", "test"), classes=CIFAR_CLASSES, count=3, size=32, mode="RGB"):
    """An ImageFolder whose image i of class c is of one colour, 40 * c + i."""
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = 40 * label + i
                Image.new(mode, (size, size), colour if mode == "L" else (colour,) * 3).save(folder / f"{i}.png")
    return root


def write_cifar_pickles(root, count=4):
    """torchvision's own CIFAR-10 layout, ``count`` images a batch."""
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


def test_cifar10_folder_of_other_sizes_and_grey_images(tmp_path):
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


def test_both_layouts_of_cifar10_are_one_data_set(tmp_path, monkeypatch):
    """The same images as pickles and as an ImageFolder: the same tensors but for their order, the same training."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    pickles = data.load("cifar10", write_cifar_pickles(tmp_path / "pickles", count=10))
    for split, part in (("train", pickles.train), ("test", pickles.test)):
        for number, (image, label) in enumerate(zip(*part[:], strict=True)):
            folder = tmp_path / "folder" / split / pickles.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02}.png")
    folder = data.load("cifar10", tmp_path / "folder")
    assert (folder.classes, folder.image_size) == (pickles.classes, pickles.image_size)
    for one, other in ((pickles.train, folder.train), (pickles.test, folder.test)):
        order = one.labels.argsort(stable=True)  # an ImageFolder comes class by class
        assert torch.equal(one.images[order], other.images) and torch.equal(one.labels[order], other.labels)
        assert (one.mean, one.std) == (other.mean, other.std)
    recipe = train.Recipe(epochs=1, batch_size=10, lr=1e-3, hflip=True, random_crop_padding=2)
    for splits in (pickles, folder):
        model = models.create("vit_cifar", num_layers=1, hidden_dim=24, mlp_dim=24, num_heads=2)
        assert math.isfinite(train.fit(model, splits, recipe, progress=False).epochs[0]["train_loss"])


@pytest.fixture
def decodes(monkeypatch):
    calls = []
    original = data.sets._decode_all
    monkeypatch.setattr(data.sets, "_decode_all", lambda *args: calls.append(args) or original(*args))
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
def test_large_images_are_decoded_when_asked_for(tmp_path, name):
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
    image = Image.fromarray(pixels)
    train, evaluate = data.train_transform(32, auto_augment="ra"), data.eval_transform(32)
    assert train(image).shape == (3, 32, 32)
    assert train(image).dtype == torch.uint8
    assert not torch.equal(train(image), train(image))
    assert torch.equal(evaluate(image), evaluate(image))
    names = [type(step).__name__ for step in data.train_transform(32, hflip=False).transforms]
    assert names == ["PILToTensor", "RandomResizedCrop"]


def preset(*steps):
    """torchvision's reference preset, its steps on Pillow's images."""
    return v2.Compose([*steps, v2.PILToTensor()])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(320, 240), (200, 300)])
def test_sizes_of_evaluation_are_those_of_the_recipe_of_vit_b_16(size, interpolation):
    """224 out of 256, like the reference on Pillow's images but for rounding."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    ours = data.eval_transform(224, interpolation=interpolation)(image)
    assert torch.equal(ours, data.eval_transform(224, 256, interpolation=interpolation)(image))
    resize = v2.Resize(256, interpolation=InterpolationMode(interpolation), antialias=True)
    expected = preset(resize, v2.CenterCrop(224))(image)
    assert ours.shape == (3, 224, 224)
    assert (ours.int() - expected.int()).abs().max() <= 2
    other = {"bilinear": "bicubic", "bicubic": "bilinear"}[interpolation]
    for changed in (data.eval_transform(224, interpolation=other), data.eval_transform(224, 288)):
        assert (ours.int() - changed(image).int()).abs().max() > 2


def test_training_crops_as_the_reference_does():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((320, 240))
    torch.manual_seed(1)
    ours = data.train_transform(64, hflip=True)(image)
    torch.manual_seed(1)
    expected = preset(v2.RandomResizedCrop(64, antialias=True), v2.RandomHorizontalFlip())(image)
    assert (ours.int() - expected.int()).abs().max() <= 2
    torch.manual_seed(1)
    assert not torch.equal(data.train_transform(64, hflip=True, interpolation="nearest")(image), ours)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.eval_transform(224, 200), "val_crop_size is 224 and val_resize_size 200; expected a crop of"),
        (lambda: data.eval_transform(0), "val_crop_size is 0"),
        (
            lambda: data.eval_transform(8, interpolation="bilinaer"),
            r"unknown interpolation 'bilinaer' \(did you mean 'bil",
        ),
        (lambda: data.train_transform(8, interpolation="lanczos"), "unknown interpolation 'lanczos'; expected one of"),
    ],
    ids=["crop", "zero", "typo", "Pillow only"],
)
def test_sizes_and_interpolations_that_do_not_exist(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_images_to_evaluate_on_need_no_images_to_train_on(tmp_path):
    write_folder(tmp_path, ("val",), size=60)
    images, classes = data.evaluation(tmp_path, val_crop_size=48, val_resize_size=50)
    assert (classes, len(images)) == (CIFAR_CLASSES, 6)
    assert images[4][0].shape == (3, 48, 48) and images[4][1] == 1
    with pytest.raises(FileNotFoundError, match=r"test does not exist; expected"):
        data.evaluation(tmp_path / "val")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"different classes: only val/ has dog\. Expected"):
        data.evaluation(tmp_path)


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
    with pytest.raises(ValueError, match="train holds no classes; expected one folder of images"):
        data.load("cifar10", tmp_path)


def test_class_without_images(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(
        ValueError, match=r"train holds no images of: eel; add some \(.*\.png.*\), make .*or remove them"
    ):
        data.load("folder", tmp_path)


def test_splits_with_different_classes(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "dogs")
    with pytest.raises(
        ValueError, match=r"different classes: only train/ has dog; only test/ has dogs\. Expected the same"
    ):
        data.load("folder", tmp_path)


@pytest.mark.parametrize("missing", [3, 30])
def test_many_classes_in_only_one_split(tmp_path, missing):
    names = [f"n{i:03}" for i in range(40)]
    write_folder(tmp_path, ("train",), names, count=1, size=4)
    write_folder(tmp_path, ("val",), names[missing:], count=1, size=4)
    listed = {3: "n000, n001, n002", 30: ", ".join(names[:10]) + " and 20 more"}[missing]
    with pytest.raises(ValueError, match=rf"only train/ has {listed}\. Expected"):
        data.load("imagenet", tmp_path)


def test_images_without_class_folders(tmp_path):
    """What ImageNet's validation archive unpacks to."""
    write_folder(tmp_path, ("train",))
    for image in (tmp_path / "train" / "cat").iterdir():
        (tmp_path / "val").mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / "val" / image.name)
    with pytest.raises(ValueError, match="val holds 3 images but no classes; expected one folder of images"):
        data.load("imagenet", tmp_path)


def test_class_folders_that_hold_no_images_at_all(tmp_path):
    for split in ("train", "val"):
        for name in CIFAR_CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "readme.txt").write_text("no image, and not named like one")
    with pytest.raises(ValueError, match="train holds no images of: cat, dog; add some"):
        data.load("imagenet", tmp_path)


# Images that cannot be decoded


def damage(root, kind="text"):
    """Spoil the dogs 0 and 2 of both splits; returns the paths, those of train first."""
    paths = [root / split / "dog" / f"{i}.png" for split in ("train", "test") for i in (0, 2)]
    for path in paths:
        whole = path.read_bytes()
        if kind == "dangling link":
            path.unlink()
            path.symlink_to("nowhere.png")
        elif kind == "directory":
            path.unlink()
            path.symlink_to(root)
        else:
            path.write_bytes({"text": b"no image", "truncated": whole[: len(whole) // 2], "empty": b""}[kind])
    return paths


KINDS = pytest.mark.parametrize("kind", ["text", "truncated", "empty", "dangling link"])
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


@KINDS
def test_damaged_images_in_memory_are_left_out_and_told(tmp_path, kind):
    damage(write_folder(tmp_path), kind)
    with pytest.warns(UserWarning) as caught:
        cifar = data.load("cifar10", tmp_path)
    of_images = [warning for warning in caught if "decoded" in str(warning.message)]
    for warning, split in zip(of_images, ("train", "test"), strict=True):
        told = (
            rf"2 of 6 .* decoded; they are left out: .*{split}/dog/0.png \(.+\), .*{split}/dog/2.png \(.+\)\. Replace"
        )
        assert re.search(told, str(warning.message))
    for split in (cifar.train, cifar.test):
        assert split.labels.tolist() == [0, 0, 0, 1]
        assert split.images[:, 0, 0, 0].tolist() == [0, 1, 2, 41]


def test_a_set_with_damaged_images_is_not_cached(tmp_path):
    """It may be repaired by the next time, and if not, it is told again."""
    root, cache = write_folder(tmp_path / "set"), tmp_path / "cache"
    *train_broken, one, other = damage(root)
    for broken, left in ((train_broken, 4), ((one, other), 6)):
        for _ in range(2):
            with pytest.warns(UserWarning, match="2 of 6 images cannot be decoded"):
                assert len(data.load("cifar10", root, cache_dir=cache).train) == left
        for path in broken:
            shutil.copy(path.with_name("1.png"), path)
    assert len(data.load("cifar10", root, cache_dir=cache).train) == 6
    assert len(list(cache.iterdir())) == 1


def test_a_split_in_memory_without_any_readable_image(tmp_path):
    for path in (write_folder(tmp_path) / "train").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 6 images can be decoded, the first of them .*cat/0\.png \("):
        data.load("cifar10", tmp_path)


@KINDS
@WORKERS
def test_training_takes_the_next_image_for_a_damaged_one(tmp_path, kind, num_workers):
    """Batches stay full; the workers' counts come back; the report names the files and what is wrong with them."""
    broken = damage(write_folder(tmp_path), kind)
    images = replace(data.load("folder", tmp_path, image_size=8).train, transform=data.eval_transform(8))
    assert data.damage_report(images) is None
    batches = list(DataLoader(images, 3, num_workers=num_workers))
    assert [len(batch) for batch, _ in batches] == [3, 3]
    seen, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.tolist() == [0, 0, 0, 1, 1, 0]
    assert seen[:, 0, 0, 0].tolist() == [0, 1, 2, 41, 41, 0]  # the last one's next is the first
    assert images.damaged.nonzero().flatten().tolist() == [3, 5]
    report = data.damage_report(images)
    told = rf"2 of 6 images .*; others were taken in their place: {broken[0]} \(.+\), {broken[1]} \(.+\)\. Replace"
    assert re.match(told, report)
    list(DataLoader(images, 3, num_workers=num_workers))
    assert data.damage_report(images) == report, "the same images are not counted again in the next epoch"


@KINDS
@WORKERS
def test_evaluation_counts_a_damaged_image_neither_right_nor_wrong(tmp_path, kind, num_workers):
    damage(write_folder(tmp_path), kind)
    images = data.load("folder", tmp_path, image_size=8).test
    labels = torch.cat([labels for _, labels in DataLoader(images, 4, num_workers=num_workers)])
    assert labels.tolist() == [0, 0, 0, data.DAMAGED, 1, data.DAMAGED]

    class Bright(torch.nn.Module):
        """Right about every dog, wrong about every cat, and dogs are what it would call a black image."""

        def forward(self, x):
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    with pytest.warns(UserWarning, match=r"2 of 6 images cannot be decoded; they count neither right nor wrong: .*dog"):
        result = train.evaluate(Bright(), images, num_workers=num_workers)
    assert (result["top1"], result["damaged"]) == (1 / 4, 2)
    assert result["loss"] == pytest.approx(1 / 4 * math.log(1 + math.exp(-1)) + 3 / 4 * math.log(1 + math.exp(1)))


def test_images_to_train_on_are_not_substituted_where_they_are_evaluated_on(tmp_path):
    damage(write_folder(tmp_path))
    images = data.load("folder", tmp_path, image_size=8).train
    with pytest.warns(UserWarning, match="2 of 6"):
        assert train.evaluate(models.create("vit_digits", num_classes=2), images)["damaged"] == 2


def test_accuracy_needs_an_image_that_can_be_decoded(tmp_path):
    for path in (write_folder(tmp_path) / "test").glob("*/*.png"):
        path.write_bytes(b"")
    images = data.load("folder", tmp_path, image_size=8).test
    model = models.create("vit_digits", num_classes=2)
    with (
        pytest.warns(UserWarning, match="6 of 6"),
        pytest.raises(ValueError, match="none of 6 images can be decoded"),
    ):
        train.evaluate(model, images)


@WORKERS
def test_a_lost_disk_is_no_reason_to_go_on_training(tmp_path, num_workers):
    root = write_folder(tmp_path, count=30)
    for path in (root / "train" / "dog").iterdir():
        path.unlink()
        path.symlink_to("gone.png")
    images = data.load("folder", root, image_size=8).train
    loader = DataLoader(images, sampler=[35], num_workers=num_workers)
    with pytest.raises(
        OSError, match=r"train/dog/.*\.png and the 16 images after it cannot be decoded; check the disk"
    ):
        list(loader)
    assert images.damaged.nonzero().flatten().tolist() == list(range(35, 52))


def test_an_image_that_may_not_be_read_is_damaged_like_any_other(tmp_path, monkeypatch):
    """By a refusing ``open``, because who runs the tests as root may read everything."""
    root = write_folder(tmp_path)
    refused, open_image = root / "test" / "cat" / "1.png", Image.open

    def refuse(path, *args):
        if Path(path) == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return open_image(path, *args)

    monkeypatch.setattr(Image, "open", refuse)
    images = data.load("folder", root, image_size=8).test
    assert [images[i][1] for i in range(3)] == [0, data.DAMAGED, 0]
    assert re.search(
        r"1 of 6 .*cat/1\.png \(\[Errno 13\] Permission denied.*Replace or remove", data.damage_report(images)
    )


def test_a_report_names_only_the_first(tmp_path):
    root = write_folder(tmp_path, count=6)
    for path in (root / "test" / "cat").iterdir():
        path.write_bytes(b"")
    images = data.load("folder", root, image_size=8).test
    for i in range(len(images)):
        images[i]
    report = data.damage_report(images)
    assert (
        report.startswith("6 of 12 images") and report.count("/test/cat/") == 2 * 3 and "), ... Replace" not in report
    )
    assert re.search(r"cat/2\.png \(.*\), \.\.\.\. Replace", report)


def test_a_report_after_a_repair_says_so(tmp_path):
    broken = damage(write_folder(tmp_path))[2]
    images = data.load("folder", tmp_path, image_size=8).test
    assert images[3][1] == data.DAMAGED
    shutil.copy(broken.with_name("1.png"), broken)
    assert "dog/0.png (it can be decoded by now)" in data.damage_report(images)


def test_training_goes_on_and_tells_of_damage_once(tmp_path):
    damage(write_folder(tmp_path, size=8))
    splits = data.load("folder", tmp_path, image_size=8)
    recipe = train.Recipe(epochs=3, batch_size=2, lr=1e-3)
    model = models.create("vit_digits", num_classes=2, num_layers=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        history = train.fit(model, splits, recipe, progress=False)
    assert len(history.epochs) == 3 and all(0 <= epoch["test_top1"] <= 1 for epoch in history.epochs)
    told = [str(warning.message) for warning in caught if "cannot be decoded" in str(warning.message)]
    assert len(told) == 2
    assert "others were taken in their place" in told[0] and "they count neither right nor wrong" in told[1]


def test_image_size_must_be_positive():
    with pytest.raises(ValueError, match="image_size is 0; expected the edge length in pixels"):
        data.load("digits", image_size=0)


def test_imagenets_own_layout_has_images_without_labels_beside_those_to_evaluate_on(tmp_path):
    write_folder(tmp_path, ("train", "val"))
    (tmp_path / "test").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "ILSVRC2012_test_00000001.png")
    assert len(data.load("folder", tmp_path).test) == 6
    assert data.evaluation(tmp_path)[1] == CIFAR_CLASSES
    write_folder(tmp_path, ("test",), count=1)
    assert len(data.load("folder", tmp_path).test) == 2, "with classes it is the test split"


def test_evaluation_needs_a_root():
    with pytest.raises(ValueError, match="data set to evaluate on needs a root, got None"):
        data.evaluation(None)


@pytest.mark.parametrize("error", [RuntimeError("File not found or corrupted."), OSError("Name or service not known")])
def test_what_could_not_be_fetched_is_told_with_what_to_do(tmp_path, monkeypatch, error):
    def fails(root, train, download):
        raise error

    monkeypatch.setattr("blockvit.data.sets.CIFAR10", fails)
    with pytest.raises(FileNotFoundError, match=rf"fetching it failed \({error}\); put one of these there"):
        data.load("cifar10", tmp_path / "none", download=True)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="unknown auto_augment 'ta_wide'; expected one of: ra"):
        data.transforms.train_transform(32, auto_augment="ta_wide")
