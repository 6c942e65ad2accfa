from __future__ import annotations

import json
import os
import stat
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import blockvit
from blockvit import BlockSparseLinear, architecture, load, read_metadata, save
from blockvit.kernels import cpu, cpu_attention
from blockvit.patches import PatchEmbedding

VIT = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
BLOCK = 8


def vit(**arguments) -> nn.Module:
    model = torchvision.models.VisionTransformer(**VIT | {"num_classes": 10} | arguments)
    for parameter in model.parameters():  # torchvision starts the head at zero, which would hide every difference
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def sparse_vit(**arguments) -> nn.Module:
    model = blockvit.sparsify(vit(**arguments), 0.6, BLOCK, targets=("mlp", "qkv", "out_proj", "head"))
    return blockvit.to_block_sparse(blockvit.fold(model), BLOCK)


def test_a_head_that_was_replaced_is_saved_with_its_own_classes(tmp_path):
    model = vit()
    model.heads.head = nn.Linear(32, 7)
    assert model.num_classes == 10
    blockvit.to_block_sparse(blockvit.fold(blockvit.sparsify(model, 0.6, BLOCK, targets="mlp")), BLOCK)
    save(model, tmp_path / "model.safetensors")
    loaded, x = load(tmp_path / "model.safetensors"), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x)) and loaded(x).shape == (2, 7)
    model.heads = nn.Linear(32, 7)  # no longer what torchvision builds
    save(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="pass"):
        load(tmp_path / "other.safetensors")


class Mlp(nn.Module):
    """Not a VisionTransformer: to load it, a model has to be given."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 10, bias=False))
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x):
        return self.norm(self.layers(x))


def sparse_mlp() -> nn.Module:
    model = blockvit.fold(blockvit.sparsify(Mlp(), 0.5, BLOCK, targets="layers"))
    model(torch.randn(8, 16))  # running statistics that differ from their start
    return blockvit.to_block_sparse(model, BLOCK).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "model.safetensors"


# --- save and load ---------------------------------------------------------------------------------------------------


def test_a_vision_transformer_is_built_from_the_file_alone(path, images):
    model = sparse_vit(dropout=0.1)
    assert save(model, path) == path
    loaded = load(path)
    assert type(loaded) is torchvision.models.VisionTransformer
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert isinstance(loaded.encoder.layers[0].mlp[0], BlockSparseLinear)
    assert loaded.encoder.layers[0].mlp[0].activation == "gelu"
    assert loaded.encoder.layers[0].mlp[2].p == 0.1
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("backend", ["dense", "gather"])
def test_the_backend_is_chosen_when_loading(path, images, backend):
    model = sparse_vit()
    loaded = load(save(model, path), backend=backend)
    assert loaded.heads.head.backend.name == backend
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), atol=1e-4, rtol=1e-4)


def test_another_model_loads_into_a_dense_one(path):
    model = sparse_mlp()
    save(model, path)
    target = Mlp()
    assert load(path, target) is target
    x = torch.randn(4, 16)
    assert torch.equal(target(x), model(x))
    assert target.layers[2].bias is None
    assert not target.training


def test_another_model_cannot_be_built_from_the_file_alone(path):
    save(sparse_mlp(), path)
    with pytest.raises(ValueError, match=r"holds a Mlp, which cannot be built.*blockvit\.load\(path, model\)"):
        load(path)


def relu(model):
    for layer in model.encoder.layers:
        layer.mlp[1] = nn.ReLU()


def another_epsilon(model):
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 0.1


CHANGES = {
    "activation": relu,
    "GELU": lambda model: setattr(model.encoder.layers[0].mlp[1], "approximate", "tanh"),
    "head": lambda model: setattr(model, "heads", nn.Sequential(OrderedDict(act=nn.Tanh(), head=model.heads.head))),
    "epsilon": another_epsilon,
    "forward": lambda model: setattr(model, "forward", lambda x: model.heads(model._process_input(x).mean(1))),
    "hook": lambda model: model.encoder.layers[1].register_forward_hook(lambda module, args, y: -y),
    "norm left out": lambda model: setattr(model.encoder.layers[0], "ln_2", nn.Identity()),
    "more": lambda model: setattr(model.encoder.layers[1], "scale", nn.Identity()),
    "channels": lambda model: setattr(model, "conv_proj", nn.Conv2d(1, 32, 4, 4)),
    "bias": lambda model: setattr(model.encoder.layers[1].mlp, "3", nn.Linear(64, 32, bias=False)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_vision_transformer_is_not_built_anew_as_the_stock_one(path, change):
    model = vit()
    change(model)
    blockvit.to_block_sparse(blockvit.fold(blockvit.sparsify(model, 0.6, BLOCK, targets="out_proj")), BLOCK)
    save(model, path)
    with pytest.raises(ValueError, match=r"holds a VisionTransformer, which cannot be built from the file alone"):
        load(path)


@pytest.mark.parametrize(
    "build",
    [lambda: sparse_vit(norm_layer=partial(nn.LayerNorm, eps=0.1)), lambda: sparse_mlp()],
    ids=["norm", "other class"],
)
def test_no_architecture_is_recorded_that_would_be_built_wrongly(build):
    assert architecture.arguments_of(build()) is None


@pytest.mark.parametrize("how", [{}, {"fuse_gelu": False}, {"fuse_mlp": True}, {"dense_backend": "gather"}], ids=str)
def test_what_conversion_changes_is_built_anew(path, images, how):
    model = blockvit.fold(blockvit.sparsify(vit(representation_size=16), 0.6, BLOCK, targets=("mlp", "head")))
    save(blockvit.to_block_sparse(model, BLOCK, **how), path)
    with torch.no_grad():
        torch.testing.assert_close(load(path)(images), model(images))


def test_another_gelu_is_built_anew_where_a_layer_applies_it(path, images):
    model = vit()
    for layer in model.encoder.layers:
        layer.mlp[1].approximate = "tanh"
    blockvit.to_block_sparse(blockvit.fold(blockvit.sparsify(model, 0.6, BLOCK, targets="mlp")), BLOCK)
    with torch.no_grad():
        torch.testing.assert_close(load(save(model, path))(images), model(images))


def test_an_attention_that_was_left_as_it_is_comes_back_so(path, images):
    model = vit()
    hook = model.encoder.layers[0].self_attention.register_forward_hook(lambda *_: None)
    blockvit.to_block_sparse(blockvit.fold(blockvit.sparsify(model, 0.6, BLOCK, targets=("mlp", "qkv"))), BLOCK)
    hook.remove()
    save(model, path)
    for loaded in (load(path), load(path, vit())):
        kinds = [type(layer.self_attention) for layer in loaded.encoder.layers]
        assert kinds == [nn.MultiheadAttention, blockvit.MultiheadAttention]
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images))


def test_an_older_file_says_of_attention_only_whether_all_of_it_was_replaced(path, images):
    model = sparse_vit()
    rewrite(save(model, path), lambda metadata: metadata.update(attention=True))
    with torch.no_grad():
        assert torch.equal(load(path)(images), model(images))


def rewrite(path: Path, change) -> None:
    """Write the file anew with other metadata."""
    tensors, metadata = safetensors.torch.load_file(path), read_metadata(path)
    change(metadata)
    safetensors.torch.save_file(tensors, path, metadata={"blockvit": json.dumps(metadata)})


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "average": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_wraps_a_model_is_not_saved_and_stays_where_it_is_loaded(path, wrap):
    model, x = sparse_mlp(), torch.randn(3, 16)
    save(wrap(model), path)
    assert read_metadata(path)["model"] == "Mlp" and "layers.0" in read_metadata(path)["layers"]
    torch.testing.assert_close(load(path, Mlp())(x), model(x))
    wrapped = wrap(Mlp())
    assert load(path, wrapped) is wrapped and not wrapped.training
    torch.testing.assert_close(wrapped(x), model(x))


class WithIdentities(nn.Module):
    """What a model may leave out, and how its head may be none."""

    def __init__(self, activation=nn.GELU, norm=nn.Identity, drop=nn.Identity, head=nn.Identity):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 32), activation(), nn.Linear(32, 16))
        self.norm, self.drop, self.head = norm(), drop(), head()

    def forward(self, x):
        return self.head(self.drop(self.mlp(self.norm(x))))


def test_identities_are_put_where_a_gelu_was_fused_and_nowhere_else(path):
    model, x = WithIdentities(), torch.randn(3, 16)
    blockvit.to_block_sparse(blockvit.fold(blockvit.sparsify(model, 0.5, BLOCK, targets="mlp")), BLOCK)
    save(model.eval(), path)
    same = load(path, WithIdentities(drop=lambda: nn.Dropout(0.5)))
    assert type(same.mlp[1]) is nn.Identity and type(same.drop) is nn.Dropout
    torch.testing.assert_close(same(x), model(x))
    assert type(load(path, WithIdentities(activation=nn.Identity)).mlp[1]) is nn.Identity
    for other, message in {
        "head": r"missing from the file: head\.weight",
        "norm": r"missing from the file: norm\.weight",
        "activation": r"mlp\.1 is an nn\.GELU that the layer before it applies in the file, ReLU\(\) in the model",
    }.items():
        kinds = {"head": lambda: nn.Linear(16, 5), "norm": lambda: nn.LayerNorm(16), "activation": nn.ReLU}
        target = WithIdentities(**{other: kinds[other]})
        before = dict(target.named_modules())
        with pytest.raises(ValueError, match=message):
            load(path, target)
        assert dict(target.named_modules()) == before


def test_biases_are_as_frozen_as_they_were_in_the_model(path):
    save(with_patches_on_a_kernel(), path)
    loaded = load(path, vit().requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.requires_grad for parameter in load(path, vit()).parameters())


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Mlp()
        self.register_buffer("places", torch.arange(16.0), persistent=False)

    def forward(self, x):
        return self.mlp(x + self.places)


def test_a_model_without_memory_whose_buffers_are_in_no_file_is_refused(path):
    model, x = Positions().eval(), torch.randn(3, 16)
    blockvit.to_block_sparse(blockvit.fold(blockvit.sparsify(model, 0.5, BLOCK, targets="layers")), BLOCK)
    save(model, path)
    with torch.device("meta"):
        empty = Positions()
    with pytest.raises(ValueError, match=r"its buffers places are in no file .* make the model on the CPU"):
        load(path, empty)
    torch.testing.assert_close(load(path, Positions())(x), model(x))


def test_only_some_layers_sparse_and_attention_untouched(path, images):
    model = blockvit.fold(blockvit.sparsify(vit(), 0.6, BLOCK, targets="head"))
    blockvit.to_block_sparse(model, BLOCK)
    with torch.no_grad():
        assert torch.equal(load(save(model, path))(images), model(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_comes_back_in_it(path, images, dtype):
    model = sparse_vit().to(dtype)
    loaded = load(save(model, path))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(loaded(images.to(dtype)), model(images.to(dtype)))


def test_tied_layers_load_into_a_tied_and_into_an_untied_model(path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        model.append(model[0])
        return model

    model = blockvit.fold(blockvit.sparsify(tied(), 0.5, BLOCK, targets="*"))
    x = torch.randn(3, 16)
    expected = blockvit.to_block_sparse(model, BLOCK)(x)
    save(model, path)
    loaded = load(path, tied())
    assert loaded[0] is loaded[2]
    assert torch.equal(loaded(x), expected)
    untied = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    assert torch.equal(load(path, untied)(x), expected)


def test_saving_leaves_the_model_as_it_was(path, images):
    model = sparse_vit()
    with torch.no_grad():
        expected = model(images)
        save(model, path)
        assert torch.equal(model(images), expected)


def test_metadata(path):
    save(sparse_vit(), path)
    metadata = read_metadata(path)
    assert metadata["model"] == "VisionTransformer"
    assert metadata["versions"]["torch"] == torch.__version__
    assert metadata["source_sha256"] is None
    head = metadata["layers"]["heads.head"]
    assert head == {"shape": [10, 32], "block_size": BLOCK, "sparsity": 0.5, "activation": None}
    mlp = metadata["layers"]["encoder.layers.encoder_layer_0.mlp.0"]
    assert mlp["activation"] == "gelu"
    assert mlp["sparsity"] == pytest.approx(round(0.6 * 31) / 32, abs=1e-6)


def test_the_file_is_smaller_than_the_dense_weights_and_no_pickle(path):
    model = blockvit.fold(blockvit.sparsify(nn.Sequential(nn.Linear(512, 512)), 0.9, 32, targets="*"))
    save(blockvit.to_block_sparse(model, 32), path)
    assert path.stat().st_size < 0.12 * 512 * 512 * 4
    assert set(safetensors.torch.load_file(path)) == {"0.crow_indices", "0.col_indices", "0.values", "0.bias"}


def test_a_model_without_block_sparse_layers():
    with pytest.raises(ValueError, match=r"no block-sparse layers; call blockvit\.to_block_sparse\(model\) before"):
        save(vit(), "unused.safetensors")


def test_source_hash_tells_another_source(path, tmp_path):
    source = tmp_path / "dense.pth"
    source.write_bytes(b"weights")
    save(sparse_vit(), path, source=source)
    assert len(read_metadata(path)["source_sha256"]) == 64
    load(path, source=source)
    source.write_bytes(b"other weights")
    with pytest.raises(
        ValueError, match=r"made from another source \(sha256 [0-9a-f]{64}\).*convert and save the model"
    ):
        load(path, source=source)


def test_source_hash_of_a_state_dict_depends_on_names_shapes_dtypes_and_values(path):
    state = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    save(sparse_vit(), path, source=state)
    load(path, source=dict(reversed(state.items())))
    for other in (
        {**state, "a": torch.arange(6.0).view(2, 3)},
        {**state, "a": torch.arange(1.0, 7.0)},
        {**state, "b": torch.ones(2, dtype=torch.float16)},
        {"a": state["a"], "c": state["b"]},
    ):
        with pytest.raises(ValueError, match="another source"):
            load(path, source=other)


# --- files that are not what they should be --------------------------------------------------------------------------


def test_missing_file(tmp_path):
    for function in (load, read_metadata):
        with pytest.raises(
            FileNotFoundError, match=r"nothing\.safetensors does not exist; write it with blockvit\.save"
        ):
            function(tmp_path / "nothing.safetensors")
        with pytest.raises(IsADirectoryError, match=r"is a folder, not a file; write it with blockvit\.save"):
            function(tmp_path)


@pytest.mark.parametrize("fraction", [0, 0.001, 0.5, 0.999])
def test_truncated_file(path, fraction):
    save(sparse_vit(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file .*again"):
        load(path)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"foreign\.safetensors was not written by blockvit\.save"):
            load(path)


def test_format_of_another_version(tmp_path):
    path = tmp_path / "future.safetensors"
    header = {"blockvit": json.dumps({"format": 99})}
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata=header)
    with pytest.raises(ValueError, match=r"has format 99; this version reads format 1: convert the model again"):
        load(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: vit(num_classes=11), r"heads\.head is \(10, 32\) in the file, \(11, 32\) in the model"),
        (
            lambda: vit(hidden_dim=64),
            r"another architecture than VisionTransformer: .* \(96, 32\) in the file, \(192, 64\) in",
        ),
        (lambda: vit(num_layers=3), r"missing from the file: encoder\.layers\.encoder_layer_2"),
        (lambda: vit(num_layers=1), r"cannot take"),
        (lambda: vit(num_layers=0), r"cannot take"),
        (lambda: Mlp(), r"holds a VisionTransformer that Mlp cannot take"),
    ],
    ids=["classes", "width", "more layers", "fewer layers", "no layers", "other class"],
)
def test_another_architecture(path, other, message):
    save(sparse_vit(), path)
    model = other()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        load(path, model)
    assert dict(model.named_modules()) == before


# --- atomic ----------------------------------------------------------------------------------------------------------


def test_a_failure_while_writing_leaves_the_old_file(path, images, monkeypatch):
    old = sparse_vit()
    save(old, path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(sparse_vit(), path)
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nor is anything else left behind
    with torch.no_grad():
        assert torch.equal(load(path)(images), old(images))


def test_saving_again_replaces_the_file(path, images):
    save(sparse_vit(), path)
    new = sparse_vit()
    save(new, path)
    with torch.no_grad():
        assert torch.equal(load(path)(images), new(images))


def test_a_saved_file_has_the_permissions_of_any_new_file(path, tmp_path):
    save(sparse_mlp(), path)
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.gpu
def test_loading_into_a_model_on_the_gpu(path, images):
    model = sparse_vit()
    loaded = load(save(model, path), vit().cuda())
    assert {t.device.type for t in loaded.state_dict().values()} == {"cuda"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(images.cuda()).cpu(), model(images), atol=1e-2, rtol=1e-2)


# --- what holds no zeros ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(cpu.load() is not None, reason="the CPU kernel could not be built")
@pytest.mark.parametrize("faster", [True, False])
def test_what_dense_backend_placed_comes_back_where_it_is_faster_here(path, images, faster, monkeypatch):
    """Not on the backend "dense", as it once did: a loaded model is to be as fast as the one that was saved."""
    model = blockvit.sparsify(vit(), 0.6, BLOCK, targets="mlp")
    model = blockvit.to_block_sparse(blockvit.fold(model), BLOCK, dense_backend="cpu")
    save(model, path)
    monkeypatch.setattr(cpu, "beats_dense", lambda shape, dtype, block_size: faster)
    for loaded in (load(path), load(path, vit())):
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), model(images))
        attention = loaded.encoder.layers[1].self_attention
        assert attention.kernel == "cpu"
        placed = (attention.qkv, attention.out_proj, loaded.heads.head, loaded.conv_proj.linear)
        assert {layer.backend.name for layer in placed} == {"cpu" if faster else "dense"}
        assert loaded.encoder.layers[1].mlp[0].backend.name == "cpu"
    assert load(path, backend="gather").encoder.layers[1].self_attention.kernel == "torch"
    assert load(path, backend="cpu").encoder.layers[1].self_attention.kernel == "cpu"


def test_another_backend_than_auto_measures_nothing_when_loading(path, monkeypatch):
    save(with_patches_on_a_kernel(), path)
    monkeypatch.setattr(cpu, "load", lambda: pytest.fail("the kernel is not asked for"))
    assert load(path, backend="gather").heads.head.backend.name == "gather"


def test_the_wish_for_attentions_kernel_outlasts_a_machine_without_it(path, images, monkeypatch):
    model = sparse_vit()
    model.encoder.layers[0].self_attention.use_kernel("auto")
    save(model, path)
    monkeypatch.setattr(cpu_attention, "_is_loaded", lambda: False)
    loaded = load(path)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model(images))
    save(loaded, path)
    assert [layer.self_attention.kernel for layer in load(path).encoder.layers] == ["auto", "torch"]


# --- patch embeddings ------------------------------------------------------------------------------------------------


def with_patches_on_a_kernel(**arguments) -> nn.Module:
    return blockvit.to_block_sparse(vit(**arguments), BLOCK, dense_backend="gather")


def test_a_patch_embedding_on_a_kernel_comes_back(path, images):
    model = with_patches_on_a_kernel()
    save(model, path)
    assert read_metadata(path)["patch_embeddings"] == {"conv_proj": [3, 4]}
    for loaded in (load(path), load(path, vit())):
        assert isinstance(loaded.conv_proj, PatchEmbedding)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), model(images))


def test_a_file_without_an_entry_for_patch_embeddings_loads(path, images):
    model = sparse_vit()
    rewrite(save(model, path), lambda metadata: metadata.pop("patch_embeddings"))
    torch.testing.assert_close(load(path)(images), model(images))


def test_patches_of_another_size_are_an_error(path):
    save(with_patches_on_a_kernel(), path)
    with pytest.raises(ValueError, match=r"conv_proj embeds patches by \(32, 3, 4, 4\) in the file, \(32, 3, 8, 8\)"):
        load(path, vit(patch_size=8))


def test_a_model_without_memory_takes_the_files_tensors(path):
    model = blockvit.to_block_sparse(blockvit.fold(blockvit.sparsify(Mlp(), 0.5, BLOCK, targets="layers.0")), BLOCK)
    save(model.eval(), path)
    with torch.device("meta"):
        empty = Mlp()
    loaded, x = load(path, empty), torch.randn(3, 16)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    torch.testing.assert_close(loaded(x), model(x))
    half = Mlp()
    half.norm.to("meta")
    with pytest.raises(ValueError, match=r"part of Mlp is on the meta device; call model\.to_empty"):
        load(path, half)


DAMAGE = ("no JSON", "no layers", "no attention", "no source_sha256", "no identities", "no values", "int64 indices")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_contents_are_told_with_the_file(path, damage):
    save(sparse_mlp(), path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["blockvit"])
    metadata.pop(damage.removeprefix("no "), None)
    if damage == "no values":
        del tensors["layers.0.values"]
    if damage == "int64 indices":
        tensors["layers.0.col_indices"] = tensors["layers.0.col_indices"].long()
    text = "{" if damage == "no JSON" else json.dumps(metadata)
    safetensors.torch.save_file(tensors, path, metadata={"blockvit": text})
    message = "col_indices are torch.int64" if damage == "int64 indices" else rf"{path}.*damaged"
    with pytest.raises(ValueError, match=message):
        load(path, Mlp(), source={} if damage == "no source_sha256" else None)


class Extra(nn.Identity):
    def get_extra_state(self):
        return {"k": 5}


def test_state_that_is_no_tensor_is_told_of(path):
    model = sparse_mlp()
    model.norm = Extra()
    with pytest.warns(UserWarning, match=r"not saved, because it is no tensor: norm\._extra_state"):
        save(model, path)


def test_loading_packs_each_layer_once(path, monkeypatch):
    model = sparse_vit()
    save(model, path)
    packed, pack = [], BlockSparseLinear._pack
    monkeypatch.setattr(BlockSparseLinear, "_pack", lambda self: packed.append(self) or pack(self))
    loaded = load(path)
    layers = [module for module in loaded.modules() if isinstance(module, BlockSparseLinear)]
    assert len(packed) == len(layers) > 1
    packed.clear()
    loaded.load_state_dict({"class_token": loaded.class_token.detach().clone()}, strict=False)
    assert packed == [], "nothing of their weights was given"


def test_a_vision_transformer_whose_attention_drops_is_not_the_stock_one(path):
    model = sparse_vit()
    model.encoder.layers[0].self_attention.dropout = 0.2
    save(model, path)
    with pytest.raises(ValueError):
        load(path)
