from __future__ import annotations

import pytest
import torch
from torch import nn

from blockvit import semi_structured
from blockvit.semi_structured import prune_2_of_4, refusal, to_semi_structured


def test_two_of_every_four_stay_and_they_are_the_largest():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.0, 0.5, -0.25, 0.1]])
    assert prune_2_of_4(weight).tolist() == [[0.0, -4.0, 0.0, 3.0, 0.0, 0.5, -0.25, 0.0]]


def test_ties_and_zeros_keep_no_more_than_two():
    pruned = prune_2_of_4(torch.ones(3, 16))
    assert (pruned.view(-1, 4) != 0).sum(1).tolist() == [2] * 12
    assert prune_2_of_4(torch.zeros(2, 4)).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(4,), (2, 6), (2, 2, 4)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="expected two dimensions, the second a multiple of 4"):
        prune_2_of_4(torch.ones(shape))


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    return torch.device("cuda")


def test_refusals(ampere, monkeypatch):
    assert refusal(ampere, torch.bfloat16, (768, 3072)) is None is refusal(ampere, torch.float16)
    assert "needs an NVIDIA GPU, and the device is cpu" in refusal(torch.device("cpu"), torch.bfloat16)
    assert "take float16 and bfloat16, not float32" in refusal(ampere, torch.float32)
    assert "multiples of 16, not 1000x768" in refusal(ampere, torch.bfloat16, (1000, 768))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    assert "Tesla T4 has no sparse tensor cores" in refusal(ampere, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", semi_structured.DTYPES)
@pytest.mark.parametrize("tokens", [1, 197, 256])
def test_products_equal_the_pruned_dense_ones(dtype, tokens):
    linear = nn.Linear(768, 3072, device="cuda", dtype=dtype)
    linear.weight.data = prune_2_of_4(linear.weight.data)
    x = torch.randn(tokens, 768, device="cuda", dtype=dtype)
    with torch.inference_mode():
        expected = linear(x)
        (sparse,) = to_semi_structured(nn.Sequential(linear), ("0",))
        assert float((sparse(x) - expected).abs().max()) < 0.03 * float(expected.abs().max())
