"""A published checkpoint from file to accuracy, on a small ViT's made here and a small folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from superblock_reference import published, write
from torch import nn

from blockvit import checkout, data, models, notebook, pipeline, results
from blockvit import published as command
from blockvit.convert import to_block_sparse
from blockvit.published import APPLIED, LEFT_OUT, RECIPE, PublishedCheckpoint, evaluate

STATS = data.sets.IMAGENET_MEAN, data.sets.IMAGENET_STD
MODEL, CLASSES, BLOCK, SPARSITY = "vit_digits", ["cat", "dog", "eel"], 16, 0.8


PIXELS = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
IMAGES = data.normalize(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), *STATS)


def reference(num_classes: int = len(CLASSES)) -> nn.Module:
    """A masked ViT that finds each class in some of ``IMAGES``."""
    torch.manual_seed(3)
    model = models.create(MODEL, num_classes=num_classes)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts the head at zero, which would hide every difference
    model = published(model, SPARSITY, BLOCK)
    with torch.no_grad():
        model.heads.head.bias -= model(IMAGES).mean(0)
    return model


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A checkpoint, and images that lie in the folder of the class that it finds in them: it is right about all."""
    folder = tmp_path_factory.mktemp("study")
    model = reference()
    write({"model": model.state_dict(), "epoch": 299}, folder, "sp0.80-ts16.pth")
    with torch.no_grad():
        labels = model(IMAGES).argmax(1).tolist()
    assert set(labels) == {0, 1, 2}
    for number, (image, label) in enumerate(zip(PIXELS, labels, strict=True)):
        where = folder / "val" / CLASSES[label]
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(where / f"{number:02}.png")
    return folder


def checkpoint(study: Path, **how) -> PublishedCheckpoint:
    return PublishedCheckpoint.open(study / "sp0.80-ts16.pth", model=MODEL, **how)


EXACT = {"num_workers": 0, "val_resize_size": 8}  # images as they are


def test_the_published_accuracy_before_and_after_conversion(study):
    found = evaluate(checkpoint(study), study, backend="gather", **EXACT)
    assert found.top1 == {"folded": 100.0, "gather": 100.0}
    assert (found.images, found.damaged) == (60, 0)


def test_it_is_the_converted_model_whose_accuracy_stands_beside_the_folded_ones(study, monkeypatch):
    def convert_badly(model, block_size, backend):
        with torch.no_grad():
            model.heads.head.bias[0] += 1000  # it calls every image a cat
        return to_block_sparse(model, block_size, backend)

    monkeypatch.setattr(command, "to_block_sparse", convert_badly)
    found = evaluate(checkpoint(study), study, backend="gather", **EXACT)
    assert found.top1["folded"] == 100
    assert found.top1["gather"] == pytest.approx(100 * len(list((study / "val" / "cat").iterdir())) / 60)


def test_out_proj_masks_are_left_out_and_the_table_of_layers_says_so(study):
    layers = evaluate(checkpoint(study), study, backend="gather", **EXACT).layers.set_index("name")
    out_proj = layers[layers.index.str.endswith("out_proj")]
    assert len(out_proj) == 4
    assert set(out_proj["mask"]) == {LEFT_OUT} and set(out_proj["fate"]) == {"dense"}
    assert "no 16x16 block is all zero" in out_proj["reason"].iloc[0]
    masked = layers[layers.index.str.contains(r"mlp|heads")]
    assert set(masked["mask"]) == {APPLIED} and set(masked["fate"]) == {"converted", "padded"}
    assert set(layers.loc[layers.index.str.contains("qkv|conv_proj"), "mask"]) == {""}


def test_applying_them_all_the_same_is_another_model(study):
    """Which is why they are left out: the accuracy that was published is not that of this one."""
    applied = checkpoint(study, apply_out_proj_masks=True)
    found = evaluate(applied, study, backend="gather", **EXACT)
    layers = found.layers.set_index("name")
    assert set(layers.loc[layers.index.str.endswith("out_proj"), "mask"]) == {APPLIED}
    assert found.top1["folded"] < 100
    assert (checkpoint(study).key()["scope"], applied.key()["scope"]) == ("mlp+head", "mlp+out_proj+head")


def test_rows_say_what_was_evaluated_and_how(study, tmp_path):
    opened = checkpoint(study)
    store = results.Store(tmp_path)
    store.append(evaluate(opened, study, backend="gather", **EXACT).rows(opened, "cpu"))
    rows = store.read("accuracy")
    top1 = rows[rows["metric"] == "top1"]
    assert sorted(zip(top1["backend"], top1["value"], strict=True)) == [("folded", 100.0), ("gather", 100.0)]
    assert set(rows["recipe"]) == {RECIPE} and set(rows["model"]) == {MODEL} and set(rows["dataset"]) == {"imagenet"}
    assert set(rows["block_size"]) == {16} and set(rows["sparsity"]) == {0.8} and rows["group"].nunique() == 1
    assert rows.loc[rows["metric"] == "images", "value"].tolist() == [60]


def test_masks_can_be_kept_for_the_comparison_with_the_folded_model(study):
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = reference()(images)
        torch.testing.assert_close(checkpoint(study).load(3, fold=False)(images), expected)
        torch.testing.assert_close(checkpoint(study).load(3)(images), expected)


def test_a_damaged_image_is_not_counted(study, tmp_path):
    copy = tmp_path / "images"
    for path in (study / "val").glob("*/*.png"):
        (copy / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / "val" / path.parent.name / path.name).symlink_to(path)
    (copy / "val" / "cat" / "zz.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 of 61 images cannot be decoded; .*val/cat/zz\.png"):
        found = evaluate(checkpoint(study), copy, backend="gather", **EXACT)
    assert (found.images, found.damaged, found.top1["folded"]) == (60, 1, 100.0)


@pytest.mark.parametrize(
    ("name", "given", "known"),
    [
        ("sp0.80-ts16.pth", {}, (0.8, 16)),
        ("sp0.80-ts16.pth", {"sparsity": 0.5}, (0.5, 16)),
        ("sp0.80-ts16.pth", {"sparsity": 0.5, "block_size": 8}, (0.5, 8)),
        ("model_32.pth", {"sparsity": 0.8, "block_size": 16}, (0.8, 16)),
        ("model_32.pth", {"sparsity": 0.8}, None),
        ("model_32.pth", {}, None),
    ],
)
def test_sparsity_and_block_size_are_the_names_unless_given(tmp_path, name, given, known):
    (tmp_path / name).touch()
    if known:
        opened = PublishedCheckpoint.open(tmp_path / name, **given)
        assert (opened.sparsity, opened.block_size) == known
        assert opened.name == f"vit_b_16-published-bs{known[1]}-sp{known[0]:.2f}"
    else:
        with pytest.raises(ValueError, match=r"model_32\.pth does not tell .*: --sparsity 0\.8 --block-size 32"):
            PublishedCheckpoint.open(tmp_path / name, **given)


def test_what_is_given_wins_over_the_name_and_a_wrong_block_size_is_found(study):
    with pytest.raises(
        ValueError, match=r"scores have shape \(8, 8\), .* in blocks of 32 .*trained with another block_size"
    ):
        evaluate(checkpoint(study, block_size=32), study, **EXACT)
    wrong = evaluate(checkpoint(study, sparsity=0.95), study, backend="gather", **EXACT)
    assert wrong.top1["folded"] < 100


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sp0\.80-ts32\.pth does not exist; expected a checkpoint named like"):
        PublishedCheckpoint.open(tmp_path / "sp0.80-ts32.pth")
    (tmp_path / "sp0.80-ts32.pth").mkdir()
    with pytest.raises(IsADirectoryError, match=r"ts32\.pth is a folder, not a file; expected a checkpoint named like"):
        PublishedCheckpoint.open(tmp_path / "sp0.80-ts32.pth")


def test_other_classes_than_the_folders(study, tmp_path):
    path = write({"model": reference(1000).state_dict()}, tmp_path, "sp0.80-ts16.pth")
    with pytest.raises(ValueError, match=r"ts16\.pth was trained on 1000 classes, but there are 3 to evaluate on"):
        evaluate(PublishedCheckpoint.open(path, model=MODEL), study, **EXACT)


def test_another_architecture(study):
    other = PublishedCheckpoint.open(study / "sp0.80-ts16.pth", model="vit_cifar")
    with pytest.raises(ValueError, match=r"of another architecture than VisionTransformer:\n.*missing from the file"):
        evaluate(other, study, num_workers=0)
    with pytest.raises(ValueError, match=r"unknown model 'vit_b16'.*did you mean 'vit_b_16'"):
        evaluate(PublishedCheckpoint.open(study / "sp0.80-ts16.pth", model="vit_b16"), study)


@pytest.mark.parametrize("fraction", [0, 0.5, 0.99])
def test_a_damaged_file(study, tmp_path, fraction):
    whole = (study / "sp0.80-ts16.pth").read_bytes()
    path = tmp_path / "sp0.80-ts16.pth"
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(ValueError, match=r"sp0\.80-ts16\.pth is truncated or damaged .*fetch or save it again"):
        evaluate(PublishedCheckpoint.open(path, model=MODEL), study, **EXACT)


def test_a_dense_checkpoint(study, tmp_path):
    path = write({"model": models.create(MODEL, num_classes=3).state_dict()}, tmp_path, "sp0.80-ts16.pth")
    with pytest.raises(ValueError, match="it is no SuperBlock checkpoint"):
        evaluate(PublishedCheckpoint.open(path, model=MODEL), study, **EXACT)


def test_the_command(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BLOCKVIT_RESULTS", str(tmp_path))
    arguments = [str(study / "sp0.80-ts16.pth"), "--data", str(study), "--model", MODEL, "--num-workers", "2"]
    assert command.main([*arguments, "--backend", "gather", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "vit_digits-published-bs16-sp0.80, gather:" in output and "of 60 images" in output
    assert output.count(LEFT_OUT) == 4
    assert len(results.Store(tmp_path).read("accuracy")) == 3
    for wrong, message in (
        (["--backend", "gahter"], "backend is 'gahter'; expected 'auto' or one of"),
        (["--data", str(study / "none")], "none does not exist"),
        (["--block-size", "32"], "another block_size"),
    ):
        assert command.main([*arguments, "--device", "cpu", *wrong]) == 1
        assert message in capsys.readouterr().err
    assert len(results.Store(tmp_path).read("accuracy")) == 3


def test_where_results_go_is_known_before_anything_is_evaluated(study, monkeypatch, capsys):
    def nowhere():
        raise FileNotFoundError("no clone of BlockViT here; set BLOCKVIT_RESULTS")

    monkeypatch.setattr(results, "Store", nowhere)
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    assert command.main([str(study / "sp0.80-ts16.pth"), "--data", str(study), "--model", MODEL]) == 1
    assert capsys.readouterr().err == "error: no clone of BlockViT here; set BLOCKVIT_RESULTS\n"


@pytest.mark.slow
def test_notebook_2_takes_it_in_place_of_a_trained_model(study, tmp_path):
    """As ``make reproduce CHECKPOINT=...`` runs it: the only notebook, with nothing trained before it."""
    home = checkout.root()
    notebooks = pipeline.find_notebooks(home / "notebooks")
    assert [each.name for each in notebooks if "checkpoint" in each.defaults] == ["02_fold"]
    fold = next(each for each in notebooks if each.name == "02_fold")
    values = {
        "checkpoint": str(study / "sp0.80-ts16.pth"),
        "data_root": str(study),
        "dataset": "imagenet",
        "model": MODEL,
        "large_model": MODEL,
        "large_block_size": 16,
    }
    environment = {f"BLOCKVIT_{name}": str(tmp_path / name.lower()) for name in ("RESULTS", "FIGURES", "CACHE")}
    environment |= {"BLOCKVIT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    notebook.execute(fold, values, tmp_path / "02_fold.ipynb", environment=environment)
    assert not (tmp_path / "cache" / "checkpoints").exists(), "nothing was trained"
    text = (tmp_path / "02_fold.ipynb").read_text()
    assert "vit_digits-published-bs16-sp0.80: " in text and "of 60 images" in text and LEFT_OUT in text
    store = results.Store(tmp_path / "results")
    assert set(store.read("accuracy")["recipe"]) == {RECIPE}
    folded = store.read("conversion").set_index("metric")
    assert folded.loc["fold_difference", "recipe"] == RECIPE and folded.loc["fold_difference", "value"] == 0
