from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blockvit import answers


def cells(speed: dict[tuple, float], **columns) -> pd.DataFrame:
    """Speedup rows from ``(backend, block_size, sparsity) -> speedup``."""
    rows = [
        {"backend": b, "block_size": n, "sparsity": s, "speedup": v, "compile": "eager", **columns}
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
        "On digits, the dense vit reached 97.5% (mean of 2 seeds, lowest 97.0%). With 90% of the blocks gone, 97.5% "
        "was left in blocks of 16×16 and 95.5% in blocks of 8×8."
    )
    assert answers.accuracy_text(TOP1[:1], "digits", "vit").endswith("reached 98.0% (mean of 1 seed, lowest 98.0%).")
    assert answers.accuracy_text(TOP1[:0], "digits", "vit") == "No dense model is trained to its end yet."


def test_masks_are_told_by_what_stayed():
    initial = {"a": np.array([[True, True, False, False]]), "b": np.array([[True, True, False, False]])}
    learnt = {"a": np.array([[True, True, False, False]]), "b": np.array([[True, False, True, False]])}
    rows = [("learnt", "a", 0.1), ("learnt", "a", 0.3), ("before training", "a", 0.2), ("before training", "a", 0.2)]
    kept = pd.DataFrame(rows, columns=["mask", "layer", "kept"])
    assert answers.masks_text(initial, learnt, kept, 8, 0.5) == (
        "At 50% in blocks of 8×8, training exchanged 25% of the blocks that a random mask had kept; 75% of the learnt "
        "mask is still the random one. The share of blocks kept varies between rows by 0.141 (standard deviation, mean "
        "of the layers), 0.000 before training."
    )
    assert answers.masks_text({}, {}, kept[:0], 8, 0.5) == ""


def overheads(unit: str, **ways: tuple[float, float]) -> pd.DataFrame:
    """Of steps at 1000 and 100 ``unit``; each way's two overheads."""
    rows = [
        {"backend": name.replace("_", "-"), "tokens": NAN, "batch_size": NAN, unit: size, "overhead": overhead}
        for name, both in ways.items()
        for size, overhead in zip((1000, 100), both, strict=True)
    ]
    return pd.DataFrame(rows, columns=["backend", "tokens", "batch_size", "overhead"])


def test_steps_are_told_at_both_ends():
    steps = overheads("tokens", supermask=(0.02, 0.3), naive=(0.01, 0.6), sparse=(-0.5, 0.1), sparse_kept=(-0.75, 0))
    assert answers.step_text(steps, "3072x768") == (
        "A masked training step of 3072x768 took 2.0% longer than the dense one at 1000 tokens and 30.0% at 100 "
        "(median of the block sizes); masks that are expanded first, 1.0% and 60.0%. Through block-sparse products a "
        "step was 2.0× (`sparse`), 4.0× (`sparse-kept`) as fast as the dense one at 1000 tokens."
    )
    assert answers.step_text(overheads("batch_size", supermask=(0.02, 0.3)), "vit") == (
        "A masked training step of vit took 2.0% longer than the dense one at 1000 images and 30.0% at 100 (median of "
        "the block sizes)."
    )


def test_training_is_told_as_far_as_it_went():
    steps = overheads("tokens", supermask=(0.02, 0.3))
    told = answers.training(TOP1[:2], "Masks.", steps, dataset="digits", model="vit", step_model="m")
    assert told.startswith("On digits, the dense vit") and ". Masks. A masked training step of m" in told
    assert told.endswith(f"sizes). {answers.NO_THIRD_SPLIT}")
    told = answers.training(TOP1[:2], "", steps[:0], dataset="cifar10", model="vit", step_model="m")
    assert told == "On CIFAR-10, the dense vit reached 97.5% (mean of 2 seeds, lowest 97.0%)."


def test_break_even_by_block_size():
    speed = {("a", 16, 0.5): 0.5, ("a", 16, 0.9): 0.9, ("a", 32, 0.5): 1.2, ("a", 32, 0.9): 3.0, ("a", 64, 0.9): 9.0}
    assert answers.break_even_text(cells(speed)) == "16: never, 32: at 50% or below"
    between = {("a", 16, 0.5): 0.5, ("a", 16, 0.9): 2.0}
    (edge,) = [int(text.rstrip("%")) for text in [answers.break_even_text(cells(between)).removeprefix("16: ")]]
    assert 50 < edge < 90
    assert answers.break_even_text(cells({("a", 16, 0.9): 2.0})) == "", "one point is no sweep"


@pytest.mark.parametrize("column", ["tokens", "batch_size"])
def test_no_break_even_over_several_sizes(column):
    both = pd.concat([cells({("a", 16, 0.5): 0.5, ("a", 16, 0.9): 2.0}, **{column: n}) for n in (197, 1576)])
    with pytest.raises(ValueError, match=f"one {column} at a time"):
        answers.break_even_text(both)


def test_linear_lines_tell_of_each_backend():
    speed = {("a", 16, 0.5): 0.5, ("a", 16, 0.9): 2.0, ("b", 16, 0.9): 0.5, ("b", 32, 0.9): 1.5, ("b", 64, 0.9): 2.5}
    a, b = answers.linear_lines(cells(speed))
    assert a.startswith(
        "- `a`: 1 of 2 cells are faster than dense; at 90% the median speedup is 2.00× (2.00× to 2.00×)"
    )
    assert "Break-even sparsity" in a
    assert b == "- `b`: 2 of 3 cells are faster than dense; at 90% the median speedup is 1.50× (0.50× to 2.50×)."


def test_linear_lines_do_without_that_sparsity_and_without_blocks():
    (line,) = answers.linear_lines(cells({("2:4", float("nan"), 0.5): 1.25}))
    assert line == "- `2:4`: 1 of 1 cells are faster than dense."


def test_model_lines_take_the_fastest_way_to_run_a_cell():
    eager = cells({("a", 16, 0.9): 1.2, ("a", 32, 0.9): 1.1}, scope="mlp")
    compiled = cells({("a", 32, 0.9): 1.5}, scope="mlp").assign(compile="max-autotune")
    (line,) = answers.model_lines(pd.concat([eager, compiled]), {"mlp": 0.5})
    assert "at 90% at best 1.50× (20% to 80%: 1.35× to 1.65×) with blocks of 32, max-autotune; by Amdahl's law" in line
    assert "1.82×" in line
    assert "Break-even" not in line


def test_model_lines_leave_out_what_was_not_measured_there():
    assert list(answers.model_lines(cells({("2:4", float("nan"), 0.5): 1.2}, scope="mlp"), {"mlp": 0.5})) == []


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
    assert pd.isna(table.loc[("torch", "cudagraph"), "weights MB"]) and "peak MB" not in table


def test_batch_line_names_the_best():
    rows = cells({("a", 16, 0.9): 1.2, ("b", 16, 0.9): 1.4}, batch_size=16)
    small = cells({("a", 16, 0.9): 0.8}, batch_size=1)
    assert answers.batch_line(pd.concat([rows, small])) == "0.80× (1, a), 1.40× (16, b)"


@pytest.mark.parametrize("empty", [cells({("a", 16, 0.9): 1.0}, batch_size=1, scope="mlp").iloc[:0]])
def test_nothing_measured_says_nothing(empty):
    assert answers.batch_line(empty) == "" == answers.break_even_text(empty)
    assert list(answers.linear_lines(empty)) == [] == list(answers.model_lines(empty, {}))
