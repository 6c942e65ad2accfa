from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from blockvit import plots, results
from blockvit.plots import break_even

SHARES = {"mlp": 0.64, "mlp+attention": 0.95}
LAYERS = ("768x768", "3072x768")


@pytest.fixture(autouse=True)
def style():
    plots.set_style()
    yield
    plt.close("all")


def frame(rows: list[dict], **common) -> pd.DataFrame:
    table = pd.DataFrame([{**common, **row} for row in rows]).reindex(columns=[*results.COLUMNS, *EXTRA])
    return results._typed(table)


EXTRA = ["speedup", "speedup_low", "speedup_high"]


def speed(value: float) -> dict:
    return {"speedup": value, "speedup_low": value * 0.9, "speedup_high": value * 1.1, "value": 1 / value}


def linear(blocks=(16, 32, 64), sparsities=(0.5, 0.8, 0.9), backends=("torch", "gather"), missing=(), **more):
    rows = [
        {"model": m, "block_size": b, "sparsity": s, "backend": k, **speed(0.3 + s * b / 32)}
        for m, b, s, k in itertools.product(LAYERS, blocks, sparsities, backends)
        if (b, s) not in missing
    ]
    return frame(rows, **{"metric": "latency", "precision": "fp32", "tokens": 197, "compile": "eager", **more})


def with_dense(sparse: pd.DataFrame) -> pd.DataFrame:
    dense = frame([{"model": m, "backend": "dense", "value": 1.0} for m in LAYERS], metric="latency", tokens=197)
    return pd.concat([dense, sparse], ignore_index=True)


def vit(blocks=(16, 32, 64), sparsities=(0.5, 0.8, 0.9), batches=(1, 16, 256), missing=(), **more):
    rows = [
        {"scope": c, "batch_size": n, "block_size": b, "sparsity": s, "backend": k, **speed(0.5 + s * b / 64)}
        for c, n, b, s, k in itertools.product(SHARES, batches, blocks, sparsities, ("torch", "gather"))
        if (b, s) not in missing
    ]
    return frame(rows, **{"metric": "latency", "precision": "fp32", "model": "vit_b_16", "compile": "eager", **more})


def trained(blocks=(8, 16, 32), sparsities=(0.5, 0.9), missing=()) -> pd.DataFrame:
    rows = [
        {"block_size": b, "sparsity": s, "seed": seed, "backend": "supermask", "value": 97 - 10 * s + seed}
        for b, s, seed in itertools.product(blocks, sparsities, (0, 1))
        if (b, s) not in missing
    ]
    rows += [{"seed": seed, "backend": "dense", "value": 97.0 + seed} for seed in (0, 1)]
    return frame(rows, metric="top1", model="vit_digits", dataset="digits")


def curves(**how) -> pd.DataFrame:
    final = trained(**how)
    return pd.concat([final.assign(epoch=e, value=final["value"] - 20 / e) for e in (1, 2, 3, 4)], ignore_index=True)


def memory() -> pd.DataFrame:
    rows = [
        {"metric": metric, "backend": backend, "block_size": b, "value": value}
        for metric, (backend, b, value) in itertools.product(
            ("model_bytes", "peak_memory"), [("dense", None, 4e8), ("gather", 16, 1e8), ("torch", 64, 2e8)]
        )
    ]
    return frame(rows, model="vit_b_16")


MASKS = {f"layer{i}": np.eye(4 + i, 3, dtype=bool) for i in range(3)}
KEPT = pd.DataFrame(
    [{"layer": n, "mask": kind, "kept": k} for n in "ab" for kind in ("learnt", "random") for k in (1, 2, 4)]
)
POINTS = [{"block_size": b, "sparsity": s, "speedup": 1 + s, "top1": 97 - s} for b in (16, 32) for s in (0.5, 0.8, 0.9)]


def published() -> pd.DataFrame:
    reference = results.published()
    return reference[(reference["source"] == "blog") & (reference["metric"] == "speedup")]


FIGURES = {
    "training_curves": (lambda: plots.training_curves(curves()), 3, 0),
    "conversion": (lambda: plots.conversion({"dense": 4e8, "sparse": 1e8}, {"convert": 2.0, "load": 0.5}), 2, 0),
    "speedup_heatmaps": (lambda: plots.speedup_heatmaps(linear(), "gather"), 3, 0),
    "linear_break_even": (lambda: plots.linear_break_even(linear(), ["torch", "gather"], 4.8), 4, 3),
    "linear_throughput": (lambda: plots.linear_throughput(with_dense(linear()), 1e12), 2, 3),
    "model_speedup": (
        lambda: plots.model_speedup(vit(batches=(256,)), "torch", SHARES, published()),
        2,
        3,
    ),
    "batch_sizes": (lambda: plots.batch_sizes(vit(sparsities=(0.9,)).query("scope=='mlp'"), ["torch", "gather"]), 2, 3),
    "memory": (lambda: plots.memory(memory()), 2, 0),
    "accuracy": (lambda: plots.accuracy(trained(), results.published_losses()), 2, 3),
    "pareto": (lambda: plots.pareto(pd.DataFrame(POINTS), 97.0), 1, 2),
    "kept_blocks": (lambda: plots.kept_blocks(KEPT), 1, 0),
}
# One gets by with a label that the figure or its neighbour bears, or needs none: ticks that are names, units in titles.
WITHOUT_LEGEND = {"conversion", "speedup_heatmaps", "memory"}


def legend_labels(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def draws_something(axes) -> bool:
    return bool(axes.lines or axes.patches or axes.collections or axes.images)


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name, tmp_path):
    draw, panels, blocks = FIGURES[name]
    figure = draw()
    assert isinstance(figure, Figure)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == panels
    assert all(draws_something(axes) for axes in shown), "an empty panel"
    texts = [t for a in shown for t in (a.get_xlabel(), a.get_ylabel())]
    texts += [figure.get_supxlabel(), figure.get_supylabel()]
    assert any(texts)
    assert any(a.get_ylabel() for a in shown) or name == "conversion"
    assert bool(legend_labels(figure)) == (name not in WITHOUT_LEGEND)
    if blocks:
        named = [label for label in legend_labels(figure) if "×" in label]
        assert len(named) == blocks == len(set(named)), "a legend entry for each block size, once"
        for axes in shown:
            lines = [line for line in axes.lines if "×" in str(line.get_label())]
            assert len(lines) == blocks and len({line.get_marker() for line in lines}) == blocks
    plots.save(figure, tmp_path, name)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_every_public_figure_is_drawn_here():
    public = {
        name
        for name, function in vars(plots).items()
        if getattr(function, "__module__", "") == plots.__name__
        and not name.startswith("_")
        and getattr(function, "__annotations__", {}).get("return") == "Figure"
    }
    assert public - {"save"} == {*FIGURES, "block_masks"}


def test_block_masks():
    figure = plots.block_masks(MASKS, MASKS)
    assert len(figure.axes) == 6 and all(axes.images for axes in figure.axes)
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert all(f"{4 + i}×3 blocks" in title and f"layer{i}" in title for i, title in enumerate(titles))
    assert legend_labels(figure)


def test_saved_twice_a_figure_is_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        plots.save(FIGURES["linear_break_even"][0](), tmp_path / folder, "figure")
    for suffix in ("png", "svg"):
        first, second = ((tmp_path / folder / f"figure.{suffix}").read_bytes() for folder in ("a", "b"))
        assert first == second and len(first) > 5000
    assert not plt.get_fignums(), "saved figures are closed"


def test_lines_show_their_numbers():
    figure = plots.model_speedup(vit(batches=(256,)), "torch", SHARES)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["64×64"].get_xdata(), [0.5, 0.8, 0.9])
    np.testing.assert_allclose(lines["64×64"].get_ydata(), [0.5 + s for s in (0.5, 0.8, 0.9)])
    bound = lines["Amdahl's bound"]
    np.testing.assert_allclose(bound.get_ydata()[-1], 1 / (1 - 0.9 * 0.64))


def test_throughput_is_the_work_of_the_blocks_kept():
    figure = plots.linear_throughput(with_dense(linear(blocks=(32,), sparsities=(0.5,), backends=("gather",))), 1e9)
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "32×32")
    shares = [2 * o * i * 197 * 0.5 * (0.3 + 0.5) / 1e9 for o, i in ((768, 768), (3072, 768))]
    np.testing.assert_allclose(line.get_ydata(), [np.mean(shares)])


EMPTY = {
    "training_curves": lambda: plots.training_curves(curves().iloc[:0]),
    "kept_blocks": lambda: plots.kept_blocks(KEPT.iloc[:0]),
    "speedup_heatmaps": lambda: plots.speedup_heatmaps(linear(), "no such backend"),
    "linear_break_even": lambda: plots.linear_break_even(linear().iloc[:0], ["torch"]),
    "linear_throughput": lambda: plots.linear_throughput(linear().iloc[:0], 1e12),
    "model_speedup": lambda: plots.model_speedup(vit().iloc[:0], "torch", SHARES),
    "batch_sizes": lambda: plots.batch_sizes(vit(), ["no such backend"]),
    "memory": lambda: plots.memory(vit()),
    "accuracy": lambda: plots.accuracy(trained().iloc[:0], results.published_losses()),
    "pareto": lambda: plots.pareto(pd.DataFrame(POINTS).iloc[:0], 97.0),
    "only dense curves": lambda: plots.training_curves(curves().query("backend == 'dense'")),
    "no scope with a share": lambda: plots.model_speedup(vit(), "torch", {"blog": 0.7}),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_draw_says_what_to_run(name):
    with pytest.raises(ValueError, match=r"nothing to draw: no .* in the tables; run the notebook that measures it"):
        EMPTY[name]()


GPU = {"precision": "bf16", "tokens": 50432}
PARTIAL = {
    "heat maps, cells missing": lambda: plots.speedup_heatmaps(linear(missing=[(64, 0.9), (16, 0.5)]), "torch"),
    "heat maps, one cell": lambda: plots.speedup_heatmaps(linear((32,), (0.9,)), "torch"),
    "heat maps, gpu": lambda: plots.speedup_heatmaps(linear((16, 32, 64, 128), **GPU), "torch"),
    "break-even, cells missing": lambda: plots.linear_break_even(linear(missing=[(64, 0.9), (16, 0.5)]), ["torch"]),
    "break-even, one cell": lambda: plots.linear_break_even(linear((32,), (0.9,)), ["torch"]),
    "break-even, gpu": lambda: plots.linear_break_even(linear((16, 32, 64, 128), **GPU), ["torch"]),
    "throughput, one cell": lambda: plots.linear_throughput(with_dense(linear((32,), (0.9,))), 1e12),
    "model, cells missing": lambda: plots.model_speedup(
        vit(batches=(256,), missing=[(64, 0.9), (16, 0.5)], precision="bf16"), "gather", SHARES, published()
    ),
    "model, one cell": lambda: plots.model_speedup(vit((32,), (0.9,), (256,)), "torch", {"mlp": 0.64}),
    "batches, one": lambda: plots.batch_sizes(vit((32,), (0.9,), (256,)).query("scope == 'mlp'"), ["torch"]),
    "accuracy, cells missing": lambda: plots.accuracy(trained(missing=[(8, 0.9)]), results.published_losses()),
    "accuracy, one cell": lambda: plots.accuracy(trained((32,), (0.9,)), results.published_losses()),
    "curves, cells missing": lambda: plots.training_curves(curves(missing=[(8, 0.9)])),
    "pareto, one point": lambda: plots.pareto(pd.DataFrame(POINTS[:1]), 97.0),
}


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.filterwarnings("error::UserWarning")
def test_unfinished_tables_are_drawn(name, tmp_path):
    figure = PARTIAL[name]()
    assert all(draws_something(axes) for axes in figure.axes)
    plots.save(figure, tmp_path, "figure")


def test_a_legend_names_block_sizes_that_the_first_panel_lacks():
    table = linear()
    table = table[(table["model"] != LAYERS[0]) | (table["block_size"] != 64)]
    assert "blocks 64×64" in legend_labels(plots.linear_break_even(table, ["torch"]))


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


def test_break_even_leaves_its_arguments_alone():
    sparsity, speedup = [0.9, 0.5], [1.5, 0.5]
    break_even(sparsity, speedup)
    assert (sparsity, speedup) == ([0.9, 0.5], [1.5, 0.5])


def test_save_makes_its_folder(tmp_path: Path):
    figure = plots.pareto(pd.DataFrame(POINTS), 97.0)
    assert plots.save(figure, tmp_path / "new" / "folder", "name") is figure
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["name.png", "name.svg"]
