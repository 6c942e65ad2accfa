"""The plain command, in one process; under a launcher see test_train_processes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from test_train import tiny_data

import blockvit
from blockvit import data, models, train
from blockvit.train import command, weights
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
    for line in ("source = scikit-learn load_digits", "training images = 256", "steps per epoch = 2", "lr = 0.001"):
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
    model = models.create("vit_digits")  # as its attention was before it was replaced
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    top1 = torch.load(tmp_path / "checkpoint.pt")["history"][-1]["test_top1"]
    assert train.evaluate(model, few_digits.test)["top1"] == pytest.approx(top1)
    assert run(*QUICK, "--weights", tmp_path / "model.safetensors", "--output", tmp_path / "next") == 0


def test_a_block_sparse_model_is_no_weights_to_begin_with(tmp_path, capsys):
    assert run(*QUICK, "--sparsity", 0.5, "--block-size", 16, "--output", tmp_path) == 0
    assert run(*QUICK, "--weights", tmp_path / "model.safetensors", "--output", tmp_path / "next") == 1
    message = "model.safetensors is a block-sparse model, for blockvit.load, and a training begins with dense weights"
    assert message in capsys.readouterr().err


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_trained_model_is_made_sparse_and_teaches(tmp_path, suffix, capsys):
    torch.manual_seed(7)
    trained = models.create("vit_digits")
    torch.nn.init.normal_(trained.heads.head.weight)  # a new one is zero, to which the smallest step adds
    file = tmp_path / f"trained{suffix}"
    if suffix == ".pth":  # as torchvision's reference writes it
        torch.save({"model": {f"module.{name}": tensor for name, tensor in weights_of(trained).items()}}, file)
    else:
        save_file(weights_of(trained), file)
    # A learning rate that changes nothing shows what the training began with.
    still = ["--lr", "1e-20", "--weight-decay", 0, "--sparsity", 0.5, "--targets", "mlp", "--weights", file]
    how = [*still, "--scores", "magnitude", "--distillation-alpha", 0.5]
    assert run(*QUICK, *how, "--output", tmp_path / "run") == 0
    found = torch.load(tmp_path / "run/checkpoint.pt")["state"]["model"]
    assert torch.equal(found["heads.head.weight"], trained.heads.head.weight)
    assert torch.equal(found["encoder.layers.encoder_layer_0.mlp.0.weight"], trained.encoder.layers[0].mlp[0].weight)
    capsys.readouterr()
    assert run(*QUICK, "--distillation-alpha", 0.5, "--output", tmp_path / "untaught") == 1
    assert "there is no teacher; expected both" in capsys.readouterr().err


def test_a_head_of_other_classes_stays_new_and_cannot_teach(tmp_path, capsys):
    save_file(weights_of(models.create("vit_digits", num_classes=7)), tmp_path / "seven.safetensors")
    assert run(*QUICK, "--weights", tmp_path / "seven.safetensors", "--output", tmp_path / "run") == 0
    how = ["--weights", tmp_path / "seven.safetensors", "--distillation-alpha", 0.5]
    assert run(*QUICK, *how, "--output", tmp_path / "taught") == 1
    assert "has a head of other classes than digits, so it cannot teach them" in capsys.readouterr().err


def test_weights_that_do_not_fit_or_are_not_there(tmp_path, capsys):
    save_file({"heads.head.weight": torch.zeros(10, 128)}, tmp_path / "part.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for given, message in {
        tmp_path / "part.safetensors": "the weights are of another architecture than the model",
        tmp_path / "text.safetensors": "is truncated or damaged",
        tmp_path / "list.pth": "holds no state dict",
        "IMAGENET1K_V1": "IMAGENET1K_V1 is no file, and no weights of vit_digits (torchvision has none)",
    }.items():
        assert run(*QUICK, "--weights", given, "--output", tmp_path / "run") == 1
        assert message in capsys.readouterr().err


def test_torchvisions_weights_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torchvision.models.ViT_B_16_Weights, "get_state_dict", lambda self, **how: asked.append((self, how)) or {}
    )
    for name in ("DEFAULT", "IMAGENET1K_V1", "ViT_B_16_Weights.IMAGENET1K_V1"):
        assert weights.trained_weights(name, "vit_b_16") == {}
    assert asked == [(torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1, {"progress": False, "check_hash": True})] * 3
    for name in ("IMAGENET1K_V9", "ViT_L_16_Weights.IMAGENET1K_V1"):
        with pytest.raises(FileNotFoundError, match=r"no weights of vit_b_16 \(torchvision has IMAGENET1K_V1, "):
            weights.trained_weights(name, "vit_b_16")


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
        (["--device", "foo"], "argument --device: 'foo' is not here; expected one of cpu"),
        (["--device", "cuda:99"], "'cuda:99' is not here"),
        (["--compile", "bogus"], "argument --compile: Unrecognized mode=bogus, should be one of: default"),
        (["--seed", "100000000000000000000"], "recipe: seed is 100000000000000000000; expected a number below 2**63"),
        (["--workers", "-1"], "argument --workers: '-1'; expected a number, 0 or more"),
        (["--targets", "mlp"], "--targets without --sparsity, of a dense training without masks"),
        (["--method", "spartan", "--scores", "constant"], "--method, --scores without --sparsity"),
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


def test_an_output_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "fit", lambda *args, **kwargs: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert run(*QUICK, "--output", tmp_path / "file" / "run") == 1
    assert "NotADirectoryError" in (message := capsys.readouterr().err) and "name a file in a folder that" in message
    (tmp_path / "run" / "checkpoint.pt").mkdir(parents=True)
    assert run(*QUICK, "--output", tmp_path / "run", "--resume") == 1
    assert "checkpoint.pt is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["blockvit.train", "blockvit.published"])
@pytest.mark.parametrize("missing", ["pandas", "tqdm"])
def test_python_m_without_the_studys_packages_tells_how_to_install_them(tmp_path, module, missing):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('gone', name={missing!r})")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent / "lib")])
    words = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ModuleNotFoundError: {missing} is not installed") and "pip install '.[study]'" in last


def test_python_m(tmp_path):
    words = [sys.executable, "-m", "blockvit.train", *QUICK, "--lr", "nan", "--output", str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent / "lib")
    assert result.returncode == 2
    assert "recipe: lr is nan" in result.stderr
