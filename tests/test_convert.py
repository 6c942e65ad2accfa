from __future__ import annotations

import importlib
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torchvision.models.feature_extraction import create_feature_extractor

import blockvit
from blockvit import (
    BackendUnavailableError,
    BlockSparseLinear,
    fold,
    layer_fates,
    model_bytes,
    sparsify,
    to_block_sparse,
)
from blockvit.convert import LayerFate, random_block_mask_
from blockvit.kernels import cpu
from blockvit.patches import PatchEmbedding
from blockvit.supermask import SupermaskConv2d, SupermaskLinear, supermask_layers

BACKENDS = [name for name, b in blockvit.backends().items() if b.refusal(torch.device("cpu"), torch.float32, 8) is None]


def vit(num_classes: int = 10) -> nn.Module:
    """A ViT whose head (10 or 1000 classes) is no multiple of the block sizes used here."""
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=num_classes
    )
    for parameter in model.parameters():  # torchvision starts the head at zero, which would hide every difference
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def folded_vit(num_classes: int = 10, block_size: int = 16, **arguments) -> nn.Module:
    targets = arguments.pop("targets", ("mlp", "out_proj", "head"))
    return fold(sparsify(vit(num_classes), 0.6, block_size, targets=targets))


def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16)


# --- fold ------------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    block_size=st.sampled_from([1, 2, 3, 8, 16]),
    sparsity=st.sampled_from([0.0, 0.3, 0.7, 0.9, 0.99]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_folding_a_linear_changes_no_bit(rows, cols, block_size, sparsity, bias, dtype, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(cols, rows, bias=bias, dtype=dtype))
    sparsify(model, sparsity, block_size, targets="*")
    x = torch.randn(4, cols, dtype=dtype)
    masked = model(x)
    assert fold(model) is model
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), masked)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect", "groups": 2, "bias": False},
        {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)},
    ],
    ids=str,
)
def test_folding_a_convolution_changes_no_bit(arguments):
    model = nn.Sequential(nn.Conv2d(8, 12, **arguments))
    sparsify(model, 0.5, 4, targets="*")
    assert type(model[0]) is SupermaskConv2d
    x = torch.randn(2, 8, 9, 9)
    masked = model(x)
    fold(model)
    assert type(model[0]) is nn.Conv2d
    assert (model[0].weight == 0).float().mean() > 0.3
    assert torch.equal(model(x), masked)


def test_folding_a_vision_transformer_changes_no_bit():
    model = sparsify(vit(), 0.6, 16, targets=("mlp", "qkv", "out_proj", "head"))
    x = images()
    with torch.no_grad():
        masked = model(x)
        folded = fold(model)(x)
    assert masked.std() > 0.1
    assert torch.equal(folded, masked)
    assert not supermask_layers(model)


def test_folded_layers_keep_bias_mode_and_what_is_frozen():
    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5, 4, targets="*").eval()
    model[0].weight.requires_grad_(False)
    bias = model[0].bias
    weight = model[0].weight.detach().clone()
    masked = model[0].weight
    fold(model)
    assert model[0].bias is bias
    assert not model[0].training
    assert not model[0].weight.requires_grad and model[1].weight.requires_grad
    assert torch.equal(masked, weight)  # not changed underneath whoever holds it
    assert isinstance(model[1].weight, nn.Parameter) and model[1].weight.is_leaf


def test_a_shared_layer_is_folded_at_every_name():
    model = nn.Sequential()
    model.a = nn.Linear(8, 8)
    model.b = model.a
    sparsify(model, 0.5, 4, targets="a")
    model.b = model.a  # tied again, as a model ties its layers
    fold(model)
    assert type(model.a) is nn.Linear and model.a is model.b


def test_nan_scores_stop_the_fold_before_any_layer_is_folded():
    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5, 4, targets="*")
    with torch.no_grad():
        model[1].scores[0] = math.nan
    with pytest.raises(ValueError, match=r"2 of 4 mask scores are NaN.*training diverged"):
        fold(model)
    assert all(type(layer) is SupermaskLinear for layer in model)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return reading(self.read, self.called(x))


def reading(layer, x):  # outside of the module, whose own source is looked through for such layers
    return nn.functional.linear(x, layer.weight)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_folding_warns_of_masks_that_were_never_applied(compiled):
    model = sparsify(Reader(), 0.5, 4, targets="*")
    forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    forward(torch.randn(2, 8))
    with pytest.warns(UserWarning, match=r"never called, though others were: read\. If .* with skip=") as warned:
        fold(model)
    assert [one.filename for one in warned if "never called" in str(one.message)] == [__file__]


def test_folding_warns_too_where_no_mask_was_applied_in_a_training():
    model = sparsify(Reader(), 0.5, 4, targets="read")
    model(torch.randn(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match=r"never called, though the model has gradients: read\. If .* with skip="):
        fold(model)


def test_folding_does_not_warn_where_no_layer_or_every_layer_was_called(recwarn):
    fold(sparsify(Reader(), 0.5, 4, targets="*"))
    model = sparsify(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8, 8)), 0.5, 4, targets="*")
    torch.export.export(model, (torch.randn(1, 4, 1, 1),))  # to which the note is no obstacle
    model(torch.randn(1, 4, 1, 1))
    fold(model)
    assert not [warning for warning in recwarn if "never called" in str(warning.message)]


def test_nothing_to_fold():
    with pytest.raises(ValueError, match=r"Sequential has no supermask layers to fold; call blockvit\.sparsify"):
        fold(nn.Sequential(nn.Linear(4, 4)))


def test_a_single_layer_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match=r"itself the SupermaskLinear .* wrap it in nn\.Sequential"):
        fold(SupermaskLinear(8, 8, sparsity=0.5, block_size=4))
    zeros = nn.Linear(8, 8)
    nn.init.zeros_(zeros.weight)
    with pytest.raises(ValueError, match=r"itself the Linear .* wrap it in nn\.Sequential"):
        to_block_sparse(zeros, 4)


# --- to_block_sparse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_conversion_keeps_the_logits(backend, num_classes):
    model = folded_vit(num_classes)
    x = images()
    with torch.no_grad():
        expected = model(x)
        assert to_block_sparse(model, 16, backend) is model
        actual = model(x)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    head = model.heads.head
    assert isinstance(head, BlockSparseLinear) and head.out_features == num_classes
    assert backend in ("auto", head.backend.name)


@pytest.mark.parametrize("block_size", [8, 12, 32])
def test_the_block_size_need_not_be_the_trained_one(block_size):
    model = fold(sparsify(vit(), 0.9, 16, targets="mlp"))
    x = images()
    with torch.no_grad():
        expected = model(x)
        actual = to_block_sparse(model, block_size)(x)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_fates_of_every_kind():
    class Special(nn.Linear):
        pass

    model = nn.Sequential()
    for name, shape in {"halved": (8, 8), "odd": (8, 10), "full": (8, 8), "little": (16, 16), "other": (8, 8)}.items():
        model.add_module(name, nn.Linear(shape[1], shape[0]))
    model.special, model.conv = Special(8, 8), nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        for name in ("halved", "odd", "other", "special"):
            model.get_submodule(name).weight[:4] = 0
        model.little.weight[:4, :4] = 0
        model.conv.weight[0] = 0
    fates = {f.name: f for f in layer_fates(model, 4, skip="other", min_sparsity=0.1)}
    assert list(fates) == ["halved", "odd", "full", "little", "other", "special", "conv"]
    assert fates["halved"] == LayerFate("halved", "Linear", (8, 8), 0.5, "converted")
    assert fates["odd"] == LayerFate("odd", "Linear", (8, 10), 0.5, "padded")
    assert fates["full"] == LayerFate("full", "Linear", (8, 8), 0.0, "dense", "no 4x4 block is all zero")
    assert fates["little"] == LayerFate(
        "little", "Linear", (16, 16), 1 / 16, "dense", "sparsity below min_sparsity=0.1"
    )
    assert fates["other"] == LayerFate("other", "Linear", (8, 8), 0.5, "dense", "not among the targets")
    assert (fates["special"].fate, fates["special"].kind) == ("dense", "Special")
    assert "subclass of nn.Linear" in fates["special"].reason
    assert (fates["conv"].fate, fates["conv"].sparsity) == ("dense", 0.5)
    assert "convolution" in fates["conv"].reason

    to_block_sparse(model, 4, skip="other", min_sparsity=0.1)
    converted = {name for name, m in model.named_children() if isinstance(m, BlockSparseLinear)}
    assert converted == {name for name, f in fates.items() if f.fate != "dense"} == {"halved", "odd"}
    after = {f.name: f for f in layer_fates(model, 4)}
    backend = model.halved.backend.name
    assert after["halved"] == LayerFate("halved", "BlockSparseLinear", (8, 8), 0.5, "converted", backend=backend)
    assert after["odd"].fate == "padded"


def test_fates_of_a_vision_transformer_name_the_projections():
    model = folded_vit(targets=("mlp", "head"))
    before, attention = model.state_dict(), nn.MultiheadAttention(32, 4, batch_first=True)
    model.encoder.layers[0].self_attention = attention
    fates = {f.name: f for f in layer_fates(model, 16, targets=("mlp", "head"))}
    assert model.encoder.layers[0].self_attention is attention  # which is a question, and changes nothing
    assert len(before) == len(model.state_dict())
    layer = "encoder.layers.encoder_layer_0"
    assert fates[f"{layer}.mlp.0"].fate == "converted"
    assert fates["heads.head"].fate == "padded"
    assert fates[f"{layer}.self_attention.out_proj"].reason == "not among the targets"
    assert fates["conv_proj"].kind == "Conv2d"
    assert len(fates) == 2 * 4 + 2


def test_the_attentions_masks_survive_conversion():
    model = folded_vit(targets=("qkv", "out_proj"))
    x = images()
    with torch.no_grad():
        expected = model(x)
        actual = to_block_sparse(model, 16)(x)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    attention = model.encoder.layers[0].self_attention
    assert isinstance(attention.qkv, BlockSparseLinear) and isinstance(attention.out_proj, BlockSparseLinear)


def test_converting_again_converts_what_is_left():
    model = folded_vit()
    to_block_sparse(model, 16, targets="head")
    head = model.heads.head
    to_block_sparse(model, 16)
    assert model.heads.head is head
    assert isinstance(model.encoder.layers[0].mlp[0], BlockSparseLinear)
    assert to_block_sparse(model, 16) is model


def test_converting_again_takes_the_backend_that_is_named():
    model, x = folded_vit(), images()
    with torch.no_grad():
        expected = to_block_sparse(model, 16, "gather")(x)
        to_block_sparse(model, 16)
        assert model.heads.head.backend.name == "gather"  # "auto" is no wish
        to_block_sparse(model, 16, "dense", targets="head")
        assert model.heads.head.backend.name == "dense"
        assert model.encoder.layers[0].mlp[0].backend.name == "gather"
        with pytest.raises(BackendUnavailableError):
            to_block_sparse(model, 16, "torch_tuned")
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_converting_again_in_blocks_of_another_size_is_an_error():
    model = to_block_sparse(folded_vit(), 16, targets="mlp", dense_backend="gather")
    with pytest.raises(ValueError, match=r"mlp\.0 was converted before, in blocks of 16, and block_size is 8; pass bl"):
        to_block_sparse(model, 8)
    assert to_block_sparse(model, 8, skip="mlp") is model
    model = to_block_sparse(folded_vit(), 16, targets="mlp")
    to_block_sparse(model, 8, targets="head")
    assert (model.encoder.layers[0].mlp[0].block_size, model.heads.head.block_size) == (16, 8)


def test_what_comes_to_the_dense_backend_by_itself_is_told_once():
    with pytest.warns(
        UserWarning, match=r"'dense', which multiplies by the zeros too: .* torch\.float64 on cpu in bl"
    ) as w:
        to_block_sparse(folded_vit().double(), 16)
    assert [one.filename for one in w if "'dense'" in str(one.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_block_sparse(folded_vit().double(), 16, "dense")
    if not HAS_KERNEL:
        return
    model = to_block_sparse(folded_vit(), 16)
    with pytest.warns(UserWarning, match=r"'dense', .* torch\.float64"):
        model.double()


def test_nothing_to_convert_lists_every_layer():
    with pytest.raises(ValueError, match=r"no layer holds a 16x16 block of zeros") as error:
        to_block_sparse(vit(), 16)
    assert "heads.head (10, 32): no 16x16 block is all zero" in str(error.value)
    assert "blockvit.sparsify" in str(error.value)


def test_masks_must_be_folded_first():
    for function in (to_block_sparse, layer_fates):
        with pytest.raises(ValueError, match=r"still has supermask layers; call blockvit\.fold\(model\) before"):
            function(sparsify(vit(), 0.5, 16), 16)


@pytest.mark.parametrize(("block_size", "error"), [(0, ValueError), (16.0, TypeError)])
def test_bad_block_size(block_size, error):
    with pytest.raises(error, match="block_size is"):
        to_block_sparse(folded_vit(), block_size)


def test_unknown_targets_and_backends():
    with pytest.raises(ValueError, match=r"targets: 'mpl' matches no layer; the layers are:\n  encoder"):
        to_block_sparse(folded_vit(), 16, targets="mpl")
    with pytest.raises(ValueError, match="backend is 'tensorrt'; expected 'auto' or one of"):
        to_block_sparse(folded_vit(), 16, "tensorrt")
    with pytest.raises(BackendUnavailableError, match="backend 'torch' cannot run"):
        to_block_sparse(folded_vit().bfloat16(), 16, "torch")


# --- GELU ------------------------------------------------------------------------------------------------------------


def mlp(*layers: nn.Module) -> nn.Sequential:
    """The layers in order, every linear among them with half of its blocks zero."""
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.weight[: layer.out_features // 2] = 0
    return nn.Sequential(*layers)


def shared_linear() -> nn.Module:
    linear = nn.Linear(16, 16)
    return mlp(linear, nn.GELU(), linear)


def shared_between() -> nn.Module:
    tanh = nn.Tanh()
    return mlp(nn.Linear(16, 16), tanh, nn.Linear(16, 16), tanh, nn.GELU())


class Residual(nn.Sequential):
    def forward(self, x):
        hidden = self[0](x)
        return hidden + self[1](hidden)


@pytest.mark.parametrize(
    "build",
    [
        lambda: mlp(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
        lambda: mlp(nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 16), nn.GELU()),
        lambda: mlp(nn.Linear(16, 32), nn.GELU(), nn.GELU()),
        lambda: mlp(nn.Linear(16, 32), nn.Dropout(), nn.GELU()),
        lambda: nn.Sequential(mlp(nn.Linear(16, 32)), nn.GELU()),
        shared_linear,
        shared_between,
        lambda: nn.Sequential(Residual(*mlp(nn.Linear(16, 16), nn.GELU()))),
    ],
    ids=["exact", "tanh", "twice", "dropout", "nested", "shared linear", "shared between", "own forward"],
)
def test_fusing_gelu_changes_no_output(build):
    model = build().eval()
    x = 2 * torch.randn(5, 16)
    expected = model(x)
    torch.testing.assert_close(to_block_sparse(model, 8)(x), expected)


def test_gelu_is_fused_where_it_follows_a_converted_layer():
    model = to_block_sparse(mlp(nn.Linear(8, 8), nn.GELU("tanh"), nn.Linear(8, 8), nn.GELU(), nn.ReLU()), 4)
    assert [m.activation for m in (model[0], model[2])] == ["gelu_tanh", "gelu"]
    assert [type(m) for m in (model[1], model[3], model[4])] == [nn.Identity, nn.Identity, nn.ReLU]


class InParts(nn.Module):
    """Calls its MLP in one of the ways of the subclasses, all of which put something before its GELU."""

    def __init__(self):
        super().__init__()
        self.mlp, self.more = mlp(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), nn.Linear(16, 16)


class Sliced(InParts):
    def forward(self, x):
        return self.mlp[1:](self.mlp[0](x) + self.more(x))


class Iterated(InParts):
    def forward(self, x):
        for layer in self.mlp:
            x = 2 * layer(x)
        return x


class HandedOn(InParts):
    def forward(self, x):
        return twice_each(x, self.mlp)


class Inherited(Sliced):
    def forward(self, x):
        return super().forward(x) + self.mlp(x)


class Named(InParts):
    def forward(self, x):
        steps = self.mlp
        return getattr(steps, "1")(2 * getattr(steps, "0")(x))


def twice_each(x, layers):
    for layer in layers:
        x = 2 * layer(x)
    return x


@pytest.mark.parametrize("kind", [Sliced, Iterated, HandedOn, Inherited, Named])
def test_no_gelu_is_fused_where_a_forward_above_calls_parts_of_the_sequence(kind):
    model, x = nn.Sequential(kind()), torch.randn(5, 16)
    expected = model(x)
    torch.testing.assert_close(to_block_sparse(model, 8, fuse_mlp=True)(x), expected)
    assert type(model[0].mlp[1]) is nn.GELU


class InLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([mlp(nn.Linear(16, 16), nn.GELU()), mlp(nn.Linear(16, 16), nn.GELU())])

    def forward(self, x):
        last = self.blocks[-1]
        for block in self.blocks:
            x = x + block(x)
        return last(x) if self.blocks is not None else x


def test_gelus_are_fused_where_whole_sequences_of_a_list_are_called():
    model, x = InLists(), torch.randn(5, 16)
    expected = model(x)
    torch.testing.assert_close(to_block_sparse(model, 8)(x), expected)
    assert [type(block[1]) for block in model.blocks] == [nn.Identity] * 2


@pytest.mark.parametrize("place", [0, 1])
def test_gelu_with_a_hook_on_either_side_is_not_fused(place):
    model = to_block_sparse(mlp(nn.Linear(8, 8), nn.GELU()), 4, fuse_gelu=False)
    model[place].register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(3, 8)
    expected = model(x)
    torch.testing.assert_close(to_block_sparse(model, 4)(x), expected)
    assert type(model[1]) is nn.GELU


def test_a_model_on_the_meta_device_gives_shapes():
    model = to_block_sparse(folded_vit(), 16).to("meta")
    assert model(torch.empty(3, 3, 16, 16, device="meta")).shape == (3, 10)


def test_a_backend_that_cannot_run_leaves_the_model_as_it_was():
    model = vit()
    for arguments in ({"backend": "torch"}, {"dense_backend": "torch"}):
        nn.init.zeros_(model.heads.head.weight)
        with pytest.raises(BackendUnavailableError):
            to_block_sparse(model.bfloat16(), 16, **arguments)
        assert type(model.encoder.layers[0].self_attention) is nn.MultiheadAttention
        assert not [m for m in model.modules() if isinstance(m, BlockSparseLinear)]


def test_fusing_can_be_turned_off_and_dense_layers_keep_their_gelu():
    model = to_block_sparse(mlp(nn.Linear(8, 8), nn.GELU()), 4, fuse_gelu=False)
    assert model[0].activation is None and type(model[1]) is nn.GELU
    model = mlp(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())
    to_block_sparse(model, 4, skip="0")
    assert type(model[1]) is nn.GELU and type(model[3]) is nn.Identity


# --- layers that stay dense ------------------------------------------------------------------------------------------

HAS_KERNEL = "cpu" in BACKENDS
needs_a_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="the CPU kernel could not be built")


@pytest.mark.parametrize("dense_backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("faster", [False, True])
def test_dense_layers_go_to_the_backend_asked_for(dense_backend, faster, monkeypatch):
    monkeypatch.setattr(cpu, "beats_dense", lambda shape, dtype, block_size: faster and HAS_KERNEL)
    monkeypatch.setattr(
        importlib.import_module("blockvit.convert"), "beats_convolution", lambda *sizes: faster and HAS_KERNEL
    )
    model = folded_vit()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        converted = to_block_sparse(model, 16, targets="mlp", dense_backend=dense_backend)
        torch.testing.assert_close(converted(x), expected)
    kinds = {name: type(m) for name, m in converted.named_modules() if isinstance(m, nn.Linear | BlockSparseLinear)}
    moved = dense_backend != "dense" and (dense_backend != "auto" or (faster and HAS_KERNEL))
    assert (kinds["heads.head"] is BlockSparseLinear) is moved
    assert (kinds["encoder.layers.encoder_layer_0.self_attention.qkv"] is BlockSparseLinear) is moved
    assert kinds["encoder.layers.encoder_layer_0.mlp.0"] is BlockSparseLinear
    assert isinstance(converted.conv_proj, PatchEmbedding) is moved


@needs_a_kernel
@pytest.mark.parametrize(
    ("dense_backend", "expected"), [("cpu", "cpu"), ("auto", "auto"), ("gather", "torch"), (None, "torch")]
)
def test_attention_takes_our_kernel_where_dense_layers_do(dense_backend, expected):
    model = folded_vit()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = model(x)
        converted = to_block_sparse(model, 16, targets="mlp", dense_backend=dense_backend)
        torch.testing.assert_close(converted(x), logits)
    assert {layer.self_attention.kernel for layer in converted.encoder.layers} == {expected}


@needs_a_kernel
def test_what_auto_found_faster_on_a_cpu_can_leave_it(monkeypatch):
    monkeypatch.setattr(cpu, "beats_dense", lambda shape, dtype, block_size: True)
    model = to_block_sparse(folded_vit(), 16, targets="mlp", dense_backend="auto")
    head = model.heads.head
    assert (head.backend.name, head.requested_backend) == ("cpu", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of zeros it has none to be multiplied by
        head.double()
    assert head.backend.name == "dense"
    assert model.double()(torch.randn(2, 3, 16, 16).double()).dtype == torch.float64
    assert model.float().heads.head.backend.name == "cpu"


def test_other_convolutions_stay_where_they_are():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 1), nn.Conv2d(16, 16, 4, 4), nn.Flatten(), nn.Linear(64, 16))
    converted = to_block_sparse(model, 16, dense_backend="gather")
    assert [type(m) for m in converted] == [nn.Conv2d, PatchEmbedding, nn.Flatten, BlockSparseLinear]


@needs_a_kernel
def test_auto_measures_the_patch_embedding_against_the_convolution(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu, "beats", lambda ours, dense: asked.append((ours(), dense())) or True)
    blockvit.patches._beats_convolution.cache_clear()
    assert blockvit.patches.beats_convolution(32, 3, 4, torch.float32, 32)
    blockvit.patches._beats_convolution.cache_clear()
    ((ours, dense),) = asked
    assert dense.shape == (1, 32, 14, 14)
    torch.testing.assert_close(ours, dense)


@needs_a_kernel
def test_a_model_without_zeros_goes_whole_to_the_kernel_and_survives_a_file(tmp_path):
    model = vit()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        converted = to_block_sparse(model, dense_backend="cpu")
        assert not [m for m in converted.modules() if type(m) in (nn.Linear, nn.Conv2d)]
        assert {m.backend.name for m in converted.modules() if isinstance(m, BlockSparseLinear)} == {"cpu"}
        torch.testing.assert_close(converted(x), expected)
        file = blockvit.save(converted, tmp_path / "model.safetensors")
        torch.testing.assert_close(blockvit.load(file)(x), expected)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_model_bytes_of_a_dense_model():
    assert model_bytes(nn.Linear(10, 20)) == 4 * (200 + 20)
    assert model_bytes(nn.BatchNorm1d(8)) == 4 * 4 * 8 + 8  # weight, bias, mean, variance; the counter is an int64


def test_model_bytes_counts_shared_memory_once():
    linear = nn.Linear(10, 20, bias=False)
    tied = nn.Linear(10, 20, bias=False)
    tied.weight = linear.weight
    assert model_bytes(nn.Sequential(linear, tied, linear)) == 4 * 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_model_bytes_of_a_converted_layer_hold_the_parts_and_the_packing(backend):
    linear = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        linear.weight[8:] = 0
    sparse = BlockSparseLinear.from_dense(linear, 8, backend=backend)
    parts = sparse.bsr.nbytes
    assert parts == 8 * 64 * 4 + 8 * 4 + 9 * 4
    if backend in ("torch", "cpu"):  # one reads the parts themselves, the other keeps the blocks in its own order only
        assert model_bytes(sparse) == parts
    elif backend == "dense":
        assert model_bytes(sparse) == parts + 64 * 64 * 4
    else:
        assert parts < model_bytes(sparse) < 64 * 64 * 4


@given(
    rows=st.integers(1, 40), cols=st.integers(1, 40), block_size=st.sampled_from([3, 8]), sparsity=st.floats(0, 0.99)
)
def test_random_block_mask_drops_as_many_blocks_as_a_supermask(rows, cols, block_size, sparsity):
    weight = torch.ones(rows, cols)
    random_block_mask_(weight, sparsity, block_size, torch.Generator().manual_seed(0))
    blocks = math.ceil(rows / block_size) * math.ceil(cols / block_size)
    zero = blockvit.bsr.zero_blocks(weight, block_size)
    assert blocks - int(zero.sum()) == blockvit.masks.num_kept(blocks, sparsity)
    assert weight.unique().tolist() in ([0, 1], [1])


def test_the_dense_backend_leaves_alone_what_is_to_be_skipped():
    model = folded_vit(targets="mlp")
    head = model.heads.head
    to_block_sparse(model, 16, dense_backend="gather", skip=("head", "conv_proj"))
    assert model.heads.head is head and type(model.conv_proj) is nn.Conv2d
    assert isinstance(model.encoder.layers.encoder_layer_0.self_attention.qkv, BlockSparseLinear)


def test_options_are_checked_before_anything_is_looked_at():
    with pytest.raises(ValueError, match="min_sparsity is nan; expected a fraction"):
        to_block_sparse(folded_vit(), 16, min_sparsity=float("nan"))
    with pytest.raises(ValueError, match="backend is 'gahter'"):
        to_block_sparse(folded_vit(), 16, targets="mlp", dense_backend="gahter")
    with pytest.raises(ValueError, match="fuse_mlp is 1; expected True, False or 'auto'"):
        to_block_sparse(folded_vit(), 16, fuse_mlp=1)


def test_an_empty_list_skips_nothing():
    assert layer_fates(nn.Sequential(nn.Conv2d(3, 8, 4, 4)), 8, skip=[])[0].fate == "dense"
    assert layer_fates(nn.Sequential(nn.LazyLinear(8)), 8)[0].reason.startswith("not initialised")


def test_bytes_of_wrapped_tensors_and_of_models_without_memory():
    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(TwoTensor(torch.zeros(8, 4), torch.zeros(8, 4)), requires_grad=False)
    assert model_bytes(model) == 2 * 4 * 8 * 4, "as 2:4 sparsity does, it wraps tensors and has no memory of its own"
    with torch.device("meta"):
        assert model_bytes(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 20))) == 4 * (100 + 10 + 200 + 20)


def leaves_in_the_readme() -> list[type[nn.Module]]:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    names = re.search(r'"leaf_modules":\s+\[([^]]+)\]', readme)[1]
    return [getattr(blockvit, name.strip()) for name in names.split(",")]


@pytest.mark.parametrize("made", ["masked", "spartan", "trained sparsely", "folded", "converted"])
def test_torch_fx_takes_our_modules_as_the_leaves_that_the_readme_names(made, monkeypatch):
    method = "spartan" if made == "spartan" else "supermask"
    model = sparsify(vit(), 0.6, 16, targets=("mlp", "out_proj", "head", "conv_proj"), method=method)
    if made == "trained sparsely":
        blockvit.train_sparse(model, torch.optim.SGD(model.parameters(), 0.1))
    if made in ("folded", "converted"):
        fold(model)
    if made == "converted":
        to_block_sparse(model, 16, "gather", dense_backend="gather", fuse_mlp=True)
        for mlp in [m for m in model.modules() if isinstance(m, blockvit.BlockSparseMLP)]:
            mlp.min_tokens = 1  # as where there is a GPU, where its forward asks for the number of tokens
        monkeypatch.setattr(blockvit.BlockSparseMLP, "_can_fuse", lambda self, x, pattern: x.numel() < 0)
    nodes, x = ["encoder.layers.encoder_layer_0.mlp", "heads.head"], images()
    leaves = {"leaf_modules": leaves_in_the_readme()}
    found = create_feature_extractor(model.eval(), nodes, tracer_kwargs=leaves)(x)
    mlp = model.get_submodule(nodes[0])
    with torch.no_grad():
        expected, inside = model(x), []
        mlp.register_forward_hook(lambda module, inputs, output: inside.append(output))
        model(x)
    torch.testing.assert_close(found["heads.head"], expected)
    torch.testing.assert_close(found[nodes[0]], inside[0])


@pytest.mark.parametrize("damage", ["indices", "a part missing"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_that_does_not_fit_leaves_the_layer_as_it_was(damage, strict):
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data[:32] = 0
    to_block_sparse(model, 32, "gather")
    x, state = torch.randn(3, 64), dict(model.state_dict())
    before = model(x)
    if damage == "indices":
        state["0.col_indices"] = state["0.col_indices"] + 7
    else:
        state["0.values"] = state.pop("0.values")[:1].clone()
        del state["0.col_indices"]
    with pytest.raises(RuntimeError, match="0: no BSR weight of this layer"):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(model(x), before)
    model.to(torch.float64)(x.double())


def test_layers_to_skip_may_come_from_a_generator():
    model = to_block_sparse(folded_vit(), 16, dense_backend="gather", skip=(name for name in ("heads.head",)))
    assert type(model.heads.head) is nn.Linear
