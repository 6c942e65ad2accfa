"""``BlockSparseMLP`` where no kernel can run it, which is everywhere but on a GPU (that is in test_triton_mlp.py)."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torchvision
from torch import nn

import blockvit
from blockvit import BlockSparseLinear, BlockSparseMLP, fold, layer_fates, model_bytes, sparsify, to_block_sparse
from blockvit.mlp import fuse_mlps

FIRST = "encoder.layers.encoder_layer_0.mlp"


def folded_vit(dropout: float = 0.0) -> nn.Module:
    model = torchvision.models.VisionTransformer(16, 4, 2, 4, 32, 64, dropout=dropout, num_classes=10)
    for parameter in model.parameters():  # torchvision starts the head at zero, which would hide every difference
        nn.init.normal_(parameter, std=0.2)
    return fold(sparsify(model.eval(), 0.6, 8, targets=("mlp", "out_proj")))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


def layer() -> BlockSparseLinear:
    linear = nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight[:8] = 0
    return BlockSparseLinear.from_dense(linear, 8)


@pytest.mark.parametrize("fuse_gelu", [True, False])
def test_a_vision_transformers_mlps_keep_names_outputs_and_sizes(fuse_gelu):
    plain = to_block_sparse(folded_vit(), 8, fuse_gelu=fuse_gelu)
    before, bytes_before = layer_fates(plain, 8), model_bytes(plain)
    fused = fuse_mlps(copy.deepcopy(plain), True)
    mlp = fused.get_submodule(FIRST)
    assert type(mlp) is BlockSparseMLP and mlp.min_tokens is None and not mlp.training
    assert list(mlp._modules) == list(plain.get_submodule(FIRST)._modules)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert layer_fates(fused, 8) == before and model_bytes(fused) == bytes_before
    x = images()
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    assert sum(isinstance(m, BlockSparseMLP) for m in fused.modules()) == 2


def test_on_a_cpu_conversion_and_loading_change_nothing_unless_asked_to(tmp_path):
    models = {
        "default": to_block_sparse(folded_vit(), 8),
        "auto": to_block_sparse(folded_vit(), 8, fuse_mlp="auto"),
        "never": to_block_sparse(folded_vit(), 8, fuse_mlp=False),
        "always": to_block_sparse(folded_vit(), 8, fuse_mlp=True),
    }
    for name, model in models.items():
        assert any(isinstance(m, BlockSparseMLP) for m in model.modules()) is (name == "always")
        file = blockvit.save(model, tmp_path / f"{name}.safetensors")
        for fuse in ("auto", True, False):
            loaded = blockvit.load(file, fuse_mlp=fuse)
            assert any(isinstance(m, BlockSparseMLP) for m in loaded.modules()) is (fuse is True)
            x = images()
            with torch.no_grad():
                assert torch.equal(loaded(x), model(x))
    again = blockvit.load(file, models["always"])  # into a model that has them
    assert any(isinstance(m, BlockSparseMLP) for m in again.modules())


def test_a_wrong_setting_is_refused_before_anything_is_converted(tmp_path):
    model = folded_vit()
    with pytest.raises(ValueError, match="fuse_mlp is 'yes'; expected True, False or 'auto'"):
        to_block_sparse(model, 8, fuse_mlp="yes")
    assert not any(isinstance(m, BlockSparseLinear) for m in model.modules())
    with pytest.raises(ValueError, match="fuse_mlp is 'yes'"):
        blockvit.load(tmp_path / "not read", fuse_mlp="yes")


def test_dropout_in_training_drops():
    plain = to_block_sparse(folded_vit(dropout=0.5), 8).train()
    fused = fuse_mlps(copy.deepcopy(plain), True)
    assert type(fused.get_submodule(FIRST)) is BlockSparseMLP
    x = images()
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert torch.equal(fused(x), expected)
    assert not torch.equal(fused(x), expected)  # another draw


def test_modes_of_the_children_stay():
    sequence = nn.Sequential(nn.Sequential(layer(), nn.Dropout(), layer()))
    sequence[0][1].eval()
    fuse_mlps(sequence, True)
    assert sequence[0].training and not sequence[0][1].training


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def hooked() -> nn.Sequential:
    sequence = nn.Sequential(layer(), layer())
    sequence.register_forward_hook(lambda module, args, y: y + 1)
    return sequence


@pytest.mark.parametrize(
    "build, fusable",
    [
        (lambda: nn.Sequential(layer(), layer()), True),
        (lambda: nn.Sequential(layer(), nn.GELU("tanh"), nn.Dropout(), layer(), nn.ReLU(), layer()), True),
        (lambda: nn.Sequential(*[layer()] * 2), True),
        (lambda: nn.Sequential(layer(), nn.ReLU(), layer()), False),
        (lambda: nn.Sequential(layer(), nn.GELU(), nn.GELU(), layer()), False),
        (lambda: nn.Sequential(nn.Identity(), layer(), layer()), False),
        (lambda: nn.Sequential(layer(), nn.Linear(16, 16)), False),
        (lambda: nn.Sequential(layer()), False),
        (lambda: nn.Sequential(), False),
        (lambda: Residual(layer(), layer()), False),
        (hooked, False),
    ],
    ids=["two", "more", "shared", "ReLU", "GELU twice", "late", "dense", "one", "none", "own forward", "hooked"],
)
def test_which_sequences_are_recognised(build, fusable):
    model = nn.Sequential(build()).eval()
    x = torch.randn(3, 16)
    expected = model(x)
    assert fuse_mlps(model, True) is model
    assert isinstance(model[0], BlockSparseMLP) is fusable
    assert torch.equal(model(x), expected)
    fuse_mlps(model, True)  # nothing is left to do
    assert torch.equal(model(x), expected)


def test_the_model_itself_is_not_replaced():
    model = nn.Sequential(layer(), layer())
    assert fuse_mlps(model, True) is model and type(model) is nn.Sequential


def test_it_is_copied_sliced_pickled_and_trained_as_a_sequence_is():
    mlp = BlockSparseMLP(layer(), nn.GELU(), layer())
    x = torch.randn(3, 16, requires_grad=True)
    expected = nn.Sequential(*mlp)(x)
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    for other in (mlp, copy.deepcopy(mlp), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
    assert torch.equal(mlp[:2](x), nn.GELU()(mlp[0](x)))
    (grad,) = torch.autograd.grad(mlp(x).sum(), x)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_a_checkpoint_of_another_pattern_loads():
    source, target = BlockSparseMLP(layer(), layer()), BlockSparseMLP(layer(), layer())
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(target(x), source(x))
