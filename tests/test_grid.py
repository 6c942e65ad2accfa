"""What of a model is measured first, and with which other ways to run it."""

import pytest

from blockvit import headline
from blockvit.workloads import UNPRUNED, DeviceGrid, ModelGrid

FULL = {
    "model": "vit_b_16",
    "scopes": ["mlp", "all"],
    "precisions": ["bf16", "fp32"],
    "block_sizes": [64, 16],
    "sparsities": [0.9, 0.5],
    "batch_size": 256,
    "batch_sizes": [1],
    "backends": ["triton", "2:4"],
    "contenders": ["gather"],
    "dense_modes": ["compile"],
    "sparse_modes": ["cudagraph"],
    "batch_modes": ["cudagraph"],
    "large_model": "vit_h_14",
    "large_sparsities": [0.8],
}


def cells(cases):
    return [(c.model, c.scope, c.batch_size, c.sparsity, c.precision, c.block_size) for c in cases]


def test_the_order_is_that_of_importance():
    cases = ModelGrid(**FULL).cases()
    both = [("bf16", 64), ("bf16", 16), ("fp32", 64), ("fp32", 16)]
    assert cells(cases) == [
        *[("vit_b_16", "mlp", 256, 0.9, *cell) for cell in both],
        *[("vit_b_16", "mlp", 256, 0.5, *cell) for cell in both],
        *[("vit_b_16", "mlp", 1, 0.9, *cell) for cell in both],
        *[("vit_b_16", "mlp", 256, 0.9, precision, 64) for precision in ("bf16", "fp32")],
        *[("vit_b_16", "all", 256, 0.9, *cell) for cell in both],
        *[("vit_b_16", "all", 256, 0.5, *cell) for cell in both],
        ("vit_h_14", "mlp", 256, 0.8, "bf16", 64),
    ]
    small = {name: FULL[name] for name in ("model", "scopes", "precisions", "block_sizes", "sparsities", "batch_size")}
    assert len(ModelGrid(**small).cases()) == 16


def test_ways_to_run_and_contenders():
    cases = ModelGrid(**FULL).cases()
    first, small_blocks, batch, ways, large = cases[0], cases[1], cases[8], cases[12], cases[-1]
    assert first.backends == ("triton", "gather") and first.memory and first.dense_modes == ("compile",)
    assert first.semi_structured and not small_blocks.semi_structured, "2:4 has no blocks: it is timed once"
    assert cases[4].backends == ("triton",) and not cases[4].memory, "contenders at 90% only"
    assert batch.dense_modes == batch.sparse_modes == ("cudagraph",) and batch.backends == ("triton",)
    assert (ways.dense_modes, ways.sparse_modes) == (("compile", "cudagraph"), ("cudagraph",))
    assert large.sparse_modes == ("cudagraph",)


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_rows_are_written_before_something_compiles_for_minutes(mode):
    cases = ModelGrid(**{**FULL, "dense_modes": [mode, "compile"]}).cases()
    assert cells(cases[:4]) == cells(cases[4:8])
    assert {case.dense_modes for case in cases[:4]} == {("compile",)}
    assert {case.dense_modes for case in cases[4:8]} == {(mode, "compile")}


DEVICE = {
    "model": "vit_b_16",
    "small_model": "vit_cifar",
    "scopes": ["mlp", "all"],
    "precision": "fp32",
    "block_sizes": [64, 32],
    "sparsities": [0.9, 0.8],
    "batch_sizes": [4],
    "backends": ["cpu", "cpu+dense"],
    "engines": ["compile", "openvino"],
    "sparse_modes": ["compile"],
    "samples": 100,
}


def test_what_readme_tells_of_is_measured_first_and_in_every_way():
    cases = DeviceGrid(**DEVICE).cases()
    told = cases[: len(headline.CASES)]
    assert {(c.scope, c.sparsity, c.block_size) for c in told} == set(headline.CASES)
    assert {(c.model, c.batch_size, c.sparse_modes, c.dense_modes) for c in told} == {
        ("vit_b_16", 1, ("compile",), ("compile", "openvino"))
    }, "a compiled sparse model beside an eager one would be no comparison"
    sampled = [c for c in cases if c.tails]
    assert sampled == cases[:1] and (sampled[0].scope, sampled[0].block_size, sampled[0].tails) == ("all", 64, 100)


def test_the_kernel_is_measured_without_sparsity_too():
    cases = DeviceGrid(**DEVICE).cases()
    alone = next(case for case in cases if case.scope == UNPRUNED)
    assert cases.index(alone) <= len(headline.CASES) + 1, "among the first"
    assert (alone.scope, alone.sparsity, alone.backends) == (UNPRUNED, 0.0, ("cpu+dense",))
    assert alone.sparse_modes == ("compile",) and alone.dense_modes == ("compile", "openvino") and alone.memory
    without = DeviceGrid(**{**DEVICE, "backends": ["cpu"]}).cases()
    assert not [c for c in without if c.scope == UNPRUNED], "it converts sparse layers only"


def test_the_rest_of_a_device():
    grid = DeviceGrid(**DEVICE)
    cases = grid.cases()
    assert len(cases) == len(set(cases)) and len(set(cells(cases))) == len(cases), "each cell once"
    sweep = {cell for cell in cells(cases) if cell[0] == "vit_b_16" and cell[2] == 1 and cell[1] != UNPRUNED}
    assert len(sweep) == 2 * 2 * 2
    assert cells(cases)[-4:] == [
        ("vit_cifar", "mlp", 1, 0.9, "fp32", 64),
        ("vit_cifar", "all", 1, 0.9, "fp32", 64),
        ("vit_b_16", "mlp", 4, 0.9, "fp32", 64),
        ("vit_b_16", "all", 4, 0.9, "fp32", 64),
    ]
    assert {c.dense_modes for c in [*cases[-2:], *grid.at_90()]} == {("openvino",)}, "none that compiles anew"
    assert [(c.scope, c.batch_size, c.sparse_modes) for c in grid.at_90()] == [("mlp", 1, ()), ("all", 1, ())]
