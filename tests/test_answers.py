from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tidy_rows import dense, row

from blockvit import answers
from blockvit.answers.trainings import _ACTS_WITH
from blockvit.claims import FAILS, HOLDS, OPEN, VERDICT
from blockvit.train import recipe_for


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
        "Yes, on digits, where at most 5 points lost count as yes: the dense vit reached 97.5% (mean of 2 seeds, "
        "lowest 97.0%); with 90% of the masked layers' blocks gone accuracy was 97.5% in blocks of 16×16 and 95.5% "
        "in blocks of 8×8. The lowest of "
        "all trainings is 95.0%, in blocks of 8×8 at 90%."
    )
    assert answers.accuracy_text(TOP1[:1], "digits", "vit") == (
        "On digits, the dense vit reached 98.0% (mean of 1 seed, lowest 98.0%); no masked model is trained to 90% yet."
    )
    worse = pd.concat([TOP1[:2], accuracies(("supermask", 8, 0.9, 92.4))])
    assert answers.accuracy_text(worse, "digits", "vit").startswith("In part, on digits, "), "5.1 points are lost"
    assert answers.accuracy_text(TOP1[:0], "digits", "vit") == "No dense model is trained to its end yet."


def test_masks_are_told_by_what_changed():
    initial = {"a": np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool), "b": np.array([[1, 1, 0, 0], [0, 0, 0, 1]], bool)}
    learnt = {"a": np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool), "b": np.array([[1, 0, 1, 0], [0, 0, 0, 1]], bool)}
    assert answers.masks_text(initial, learnt, 8, 0.5) == (
        "At 50% in blocks of 8×8, training changed 14% of a random mask; rows keep as uneven a share of blocks as "
        "before (standard deviation 0.088, before 0.088)."
    )
    uneven = {**learnt, "a": np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)}
    assert "rows keep a less even share of blocks than before" in answers.masks_text(initial, uneven, 8, 0.5)
    assert "rows keep a more even share of blocks than before" in answers.masks_text(uneven, initial, 8, 0.5)
    assert answers.masks_text({}, {}, 8, 0.5) == ""


def test_kept_by_row():
    masks = {"a": np.array([[True, False], [True, True]])}
    kept = answers.kept_by_row({"a": ~masks["a"]}, masks)
    assert kept.to_dict("list") == {
        "layer": ["a"] * 4,
        "mask": ["before training"] * 2 + ["learnt"] * 2,
        "kept": [0.5, 0.0, 0.5, 1.0],
    }
    assert list(answers.kept_by_row({}, {})) == ["layer", "mask", "kept"]


def test_layers_have_short_names():
    names = [
        "encoder.layers.encoder_layer_3.self_attention.out_proj",
        "encoder.layers.encoder_layer_0.mlp.3",
        "heads.head",
    ]
    short = answers.short_names(dict.fromkeys(names, np.ones((1, 1))))
    assert list(short) == ["layer 3 out_proj", "layer 0 mlp.3", "heads head"]


def test_a_recipe_shows_what_acts():
    shown = answers.recipe_in_force(vars(recipe_for("digits")))
    assert {
        "epochs": 12,
        "lr_warmup_decay": 0.01,
        "bias_weight_decay": 0.0,
        "clip_grad_norm": 1.0,
    }.items() <= shown.items()
    off = {"seed", "mixup_alpha", "ra_magnitude", "model_ema_decay", "amp_dtype", "sparsity_end", "scores_lr", "lr_min"}
    assert not off & set(shown)
    changed = vars(recipe_for("digits", amp=True, sparsity_schedule="cubic", auto_augment="ra", lr_warmup_epochs=0))
    shown = answers.recipe_in_force(changed)
    assert (shown["amp_dtype"], shown["sparsity_end"], shown["ra_magnitude"]) == ("bf16", 0.5, 9)
    assert "lr_warmup_decay" not in shown
    assert set(_ACTS_WITH) | set(_ACTS_WITH.values()) <= set(changed)


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
        "A masked training step of 3072x768 takes longer than the dense one by 2% (-8% to +22%) at 1000 tokens and by "
        "30% (+20% to +50%) at 100, by block size (in brackets, what the spread of the timings allows); with masks "
        "that are expanded first, by 1% (-9% to +21%) and 60% (+50% to +80%). Through "
        "block-sparse products a step was 2.0× (`sparse`) and 4.0× (`sparse-kept`) as fast as the dense one at 1000 "
        "tokens, 0.9× and 1.0× at 100."
    )
    assert answers.step_text(overheads("batch_size", supermask=(0.02, 0.3)), "vit") == (
        "A masked training step of vit takes longer than the dense one by 2% (-8% to +22%) at 1000 images and by "
        "30% (+20% to +50%) at 100, by block size (in brackets, what the spread of the timings allows)."
    )
    blocks = pd.concat([overheads("tokens", supermask=cost) for cost in ((0.02, 0.3), (0.05, 1.1))])
    assert "by 2% to 5% (-8% to +25%) at 1000 tokens and by 30% to 110% (+20% to +130%)" in answers.step_text(
        blocks, "m"
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
    assert answers.break_even_text(cells(speed)) == "16: never, 32: ≤ 50%"
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
    assert [line[f"break-even, {block}×{block}"] for block in (16, 32)] == ["≤ 50%", "never"]


def test_a_way_to_run_that_few_sparsities_have_bends_no_break_even():
    eager = cells({("a", 16, 0.5): 0.5, ("a", 16, 0.7): 0.8, ("a", 16, 0.9): 1.2}, scope="mlp")
    compiled = cells({("a", 16, 0.7): 1.1, ("a", 16, 0.9): 1.5}, scope="mlp").assign(compile="compile")
    (line,) = answers.model_summary(pd.concat([eager, compiled]), {"mlp": 0.5}).to_dict("records")
    assert line["best at 90%"] == "1.50×" and line["break-even, 16×16"] == "80%"


def test_model_summary_leaves_out_what_was_not_measured_there():
    assert answers.model_summary(cells({("2:4", NAN, 0.5): 1.2}, scope="mlp"), {"mlp": 0.5}).empty


@pytest.mark.parametrize(("threads", "peak"), [(4, False), (None, True)])
def test_model_table(threads, peak):
    key = {"batch_size": 64, "low": 0.01, "high": 0.03, "threads": threads}
    rows = pd.DataFrame(
        [
            {"backend": "dense", "compile": "eager", "metric": "latency", "value": 0.02, **key},
            {"backend": "dense", "compile": "eager", "metric": "model_bytes", "value": 4e6, **key},
            {"backend": "dense", "compile": "eager", "metric": "peak_memory", "value": 2e6, **key},
            {"backend": "torch", "compile": "cudagraph", "metric": "latency", "value": 0.016, **key},
        ]
    )
    table = answers.model_table(rows)
    assert list(table.index) == [("torch", "cudagraph"), ("dense", "eager")], "fastest first"
    assert table.loc[("dense", "eager"), ["ms", "images/s", "weights MB"]].tolist() == [20.0, 3200.0, 4.0]
    assert table.loc[("torch", "cudagraph"), "weights MB"] == ""
    assert ("peak MB" in table) == peak, "on a CPU it is no measurement"


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


# --- which rows -------------------------------------------------------------------------------------------------------


def test_rows_are_narrowed_beside_the_dense_ones():
    rows = pd.DataFrame([row(**dense()), row(), row(sparsity=0.5), row(block_size=64)])
    assert answers.where(rows, sparsity=0.9, block_size=[32, 64]).index.tolist() == [1, 3]
    assert answers.with_dense(rows, sparsity=0.9, block_size=32).index.tolist() == [0, 1]


def test_groups_with_one_and_with_most_dense_variants():
    of_b = [row(**dense(group="b")), row(**dense(group="b", compile="openvino")), row(group="b")]
    assert answers.timed_alone(pd.DataFrame([row(**dense()), row(), *of_b]))["group"].tolist() == ["a", "a"]
    speedups = pd.DataFrame({"dense_variants": [1, 4, 2, 4]})
    assert answers.beside_most_engines(speedups).index.tolist() == [1, 3]


AT = {"run": "r", "date": "2026-01-01"}


def test_a_cell_comes_with_what_it_was_timed_in_turn_with():
    fuller = [row(**dense(**AT)), row(**AT), row(backend="cpu", **AT)]
    rows = pd.DataFrame([*fuller, row(**dense(group="b", **AT)), row(group="b", backend="cpu", **AT)])
    found = answers.timed_together(rows, rows[rows["backend"] != "dense"])
    assert found["group"].tolist() == ["a"] * 3, "the dense row too"
    assert answers.timed_together(rows, rows[:0]).empty


def test_threads_are_told_of_one_group_each_without_what_is_compiled():
    rows = [row(**dense(threads=n, group=g, scope="dense", **AT)) for n, g in ((1, "a"), (4, "b"), (4, "c"))]
    rows += [row(threads=n, group=g, scope="mlp", **AT) for n, g in ((1, "a"), (4, "b"), (4, "c"))]
    rows += [row(threads=4, group="b", scope="mlp", backend="cpu", **AT)]
    others = [{"compile": "compile", "group": "c"}, {"block_size": 64, "group": "d"}]
    rows += [row(threads=4, scope="mlp", **other, **AT) for other in others]
    found = answers.by_threads(pd.DataFrame(rows), block_size=32)
    assert sorted(found["group"]) == ["a", "a", "b", "b", "b"]
    assert set(found["compile"]) == {"eager"}


def test_the_fastest_speed_stands_beside_what_was_lost():
    speed = cells({("a", 16, 0.9): 1.2, ("b", 16, 0.9): 1.4, ("a", 32, 0.9): 2.0}, low=0.1, high=0.2)
    lost = pd.DataFrame(
        [(16, 0.9, 97.0, 96.0, 98.0, 1.0)], columns=["block_size", "sparsity", "top1", "low", "high", "lost"]
    )
    (point,) = answers.with_speed(lost, speed).to_dict("records")
    assert (point["backend"], point["speedup"], point["top1"], point["low"], point["high"]) == (
        "b",
        1.4,
        97.0,
        96.0,
        98.0,
    )


# --- notebook by notebook ---------------------------------------------------------------------------------------------


def test_conversion():
    difference = {"fold_difference": 0.0, "convert_difference": 9.5e-7, "load_difference": 0.0}
    fates = pd.DataFrame({"fate": ["converted", "padded", "dense", "dense"]})
    cost = {"convert_seconds": 0.15, "load_seconds": 0.06, "dense_load_seconds": 0.2}
    cost |= {"dense_bytes": 346e6, "sparse_bytes": 72e6, "file_bytes": 38e6}
    how = {"model": "small", "large_model": "vit", "block_size": 32, "sparsity": 0.9}
    told = answers.conversion(difference, fates, cost, **how).splitlines()
    assert told == [
        "- Folding changed no logit, saving and loading changed no logit; the block-sparse product sums in another "
        "order "
        "and differs by 9.5e-07.",
        "- Of the 4 layers of small, 1 were converted, 1 padded, 2 left dense.",
        "- With every linear layer at 90% in blocks of 32, vit went from 346 MB to 72 MB in memory, as the backend "
        "holds "
        "it, and 38 MB on disk. Converting took 0.15 s, once; loading takes 0.06 s, that of a dense checkpoint 0.20 s.",
    ]
    del cost["dense_load_seconds"]
    text = answers.conversion({**difference, "fold_difference": 0.5}, fates, cost, **how)
    assert text.startswith("- Folding changed logits by up to 0.5, saving") and text.endswith("loading takes 0.06 s.")


def layer_speedups(backend: str, edges: dict[int, tuple[float, float]], variants: int = 1) -> pd.DataFrame:
    speed = {(backend, block, s): v for block, both in edges.items() for s, v in zip((0.5, 0.9), both, strict=True)}
    return cells(speed, tokens=197, dense_variants=variants).assign(model="3072x768")


def test_a_linear_layer_is_faster_from_where_on():
    ours = layer_speedups("cpu", {16: (1.2, 5.0), 32: (1.5, 5.0)})
    torch = layer_speedups("torch", {16: (0.2, 0.5), 32: (0.1, 0.5)})
    beside = layer_speedups("cpu", {16: (0.5, 5.0), 32: (0.8, 5.0)}, variants=4)
    edges = sorted(answers.break_evens(beside, log=True).values())
    assert answers.linear(pd.concat([ours, torch]), beside, "torch") == (
        "through `cpu` the slowest layer beats eager dense PyTorch: at every sparsity measured (from 50% on); the "
        f"fastest of 4 dense engines (timed for 3072x768): from {edges[0]} to {edges[1]} sparsity on, by block size. "
        "Through `torch`, PyTorch's own kernels: never (0 of 4 cells are faster)."
    )
    mixed = layer_speedups("cpu", {16: (0.2, 0.5), 32: (1.5, 5.0)})
    assert answers.linear(mixed, beside.assign(dense_variants=1), "torch") == (
        "through `cpu` the slowest layer beats eager dense PyTorch: in blocks of 16 never, in blocks of 32 at every "
        "sparsity measured (from 50% on)."
    )
    assert answers.linear(torch, beside, "torch").startswith("through `torch`, PyTorch's own kernels: never (")
    assert answers.linear(ours[:0], beside, "torch") == "no block-sparse layer is in the tables yet."


def test_a_whole_model_is_told_by_what_is_sparse():
    both = pd.concat([cells({("cpu", 32, 0.9): 3.0}, scope="all"), cells({("cpu", 64, 0.9): 1.5}, scope="mlp")])
    assert answers.whole_model(both) == (
        "the MLP at 90%: 1.50× (spread 1.35× to 1.65×; `cpu`, blocks of 64); all linear layers at 90%, a shape for "
        "which "
        "no accurate model is known: 3.00× (spread 2.70× to 3.30×; `cpu`, blocks of 32)"
    )
    assert answers.whole_model(both[:0]) == ""


def test_memory_is_told_beside_that_of_the_dense_model():
    held = {"metric": "model_bytes", "scope": "mlp"}
    rows = [row(**dense(**held | {"value": 346e6})), row(**held, value=165e6), row(**held, value=9e6, sparsity=0.95)]
    assert answers.memory_line(pd.DataFrame(rows)) == (
        "With the MLP at 90% the model holds 165 MB `gather`; dense it holds 346 MB."
    )
    assert answers.memory_line(pd.DataFrame(rows[1:])) == "" == answers.memory_line(pd.DataFrame(rows[:1]))


def on_cpu(speed: dict[tuple, float], scope: str, **columns) -> pd.DataFrame:
    told = {"device": "CPU", "precision": "fp32", "dense_compile": "openvino", "dense_value": 0.06, "value": 0.03}
    return cells(speed, scope=scope, **told, **columns)


def test_a_device_is_answered_for_the_mlp_first():
    models = [on_cpu({("cpu", 64, 0.9): 1.6}, "mlp"), on_cpu({("cpu", 64, 0.9): 3.4}, "all")]
    alone = on_cpu({("cpu+dense", 32, 0.0): 1.1}, "none")
    small = on_cpu({("cpu", 64, 0.9): 0.8, ("cpu+dense", 64, 0.9): 1.2}, "all")
    layers = layer_speedups("cpu", {16: (0.5, 5.0), 32: (0.8, 5.0)})
    rows = pd.DataFrame([row(sparsity=s, value=1e-3, tokens=t) for s in (0.5, 0.9) for t in (197, 1576)])
    told = answers.on_device(pd.concat([*models, alone]), layers, rows, small, 1e12).splitlines()
    assert told[0] == (
        "- Yes: on CPU, in fp32, one image through m takes 30 ms with the MLP at 90% in blocks of 64 (`cpu`), and 60 "
        "ms in the "
        f"fastest dense engine (openvino). Speedups over the fastest dense engine: "
        f"{answers.whole_model(pd.concat(models))}. The "
        f"masks are "
        "random blocks."
    )
    assert told[1] == (
        "- What our kernels do without sparsity: the dense model wholly on them (`cpu+dense`) takes 30 ms, 1.10× the "
        "speed of the "
        "fastest dense engine (spread 0.99× to 1.21×)."
    )
    assert told[2] == "- The small m is faster in 1 of 2 cases, at best 1.20× (all linear layers, `cpu+dense`)."
    assert told[3].startswith("- Single layers, over the fastest dense engine:") and "at 197 tokens 16: " in told[3]
    work = 2 * 1576 * 768 * 3072 * 0.5
    assert told[4].startswith("- At up to 50% sparsity and 1576 tokens") and f"{work / 1e12 / 1e-3:.0%} to" in told[4]
    slow = on_cpu({("cpu", 64, 0.9): 0.5}, "mlp")
    assert answers.on_device(slow, layers[:0], rows[:0], small[:0], 1e12).startswith("- No: on CPU")
    assert answers.on_device(slow.assign(speedup_high=1.2), layers[:0], rows[:0], small[:0], 1).startswith(
        "- Not clearly:"
    )
    assert (
        answers.on_device(slow[:0], layers[:0], rows[:0], small[:0], 1)
        == "- Not known yet: no whole model was measured."
    )


def test_variants_that_were_not_trained_are_named():
    variants = [{"scores_lr": 0.1}, {"start": "dense", "method": "magnitude"}]
    trained = pd.DataFrame({"seed": [0, 0, 1], "variant": ["scores_lr=0.1", "method=magnitude start=dense", ""]})
    names = ["scores_lr=0.1", "method=magnitude start=dense"]
    assert answers.missing_variants(trained, variants, [0, 1]) == {1: names}
    assert answers.missing_variants(trained[:0], variants, [0]) == {0: names}


def decided(*rows) -> pd.DataFrame:
    """Of ``(id, device, verdict, number)``."""
    table = pd.DataFrame(rows, columns=["id", "device", "verdict", "number"]).assign(claim=lambda r: "Claim " + r["id"])
    return table.assign(**{column: "" for column in VERDICT if column not in table})


def test_claims_are_listed_with_what_they_rest_on():
    rows = [("C1", "a", OPEN, ""), ("C1", "b", HOLDS, "2×"), ("C2", "a", FAILS, "1×"), ("C2", "b", FAILS, "1×")]
    rows += [("C3", "a", OPEN, ""), ("C3", "b", OPEN, "")]
    assert answers.claims_list(decided(*rows)).splitlines() == [
        "- C1. *Claim C1*",
        "    - b: **holds**; 2×",
        "- C2. *Claim C2*",
        "    - a and b: **does not hold**; 1×",
    ]
    later = decided(("C1", "a", OPEN, ""), ("C2", "a", FAILS, "1×"), ("C1", "b", HOLDS, "2×"), ("C2", "b", OPEN, ""))
    assert answers.claims_list(later).index("C1") < answers.claims_list(later).index("C2"), "in the order of the claims"
    assert "    - a: **does not hold**; 1×\n    - b: **does not hold**; 3×" in answers.claims_list(
        decided(("C2", "a", FAILS, "1×"), ("C2", "b", FAILS, "3×"))
    )


def test_goals_stand_side_by_side():
    key = {"case": ["x", "x"], "against": ["dense", "torch"], "target": ["at least 2.00×"] * 2}
    one = pd.DataFrame({**key, "measured": ["3.00×", ""], "reached": ["yes", "not measured"]})
    other = pd.DataFrame({**key, "measured": ["1.00×", "2.50×"], "reached": ["no", "yes"]})
    table = answers.goals_by_device({"a": one, "b": other})
    assert table["against"].tolist() == ["dense", "torch"]
    assert table[["a", "b"]].values.tolist() == [["3.00×: yes", "1.00×: no"], ["not measured", "2.50×: yes"]]
    assert answers.goals_by_device({}).empty
