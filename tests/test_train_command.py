"""The plain command, in one process; under a launcher see test_train_processes."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import tiny_data

import blockvit
from blockvit import data, models, train
from blockvit.attention import expose_projections
from blockvit.train import command
from blockvit.train.recipe import RECIPES

SMALL = ["--dataset", "digits", "--model", "vit_digits", "--device", "cpu", "--batch-size", "128"]
QUICK = [*SMALL, "--epochs", "2", "--lr_warmup_epochs=0"]  # either way to write an option


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """256 of them to train on."""
    whole = data.load("digits")
    few = command.data.DataSplits(
        whole.name,
        whole.source,
        command.data.ImageTensors(*whole.train[:256], whole.train.mean, whole.train.std),
        command.data.ImageTensors(*whole.test[:60], whole.test.mean, whole.test.std),
        whole.classes,
        whole.image_size,
    )
    monkeypatch.setattr(command.data, "load", lambda *args, **kwargs: few)
    return few


def run(*words):
    return command.main([str(word) for word in words])


def test_a_training_with_everything_that_it_writes(tmp_path, capsys, few_digits):
    assert run(*QUICK, "--sparsity", 0.8, "--block-size", 16, "--seed", 3, "--hflip", "true", "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    for line in ("source = scikit-learn load_digits", "training pictures = 256", "steps per epoch = 2", "lr = 0.001"):
        assert f"{line}\n" in printed
    for line in ("sparsity = 0.8", "hflip = True", "seed = 3", "processes = 1", "lr_warmup_epochs = 0"):
        assert f"{line}\n" in printed
    assert "epoch 2/2  loss" in printed

    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    history = torch.load(tmp_path / "checkpoint.pt")["history"]
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert [float(row["test_top1"]) for row in rows] == [epoch["test_top1"] for epoch in history]

    model = blockvit.load(tmp_path / "model.safetensors", backend="torch")
    metadata = blockvit.read_metadata(tmp_path / "model.safetensors")
    assert {layer["block_size"] for layer in metadata["layers"].values()} == {16}
    assert train.evaluate(model, few_digits.test)["top1"] == pytest.approx(history[-1]["test_top1"])


def test_a_dense_model_is_written_as_it_is(tmp_path, few_digits):
    assert run(*QUICK, "--output", tmp_path) == 0
    model = models.create("vit_digits")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    top1 = torch.load(tmp_path / "checkpoint.pt")["history"][-1]["test_top1"]
    assert train.evaluate(model, few_digits.test)["top1"] == pytest.approx(top1)


def test_masks_without_a_block_of_zeros_are_written_as_a_state_dict(tmp_path, few_digits):
    assert run(*QUICK, "--sparsity", 0, "--block-size", 16, "--output", tmp_path) == 0
    model = expose_projections(models.create("vit_digits"))
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    top1 = torch.load(tmp_path / "checkpoint.pt")["history"][-1]["test_top1"]
    assert train.evaluate(model, few_digits.test)["top1"] == pytest.approx(top1)


def test_resume_goes_on_and_without_it_nothing_is_overwritten(tmp_path, capsys):
    assert run(*QUICK, "--output", tmp_path) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert run(*QUICK, "--output", tmp_path) == 1
    assert "checkpoint.pt exists; pass --resume" in capsys.readouterr().err
    assert run(*QUICK, "--output", tmp_path, "--resume") == 0
    assert "epoch" not in capsys.readouterr().out.partition("seed = 0")[2]  # all were done
    assert run(*QUICK, "--output", tmp_path, "--resume", "--lr", 0.01) == 1
    assert "recipe: lr is 0.001 there and 0.01 here" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert run(*QUICK, "--output", tmp_path / "new", "--resume") == 0


def test_every_field_of_the_recipe_is_an_option_with_its_description(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    for field in RECIPES["imagenet"].__dataclass_fields__:
        assert f"--{field.replace('_', '-')} " in text
        assert command._attributes_of(train.Recipe)[field]
    assert "peak learning rate of AdamW" in text and "accelerate launch" in text


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--clip-grad-norm", "none"], "clip_grad_norm", None),
        (["--clip_grad_norm=0.5"], "clip_grad_norm", 0.5),
        (["--hflip", "True"], "hflip", True),
        (["--auto-augment", "ra"], "auto_augment", "ra"),
        (["--recipe", "cifar10"], "lr_min", 1e-5),
        ([], "lr_min", 0.0),
    ],
)
def test_a_field_is_read_by_its_type(words, field, value):
    args = command.parser().parse_args([command._dashed(word) for word in [*SMALL, "--output", "x", *words]])
    assert getattr(command._recipe(args), field) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "2x"], "argument --epochs: '2x'; expected int"),
        (["--amp", "ja"], "argument --amp: 'ja'; expected bool"),
        (["--scores-lr", "fast"], "'fast'; expected float or None"),
        (["--epochs", "none"], "'none'; expected int"),
        (["--lr", "-1"], "recipe: lr is -1.0; expected a positive number"),
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
    ],
)
def test_wrong_words_are_told_before_anything_is_read(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run(*SMALL, "--output", tmp_path / "x", *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_the_user_can_mend_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    assert run(*QUICK, "--output", tmp_path, "--model", "vit_digit") == 1
    assert "ValueError: unknown model 'vit_digit' (did you mean 'vit_digits'?)" in capsys.readouterr().err
    splits = tiny_data()
    monkeypatch.setattr(command.data, "load", lambda *args, **kwargs: splits)
    assert run(*QUICK, "--output", tmp_path) == 1
    assert "fewer than one batch of 128" in capsys.readouterr().err


def test_python_m(tmp_path):
    words = [sys.executable, "-m", "blockvit.train", *QUICK, "--lr", "nan", "--output", str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent / "lib")
    assert result.returncode == 2
    assert "recipe: lr is nan" in result.stderr
