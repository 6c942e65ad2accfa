import math

import pandas as pd
import pytest

from blockvit.results import IMAGES_PER_SECOND, STEP_SECONDS, Store
from blockvit.train import cost, days_on_nodes, grid_cost

SETUP = {"device": "a GPU", "model": "vit_b_16", "precision": "bf16", "batch_size": 256, "compile": "eager"}
RATE = {**SETUP, "metric": IMAGES_PER_SECOND, "unit": "1/s"}


def row(value, block_size=None, sparsity=None, backend="supermask", **changes):
    backend = "dense" if block_size is None else backend
    return {**RATE, "backend": backend, "block_size": block_size, "sparsity": sparsity, "value": value, **changes}


ROWS = pd.DataFrame(
    [
        *(row(value) for value in (1000.0, 1200.0, 1100.0)),
        row(1000.0, 32, 0.9),
        row(900.0, 32, 0.5),
        row(1050.0, 64, 0.9),
        row(10.0, 32, 0.9, backend="naive"),
        row(0.2, 32, 0.9, metric=STEP_SECONDS),
    ]
)


def test_the_published_grid_takes_what_was_measured():
    rows = pd.concat([ROWS, pd.DataFrame([row(800.0, 16, 0.9)])])
    costs = grid_cost(rows)
    assert len(costs) == 1 + 3 * 7
    dense = costs.iloc[0]
    assert math.isnan(dense["block_size"]) and dense["images_per_s"] == 1100 and dense["measured"]
    assert dense["gpu_hours"] == pytest.approx(300 * 1_281_167 / 1100 / 3600)
    speeds = costs.set_index(["block_size", "sparsity"])["images_per_s"]
    assert speeds[32, 0.9] == 1000
    assert speeds[32, 0.8] == 900  # not measured: the slowest of its block size
    assert set(costs["block_size"].dropna()) == {16, 32, 64}
    assert costs["measured"].sum() == 1 + 2 + 1 + 1
    assert costs["gpu_hours"].sum() == pytest.approx(
        sum(300 * 1_281_167 / speed / 3600 for speed in costs["images_per_s"])
    )


def test_a_smaller_grid():
    costs = grid_cost(ROWS, block_sizes=[64], sparsities=[0.9], epochs=3600, images=1050)
    assert costs["gpu_hours"].tolist() == pytest.approx([1050 / 1100, 1.0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[3:], "no training speed of the dense model was measured"),
        (ROWS, "no training speed of block size 16 was measured"),
        (ROWS.assign(value=0.0), r"images per second are \[0.0.*expected positive numbers"),
        (ROWS.assign(value=math.nan), "expected positive numbers"),
        (
            pd.concat([ROWS, ROWS.assign(precision="fp32")]),
            r"rows are of precision \['bf16', 'fp32'\]",
        ),
    ],
)
def test_what_was_not_measured_is_not_made_up(rows, message):
    with pytest.raises(ValueError, match=message):
        grid_cost(rows)


def test_trainings_are_dealt_out_to_nodes():
    costs = pd.DataFrame({"gpu_hours": [240.0, 240.0, 240.0, 480.0]})
    assert days_on_nodes(costs, nodes=1, gpus_per_node=1) == pytest.approx(50)
    assert days_on_nodes(costs, nodes=2, gpus_per_node=1) == pytest.approx(30)  # 480 + 240, and 240 + 240
    assert days_on_nodes(costs, nodes=2, gpus_per_node=10) == pytest.approx(3)
    assert days_on_nodes(costs, nodes=2, gpus_per_node=10, efficiency=0.5) == pytest.approx(6)
    assert days_on_nodes(costs, nodes=9, gpus_per_node=1) == pytest.approx(20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes is 0; expected at least 1"),
        ({"gpus_per_node": 0}, "gpus_per_node is 0; expected at least 1"),
        ({"efficiency": 0.0}, r"efficiency is 0.0; expected a fraction in \(0, 1\]"),
        ({"efficiency": 1.1}, "efficiency is 1.1"),
    ],
)
def test_clusters_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        days_on_nodes(pd.DataFrame({"gpu_hours": [1.0]}), **{"nodes": 1} | changes)


def test_the_readme_tells_the_fastest_whole_setup_of_each_gpu(tmp_path):
    store = Store(tmp_path)
    common = {"experiment": "training_step", "group": "g", "repeats": 3}
    whole = [{"block_size": b, "sparsity": 0.9, "value": 1000.0} for b in (16, 32, 64)]
    store.append({**RATE, "backend": "supermask", **common, **r} for r in whole)
    store.append([{**RATE, "backend": "dense", "value": 1100.0, **common}])
    slower = [{**r, "value": 500.0, "batch_size": 64} for r in whole]
    store.append({**RATE, "backend": "supermask", **common, **r} for r in slower)
    store.append([{**RATE, "backend": "dense", "value": 5000.0, "batch_size": 64, **common}])
    store.append([{**RATE, "backend": "dense", "value": 9000.0, "batch_size": 512, **common}])  # no supermasks: no grid
    (line,) = cost.readme(store).splitlines()
    hours = 300 * 1_281_167 / 3600 * (21 / 1000 + 1 / 1100)
    assert line.startswith("- a GPU, bf16, batches of 256, eager: 1,100 images/s dense, 1,000 with supermasks.")
    assert f"costs {hours:,.0f} GPU-hours" in line


def test_the_readme_does_not_extrapolate_from_a_cpu(tmp_path):
    store = Store(tmp_path)
    cells = [{"backend": "dense"}, *({"backend": "supermask", "block_size": b, "sparsity": 0.9} for b in (16, 32, 64))]
    store.append({**RATE, "experiment": "training_step", "group": "g", "threads": 4, "value": 2.0, **c} for c in cells)
    assert cost.readme(store).startswith("No GPU has measured")
