"""timm's models, which readers bring: masked, trained a step, folded, converted and kept as they are."""

import importlib

import pytest
import timm
import torch
from torch import nn

import blockvit
from blockvit.kernels import cpu

SMALL = {"img_size": 32, "num_classes": 10}
VIT = {**SMALL, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}
MODELS = {
    "vit_tiny_patch16_224": (VIT, ("mlp", "attn.proj", "head")),
    "vit_small_patch14_reg4_dinov2": (VIT, ("mlp", "attn.proj")),
    "eva02_tiny_patch14_224": (VIT, ("mlp", "attn.proj")),  # SwiGLU, and no bias beside the keys
    "swin_tiny_patch4_window7_224": (
        {**SMALL, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)},
        ("mlp", "attn.proj"),
    ),
    "convnext_tiny": ({"num_classes": 10, "depths": (1, 1, 1, 1), "dims": (32, 32, 64, 64)}, ("mlp",)),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **MODELS[name][0])


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_trained_folded_converted_and_kept(name, faster, tmp_path, monkeypatch):
    can = cpu.load() is None  # whether "auto" finds the kernel faster is a measurement: here it is decided both ways
    monkeypatch.setattr(cpu, "beats_dense", lambda shape, dtype, block_size: faster and can)
    monkeypatch.setattr(importlib.import_module("blockvit.convert"), "beats_convolution", lambda *_: faster and can)
    model, images = built(name), torch.randn(2, 3, 32, 32)
    blockvit.sparsify(model, sparsity=0.5, block_size=16, targets=MODELS[name][1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(images).square().mean().backward()
    optimizer.step()
    model.eval()
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(blockvit.fold(model)(images), expected, rtol=0, atol=0)
        blockvit.to_block_sparse(model, 16, backend="gather", dense_backend="auto")
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        blockvit.save(model, tmp_path / "model.safetensors")
        loaded = blockvit.load(tmp_path / "model.safetensors", built(name))
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_weight_the_model_reads_stays_as_it_is():
    sizes = {**SMALL, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 2}
    model, images = timm.create_model("beit_base_patch16_224", **sizes).eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv: Attention reads its weight instead of calling it"):
        blockvit.sparsify(model, 0.5, 16, targets="qkv")
    expected = model(images)
    blockvit.to_block_sparse(model, 16, dense_backend="gather")
    block = model.blocks[0]
    assert type(block.attn.qkv) is nn.Linear and isinstance(block.mlp.fc1, blockvit.BlockSparseLinear)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
