"""What the README says by hand of the tables is what they hold."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from blockvit import headline, losses
from blockvit.comparisons import over_strongest_field, speedups, where
from blockvit.results import Store

ROOT = Path(__file__).parents[1]
STORE = Store(ROOT / "data" / "results")
README = (ROOT / "README.md").read_text()
PROFILES = ROOT / "notebooks" / "profiles"
TWELVE_EPOCHS, FORTY_EIGHT_EPOCHS = (
    yaml.safe_load((PROFILES / f"{profile}.yaml").read_text())["all"]["recipe"]
    for profile in ("cifar10_cpu", "cifar10_cpu_long")
)
HERE = {"dataset": "cifar10-jpeg", "block_size": 32, "sparsity": 0.9}
UNTAUGHT = "epochs=6 method=magnitude sparsity_schedule=cubic start=dense"
TAUGHT = f"distillation_alpha=0.5 {UNTAUGHT}"


def test_accuracies_from_a_trained_model():
    rows = STORE.read("accuracy")
    cells = where(losses.points_lost(losses.of_recipe(rows, TWELVE_EPOCHS)), **HERE).set_index("variant")
    rows = losses.with_variants(losses.of_recipe(where(rows, **HERE), TWELVE_EPOCHS))
    one_seed = where(rows, variant=UNTAUGHT, seed=0, metric="top1")["value"].iloc[0]
    assert cells.loc[[TAUGHT, UNTAUGHT], "seeds"].tolist() == [1, 2]
    assert f"{cells.loc['', 'top1']:.1f}" == f"{cells.loc[losses.FROZEN, 'top1']:.1f}", "learnt as random"
    told = re.search(r"\*\*No run shows yet .*?\n\n", README, re.DOTALL)[0]
    held = [cells.loc[UNTAUGHT, "top1"], cells.loc[TAUGHT, "top1"], one_seed, cells.loc["", "top1"]]
    assert re.findall(r"(\d+\.\d)%", told) == [f"{top1:.1f}" for top1 in (*held, cells.loc[TAUGHT, "dense_top1"])]


def test_what_longer_training_brings_back():
    rows = STORE.read("accuracy")
    short, long = (
        where(losses.points_lost(losses.of_recipe(rows, recipe)), **HERE).set_index("variant")
        for recipe in (TWELVE_EPOCHS, FORTY_EIGHT_EPOCHS)
    )
    assert long.loc["", ["seeds", "dense_seeds"]].tolist() == [1, 1]
    (told,) = re.findall(r"Trained four times as long .*?\n\n", README, re.DOTALL)
    held = [long.loc["", "dense_top1"], long.loc["", "top1"], long.loc["", "lost"], short.loc["", "lost"]]
    apart, error = losses.difference(long.loc[""], long.loc[losses.FROZEN])
    held += [long.loc[losses.FROZEN, "top1"], apart]
    assert abs(apart) < 2 * error, "no difference yet"
    assert re.findall(r"\d+\.\d", told) == [f"{number:.1f}" for number in held]


def test_rounds_behind_a_speedup():
    repeats = headline.fastest(STORE).groupby("scope")["repeats"].agg(["min", "max"])
    rounds = {"few": repeats.drop("all")["min"].min(), "most": repeats.drop("all")["max"].max(), **repeats.loc["all"]}
    assert "({few:.0f} to {most:.0f} rounds; {min:.0f} where all".format(**rounds) in README
    assert rounds["min"] == rounds["max"]


def test_the_small_model_with_its_mlp_sparse():
    rows = over_strongest_field(speedups(where(STORE.read("vit"), model="vit_cifar", batch_size=1)))
    best = where(rows, scope="mlp", sparsity=0.9).groupby(["device", "precision"])["speedup"].max()
    assert f"it is {best.min():.1f}× to {best.max():.1f}×\nas fast as the fastest dense engine" in README
