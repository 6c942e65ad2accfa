from __future__ import annotations

import pytest
from test_claims import CPU, vit

from blockvit import headline
from blockvit.results import Store

XEON = {"device": "Other CPU (8 cores)", "threads": 8}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


def cells(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]


def test_nothing_measured(store):
    assert headline.markdown(store) == "No speed of a whole ViT-B/16 is in the tables yet.\n"


def test_milliseconds_and_speedups_over_the_fastest_dense_engine(store):
    dense = {"eager": 0.2, "openvino": 0.1}
    store.append(vit(32, 0.9, 1, dense=dense, cpu=4.0, torch=0.5) + vit(64, 0.9, 1, dense=dense, scope="all", cpu=8.0))
    store.append(vit(32, 0.9, 1, dense={"eager": 0.2}, cpu=50.0))  # beside one engine only: a weaker field
    store.append(vit(32, 0.9, 1, dense={"eager": 0.4}, where=XEON, precision="bf16", cpu=2.0))
    store.append(vit(16, 0.9, 1, dense=dense, cpu=9.0) + vit(32, 0.9, 8, dense=dense, cpu=9.0))  # none of the table's
    head, _, eager, fastest, mlp, every = cells(headline.markdown(store))
    assert head == ["One image", f"{CPU['device']}, fp32", f"{XEON['device']}, bf16", "points lost, published"]
    assert eager == ["dense, eager PyTorch", "200 ms", "400 ms", ""]
    assert fastest == ["dense, the fastest engine", "100 ms", "400 ms", ""]
    assert mlp == [
        "MLP, 90% in blocks of 32",
        "50.0 ms, **2.00×** (1.96–2.04)",
        "200 ms, **2.00×** (1.96–2.04)",
        "2.3",
    ]
    assert every == [
        "all linear layers, 90% in blocks of 64",
        "25.0 ms, **4.00×** (3.92–4.08)",
        "",
        "none published",
    ]


def test_the_sparse_layers_alone_stand_below_the_whole_model_on_the_kernel(store):
    ways = {"cpu": 1.5, "cpu+dense": 2.0}
    store.append(vit(32, 0.9, 1, **ways) + vit(64, 0.9, 1, scope="all", **ways))
    rows = vit(32, 0.8, 1, cpu=1.5)
    rows += [{**row, "group": rows[0]["group"]} for row in vit(32, 0.8, 1, backend_compile="compile", cpu=1.8)[1:]]
    store.append(rows)
    found = {name: cell for name, cell, _ in cells(headline.markdown(store))[4:]}
    assert list(found) == [
        "MLP, 80% in blocks of 32",
        "MLP, 90% in blocks of 32",
        "MLP, 90% in blocks of 32; the other layers in PyTorch",
        "all linear layers, 90% in blocks of 64",
    ]
    assert ["2.00×" in cell for cell in found.values()] == [False, True, False, True]
    assert found["MLP, 80% in blocks of 32"] == "556 ms, compiled, **1.80×** (1.76–1.84)"


def test_what_the_kernel_gives_without_sparsity_stands_among_the_dense(store):
    store.append(vit(32, 0.9, 1, cpu=2.0) + vit(32, 0.0, 1, scope="none", where=XEON, **{"cpu+dense": 1.25}))
    _, _, _, _, ours, mlp = cells(headline.markdown(store))
    assert ours == ["dense, on our kernel", "", "800 ms, **1.25×** (1.23–1.28)", ""]
    assert mlp[0] == "MLP, 90% in blocks of 32" and mlp[2] == ""


def test_the_way_that_is_surely_fastest_counts(store):
    lucky = vit(32, 0.9, 1, gather=3.0, width=0.6)
    store.append(lucky + [{**row, "group": lucky[0]["group"]} for row in vit(32, 0.9, 1, cpu=2.0)[1:]])
    assert "2.00×" in headline.markdown(store) and "3.00×" not in headline.markdown(store)


def test_the_posts_batch_has_a_table_of_its_own(store):
    store.append(vit(64, 0.8, 256, cpu=1.5) + vit(64, 0.9, 256, cpu=1.5) + vit(64, 0.9, 1, cpu=1.5))
    one, many = headline.markdown(store).split("\n\n")
    assert cells(one)[0][0] == "One image" and cells(many)[0][0] == "A batch of 256"
    assert cells(many)[-1][0] == "MLP, 90% in blocks of 64" and cells(many)[-1][-1] == "19.0"


def test_a_cpu_is_told_of_with_all_its_threads(store):
    store.append(vit(64, 0.9, 1, cpu=9.0, where={**CPU, "threads": 1}) + vit(64, 0.9, 1, cpu=1.5))
    assert "1.50×" in headline.markdown(store) and "9.00×" not in headline.markdown(store)
