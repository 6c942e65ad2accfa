from __future__ import annotations

import pandas as pd
import pytest

from blockvit import answers, losses, results

BASE = {
    "experiment": "accuracy",
    "device": "cpu",
    "dataset": "cifar10-jpeg",
    "model": "vit_cifar",
    "recipe": "cifar10 epochs=60",
    "metric": "top1",
    "scope": "mlp+out_proj+head",
    "date": "2026-01-01T00:00:00Z",
}


def table(*rows: dict) -> pd.DataFrame:
    return results._typed(pd.DataFrame([{**BASE, **row} for row in rows], columns=results.COLUMNS))


def dense(value: float, seed: int = 0, **more) -> dict:
    return {"backend": "dense", "scope": "dense", "value": value, "seed": seed, **more}


def masked(value: float, block_size: int = 32, sparsity: float = 0.9, seed: int = 0, **more) -> dict:
    cell = {"backend": "supermask", "block_size": block_size, "sparsity": sparsity}
    return {**cell, "value": value, "seed": seed, **more}


def test_a_recipe_is_described_and_taken_apart_again():
    text = losses.described("cifar10", {"epochs": 60, "amp": True}, {"scores_lr": 0.01, "method": "spartan"})
    assert text == "cifar10 amp=True epochs=60 + method=spartan scores_lr=0.01"
    rows = losses.with_variants(pd.DataFrame({"recipe": [text, "digits"]}))
    assert rows["recipe"].tolist() == ["cifar10 amp=True epochs=60", "digits"]
    assert rows["variant"].tolist() == ["method=spartan scores_lr=0.01", ""]


def test_rows_of_a_recipe():
    rows = pd.DataFrame({"recipe": ["cifar10", "cifar10 epochs=6", "cifar10 epochs=6 + method=spartan"]})
    assert losses.of_recipe(rows, {}).index.tolist() == [0]
    assert losses.of_recipe(rows, {"epochs": 6}).index.tolist() == [1, 2]
    empty = losses.of_recipe(rows.iloc[:0], {"epochs": 6})
    assert empty.empty and list(empty) == ["recipe"]


def test_points_lost_are_against_the_mean_of_the_dense_seeds():
    lost = losses.points_lost(table(dense(90.0), dense(92.0, 1), masked(88.0), masked(87.0, seed=1))).iloc[0]
    assert (lost["lost"], lost["seeds"], lost["dense_seeds"]) == (3.5, 2, 2)
    assert (lost["low"], lost["high"], lost["dense_top1"]) == (87.0, 88.0, 91.0)


@pytest.mark.parametrize("column", ["dataset", "model", "recipe"])
def test_models_are_compared_only_with_their_own_dense_one(column):
    lost = losses.points_lost(table(dense(90.0), masked(88.0), dense(99.0, **{column: "other"})))
    assert lost["lost"].tolist() == [2.0]
    assert losses.points_lost(table(dense(90.0), masked(88.0, **{column: "other"}))).empty


def test_variants_are_cells_of_their_own_against_the_reference_dense_model():
    variant = {"recipe": "cifar10 epochs=60 + method=spartan"}
    lost = losses.points_lost(table(dense(90.0), masked(88.0), masked(89.0, **variant)))
    assert dict(zip(lost["variant"], lost["lost"], strict=True)) == {"": 2.0, "method=spartan": 1.0}
    assert losses.reference(lost)["lost"].tolist() == [2.0]
    decayed = dense(95.0, recipe="cifar10 epochs=60 + weight_decay=0.05")
    assert losses.points_lost(table(dense(90.0), decayed, masked(88.0)))["lost"].tolist() == [2.0]


def test_what_begins_with_a_trained_model_is_compared_with_a_dense_one_that_does():
    on = "cifar10 epochs=60 + start=dense"
    tuned = masked(91.0, recipe="cifar10 epochs=60 + method=magnitude start=dense")
    assert losses.points_lost(table(dense(90.0), tuned)).empty
    lost = losses.points_lost(table(dense(90.0), dense(93.0, recipe=on), masked(88.0), tuned))
    assert dict(zip(lost["variant"], lost["lost"], strict=True)) == {"": 2.0, "method=magnitude start=dense": 2.0}
    assert lost["dense_top1"].tolist() == [90.0, 93.0]


def test_the_newest_row_of_a_training_counts():
    again = masked(85.0, date="2026-02-01T00:00:00Z")
    assert losses.points_lost(table(dense(90.0), again, masked(88.0)))["lost"].tolist() == [5.0]


def test_nothing_lost_without_a_table():
    assert losses.points_lost(table()).empty and losses.beside_published(losses.points_lost(table())).empty


def test_beside_published():
    """The target: at 32x32 no more lost than the 0.75 points at 80% and the 2.3 at 90% that are published."""
    cells = [masked(89.25, sparsity=0.8), masked(87.6), masked(80.0, 64), masked(89.0, sparsity=0.5)]
    beside = losses.beside_published(losses.points_lost(table(dense(90.0), *cells)))
    found = {(r.block_size, r.sparsity): (round(r.lost, 2), round(r.published, 2)) for r in beside.itertuples()}
    assert found == {(32, 0.8): (0.75, 0.75), (32, 0.9): (2.4, 2.3), (64, 0.9): (10.0, 18.98)}


def test_uncertainty_is_at_least_that_of_two_shares_of_the_test_images_however_many_seeds():
    lost = losses.points_lost(table(dense(90.0), masked(80.0)))
    assert losses.uncertainty(lost).tolist() == pytest.approx([100 * ((0.9 * 0.1 + 0.8 * 0.2) / 10_000) ** 0.5])
    twice = losses.points_lost(table(dense(90.0), dense(90.0, seed=1), masked(80.0), masked(80.0, seed=1)))
    assert losses.uncertainty(twice).iloc[0] == pytest.approx(losses.uncertainty(lost).iloc[0]), "the same images"
    assert losses.uncertainty(lost.assign(dataset="mine")).isna().all()


def test_uncertainty_grows_with_what_seeds_differ_by_pooled_over_the_cells_of_a_sparsity():
    other = {"recipe": "cifar10 epochs=60 + method=spartan"}
    rows = [dense(90.0), masked(80.0), masked(86.0, seed=1), masked(84.0, **other), masked(88.0, 64, 0.5)]
    lost = losses.points_lost(table(*rows))
    assert lost["seed_variance"].dropna().tolist() == [18.0, 18.0]  # of 80 and 86; also where there is one seed
    reference, spartan = (lost[(lost["sparsity"] == 0.9) & (lost["variant"] == v)] for v in ("", "method=spartan"))
    of_dense, of_83, of_84 = (top1 * (100 - top1) / 10_000 for top1 in (90, 83, 84))
    assert losses.uncertainty(reference).tolist() == pytest.approx([(18 / 2 + of_83 + of_dense) ** 0.5])
    assert losses.uncertainty(spartan).tolist() == pytest.approx([(18 + of_84 + of_dense) ** 0.5])
    points, error = losses.difference(spartan.iloc[0], reference.iloc[0])
    assert (points, error) == (pytest.approx(1.0), pytest.approx((18 / 2 + 18 + of_83 + of_84) ** 0.5))


def test_missing_cells_are_named():
    variant = masked(88.0, recipe="cifar10 epochs=60 + method=x", seed=1)
    rows = losses.top1(table(dense(90.0), masked(88.0), variant))
    assert losses.missing(rows, [32], [0.9], [0]) == {}
    assert losses.missing(rows, [16, 32], [0.9, 0.8], [0]) == {0: ["16×16 at 90%, 80%", "32×32 at 80%"]}
    assert losses.missing(rows, [32], [0.9], [0, 1]) == {1: ["dense", "32×32 at 90%"]}


@pytest.mark.parametrize(
    ("dataset", "recipe", "expected"),
    [
        ("cifar10-jpeg", "cifar10 epochs=6 lr_warmup_epochs=1", "CIFAR-10 (JPEG), m, 6 epochs"),
        ("cifar10", "cifar10 lr_warmup_epochs=1", "CIFAR-10, m"),
        ("digits", "digits", "digits, m"),
    ],
)
def test_setting(dataset, recipe, expected):
    assert losses.setting(dataset, "m", recipe) == expected


def test_answer():
    frozen = {"recipe": f"cifar10 epochs=60 + {losses.FROZEN}"}
    better = {"recipe": "cifar10 epochs=60 + method=spartan"}
    lost = losses.points_lost(table(dense(90.0), masked(87.0), masked(86.0, **frozen), masked(89.0, **better)))
    text = answers.accuracy_lost(losses.reference(lost))
    assert text.startswith("Dense 90.0%.") and "3.0 at 90%" in text
    assert "3.0 where 2.3 are published (32×32, 90%)" in text
    text = answers.learning(lost)
    assert "the reference method lost 3.0 points, the best of 2 others lost 1.0 (method=spartan); one standard" in text
    error = 100 * ((0.87 * 0.13 + 0.86 * 0.14) / 10_000) ** 0.5
    assert text.endswith(
        "Masks left as they were drawn lost 4.0: that learning them helps is shown (one standard error of the "
        f"difference is {error:.1f} points)."
    )
    above = losses.points_lost(table(dense(90.0), masked(87.0), masked(91.0, **better)))
    assert "the other gained 1.0 (method=spartan); one" in answers.learning(above)
    close = losses.points_lost(table(dense(90.0), masked(87.0), masked(86.9, **frozen)))
    assert "lost 3.1: that learning them helps is not shown (" in answers.learning(close)
    assert ", which does not tell the two apart: one standard" in answers.learning(close)
    assert answers.learning(losses.reference(lost)) == "" == answers.learning(losses.points_lost(table()))
    assert answers.accuracy_lost(lost.iloc[:0]).startswith("No masked model")


def test_answer_opens_with_what_the_speed_costs():
    lost = losses.points_lost(table(dense(90.0), masked(87.0), masked(89.0, sparsity=0.8)))
    point = {"speedup": 1.4, "speedup_low": 1.3, "speedup_high": 1.5, "backend": "cpu"}
    points = lost[["block_size", "sparsity", "lost"]].assign(**point)
    how = {"setting": "CIFAR-10, m", "batch_size": 256}
    line, empty, *items = answers.accuracy(lost, lost, points, missing=True, **how).splitlines()
    assert line == (
        "CIFAR-10, m: at 90% sparsity at most 3.0 points of top-1 are lost; of the models that lost less than 2 points "
        "the surely fastest (highest low end of the spread) is 1.40× as fast as eager dense PyTorch."
    )
    assert not empty and [item.partition("**")[2].partition("**")[0] for item in items] == ["Accuracy.", "Speed."]
    assert items[0].endswith("they are named above.")
    nothing = answers.accuracy(lost[:0], lost[:0], points[:0], missing=False, **how)
    assert nothing.startswith("CIFAR-10, m: not known; no masked model at 90%")


def test_answer_tells_apart_what_began_with_the_trained_dense_model():
    on = "cifar10 epochs=60 + epochs=6 start=dense"
    ways = [
        masked(90.5, recipe="cifar10 epochs=60 + epochs=6 method=magnitude start=dense"),
        masked(91.0, recipe="cifar10 epochs=60 + distillation_alpha=0.5 epochs=6 method=magnitude start=dense"),
    ]
    lost = losses.points_lost(table(dense(90.0), dense(92.0, recipe=on), masked(87.0), *ways))
    text = answers.learning(lost)
    assert "others" not in text, "trained for longer, they are not compared with the reference method"
    assert (
        "Masks put on the trained dense model lost 1.0 at 90% in blocks of 32, against that model trained on for "
        in text
    )
    assert "for as long (92.0%), the best of 2 ways (distillation_alpha=0.5 epochs=6 method=magnitude); one " in text
