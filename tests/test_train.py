import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_data import write_folder
from test_files import room_for
from torch import nn

from blockvit import data, models, sparsify, train
from blockvit.data import DataSplits, ImageTensors
from blockvit.sparse_training import SparseSupermaskLinear
from blockvit.train import loop, processes

STATS = ((0.5,) * 3, (0.25,) * 3)
TINY = train.Recipe(epochs=3, batch_size=8, lr=1e-3, weight_decay=0.1, lr_warmup_epochs=1, label_smoothing=0.1)


def tiny_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {"num_layers": 1, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 32, "num_classes": 2} | kwargs
    return models.create("vit_digits", **settings)


def tiny_data(count=32, size=8, classes=2):
    """Images that are dark in class 0 and bright in class 1."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(count) % classes
    noise = torch.randint(0, 100, (count, 3, size, size), generator=generator)
    images = ImageTensors((noise + 150 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, *STATS)
    return DataSplits("tiny", "made here", images, images, [str(c) for c in range(classes)], size)


def run(recipe=TINY, model=None, **kwargs):
    model = model or tiny_model()
    return model, train.fit(model, tiny_data(), recipe, progress=False, **kwargs)


def same_weights(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# The loop


def test_learns_and_records_every_epoch():
    recipe = replace(TINY, epochs=6, lr=3e-3)
    _, history = run(recipe)
    assert [e["epoch"] for e in history.epochs] == [1, 2, 3, 4, 5, 6]
    assert history.top1 == 1.0
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]
    assert history.seconds == pytest.approx(sum(e["seconds"] for e in history.epochs))
    assert history.epochs[0]["lr"] == pytest.approx(train.learning_rate(recipe, 3, 4))


def test_eval_every_skips_all_but_the_last():
    _, history = run(eval_every=2)
    assert [e["test_top1"] is None for e in history.epochs] == [True, False, False]
    assert [e["test_loss"] is None for e in history.epochs] == [True, False, False]


def test_same_seed_same_weights_and_the_callers_random_state_stays():
    torch.manual_seed(3)
    expected = torch.rand(1)
    model, other_start = tiny_model(), tiny_model()
    torch.manual_seed(3)
    run(model=model)
    assert torch.equal(torch.rand(1), expected)
    assert same_weights(model, run(model=other_start)[0])
    assert not same_weights(model, run(replace(TINY, seed=1))[0])


def test_one_step_is_adamw_on_the_smoothed_loss():
    recipe = replace(TINY, epochs=1, batch_size=32, lr_warmup_epochs=0, clip_grad_norm=0.01)
    model, reference = tiny_model(), tiny_model()
    run(recipe, model)
    images = tiny_data().train
    loss = F.cross_entropy(
        reference(data.normalize(images.images, *STATS)), images.labels, label_smoothing=recipe.label_smoothing
    )
    loss.backward()
    assert nn.utils.clip_grad_norm_(reference.parameters(), 0.01) > 0.01  # so that clipping matters
    torch.optim.AdamW(reference.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay).step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        # Adam's first step is lr * sign(gradient): where the gradient is rounding noise, the sign is too.
        clear = theirs.grad.abs() > 1e-6
        torch.testing.assert_close(ours[clear], theirs[clear], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_distillation_adds_the_teachers_answers(tau):
    """One step, against Hinton's loss written out: labels, and cross entropy with the teacher less its entropy."""
    settings = {"epochs": 1, "batch_size": 32, "lr_warmup_epochs": 0, "clip_grad_norm": None}
    recipe = replace(TINY, **settings, distillation_alpha=0.3, distillation_tau=tau)
    model, reference, teacher = tiny_model(), tiny_model(), tiny_model(seed=5)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    _, history = run(recipe, model, teacher=teacher.train())
    images = data.normalize(tiny_data().train.images, *STATS)
    logits, soft = reference(images), (teacher(images).detach() / tau).softmax(1)
    hard = F.cross_entropy(logits, tiny_data().train.labels, label_smoothing=recipe.label_smoothing)
    taught = (soft * (soft.log() - (logits / tau).log_softmax(1))).sum(1).mean()
    loss = 0.7 * hard + 0.3 * tau**2 * taught
    assert history.epochs[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    torch.optim.AdamW(reference.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay).step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        clear = theirs.grad.abs() > 1e-6
        torch.testing.assert_close(ours[clear], theirs[clear], rtol=1e-4, atol=2e-5)
    assert not teacher.training, "the teacher answers as in evaluation"
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_and_its_weight_come_together():
    with pytest.raises(ValueError, match=r"distillation_alpha is 0.5 and there is no teacher; expected both"):
        run(replace(TINY, distillation_alpha=0.5))
    with pytest.raises(ValueError, match=r"distillation_alpha is 0.0 and there is a teacher; expected both"):
        run(TINY, teacher=tiny_model())
    with pytest.raises(ValueError, match=r"the teacher has 5 classes, tiny has 2; make the teacher with num_classes=2"):
        run(replace(TINY, distillation_alpha=0.5), teacher=tiny_model(num_classes=5))


def test_files_train_like_tensors(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for label in ("dark", "light"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (12, 12), (200 * (label == "light") + i,) * 3).save(
                    tmp_path / split / label / f"{i}.png"
                )
    splits = data.load("folder", tmp_path, image_size=8)
    recipe = replace(TINY, batch_size=4, lr=3e-3, epochs=6, auto_augment="ra", hflip=True)
    one, other = tiny_model(), tiny_model()
    history = train.fit(one, splits, recipe, progress=False)
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]
    train.fit(other, splits, recipe, progress=False)
    assert same_weights(one, other)
    with_workers = train.evaluate(one, splits.test, num_workers=1)
    assert with_workers == pytest.approx(train.evaluate(one, splits.test))


def test_accumulated_passes_give_the_weights_of_one():
    recipe = replace(TINY, epochs=2, clip_grad_norm=0.1, mixup_alpha=0.2, cutmix_alpha=1.0, hflip=True)
    (whole, expected), (cut, history) = run(recipe, tiny_model()), run(recipe, tiny_model(), accumulate=4)
    assert history.epochs[0]["accumulate"] == 4
    assert history.epochs[-1]["train_loss"] == pytest.approx(expected.epochs[-1]["train_loss"])
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5)
    assert not same_weights(cut, run(replace(recipe, seed=1), tiny_model(), accumulate=4)[0])


def test_compiled_training_with_supermasks_is_the_eager_one(monkeypatch):
    recipe = replace(TINY, sparsity_schedule="cubic", sparsity_end=1.0, clip_grad_norm=1.0)

    def masked():
        return sparsify(tiny_model(mlp_dim=64), 0.75, 4, targets=("mlp", "out_proj"))

    graphs, compile = [], torch.compile

    def whole_graphs(model, mode):
        def count(graph, inputs):
            graphs.append(graph)
            return graph

        return compile(model, backend=count, fullgraph=True)  # without the C++ compiler: what is compiled is the point

    monkeypatch.setattr(torch, "compile", whole_graphs)
    (eager, _), (compiled, history) = run(recipe, masked()), run(recipe, masked(), compile=True)
    assert len(graphs) == 1  # not one for each sparsity
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert history.top1 == 1.0


def test_throughput_is_that_of_training_alone(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    _, history = run(replace(TINY, epochs=1, lr_warmup_epochs=0))
    # One look at the clock at each end of the epoch, two for each of the four batches; each look is a second.
    assert history.epochs[0]["images_per_s"] == pytest.approx(4 * 8 / 9)
    assert history.epochs[0]["data_share"] == pytest.approx(4 / 9)


def test_files_have_the_sizes_of_the_recipe(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for label in ("dark", "light"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(2):
                # Light in the middle, so that a central crop out of a larger resize is lighter.
                image = Image.new("RGB", (40, 40))
                image.paste((255, 255, 255), (10, 10, 30, 30))
                image.save(tmp_path / split / label / f"{i}.png")
    splits = data.load("folder", tmp_path, image_size=32)
    seen = []

    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            seen.append((self.training, x.shape[-1], x.mean().item()))
            return x.mean((1, 2, 3))[:, None] * self.weight

    for resize in (12, 16):
        sizes = {"train_crop_size": 16, "val_resize_size": resize, "val_crop_size": 12}
        train.fit(Any(), splits, replace(TINY, epochs=2, batch_size=4, **sizes), progress=False)
    assert {size for training, size, _ in seen if training} == {16}
    assert {size for training, size, _ in seen if not training} == {12}
    whole, cropped = seen[1][2], seen[-1][2]
    assert cropped > whole + 0.5


def test_bf16_autocast_on_the_cpu():
    seen = []
    model = tiny_model()
    model.encoder.layers[0].mlp[0].register_forward_hook(lambda m, args, out: seen.append((m.training, out.dtype)))
    _, history = run(replace(TINY, amp=True, epochs=5, lr=3e-3), model)
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
    assert history.top1 == 1.0
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_amp_on_the_gpu(dtype):
    recipe = replace(
        TINY, amp=True, amp_dtype=dtype, epochs=6, lr=3e-3, clip_grad_norm=1.0, hflip=True, mixup_alpha=0.2
    )
    _, history = run(recipe, device="cuda")
    assert history.top1 == 1.0


def test_evaluate_counts_every_image_once_and_restores_the_mode():
    class Brightness(nn.Module):
        def forward(self, x):
            bright = x.mean((1, 2, 3))
            return torch.stack([-bright, bright], 1)

    splits = tiny_data(33)
    wrong = replace(splits.test, labels=splits.test.labels.clone())
    wrong.labels[-3:] = 1 - wrong.labels[-3:]
    model = Brightness().train()
    result = train.evaluate(model, wrong, batch_size=10)
    assert result["top1"] == pytest.approx(30 / 33)
    logits = model(data.normalize(wrong.images, *STATS))
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, wrong.labels).item())
    assert model.training


def test_evaluate_restores_the_mode_of_every_part_also_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("on purpose")

    parts = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Identity(), Fails())
    parts.train()
    parts[0].eval()
    with pytest.raises(RuntimeError, match="on purpose"):
        train.evaluate(parts, tiny_data(4).test)
    assert [part.training for part in parts] == [False, True, True] and parts.training


# Learning rate, parameter groups, averages


def test_learning_rate_warms_up_linearly_then_follows_a_cosine():
    recipe = train.Recipe(epochs=10, batch_size=1, lr=1.0, lr_warmup_epochs=2, lr_warmup_decay=0.1, lr_min=0.2)
    rate = [train.learning_rate(recipe, step, 5) for step in range(51)]
    assert rate[0] == pytest.approx(0.1)
    assert rate[5] == pytest.approx(0.55)
    assert rate[10] == pytest.approx(1.0)
    assert rate[30] == pytest.approx(0.6)
    assert rate[20] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate[50] == pytest.approx(0.2)


def test_learning_rate_without_warm_up_starts_at_its_peak():
    assert train.learning_rate(replace(TINY, lr_warmup_epochs=0), 0, 4) == TINY.lr


def test_sparsity_grows_by_a_cubic_ramp_and_is_whole_at_the_end():
    recipe = replace(TINY, sparsity_schedule="cubic", sparsity_start=0.2, sparsity_end=0.7, epochs=10)
    share = [train.sparsity_share(recipe, step, 10) for step in range(101)]
    assert share[:21] == [0.0] * 21
    assert share[70:] == [1.0] * 31
    assert share[45] == pytest.approx(1 - 0.5**3)
    assert share == sorted(share)
    assert train.sparsity_share(TINY, 0, 10) == 1.0


@pytest.mark.parametrize("ema", [False, True])
def test_masks_follow_the_schedule_in_training_and_are_evaluated_as_they_are(ema):
    recipe = replace(
        TINY, sparsity_schedule="cubic", sparsity_end=1.0, epochs=2, model_ema=ema, model_ema_steps=1, batch_size=16
    )
    model = sparsify(tiny_model(mlp_dim=64), 0.75, 4, targets=("mlp",))
    layer = model.encoder.layers[0].mlp[0]
    seen = {"train": [], "eval": []}

    def note(module, args, output):
        seen["train" if module.training else "eval"].append(module.sparsity_in_force)

    layer.register_forward_hook(note)  # copied with the model, so that of the average notes too
    run(recipe, model)
    assert seen["train"] == pytest.approx([0.75 * (1 - (1 - step / 4) ** 3) for step in range(4)])
    assert seen["eval"] == pytest.approx([0.75 * (1 - 0.5**3), 0.75])
    assert layer.sparsity_in_force == 0.75
    assert layer.block_mask().float().mean() == pytest.approx(0.25, abs=0.02)


def masked_model(**kwargs):
    return sparsify(tiny_model(**kwargs), 0.5, 8, targets="mlp")


def test_training_through_sparse_products_is_the_masked_one():
    plain, sparse = run(model=masked_model())[0], run(replace(TINY, sparse_steps=1), masked_model())[0]
    assert any(isinstance(m, SparseSupermaskLinear) for m in sparse.modules())
    for one, other in zip(plain.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert same_weights(run(replace(TINY, sparse_steps=1))[0], run()[0]), "a dense model has no sparse products"


def test_sparse_products_go_on_with_the_model_that_was_stopped(tmp_path):
    recipe = replace(TINY, sparse_steps=3)
    path, model = tmp_path / "checkpoint.pt", masked_model()
    run(recipe, model, checkpoint=path, stop=lambda history: len(history.epochs) == 2)
    assert same_weights(run(recipe, model, checkpoint=path)[0], run(recipe, masked_model())[0])


@pytest.mark.parametrize("ema", [False, True])
def test_masks_that_last_resume_to_the_same_bits(tmp_path, ema):
    recipe = replace(TINY, sparse_steps=3, sparse_weight_grad="kept", model_ema=ema, model_ema_steps=1)
    whole = run(recipe, masked_model())[0]
    path = tmp_path / "checkpoint.pt"
    run(recipe, masked_model(), checkpoint=path, stop=lambda history: len(history.epochs) == 2)
    assert same_weights(run(recipe, masked_model(), checkpoint=path)[0], whole)
    assert not same_weights(run(replace(recipe, sparse_weight_grad="dense"), masked_model())[0], whole)


def test_resumed_ramp_goes_on_where_it_was(tmp_path):
    recipe = replace(TINY, sparsity_schedule="cubic", sparsity_end=0.9, epochs=3)

    def masked():
        return sparsify(tiny_model(), 0.75, 4, targets=("mlp",))

    whole, _ = run(recipe, masked())
    model, passes = masked(), []

    def stop_in_the_third_epoch(module, args):
        passes.extend([1] * module.training)
        if len(passes) == 4 + 4 + 2:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(stop_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, model, checkpoint=tmp_path / "run.pt")
    resumed, history = run(recipe, masked(), checkpoint=tmp_path / "run.pt")
    assert same_weights(whole, resumed)
    assert len(history.epochs) == 3


def test_spartan_layers_are_sharpened_over_four_fifths_of_the_training():
    model = sparsify(tiny_model(), 0.75, 4, targets=("mlp",), method="spartan")
    layer, shares = model.encoder.layers[0].mlp[0], []
    layer.register_forward_hook(lambda module, *args: shares.extend([module._sharpness_share] * module.training))
    run(replace(TINY, epochs=5, batch_size=32), model)
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])


class WithScores(nn.Module):
    """A model with supermask-like scores that take part in the result, and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.vit = tiny_model()
        self.vit.heads.head.scores = nn.Parameter(torch.ones(2))
        self.vit.conv_proj.weight.requires_grad_(False)

    def forward(self, x):
        return self.vit(x) * self.vit.heads.head.scores + torch.tensor([0.0, 1.0]) * self.vit.heads.head.scores


def test_parameter_groups():
    recipe = replace(TINY, norm_weight_decay=0.2, bias_weight_decay=0.3, transformer_embedding_decay=0.0, scores_lr=0.5)
    model = WithScores()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in train.parameter_groups(model, recipe)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.1, "norm": 0.2, "bias": 0.3, "embedding": 0.0, "scores": 0.1
    }  # fmt: skip
    assert {name: group["peak_lr"] for name, group in groups.items() if name != "weights"} == {
        "norm": 1e-3, "bias": 1e-3, "embedding": 1e-3, "scores": 0.5
    }  # fmt: skip
    members = {name: {names[p] for p in group["params"]} for name, group in groups.items()}
    assert members["scores"] == {"vit.heads.head.scores"}
    assert members["embedding"] == {"vit.class_token", "vit.encoder.pos_embedding"}
    assert "vit.encoder.ln.bias" in members["norm"]
    assert "vit.encoder.layers.encoder_layer_0.self_attention.in_proj_bias" in members["bias"]
    trained = [name for group in members.values() for name in group]
    assert sorted(trained) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_scores_step_by_their_own_learning_rate():
    recipe = replace(TINY, epochs=1, lr_warmup_epochs=0, batch_size=32, weight_decay=0.0, scores_lr=0.5)
    model, before = WithScores(), WithScores()
    before.load_state_dict(model.state_dict())
    run(recipe, model)

    def largest_step(name):
        return (model.get_parameter(name) - before.get_parameter(name)).abs().max().item()

    # Adam's first step is as long as its learning rate.
    assert largest_step("vit.heads.head.scores") == pytest.approx(0.5, rel=0.01)
    assert largest_step("vit.heads.head.bias") == pytest.approx(recipe.lr, rel=0.01)
    assert largest_step("vit.conv_proj.weight") == 0


def test_a_shared_parameter_is_trained_once():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Sequential(layer))
    assert sum(len(group["params"]) for group in train.parameter_groups(model, TINY)) == 2


def test_ema_decay_is_the_references():
    recipe = train.recipe_for("imagenet")
    assert train.ema_decay(recipe) == pytest.approx(1 - 2e-5 * (8 * 512) * 32 / 300)  # world size * batch of a process
    assert train.ema_decay(replace(TINY, model_ema_decay=0.0)) == 0.0


def test_ema_is_a_copy_in_warm_up_and_an_average_after():
    recipe = replace(TINY, model_ema=True, model_ema_steps=1, model_ema_decay=0.9, batch_size=4, epochs=2)
    decay = train.ema_decay(recipe)
    model = nn.Linear(1, 1)
    trainer = loop._Trainer.make(model, recipe, processes.Alone("cpu"), num_images=32)

    def average_of(weight, warming_up):
        nn.init.constant_(model.weight, weight)
        trainer.update_ema(warming_up)
        return trainer.averaged(after=1).weight.item()

    assert average_of(1.0, True) == 1.0
    assert average_of(2.0, True) == 2.0
    assert average_of(3.0, False) == 3.0
    assert average_of(5.0, False) == pytest.approx(3 * decay + 5 * (1 - decay))


def test_ema_weights_are_evaluated_and_returned():
    recipe = replace(TINY, model_ema=True, model_ema_steps=1, model_ema_decay=0.99)
    averaged, history = run(recipe)
    plain, _ = run()
    assert not same_weights(averaged, plain)
    assert history.epochs[-1]["test_loss"] == pytest.approx(train.evaluate(averaged, tiny_data().test)["loss"])


# Checkpoints

EVERYTHING = replace(
    TINY,
    model_ema=True,
    model_ema_steps=2,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
    auto_augment="ra",
    hflip=True,
    random_crop_padding=1,
    clip_grad_norm=1.0,
)

KILLED_RUN = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    from test_train import EVERYTHING, run, tiny_model

    torch.set_num_threads(1)
    model = tiny_model(dropout=0.1)
    steps = 0

    def die_in_the_third_epoch(module, args):
        global steps
        steps += module.training
        if steps == 4 + 4 + 2:  # four steps an epoch
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(die_in_the_third_epoch)
    run(EVERYTHING, model, checkpoint={checkpoint!r})
"""


def test_killed_run_resumes_to_bit_identical_weights(tmp_path):
    checkpoint = tmp_path / "run.pt"
    script = textwrap.dedent(KILLED_RUN).format(tests=str(Path(__file__).parent), checkpoint=str(checkpoint))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(torch.load(checkpoint)["history"]) == 2

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, whole_history = run(EVERYTHING, tiny_model(dropout=0.1))
        torch.manual_seed(99)  # whatever the state of the resuming process
        resumed, history = run(EVERYTHING, tiny_model(seed=5, dropout=0.1), checkpoint=checkpoint)
    finally:
        torch.set_num_threads(threads)
    assert same_weights(whole, resumed)
    measured = ("epoch", "train_loss", "test_loss", "test_top1", "lr", "processes", "accumulate")
    for one, two in zip(whole_history.epochs, history.epochs, strict=True):
        assert [one[key] for key in measured] == [two[key] for key in measured]


@pytest.fixture
def finished(tmp_path):
    model, history = run(checkpoint=tmp_path / "run.pt")
    return tmp_path / "run.pt", model, history


def test_finished_checkpoint_returns_at_once(finished):
    path, model, history = finished
    other = tiny_model(seed=5)
    other.register_forward_pre_hook(lambda *args: pytest.fail("trained again"))
    _, again = run(model=other, checkpoint=path)
    assert same_weights(model, other)
    assert again == history
    assert json.loads(json.dumps(again.epochs)) == history.epochs


def test_resume_false_starts_anew(finished):
    path, model, _ = finished
    _, history = run(model=model, checkpoint=path, resume=False)
    assert len(history.epochs) == 3
    assert torch.load(path)["history"] == history.epochs


@pytest.mark.parametrize(
    ("recipe", "model", "difference"),
    [
        (replace(TINY, lr=2e-3), {}, "recipe: lr is 0.001 there and 0.002 here"),
        (replace(TINY, seed=1), {}, "recipe: seed is 0 there and 1 here"),
        (TINY, {"mlp_dim": 64}, r"model: encoder.layers.encoder_layer_0.mlp.0 is .*out_features=32.* there and .*=64"),
        (TINY, {"num_layers": 2}, "model: encoder.layers.encoder_layer_1 is None there"),
    ],
)
def test_checkpoint_of_another_run_names_the_difference(finished, recipe, model, difference):
    path = finished[0]
    before = path.read_bytes()
    with pytest.raises(train.CheckpointError, match=rf"run.pt belongs to another run: {difference}.*or delete it"):
        run(recipe, tiny_model(**model), checkpoint=path)
    assert path.read_bytes() == before


def test_checkpoint_of_another_data_set(finished):
    with pytest.raises(train.CheckpointError, match="data: training images is 32 there and 40 here"):
        train.fit(tiny_model(), tiny_data(40), TINY, checkpoint=finished[0], progress=False)


def test_checkpoint_tells_sparsities_apart(tmp_path):
    class Sparse(nn.Linear):
        sparsity = 0.9

        def extra_repr(self):
            return f"sparsity={self.sparsity}"

    def model(sparsity):
        model = tiny_model()
        model.heads.head = Sparse(16, 2)
        model.heads.head.sparsity = sparsity
        return model

    run(model=model(0.9), checkpoint=tmp_path / "run.pt")
    with pytest.raises(train.CheckpointError, match=r"heads.head is 'Sparse\(sparsity=0.9\)' there and .*0.8"):
        run(model=model(0.8), checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign"])
def test_damaged_checkpoint(finished, damage):
    path = finished[0]
    if damage == "foreign":
        torch.save({"model": {}}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(train.CheckpointError, match=r"run.pt is truncated or no checkpoint .* delete it to train"):
        run(checkpoint=path)


def test_checkpoint_loads_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save(Evil(), tmp_path / "run.pt")
    with pytest.raises(train.CheckpointError, match="no checkpoint of this library"):
        run(checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "hacked").exists()


def test_nan_loss_stops_with_the_place_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    model = tiny_model()
    passes = []

    def break_second_epoch(module, args, output):
        passes.extend([1] * module.training)
        return output * math.nan if len(passes) >= 4 + 3 else output  # four steps an epoch

    model.register_forward_hook(break_second_epoch)
    with pytest.raises(
        train.NonFiniteLossError,
        match=r"became nan in epoch 2, step 3 of 4, at learning rate 0.000854; .*training images \d.*Lower lr",
    ) as caught:
        run(model=model, checkpoint=path)
    assert (caught.value.epoch, caught.value.step) == (1, 2)
    assert caught.value.images == train.epoch_order(32, TINY, 1)[2].tolist()
    assert len(torch.load(path)["history"]) == 1


def test_weights_that_the_last_step_spoils_are_not_kept(tmp_path):
    path = tmp_path / "run.pt"
    model, passes = tiny_model(), []

    def spoil_the_last_gradient(module, grad_input, grad_output):
        passes.append(1)
        return (grad_input[0] * math.nan,) if len(passes) == 4 + 4 else None  # four steps an epoch, losses are fine

    model.encoder.ln.register_full_backward_hook(spoil_the_last_gradient)
    with pytest.raises(train.NonFiniteLossError, match="a weight is no longer finite in epoch 2, step 4 of 4"):
        run(model=model, checkpoint=path)
    assert len(torch.load(path)["history"]) == 1


def test_full_disk_leaves_the_old_checkpoint(finished):
    path, _, history = finished
    before = path.read_bytes()
    with (
        room_for(1000),
        pytest.raises(OSError, match=r"run.pt was not written, what was .* unchanged.*free some space"),
    ):
        run(checkpoint=path, resume=False)
    assert path.read_bytes() == before
    assert run(checkpoint=path)[1] == history


def test_a_checkpoint_that_cannot_be_written_is_told_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = tiny_model()
    model.register_forward_pre_hook(lambda *args: pytest.fail("trained"))
    with pytest.raises(OSError, match=r"run\.pt was not written"):
        run(model=model, checkpoint=tmp_path / "file" / "run.pt")


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"model_ema_steps": 0}, "model_ema_steps is 0; expected at least 1"),
        ({"lr": 0.0}, "lr is 0.0; expected a positive number"),
        ({"lr": math.nan}, "lr is nan; expected a positive number"),
        ({"scores_lr": -1.0}, "scores_lr is -1.0; expected a positive number"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0; expected a positive number"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; expected 0 or more"),
        ({"scores_weight_decay": -0.1}, "scores_weight_decay is -0.1; expected 0 or more"),
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0; expected 0 or more"),
        ({"random_crop_padding": -1}, "random_crop_padding is -1; expected 0 or more"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"distillation_alpha": 1.5}, r"distillation_alpha is 1.5; expected a number in \[0, 1\]"),
        ({"distillation_tau": 0.0}, "distillation_tau is 0.0; expected a positive number"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; expected a number in \[0, 1\)"),
        ({"model_ema_decay": 1.0}, r"model_ema_decay is 1.0; expected a number in \[0, 1\)"),
        ({"lr_warmup_decay": 0.0}, r"lr_warmup_decay is 0.0; expected a number in \(0, 1\]"),
        ({"lr_warmup_epochs": 3}, r"lr_warmup_epochs is 3; expected 0 to epochs - 1 \(2\)"),
        ({"lr_min": 0.1}, r"lr_min is 0.1; expected at most lr \(0.001\)"),
        ({"auto_augment": "aa"}, "auto_augment is 'aa'; expected 'ra' or None"),
        ({"ra_magnitude": 31}, "ra_magnitude is 31; expected 0 to 30"),
        ({"amp_dtype": "fp8"}, "amp_dtype is 'fp8'; expected 'bf16' or 'fp16'"),
        ({"ra_reps": 0}, "ra_reps is 0; expected at least 1"),
        ({"val_crop_size": 0}, "val_crop_size is 0; expected at least 1"),
        (
            {"val_crop_size": 64, "val_resize_size": 32},
            r"val_resize_size is 32; expected at least val_crop_size \(64\)",
        ),
        ({"sparse_steps": 0}, "sparse_steps is 0; expected at least 1"),
        ({"sparse_weight_grad": "none"}, "sparse_weight_grad is 'none'; expected 'dense' or 'kept'"),
        ({"sparsity_schedule": "linear"}, "sparsity_schedule is 'linear'; expected 'constant' or 'cubic'"),
        ({"sparsity_start": 1.0}, r"sparsity_start is 1.0; expected a fraction of the epochs in \[0, 1\)"),
        ({"sparsity_start": 0.6}, r"sparsity_end is 0.5; .* in \(sparsity_start, 1\], that is \(0.6, 1\]"),
    ],
)
def test_recipe_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"^recipe: {message}"):
        replace(TINY, **changes)


def test_the_imagenet_recipe_is_torchvisions():
    """references/classification/README.md, vit_b_16: eight processes with --batch-size 512."""
    recipe = train.recipe_for("imagenet")
    command = """--epochs 300 --lr 0.003 --weight-decay 0.3 --lr-warmup-epochs 30 --lr-warmup-decay 0.033
        --label-smoothing 0.11 --mixup-alpha 0.2 --auto-augment ra --clip-grad-norm 1 --cutmix-alpha 1.0"""
    for field, value in (pair.split() for pair in command.strip().removeprefix("--").split(" --")):
        assert str(getattr(recipe, field.replace("-", "_"))).removesuffix(".0") == value.removesuffix(".0")
    assert all((recipe.amp, recipe.ra_sampler, recipe.model_ema))
    defaults = {"lr_min": 0.0, "model_ema_steps": 32, "model_ema_decay": 0.99998, "ra_magnitude": 9, "ra_reps": 3}
    sizes = {"batch_size": 8 * 512, "train_crop_size": 224, "val_resize_size": 256, "val_crop_size": 224}
    for field, value in (defaults | sizes).items():
        assert getattr(recipe, field) == value


def test_recipes():
    assert train.recipe_for("digits", seed=3) == replace(train.recipe_for("digits"), seed=3)
    with pytest.raises(ValueError, match=r"unknown recipe 'cifar' \(did you mean 'cifar10'\?\)"):
        train.recipe_for("cifar")


def test_fewer_images_than_a_batch():
    with pytest.raises(ValueError, match="tiny has 32 training images, fewer than one batch of 64; choose a smaller"):
        run(replace(TINY, batch_size=64))


def test_model_of_other_classes():
    with pytest.raises(ValueError, match="the model has 5 classes, tiny has 2; make the model with num_classes=2"):
        run(model=tiny_model(num_classes=5))
    model = tiny_model(num_classes=5)
    model.heads.head = torch.nn.Linear(16, 2)  # as for fine-tuning; torchvision's model.num_classes stays as it was
    assert run(model=model, stop=lambda history: True)[1].epochs == []


def test_eval_every_must_be_positive():
    with pytest.raises(ValueError, match="eval_every is 0; expected a number of epochs"):
        run(eval_every=0)


def test_nothing_to_evaluate_on():
    empty = ImageTensors(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.long), *STATS)
    with pytest.raises(ValueError, match="no images to evaluate on"):
        train.evaluate(tiny_model(), empty)


@pytest.mark.parametrize("crops", [{"train_crop_size": 16}, {"val_crop_size": 16, "val_resize_size": 16}])
def test_crops_of_another_size_than_the_models_are_refused_before_the_first_step(tmp_path, crops):
    splits = data.load("folder", write_folder(tmp_path), image_size=32)
    model = models.create("vit_digits", num_classes=len(splits.classes), image_size=32)
    recipe = train.recipe_for("digits", epochs=1, batch_size=2, lr_warmup_epochs=0, **crops)
    told = rf"takes images of 32 pixels and folder gives 16 \(recipe: {next(iter(crops))}=16"
    with pytest.raises(ValueError, match=told):
        train.fit(model, splits, recipe)
