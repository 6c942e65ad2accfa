"""Our block-sparse linear kernel: on a GPU, and in Triton's interpreter everywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import INTERPRETED, every_device, test_file_in_the_interpreter

from blockvit import BSRMatrix

pytest.importorskip("triton")
from blockvit.kernels.triton import linear

# Errors of a sum of up to a few hundred products of normal numbers, relative to the largest result.
TOLERANCE = {
    (torch.float32, "ieee"): 1e-6,
    (torch.float32, "tf32x3"): 1e-6,
    (torch.float32, "tf32"): 2e-3,
    (torch.bfloat16, "ieee"): 8e-3 if INTERPRETED else 4e-3,  # the interpreter truncates where a GPU rounds
    (torch.float16, "ieee"): 1e-3,
}
ACTIVATIONS = {None: lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}

every_precision = pytest.mark.parametrize(
    "dtype, precision", list(TOLERANCE), ids=lambda v: str(v).removeprefix("torch.")
)


def test_in_the_interpreter():
    test_file_in_the_interpreter(__file__)


def matrix(block_size: int, dtype: torch.dtype, rows: int = 4, cols: int = 5, kept: float = 0.5) -> BSRMatrix:
    """Random blocks; the first block row is empty, the last full if any is kept."""
    mask = torch.rand(rows, cols) < kept
    mask[0], mask[-1] = False, kept > 0
    dense = torch.randn(rows * block_size, cols * block_size)
    dense *= mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return BSRMatrix.from_dense(dense.to(dtype), block_size)


def assert_near(y, expected, dtype, precision):
    assert y.dtype == dtype and y.shape == expected.shape
    error = (y.double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error <= TOLERANCE[dtype, precision], f"relative error {error:.1e}"


@every_device
@every_precision
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_equals_dense(device, block_size, dtype, precision):
    w = matrix(block_size, dtype)
    bias = torch.randn(w.shape[0])
    for tokens, activation in [(1, None), (70, "gelu")]:
        x = torch.randn(tokens, w.shape[1]).to(dtype)
        parts = [t.to(device) for t in (x, w.crow_indices, w.col_indices, w.values, bias)]
        y = linear.launch(*parts, activation, precision=precision)
        expected = ACTIVATIONS[activation](F.linear(x.double(), w.to_dense().double(), bias.double()))
        assert_near(y, expected, dtype, precision)


@every_device
def test_multiplies_with_the_transposed_matrix_without_a_copy(device):
    w = matrix(32, torch.float32)
    t = BSRMatrix.from_dense(w.to_dense().t().contiguous(), 32)
    row = torch.repeat_interleave(torch.arange(4), w.crow_indices.long().diff())
    order = (w.col_indices.long() * 4 + row).argsort().int()
    assert torch.equal(w.values[order.long()].transpose(1, 2), t.values)
    x = torch.randn(w.shape[0], 50).t()
    parts = [v.to(device) for v in (x, t.crow_indices, t.col_indices, w.values)]
    y = linear.launch(*parts, precision="ieee", order=order.to(device), transposed=True)
    assert_near(y, x.double() @ w.to_dense().double(), torch.float32, "ieee")
