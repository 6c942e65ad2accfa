"""What of a model is measured first, and with which other ways to run it."""

import pytest

from blockvit.workloads import ModelGrid

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
