from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blockvit import answers


def cells(speed: dict[tuple, float], **columns) -> pd.DataFrame:
    """Speedup rows from ``(backend, block_size, sparsity) -> speedup``."""
    rows = [
        {"model": "m", "backend": b, "block_size": n, "sparsity": s, "speedup": v, "compile": "eager", **columns}
        for (b, n, s), v in speed.items()
    ]
    return pd.DataFrame(rows).assign(speedup_low=lambda r: 0.9 * r.speedup, speedup_high=lambda r: 1.1 * r.speedup)


def accuracies(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["backend", "block_size", "sparsity", "value"])


NAN = float("nan")
TOP1 = accuracies(
    ("dense", NAN, NAN, 98.0),
    ("dense", NAN, NAN, 97.0),
    ("supermask", 8, 0.9, 96.0),
    ("supermask", 8, 0.9, 95.0),
    ("supermask", 16, 0.9, 97.5),
    ("supermask", 16, 0.5, 99.0),
)


def test_accuracy_is_told_of_the_best_and_the_worst_blocks():
    assert answers.accuracy_text(TOP1, "digits", "vit") == (
        "Yes, on digits: the dense vit reached 97.5% (mean of 2 seeds, lowest 97.0%); with 90% of the masked "
        "layers' blocks gone accuracy was 97.5% in blocks of 16×16 and 95.5% in blocks of 8×8. The lowest of "
        "all trainings is 95.0%, in blocks of 8×8 at 90%."
    )
    assert answers.accuracy_text(TOP1[:1], "digits", "vit") == (
        "On digits, the dense vit reached 98.0% (mean of 1 seed, lowest 98.0%); no masked model is trained to 90% yet."
    )
    worse = pd.concat([TOP1[:2], accuracies(("supermask", 8, 0.9, 92.4))])
    assert answers.accuracy_text(worse, "digits", "vit").startswith("In part, on digits: "), "5.1 points are lost"
    assert answers.accuracy_text(TOP1[:0], "digits", "vit") == "No dense model is trained to its end yet."


def test_masks_are_told_by_what_stayed():
    initial = {"a": np.array([[True, True, False, False]]), "b": np.array([[True, True, False, False]])}
    learnt = {"a": np.array([[True, True, False, False]]), "b": np.array([[True, False, True, False]])}
    rows = [("learnt", "a", 0.1), ("learnt", "a", 0.3), ("before training", "a", 0.2), ("before training", "a", 0.2)]
    kept = pd.DataFrame(rows, columns=["mask", "layer", "kept"])
    assert answers.masks_text(initial, learnt, kept, 8, 0.5) == (
        "At 50% in blocks of 8×8, training exchanged 25% of the blocks that a random mask had kept; 75% of the learnt "
        "mask is still the random one. The share of blocks kept varies between rows by 0.141 (standard deviation, mean "
        "of the layers), before training by 0.000."
    )
    assert answers.masks_text({}, {}, kept[:0], 8, 0.5) == ""


def overheads(unit: str, **ways: tuple[float, float]) -> pd.DataFrame:
    """Of steps at 1000 and 100 ``unit``; each way's two overheads."""
    rows = [
        {"backend": name.replace("_", "-"), "tokens": NAN, "batch_size": NAN, unit: size, "overhead": overhead}
        for name, both in ways.items()
        for size, overhead in zip((1000, 100), both, strict=True)
    ]
    rows = pd.DataFrame(rows, columns=["backend", "tokens", "batch_size", "overhead"])
    return rows.assign(overhead_low=rows["overhead"] - 0.1, overhead_high=rows["overhead"] + 0.2)


def test_steps_are_told_at_both_ends():
    steps = overheads("tokens", supermask=(0.02, 0.3), naive=(0.01, 0.6), sparse=(-0.5, 0.1), sparse_kept=(-0.75, 0))
    assert answers.step_text(steps, "3072x768") == (
        "A masked training step of 3072x768 takes longer than the dense one by 2.0% (-8% to +22%) at 1000 "
        "tokens and 30.0% (+20% to +50%) at 100 (median of the block sizes, and what the spread of the timings "
        "allows); with masks that are expanded first, by 1.0% (-9% to +21%) and 60.0% (+50% to +80%). Through "
        "block-sparse products a step was 2.0× (`sparse`), 4.0× (`sparse-kept`) as fast as the dense one at 1000 "
        "tokens."
    )
    assert answers.step_text(overheads("batch_size", supermask=(0.02, 0.3)), "vit") == (
        "A masked training step of vit takes longer than the dense one by 2.0% (-8% to +22%) at 1000 images "
        "and 30.0% (+20% to +50%) at 100 (median of the block sizes, and what the spread of the timings allows)."
    )


def test_training_is_told_as_far_as_it_went():
    steps = overheads("tokens", supermask=(0.02, 0.3))
    told = answers.training(TOP1[:2], "Masks.", steps, dataset="digits", model="vit", step_model="m")
    assert told.startswith("- On digits, the dense vit") and ".\n- Masks.\n- A masked training step of m" in told
    assert told.endswith(f"allows).\n- {answers.NO_THIRD_SPLIT}")
    told = answers.training(TOP1[:2], "", steps[:0], dataset="cifar10", model="vit", step_model="m")
    assert told.startswith("- On CIFAR-10, the dense vit reached 97.5% (mean of 2 seeds, lowest 97.0%); no masked")


def test_break_even_by_block_size():
    speed = {("a", 16, 0.5): 0.5, ("a", 16, 0.9): 0.9, ("a", 32, 0.5): 1.2, ("a", 32, 0.9): 3.0, ("a", 64, 0.9): 9.0}
    assert answers.break_even_text(cells(speed)) == "16: never, 32: already at 50%"
    between = {("a", 16, 0.5): 0.5, ("a", 16, 0.9): 2.0}
    (edge,) = [int(text.rstrip("%")) for text in [answers.break_even_text(cells(between)).removeprefix("16: ")]]
    assert 50 < edge < 90
    assert answers.break_even_text(cells({("a", 16, 0.9): 2.0})) == "", "one point is no sweep"


def test_the_worst_layer_decides_the_break_even():
    fast, slow, never = ({("a", 16, 0.5): low, ("a", 16, 0.9): high} for low, high in ((0.9, 2), (0.5, 2), (0.4, 0.8)))
    layers = [cells(speed, model=name) for speed, name in ((fast, "1x1"), (slow, "2x2"), (never, "3x3"))]
    assert (
        answers.break_evens(pd.concat(layers[:2])) == answers.break_evens(layers[1]) != answers.break_evens(layers[0])
    )
    assert answers.break_evens(pd.concat(layers)) == {16: "never"}


@pytest.mark.parametrize("column", ["tokens", "batch_size"])
def test_no_break_even_over_several_sizes(column):
    both = pd.concat([cells({("a", 16, 0.5): 0.5, ("a", 16, 0.9): 2.0}, **{column: n}) for n in (197, 1576)])
    with pytest.raises(ValueError, match=f"one {column} at a time"):
        answers.break_even_text(both)


def test_linear_summary_tells_of_each_backend():
    speed = {("a", 16, 0.5): 0.5, ("a", 16, 0.9): 2.0, ("b", 16, 0.9): 0.5, ("b", 32, 0.9): 1.5, ("b", 64, 0.9): 2.5}
    table = answers.linear_summary(cells(speed))
    assert list(table.index) == ["a", "b"]
    assert table.loc["b"].tolist() == ["2 of 3", "1.50×", "0.50× to 2.50×", ""], "one sparsity is no sweep"
    assert (
        table.loc["a", "break-even, 16×16"] == answers.break_evens(cells(speed).query("backend == 'a'"), log=True)[16]
    )


def test_linear_summary_does_without_that_sparsity_and_without_blocks():
    table = answers.linear_summary(cells({("2:4", NAN, 0.5): 1.25}))
    assert table.to_dict("index") == {"2:4": {"cells faster": "1 of 1"}}


def test_model_summary_takes_the_fastest_way_to_run_a_cell():
    eager = cells({("a", 16, 0.9): 1.2, ("a", 32, 0.9): 1.1}, scope="mlp")
    compiled = cells({("a", 32, 0.9): 1.5}, scope="mlp").assign(compile="max-autotune")
    table = answers.model_summary(pd.concat([eager, compiled]), {"mlp": 0.5})
    assert table.to_dict("index") == {
        ("mlp", "a"): {
            "best at 90%": "1.50×",
            "spread": "1.35× to 1.65×",
            "with": "blocks of 32, max-autotune",
            "Amdahl's law": "1.82×",
        }
    }


def test_model_summary_tells_break_evens():
    speed = {("a", 16, 0.5): 1.1, ("a", 16, 0.9): 2.0, ("a", 32, 0.5): 0.5, ("a", 32, 0.9): 0.9}
    (line,) = answers.model_summary(cells(speed, scope="mlp"), {"mlp": 0.5}).to_dict("records")
    assert line["with"] == "blocks of 16"
    assert [line[f"break-even, {block}×{block}"] for block in (16, 32)] == ["already at 50%", "never"]


def test_model_summary_leaves_out_what_was_not_measured_there():
    assert answers.model_summary(cells({("2:4", NAN, 0.5): 1.2}, scope="mlp"), {"mlp": 0.5}).empty


def test_model_table():
    key = {"batch_size": 64, "low": 0.01, "high": 0.03}
    rows = pd.DataFrame(
        [
            {"backend": "dense", "compile": "eager", "metric": "latency", "value": 0.02, **key},
            {"backend": "dense", "compile": "eager", "metric": "model_bytes", "value": 4e6, **key},
            {"backend": "torch", "compile": "cudagraph", "metric": "latency", "value": 0.016, **key},
        ]
    )
    table = answers.model_table(rows)
    assert list(table.index) == [("torch", "cudagraph"), ("dense", "eager")], "fastest first"
    assert table.loc[("dense", "eager"), ["ms", "images/s", "weights MB"]].tolist() == [20.0, 3200.0, 4.0]
    assert table.loc[("torch", "cudagraph"), "weights MB"] == "" and "peak MB" not in table


def test_batch_line_names_the_best():
    rows = cells({("a", 16, 0.9): 1.2, ("b", 16, 0.9): 1.4}, batch_size=16)
    small = cells({("a", 16, 0.9): 0.8}, batch_size=1)
    assert answers.batch_line(pd.concat([rows, small])) == "0.80× (1, a), 1.40× (16, b)"


@pytest.mark.parametrize("empty", [cells({("a", 16, 0.9): 1.0}, batch_size=1, scope="mlp").iloc[:0]])
def test_nothing_measured_says_nothing(empty):
    assert answers.batch_line(empty) == "" == answers.break_even_text(empty)
    assert answers.linear_summary(empty).empty and answers.model_summary(empty, {}).empty


def test_trade_takes_what_is_surely_fastest_not_what_was_luckiest():
    points = pd.DataFrame(
        [(0.1, 1.43, 1.07, 1.68, 16.0), (0.3, 1.40, 1.35, 1.44, 32.0), (2.5, 1.90, 1.80, 2.00, 64.0)],
        columns=["lost", "speedup", "speedup_low", "speedup_high", "block_size"],
    ).assign(sparsity=0.9, backend="cpu")
    text = answers.trade_text(points, 256)
    assert "at batch 256 is 1.40× as fast" in text and "(spread 1.35× to 1.44×; `cpu`, blocks of 32, 90%)." in text
    slow = points.assign(speedup=0.9, speedup_low=0.8)
    assert answers.trade_text(slow, 1).endswith("no faster, its layers are too short to repay the gathering.")
    assert answers.trade_text(points[2:], 1) == "No masked model whose speed was measured lost less than 2 points."
    assert answers.trade_text(points[:0], 1) == ""
