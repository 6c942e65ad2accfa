from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import blockvit
from blockvit.masks import (
    CHUNK_BYTES,
    block_mask,
    block_means,
    block_norms,
    masked_linear,
    multiply_blocks,
    num_kept,
    soft_top_k,
)
from blockvit.supermask import (
    METHODS,
    SupermaskConv2d,
    SupermaskLinear,
    cubic_sparsity,
    set_sharpness,
    set_sparsity,
    sparsify,
    supermask_layers,
)

sparsities = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.5, 0.7, 0.9, 0.99]))


def reference_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The reference implementation's mask: what is not below the percentile, which ``kthvalue`` picks."""
    k = 1 + round(0.01 * float(sparsity * 100) * (scores.numel() - 1))
    return scores >= scores.flatten().kthvalue(k).values


def reference_expand(mask: torch.Tensor, block_size: int, shape: torch.Size) -> torch.Tensor:
    """The reference's way from blocks to elements: repeat in every dimension, then cut."""
    for dim, size in enumerate(shape):
        mask = mask.repeat_interleave(block_size, dim=dim).narrow(dim, 0, size)
    return mask


# --- which blocks are kept -------------------------------------------------------------------------------------------


@given(n=st.integers(1, 400), sparsity=sparsities, seed=st.integers(0, 99), levels=st.sampled_from([1, 2, 5, 10**6]))
def test_count_of_kept_blocks_is_exact_with_and_without_ties(n, sparsity, seed, levels):
    scores = torch.randint(levels, (n,), generator=torch.Generator().manual_seed(seed)).double()
    mask = block_mask(scores, sparsity)
    assert int(mask.sum()) == n - round(0.01 * (sparsity * 100) * (n - 1)) >= 1
    assert mask.dtype == torch.bool
    if not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


@given(n=st.integers(1, 400), sparsity=sparsities, seed=st.integers(0, 99))
def test_distinct_scores_give_the_references_mask(n, sparsity, seed):
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double() - n / 2
    assert torch.equal(block_mask(scores, sparsity), reference_mask(scores, sparsity))


def test_the_number_kept_rounds_as_the_reference_does():
    # 0.7 * 575 is 402.5 and would round to even; the reference computes 0.01 * (0.7 * 100), a little more than 0.7.
    # 576 blocks are ViT-B/16's MLP in blocks of 64.
    assert num_kept(576, 0.7) == 173
    assert int(reference_mask(torch.randperm(576).double(), 0.7).sum()) == 173


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"), [(1, 0.0, 1), (1, 0.99, 1), (10, 0.0, 10), (10, 0.99, 1), (11, 0.5, 6)]
)
def test_number_kept(n, sparsity, kept):
    assert num_kept(n, sparsity) == kept


def test_ties_break_by_position():
    assert block_mask(torch.zeros(2, 3), 0.6).tolist() == [[True, True, True], [False, False, False]]


def test_infinite_scores_are_ordered():
    scores = torch.tensor([0.0, math.inf, -math.inf, 1.0])
    assert block_mask(scores, 0.5).tolist() == [False, True, False, True]


def test_nan_scores_are_refused_in_the_forward_pass():
    layer = SupermaskLinear(8, 8, sparsity=0.5, block_size=4)
    with torch.no_grad():
        layer.scores[0, 1] = math.nan
    with pytest.raises(ValueError, match=r"1 of 4 mask scores are NaN.*lower the learning rate"):
        layer(torch.randn(2, 8))


# --- forward and gradients -------------------------------------------------------------------------------------------

layers = {
    "rows": st.integers(1, 20),
    "cols": st.integers(1, 20),
    "block_size": st.sampled_from([1, 2, 3, 4, 8, 32]),
    "sparsity": sparsities,
    "seed": st.integers(0, 99),
}


def random_layer(rows, cols, block_size, sparsity, seed) -> SupermaskLinear:
    torch.manual_seed(seed)
    return SupermaskLinear(cols, rows, sparsity=sparsity, block_size=block_size, dtype=torch.float64)


@given(**layers)
def test_forward_and_gradients_equal_a_dense_reimplementation(rows, cols, block_size, sparsity, seed):
    layer = random_layer(rows, cols, block_size, sparsity, seed)
    x = torch.randn(3, 5, cols, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)

    mask = reference_expand(layer.block_mask(), block_size, layer.weight.shape).double()
    weight = layer.weight.detach()
    effective = (weight * mask).requires_grad_()
    dense_x = x.detach().clone().requires_grad_()
    dense_y = F.linear(dense_x, effective, layer.bias.detach())
    dense_y.backward(grad_y)

    torch.testing.assert_close(y, dense_y)
    torch.testing.assert_close(x.grad, dense_x.grad)
    torch.testing.assert_close(layer.bias.grad, grad_y.sum(dim=(0, 1)))
    torch.testing.assert_close(layer.weight.grad, effective.grad * mask)
    for i in range(layer.scores.shape[0]):
        for j in range(layer.scores.shape[1]):
            block = slice(i * block_size, (i + 1) * block_size), slice(j * block_size, (j + 1) * block_size)
            torch.testing.assert_close(layer.scores.grad[i, j], (effective.grad * weight)[block].sum())


def test_dropped_blocks_get_score_gradient_but_no_weight_gradient():
    layer = SupermaskLinear(12, 8, sparsity=0.8, block_size=4)
    layer(torch.randn(5, 12)).square().sum().backward()
    dropped = ~layer.block_mask()
    assert dropped.any()
    assert layer.scores.grad[dropped].ne(0).all()
    elements = reference_expand(dropped, 4, layer.weight.shape)
    assert layer.weight.grad[elements].eq(0).all()
    assert layer.weight.grad[~elements].ne(0).any()


def test_a_dropped_block_can_come_back_by_its_gradient():
    layer = SupermaskLinear(8, 4, bias=False, sparsity=0.9, block_size=4)
    with torch.no_grad():
        layer.scores.copy_(torch.tensor([[1.0, 0.9]]))
        layer.weight.copy_(torch.ones(4, 8))
    assert layer.block_mask().tolist() == [[True, False]]
    x = torch.cat([torch.zeros(1, 4), torch.ones(1, 4)], dim=1)
    loss = -layer(x).sum()  # only the dropped block could lower it
    loss.backward()
    with torch.no_grad():
        layer.scores -= 0.1 * layer.scores.grad
    assert layer.block_mask().tolist() == [[False, True]]


def test_frozen_weight_or_scores_get_no_gradient():
    layer = SupermaskLinear(8, 8, sparsity=0.5, block_size=4)
    layer.weight.requires_grad_(False)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is None and layer.scores.grad is not None
    layer.weight.requires_grad_(True)
    layer.scores = nn.Parameter(layer.scores.detach(), requires_grad=False)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None and layer.scores.grad is None


def test_sparsity_zero_is_the_dense_layer():
    dense = nn.Linear(10, 6)
    x = torch.randn(4, 10)
    expected = dense(x)
    assert torch.equal(SupermaskLinear.from_dense(dense, sparsity=0, block_size=4)(x), expected)


def test_from_dense_shares_parameters_and_mode():
    dense = nn.Linear(8, 6).eval()
    masked = SupermaskLinear.from_dense(dense, sparsity=0.5, block_size=4)
    assert masked.weight is dense.weight and masked.bias is dense.bias
    assert not masked.training
    assert masked.scores.shape == (2, 2)
    assert "sparsity=0.5, block_size=4" in repr(masked)
    assert SupermaskLinear.from_dense(nn.Linear(8, 6, bias=False), sparsity=0.5, block_size=4).bias is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_follow_the_weights_dtype_and_device(dtype):
    assert SupermaskLinear.from_dense(nn.Linear(8, 8, dtype=dtype), sparsity=0.5, block_size=4).scores.dtype == dtype
    meta = SupermaskLinear.from_dense(nn.Linear(8, 8, device="meta"), sparsity=0.5, block_size=4)
    assert meta.scores.device.type == "meta"


def step_of(layer, forward, x) -> list[torch.Tensor]:
    layer.zero_grad()
    y = forward(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("method", METHODS)
def test_compiled_training_step_equals_eager_and_is_compiled_once(method):
    torch.manual_seed(0)
    layer = SupermaskLinear(36, 28, sparsity=0.7, block_size=8, method=method)
    x = torch.randn(3, 36)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(layer.parameters(), 2.0)  # large enough a step to exchange blocks
    masks = []
    for share in (1.0, 0.25, 0.5, 0.0, 1.0):
        set_sparsity(layer, share)
        set_sharpness(layer, share)
        expected = step_of(layer, layer, x)
        with torch._dynamo.config.patch(error_on_recompile=bool(masks)):
            torch.testing.assert_close(step_of(layer, compiled, x), expected)
        optimizer.step()
        masks.append(layer.block_mask())
    assert not torch.equal(masks[0], masks[-1])


def plain_product(layer: SupermaskLinear | SupermaskConv2d, mask: torch.Tensor, dense_gradient: bool) -> torch.Tensor:
    """The masked weight of learned scores, its gradients left to autograd."""
    elements = reference_expand(
        layer.scores - layer.scores.detach() + mask.double(), layer.block_size, layer.weight.shape
    )
    masked = layer.weight * reference_expand(mask, layer.block_size, layer.weight.shape)
    weight = masked.detach() + layer.weight - layer.weight.detach() if dense_gradient else masked
    return weight + layer.weight.detach() * (elements - elements.detach())


@pytest.mark.parametrize("method", ["supermask", "dense_gradient"])
@pytest.mark.parametrize("shape", [(22, 18), (3, 30), (70, 5), (6, 4, 3, 3), (9, 7, 1, 1), (5, 6, 5, 3)], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_gradients_equal_those_of_a_plain_product_by_autograd(shape, block_size, method):
    torch.manual_seed(0)
    settings = {"sparsity": 0.6, "block_size": block_size, "method": method, "dtype": torch.float64}
    if len(shape) == 2:
        layer = SupermaskLinear(shape[1], shape[0], **settings)
    else:
        layer = SupermaskConv2d(shape[1], shape[0], shape[2:], **settings)
    grad = torch.randn(shape, dtype=torch.float64)
    effective = layer.effective_weight()
    found = torch.autograd.grad(effective, [layer.weight, layer.scores], grad)
    plain = plain_product(layer, reference_mask(layer.scores.detach(), 0.6), method == "dense_gradient")
    torch.testing.assert_close(effective, plain)
    torch.testing.assert_close(found, torch.autograd.grad(plain, [layer.weight, layer.scores], grad))


def test_gradients_leave_the_gradient_that_they_are_given_as_it_is():
    layer = SupermaskLinear(64, 64, sparsity=0.9, block_size=8)
    grad = torch.randn(64, 64)
    before = grad.clone()
    layer.effective_weight().backward(grad)
    assert torch.equal(grad, before)
    layer.zero_grad()
    layer.effective_weight().sum().backward()  # an expanded gradient, all of its elements in one place
    kept = reference_expand(layer.block_mask(), 8, layer.weight.shape)
    assert torch.equal(layer.weight.grad, kept.float())


@pytest.mark.parametrize("dense_gradient", [False, True], ids=["masked", "dense"])
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("scores",), ("bias", "x"), ("weight", "scores")], ids=str)
@pytest.mark.parametrize("tokens", [(), (0,), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape, block_size", [((22, 18), 4), ((64, 48), 16), ((5, 40), 32)], ids=str)
def test_masked_linear_equals_linear_of_the_masked_weight(shape, block_size, tokens, frozen, dense_gradient):
    torch.manual_seed(0)
    blocks = [-(-size // block_size) for size in shape]
    x, weight = torch.randn(*tokens, shape[1]).double(), torch.randn(shape).double()
    tensors = {"x": x, "weight": weight, "scores": torch.randn(blocks).double(), "bias": torch.randn(shape[0]).double()}
    learnt = [tensor.requires_grad_() for name, tensor in tensors.items() if name not in frozen]
    mask = block_mask(tensors["scores"], 0.6)
    _, weight, scores, bias = tensors.values()
    y = masked_linear(x, weight, scores, bias, mask, block_size, dense_gradient=dense_gradient)
    effective = multiply_blocks(weight, scores, mask, block_size, dense_gradient=dense_gradient)
    expected = F.linear(x, effective, bias)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    given = grad.clone()
    found = torch.autograd.grad(y, learnt, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, learnt, grad))
    assert torch.equal(grad, given)


@pytest.mark.parametrize("frozen", [(), ("x",), ("scores",), ("x", "weight", "scores")], ids=str)
def test_gradients_of_masked_linear_can_be_differentiated(frozen):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 10).double(), torch.randn(12, 10).double()
    tensors = {"x": x, "weight": weight, "scores": torch.randn(3, 3).double(), "bias": torch.randn(12).double()}
    learnt = [tensor.requires_grad_() for name, tensor in tensors.items() if name not in frozen]
    mask = block_mask(tensors["scores"], 0.6)

    def penalties(y):
        grads = torch.autograd.grad(y.square().sum(), learnt, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), learnt, allow_unused=True)

    x, weight, scores, bias = tensors.values()
    found = penalties(masked_linear(x, weight, scores, bias, mask, 4))
    expected = penalties(F.linear(x, multiply_blocks(weight, scores, mask, 4), bias))
    torch.testing.assert_close(found, expected)  # None for the scores: only their order counts


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_computes_the_same_with_and_without_gradients(method):
    layer = SupermaskLinear(48, 64, sparsity=0.7, block_size=16, method=method)
    x = torch.randn(5, 48)
    with torch.no_grad():
        without = layer(x)
    torch.testing.assert_close(layer(x), without)


def small_net(kind: str, method: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) if kind == "linear" else nn.Conv2d(8, 8, 1)
    return sparsify(nn.Sequential(net).double(), 0.5, 4, targets="*", method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_functional_transforms_give_autograds_gradients(kind, method):
    net = small_net(kind, method)
    x = torch.randn(5, 8, *([1, 1] if kind == "convolution" else [])).double()
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    net(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    gradient = torch.func.grad(loss)
    torch.testing.assert_close(gradient(parameters, x), expected)
    one_by_one = torch.func.vmap(gradient, (None, 0))(parameters, x.unsqueeze(1))
    torch.testing.assert_close({name: g.sum(0) for name, g in one_by_one.items()}, expected)
    torch.testing.assert_close(torch.func.vmap(net)(x.unsqueeze(1)).squeeze(1), net(x))
    inputs = torch.autograd.functional.jacobian(net, x)
    torch.testing.assert_close(torch.func.jacrev(net)(x), inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_forward_mode_is_the_transpose_of_reverse_mode(kind, method):
    net = small_net(kind, method)
    x = torch.randn(5, 8, *([1, 1] if kind == "convolution" else [])).double()
    values = {name: parameter.detach() for name, parameter in net.named_parameters()} | {"x": x}
    directions = {name: torch.randn_like(value) for name, value in values.items()}

    def loss(values):
        parameters = {name: value for name, value in values.items() if name != "x"}
        return torch.func.functional_call(net, parameters, (values["x"],)).square().sum()

    value, slope = torch.func.jvp(loss, (values,), (directions,))
    gradient = torch.func.grad(loss)(values)
    torch.testing.assert_close(value, net(x).square().sum())
    torch.testing.assert_close(slope, sum((gradient[name] * directions[name]).sum() for name in values))
    with torch.autograd.forward_ad.dual_level():
        dual = {n: torch.autograd.forward_ad.make_dual(v, directions[n]) for n, v in values.items()}
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, slope)
    once = x[:1]
    expected = torch.autograd.functional.hessian(lambda x: net(x).square().sum(), once)
    torch.testing.assert_close(torch.func.hessian(lambda x: net(x).square().sum())(once), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_an_ensemble_with_masks_of_their_own_is_one_call(kind, method):
    nets = [small_net(kind, method) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(nets)
    x = torch.randn(5, 8, *([1, 1] if kind == "convolution" else [])).double()
    together = torch.vmap(lambda one: torch.func.functional_call(nets[0], one, (x,)))(parameters)
    torch.testing.assert_close(together, torch.stack([net(x) for net in nets]))


def test_a_weight_used_twice_gets_both_gradients():
    layer = SupermaskLinear(32, 32, sparsity=0.5, block_size=8, dtype=torch.float64)
    x = torch.randn(4, 32, dtype=torch.float64)
    weight = layer.effective_weight()
    expected = torch.autograd.grad(
        F.linear(F.linear(x, weight, layer.bias), weight, layer.bias).sum(), [*layer.parameters()]
    )
    torch.testing.assert_close(torch.autograd.grad(layer(layer(x)).sum(), [*layer.parameters()]), expected)


def test_a_layer_larger_than_what_is_summed_at_a_time():
    layer = SupermaskLinear(1024, 2300, sparsity=0.9, block_size=32, bias=False)
    assert layer.weight.nbytes > 2 * CHUNK_BYTES
    grad = torch.randn(2300, 1024)
    layer.effective_weight().backward(grad)
    products = F.pad(grad * layer.weight.detach(), (0, 0, 0, 4)).view(72, 32, 32, 32)
    torch.testing.assert_close(layer.scores.grad, products.sum((1, 3)), atol=1e-5, rtol=1e-4)
    apart = [layer.weight.grad, layer.scores.grad]
    layer.zero_grad()
    layer(torch.eye(1024)).backward(grad.T)
    torch.testing.assert_close([layer.weight.grad, layer.scores.grad], apart, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_training_under_autocast_keeps_single_precision_gradients(method):
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 20)), 0.7, 8, targets="*", method=method)
    x = torch.randn(6, 24)
    expected = step_of(model, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = step_of(model, model, x)
    assert found[0].dtype == torch.bfloat16
    for parameter, one, other in zip([None, *model.parameters()], found, expected, strict=True):
        assert parameter is None or parameter.grad.dtype == torch.float32
        torch.testing.assert_close(one.float(), other, atol=0.03 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("value", [1e-4, 8.0, 300.0])
def test_norms_and_means_of_half_precision_are_taken_in_single_precision(value):
    weight = torch.full((256, 256), value, dtype=torch.float16)
    expected = weight[0, 0].float()
    torch.testing.assert_close(block_means(weight, 256)[0, 0].float(), expected)
    torch.testing.assert_close(block_norms(weight, 64)[0, 0].float(), 64 * expected, rtol=1e-3, atol=0)


def test_half_precision_products_add_up_in_single_precision():
    layer = SupermaskLinear(259, 259, sparsity=0.5, block_size=259, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1)
    layer.effective_weight().backward(torch.ones(259, 259, dtype=torch.bfloat16))
    assert layer.scores.grad == torch.tensor(259.0**2, dtype=torch.bfloat16)  # sums of 259 would be rounded to 260


def test_masks_follow_scores_however_they_are_changed():
    """No mask is remembered: third-party optimisers write to ``.data``, which moves no version counter."""
    layer = SupermaskLinear(8, 8, sparsity=0.9, block_size=4)
    x = torch.ones(1, 8)
    for place in range(4):
        layer.scores.data.fill_(0).view(-1)[place] = 1
        layer(x)
        assert layer.block_mask().flatten().tolist() == [i == place for i in range(4)]
        layer.weight.data.add_(1)
        kept = reference_expand(layer.block_mask(), 4, layer.weight.shape)
        assert torch.equal(layer.effective_weight(), layer.weight * kept)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_on_a_gpu_does_not_wait_for_it_and_equals_the_cpus(method):
    torch.manual_seed(0)
    layer = SupermaskLinear(100, 70, sparsity=0.8, block_size=16, method=method)
    x = torch.randn(9, 100)
    expected = step_of(layer, layer, x)
    layer, x = layer.cuda(), x.cuda()
    step_of(layer, layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        set_sparsity(layer, 0.5)
        set_sparsity(layer, 1.0)
        found = step_of(layer, layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=1e-3)


# --- methods ---------------------------------------------------------------------------------------------------------


def method_layer(method: str, **arguments) -> SupermaskLinear:
    torch.manual_seed(0)
    settings = {"sparsity": 0.7, "block_size": 4, "dtype": torch.float64} | arguments
    return SupermaskLinear(22, 18, method=method, **settings)


def gradient_at_the_effective_weight(layer, x, grad_y) -> torch.Tensor:
    return grad_y.flatten(0, -2).T @ x.flatten(0, -2)


def blocks(layer):
    b = layer.block_size
    for i in range(-(-layer.weight.shape[0] // b)):
        for j in range(-(-layer.weight.shape[1] // b)):
            yield (i, j), (slice(i * b, (i + 1) * b), slice(j * b, (j + 1) * b))


@pytest.mark.parametrize("method", ["dense_gradient", "magnitude"])
def test_dense_gradient_reaches_the_weights_of_dropped_blocks(method):
    layer = method_layer(method)
    x, grad_y = torch.randn(7, 22, dtype=torch.float64), torch.randn(7, 18, dtype=torch.float64)
    y = layer(x)
    y.backward(grad_y)
    mask = reference_expand(layer.block_mask(), 4, layer.weight.shape)
    torch.testing.assert_close(y, F.linear(x, layer.weight * mask, layer.bias))
    dense = gradient_at_the_effective_weight(layer, x, grad_y)
    torch.testing.assert_close(layer.weight.grad, dense)
    if method == "dense_gradient":
        for index, block in blocks(layer):
            torch.testing.assert_close(layer.scores.grad[index], (dense * layer.weight.detach())[block].sum())


def test_magnitude_keeps_the_blocks_of_largest_norm_as_the_weights_change():
    layer = method_layer("magnitude")
    assert layer.scores is None and set(layer.state_dict()) == {"weight", "bias"}
    norms = {index: float(layer.weight[block].detach().norm()) for index, block in blocks(layer)}
    kept = sorted(norms, key=norms.get)[-num_kept(len(norms), 0.7) :]
    assert {tuple(index) for index in layer.block_mask().nonzero().tolist()} == set(kept)
    for index, norm in norms.items():
        torch.testing.assert_close(float(layer.block_scores()[index]), norm)
    dropped = next(block for index, block in blocks(layer) if index not in kept)
    with torch.no_grad():
        layer.weight[dropped] += 9
    assert layer.effective_weight()[dropped].eq(layer.weight[dropped]).all()


def test_spartan_equals_its_definition():
    """Hard projection of the softly masked weights, straight through; all else by autograd and an outer solver."""
    layer = method_layer("spartan")
    x, grad_y = torch.randn(7, 22, dtype=torch.float64), torch.randn(7, 18, dtype=torch.float64)
    y = layer(x)
    y.backward(grad_y)

    weight = layer.weight.detach().clone().requires_grad_()
    means = torch.stack([weight[block].abs().mean() for _, block in blocks(layer)]).view(5, 6)
    kept, sharpness = num_kept(30, 0.7), 20 * 4
    low, high = -1e3, 1e3
    for _ in range(200):
        shift = (low + high) / 2
        low, high = (shift, high) if torch.sigmoid(sharpness * means + shift).sum() < kept else (low, shift)
    slope = (soft := torch.sigmoid(sharpness * means.detach() + shift)) * (1 - soft)
    implicit = shift - (slope * sharpness * (means - means.detach())).sum() / slope.sum()
    soft = torch.sigmoid(sharpness * means + implicit)
    hard = reference_mask(means.detach(), 0.7)
    assert torch.equal(layer.block_mask(), hard)

    softly = weight * reference_expand(soft, 4, weight.shape)
    projected = (softly * reference_expand(hard, 4, weight.shape)).detach() + softly - softly.detach()
    F.linear(x, projected, layer.bias.detach()).backward(grad_y)
    torch.testing.assert_close(y, F.linear(x, projected, layer.bias), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.weight.grad, weight.grad, atol=1e-5, rtol=1e-4)
    assert layer.weight.grad[~reference_expand(hard, 4, weight.shape)].ne(0).any()


@given(
    n=st.integers(1, 300), share=st.floats(0, 1), sharpness=st.sampled_from([0.5, 10.0, 400.0]), seed=st.integers(0, 9)
)
def test_soft_top_k_adds_up_and_keeps_the_order(n, share, sharpness, seed):
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    kept = max(1, round(n * share))
    soft = soft_top_k(values, torch.tensor(kept), torch.tensor(sharpness))
    torch.testing.assert_close(float(soft.sum()), float(kept), atol=1e-2, rtol=1e-4)
    assert soft.ge(0).all() and soft.le(1).all()
    assert soft[values.argsort()].diff().ge(0).all()


def test_soft_top_k_sharpens_to_the_hard_mask_and_has_the_right_gradient():
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = torch.tensor(7)
    torch.testing.assert_close(soft_top_k(values, kept, torch.tensor(1e5)) > 0.5, block_mask(values, 33 / 39))
    for sharpness in (1.0, 20.0):
        assert torch.autograd.gradcheck(
            lambda v, s=sharpness: soft_top_k(v, kept, torch.tensor(s, dtype=torch.float64)),
            values,
            eps=1e-4,
            atol=1e-3,
        )


def test_soft_top_k_of_everything_is_one():
    values = torch.rand(6, requires_grad=True)
    soft = soft_top_k(values, torch.tensor(6), torch.tensor(3.0))
    soft.sum().backward()
    assert soft.eq(1).all() and values.grad.eq(0).all()


@pytest.mark.parametrize("shape", [(8, 8), (10, 7), (6, 4, 3, 3)])
def test_block_norms_and_means_of_whole_and_partial_blocks(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    norms, means = block_norms(weight, 4), block_means(weight, 4)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in norms.shape)).tolist():
        block = weight[tuple(slice(4 * i, 4 * i + 4) for i in index)]
        torch.testing.assert_close(norms[tuple(index)], block.norm())
        torch.testing.assert_close(means[tuple(index)], block.abs().mean())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_folds_to_what_it_computes(method):
    model = nn.Sequential(nn.Linear(22, 18), nn.GELU(), nn.Linear(18, 10))
    sparsify(model, 0.7, 4, targets="*", method=method)
    x = torch.randn(3, 22)
    expected = model(x)
    masks = [layer.block_mask() for layer in supermask_layers(model).values()]
    blockvit.fold(model)
    assert torch.equal(model(x), expected)
    for layer, mask in zip((model[0], model[2]), masks, strict=True):
        assert layer.weight[~reference_expand(mask, 4, layer.weight.shape)].eq(0).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    sparsify(model, 0.75, 4, targets="*", method=method)
    x, target = torch.randn(40, 16), torch.randn(40, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(60):
        set_sparsity(model, cubic_sparsity(step, 0, 30, 0, 1))
        set_sharpness(model, step / 59)
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.75 * losses[0]


def test_unknown_method_or_scores():
    with pytest.raises(ValueError, match=r"method is 'dense'; expected one of \['supermask', 'dense_gradient'"):
        sparsify(small_transformer(), 0.5, 4, method="dense")
    with pytest.raises(ValueError, match=r"scores is 'normal'; expected one of \['kaiming', 'magnitude', 'constant'\]"):
        sparsify(small_transformer(), 0.5, 4, scores="normal")


@pytest.mark.parametrize("setting", [{"scores": "magnitude"}, {"train_scores": False}])
@pytest.mark.parametrize("method", ["magnitude", "spartan"])
def test_settings_of_scores_for_a_method_without_any(method, setting):
    model = small_transformer()
    with pytest.raises(ValueError, match=f"method '{method}' has no scores; leave them out"):
        sparsify(model, 0.5, 4, method=method, **setting)
    assert not supermask_layers(model)


# --- how scores start ------------------------------------------------------------------------------------------------


def test_scores_from_magnitudes_choose_the_largest_blocks_and_spread_as_random_ones():
    torch.manual_seed(0)
    drawn = SupermaskLinear(256, 512, sparsity=0.75, block_size=8)
    layer = SupermaskLinear.from_dense(nn.Linear(256, 512), sparsity=0.75, block_size=8, scores="magnitude")
    torch.testing.assert_close(layer.block_mask(), block_mask(block_norms(layer.weight, 8), 0.75))
    assert abs(float(layer.scores.mean())) < 1e-5
    torch.testing.assert_close(float(layer.scores.std()), float(drawn.scores.std()), rtol=0.03, atol=0)
    assert layer.scores.requires_grad


def test_scores_from_equal_magnitudes_and_constant_scores_are_zero():
    layer = SupermaskLinear(8, 8, sparsity=0.5, block_size=4, scores="constant")
    assert layer.scores.eq(0).all() and layer.scores.requires_grad
    nn.init.ones_(layer.weight)
    layer.reset_scores("magnitude")
    assert layer.scores.eq(0).all()


def test_scores_start_in_a_known_way_and_only_where_there_are_some():
    layer = SupermaskLinear(8, 8, sparsity=0.5, block_size=4)
    before = layer.scores.clone()
    with pytest.raises(ValueError, match=r"scores is 'magnitud'; expected one of \['kaiming', 'magnitude',"):
        layer.reset_scores("magnitud")
    assert torch.equal(layer.scores, before)
    layer = SupermaskLinear(8, 8, sparsity=0.5, block_size=4, method="spartan")
    with pytest.raises(ValueError, match="a layer of method 'spartan' has no scores to start anew"):
        layer.reset_scores()


def test_scores_that_are_not_trained_stay():
    torch.manual_seed(0)
    model = sparsify(small_transformer(), 0.75, 4, targets="mlp", train_scores=False)
    before = {name: layer.block_mask() for name, layer in supermask_layers(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model.layers(torch.randn(2, 3, 16)).square().sum().backward()
    optimizer.step()
    for name, layer in supermask_layers(model).items():
        assert layer.scores.grad is None and torch.equal(layer.block_mask(), before[name])
        assert layer.weight.grad.ne(0).any()


# --- schedules -------------------------------------------------------------------------------------------------------


def test_cubic_ramp():
    assert [cubic_sparsity(step, 10, 20, 0.2, 0.9) for step in (0, 10, 20, 21)] == [0.2, 0.2, 0.9, 0.9]
    assert cubic_sparsity(15, 10, 20, 0.2, 0.9) == pytest.approx(0.9 - 0.7 / 8)
    ramp = [cubic_sparsity(step, 0, 50, 0, 1) for step in range(51)]
    assert ramp[0] == 0 and ramp[-1] == 1
    rises = [b - a for a, b in itertools.pairwise(ramp)]
    assert all(a > b > 0 for a, b in itertools.pairwise(rises))
    assert [cubic_sparsity(step, 5, 5, 0.0, 0.9) for step in (4, 5)] == [0.0, 0.9]
    with pytest.raises(ValueError, match=r"begins at step 6 and ends at 5"):
        cubic_sparsity(0, 6, 5, 0, 1)


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_in_force_is_a_share_of_each_layers_target(method):
    model = sparsify(small_transformer(), {"mlp": 0.5, "head": 0.75}, 4, targets=("mlp", "head"), method=method)
    keys = set(model.state_dict())
    for share in (0.0, 0.4, 1.0):
        set_sparsity(model, share)
        for name, layer in supermask_layers(model).items():
            target = 0.75 if name == "head" else 0.5
            assert layer.sparsity == target
            assert layer.sparsity_in_force == share * target
            assert int(layer.block_mask().sum()) == num_kept(layer.block_mask().numel(), share * target)
            kept = reference_expand(layer.block_mask(), 4, layer.weight.shape)
            assert layer.effective_weight()[~kept].eq(0).all() and layer.effective_weight()[kept].ne(0).all()
    assert set(model.state_dict()) == keys


def test_a_sparsity_in_force_of_zero_is_the_dense_layer():
    for method in METHODS:
        layer = method_layer(method)
        set_sparsity(layer, 0)
        assert torch.equal(layer.effective_weight(), layer.weight), method


def test_what_is_in_force_is_not_saved_and_survives_a_move():
    model = sparsify(small_transformer(), 0.75, 4)
    set_sparsity(model, 0.5)
    other = sparsify(small_transformer(), 0.75, 4)
    other.load_state_dict(model.state_dict())
    assert {layer.sparsity_in_force for layer in supermask_layers(other).values()} == {0.75}
    moved = model.to(torch.float64)
    for layer in supermask_layers(moved).values():
        assert layer.sparsity_in_force == 0.375
        assert int(layer.block_mask().sum()) == num_kept(layer.num_blocks, 0.375)


def test_a_model_moved_in_inference_mode_can_still_be_scheduled():
    model = sparsify(small_transformer(), 0.75, 4)
    with torch.inference_mode():
        model.cpu()
    set_sparsity(model, 0.5)
    assert {layer.sparsity_in_force for layer in supermask_layers(model).values()} == {0.375}


def test_a_model_made_on_the_meta_device_gets_its_settings_with_its_memory():
    layer = SupermaskLinear(16, 16, sparsity=0.75, block_size=4, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.scores.copy_(torch.arange(16.0).view(4, 4))
    assert int(layer.block_mask().sum()) == num_kept(16, 0.75)
    layer = SupermaskLinear(16, 16, sparsity=0.75, block_size=4, method="spartan", device="meta").to_empty(device="cpu")
    nn.init.normal_(layer.weight)
    assert int(layer.effective_weight().ne(0).sum()) == num_kept(16, 0.75) * 16


def test_fold_within_the_ramp_folds_what_is_in_force():
    model = sparsify(nn.Sequential(nn.Linear(16, 16)), 0.75, 4, targets="*")
    set_sparsity(model, 0.5)
    x = torch.randn(2, 16)
    expected = model(x)
    blockvit.fold(model)
    assert torch.equal(model(x), expected)
    assert float(model[0].weight.eq(0).float().mean()) == 1 - num_kept(16, 0.375) / 16


@pytest.mark.parametrize(
    ("share", "error"), [(-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
@pytest.mark.parametrize("setter", [set_sparsity, set_sharpness])
def test_bad_share(setter, share, error):
    with pytest.raises(error, match=r"share is .*expected a number in \[0, 1\]"):
        setter(small_transformer(), share)


def test_schedules_leave_a_dense_model_alone():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU()), torch.randn(2, 16)
    expected, names = model(x), {*vars(model[0])}
    set_sparsity(model, 0.5)
    set_sharpness(model, 0.5)
    assert torch.equal(model(x), expected) and {*vars(model[0])} == names


def test_sharpness_runs_from_first_to_last():
    layer = method_layer("spartan")
    assert layer.sharpness_in_force == 20 * 4
    set_sharpness(layer, 0)
    assert layer.sharpness_in_force == float(layer._sharpness) == 1
    soft = layer.effective_weight() / layer.weight
    assert soft.max() < 0.5  # hardly a choice yet: all weigh about the share that is kept


# --- convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "groups": 2, "stride": 2},
        {"kernel_size": (3, 5), "dilation": 2, "padding": 4, "padding_mode": "circular", "bias": False},
    ],
    ids=str,
)
def test_convolution_equals_the_references_mask_over_all_four_dimensions(arguments, block_size):
    layer = SupermaskConv2d(6, 10, **arguments, sparsity=0.6, block_size=block_size, dtype=torch.float64)
    assert layer.scores.shape == tuple(math.ceil(size / block_size) for size in layer.weight.shape)
    x = torch.randn(2, 6, 11, 12, dtype=torch.float64)
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)

    mask = reference_expand(reference_mask(layer.scores.detach(), 0.6), block_size, layer.weight.shape).double()
    dense = nn.Conv2d(6, 10, **arguments, dtype=torch.float64)
    dense.weight = nn.Parameter(layer.weight.detach() * mask)
    dense.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
    dense_y = dense(x)
    dense_y.backward(grad_y)

    torch.testing.assert_close(y, dense_y)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad * mask)
    contributions = dense.weight.grad * layer.weight.detach()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in layer.scores.shape)).tolist():
        block = tuple(slice(i * block_size, (i + 1) * block_size) for i in index)
        torch.testing.assert_close(layer.scores.grad[tuple(index)], contributions[block].sum())


def test_convolution_from_dense_keeps_every_argument():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding="valid", dilation=2, groups=2, padding_mode="reflect").eval()
    masked = SupermaskConv2d.from_dense(conv, sparsity=0, block_size=2)
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(masked(x), conv(x))
    assert masked.weight is conv.weight and not masked.training


# --- sparsify --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


def small_transformer() -> nn.Sequential:
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 16, 1)
    model.layers = nn.Sequential(Block(), Block())
    model.head = nn.Linear(16, 10)
    return model


MLPS = ["layers.0.mlp.0", "layers.0.mlp.2", "layers.1.mlp.0", "layers.1.mlp.2"]
OUT = ["layers.0.attention.out_proj", "layers.1.attention.out_proj"]
QKV = ["layers.0.attention.qkv", "layers.1.attention.qkv"]


@pytest.mark.parametrize(
    ("targets", "skip", "expected"),
    [
        (("mlp", "out_proj", "head"), (), {*MLPS, *OUT, "head"}),
        ("mlp", (), {*MLPS}),
        ("qkv", (), {*QKV}),
        ("attention", (), {*QKV, *OUT}),
        ("*.mlp.0", (), {MLPS[0], MLPS[2]}),
        ("layers.1.mlp.2", (), {MLPS[3]}),
        ("stem", (), {"stem"}),
        (["mlp", "head"], ("layers.0.*", "head"), {MLPS[2], MLPS[3]}),
        ("*", ("stem", "attention"), {*MLPS, "head"}),
        (lambda name, module: module.weight.shape[0] == 32, (), {MLPS[0], MLPS[2]}),
        ("mlp", lambda name, module: name.startswith("layers.0"), {MLPS[2], MLPS[3]}),
        ((name for name in ["mlp", "head"]), (), {*MLPS, "head"}),
    ],
    ids=itertools.count(),  # as text, sets and functions are called otherwise in every process
)
def test_targets_and_skip(targets, skip, expected):
    model = small_transformer()
    assert sparsify(model, 0.5, 4, targets=targets, skip=skip) is model
    assert set(supermask_layers(model)) == expected


def test_default_targets_are_the_blogs():
    model = sparsify(small_transformer())
    assert set(supermask_layers(model)) == {*MLPS, *OUT, "head"}
    assert {(m.sparsity, m.block_size) for m in supermask_layers(model).values()} == {(0.9, 32)}


def test_a_part_of_a_name_matches_whole_parts_only():
    model = nn.Sequential()
    model.mlp, model.mlp2 = nn.Linear(4, 4), nn.Linear(4, 4)
    assert set(supermask_layers(sparsify(model, 0.5, 2, targets="mlp"))) == {"mlp"}


def test_per_layer_settings_by_mapping_and_function():
    model = small_transformer()
    sparsify(
        model,
        {"layers.0.mlp.0": 0.25, "mlp": 0.75, "out_proj": 0.5},
        lambda name, module: 8 if name.endswith("out_proj") else 4,
        targets=("mlp", "out_proj"),
    )
    found = {name: (m.sparsity, m.block_size) for name, m in supermask_layers(model).items()}
    assert found == {
        MLPS[0]: (0.25, 4),
        MLPS[1]: (0.75, 4),
        MLPS[2]: (0.75, 4),
        MLPS[3]: (0.75, 4),
        OUT[0]: (0.5, 8),
        OUT[1]: (0.5, 8),
    }


def test_a_star_stands_for_the_rest_even_if_nothing_is_left():
    model = sparsify(small_transformer(), {"mlp": 0.75, "*": 0.5}, 4, targets="mlp")
    assert {layer.sparsity for layer in supermask_layers(model).values()} == {0.75}


def test_none_skips_nothing_but_does_not_say_what_to_mask():
    assert set(supermask_layers(sparsify(small_transformer(), 0.5, 4, targets="mlp", skip=None))) == {*MLPS}
    with pytest.raises(ValueError, match=r"targets is None; name the layers"):
        sparsify(small_transformer(), 0.5, 4, targets=None)


def test_masks_take_effect_everywhere_and_train():
    model = small_transformer().layers
    x = torch.randn(2, 5, 16)
    dense = model(x)
    sparsify(model, 0.8, 4, targets=("mlp", "attention"))
    sparse = model(x)
    assert not torch.allclose(dense, sparse)
    sparse.square().sum().backward()
    for name, layer in supermask_layers(model).items():
        assert layer.scores.grad is not None and layer.scores.grad.ne(0).any(), name


def test_a_shared_layer_is_masked_once():
    model = nn.Sequential()
    model.a = nn.Linear(8, 8)
    model.b = model.a
    sparsify(model, 0.5, 4, targets=("a", "b"))
    assert isinstance(model.a, SupermaskLinear) and model.a is model.b


def test_a_layer_below_a_shared_parent_is_masked_once():
    block = Block()
    model = nn.Sequential(block, block)
    sparsify(model, 0.5, 4, targets=("mlp", "attention"))
    assert isinstance(block.mlp[0], SupermaskLinear) and isinstance(block.attention.out_proj, SupermaskLinear)
    blockvit.fold(model)
    assert not supermask_layers(model)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 90, math.nan, math.inf])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity is .*expected the fraction of blocks to drop, in \[0, 1\)"):
        sparsify(small_transformer(), sparsity, 4)


@pytest.mark.parametrize("sparsity", ["0.9", None, True, [0.9]])
def test_sparsity_of_the_wrong_type(sparsity):
    with pytest.raises(TypeError, match=r"sparsity is .*expected a number in \[0, 1\)"):
        sparsify(small_transformer(), sparsity, 4)


@pytest.mark.parametrize(
    ("block_size", "error"), [(0, ValueError), (-4, ValueError), (4.0, TypeError), ("4", TypeError)]
)
def test_bad_block_size(block_size, error):
    with pytest.raises(error, match=r"block_size is .*expected"):
        sparsify(small_transformer(), 0.5, block_size)


@pytest.mark.parametrize("keyword", ["targets", "skip"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, r"is 3; expected a name, a list of names, or a function of name and module"),
        (
            nn.Linear,
            r"is the class Linear; .*=lambda name, module: type\(module\) is torch\.nn\.modules\.linear\.Linear",
        ),
        (nn.Linear(2, 2), r"is Linear\(.*; expected a name"),
        (
            [lambda name, module: True],
            r"holds <function .*; expected names of layers only: .*pass that function",
        ),
        (["mlp", 0], r"holds 0; expected names"),
    ],
)
def test_targets_of_the_wrong_type(keyword, given, message):
    with pytest.raises(TypeError, match=f"{keyword} {message}"):
        sparsify(small_transformer(), 0.5, 4, **{"targets": "mlp", keyword: given})


@pytest.mark.parametrize("keyword", ["targets", "skip"])
def test_a_name_that_matches_nothing_lists_the_layers(keyword):
    with pytest.raises(ValueError, match=keyword) as error:
        sparsify(model := small_transformer(), 0.5, 4, **{"targets": "mlp", keyword: "mpl"})
    assert type(model.layers[0].attention) is nn.MultiheadAttention  # errors leave the model as it was
    assert "'mpl' matches no layer" in str(error.value)
    for name in (*MLPS, *OUT, *QKV, "stem", "head"):
        assert name in str(error.value)
    assert "Linear(10, 16)" in str(error.value)


@pytest.mark.parametrize(
    ("targets", "skip"),
    [(lambda name, module: False, ()), ((), ()), ("mlp", "layers")],
    ids=["predicate", "none", "skip"],
)
def test_nothing_left_to_mask(targets, skip):
    with pytest.raises(ValueError, match=r"match no layer; the layers are:\n  stem"):
        sparsify(small_transformer(), 0.5, 4, targets=targets, skip=skip)


def test_a_model_without_layers_and_a_single_layer():
    for model in (nn.Sequential(nn.ReLU()), nn.Linear(4, 4)):
        with pytest.raises(ValueError, match=r"holds no layers of type Linear or Conv2d.*nn\.Sequential"):
            sparsify(model, 0.5, 2, targets="*")


def test_masking_twice():
    model = sparsify(small_transformer(), 0.5, 4, targets="mlp")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.0 already has a supermask .*fold the model first"):
        sparsify(model, 0.5, 4, targets="mlp")


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (
            {"layers.0.*": 0.5},
            r"sparsity has no entry for layers\.1\.mlp\.0; its keys are \['layers\.0\.\*'\]: add one",
        ),
        (lambda name, module: 0.5 if "layers.0" in name else 1.5, "sparsity is 1.5"),
        ({"layers.0.*": 0.5, "mlp": "much"}, "sparsity is 'much'"),
        ({"mlp": 0.5, "haed": 0.9}, r"sparsity: 'haed' decides for no layer.*\n  layers\.0\.mlp\.0"),
        ({"mlp": 0.5, "mlp.0": 0.9}, r"sparsity: 'mlp\.0' decides for no layer, because it matches none or an earlier"),
    ],
    ids=["missing", "function", "mapping", "key", "hidden key"],
)
def test_an_error_in_one_layers_setting_leaves_no_layer_masked(sparsity, message):
    model = small_transformer()
    before = model.state_dict().keys()
    with pytest.raises((ValueError, TypeError), match=message):
        sparsify(model, sparsity, 4, targets="mlp")
    assert not supermask_layers(model) and model.state_dict().keys() == before


# --- what cannot be replaced -----------------------------------------------------------------------------------------


def swin(**arguments) -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": [4, 4]}
    return torchvision.models.SwinTransformer(**sizes, num_classes=10, **arguments).eval()


V2 = {
    "block": torchvision.models.swin_transformer.SwinTransformerBlockV2,
    "downsample_layer": torchvision.models.swin_transformer.PatchMergingV2,
}


@pytest.mark.parametrize("version", [{}, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("targets", [("qkv", "proj"), "*", lambda name, module: True], ids=["names", "glob", "any"])
def test_layers_whose_weights_swin_attention_reads_are_refused(version, targets):
    model = swin(**version)
    with pytest.raises(ValueError, match=r"out with skip=.*\n  features\.1\.0\.attn\.qkv: ShiftedWindow.* reads its"):
        sparsify(model, 0.5, 8, targets=targets)
    assert not supermask_layers(model)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.asked, self.read, self.both = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x):
        x = self.asked(self.called(x).to(self.asked.weight.dtype))
        y = x @ self.read.weight.T
        return nn.functional.linear(y, self.both.weight) if self.training else self.both(y)


def test_layers_whose_weights_a_forward_computes_with_are_found_in_its_source():
    model = nn.Sequential(Reader())
    with pytest.raises(ValueError) as error:
        sparsify(model, 0.5, 8, targets="*")
    named = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert named == ["0.read", "0.both"] and "Reader reads its weight" in str(error.value)
    masked = sparsify(model, 0.5, 8, targets="*", skip=("read", "both"))
    assert list(supermask_layers(masked)) == ["0.called", "0.asked"]


class DeepReader(nn.Module):
    """Computes with weights in a method, in a property, and with that of a child's child."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential()
        self.mlp.first, self.mlp.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.method, self.asset, self.never = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x):
        return self.step(self.mlp.second(x @ self.mlp.first.weight)) @ self.matrix

    def step(self, x):
        return self.step(x) if x is None else x @ self.method.weight

    @property
    def matrix(self):
        return self.asset.weight * 2

    def unused(self):
        return self.never.weight


def test_readers_are_found_through_methods_and_properties_and_from_further_up():
    model = nn.Sequential(DeepReader())
    assert model(torch.randn(2, 16)).shape == (2, 16)
    with pytest.raises(ValueError, match="DeepReader reads its weight") as error:
        sparsify(model, 0.5, 8, targets="*")
    named = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert named == ["0.mlp.first", "0.method", "0.asset"]


class WayToRead(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.fcs = nn.Linear(16, 16), nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x):
        return x @ self.fc.weight


class ByParent(WayToRead):
    def forward(self, x):
        return 2 * super().forward(x)


class ByParentsName(WayToRead):
    def forward(self, x):
        return 2 * WayToRead.forward(self, x)


class ByAlias(WayToRead):
    def forward(self, x):
        fc, weight = self.fc, None
        weight = fc.weight if weight is None else weight
        return x @ weight


class ByIndex(WayToRead):
    def forward(self, x):
        return x @ self.fcs[0].weight


class InALoop(WayToRead):
    def forward(self, x):
        for _, fc in enumerate(self.fcs):
            x = x @ fc.weight.t()
        return sum(x @ fc.weight for fc in self.fcs[:1])


class ByGetattr(WayToRead):
    def forward(self, x):
        return x @ getattr(self, "fc").weight  # noqa: B009


class OfAnotherName(WayToRead):
    def forward(this, x):
        return x @ this.fc.weight


class Swin(torchvision.models.swin_transformer.ShiftedWindowAttention):
    def __init__(self):
        super().__init__(16, [4, 4], [0, 0], 2)

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (ByParent, "fc"),
        (ByParentsName, "fc"),
        (ByAlias, "fc"),
        (ByIndex, "fcs.0"),
        (InALoop, "fcs.0"),
        (ByGetattr, "fc"),
        (OfAnotherName, "fc"),
        (Swin, "qkv"),
    ],
)
def test_readers_are_found_however_they_come_to_the_layer(kind, layer):
    with pytest.raises(ValueError, match=rf"\n  0\.{layer}: {kind.__name__} reads its weight instead of calling it"):
        sparsify(nn.Sequential(kind()), 0.5, 8, targets=layer)


class Asks(WayToRead):
    def forward(self, x):
        weight = self.fc.weight
        x = self.fc(x.to(self.fc.weight).reshape(-1, weight.size(1)))
        for fc in self.fcs:
            x = fc(x.to(fc.weight.device))
        return x


def test_asking_a_weight_for_its_kind_is_not_reading_it():
    model = sparsify(nn.Sequential(Asks()), 0.5, 8, targets="*")
    assert list(supermask_layers(model)) == ["0.fc", "0.fcs.0"]
    assert model(torch.randn(2, 16)).shape == (2, 16)


def test_a_forward_without_a_source_is_taken_to_call_its_layers():
    written = "def forward(self, x):\n    return nn.functional.linear(x, self.layer.weight)"
    scope = {"nn": nn}
    exec(written, scope)
    model = type("Written", (nn.Module,), {"forward": scope["forward"]})()
    model.layer = nn.Linear(16, 16)
    assert list(supermask_layers(sparsify(model, 0.5, 8, targets="layer"))) == ["layer"]


@pytest.mark.parametrize("version", [{}, V2], ids=["v1", "v2"])
def test_what_swin_calls_is_masked_folded_and_converted(version):
    model, x = swin(**version), torch.randn(2, 3, 32, 32)
    sparsify(model, 0.5, 8, targets="*", skip=("qkv", "attn.proj"))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(blockvit.fold(model)(x), expected)
        blockvit.to_block_sparse(model, 8, dense_backend="gather")  # leaves the attention's layers dense too
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    fates = {fate.name: fate for fate in blockvit.layer_fates(model, 8)}
    fate = fates["features.1.0.attn.qkv"]
    assert fate.fate == "dense" and "reads its weight" in fate.reason
    with pytest.raises(ValueError, match=r"features\.1\.1\.attn\.proj: ShiftedWindow"):
        blockvit.to_block_sparse(model, 8, targets="features.1.1.attn.proj")


def spoiled(spoil) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    spoil(model[1])
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nn.utils.weight_norm, r"call torch\.nn\.utils\.remove_weight_norm\(layer, 'weight'\) first"),
        (nn.utils.spectral_norm, r"call torch\.nn\.utils\.remove_spectral_norm\(layer, 'weight'\) first"),
        (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), r"its bias .*prune\.remove\(layer, 'bias'\) first"),
        (parametrizations.weight_norm, r"remove_parametrizations\(layer, name\) for each of \['weight'\] first"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.empty(0, 8))), r"shape \(0, 8\), which holds no"),
        (lambda layer: layer.register_forward_hook(print), r"1 \(Linear\) has hooks, which replacing it would lose"),
        (lambda layer: layer.register_full_backward_pre_hook(print), "has hooks"),
        (lambda layer: setattr(layer, "forward", abs), "has a forward set on the instance"),
    ],
    ids=["weight norm", "spectral norm", "pruned", "parametrized", "empty", "hook", "backward hook", "forward"],
)
def test_layers_that_replacing_would_break_are_named_with_the_remedy(spoil, message):
    for convert in (sparsify, blockvit.to_block_sparse):
        model = spoiled(spoil)
        with torch.no_grad():
            model[0].weight[:4] = 0
            model[1].weight[:4] = 0
        with pytest.raises(ValueError, match=message):
            convert(model, **({"sparsity": 0.5} if convert is sparsify else {}), block_size=4, targets=("0", "1"))
        assert type(model[0]) is nn.Linear
        convert(model, block_size=4, targets="*", skip="1")
        assert type(model[0]) is not nn.Linear


def test_hooks_on_a_masked_layer_keep_it_from_being_folded():
    model = sparsify(spoiled(lambda layer: None), 0.5, 4, targets="*")
    hook = model[1].register_forward_hook(print)
    with pytest.raises(ValueError, match=r"1 \(SupermaskLinear\) has hooks"):
        blockvit.fold(model)
    assert len(supermask_layers(model)) == 2
    hook.remove()
    blockvit.fold(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_made_without_memory_takes_a_checkpoint(method):
    def make():
        return sparsify(nn.Sequential(nn.Linear(64, 64)), 0.5, 16, targets="*", method=method)

    with torch.device("meta"):
        model = make()
    trained, x = make(), torch.randn(2, 64)
    model.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(model(x), trained(x))
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), trained(x))


@pytest.mark.parametrize("scores", ["kaiming", "magnitude", "constant"])
def test_reset_parameters_resets_the_scores(scores):
    with torch.device("meta"):
        model = sparsify(nn.Sequential(nn.Linear(64, 64), nn.Conv2d(3, 32, 4)), 0.5, 16, targets="*", scores=scores)
    model.to_empty(device="cpu")
    for layer in model:
        nn.init.constant_(layer.scores, float("nan"))
        layer.reset_parameters()
        assert layer.scores.isfinite().all() and layer.weight.isfinite().all()
        assert (layer.scores == 0).all() == (scores == "constant")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_spartan_does_not_ask_for_the_default_dtype(dtype):
    weight, x = torch.randn(64, 64), torch.randn(2, 64)

    def outputs():
        layer = SupermaskLinear(64, 64, sparsity=0.5, block_size=16, method="spartan", dtype=torch.float32)
        layer.weight.data.copy_(weight)
        nn.init.zeros_(layer.bias)
        return layer(x)

    expected = outputs()
    torch.set_default_dtype(dtype)
    try:
        torch.testing.assert_close(outputs(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_layer_that_was_never_initialised_is_in_no_ones_way():
    model = nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 64))
    sparsify(model, 0.5, 16, targets="2")
    with pytest.raises(ValueError, match=r"0: it is not initialised; call the model once first"):
        sparsify(nn.Sequential(nn.LazyLinear(64)), 0.5, 16, targets="0")


def test_a_forward_that_was_mended_is_read_anew(monkeypatch):
    model = nn.Sequential(Reader())
    with pytest.raises(ValueError, match="Reader reads its weight"):
        sparsify(model, 0.5, 8, targets="*")
    monkeypatch.setattr(Reader, "forward", lambda self, x: self.both(self.read(self.asked(self.called(x)))))
    assert len(supermask_layers(sparsify(model, 0.5, 8, targets="*"))) == 4
