from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tidy_rows import dense, row

from blockvit import comparisons
from blockvit.comparisons import break_even, newest, speedups, step_overheads
from blockvit.results import COLUMNS, KEYS, STEP_SECONDS, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


# --- speedups --------------------------------------------------------------------------------------------------------


def table(*rows: dict) -> pd.DataFrame:
    frame = pd.DataFrame([row(date="2026-01-01T00:00:00Z") | r for r in rows])
    return frame.reindex(columns=COLUMNS)


def test_speedup_is_dense_time_over_sparse_time_with_its_range():
    (pair,) = speedups(table(dense(), {})).to_dict("records")
    assert pair["speedup"] == pytest.approx(2.0 / 0.5)
    assert pair["speedup_low"] == pytest.approx(1.8 / 0.6)
    assert pair["speedup_high"] == pytest.approx(2.4 / 0.4)
    assert (pair["backend"], pair["dense_value"], pair["dense_compile"]) == ("gather", 2.0, "eager")


@pytest.mark.parametrize(
    "changes", [{"group": "b"}, {"precision": "tf32"}, {"experiment": "vit"}, {"metric": "memory"}], ids=str
)
def test_only_latencies_of_one_group_and_precision_are_compared(changes):
    assert speedups(table(dense(**changes), {})).empty


def test_rows_without_a_group_are_not_compared():
    assert speedups(table(dense(group="", model="1x1"), {"group": ""})).empty


def test_each_group_and_precision_has_its_own_baseline():
    rows = table(
        dense(),
        dense(group="b", value=8.0),
        dense(precision="bf16", value=1.0),
        {},
        {"group": "b", "batch_size": 8},
        {"precision": "bf16"},
    )
    pairs = speedups(rows)
    found = {(p["group"], p["precision"]): p["speedup"] for p in pairs.to_dict("records")}
    assert found == {("a", "fp32"): 4.0, ("b", "fp32"): 16.0, ("a", "bf16"): 2.0}


def test_fastest_baseline_against_eager_baseline():
    rows = table(dense(), dense(compile="inductor", value=1.0), {})
    (fastest,) = speedups(rows).to_dict("records")
    assert (fastest["speedup"], fastest["dense_compile"]) == (2.0, "inductor")
    (eager,) = speedups(rows, baseline="eager").to_dict("records")
    assert (eager["speedup"], eager["dense_compile"]) == (4.0, "eager")
    assert speedups(table(dense(compile="inductor"), {}), baseline="eager").empty


def test_step_overheads_are_over_the_dense_step_of_the_same_group_and_mode():
    masked = {"backend": "supermask", "metric": STEP_SECONDS, "value": 1.1, "low": 1.0, "high": 1.3}
    times = {"metric": STEP_SECONDS, "value": 1.0, "low": 0.8, "high": 1.25}
    rows = table(
        dense(**times),
        dense(**{**times, "value": 2.0}, compile="compile"),
        dense(**{**times, "value": 9.0}, group="other"),
        dense(**{**times, "metric": "images_per_second"}),
        masked,
        {**masked, "compile": "compile"},
        {**masked, "group": "", "model": "1x1"},
    )
    eager, compiled = step_overheads(rows).to_dict("records")
    assert eager["overhead"] == pytest.approx(0.1) and eager["dense_value"] == 1.0
    assert (eager["overhead_low"], eager["overhead_high"]) == pytest.approx((1.0 / 1.25 - 1, 1.3 / 0.8 - 1))
    assert compiled["overhead"] == pytest.approx(1.1 / 2 - 1)


def test_unknown_baseline():
    with pytest.raises(ValueError, match="baseline is 'slowest'; expected 'fastest' or 'eager'"):
        speedups(table(dense(), {}), baseline="slowest")


def test_the_newest_measurement_wins_whatever_the_versions():
    old = {"date": "2026-01-01T00:00:00Z", "torch": "2.11"}
    new = {"date": "2026-02-01T00:00:00Z", "torch": "2.12", "group": "b"}
    pairs = speedups(table(dense(**new), {**new, "value": 1.0}, dense(**old), old))
    assert pairs["speedup"].tolist() == [2.0]


def times(rows: pd.DataFrame, **how) -> list[float]:
    return speedups(rows, **how)["speedup"].tolist()


def test_of_one_run_the_measurement_beside_the_right_field_and_of_the_most_repeats_counts():
    engines = [dense(group="engines"), dense(group="engines", compile="openvino", value=1.0), {"group": "engines"}]
    alone = [dense(group="alone", value=3.0, date="2026-02-01T00:00:00Z"), {"group": "alone"}]
    assert times(table(*engines, *alone)) == [2.0], "over the fastest of the most"
    assert times(table(*alone, *engines), baseline="eager") == [6.0], "over eager beside the fewest"
    often = [dense(group="often", value=4.0, repeats=100), {"group": "often", "repeats": 100}]
    assert times(table(*often, *alone)) == [8.0], "more repeats before newer ones"
    assert times(table(*often, *[{**r, "run": "another"} for r in alone])) == [6.0], "a newer run before all that"


def test_the_fullest_group():
    small = [dense(group="small", date="2026-02-01T00:00:00Z"), {"group": "small"}]
    large = [dense(group="large"), dense(group="large", compile="openvino"), {"group": "large"}]
    often = [{**r, "group": "often", "repeats": 100} for r in large]
    bytes_held = {"group": "large", "metric": "model_bytes"}

    def fullest(*rows: dict) -> set[str]:
        return set(comparisons.fullest_group(table(*({"run": "one"} | r for r in rows)))["group"])

    assert fullest(*large, *small) == {"large"} and fullest(*often, *large, *small) == {"often"}
    assert fullest(*large, *[{**r, "run": "another"} for r in small]) == {"small"}, "the newest run"
    whole = comparisons.fullest_group(table(*({"run": "one"} | r for r in (*large, bytes_held))))
    assert whole["metric"].nunique() == 2, "all of its rows"
    assert comparisons.fullest_group(table(*large)[:0]).empty


def test_newest_keeps_what_differs_in_any_key_but_versions():
    rows = table({"seed": 0}, {"seed": 1}, {"seed": 1, "value": 7.0, "triton": "3.6"}, {"seed": None}, {"seed": None})
    assert newest(rows)["value"].tolist() == [0.5, 7.0, 0.5]
    for column in set(KEYS) - {"torch", "triton"}:
        assert len(newest(table({column: 1}, {column: 2}))) == 2, column


def test_speedups_of_an_empty_table(store):
    assert speedups(store.read("linear")).empty
    assert "speedup" in speedups(store.read("linear")).columns


def test_speedups_of_a_table_read_back(store):
    store.append([row(**dense()), row(), row(sparsity=0.8, value=1.0)])
    assert speedups(store.read("linear"))["speedup"].tolist() == [4.0, 2.0]


# --- break-even ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "speedup", "expected"),
    [
        ([0.5, 0.7, 0.9], [0.2, 0.5, 0.9], None),
        ([0.5, 0.7, 0.9], [1.2, 1.5, 1.9], 0.5),
        ([0.5, 0.7, 0.9], [0.6, 0.9, 1.1], 0.8),
        ([0.9, 0.5, 0.7], [1.1, 0.6, 0.9], 0.8),  # unsorted
        ([0.5, 0.6, 0.7, 0.9], [1.2, 1.1, 0.9, 1.1], 0.8),  # dips below again: the last crossing counts
        ([0.5, 0.7, 0.9], [0.5, 1.0, 1.5], 0.7),  # 1 is not yet faster
        ([0.5, 0.7, 0.9], [1.5, 1.2, 0.9], None),  # not above 1 at the end
        ([0.9], [1.5], 0.9),
        ([0.9], [1.0], None),
        ([], [], None),
    ],
)
def test_break_even(sparsity, speedup, expected):
    found = break_even(sparsity, speedup)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_break_even_on_a_logarithmic_axis():
    assert break_even([0.5, 0.9], [0.25, 4.0], log=True) == pytest.approx(0.7), "halfway, as 1/4 and 4 are as far off"
    assert break_even([0.5, 0.9], [0.25, 4.0]) == pytest.approx(0.5 + 0.4 * 0.75 / 3.75)
    for log in (False, True):  # where a measured point stands at 1, and where nothing is interpolated, they agree
        assert break_even([0.5, 0.7, 0.9], [0.5, 1.0, 1.5], log=log) == pytest.approx(0.7)
        assert break_even([0.5, 0.9], [1.2, 1.5], log=log) == 0.5
        assert break_even([0.5, 0.9], [1.2, 0.9], log=log) is None


def test_break_even_leaves_its_arguments_alone():
    sparsity, speedup = [0.9, 0.5], [1.5, 0.5]
    break_even(sparsity, speedup)
    assert (sparsity, speedup) == ([0.9, 0.5], [1.5, 0.5])
