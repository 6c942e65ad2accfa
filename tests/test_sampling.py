"""Orders of an epoch: by seed and number, repeated as in torchvision's reference."""

import math
from itertools import groupby

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from blockvit.data import sampling
from blockvit.data.sampling import DrawnImages, OrderSampler, RepeatedAugSampler

SAMPLERS = pytest.mark.parametrize("sampler", [OrderSampler, RepeatedAugSampler])


def drawn(sampler, num_images, epoch=0, **arguments):
    """The draws of an epoch."""
    one = sampler(num_images, **arguments)
    one.set_epoch(epoch)
    return list(one)


def reference(order, repeats=3):
    """torchvision's ``RASampler`` in a single process, step by step, on a given order."""
    indices = [index for index in order for _ in range(repeats)]
    return indices[: len(order) // 256 * 256]


@SAMPLERS
def test_an_epoch_is_deterministic_by_seed_and_epoch(sampler):
    def epoch(seed, number):
        return drawn(sampler, 600, number, seed=seed)

    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4
    one = sampler(600, seed=5)
    assert list(one) == list(one), "iterating does not change what comes next"


@SAMPLERS
def test_the_callers_random_state_is_neither_used_nor_changed(sampler):
    first = list(sampler(600))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert list(sampler(600)) == first
    assert torch.equal(torch.get_rng_state(), before)


@SAMPLERS
def test_each_position_has_its_own_augmentation(sampler):
    draws = drawn(sampler, 1000)
    seeds = {draw.seed for draw in draws}
    assert len(seeds) == len(draws)
    first = {torch.Generator().manual_seed(seed).initial_seed() & 0xFFFFFFFF for seed in seeds}
    assert len(first) == len(draws), "torch's CPU generator looks at the lower half only"


@SAMPLERS
def test_length_and_indices_are_those_of_the_iteration(sampler):
    one = sampler(1000, seed=4)
    one.set_epoch(2)
    draws = list(one)
    assert len(one) == len(draws)
    assert one.indices().dtype == torch.int64
    assert one.indices().tolist() == [draw.index for draw in draws]


def test_every_image_comes_once():
    assert sorted(draw.index for draw in drawn(OrderSampler, 1001)) == list(range(1001))


@pytest.mark.parametrize("num_images", [256, 1000, 1536])
def test_repeats_are_the_references(num_images):
    """Same length, same image at each position, given the same shuffled order."""
    generator = torch.Generator().manual_seed(sampling.epoch_seed(1, 0))
    expected = reference(torch.randperm(num_images, generator=generator).tolist())
    assert [draw.index for draw in drawn(RepeatedAugSampler, num_images, seed=1)] == expected


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_each_selected_image_comes_repeats_times_in_a_row(repeats):
    indices = [draw.index for draw in drawn(RepeatedAugSampler, 1024, repeats=repeats)]
    runs = [(index, len(list(run))) for index, run in groupby(indices)]
    assert len(runs) == len({index for index, _ in runs}) == math.ceil(1024 / repeats)
    *whole, (_, last) = runs
    assert {length for _, length in whole} == {repeats} and last == (1024 % repeats or repeats)


class Noise(Dataset):
    """Each image is its index and a number drawn by its augmentation."""

    def __getitem__(self, index):
        return index, torch.rand(())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_does_not_depend_on_workers(num_workers):
    def epoch(num_workers):
        sampler = RepeatedAugSampler(48)
        loader = DataLoader(DrawnImages(Noise()), 24, sampler=sampler, num_workers=num_workers)
        return [pair for batch in loader for pair in zip(*(part.tolist() for part in batch), strict=True)]

    expected = epoch(0)
    assert epoch(num_workers) == expected
    assert len({number for _, number in expected}) == 48 and len({index for index, _ in expected}) == 16


def test_an_augmentation_leaves_no_trace_in_the_random_state():
    before = torch.get_rng_state()
    DrawnImages(Noise())[sampling.Draw(3, 4)]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_set_is_taken_whole():
    assert len(drawn(RepeatedAugSampler, 40)) == 40


def test_evaluation_counts_every_image_once():
    shares = [sampling.eval_indices(10, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(index for share in shares for index in share) == list(range(10))


def test_repeats_out_of_range():
    with pytest.raises(ValueError, match="repeats is 0; expected how often"):
        RepeatedAugSampler(10, repeats=0)


@pytest.mark.parametrize(("rank", "world_size"), [(4, 4), (-1, 1), (0, 0)])
def test_evaluation_of_a_rank_that_is_none(rank, world_size):
    with pytest.raises(ValueError, match=f"rank {rank} of world size {world_size}"):
        sampling.eval_indices(10, rank=rank, world_size=world_size)
