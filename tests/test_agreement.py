"""Whether results agree, and that what a kernel leaves unwritten is seen."""

from __future__ import annotations

import pytest
import torch

from blockvit.agreement import check_close, poison


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("tf32", 5e-3), ("bf16", 3e-2), ("fp16", 5e-3)])
def test_check_close_tolerates_its_class_and_no_more(precision, error):
    expected = torch.tensor([1.0, -20.0, 3.0])
    check_close(expected + torch.tensor([0.0, 0.0, 0.9 * error * 20]), expected, precision, "x")
    with pytest.raises(ArithmeticError, match=r"backend 'x' differs from the dense result by .*largest output 20\)"):
        check_close(expected - torch.tensor([1.1 * error * 20, 0.0, 0.0]), expected, precision, "backend 'x'")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_close_fails_where_a_result_is_not_finite(bad):
    with pytest.raises(ArithmeticError, match=r"nothing was written"):
        check_close(torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0]), "bf16", "x")
    with pytest.raises(ArithmeticError):
        check_close(torch.tensor([1.0, bad]), torch.tensor([1.0, bad]), "bf16", "x")


def test_check_close_accepts_zeros_for_zeros():
    check_close(torch.zeros(3), torch.zeros(3), "fp32", "x")
    with pytest.raises(ArithmeticError):
        check_close(torch.full((3,), 1e-9), torch.zeros(3), "fp32", "x")


def test_check_close_refuses_another_shape():
    with pytest.raises(ArithmeticError, match=r"shape"):
        check_close(torch.ones(1, 3), torch.ones(2, 3), "fp32", "x")


def test_poison_needs_no_gpu_and_changes_nothing():
    expected = torch.ones(3)
    poison(expected)
    assert torch.equal(expected, torch.ones(3))


@pytest.mark.gpu
def test_what_is_not_written_is_not_an_earlier_result():
    expected = torch.randn(512, 512, device="cuda")
    earlier = expected.clone()
    del earlier  # the allocator would hand out its memory again
    poison(expected)
    assert torch.empty_like(expected).isnan().all()
