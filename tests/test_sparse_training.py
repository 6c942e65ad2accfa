"""Training through block-sparse products does what masked training does."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel

import blockvit
from blockvit.bsr import BlockPattern, BSRMatrix, block_view
from blockvit.kernels import backends
from blockvit.sparse_training import SparseSupermaskLinear, end_sparse, train_sparse
from blockvit.supermask import SupermaskConv2d, SupermaskLinear, set_sparsity

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
RUNNABLE = [name for name, b in sorted(backends().items()) if b.refusal(torch.device("cpu"), torch.float32, 8) is None]
SPARSE = [name for name in RUNNABLE if name != "dense"]


def model(*, sparsity=0.8, block_size=8, method="supermask", bias=True, dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(52, 70, bias=bias), nn.GELU(), nn.Linear(70, 40, bias=bias)]  # partial blocks at the edges
    made = nn.Sequential(*layers).to(dtype)
    return blockvit.sparsify(made, sparsity, block_size, targets=("0", "2"), method=method)


def adam(net: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr)  # fast enough that masks change within a few steps


def trained_sparse(net: nn.Module, **options) -> nn.Module:
    return train_sparse(net, adam(net), **options)


def batches(count: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 11, 52, generator=generator).to(dtype) for _ in range(count)]


def backward(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss that treats every output differently, by name."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    y = net(x)
    (y * torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y).sin()).sum().backward()
    return {"x": x.grad, "y": y.detach(), **{name: p.grad for name, p in net.named_parameters()}}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> list[torch.Tensor]:
    """The masks that the steps were made with."""
    masks = []
    for x in data:
        masks.append(torch.cat([in_force(layer).flatten() for layer in net if isinstance(layer, SupermaskLinear)]))
        net(x).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return masks


def in_force(layer: SupermaskLinear) -> torch.Tensor:
    return layer.frozen_mask if isinstance(layer, SparseSupermaskLinear) else layer.block_mask()


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1e-3).item()
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*RUNNABLE, "auto"])
def test_gradients_are_those_of_the_masked_model(backend):
    masked = model()
    sparse = trained_sparse(copy.deepcopy(masked), backend=backend)
    (x,) = batches(1)
    assert_same(backward(sparse, x), backward(masked, x), TOLERANCE[torch.float32])


@settings(max_examples=40)
@given(
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 40),
    block_size=st.sampled_from([1, 3, 8, 16]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    method=st.sampled_from(["supermask", "dense_gradient", "magnitude"]),
    bias=st.booleans(),
)
def test_gradients_of_any_shape_in_double_precision(out_features, in_features, block_size, sparsity, method, bias):
    settings = {"sparsity": sparsity, "block_size": block_size, "method": method, "dtype": torch.float64}
    masked = nn.Sequential(SupermaskLinear(in_features, out_features, bias, **settings))
    sparse = trained_sparse(copy.deepcopy(masked), backend="gather")
    x = torch.randn(2, in_features, 3, dtype=torch.float64).transpose(1, 2)
    assert_same(backward(sparse, x), backward(masked, x), TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", SPARSE)
def test_dropped_blocks_cost_no_product(backend, monkeypatch):
    calls = []
    linear = backends()[backend].linear
    counted = lambda x, *rest: calls.append(tuple(x.shape)) or linear(x, *rest)  # noqa: E731
    monkeypatch.setattr(backends()[backend], "linear", staticmethod(counted))
    net = model()
    train_sparse(net, adam(net), backend=backend)
    backward(net, batches(1)[0])
    assert calls == [(33, 56), (33, 72), (33, 40), (33, 72)]  # forward, then the gradients of the inputs


@pytest.mark.parametrize("frozen", ["0.weight", "0.scores", "0.bias", "x"])
def test_what_is_frozen_gets_no_gradient(frozen):
    net = model()
    train_sparse(net, adam(net), refresh_every=2, weight_grad="kept")
    for _ in range(2):
        x = batches(1)[0].requires_grad_(frozen != "x")
        named = dict(net.named_parameters())
        if frozen != "x":
            named[frozen].requires_grad_(False)
        net(x).sum().backward()
        assert (named | {"x": x})[frozen].grad is None
        assert all(p.grad is not None for name, p in named.items() if name != frozen)
        net[0].stepped()


def test_autocast_computes_as_the_masked_model_does():
    masked = model(block_size=16)
    sparse = trained_sparse(copy.deepcopy(masked))
    x = batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = backward(sparse, x), backward(masked, x)
    assert ours["y"].dtype == torch.bfloat16 and ours["0.weight"].dtype == torch.float32
    assert_same(ours, expected, 0.03)


@pytest.mark.parametrize("backend", [None, *SPARSE])
@pytest.mark.parametrize("shape", [(6, 48), (2, 3, 48)], ids=str)
def test_outputs_may_be_changed_in_place(backend, shape):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(48, 64), nn.ReLU(inplace=inplace)) for inplace in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        blockvit.sparsify(net, 0.5, 16, targets="*", scores="magnitude")
        if backend is not None:
            train_sparse(net, adam(net), backend=backend)
    x = torch.randn(shape)
    assert_same(*(backward(net, x) for net in nets), TOLERANCE[torch.float32])


def test_functional_transforms_take_the_masked_layers_path():
    net, (x,) = model(), batches(1)
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    gradient = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().sum())
    expected, forward = gradient(parameters), lambda: torch.func.jvp(net, (x,), (x,))
    slopes = forward()
    train_sparse(net, adam(net), backend="gather")
    torch.testing.assert_close(gradient(parameters), expected)
    torch.testing.assert_close(forward(), slopes)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(net(dual)).tangent, slopes[1])


def test_a_model_on_the_meta_device_gives_shapes():
    net = model()
    train_sparse(net, adam(net), backend="auto")
    assert net.to("meta")(torch.empty(3, 52, device="meta")).shape == (3, 40)


def test_what_was_begun_can_be_ended():
    net, untouched = model(), model()
    optimizer = adam(net)
    end_sparse(train_sparse(net, optimizer))
    assert repr(net) == repr(untouched) and vars(net[0]).keys() == vars(untouched[0]).keys()
    train(net, optimizer, batches(2))  # whose steps are no longer counted
    assert repr(end_sparse(untouched)) == repr(net)


def test_wrong_inputs_raise_as_in_the_masked_layer():
    net = model()
    train_sparse(net, adam(net))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.randn(2, 104))
    with pytest.raises(RuntimeError, match="dtype"):
        net(torch.randn(2, 52, dtype=torch.float64))
    assert net(torch.randn(0, 52)).shape == (0, 40)


# --- many steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_grad", ["dense", "kept"])
@pytest.mark.parametrize("method", ["supermask", "dense_gradient", "magnitude"])
def test_refreshed_in_every_step_it_trains_as_the_masked_model(method, weight_grad):
    masked = model(method=method, dtype=torch.float64)
    sparse = copy.deepcopy(masked)
    optimizer = adam(sparse)
    train_sparse(sparse, optimizer, refresh_every=1, weight_grad=weight_grad, backend="gather")
    data = batches(8, torch.float64)
    expected, ours = train(masked, adam(masked), data), train(sparse, optimizer, data)
    assert any(not torch.equal(expected[0], mask) for mask in expected)  # else nothing is shown
    assert all(map(torch.equal, ours, expected))
    assert_same(sparse.state_dict(), masked.state_dict(), 1e-9)


def test_a_mask_lasts_for_as_many_steps_of_the_optimizer():
    net = model()
    optimizer = adam(net)
    train_sparse(net, optimizer, refresh_every=3)
    masks = train(net, optimizer, batches(7))
    changed = [not torch.equal(*pair) for pair in pairwise(masks)]
    assert changed == [False, False, True, False, False, True]
    for x in batches(5):  # no steps, as when gradients are accumulated
        net(x).sum().backward()
    assert torch.equal(masks[-1], torch.cat([net[0].frozen_mask.flatten(), net[2].frozen_mask.flatten()]))


def test_kept_blocks_alone_get_gradients_between_refreshes():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    train_sparse(net, optimizer, refresh_every=2, weight_grad="kept")
    (x,) = batches(1)
    after_refresh = backward(net, x)
    optimizer.step()
    between = backward(net, x)
    optimizer.step()
    refreshed_again = backward(net, x)
    assert_same(refreshed_again, after_refresh, 0)
    for layer in (net[0], net[2]):
        prefix, mask = ("0." if layer is net[0] else "2."), layer.frozen_mask
        assert after_refresh[f"{prefix}scores"][~mask].ne(0).any()
        assert between[f"{prefix}scores"][~mask].eq(0).all()
        after_refresh[f"{prefix}scores"] *= mask
    assert_same(between, after_refresh, TOLERANCE[torch.float32])


@pytest.mark.parametrize("weight_grad", ["dense", "kept"])
def test_a_resumed_training_equals_an_uninterrupted_one(weight_grad):
    def start():
        net = model()
        optimizer = adam(net)
        return train_sparse(net, optimizer, refresh_every=3, weight_grad=weight_grad), optimizer

    def epoch(net, optimizer, number):
        net.train()
        train(net, optimizer, batches(10)[5 * number :][:5])  # 5 steps are no multiple of 3

    whole, optimizer = start()
    epoch(whole, optimizer, 0)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    epoch(whole, optimizer, 1)

    resumed, optimizer = start()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    epoch(resumed, optimizer, 1)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


def test_a_loaded_state_chooses_the_mask():
    net = model()
    train_sparse(net, adam(net), refresh_every=100)
    state = net.state_dict()
    state["0.scores"] = -state["0.scores"]
    net.load_state_dict(state)
    assert torch.equal(net[0].frozen_mask, net[0].block_mask())


def test_the_mask_moves_with_the_model():
    net = model()
    train_sparse(net, adam(net), refresh_every=100)
    net.to("meta")
    assert all(tensor.is_meta for tensor in net[0]._mask_and_pattern)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_new_sparsity_is_in_force_at_once(share):
    masked = model()
    sparse = trained_sparse(copy.deepcopy(masked), refresh_every=100, backend="gather")
    for net in (masked, sparse):
        set_sparsity(net, share)
    assert_same(backward(sparse, batches(1)[0]), backward(masked, batches(1)[0]), TOLERANCE[torch.float32])


# --- the model around it ---------------------------------------------------------------------------------------------


def test_state_evaluation_and_fold_see_no_difference():
    masked = model()
    sparse = copy.deepcopy(masked)
    optimizer = adam(sparse)
    train_sparse(sparse, optimizer, refresh_every=100)
    train(sparse, optimizer, batches(3))
    assert sparse.state_dict().keys() == masked.state_dict().keys()
    assert [*sparse.buffers()] == []
    masked.load_state_dict(sparse.state_dict())
    assert not torch.equal(sparse[0].frozen_mask, masked[0].block_mask())
    x = batches(1)[0]
    expected = masked.eval()(x)
    assert torch.equal(sparse.eval()(x), expected)  # by the mask that the scores choose now
    blockvit.fold(sparse)
    assert type(sparse[0]) is nn.Linear and torch.equal(sparse(x), expected)
    optimizer.step()


def test_an_average_of_the_model_evaluates_as_one_of_the_masked_model():
    net = model()
    optimizer = adam(net)
    train_sparse(net, optimizer, refresh_every=2)
    average = AveragedModel(net, use_buffers=True)
    masked_average = AveragedModel(model(), use_buffers=True)
    train(net, optimizer, batches(3))
    masked = model()
    masked.load_state_dict(net.state_dict())
    average.update_parameters(net)
    masked_average.update_parameters(masked)
    x = batches(1)[0]
    assert torch.equal(average.eval()(x), masked_average.eval()(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_is_a_masked_model_whose_masks_follow_its_scores(copied):
    net, masked = model(), model()
    train_sparse(net, adam(net), refresh_every=100)
    other = copied(net)
    assert repr(other) == repr(masked) and vars(other[0]).keys() == vars(masked[0]).keys()
    assert type(net[0]) is SparseSupermaskLinear
    data = batches(8)
    assert all(map(torch.equal, train(other, adam(other), data), train(masked, adam(masked), data)))
    trained_sparse(other)


def test_a_layer_in_two_places_is_switched_and_counted_once():
    shared = nn.Linear(16, 16)
    net = blockvit.sparsify(nn.Sequential(shared, nn.ReLU(), shared), 0.9, 4, targets=("0", "2"))
    optimizer = adam(net)
    train_sparse(net, optimizer, refresh_every=2)
    assert net[0] is net[2]
    net(torch.randn(3, 16)).sum().backward()
    before = net[0].frozen_mask
    optimizer.step()
    assert net[0].frozen_mask is before


def test_convolutions_stay_masked():
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8, 8))
    blockvit.sparsify(net, 0.5, 4, targets=("0", "2"))
    train_sparse(net, adam(net))
    assert type(net[0]) is SupermaskConv2d and type(net[2]) is SparseSupermaskLinear


def test_auto_leaves_layers_masked_where_dense_is_faster():
    net = model(sparsity=0.0)
    expected = backward(net, batches(1)[0])
    train_sparse(net, adam(net))
    assert_same(backward(net, batches(1)[0]), expected, 0)


@pytest.mark.skipif("cpu" not in RUNNABLE, reason="the C++ kernel could not be built")
def test_compiled_it_trains_the_same_without_graph_breaks():
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    eager, compiled = model(), model()
    optimizers = adam(eager), adam(compiled)
    for net, optimizer in zip((eager, compiled), optimizers, strict=True):
        train_sparse(net, optimizer, refresh_every=2, weight_grad="kept", backend="cpu")
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(compiled, backend=counter, fullgraph=True)
    for x in batches(6):
        for net, optimizer in zip((eager, forward), optimizers, strict=True):
            net(x).sub(1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert counter.frame_count == 2  # one after a refresh, one between; no refresh compiles anew
    assert_same(compiled.state_dict(), eager.state_dict(), 1e-4)


def test_refresh_every_is_any_integer_and_no_truth_value():
    net = trained_sparse(model(), refresh_every=np.int64(3))
    assert {layer.refresh_every for layer in net if isinstance(layer, SupermaskLinear)} == {3}
    with pytest.raises(ValueError, match="refresh_every is True; expected a number of optimizer steps"):
        trained_sparse(model(), refresh_every=True)


def test_says_what_is_wrong():
    net = model()
    optimizer = adam(net)
    with pytest.raises(ValueError, match="refresh_every is 0; expected a number of optimizer steps"):
        train_sparse(net, optimizer, refresh_every=0)
    with pytest.raises(ValueError, match=r"weight_grad is 'sparse'; expected one of \('dense', 'kept'\)"):
        train_sparse(net, optimizer, weight_grad="sparse")
    with pytest.raises(ValueError, match="backend is 'gathr'"):
        train_sparse(net, optimizer, backend="gathr")
    with pytest.raises(blockvit.BackendUnavailableError, match="run on NVIDIA GPUs only"):
        train_sparse(net, optimizer, backend="torch_tuned")
    assert all(type(layer) is not SparseSupermaskLinear for layer in net)  # errors leave nothing half done
    train_sparse(net, optimizer)
    with pytest.raises(ValueError, match="0 is a SparseSupermaskLinear already"):
        train_sparse(net, optimizer)
    with pytest.raises(ValueError, match="Linear has no SupermaskLinear; call"):
        train_sparse(nn.Linear(3, 3), optimizer)
    with pytest.raises(ValueError, match=r"holds neither weight nor scores of 0,.* pass the optimizer that trains"):
        train_sparse(model(), optimizer)
    with pytest.raises(ValueError, match="method 'spartan', whose kept blocks are weighted"):
        train_sparse(model(method="spartan"), optimizer)


# --- patterns and products -------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 9), cols=st.integers(1, 9), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_pattern_gives_the_indices_of_the_matrix_and_of_its_transpose(rows, cols, density, seed):
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    matrix = mask * torch.arange(1.0, rows * cols + 1).view(rows, cols)
    pattern = BlockPattern.of_mask(mask, int(mask.sum()))
    stored, transposed = (BSRMatrix.from_dense(m, 1) for m in (matrix, matrix.t().contiguous()))
    expected = BlockPattern(
        mask.nonzero()[:, 0].int(),
        stored.col_indices,
        stored.crow_indices,
        transposed.crow_indices,
        transposed.col_indices,
        pattern.order,
    )
    assert all(map(torch.equal, pattern, expected))
    assert all(indices.dtype == torch.int32 for indices in pattern)
    assert torch.equal(stored.values[pattern.order], transposed.values)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("density", [0.1, 0.6])  # few blocks one by one, many by the dense product
@pytest.mark.parametrize("backend", SPARSE)
def test_products_of_the_backward_pass(backend, density, dtype, tolerance):
    backend = backends()[backend]
    if backend.refusal(torch.device("cpu"), dtype, 8):
        pytest.skip("cannot run that dtype")
    mask = torch.rand(5, 7) < density
    pattern = BlockPattern.of_mask(mask, int(mask.sum()))
    values = torch.randn(int(mask.sum()), 8, 8).to(dtype)
    weight = BSRMatrix(pattern.crow, pattern.col, values, (40, 56)).to_dense().double()
    grad, x = torch.randn(40, 300).to(dtype).t(), torch.randn(300, 56).to(dtype)
    products = backend.input_gradient(grad, values, pattern), backend.weight_gradient(grad, x, pattern, 8)
    exact = grad.double() @ weight, block_view(grad.double().t() @ x.double(), 8).transpose(1, 2)[mask]
    for product, expected in zip(products, exact, strict=True):
        assert product.dtype == dtype
        assert (product.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_failure_leaves_the_model_masked():
    net = model()
    with torch.no_grad():
        net[2].scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        trained_sparse(net)
    assert type(net[0]) is type(net[2]) is SupermaskLinear
    nn.init.normal_(net[2].scores)
    assert type(trained_sparse(net)[0]) is SparseSupermaskLinear
    net(batches(1)[0])


def test_steps_are_counted_once_after_an_end():
    net = model()
    optimizer = adam(net)
    for _ in range(2):
        train_sparse(net, optimizer, refresh_every=4)
        ages = []
        for x in batches(3):
            backward(net, x)
            optimizer.step()
            ages.append(net[0]._age)
        assert ages == [1, 2, 3]
        end_sparse(net)


def test_a_subclass_is_refused_with_the_order_to_call_in():
    net = model()
    torch.nn.utils.parametrize.register_parametrization(net[0], "bias", nn.Identity())
    with pytest.raises(ValueError, match=r"0 is a ParametrizedSupermaskLinear, a subclass .* call train_sparse before"):
        trained_sparse(net)
    with pytest.raises(ValueError, match=r"refresh_every is 1\.5; expected a number of optimizer steps"):
        trained_sparse(model(), refresh_every=1.5)
