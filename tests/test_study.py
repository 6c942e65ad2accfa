from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from blockvit import bench, checkout, machine
from blockvit.study import Study

GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("BLOCKVIT_RESULTS", "BLOCKVIT_FIGURES", "BLOCKVIT_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def row(**changes) -> dict:
    return {
        "experiment": "linear",
        "device": machine.cpu_name(),
        "backend": "gather",
        "sparsity": 0.9,
        "metric": "latency",
        "value": 1.0,
        **changes,
    }


def test_paths_of_the_working_copy():
    study = Study.open("laptop")
    home = checkout.root()
    assert study.store.root == home / "data" / "results"
    assert study.figures == home / "figures" / "laptop"
    assert study.cache == home / "data" / "cache"


def test_paths_from_the_environment(monkeypatch, tmp_path):
    for name in ("RESULTS", "FIGURES", "CACHE"):
        monkeypatch.setenv(f"BLOCKVIT_{name}", str(tmp_path / name.lower()))
    study = Study.open("gpu", results_dir=None)
    assert study.store.root == tmp_path / "results"
    assert study.figures == tmp_path / "figures" / "gpu"
    assert study.cache == tmp_path / "cache"


def test_the_parameter_wins_over_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKVIT_RESULTS", str(tmp_path / "environment"))
    study = Study.open("laptop", results_dir=str(tmp_path / "given" / "results"))
    assert study.store.root == tmp_path / "given" / "results"
    assert study.cache == tmp_path / "given" / "cache"


def test_cuda_where_there_is_none_is_refused(no_gpu):
    with pytest.raises(RuntimeError, match=r"device is 'cuda:0', but PyTorch finds no CUDA device.*PROFILE=laptop"):
        Study.open("gpu", "cuda:0")


def test_drawing_for_a_device_needs_no_such_device(no_gpu, tmp_path):
    study = Study.open("gpu", "cuda", str(tmp_path / "results"), draw_for=GPU)
    assert not study.measures
    assert study.device_name == GPU
    study.store.append([row(device=GPU, value=2.0), row()])
    assert study.rows("linear")["value"].tolist() == [2.0]
    assert study.describe() == f"profile gpu on {GPU}; torch {machine.versions()['torch']}"


def test_measuring_is_the_default(tmp_path):
    study = Study.open("laptop", results_dir=str(tmp_path))
    assert study.measures and study.device_name == machine.cpu_name()
    line = study.describe()
    assert line == (
        f"profile laptop on {machine.cpu_name()}, {bench.environment('cpu')['threads']} threads; "
        f"torch {machine.versions()['torch']}"
    )


def test_rows_are_narrowed(tmp_path):
    study = Study.open("laptop", results_dir=str(tmp_path / "results"))
    study.store.append([row(), row(sparsity=0.8), row(backend="torch"), row(device=GPU), row(experiment="vit")])
    assert len(study.rows("linear")) == 3
    assert study.rows("linear", sparsity=0.9)["backend"].tolist() == ["gather", "torch"]
    assert study.rows("linear", sparsity=[0.9, 0.8], backend="gather")["sparsity"].tolist() == [0.9, 0.8]
    assert study.rows("linear", sparsity=(0.8,)).index.tolist() == [0]
    assert study.rows("linear", backend="none").empty
    assert study.rows("accuracy", metric="top1").empty


def test_rows_of_another_run_stay_where_this_one_measured_nothing_like_them(tmp_path):
    study = Study.open("laptop", results_dir=str(tmp_path / "results"))
    study.store.append([row(value=1.0), row(value=1.0, sparsity=0.8)])
    (study.store.root / ".run").write_text("another0")
    study.store.append([row(value=2.0)])
    assert study.rows("linear", sparsity=0.9)["value"].tolist() == [2.0], "another machine may bear the same name"
    assert study.rows("linear", sparsity=0.8)["value"].tolist() == [1.0]


def test_a_cpu_is_judged_by_all_its_threads(tmp_path):
    study = Study.open("laptop", results_dir=str(tmp_path / "results"))
    study.store.append([row(threads=1, value=9.0), row(threads=4, value=2.0), row(threads=2, value=5.0)])
    assert study.rows("linear")["value"].tolist() == [2.0]
    assert study.rows("linear", threads=[1, 2])["value"].tolist() == [9.0, 5.0]


def test_a_gpu_has_no_threads(tmp_path, no_gpu):
    study = Study.open("gpu", "cuda", str(tmp_path / "results"), draw_for=GPU)
    study.store.append([row(device=GPU, threads=None), row(device=GPU, threads=None, sparsity=0.8)])
    assert len(study.rows("linear")) == 2


def test_an_unknown_column_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="colour"):
        Study.open("laptop", results_dir=str(tmp_path)).rows("linear", colour="red")


def test_save(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKVIT_FIGURES", str(tmp_path))
    study = Study.open("laptop", results_dir=str(tmp_path / "results"))
    figure, _ = plt.subplots()
    assert study.save(figure, "name") is figure
    assert sorted(p.name for p in (tmp_path / "laptop").iterdir()) == ["name.png", "name.svg"]
