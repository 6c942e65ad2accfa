from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from blockvit import accuracy, bench, checkout, losses, notebook, pipeline, train
from blockvit.accuracy import AccuracyCell, cells
from blockvit.results import Store
from blockvit.supermask import num_kept, supermask_layers

RECIPE = {"epochs": 2}
GRID = [AccuracyCell("digits", "vit_digits"), AccuracyCell("digits", "vit_digits", 32, 0.5)]


def times_of_writing(checkpoints: Path) -> dict[Path, int]:
    """When each model below a folder was written: the same before and after if none was trained."""
    return {file: file.stat().st_mtime_ns for file in checkpoints.rglob("*.pt")}


def test_the_grid_is_seed_by_seed_and_block_by_block_headline_sparsities_first():
    grid = cells("cifar10", "vit_cifar", [32, 16], [0.9, 0.5, 0.7], [0, 1])
    first = grid[: len(grid) // 2]
    expected = [(None, None), (32, 0.9), (32, 0.7), (16, 0.9), (16, 0.7), (32, 0.5), (16, 0.5)]
    assert [(cell.block_size, cell.sparsity) for cell in first] == expected
    assert [cell.seed for cell in grid] == [0] * 7 + [1] * 7
    assert grid[7:] == [replace(cell, seed=1) for cell in first]
    assert len({cell.name for cell in grid}) == 14


def test_iterators_give_the_same_grid():
    assert cells("d", "m", iter([8, 16]), iter([0.5, 0.9]), [0, 1]) == cells("d", "m", [8, 16], [0.5, 0.9], [0, 1])


def test_variants_are_recipe_changes_and_mask_options():
    options = [{"scores_lr": 0.1}, {"train_scores": False, "epochs": 3}]
    lr, dense, frozen = accuracy.variants("digits", "vit_digits", 32, 0.9, options)
    assert (dense.block_size, dense.recipe_changes) == (None, {"epochs": 3}), "trained for as long"
    assert (lr.recipe_changes, lr.mask_options) == ({"scores_lr": 0.1}, {})
    assert (frozen.recipe_changes, frozen.mask_options) == ({"epochs": 3}, {"train_scores": False})
    assert len({lr, frozen, replace(lr, variant=())}) == 3
    seeds = accuracy.variants("digits", "vit_digits", 32, 0.9, options, seeds=[0, 1])
    assert [(cell.seed, *cell.recipe_changes) for cell in seeds] == [
        (0, "scores_lr"), (0, "epochs"), (0, "epochs"), (1, "scores_lr"), (1, "epochs"), (1, "epochs"),
    ]  # fmt: skip


def test_variants_that_begin_with_the_trained_dense_model():
    options = [{"start": "dense", "scores": "magnitude"}, {"start": "dense", "distillation_alpha": 0.5}]
    dense, plain, taught = accuracy.variants("digits", "vit_digits", 32, 0.9, options)
    assert (dense.block_size, dense.variant) == (None, (("start", "dense"),))
    assert {cell.start for cell in (dense, plain, taught)} == {AccuracyCell("digits", "vit_digits")}
    assert (plain.recipe_changes, plain.mask_options) == ({}, {"scores": "magnitude"})
    assert AccuracyCell("digits", "vit_digits").start is None
    with pytest.raises(ValueError, match="start is 'imagenet'; expected 'dense'"):
        AccuracyCell("digits", "vit_digits", 32, 0.9, variant={"start": "imagenet"})
    with pytest.raises(ValueError, match="distillation needs a teacher; add start='dense'"):
        AccuracyCell("digits", "vit_digits", 32, 0.9, variant={"distillation_alpha": 0.5})


def test_a_dense_model_has_no_masks_to_vary():
    AccuracyCell("digits", "vit_digits", variant={"epochs": 3})
    with pytest.raises(ValueError, match="a dense model has no masks to vary"):
        AccuracyCell("digits", "vit_digits", variant={"method": "spartan"})


def test_names():
    assert AccuracyCell("digits", "vit_digits", seed=2).name == "vit_digits-dense-seed2"
    assert AccuracyCell("digits", "vit_digits", 32, 0.9).name == "vit_digits-bs32-sp0.90-seed0"


def test_keys():
    dense, sparse = GRID[0].key(metric="top1"), GRID[1].key(metric="top1")
    assert (dense["scope"], dense["backend"], dense["block_size"], dense["sparsity"]) == ("dense", "dense", None, None)
    assert (sparse["scope"], sparse["backend"]) == ("mlp+out_proj+head", "supermask")
    assert (sparse["block_size"], sparse["sparsity"], sparse["metric"]) == (32, 0.5, "top1")


@pytest.mark.parametrize("half", [{"block_size": 32}, {"sparsity": 0.9}], ids=str)
def test_a_half_given_cell_is_refused(half):
    with pytest.raises(ValueError, match="give both block_size and sparsity, or neither for the dense model"):
        AccuracyCell("digits", "vit_digits", **half)


def test_build_is_seeded_and_masks_its_targets():
    cell = AccuracyCell("digits", "vit_digits", 32, 0.9, seed=1, targets=("mlp",))
    first, again = cell.build().state_dict(), cell.build().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    layers = supermask_layers(cell.build())
    assert len(layers) == 8 and all("mlp" in name for name in layers)
    assert all(int(m.block_mask().sum()) == num_kept(m.scores.numel(), 0.9) for m in layers.values())
    other = AccuracyCell("digits", "vit_digits", 32, 0.9, seed=2, targets=("mlp",)).build().state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert not supermask_layers(GRID[0].build())


@pytest.fixture(autouse=True, scope="module")
def quiet_machine():
    """As on a machine that runs nothing else, where the time of a training is worth a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "busy_note", list)
        yield


class Trained:
    """A grid trained once; tests that train more use folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "results")
        self.checkpoints = folder / "cache" / "checkpoints"
        self.report = self.run()

    def run(self, grid=GRID, **more):
        how = {"checkpoints": self.checkpoints, "recipe": RECIPE, "workers": 2, **more}
        return accuracy.run(grid, self.store, **how)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("accuracy"))


def test_run_writes_accuracies_and_curves(trained):
    assert (trained.report.measured, trained.report.kept, trained.report.left) == (2, 0, 0)
    rows = trained.store.read("accuracy")
    top1 = rows[rows["metric"] == "top1"]
    assert sorted(top1["backend"]) == ["dense", "supermask"]
    assert (
        set(top1["recipe"]) == {"digits epochs=2"} and set(top1["unit"]) == {"%"} and set(top1["dataset"]) == {"digits"}
    )
    assert top1["value"].between(10, 100).all(), "percent, and better than chance"
    assert set(rows["threads"]) == {1.0}, "a cell trains on one core"
    seconds = rows[rows["metric"] == "train_seconds"]
    assert len(seconds) == 2 and (seconds["value"] > 0).all()
    curves = trained.store.read("training")
    assert len(curves) == 2 * 2 * 2
    for backend, curve in curves[curves["metric"] == "top1"].groupby("backend"):
        assert curve["epoch"].tolist() == [1, 2]
        last = curve["value"].iloc[-1]
        assert last == pytest.approx(top1[top1["backend"] == backend]["value"].iloc[0]), "the end of the curve"
    assert (curves[curves["metric"] == "train_loss"]["value"] > 0).all()
    assert rows.groupby("backend")["group"].nunique().eq(1).all()


def test_a_trained_dense_model_is_begun_with_and_teaches(trained, tmp_path, monkeypatch):
    """What ``fit`` gets is the dense model as trained, masked by its own weights, beside itself as the teacher."""
    begun = {}

    def fit(model, splits, recipe, *, teacher, **more):
        begun.update(model=model, teacher=teacher, weights={n: t.clone() for n, t in model.state_dict().items()})
        return train.fit(model, splits, recipe, teacher=teacher, **more)

    cell = AccuracyCell("digits", "vit_digits", 32, 0.5, variant={
        "start": "dense", "method": "magnitude", "distillation_alpha": 0.5, "epochs": 1, "lr_warmup_epochs": 0,
    })  # fmt: skip
    how = {"checkpoints": trained.checkpoints, "recipe": RECIPE}
    dense, _ = accuracy.train_cell(GRID[0], **how)
    monkeypatch.setattr(accuracy, "fit", fit)
    _, rows = accuracy.train_cell(cell, **how)
    assert {row["recipe"] for row in rows} == {
        "digits epochs=2 + distillation_alpha=0.5 epochs=1 lr_warmup_epochs=0 method=magnitude start=dense"
    }
    last = {name: tensor for name, tensor in dense.state_dict().items() if "heads" in name or "mlp" in name}
    assert all(torch.equal(begun["weights"][name], tensor) for name, tensor in last.items())
    assert all(torch.equal(begun["teacher"].state_dict()[name], tensor) for name, tensor in last.items())


def test_dense_models_that_others_begin_with_are_trained_once_and_first(tmp_path, monkeypatch):
    grid = accuracy.variants("digits", "vit_digits", 32, 0.5, [{"start": "dense"}])
    store, how = Store(tmp_path / "results"), {"checkpoints": tmp_path / "checkpoints", "recipe": {"epochs": 2}}
    report = accuracy.run(grid, store, **how, workers=2)
    assert (report.measured, report.left) == (2, 0)
    rows = store.read("accuracy")
    assert set(rows["recipe"]) == {"digits epochs=2 + start=dense"}, "the model begun with was not asked for"
    assert sorted(rows[rows["metric"] == "top1"]["backend"]) == ["dense", "supermask"]
    files = list((tmp_path / "checkpoints/digits").glob("*.pt"))
    assert len(files) == 3
    asked = []
    monkeypatch.setattr(accuracy, "map_cells", lambda fn, cells, workers: asked.append(list(cells)) or iter(()))
    half_trained = {"checkpoints": tmp_path / "checkpoints", "recipe": {"epochs": 2}}  # as far as the tables tell
    accuracy.run([replace(cell, seed=0) for cell in grid[1:]], Store(tmp_path / "others"), **half_trained, workers=2)
    assert asked[0] == [grid[1].start], "not by each that begins with it"
    monkeypatch.undo()
    written = times_of_writing(tmp_path / "checkpoints")
    assert accuracy.run([GRID[0], *grid], store, **how, workers=2).measured == 1, "now it is, and is only loaded"
    assert times_of_writing(tmp_path / "checkpoints") == written


@pytest.mark.slow
def test_two_processes_train_each_model_together(trained, tmp_path):
    """The same global batches: the same model as from one process, but for what rounding does to a digit or two."""
    store = Store(tmp_path / "results")
    how = {"checkpoints": tmp_path / "checkpoints", "recipe": RECIPE, "num_processes": 2}
    assert accuracy.run(GRID[1:], store, **how).measured == 1
    (together,) = store.read("accuracy").query("metric == 'top1'")["value"]
    alone = trained.store.read("accuracy").query("metric == 'top1' and backend == 'supermask'")["value"].iloc[0]
    assert together == pytest.approx(alone, abs=3.0), "the same but for rounding"
    assert accuracy.run(GRID[1:], store, **how).kept == 1


def test_run_writes_what_became_of_the_masks(trained):
    rows = trained.store.read("masks")
    _, cell = GRID
    layers = list(supermask_layers(cell.build()))
    assert list(dict.fromkeys(rows["scope"])) == layers
    assert len(rows) == 3 * len(layers) and set(rows["unit"]) == {"%"}
    random, learnt = accuracy.masks(cell, trained.checkpoints, recipe=RECIPE)
    value = rows.set_index(["scope", "metric"])
    for layer in layers:
        assert value.loc[(layer, "kept"), "value"] == pytest.approx(100 * np.median(learnt[layer].mean(axis=1)))
        assert value.loc[(layer, "kept_before"), "value"] == pytest.approx(100 * np.median(random[layer].mean(axis=1)))
        exchanged = (learnt[layer] & ~random[layer]).sum() / learnt[layer].sum()
        assert value.loc[(layer, "exchanged"), "value"] == pytest.approx(100 * exchanged)
    assert (rows["low"].isna() == (rows["metric"] == "exchanged")).all()


def test_a_variant_is_a_row_of_its_own(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "map_cells", in_this_process)
    store, how = Store(tmp_path), {"checkpoints": trained.checkpoints, "recipe": RECIPE}
    frozen = accuracy.variants("digits", "vit_digits", 32, 0.5, [{"train_scores": False}])
    assert accuracy.run([GRID[1], *frozen], store, **how).measured == 2
    assert accuracy.run(frozen, store, **how).kept == 1
    rows = store.read("masks").query("metric == 'exchanged'")
    by_recipe = rows.groupby("recipe")["value"].max()
    assert by_recipe["digits epochs=2 + train_scores=False"] == 0 < by_recipe["digits epochs=2"]


def test_a_second_run_trains_nothing(trained, monkeypatch):
    monkeypatch.setattr(accuracy, "map_cells", lambda fn, cells, workers: iter([]) if not cells else pytest.fail())
    before = len(trained.store.read("accuracy"))
    report = trained.run()
    assert (report.measured, report.kept, report.left) == (0, 2, 0)
    assert len(trained.store.read("accuracy")) == before


@pytest.mark.parametrize(
    "missing",
    [{"recipe": {"epochs": 3}}, {"grid": [AccuracyCell("digits", "vit_digits", seed=9)]}],
    ids=["epochs", "seed"],
)
def test_other_cells_and_epochs_are_not_taken_for_trained(trained, monkeypatch, missing):
    asked = []
    monkeypatch.setattr(accuracy, "map_cells", lambda fn, cells, workers: asked.extend(cells) or iter([]))
    report = trained.run(**missing)
    assert len(asked) == len(missing.get("grid", GRID)) == report.left
    assert report.kept == 0


def test_rows_of_another_working_copy_are_not_ours(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "map_cells", lambda fn, cells, workers: iter([]))
    run = trained.store.root / ".run"
    ours = run.read_text()
    try:
        run.write_text("cloned00")
        assert trained.run().left == 2
    finally:
        run.write_text(ours)


def in_this_process(fn, cells, workers):
    """As a worker would, on one thread."""
    for cell in cells:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            result = fn(cell)
        finally:
            torch.set_num_threads(threads)
        yield cell, result


def test_remeasure_trains_again_from_the_start(trained, monkeypatch):
    monkeypatch.setattr(accuracy, "map_cells", in_this_process)
    epochs = []
    fit = accuracy.fit

    def spy(*arguments, checkpoint, **more):
        epochs.append(checkpoint.exists())
        return fit(*arguments, checkpoint=checkpoint, **more)

    monkeypatch.setattr(accuracy, "fit", spy)
    store = Store(trained.store.root.parent / "again")
    report = accuracy.run(GRID[1:], store, checkpoints=trained.checkpoints, recipe=RECIPE, remeasure=True)
    assert (report.measured, report.kept) == (1, 0)
    assert epochs == [False], "the old checkpoint is gone before training"
    again = store.read("accuracy").query("metric == 'top1'")["value"].iloc[0]
    rows = trained.store.read("accuracy")
    first = rows[(rows["metric"] == "top1") & (rows["backend"] == "supermask")]["value"].iloc[0]
    assert again == pytest.approx(first, abs=0.6), "the same seed gives the same accuracy"


def test_lost_rows_come_back_from_the_checkpoint(trained, monkeypatch, tmp_path):
    """Killed between the last epoch and the row: nothing is trained twice."""
    monkeypatch.setattr(accuracy, "map_cells", in_this_process)
    store, written = Store(tmp_path), times_of_writing(trained.checkpoints)
    report = accuracy.run(GRID, store, checkpoints=trained.checkpoints, recipe=RECIPE)
    assert report.measured == 2
    assert times_of_writing(trained.checkpoints) == written
    columns = ["backend", "metric", "epoch", "value"]
    new, old = (s.read("training").sort_values(columns)[columns].values.tolist() for s in (store, trained.store))
    assert new == old


def test_a_budget_is_kept_and_the_next_run_goes_on(monkeypatch, tmp_path):
    """Each epoch seems to last 100 s: of a budget of 250 s two fit, in which the first cell of two epochs is done."""
    monkeypatch.setattr(accuracy, "map_cells", in_this_process)
    monkeypatch.setattr(accuracy, "_epoch_seconds", {})
    now, trained, fit = 0.0, [], accuracy.fit
    monkeypatch.setattr(accuracy, "time", SimpleNamespace(monotonic=lambda: now))

    def slow(*arguments, stop, **more):
        def ask(history):
            nonlocal now
            for epoch in history.epochs:
                epoch["seconds"] = 100.0
            if stop is not None and stop(history):
                return True
            now += 100.0
            trained.append(len(history.epochs))
            return False

        return fit(*arguments, stop=ask, **more)

    monkeypatch.setattr(accuracy, "fit", slow)
    store = Store(tmp_path)
    how = {"checkpoints": tmp_path / "cache" / "checkpoints", "recipe": {"epochs": 3}}
    report = accuracy.run(GRID, store, budget_s=250, **how)
    assert (trained, report.measured, report.left) == ([0, 1], 0, 2)
    assert store.read("accuracy").empty and store.read("training").empty
    report = accuracy.run(GRID, store, budget_s=250, **how)
    assert (trained, report.measured, report.left) == ([0, 1, 2, 0], 1, 1)
    report = accuracy.run(GRID, store, budget_s=0, **how)
    assert (trained, report.measured, report.left) == ([0, 1, 2, 0], 0, 1)
    assert "left for the next run" in str(report)
    report = accuracy.run(GRID, store, **how)
    assert (trained, report.measured, report.left) == ([0, 1, 2, 0, 1, 2], 1, 0)
    assert len(store.read("training").query("metric == 'top1'")) == 6


def test_times_taken_beside_other_processes_are_not_written(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "busy_note", lambda: ["other processes held 50% of the cores"])
    monkeypatch.setattr(accuracy, "map_cells", in_this_process)
    store = Store(tmp_path)
    report = accuracy.run(GRID, store, checkpoints=trained.checkpoints, recipe=RECIPE)
    assert set(store.read("accuracy")["metric"]) == {"top1"}
    assert "other processes kept the cores busy" in str(report)


def test_masks(trained):
    random, learnt = accuracy.masks(GRID[1], trained.checkpoints, recipe=RECIPE)
    assert list(learnt) == list(random) == list(supermask_layers(GRID[1].build()))
    for name in learnt:
        assert learnt[name].dtype == bool and learnt[name].ndim == 2
        assert learnt[name].shape == random[name].shape
        assert learnt[name].sum() == random[name].sum() == num_kept(learnt[name].size, 0.5)
    assert any((learnt[name] != random[name]).any() for name in learnt)


def ten_classes(seed: int, count: int) -> np.ndarray:
    """``count`` noisy images of each of ten colours, class after class: uint8 ``(10 * count, 32, 32, 3)``."""
    rng = np.random.default_rng(seed)
    colours = np.repeat(np.arange(10) * 25, count)[:, None, None, None]
    return (colours + rng.integers(0, 6, (10 * count, 32, 32, 3))).astype(np.uint8)


TRAIN, TEST = ten_classes(0, 5), ten_classes(1, 2)


def as_folder(root: Path, suffix: str) -> Path:
    """An ImageFolder with ``TRAIN`` and ``TEST``."""
    for split, images in (("train", TRAIN), ("test", TEST)):
        for i, image in enumerate(images):
            folder = root / split / f"class{10 * i // len(images)}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:03}.{suffix}")
    return root


def as_torchvisions_files(root: Path) -> Path:
    """The same in the layout of ``torchvision.datasets.CIFAR10``."""
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name: str, images: np.ndarray, labels: list[int]) -> None:
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        (base / name).write_bytes(pickle.dumps({"data": flat, "labels": labels}))

    for i, (name, _) in enumerate(CIFAR10.train_list):
        write(name, TRAIN[10 * i : 10 * i + 10], [2 * i] * 5 + [2 * i + 1] * 5)
    write(CIFAR10.test_list[0][0], TEST, [c for c in range(10) for _ in range(2)])
    names = {"label_names": [f"class{c}" for c in range(10)]}
    (base / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(names))
    return root


def test_a_folder_and_torchvisions_files_are_trained_on_alike(monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "map_cells", in_this_process)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    grid = [AccuracyCell("cifar10", "vit_cifar_small"), AccuracyCell("cifar10", "vit_cifar_small", 32, 0.9)]
    recipe = {"epochs": 1, "batch_size": 10, "lr_warmup_epochs": 0}
    sources = {
        "files": as_torchvisions_files(tmp_path / "files"),
        "png": as_folder(tmp_path / "png", "png"),
        "jpg": as_folder(tmp_path / "jpg", "jpg"),
    }
    found, labels = {}, {}
    for name, root in sources.items():
        store, cache = Store(tmp_path / f"{name}-results"), tmp_path / "cache" / "checkpoints"
        how = {"checkpoints": cache, "data_root": str(root), "recipe": recipe}
        if name == "png":  # the same images as the files: these would be found trained
            shutil.rmtree(cache)
        assert accuracy.run(grid, store, **how).measured == 2
        assert accuracy.run(grid, store, **how).kept == 2
        rows = pd.concat([store.read(table) for table in ("accuracy", "training", "masks")])
        labels[name] = set(rows["dataset"])
        found[name] = rows[rows["metric"] != "train_seconds"][["scope", "metric", "value"]].to_numpy().tolist()
    assert labels == {"files": {"cifar10"}, "png": {"cifar10"}, "jpg": {"cifar10-jpeg"}}
    assert found["files"] == found["png"]
    assert found["jpg"] != found["png"]


def test_a_killed_run_loses_the_current_epoch_at_most(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "map_cells", in_this_process)
    epochs, fit = [], accuracy.fit

    def dying(*arguments, stop, **more):
        def die_after_one_epoch(history):
            epochs.append(len(history.epochs))
            if epochs == [0, 1]:
                raise KeyboardInterrupt
            return False

        return fit(*arguments, stop=die_after_one_epoch, **more)

    monkeypatch.setattr(accuracy, "fit", dying)
    store = Store(tmp_path)
    how = {"checkpoints": tmp_path / "cache" / "checkpoints", "recipe": RECIPE}
    with pytest.raises(KeyboardInterrupt):
        accuracy.run(GRID[1:], store, **how)
    assert store.read("accuracy").empty
    assert accuracy.run(GRID[1:], store, **how).measured == 1
    assert epochs == [0, 1, 1], "the epoch before the kill is not trained again"
    curves = [s.read("training").query("backend == 'supermask'") for s in (store, trained.store)]
    assert curves[0]["value"].tolist() == curves[1]["value"].tolist()


@pytest.mark.parametrize(
    ("device", "model", "cores", "expected"),
    [
        ("cpu", "vit_digits", 16, None),
        ("cuda", "vit_cifar", 16, 4),
        ("cuda", "vit_cifar", 2, 1),
        ("cuda", "vit_b_16", 16, 1),
    ],
)
def test_as_many_processes_as_the_device_has_use_for(monkeypatch, device, model, cores, expected):
    monkeypatch.setattr(accuracy, "usable_cores", lambda: cores)
    assert accuracy._workers(device, [AccuracyCell("cifar10", model)]) == expected


def made_up_rows(cell: AccuracyCell, top1: float, recipe: dict) -> list[dict]:
    rows = [{"experiment": "accuracy", "metric": "top1", "value": top1, "unit": "%"}]
    if cell.sparsity:
        masks = {"kept": 10.0, "kept_before": 10.0, "exchanged": 30.0}
        rows += [
            {
                "experiment": "masks",
                "scope": f"encoder.layers.encoder_layer_{i}.mlp.0",
                "metric": metric,
                "value": value,
            }
            | {"low": value, "high": value}
            for i in range(7)
            for metric, value in masks.items()
        ]
    text = losses.described("cifar10", recipe, dict(cell.variant))
    common = {"device": "made-up GPU", "recipe": text, "torch": "2"}
    return [{**cell.key(dataset="cifar10-jpeg"), **common, **row} for row in rows]


def test_the_notebook_draws_a_grid_that_was_cut_short(tmp_path):
    """Dense, 90% and 80% in blocks of 32 and one variant, of the profile cifar10: the figures show that and no more."""
    folder = checkout.root() / "notebooks"
    notebooks = pipeline.find_notebooks(folder)
    profile = pipeline.read_profile(folder / "profiles", "cifar10", notebooks)
    recipe = profile.shared["recipe"]
    dense, at90, at80 = cells("cifar10", "vit_cifar", [32], [0.9, 0.8], [0])
    (spartan,) = accuracy.variants("cifar10", "vit_cifar", 32, 0.9, [{"method": "spartan"}])
    store = Store(tmp_path / "results")
    for cell, top1 in ((dense, 90.0), (at90, 87.0), (at80, 89.5), (spartan, 88.5)):
        store.append(made_up_rows(cell, top1, recipe))
    given = {"results_dir": str(store.root), "draw_for": "made-up GPU", "dataset": "cifar10-jpeg"}
    ((chosen, values),) = pipeline.plan(notebooks, profile, only=["05_accuracy"], overrides=given)
    environment = {"BLOCKVIT_HOME": str(checkout.root()), "BLOCKVIT_FIGURES": str(tmp_path / "figures")}
    notebook.execute(chosen, values, tmp_path / "05.ipynb", environment=environment)
    drawn = {path.stem for path in (tmp_path / "figures" / "cifar10").glob("*.svg")}
    assert drawn == {"accuracy", "accuracy_variants", "mask_changes"}
    text = (tmp_path / "05.ipynb").read_text()
    assert "3 trainings in the tables" in text
    assert "not measured, seed 0: 16×16 at 50%, 60%, 70%, 80%, 85%, 90%, 95%; 32×32 at 50%, 60%, 70%, 85%, 95%;" in text
    assert "not measured, seed 1: dense;" in text
    assert "not measured: the speed of a model whose accuracy is known" in text
    assert "CIFAR-10 (JPEG), vit_cifar, 60 epochs: at 90% sparsity at most 3.0 points of top-1 are lost." in text
    assert "Dense 90.0%." in text
    assert "3.0 where 2.3 are published" in text and "the other lost 1.5 (method=spartan)" in text


def test_an_empty_grid_trains_nothing(tmp_path):
    report = accuracy.run([], Store(tmp_path), checkpoints=tmp_path / "checkpoints")
    assert (report.measured, report.kept, report.left) == (0, 0, 0)


def test_rows_carry_the_environment(trained):
    here = bench.environment("cpu")
    assert set(trained.store.read("accuracy")["device"]) == {here["device"]}
    assert set(trained.store.read("training")["torch"]) == {here["torch"]}
