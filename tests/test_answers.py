from __future__ import annotations

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
