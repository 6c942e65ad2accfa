"""Published checkpoints of SuperBlock's format, as its own masked layers would have written them."""

from __future__ import annotations

import math
import os
import pickle

import pytest
import superblock_reference
import torch
import torchvision
from superblock_reference import write
from torch import nn

import blockvit
from blockvit import SupermaskLinear, load_superblock, superblock
from blockvit.supermask import supermask_layers

VIT = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
BLOCK = 8
OUT_PROJ = [f"encoder.layers.encoder_layer_{i}.self_attention.out_proj" for i in range(2)]
MLP = [f"encoder.layers.encoder_layer_{i}.mlp.{j}" for i in range(2) for j in (0, 3)]


def vit(**arguments) -> nn.Module:
    model = torchvision.models.VisionTransformer(**VIT | {"num_classes": 10} | arguments)
    for parameter in model.parameters():  # torchvision starts the head at zero, which would hide every difference
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def published(sparsity: float = 0.8, tile_size: int = BLOCK) -> nn.Module:
    return superblock_reference.published(vit(), sparsity, tile_size)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


WRAPPINGS = {
    "training checkpoint": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}},
    "bare state dict": lambda state: state,
    "data parallel": lambda state: {"model": {f"module.{name}": t for name, t in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "dict"])
def test_a_published_checkpoint_gives_the_published_logits(tmp_path, images, wrapping, as_file):
    reference = published()
    source = WRAPPINGS[wrapping](reference.state_dict())
    model = vit()
    loaded = load_superblock(write(source, tmp_path) if as_file else source, model, sparsity=0.8, block_size=BLOCK)
    assert loaded is model and not model.training
    assert type(model.heads.head) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.8, 0.9])
def test_masks_are_the_references_and_out_proj_is_left_out_by_default(sparsity):
    reference = published(sparsity)
    state = reference.state_dict()
    kept = dict(state)
    model = load_superblock(state, vit(), sparsity=sparsity, block_size=BLOCK)
    for name in (*MLP, "heads.head"):
        expected = reference.get_submodule(name).masked_weight()
        assert torch.equal(model.get_submodule(name).weight, expected), name
    for name in OUT_PROJ:
        assert torch.equal(model.get_submodule(name).weight, reference.get_submodule(name).weight)
    assert list(state) == list(kept)  # the caller's dictionary is left alone


def test_out_proj_masks_are_applied_on_request():
    reference = published()
    model = load_superblock(reference.state_dict(), vit(), sparsity=0.8, block_size=BLOCK, apply_out_proj_masks=True)
    for name in (*MLP, *OUT_PROJ):
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, reference.get_submodule(name).masked_weight())
        assert (weight == 0).float().mean() > 0.7


def test_scale_and_shift_are_applied_before_the_mask():
    reference = published()
    with torch.no_grad():
        for name in MLP:
            reference.get_submodule(name).scale.fill_(0.5)
            reference.get_submodule(name).shift.fill_(0.25)
    model = load_superblock(reference.state_dict(), vit(), sparsity=0.8, block_size=BLOCK)
    for name in MLP:
        assert torch.equal(model.get_submodule(name).weight, reference.get_submodule(name).masked_weight())


def test_what_was_loaded_converts(images):
    reference = published()
    model = load_superblock(reference.state_dict(), vit(), sparsity=0.8, block_size=BLOCK)
    blockvit.to_block_sparse(model, BLOCK)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), atol=1e-4, rtol=1e-4)


def test_a_model_whose_projections_are_exposed_loads_too(images):
    reference = published()
    model = blockvit.expose_projections(vit())
    load_superblock(reference.state_dict(), model, sparsity=0.8, block_size=BLOCK)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), atol=1e-5, rtol=1e-5)


def test_another_block_size():
    with pytest.raises(
        ValueError, match=r"scores have shape \(4, 4\).*in blocks of 16 has \(2, 2\).*another block_size"
    ):
        load_superblock(published().state_dict(), vit(), sparsity=0.8, block_size=16)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("sp0.80-ts8.pth", True),
        ("sp0.8-ts8.pth", True),
        ("vit-sp.80-ts8-final.pth", True),
        ("model_32.pth", True),
        ("sp0.90-ts8.pth", False),
        ("sp0.80-ts32.pth", False),
    ],
)
def test_sparsity_and_block_size_are_compared_with_the_files_name(tmp_path, name, right):
    path = write({"model": published().state_dict()}, tmp_path, name)
    if right:
        load_superblock(path, vit(), sparsity=0.8, block_size=BLOCK)
    else:
        with pytest.raises(ValueError, match=rf"{name} says sparsity .* but sparsity=0\.8 and block_size=8 were given"):
            load_superblock(path, vit(), sparsity=0.8, block_size=BLOCK)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: vit(num_layers=3), r"missing from the file: encoder\.layers\.encoder_layer_2"),
        (lambda: vit(num_layers=1), r"not in the model: encoder\.layers\.encoder_layer_1"),
        (lambda: vit(num_classes=11), r"heads\.head\.weight: \(10, 32\) in the file, \(11, 32\) in the model"),
    ],
)
def test_superblock_of_another_architecture_changes_nothing(other, message):
    model = other()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another architecture than VisionTransformer:\n") as error:
        load_superblock(published().state_dict(), model, sparsity=0.8, block_size=BLOCK)
    error.match(message)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fraction", [0, 0.01, 0.5, 0.99])
def test_truncated_superblock_file(tmp_path, fraction):
    path = write({"model": published().state_dict()}, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(ValueError, match=r"model_32\.pth is truncated or damaged .*fetch or save it again"):
        load_superblock(path, vit(), sparsity=0.8, block_size=BLOCK)


class Harmful:
    """A pickle that would run code when loaded."""

    def __reduce__(self):
        return (os.mkdir, ("harm",))


@pytest.mark.parametrize(
    "content",
    [
        b"hello world\n",
        b"<html>404</html>",
        bytes(range(256)) * 8,
        b"\x80\x02}q\x00",
        pickle.dumps(Harmful(), protocol=2),
    ],
    ids=["text", "html", "bytes", "cut pickle", "code"],
)
def test_files_that_are_no_checkpoint(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "junk.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"junk\.pth (is truncated or damaged|holds more than tensors)"):
        load_superblock(path, vit(), sparsity=0.8, block_size=BLOCK)
    assert not (tmp_path / "harm").exists()


def test_checkpoints_that_are_no_superblock(tmp_path):
    arguments = {"sparsity": 0.8, "block_size": BLOCK}
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist; expected a checkpoint"):
        load_superblock(tmp_path / "none.pth", vit(), **arguments)
    with pytest.raises(IsADirectoryError, match=r"is a folder, not a file; expected a checkpoint"):
        load_superblock(tmp_path, vit(), **arguments)
    with pytest.raises(ValueError, match=r"holds no '\.scores': it is no SuperBlock checkpoint"):
        load_superblock(write({"model": vit().state_dict()}, tmp_path), vit(), **arguments)
    for content, kind in ((torch.zeros(3), "Tensor"), ([1, 2], "list"), ({"model": 3}, "int")):
        with pytest.raises(ValueError, match=rf"the checkpoint holds a {kind}; expected a state dict"):
            load_superblock(write(content, tmp_path), vit(), **arguments)
    for name in (f"{MLP[0]}.weight", f"{MLP[0]}.scores", f"{MLP[0]}.bias", "epoch"):
        with pytest.raises(ValueError, match=rf"holds {name}, a list; expected a state dict, which holds tensors only"):
            load_superblock(published().state_dict() | {name: [1.0]}, vit(), **arguments)
    with pytest.raises(ValueError, match=r"holds no '\.scores'"):
        load_superblock({0: torch.zeros(3)}, vit(), **arguments)


def test_scores_without_a_weight_and_nan_scores():
    state = published().state_dict()
    del state["heads.head.weight"]
    with pytest.raises(ValueError, match=r"holds heads\.head\.scores but no heads\.head\.weight; it is damaged"):
        load_superblock(state, vit(), sparsity=0.8, block_size=BLOCK)
    state = published().state_dict()
    state[f"{MLP[0]}.scores"][0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 32 mask scores are NaN"):
        load_superblock(state, vit(), sparsity=0.8, block_size=BLOCK)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"sparsity": 1.0}, ValueError),
        ({"sparsity": 80}, ValueError),
        ({"block_size": 0}, ValueError),
        ({"block_size": 8.0}, TypeError),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error, match="expected"):
        load_superblock(published().state_dict(), vit(), **{"sparsity": 0.8, "block_size": BLOCK} | arguments)


@pytest.mark.parametrize("apply_out_proj_masks", [False, True])
def test_masks_can_stay_to_be_trained_further_and_folded_later(images, apply_out_proj_masks):
    reference = published()
    with torch.no_grad():
        reference.get_submodule(MLP[0]).scale.fill_(0.5)
    arguments = {"sparsity": 0.8, "block_size": BLOCK, "apply_out_proj_masks": apply_out_proj_masks}
    folded = load_superblock(reference.state_dict(), vit(), **arguments)
    masked = load_superblock(reference.state_dict(), vit(), fold=False, **arguments)
    assert set(supermask_layers(masked)) == {*MLP, "heads.head", *(OUT_PROJ if apply_out_proj_masks else ())}
    assert type(masked.heads.head) is SupermaskLinear and not masked.training
    for name in MLP:
        assert torch.equal(masked.get_submodule(name).scores, reference.get_submodule(name).scores)
    with torch.no_grad():
        expected = folded(images)
        torch.testing.assert_close(masked(images), expected)
        assert torch.equal(blockvit.fold(masked)(images), masked(images))
    for name in (*MLP, *OUT_PROJ, "heads.head"):
        assert torch.equal(masked.get_submodule(name).weight, folded.get_submodule(name).weight), name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("sp0.80-ts32.pth", (0.8, 32)),
        ("/models/vit-sp.9-ts8-final.pth", (0.9, 8)),
        ("sp0.80/model_32.pth", None),
        ("sp80-ts32.pth", None),
    ],
)
def test_what_a_name_tells(name, found):
    assert superblock.read_name(name) == found


def test_the_layers_with_masks_and_those_left_out():
    state = superblock.read_superblock({"model": {f"module.{k}": t for k, t in published().state_dict().items()}})
    masked = superblock.masked_layers(state)
    assert set(masked) == {*MLP, *OUT_PROJ, "heads.head"}
    assert {name for name in masked if superblock.is_left_out(name)} == set(OUT_PROJ)
    assert not any(superblock.is_left_out(name, True) for name in masked)


def test_a_model_that_cannot_be_masked_keeps_its_weights(tmp_path):
    file = write({"model": published().state_dict()}, tmp_path, "sp0.80-ts8.pth")
    model = vit()
    model.get_submodule(MLP[0]).register_forward_hook(print)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="has hooks"):
        load_superblock(file, model, sparsity=0.8, block_size=BLOCK, fold=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
