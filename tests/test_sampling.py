"""Orders of an epoch: the same for any number of processes, repeated as in torchvision's reference."""

import math
from collections import Counter
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from blockvit.data import sampling
from blockvit.data.sampling import DrawnPictures, OrderSampler, RepeatedAugSampler

SAMPLERS = pytest.mark.parametrize("sampler", [OrderSampler, RepeatedAugSampler])
WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3, 8])


def ranks(sampler, num_pictures, world_size, epoch=0, **arguments):
    """Each process's draws of an epoch."""
    samplers = [sampler(num_pictures, rank=r, world_size=world_size, **arguments) for r in range(world_size)]
    for each in samplers:
        each.set_epoch(epoch)
    return [list(each) for each in samplers]


def reference(num_pictures, world_size, order, repeats=3):
    """torchvision's ``RASampler``, step by step, on a given order; a list for each rank."""
    samples = math.ceil(num_pictures * repeats / world_size)
    indices = [index for index in order for _ in range(repeats)]
    indices += indices[: samples * world_size - len(indices)]
    selected = math.floor(num_pictures // 256 * 256 / world_size)
    return [indices[rank::world_size][:selected] for rank in range(world_size)]


@SAMPLERS
def test_an_epoch_is_deterministic_by_seed_and_epoch(sampler):
    def epoch(seed, number):
        return ranks(sampler, 600, 1, number, seed=seed)[0]

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
@WORLD_SIZES
def test_each_global_batch_is_that_of_a_single_process(sampler, world_size):
    """Pictures and seeds of augmentation: together the ranks do in step k what one process does."""
    local, single = 8, ranks(sampler, 1025, 1, epoch=3, seed=2)[0]
    shares = ranks(sampler, 1025, world_size, epoch=3, seed=2)
    assert {len(share) for share in shares} == {len(single) // world_size}
    for step in range(len(shares[0]) // local):
        together = {draw for share in shares for draw in share[step * local : (step + 1) * local]}
        assert together == set(single[step * local * world_size : (step + 1) * local * world_size])


@SAMPLERS
@WORLD_SIZES
def test_no_position_is_taken_twice_and_each_has_its_own_augmentation(sampler, world_size):
    draws = [draw for share in ranks(sampler, 1000, world_size) for draw in share]
    seeds = {draw.seed for draw in draws}
    assert len(seeds) == len(draws)
    first = {torch.Generator().manual_seed(seed).initial_seed() & 0xFFFFFFFF for seed in seeds}
    assert len(first) == len(draws), "torch's CPU generator looks at the lower half only"


@SAMPLERS
@WORLD_SIZES
def test_length_and_indices_are_those_of_the_iteration(sampler, world_size):
    for rank in range(world_size):
        one = sampler(1000, rank=rank, world_size=world_size, seed=4)
        one.set_epoch(2)
        draws = list(one)
        assert len(one) == len(draws)
        assert one.indices().dtype == torch.int64
        assert one.indices().tolist() == [draw.index for draw in draws]


@WORLD_SIZES
def test_every_picture_comes_once_but_for_what_cannot_be_dealt_out(world_size):
    counts = Counter(draw.index for share in ranks(OrderSampler, 1001, world_size) for draw in share)
    assert set(counts.values()) == {1}
    assert len(counts) == 1001 // world_size * world_size


@WORLD_SIZES
@pytest.mark.parametrize("num_pictures", [256, 1000, 1536])
def test_repeats_are_the_references(num_pictures, world_size):
    """Same length, same picture at each position of each rank, given the same shuffled order."""
    shares = ranks(RepeatedAugSampler, num_pictures, world_size, seed=1)
    generator = torch.Generator().manual_seed(sampling.epoch_seed(1, 0))
    expected = reference(num_pictures, world_size, torch.randperm(num_pictures, generator=generator).tolist())
    assert [[draw.index for draw in share] for share in shares] == expected


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_each_selected_picture_comes_repeats_times_on_as_many_processes(repeats):
    shares = ranks(RepeatedAugSampler, 1024, 4, repeats=repeats)
    counts = Counter(draw.index for share in shares for draw in share)
    assert len(counts) == math.ceil(1024 / repeats)
    *whole, last = counts.most_common()
    assert {count for _, count in whole} <= {repeats} and last[1] == (1024 % repeats or repeats)
    where = [{rank for rank, share in enumerate(shares) if index in {d.index for d in share}} for index, _ in whole]
    assert {len(on) for on in where} == {repeats}


class Noise(Dataset):
    """Each picture is its index and a number drawn by its augmentation."""

    def __getitem__(self, index):
        return index, torch.rand(())


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_depends_on_neither_processes_nor_workers(world_size, num_workers):
    def epoch(world_size, num_workers):
        batches = []
        for rank in range(world_size):
            sampler = RepeatedAugSampler(48, rank=rank, world_size=world_size)
            loader = DataLoader(
                DrawnPictures(Noise()), 24 // world_size, sampler=sampler, drop_last=True, num_workers=num_workers
            )
            batches.append([list(zip(*(part.tolist() for part in batch), strict=True)) for batch in loader])
        return [sorted(chain(*parts)) for parts in zip(*batches, strict=True)]

    expected = epoch(1, 0)
    assert epoch(world_size, num_workers) == expected
    drawn = [number for batch in expected for _, number in batch]
    assert len(set(drawn)) == 48 and len({index for batch in expected for index, _ in batch}) == 16


def test_an_augmentation_leaves_no_trace_in_the_random_state():
    before = torch.get_rng_state()
    DrawnPictures(Noise())[sampling.Draw(3, 4)]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_set_is_taken_whole():
    assert [len(share) for share in ranks(RepeatedAugSampler, 40, 2)] == [20, 20]


def test_evaluation_counts_every_picture_once():
    shares = [sampling.eval_indices(10, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(index for share in shares for index in share) == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 of world size 2; expected a rank from 0"),
        ({"rank": -1}, "rank -1 of world size 1"),
        ({"world_size": 0}, "world size 0"),
        ({"num_pictures": 3, "world_size": 4}, "3 pictures cannot be dealt out to 4 processes"),
        ({"repeats": 0}, "repeats is 0; expected how often"),
    ],
    ids=str,
)
def test_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepeatedAugSampler(**{"num_pictures": 10} | arguments)


def test_evaluation_of_a_rank_that_is_none():
    with pytest.raises(ValueError, match="rank 4 of world size 4"):
        sampling.eval_indices(10, rank=4, world_size=4)
