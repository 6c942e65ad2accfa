from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import blockvit
from blockvit.supermask import SupermaskConv2d, SupermaskLinear, block_mask, num_kept, sparsify, supermask_layers

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


def test_compiled_masked_layer_gives_the_same():
    layer = SupermaskLinear(20, 12, sparsity=0.7, block_size=8)
    x = torch.randn(3, 20)
    expected = layer(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, expected)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


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
    ids=str,
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
def test_a_name_that_matches_nothing_lists_the_layers(keyword):
    with pytest.raises(ValueError, match=keyword) as error:
        sparsify(small_transformer(), 0.5, 4, **{"targets": "mlp", keyword: "mpl"})
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
    ],
    ids=["missing", "function", "mapping"],
)
def test_an_error_in_one_layers_setting_leaves_no_layer_masked(sparsity, message):
    model = small_transformer()
    with pytest.raises((ValueError, TypeError), match=message):
        sparsify(model, sparsity, 4, targets="mlp")
    assert not supermask_layers(model)
