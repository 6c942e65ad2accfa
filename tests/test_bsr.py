from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockvit.bsr import BSRMatrix, block_view, check_block_size, zero_blocks

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def blocky_weight(
    rows: int, cols: int, block_size: int, density: float, seed: int, dtype=torch.float32
) -> torch.Tensor:
    """Random weight in which about ``1 - density`` of the blocks are zero; made by loops, without library code."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    for i in range(0, rows, block_size):
        for j in range(0, cols, block_size):
            if torch.rand((), generator=generator) >= density:
                weight[i : i + block_size, j : j + block_size] = 0
    return weight


sizes = {
    "rows": st.integers(1, 40),
    "cols": st.integers(1, 40),
    "block_size": st.sampled_from([1, 2, 3, 4, 8, 16, 64]),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "seed": st.integers(0, 99),
    "dtype": st.sampled_from(DTYPES),
}


@given(**sizes)
def test_from_dense_and_to_dense_are_inverse(rows, cols, block_size, density, seed, dtype):
    weight = blocky_weight(rows, cols, block_size, density, seed, dtype)
    matrix = BSRMatrix.from_dense(weight, block_size).check_indices()
    assert torch.equal(matrix.to_dense(), weight)
    assert matrix.to_dense().dtype == dtype
    assert matrix.shape == (rows, cols)
    assert matrix.block_size == block_size


@given(**sizes)
def test_padded_dense_is_the_weight_with_zeros_behind_it(rows, cols, block_size, density, seed, dtype):
    weight = blocky_weight(rows, cols, block_size, density, seed, dtype)
    matrix = BSRMatrix.from_dense(weight, block_size)
    padded = matrix.to_dense(padded=True)
    assert tuple(padded.shape) == matrix.padded_shape
    assert all(
        size % block_size == 0 and 0 <= size - s < block_size
        for size, s in zip(padded.shape, (rows, cols), strict=True)
    )
    assert torch.equal(padded[:rows, :cols], weight)
    assert padded[rows:].eq(0).all() and padded[:, cols:].eq(0).all()


@given(**sizes)
def test_parts_agree_with_pytorchs_own_bsr(rows, cols, block_size, density, seed, dtype):
    matrix = BSRMatrix.from_dense(blocky_weight(rows, cols, block_size, density, seed, dtype), block_size)
    theirs = matrix.to_dense(padded=True).to_sparse_bsr(block_size)
    assert torch.equal(matrix.crow_indices.long(), theirs.crow_indices())
    assert torch.equal(matrix.col_indices.long(), theirs.col_indices())
    assert torch.equal(matrix.values, theirs.values())
    assert matrix.crow_indices.dtype == matrix.col_indices.dtype == torch.int32


def test_only_blocks_with_a_nonzero_are_stored():
    weight = torch.zeros(6, 10)
    weight[5, 9] = -0.5  # in the partial corner block
    weight[0, 4] = float("nan")  # not a zero
    weight[2, 1] = -0.0  # a zero
    assert zero_blocks(weight, 4).tolist() == [[True, False, True], [True, True, False]]
    matrix = BSRMatrix.from_dense(weight, 4)
    assert (matrix.nnz, matrix.block_shape, matrix.padded_shape) == (2, (2, 3), (8, 12))
    assert matrix.crow_indices.tolist() == [0, 1, 2]
    assert matrix.col_indices.tolist() == [1, 2]
    assert matrix.sparsity == pytest.approx(4 / 6)
    assert matrix.nbytes == (3 + 2) * 4 + 2 * 16 * 4


def test_block_view_indexes_block_row_then_row_within():
    matrix = torch.arange(24.0).view(4, 6)
    view = block_view(matrix, 2)
    assert view.shape == (2, 2, 3, 2)
    assert torch.equal(view[1, :, 2, :], matrix[2:4, 4:6])


def test_from_dense_copies_and_detaches():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    matrix = BSRMatrix.from_dense(weight, 2)
    assert not matrix.values.requires_grad
    with torch.no_grad():
        weight.zero_()
    assert matrix.values.eq(1).all()


@pytest.mark.parametrize("block_size", [1.0, "32", None, True, 32.5])
def test_block_size_that_is_no_integer(block_size):
    with pytest.raises(TypeError, match=r"block_size is .*expected an integer such as 16"):
        check_block_size(block_size)


@pytest.mark.parametrize("block_size", [0, -16])
def test_block_size_below_one(block_size):
    with pytest.raises(ValueError, match=rf"block_size is {block_size}; expected at least 1"):
        BSRMatrix.from_dense(torch.ones(4, 4), block_size)


def test_numpy_integers_are_block_sizes():
    numpy = pytest.importorskip("numpy")
    assert type(check_block_size(numpy.int64(16))) is int


def test_weight_must_be_two_dimensional():
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3, 4\); expected 2-D"):
        BSRMatrix.from_dense(torch.ones(2, 3, 4), 2)


def indices(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def parts(**changes) -> dict:
    """A valid 4x6 matrix in blocks of 2, with some parts exchanged."""
    valid = {
        "crow_indices": indices([0, 2, 3]),
        "col_indices": indices([0, 2, 1]),
        "values": torch.ones(3, 2, 2),
        "shape": (4, 6),
    }
    return valid | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.ones(3, 2, 3)}, r"values have shape \(3, 2, 3\); expected \(stored blocks"),
        ({"values": torch.ones(12)}, r"values have shape \(12,\)"),
        (
            {"crow_indices": indices([0, 3])},
            r"crow_indices have shape \(2,\); expected \(3,\) for a 4x6",
        ),
        ({"col_indices": indices([0, 2])}, r"col_indices have shape \(2,\); expected \(3,\)"),
    ],
)
def test_wrong_shapes_are_refused_at_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        BSRMatrix(**parts(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crow_indices": indices([1, 2, 3])}, "crow_indices must rise from 0"),
        (
            {"crow_indices": indices([0, 2, 2])},
            "crow_indices must rise from 0 to the number of stored blocks",
        ),
        ({"crow_indices": indices([0, 4, 3])}, "crow_indices must rise"),
        ({"col_indices": indices([0, 3, 1])}, r"col_indices must lie in \[0, 3\); got 0 to 3"),
        (
            {"col_indices": indices([-1, 2, 1])},
            r"col_indices must lie in \[0, 3\); got -1 to 2",
        ),
        ({"col_indices": indices([2, 0, 1])}, "col_indices must ascend within each block row"),
        (
            {"col_indices": indices([1, 1, 1])},
            "col_indices must ascend within each block row, without repeats",
        ),
    ],
)
def test_wrong_indices_are_refused_by_check_indices(changes, message):
    matrix = BSRMatrix(**parts(**changes))
    with pytest.raises(ValueError, match=message):
        matrix.check_indices()


def test_valid_indices_pass_and_columns_may_fall_from_row_to_row():
    matrix = BSRMatrix(**parts())
    assert matrix.check_indices() is matrix


def test_a_matrix_without_blocks():
    matrix = BSRMatrix.from_dense(torch.zeros(5, 7), 4).check_indices()
    assert (matrix.nnz, matrix.sparsity) == (0, 1.0)
    assert torch.equal(matrix.to_dense(), torch.zeros(5, 7))


def test_indices_are_checked_whatever_the_default_device():
    matrix = BSRMatrix.from_dense(torch.eye(8), 2)
    torch.set_default_device("meta")
    try:
        assert matrix.check_indices() is matrix
    finally:
        torch.set_default_device(None)


def test_types_are_checked():
    matrix = BSRMatrix.from_dense(torch.eye(8), 2)
    crow, col, values, shape = matrix.crow_indices, matrix.col_indices, matrix.values, matrix.shape
    with pytest.raises(ValueError, match=r"col_indices are torch\.int64; expected torch\.int32"):
        BSRMatrix(crow, col.long(), values, shape).check_indices()
    with pytest.raises(ValueError, match=r"values are torch\.int32; expected a floating point type"):
        BSRMatrix(crow, col, values.int(), shape).check_indices()
