from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blockvit.bench import Effort, sweep
from blockvit.results import COLUMNS, IMAGES_PER_SECOND, KEYS, STEP_SECONDS, Store
from blockvit.supermask import METHODS, SupermaskConv2d, SupermaskLinear, sparsify, supermask_layers
from blockvit.workloads import training
from blockvit.workloads.training import (
    NAIVE,
    SPARSE,
    TrainingStepCase,
    naive_effective_weight,
    step_cases,
)

CPU = torch.device("cpu")
SHORT = Effort(min_repeats=2, max_repeats=2, seconds=0, min_sample=0)
MODEL = TrainingStepCase("vit_digits", 4, 16)
LAYER = TrainingStepCase("48x32", 10, 16)


@pytest.mark.parametrize(
    "layer",
    [
        SupermaskLinear(30, 22, sparsity=0.7, block_size=8, dtype=torch.float64),
        SupermaskConv2d(9, 10, 3, sparsity=0.7, block_size=4, dtype=torch.float64),
    ],
    ids=["linear", "convolution"],
)
def test_the_naive_implementation_computes_the_same_weight_and_gradients(layer):
    grad = torch.randn_like(layer.weight)
    ours, naive = layer.effective_weight(), naive_effective_weight(layer)
    assert torch.equal(ours, naive)
    parameters = [layer.weight, layer.scores]
    torch.testing.assert_close(
        torch.autograd.grad(ours, parameters, grad), torch.autograd.grad(naive, parameters, grad)
    )


def test_rows_of_a_model():
    rows = MODEL.measure(CPU, SHORT)
    found = {(row["backend"], row["metric"]): row for row in rows}
    assert set(found) == {(b, m) for b in ("dense", "supermask", NAIVE) for m in (STEP_SECONDS, IMAGES_PER_SECOND)}
    for (backend, metric), row in found.items():
        assert set(row) <= set(COLUMNS)
        assert 0 < row["low"] <= row["value"] <= row["high"] and row["repeats"] == 2
        assert (row["model"], row["batch_size"], row.get("tokens")) == ("vit_digits", 4, None)
        masked = (None, None, "dense") if backend == "dense" else (16, 0.9, "blog")
        assert (row.get("block_size"), row.get("sparsity"), row["scope"]) == masked
        assert row["unit"] == {STEP_SECONDS: "s", IMAGES_PER_SECOND: "1/s"}[metric]
    seconds, rate = (found["supermask", metric] for metric in (STEP_SECONDS, IMAGES_PER_SECOND))
    assert [rate[c] for c in ("value", "low", "high")] == [4 / seconds[c] for c in ("value", "high", "low")]


def test_rows_of_a_layer_under_autocast_by_every_method():
    case = TrainingStepCase("48x32", 10, 16, precision="bf16", backends=(NAIVE, *SPARSE, *METHODS))
    rows = case.measure(CPU, SHORT)
    assert [row["backend"] for row in rows] == ["dense", NAIVE, *SPARSE, *METHODS]
    assert {(r["metric"], r["tokens"], r["scope"], r["precision"], r["dtype"]) for r in rows} == {
        (STEP_SECONDS, 10, "linear", "bf16", "float32")
    }


@pytest.mark.parametrize("case", [MODEL, LAYER], ids=["model", "layer"])
def test_a_step_computes_every_gradient_and_the_variants_share_their_weights(case):
    steps = training._Steps(case, CPU, torch.float32)
    weights = {id(p) for p in steps.dense.parameters()}
    for backend in ("dense", *case.backends):
        steps.call(backend, "eager")()
        model = steps.model(backend)
        assert all(p.grad is not None and p.grad.ne(0).any() for p in model.parameters())
        assert weights <= {id(p) for p in model.parameters()}
        masked = supermask_layers(model)
        assert len(masked) == (0 if backend == "dense" else {"48x32": 1, "vit_digits": 13}[case.model])
        assert len({id(p) for p in model.parameters()} - weights) == len(masked)


def test_variants_compute_the_same_from_the_same_weights_whoever_came_before():
    steps = training._Steps(MODEL, CPU, torch.float32)
    before = [p.detach().clone() for p in steps.dense.parameters()]
    outputs = [steps.call(backend, "eager")() for backend in ("supermask", "dense", NAIVE, "supermask")]
    torch.testing.assert_close(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[3]) and not torch.allclose(outputs[0], outputs[1])
    assert all(torch.equal(p, b) for p, b in zip(steps.dense.parameters(), before, strict=True))


def test_masks_that_compute_something_else_cost_their_own_row(monkeypatch):
    def wrong(layer, x):
        return 1.5 * F.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(SupermaskLinear, "forward", wrong)
    rows = LAYER.measure(CPU, SHORT)
    assert {(row["backend"], row["metric"]) for row in rows} == {
        ("dense", STEP_SECONDS),
        ("supermask", "failed"),
        (NAIVE, STEP_SECONDS),
    }


def test_modes_are_in_the_same_group(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **arguments: module)
    case = TrainingStepCase("48x32", 10, 16, modes=("eager", "compile"))
    rows = case.measure(CPU, SHORT)
    assert [(row["compile"], row["backend"]) for row in rows] == [
        (mode, backend) for mode in ("eager", "compile") for backend in ("dense", "supermask", NAIVE)
    ]


def test_a_sweep_measures_once(tmp_path):
    store = Store(tmp_path)
    cases = step_cases(["32x16"], [4], [8, 16], sparsity=0.5)
    assert sweep(cases, store, "training_step", effort=SHORT).measured == 2
    assert sweep(cases, store, "training_step", effort=SHORT).kept == 2
    rows = store.read("training_step")
    assert len(rows) == 6 and rows["group"].nunique() == 2


def test_keys_are_key_columns():
    for case in (MODEL, LAYER):
        assert all(set(key) <= set(KEYS) for key in case.keys(CPU))
        assert [key["backend"] for key in case.keys(CPU)] == ["supermask", NAIVE]


def test_grid():
    cases = step_cases(["3072x768", "vit_b_16"], [2, 8], [16, 32], precision="bf16")
    assert [(c.batch_size, c.block_size, c.model) for c in cases[:5]] == [
        (2, 16, "3072x768"),
        (2, 16, "vit_b_16"),
        (2, 32, "3072x768"),
        (2, 32, "vit_b_16"),
        (8, 16, "3072x768"),
    ]
    assert [c.shape for c in cases[:2]] == [(3072, 768), None]
    assert len(cases) == 8 and {c.precision for c in cases} == {"bf16"}


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backends has \['fast'\]; expected names among \['naive', 'sparse'"):
        TrainingStepCase("vit_digits", 4, 16, backends=("fast",))


def test_naive_masks_are_those_of_the_layer_it_belongs_to():
    model = sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), 0.75, 4, targets="*")
    x = torch.randn(5, 16)
    expected = [layer(x) for layer in supermask_layers(model).values()]
    training._made_naive(model)
    for layer, y in zip(supermask_layers(model).values(), expected, strict=True):
        assert layer.forward.func is training._naive_linear
        torch.testing.assert_close(layer(x), y)
    assert not torch.allclose(*expected)


def test_sparse_training_computes_what_the_supermask_does_and_counts_its_own_steps_only():
    steps = training._Steps(LAYER, CPU, torch.float32)
    calls = {backend: steps.call(backend, "eager") for backend in ("supermask", *SPARSE)}
    gradients = {}
    for backend, call in calls.items():
        call()
        gradients[backend] = [p.grad for p in steps.model(backend).parameters()]
    for backend in SPARSE:  # in the first step the mask is fresh, so that gradients are complete
        torch.testing.assert_close(gradients[backend], gradients["supermask"])
    kept = steps.model("sparse-kept")[0]
    calls["sparse-kept"]()
    assert kept.scores.grad[~kept.frozen_mask].eq(0).all()
    before = steps.model("sparse")[0].frozen_mask
    calls["supermask"]()
    assert steps.model("sparse")[0].frozen_mask is before
