from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_train import TINY, tiny_data, tiny_model
from torchvision.transforms import v2

from blockvit import data, train
from blockvit.train import batches as batching
from blockvit.train.augment import Draws, RandAugment, augment
from blockvit.train.processes import Alone


def process(rank, count):
    one = Alone("cpu")
    one.rank, one.count = rank, count
    return one


def epoch_of(recipe, splits, rank=0, count=1, accumulate=1, epoch=0, num_workers=0):
    return list(
        batching.batches(
            splits.train, len(splits.classes), recipe, epoch, process(rank, count), accumulate, num_workers
        )
    )


# The order


def test_an_epoch_sees_each_image_once_and_each_epoch_another_order():
    first, second = (train.epoch_order(33, TINY, epoch) for epoch in (0, 1))
    assert first.shape == (4, 8)
    assert len(first.unique()) == 32
    assert not torch.equal(first, second)
    assert torch.equal(first, train.epoch_order(33, TINY, 0))
    assert not torch.equal(first, train.epoch_order(33, replace(TINY, seed=1), 0))


def test_repeated_augmentation_repeats_images_within_a_batch():
    recipe = replace(TINY, ra_sampler=True, batch_size=16)
    order = train.epoch_order(100, recipe, 0)
    assert order.shape == (6, 16)  # no longer an epoch than without
    assert len(order.unique()) == 96 // 3
    for batch in order:
        assert 5 <= len(batch.unique()) <= 7  # 16 thirds, one image at each end may belong to the next batch


@pytest.mark.parametrize("count", [1, 2])
def test_repeated_augmentation_mixes_no_image_with_itself(monkeypatch, count):
    monkeypatch.setattr(batching, "MIX_GROUP", 12)
    recipe = replace(TINY, ra_sampler=True, batch_size=24, mixup_alpha=0.2)
    order = train.epoch_order(100, recipe, 0)
    parts = [part for rank in range(count) for part in batching.passes(recipe, process(rank, count), 2)]
    own = [part.rows[1:] if part.pieces[0].borrowed else part.rows for part in parts]
    assert sorted(torch.cat(own).tolist()) == list(range(24))
    for batch in order:
        for part in parts:
            for piece in part.pieces:
                group = batch[part.rows[piece.rows]]
                mixed = (group != group.roll(1))[1:] if piece.borrowed else group != group.roll(1)
                assert mixed.all()


# Passes


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("group", [4, 16, 24, 512])
def test_processes_and_passes_cut_the_same_global_batch(monkeypatch, count, accumulate, group):
    monkeypatch.setattr(batching, "MIX_GROUP", group)
    splits = tiny_data(100)
    recipe = replace(
        TINY, batch_size=32, mixup_alpha=0.2, cutmix_alpha=1.0, hflip=True, auto_augment="ra", random_crop_padding=1
    )
    whole = epoch_of(recipe, splits)
    shares = [epoch_of(recipe, splits, rank, count, accumulate) for rank in range(count)]
    assert len(whole) == 3
    for step, (images, labels) in enumerate(whole):
        parts = [part for share in shares for part in share[step * accumulate : (step + 1) * accumulate]]
        assert {len(part[0]) for part in parts} == {32 // (count * accumulate)}
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), images, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), labels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [{}, {"count": 2}, {"accumulate": 2}, {"num_workers": 2}])
def test_files_are_augmented_alike_whoever_decodes_them(tmp_path, cut):
    from PIL import Image

    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(9):
                pixels = torch.randint(256, (12, 12, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    splits = data.load("folder", tmp_path, image_size=8)
    transform = data.train_transform(8, hflip=True, auto_augment="ra")
    splits = replace(splits, train=replace(splits.train, transform=transform))
    recipe = replace(TINY, mixup_alpha=0.2)
    whole = epoch_of(recipe, splits)
    torch.manual_seed(99)  # whatever the state of the process
    shares = [epoch_of(recipe, splits, rank, **cut) for rank in range(cut.get("count", 1))]
    passes = cut.get("accumulate", 1)
    for step, batch in enumerate(whole):
        parts = [part for share in shares for part in share[step * passes : (step + 1) * passes]]
        for ours, theirs in zip(batch, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(theirs), ours, rtol=0, atol=1e-6)
    assert not torch.equal(whole[0][0], epoch_of(recipe, splits, epoch=1)[0][0])


def test_accumulation_is_the_fewest_passes_that_are_small_enough():
    assert batching.accumulation(4096, 8) == 1
    assert batching.accumulation(4096, 1) == 8
    assert batching.accumulation(4096, 3072 // 512 * 2 - 4) == 1
    assert batching.accumulation(96 * 11, 1) == 3  # two passes of 528 are too large
    assert batching.accumulation(64, 2, 4) == 4
    for arguments, message in (
        ((64, 3), "batch_size is 64 for 3 processes; expected a multiple of processes times passes"),
        ((64, 2, 3), "batch_size is 64 for 2 processes with accumulate=3; expected"),
        ((64, 2, 0), "accumulate=0"),
    ):
        with pytest.raises(ValueError, match=message):
            batching.accumulation(*arguments)


# Mixing


@pytest.mark.parametrize(
    ("alphas", "mixes"), [((0.2, 0.0), {"MixUp"}), ((0.0, 1.0), {"CutMix"}), ((0.2, 1.0), {"MixUp", "CutMix"})]
)
def test_mixing_trains_on_soft_labels(alphas, mixes, monkeypatch):
    used, targets = set(), []
    for name in ("MixUp", "CutMix"):
        mix = getattr(v2, name)
        original = mix.transform

        def transform(self, value, params, name=name, original=original):
            used.add(name)
            return original(self, value, params)

        monkeypatch.setattr(mix, "transform", transform)
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y, **kw: targets.append(y) or cross_entropy(x, y, **kw))
    recipe = replace(TINY, epochs=4, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    train.fit(tiny_model(), tiny_data(), recipe, progress=False, eval_every=9)
    soft = torch.cat([target for target in targets if target.ndim == 2])
    assert used == mixes
    assert torch.allclose(soft.sum(1), torch.ones(len(soft)))
    assert ((soft > 0.01) & (soft < 0.99)).any()


# Augmentation


def drawn(images, recipe, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return augment(images, Draws.make(len(images), recipe, generator), recipe)


def test_shift_moves_whole_images_over_a_black_border():
    images = torch.zeros(200, 3, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 9
    shifted = drawn(images, replace(TINY, random_crop_padding=1))
    places = shifted[:, 0].nonzero()
    assert len(places) == 200
    assert {tuple(place) for place in places[:, 1:].tolist()} == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}
    assert torch.equal(shifted[:, 0], shifted[:, 2])


def test_flip_mirrors_about_half():
    images = torch.arange(4, dtype=torch.uint8).expand(200, 3, 4, 4)
    mirrored = drawn(images, replace(TINY, hflip=True))[:, 0, 0, 0] == 3
    assert 70 < int(mirrored.sum()) < 130


def test_no_augmentation_leaves_images_alone():
    images = tiny_data().train.images
    assert drawn(images, TINY) is images


@pytest.mark.parametrize("operation", range(len(v2.RandAugment._AUGMENTATION_SPACE)))
@pytest.mark.parametrize("negative", [False, True])
def test_randaugment_does_to_each_image_what_torchvision_does(operation, negative):
    images = tiny_data(6, size=32).train.images
    ours = RandAugment(9)
    operations = torch.zeros(6, 2, dtype=torch.long)  # 0: identity
    operations[[1, 4], 0] = operation
    signs = torch.full((6, 2), negative)
    result = ours(images, operations, signs)

    class Theirs(v2.RandAugment):
        """torchvision's own way through, its two draws replaced by the ones above."""

        def _get_random_item(self, space):
            name = list(space)[operation]
            return name, space[name]

    theirs = Theirs(num_ops=1, magnitude=9, interpolation=v2.InterpolationMode.BILINEAR)
    rand = torch.rand
    torch.rand = lambda *size: torch.tensor(0.0 if negative else 1.0)
    try:
        expected = theirs(images[[1, 4]])
    finally:
        torch.rand = rand
    assert torch.equal(result[[1, 4]], expected)
    assert torch.equal(result[[0, 2, 3, 5]], images[[0, 2, 3, 5]])


def test_randaugment_draws_for_each_image():
    images = tiny_data(1, size=32).train.images.expand(300, -1, -1, -1)
    recipe = replace(TINY, auto_augment="ra")
    result = drawn(images, recipe)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    assert len(result.flatten(1).unique(dim=0)) > 100
    operations, negative = RandAugment(9).draw(3000, torch.Generator().manual_seed(0))
    assert set(operations.unique().tolist()) == set(range(14))
    assert 0.45 < negative.float().mean() < 0.55
