"""Goals: what counts as reached, worked out by hand from small tables."""

import math

import pandas as pd
import pytest
import synthetic_gpu

from blockvit import goals, results
from blockvit.results import COLUMNS

FLOP = 2 * 1576 * 3072 * 768


def row(backend, value, *, group="g", experiment="linear", **key):
    found = dict.fromkeys(COLUMNS)
    found |= {"experiment": experiment, "group": group, "backend": backend, "value": value, "low": value, "high": value}
    found |= {"metric": "latency", "precision": "fp32", "compile": "eager", "date": "2026-01-01T00:00:00Z", "run": "r"}
    return found | key


def table(rows):
    return pd.DataFrame(list(rows), columns=COLUMNS).astype(dict.fromkeys(results.NUMBERS, float))


def layer(group, *, model="3072x768", tokens=197, block=32, sparsity=0.9, dense=14.0, **times):
    key = {"group": group, "model": model, "tokens": tokens}
    yield row("dense", dense, **key)
    for backend, value in times.items():
        yield row(backend, value, block_size=block, sparsity=sparsity, **key)


def found(list_of_goals, start, against=""):
    (goal,) = [g for g in list_of_goals if g.case.startswith(start) and against in g.against]
    return goal


def on_cpu(linear=(), vit=(), ceiling=()):
    return goals.on_cpu(table(linear), table(vit), table(ceiling))


def test_over_another_backend_the_newest_of_a_cell_counts():
    old = [r | {"date": "2025-01-01T00:00:00Z"} for r in layer("old", cpu=1.0, torch=2.0)]
    new = [*layer("new", cpu=1.0, torch=40.0), *layer("64", block=64, cpu=1.0, torch=50.0)]
    assert found(on_cpu([*old, *new]), LINEAR, "BSR").measured == 40.0


LINEAR = "linear layers of the MLP, 197 tokens, 90%, blocks of 32"


def test_the_worst_cell_decides():
    rows = [*layer("a", cpu=1.0), *layer("b", block=64, cpu=0.7), *layer("c", model="768x3072", cpu=0.5)]
    goal = found(on_cpu(rows), LINEAR, "eager")
    assert goal.measured == 14.0 and goal.met
    worse = [*rows, *layer("d", model="768x3072", block=64, cpu=1.01)]
    goal = found(on_cpu(worse), LINEAR, "eager")
    assert goal.measured == pytest.approx(14 / 1.01) and goal.met is False
    assert list(goals.missed(on_cpu(worse))) == [f"- {LINEAR} and 64, against dense, eager PyTorch: 13.86× of 14.00×"]


def test_other_blocks_sparsities_and_precisions_do_not_count():
    rows = [*layer("a", block=16, cpu=1.0), *layer("b", sparsity=0.8, cpu=1.0)]
    rows += [dict(r, precision="bf16") for r in layer("c", cpu=1.0)]
    assert found(on_cpu(rows), LINEAR, "eager").measured is None


def test_another_backend_is_compared_within_its_group_only():
    goal = found(on_cpu([*layer("a", cpu=1.0, torch=30.0), *layer("b", block=64, cpu=1.0)]), LINEAR, "BSR")
    assert goal.measured == 30.0 and goal.met
    assert found(on_cpu([*layer("a", cpu=1.0), *layer("b", torch=30.0)]), LINEAR, "BSR").measured is None


def test_break_even_is_the_highest_edge_over_the_fastest_engine():
    rows = []
    for sparsity, value in ((0.0, 20.0), (0.2, 10.0), (0.9, 1.0)):
        rows += layer(f"s{sparsity}", sparsity=sparsity, dense=14.0, cpu=value)
        rows += layer(f"t{sparsity}", model="768x3072", sparsity=sparsity, dense=50.0, cpu=value)
        rows += [row("dense", 12.0, group=f"s{sparsity}", model="3072x768", tokens=197, compile="openvino")]
    goal = found(on_cpu(rows), "break-even sparsity, 197 tokens, blocks of 32")
    # over 12: 0.6 at 0, 1.2 at 0.2; on a logarithmic axis the line between them crosses 1 here
    crossing = 0.2 * math.log(1 / 0.6) / math.log(1.2 / 0.6)
    assert (
        goal.measured == pytest.approx(crossing) and goal.met and goal.text(goal.measured) == f"{100 * crossing:.3g}%"
    )


def test_never_faster_is_a_break_even_of_all():
    rows = [r for s in (0.5, 0.9) for r in layer(f"s{s}", sparsity=s, dense=1.0, cpu=2.0)]
    goal = found(on_cpu(rows), "break-even sparsity, 197 tokens, blocks of 32")
    assert goal.measured == 1.0 and goal.met is False


def test_a_model_counts_the_faster_of_its_two_ways():
    key = {"experiment": "vit", "model": "vit_b_16", "batch_size": 1}
    rows = [row("dense", 4.0, **key), row("dense", 3.8, compile="onnxruntime", **key)]
    for backend, value in {"cpu": 3.0, "cpu+dense": 2.0}.items():
        rows.append(row(backend, value, scope="mlp", block_size=64, sparsity=0.9, **key))
    assert found(on_cpu(vit=rows), "ViT-B/16, batch 1, MLP").measured == pytest.approx(1.9)


def test_arithmetic_is_a_share_of_the_multiply_adds_in_registers():
    rows = layer("a", tokens=1576, sparsity=0.0, cpu=FLOP / 80e9)
    ceiling = [row("dense", 100e9, experiment="ceiling", metric="fma_throughput")]
    goal = found(on_cpu(rows, ceiling=ceiling), "arithmetic of the kernel at 0%")
    assert goal.measured == pytest.approx(0.8) and goal.met
    assert found(on_cpu(layer("a", tokens=1576, sparsity=0.0, cpu=1.0)), "arithmetic of the kernel at 0%").met is None


def test_nothing_measured_is_neither_reached_nor_missed():
    for nothing in (on_cpu(), goals.on_gpu(table([]), table([]), table([]))):
        shown = goals.table(nothing)
        assert len(shown) > 10 and set(shown["reached"]) == {"not measured"} and set(shown["measured"]) == {""}
        assert not list(goals.missed(nothing))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    store = synthetic_gpu.fill(results.Store(tmp_path_factory.mktemp("results")))
    return {name: store.read(name) for name in ("linear", "vit", "ceiling")}


def test_every_goal_of_a_gpu_is_measured_by_the_profiles_grid(gpu):
    reached = goals.on_gpu(**gpu)
    left_out = [goal.case for goal in reached if goal.met is None]
    assert left_out == ["ViT-B/16, batch 256, MLP at 90%, blocks of 64, tf32"], "end to end, tf32 is a parameter"


def test_the_memory_floor_is_bytes_at_copy_bandwidth(gpu):
    linear = gpu["linear"]
    cell = (linear["model"] == "3072x768") & (linear["tokens"] == 50432) & (linear["precision"] == "bf16")
    cell &= (linear["backend"] == "triton") & (linear["sparsity"] == 0.9) & (linear["block_size"] == 64)
    kept = 58 * 64 * 64  # 576 - round(0.9 * 575) blocks
    moved = 2 * (50432 * (3072 + 768) + kept + 3072) + 4 * 58
    share = moved / synthetic_gpu.BANDWIDTH / float(linear.loc[cell, "value"].iloc[0])
    goal = found(goals.on_gpu(**gpu), "linear 3072x768, 50432 tokens, bf16, 90%, blocks of 64")
    assert goal.measured == pytest.approx(share)


def test_a_kernel_that_is_slower_in_one_cell_misses_every_layer(gpu):
    linear = gpu["linear"].copy()
    assert found(goals.on_gpu(**gpu), "every linear layer", "torchao").met
    place = linear[linear["backend"] == "torchao"].index[7]
    linear.loc[place, "value"] = 1e-9
    assert found(goals.on_gpu(linear, gpu["vit"], gpu["ceiling"]), "every linear layer", "torchao").met is False


def test_how_many_were_reached():
    def goal(measured):
        return goals.Goal("case", "against", 2.0, measured)

    assert goals.text([goal(2.5), goal(1.5), goal(None)]) == "1 of 2 goals were reached; 1 were not measured."
    assert goals.text([goal(2.0)]) == "1 of 1 goals were reached."
