from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import blockvit
from blockvit.attention import MultiheadAttention, expose_projections, packed_state_dict
from blockvit.supermask import supermask_layers

EMBED, HEADS, N, L, S = 16, 4, 3, 5, 7


def small_vit(**arguments) -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    model = torchvision.models.VisionTransformer(**sizes | arguments)
    for parameter in model.parameters():  # torchvision starts the head at zero, which would hide every difference
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def randomised(mha: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """Biases too: PyTorch starts them at zero, which would hide a lost one."""
    for parameter in mha.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mha


def inputs(mha: nn.MultiheadAttention, kind: str, batched: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def draw(length: int, width: int) -> torch.Tensor:
        if not batched:
            return torch.randn(length, width)
        return torch.randn(N, length, width) if mha.batch_first else torch.randn(length, N, width)

    query = draw(L, EMBED)
    if kind == "self":
        return query, query, query
    key = draw(S, mha.kdim)
    return query, key, (key if kind == "memory" else draw(S, mha.vdim))


def assert_same(mha: nn.MultiheadAttention, *args: torch.Tensor, **kwargs) -> None:
    ours = MultiheadAttention.from_torch(mha)
    expected, expected_weights = mha(*args, **kwargs)
    out, weights = ours(*args, **kwargs)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert out.shape == expected.shape
    if kwargs.get("need_weights", True):
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-5)
    else:
        assert weights is None


@pytest.mark.parametrize("need_weights", ["averaged", "per head", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("kind", "widths"),
    [("self", {}), ("memory", {}), ("cross", {}), ("cross", {"kdim": 10, "vdim": 12})],
    ids=["self", "memory", "cross", "kdim vdim"],
)
@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
def test_same_outputs_as_pytorch(layout, kind, widths, bias, need_weights):
    mha = randomised(nn.MultiheadAttention(EMBED, HEADS, bias=bias, batch_first=layout == "batch first", **widths))
    assert_same(
        mha.eval(),
        *inputs(mha, kind, layout != "unbatched"),
        need_weights=need_weights != "none",
        average_attn_weights=need_weights != "per head",
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("arguments", [{}, {"bias": False, "batch_first": True}, {"kdim": 10, "vdim": 12}], ids=str)
def test_made_anew_it_is_pytorchs_with_the_same_first_weights(arguments, device, seed):
    where = {"device": device, "dtype": torch.float64}
    torch.manual_seed(seed)
    mha = nn.MultiheadAttention(EMBED, HEADS, 0.25, **arguments, **where)
    torch.manual_seed(seed)
    ours = MultiheadAttention(EMBED, HEADS, 0.25, **arguments, **where)
    assert repr(ours) == repr(MultiheadAttention.from_torch(mha)) and ours.dropout == 0.25 and ours.training
    assert {(tuple(p.shape), p.dtype, p.device.type) for p in ours.parameters()} == {
        (tuple(p.shape), torch.float64, device) for p in MultiheadAttention.from_torch(mha).parameters()
    }
    if device == "cpu":
        x = [t.double() for t in inputs(mha, "cross", True)]
        torch.testing.assert_close(ours.eval()(*x), mha.eval()(*x))
        ours.load_state_dict(mha.state_dict())


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_what_it_cannot_do_cannot_be_made_anew(option):
    with pytest.raises(NotImplementedError, match="add_bias_kv or add_zero_attn is not supported"):
        MultiheadAttention(EMBED, HEADS, **{option: True})


MASKS = {
    "none": None,
    "bool": torch.rand(L, S, generator=torch.Generator().manual_seed(0)) < 0.4,
    "float": torch.randn(L, S, generator=torch.Generator().manual_seed(0)),
    "3-D": torch.randn(N * HEADS, L, S, generator=torch.Generator().manual_seed(0)),
    "3-D bool": torch.rand(N * HEADS, L, S, generator=torch.Generator().manual_seed(0)) < 0.4,
}
PADDINGS = {
    "none": None,
    "bool": torch.arange(S).expand(N, S) >= torch.tensor([[S], [S - 2], [3]]),
    "float": torch.where(torch.arange(S).expand(N, S) >= S - 2, -1.5, 0.0),
}
for mask in ("bool", "3-D bool"):
    MASKS[mask][..., 0] = False  # no query may see nothing at all: PyTorch answers with NaN


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, padding, need_weights):
    mha = randomised(nn.MultiheadAttention(EMBED, HEADS, batch_first=True)).eval()
    key = torch.randn(N, S, EMBED)
    masks = {"attn_mask": MASKS[mask], "key_padding_mask": PADDINGS[padding]}
    assert_same(mha, torch.randn(N, L, EMBED), key, key, need_weights=need_weights, **masks)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_masks_unbatched(need_weights):
    mha = randomised(nn.MultiheadAttention(EMBED, HEADS)).eval()
    query, key = torch.randn(L, EMBED), torch.randn(S, EMBED)
    padding = torch.arange(S) >= S - 2
    assert_same(mha, query, key, key, attn_mask=MASKS["bool"], key_padding_mask=padding, need_weights=need_weights)
    assert_same(mha, query, key, key, attn_mask=MASKS["3-D"][:HEADS], need_weights=need_weights)


def test_causal_hint():
    mha = randomised(nn.MultiheadAttention(EMBED, HEADS, batch_first=True)).eval()
    x = torch.randn(N, L, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    assert_same(mha, x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    with pytest.raises(ValueError, match="is_causal is a hint about attn_mask; pass the causal attn_mask"):
        MultiheadAttention.from_torch(mha)(x, x, x, is_causal=True)


def test_same_gradients():
    mha = randomised(nn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    ours = MultiheadAttention.from_torch(copy.deepcopy(mha))
    x = torch.randn(N, L, EMBED)
    for module in (mha, ours):
        module(x, x, x, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(ours.qkv.weight.grad, mha.in_proj_weight.grad)
    torch.testing.assert_close(ours.qkv.bias.grad, mha.in_proj_bias.grad)
    torch.testing.assert_close(ours.out_proj.weight.grad, mha.out_proj.weight.grad)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_dropout_acts_in_training_only(need_weights):
    ours = MultiheadAttention.from_torch(randomised(nn.MultiheadAttention(EMBED, HEADS, dropout=0.5, batch_first=True)))
    x = torch.randn(N, L, EMBED)

    def same_twice() -> bool:
        return torch.equal(ours(x, x, x, need_weights=need_weights)[0], ours(x, x, x, need_weights=need_weights)[0])

    assert not same_twice()
    ours.eval()
    assert same_twice()


def test_projections_are_plain_linears_and_share_parameters():
    mha = nn.MultiheadAttention(EMBED, HEADS).eval()
    ours = MultiheadAttention.from_torch(mha)
    assert type(ours.qkv) is type(ours.out_proj) is nn.Linear
    assert ours.qkv.weight is mha.in_proj_weight and ours.out_proj.weight is mha.out_proj.weight
    assert (ours.qkv.in_features, ours.qkv.out_features) == (EMBED, 3 * EMBED)
    assert not ours.training and not ours.qkv.training


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn", "hook"])
def test_what_cannot_be_replaced_stays_and_only_its_projection_is_refused(option):
    model = nn.Sequential(OrderedDict(attention=nn.MultiheadAttention(EMBED, HEADS), mlp=nn.Linear(EMBED, EMBED)))
    if option == "hook":
        model.attention.register_forward_hook(print)
    else:
        model.attention = nn.MultiheadAttention(EMBED, HEADS, **{option: True})
    attention = model.attention
    with pytest.raises(ValueError, match=r"attention\.out_proj: MultiheadAttention reads its weight"):
        blockvit.sparsify(model, 0.5, 4, targets="out_proj")
    blockvit.sparsify(model, 0.5, 4, targets="mlp")
    assert model.attention is attention
    if option != "hook":
        with pytest.raises(NotImplementedError, match="add_bias_kv or add_zero_attn is not supported; build the model"):
            MultiheadAttention.from_torch(attention)


def test_a_frozen_attention_stays_frozen():
    model = nn.Sequential(nn.MultiheadAttention(EMBED, HEADS, kdim=10, vdim=12)).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in expose_projections(model).parameters())


def test_wrong_keys_and_masks_are_named():
    ours = MultiheadAttention.from_torch(nn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    query = torch.randn(2, 3, EMBED)
    with pytest.raises(ValueError, match=r"key is \(2, 5, .* value \(2, 4, .* expected as many of each"):
        ours(query, torch.randn(2, 5, EMBED), torch.randn(2, 4, EMBED), need_weights=False)
    with pytest.raises(TypeError, match=r"a mask is torch\.int64; expected torch\.bool"):
        ours(query, query, query, attn_mask=torch.ones(3, 3, dtype=torch.long))


def test_the_model_must_not_be_the_attention_itself():
    with pytest.raises(ValueError, match=r"itself an nn\.MultiheadAttention; use MultiheadAttention\.from_torch"):
        expose_projections(nn.MultiheadAttention(EMBED, HEADS))


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 12}], ids=["one width", "kdim vdim"])
@pytest.mark.parametrize("copied", [False, True], ids=["original", "deepcopy"])
def test_checkpoints_of_pytorchs_attention_load(widths, bias, copied):
    make = lambda: nn.Sequential(randomised(nn.MultiheadAttention(EMBED, HEADS, bias=bias, **widths)))  # noqa: E731
    source, model = make().eval(), expose_projections(make().eval())
    model = copy.deepcopy(model) if copied else model
    state = source.state_dict()
    before = list(state)
    model.load_state_dict(state)
    assert list(state) == before  # the caller's dictionary is left alone
    args = inputs(source[0], "cross", batched=True)
    torch.testing.assert_close(model[0](*args)[0], source[0](*args)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 12}], ids=["one width", "kdim vdim"])
def test_a_packed_state_dict_is_that_of_pytorchs_attention(widths, bias):
    source = nn.Sequential(randomised(nn.MultiheadAttention(EMBED, HEADS, bias=bias, **widths)), nn.Linear(2, 2))
    expected = copy.deepcopy(source.state_dict())
    packed = packed_state_dict(expose_projections(source))
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 12}], ids=["one width", "kdim vdim"])
def test_own_checkpoints_load(widths):
    source = MultiheadAttention.from_torch(randomised(nn.MultiheadAttention(EMBED, HEADS, **widths)))
    target = MultiheadAttention.from_torch(randomised(nn.MultiheadAttention(EMBED, HEADS, **widths)))
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_dense_checkpoint_loads_into_a_masked_model_but_for_its_scores():
    source, model = small_vit(), blockvit.sparsify(small_vit(), 0.5, 8, targets=("mlp", "qkv", "out_proj"))
    keys = model.load_state_dict(source.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(name.endswith(".scores") for name in keys.missing_keys)
    for name, layer in supermask_layers(model).items():
        if name.endswith("qkv"):
            theirs = source.get_submodule(name.removesuffix(".qkv")).in_proj_weight
            assert torch.equal(layer.weight, theirs)


# --- whole models ----------------------------------------------------------------------------------------------------


def test_vision_transformer_gives_the_same_logits():
    model = small_vit()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        exposed = expose_projections(model)(images)
    assert exposed.std() > 0.1
    torch.testing.assert_close(exposed, expected, atol=1e-5, rtol=1e-5)
    assert not any(type(m) is nn.MultiheadAttention for m in model.modules())


def test_out_proj_mask_changes_the_logits_and_gets_gradient():
    model = blockvit.sparsify(small_vit(), 0.5, 8, targets="out_proj")
    images = torch.randn(4, 3, 16, 16)
    before = model(images)
    before.square().sum().backward()
    for name, layer in supermask_layers(model).items():
        assert layer.scores.grad is not None and layer.scores.grad.abs().max() > 0, name
        with torch.no_grad():
            layer.scores.neg_()
    assert (model(images) - before).abs().max() > 1e-3


@pytest.mark.parametrize("target", ["out_proj", "qkv", "mlp.0", "head"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_kind_of_mask_reaches_the_logits(target, mode):
    model = blockvit.sparsify(small_vit(), 0.5, 8, targets=f"*{target}").train(mode == "train")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(images)
        for layer in supermask_layers(model).values():
            layer.scores.neg_()
        assert (model(images) - before).abs().max() > 1e-3


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def padding_mask() -> torch.Tensor:
    return torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("target", ["linear1", "linear2", "out_proj", "qkv"])
def test_encoder_in_inference_does_not_bypass_the_masks(target, padded):
    model = blockvit.sparsify(encoder(), 0.5, 8, targets=target)
    x = torch.randn(2, 6, 32)
    padding = padding_mask() if padded else None
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        for layer in supermask_layers(model).values():
            layer.scores.neg_()
        assert (model(x, src_key_padding_mask=padding) - before).abs().max() > 1e-3


class OwnAttention(nn.MultiheadAttention):
    pass


def test_encoder_with_a_subclass_of_attention_does_not_bypass_the_masks(tmp_path):
    model, x = encoder().layers[0], torch.randn(2, 6, 32)
    model.self_attn = OwnAttention(32, 4, batch_first=True).eval()
    with pytest.raises(ValueError, match=r"self_attn\.out_proj: OwnAttention reads its weight instead of calling it"):
        blockvit.sparsify(model, 0.5, 8, targets=("linear1", "out_proj"))
    blockvit.sparsify(model, 0.5, 8, targets=("linear1", "linear2"))
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        blockvit.save(blockvit.to_block_sparse(blockvit.fold(model), 8, backend="gather"), tmp_path / "file")
        loaded = encoder().layers[0]
        loaded.self_attn = OwnAttention(32, 4, batch_first=True)
        torch.testing.assert_close(blockvit.load(tmp_path / "file", loaded)(x), expected)


def test_attention_with_a_computed_weight_is_an_error_that_says_so():
    model = encoder()
    prune.l1_unstructured(model.layers[1].self_attn.out_proj, "weight", 0.5)
    with pytest.raises(ValueError, match=r"MultiheadAttention's \(32, 32\) weight is no parameter.* prune\.remove"):
        expose_projections(model)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_encoder_gives_the_same_outputs(padded, grad):
    model = encoder()
    x = torch.randn(2, 6, 32)
    padding = padding_mask() if padded else None
    with torch.set_grad_enabled(grad):
        expected = model(x, src_key_padding_mask=padding)
        out = expose_projections(model)(x, src_key_padding_mask=padding)
    kept = ~padding_mask() if padded else torch.ones(2, 6, dtype=torch.bool)  # PyTorch's fused path zeroes the padding
    torch.testing.assert_close(out[kept], expected[kept], atol=1e-5, rtol=1e-5)


def test_decoder_with_cross_attention_gives_the_same_outputs():
    model = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    target, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    expected = model(target, memory, tgt_mask=causal, tgt_is_causal=True)
    out = expose_projections(model)(target, memory, tgt_mask=causal, tgt_is_causal=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_attention_shared_by_two_layers_stays_shared():
    mha = nn.MultiheadAttention(EMBED, HEADS)
    model = nn.ModuleList([mha, mha, nn.Sequential(mha)])
    expose_projections(model)
    assert model[0] is model[1] is model[2][0] and type(model[0]) is MultiheadAttention


def test_scale_is_one_over_the_root_of_the_head_width():
    ours = MultiheadAttention.from_torch(randomised(nn.MultiheadAttention(EMBED, HEADS, batch_first=True)))
    x = torch.randn(1, L, EMBED)
    q, k, _ = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in ours.qkv(x).chunk(3, dim=-1))
    expected = (q @ k.mT / math.sqrt(EMBED // HEADS)).softmax(dim=-1)
    torch.testing.assert_close(ours(x, x, x, average_attn_weights=False)[1], expected)
