from __future__ import annotations

import importlib
import itertools
import pkgutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from blockvit import comparisons, headline, limits, literature, plots, results

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
    dense = frame(
        [{"model": m, "backend": "dense", "value": 1.0} for m in LAYERS], metric="latency", tokens=197, compile="eager"
    )
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
LAYERS_OF_A_VIT = [f"encoder.layers.encoder_layer_{i}.mlp.{part}" for i in range(12) for part in (0, 3)]
VARIANTS = ("", "train_scores=False", "method=spartan sparsity_schedule=cubic")


def compared(variants=VARIANTS) -> pd.DataFrame:
    cell = {"dataset": "cifar10", "model": "vit_cifar", "recipe": "cifar10", "block_size": 32, "sparsity": 0.9}
    rows = [{"variant": v, "top1": 85.0 - i, "low": 84.5 - i, "high": 85.2 - i} for i, v in enumerate(variants)]
    table = pd.DataFrame([{**cell, **row, "dense_top1": 90.0, "seeds": 2} for row in rows])
    return table.assign(lost=table["dense_top1"] - table["top1"])


def machines() -> pd.DataFrame:
    """Rows as of ``headline.fastest``: two machines, one of them without the dense model on our kernel."""
    rows = [
        {"column": f"CPU {n}, fp32", "scope": scope, "sparsity": s, "block_size": float(block), "speedup": speedup}
        for n in (1, 2)
        for (scope, s, block), speedup in zip((headline.OURS_DENSE, *headline.CASES), (1.0, 1.5, 2.0, 4.0), strict=True)
        if (n, scope) != (2, headline.OURS_DENSE[0])
    ]
    table = pd.DataFrame(rows).assign(model="vit_b_16", batch_size=1.0, dense_value=0.1, eager_value=0.15)
    return table.assign(speedup_low=0.9 * table["speedup"], speedup_high=1.1 * table["speedup"])


def masks(variants=VARIANTS) -> pd.DataFrame:
    cell = {
        "dataset": "cifar10",
        "seed": 0,
        "model": "vit_cifar",
        "recipe": "cifar10",
        "block_size": 32,
        "sparsity": 0.9,
    }
    rows = [
        {**cell, "scope": layer, "variant": v, "metric": metric, "value": value, "low": value / 2, "high": value * 2}
        for layer, v in itertools.product(LAYERS_OF_A_VIT, variants)
        for metric, value in (("kept", 9.0), ("kept_before", 10.0), ("exchanged", 30.0))
    ]
    return pd.DataFrame(rows)


POINTS = [
    {"block_size": b, "sparsity": s, "top1": 97 - s, "low": 96.5 - s, "high": 97.2 - s}
    | {"speedup": 1 + s, "speedup_low": 0.9 + s, "speedup_high": 1.2 + s, "dense_compile": "eager"}
    for b in (16, 32)
    for s in (0.5, 0.8, 0.9)
]


def in_a_model(points: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(points).assign(
        model="vit_digits", backend="cpu", scope="blog", batch_size=256, precision="fp32"
    )


def on_device(metrics=("latency",), threads=(1, 2, 4)) -> pd.DataFrame:
    """Three variants at batch size 1: 8 ms over the threads, times a factor a variant and a metric."""
    variants = [
        ("dense", "eager", "dense", 4.0), ("dense", "openvino", "dense", 2.0), ("cpu", "eager", "mlp", 1.0),
        ("cpu+dense", "eager", "all", 0.5),
    ]  # fmt: skip
    tail = {"latency": 1.0, "latency_p90": 1.25, "latency_p99": 2.0}
    rows = [
        {"backend": b, "compile": c, "scope": s, "threads": n, "metric": m, "value": 8e-3 / n * f * tail[m]}
        | ({} if b == "dense" else {"block_size": 64, "sparsity": 0.9})
        for (b, c, s, f), n, m in itertools.product(variants, threads, metrics)
    ]
    return frame(rows, model="vit_b_16", precision="fp32", batch_size=1)


def tails() -> pd.DataFrame:
    return on_device(("latency", "latency_p90", "latency_p99"), threads=(4,)).assign(group="g")


def by_threads() -> pd.DataFrame:
    """Both backends in groups of their own with the dense engines, a group a scope and number of threads."""
    rows = on_device()
    groups = [
        rows[(rows["backend"] == "dense") | (rows["scope"] == scope)].assign(
            group=lambda rows, scope=scope: scope + rows["threads"].astype(str),
            value=lambda rows, scope=scope: rows["value"] * (1 + (rows["backend"] == "dense") * (scope == "all")),
        )
        for scope in ("mlp", "all")
    ]
    return pd.concat(groups, ignore_index=True)


def roofline(peak: float = 2e12, bandwidth: float | None = 1e11):
    rows = with_dense(linear()).assign(precision="fp32")
    return plots.roofline(rows, limits.linear_seconds(rows, peak), peak, bandwidth)


def published() -> pd.DataFrame:
    reference = literature.speedups()
    return reference[(reference["model"] == "vit_b_16") & (reference["precision"] == "fp32")]


# A GPU's tables with made-up numbers: the times follow from the invented constants below and from nothing measured.

GPU_BACKENDS = {"torch": 0.25, "torch_tuned": 0.4, "torchao": 0.35, "blksprs": 0.15, "gather": 0.1}  # share of the peak
GPU_PEAK = {"fp32": 5e13, "tf32": 4e14, "bf16": 8e14}
GPU_BANDWIDTH = 3e12
GPU_BLOCKS = (16, 32, 64, 128)
GPU_SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
GPU_SHAPES = ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1000, 768))


GPU_SHAPE = (((3072, 768), 50432),)


def timed(value: float) -> dict:
    return {"value": value, "low": value * 0.95, "high": value * 1.08, "metric": "latency"}


def gpu_linear(layers=tuple((s, 50432) for s in GPU_SHAPES), precisions=("fp32",), sparsities=GPU_SPARSITIES):
    rows = []
    for ((out, in_), tokens), precision in itertools.product(layers, precisions):
        size = limits.ELEMENT_BYTES[precision]
        flop, moved = 2 * out * in_ * tokens, size * (tokens * (out + in_) + out * in_)
        layer = {"model": f"{out}x{in_}", "tokens": tokens, "precision": precision}

        def seconds(work, share, moved=moved, precision=precision):
            return timed(max(work / share / GPU_PEAK[precision], 1.3 * moved / GPU_BANDWIDTH) + 4e-6)

        for block, sparsity in itertools.product(GPU_BLOCKS, sparsities):
            group = {**layer, "group": f"{layer}{block}{sparsity}"}
            rows.append({**group, "backend": "dense", **seconds(flop, 0.8)})
            for backend, share in GPU_BACKENDS.items():
                work = seconds(flop * (1 - sparsity), share * min(1, (block / 64) ** 0.5))
                rows.append({**group, "backend": backend, "block_size": block, "sparsity": sparsity, **work})
            if precision == "bf16" and block == GPU_BLOCKS[0]:
                rows.append({**group, "backend": "2:4", "sparsity": 0.5, **seconds(flop * 0.5, 0.6)})
    return frame(rows, experiment="linear", device="synthetic", compile="eager", date="2026-01-01T00:00:00Z")


def gpu_squares(**how) -> pd.DataFrame:
    return gpu_linear(tuple(((n, n), n) for n in (4096, 8192, 16384)), sparsities=(0.5, 0.8, 0.9, 0.95), **how)


def gpu_vit(scopes=tuple(SHARES), batches=(256,), sparsities=GPU_SPARSITIES, precision="bf16", blocks=(16, 32, 64)):
    rows = []
    modes = {"eager": 1.0, "max-autotune": 0.8, "cudagraph": 0.9}
    for scope, batch, block, sparsity in itertools.product(scopes, batches, blocks, sparsities):
        group = {"batch_size": batch, "group": f"{scope}{batch}{block}{sparsity}"}
        for mode, gain in modes.items():
            dense = batch * 3e-4 * gain + 4e-3 * (mode == "eager")
            rows.append({**group, "backend": "dense", "scope": "dense", "compile": mode, **timed(dense)})
            rest, sparse = 1 - SHARES[scope], SHARES[scope] * (1 - sparsity)
            for backend, share in GPU_BACKENDS.items():
                slow = dense * (rest + sparse * 0.8 / share * (64 / block) ** 0.5) + 2e-3
                cell = {"scope": scope, "block_size": block, "sparsity": sparsity, "backend": backend, "compile": mode}
                rows.append({**group, **cell, **timed(slow)})
            two = {"scope": scope, "sparsity": 0.5, "backend": "2:4", "compile": mode, **timed(dense * 0.9)}
            rows += [{**group, **two}] if block == blocks[0] and sparsity == sparsities[0] else []
    common = {"experiment": "vit", "model": "vit_b_16", "precision": precision, "date": "2026-01-01T00:00:00Z"}
    return frame(rows, device="synthetic", **common)


def gpu_memory() -> pd.DataFrame:
    kept = gpu_vit(("mlp",), sparsities=(0.9,)).query("compile == 'eager'")
    sizes = [
        kept.assign(metric=metric, value=base * (1 - kept["sparsity"].fillna(0) * 0.6) + 1e6 * kept["value"].rank())
        for metric, base in (("model_bytes", 1.7e8), ("peak_memory", 2.4e9))
    ]
    return pd.concat(sizes, ignore_index=True)


def gpu_speedups(**how) -> pd.DataFrame:
    return comparisons.speedups(gpu_linear(**how))


def least(rows: pd.DataFrame) -> pd.DataFrame:
    return limits.linear_seconds(rows, GPU_PEAK, GPU_BANDWIDTH)


def gpu_throughput():
    rows = gpu_linear(precisions=("bf16",))
    return plots.linear_throughput(rows, GPU_PEAK["bf16"], least(rows))


def gpu_large():
    speedups = comparisons.speedups(gpu_squares())
    speedups = speedups[speedups["backend"].isin(["torch", "torch_tuned"])]
    return plots.large_matmuls(speedups, 4.8, limits=least(speedups))


def gpu_contenders(precision="bf16"):
    speedups = gpu_speedups(precisions=(precision,))
    return plots.contenders(speedups, 0.9, limits=least(speedups))


def gpu_linear_speedup(precision="fp32"):
    speedups = gpu_speedups(precisions=(precision,))
    return plots.linear_speedup(speedups, [*GPU_BACKENDS, "2:4"], least(speedups), 4.8)


def gpu_batches():
    speedups = comparisons.speedups(gpu_vit(("mlp",), (1, 4, 16, 64, 256), (0.9,)))
    return plots.batch_sizes(speedups, [*GPU_BACKENDS, "2:4"], limits.amdahl(0.9, 0.64), 16)


def gpu_model():
    reference = literature.speedups()
    like = reference[(reference["model"] == "vit_b_16") & (reference["precision"] == "bf16")]
    return plots.model_speedup(comparisons.speedups(gpu_vit()), "torch_tuned", SHARES, like)


def gpu_by_precision():
    rows = gpu_linear(GPU_SHAPE, precisions=tuple(GPU_PEAK))
    return plots.contenders(comparisons.speedups(rows), 0.9, by="precision")


def gpu_large_by_precision():
    speedups = comparisons.speedups(gpu_squares(precisions=tuple(GPU_PEAK)))
    return plots.large_matmuls(speedups[speedups["backend"].isin(["torch_tuned", "2:4"])], 4.8, by="precision")


def eight_layers():
    layers = tuple((s, t) for s in GPU_SHAPES[:4] for t in (197, 50432))
    return comparisons.speedups(gpu_linear(layers, sparsities=(0, *GPU_SPARSITIES)))


TRAFFIC = limits.mlp_traffic(197, 768, 3072, "bf16", 32, 0.9)


def steps(size: str = "tokens") -> pd.DataFrame:
    rows = [
        {size: n, "block_size": b, "backend": k, "value": 0.1 * n * (1 + (9 if k == "naive" else 3) / n)}
        for n, b, k in itertools.product((197, 788, 1576), (16, 32, 64), ("supermask", "naive"))
    ]
    rows = [{**row, "low": row["value"] * 0.99, "high": row["value"] * 1.01, "sparsity": 0.9} for row in rows]
    rows = [{**row, "group": f"{row[size]}-{row['block_size']}"} for row in rows]
    dense = [{"backend": "dense", "group": row["group"], **dict.fromkeys(("value", "low", "high"), 0.1 * row[size])}
             for row in rows if row["backend"] == "naive"]  # fmt: skip
    common = {"metric": "step_seconds", "model": "3072x768", "precision": "fp32", "compile": "eager"}
    return frame([*rows, *dense], **common)


FIGURES = {  # how it is drawn, its panels, the block sizes that the legend names
    "training_curves": (lambda: plots.training_curves(curves()), 3, 0),
    "conversion": (lambda: plots.conversion({"dense": 4e8, "sparse": 1e8}, {"convert": 2.0, "load": 0.5}), 2, 0),
    "speedup_heatmaps": (lambda: plots.speedup_heatmaps(linear(), "gather"), 3, 0),
    "linear_speedup": (lambda: plots.linear_speedup(linear(), ["torch", "gather"], headline=4.8), 4, 3),
    "linear_throughput": (lambda: plots.linear_throughput(with_dense(linear()), 1e12), 2, 3),
    "contenders": (lambda: plots.contenders(linear(), 0.9), 1, 0),
    "large_matmuls": (gpu_large, 8, 4),
    "model_speedup": (
        lambda: plots.model_speedup(vit(batches=(256,)), "torch", SHARES, published()),
        2,
        3,
    ),
    "batch_sizes": (lambda: plots.batch_sizes(vit(sparsities=(0.9,)).query("scope=='mlp'"), ["torch", "gather"]), 2, 3),
    "execution_modes": (lambda: plots.execution_modes(gpu_vit(("mlp",), sparsities=(0.9,))), 1, 0),
    "memory": (lambda: plots.memory(memory()), 2, 0),
    "memory of a CPU": (lambda: plots.memory(memory().assign(threads=4)), 1, 0),
    "latency_tails": (lambda: plots.latency_tails(tails()), 1, 0),
    "threads": (lambda: plots.threads(by_threads()), 2, 0),
    "traffic": (lambda: plots.traffic(TRAFFIC, limits.TRAFFIC), 1, 0),
    "roofline": (roofline, 2, 3),
    "roofline of a CPU": (lambda: roofline(bandwidth=None), 2, 3),
    "accuracy": (lambda: plots.accuracy(trained(), literature.losses()), 2, 3),
    "pareto": (lambda: plots.pareto(in_a_model(POINTS), 97.0), 1, 2),
    "kept_blocks": (lambda: plots.kept_blocks(KEPT), 1, 0),
    "step_overhead": (lambda: plots.step_overhead(comparisons.step_overheads(steps())), 2, 3),
    "step_overhead of a model": (lambda: plots.step_overhead(comparisons.step_overheads(steps("batch_size"))), 2, 3),
    "headline_speedups": (lambda: plots.headline_speedups(machines()), 1, 0),
    "variants": (lambda: plots.variants(compared()), 1, 0),
    "variants of a trained model": (lambda: plots.variants(fine_tuned()), 1, 0),
    "mask_changes": (lambda: plots.mask_changes(masks()), 1, 0),
    # the same with a GPU's number of blocks, backends, shapes and modes
    "gpu speedup_heatmaps": (lambda: plots.speedup_heatmaps(eight_layers(), "torch_tuned"), 4, 0),
    "gpu linear_speedup": (lambda: gpu_linear_speedup("bf16"), 25, 4),
    "gpu linear_throughput": (gpu_throughput, 5, 4),
    "gpu contenders": (gpu_contenders, 1, 0),
    "gpu contenders by precision": (gpu_by_precision, 1, 0),
    "gpu large_matmuls by precision": (gpu_large_by_precision, 12, 4),
    "gpu model_speedup": (gpu_model, 2, 3),
    "gpu batch_sizes": (gpu_batches, 6, 0),
    "gpu memory": (lambda: plots.memory(gpu_memory()), 2, 0),
}
# One gets by with a label that the figure or its neighbour bears, or needs none: ticks that are names, units in titles.
WITHOUT_LEGEND = {
    "conversion", "speedup_heatmaps", "memory", "memory of a CPU", "latency_tails", "gpu speedup_heatmaps",
    "gpu memory",
}  # fmt: skip
# And no label of the y axis: ticks that are names.
WITHOUT_YLABEL = {
    "conversion", "contenders", "gpu contenders", "gpu contenders by precision", "latency_tails", "traffic",
    "kept_blocks", "speedup_heatmaps", "gpu speedup_heatmaps",
    "headline_speedups", "variants", "variants of a trained model", "mask_changes", "memory", "memory of a CPU",
}  # fmt: skip


def told(figure: Figure) -> str:
    """What stands below the title."""
    return " ".join(figure.texts[1].get_text().splitlines())


def legend_labels(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def assert_nothing_is_clipped_or_covered(figure: Figure) -> None:
    """All that belongs to a panel, its labels included, lies within the figure and off the legend below."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    drawn = [axes.get_tightbbox(renderer) for axes in figure.axes]
    drawn += [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    drawn += [label.get_window_extent(renderer) for label in (figure._supxlabel, figure._supylabel) if label]
    frames = [legend.get_window_extent(renderer) for legend in figure.legends]
    for axes in figure.axes:
        label = axes.yaxis.label
        longest = axes.get_window_extent(renderer).height + 1
        assert label.get_window_extent(renderer).height < longest, f"{label.get_text()!r} is longer than its axis"
    for box in (*drawn, *frames):
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
    assert not [(box, frame) for box in drawn for frame in frames if box.overlaps(frame)]
    assert not overlaps(figure, figure.texts)
    panels = [axes.get_tightbbox(renderer) for axes in figure.axes]
    heads = [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    assert not [(head, box) for head in heads for box in panels if head.overlaps(box)]


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
    assert bool(any(a.get_ylabel() for a in shown) or figure.get_supylabel()) == (name not in WITHOUT_YLABEL)
    assert len(figure.get_suptitle().split()) > 3, "a title in words"
    assert bool(legend_labels(figure)) == (name not in WITHOUT_LEGEND)
    if blocks:
        named = [label for label in legend_labels(figure) if "×" in label]
        assert len(named) == blocks == len(set(named)), "a legend entry for each block size, once"
        for axes in shown:
            lines = [line for line in axes.lines if "×" in str(line.get_label())]
            assert len(lines) == blocks and len({line.get_marker() for line in lines}) == blocks
    assert_nothing_is_clipped_or_covered(figure)
    plots.save(figure, tmp_path, name)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_every_public_figure_is_drawn_here():
    modules = [
        importlib.import_module(f"blockvit.plots.{module.name}") for module in pkgutil.iter_modules(plots.__path__)
    ]
    public = {
        name
        for module in modules
        for name, function in vars(module).items()
        if getattr(function, "__module__", "") == module.__name__
        and not name.startswith("_")
        and getattr(function, "__annotations__", {}).get("return") == "Figure"
    }
    assert public - {"save"} == {name.split(" of ")[0] for name in FIGURES if "gpu" not in name} | {"block_masks"}
    assert public <= set(plots.__all__), "drawn as plots.<name> by the notebooks"


def test_training_curves_draw_each_seed_and_tell_where_they_are_cut():
    figure = plots.training_curves(curves())
    axes = figure.axes[0]
    assert axes.get_ylim()[0] == 60
    assert told(figure) == "mean of 2 seeds, each a thin line", "nothing lies below"
    (mean,) = lines_of(axes, "90% sparse")
    seeds = [line for line in axes.lines if line.get_color() == mean.get_color() and line is not mean]
    assert len(seeds) == 2 and all(line.get_linewidth() < mean.get_linewidth() for line in seeds)
    np.testing.assert_allclose(np.mean([line.get_ydata() for line in seeds], axis=0), mean.get_ydata())
    steep = curves().assign(value=lambda rows: rows["value"] - 60 * (rows["epoch"] == 1))
    figure = plots.training_curves(steep)
    assert told(figure).endswith("; cut below 60%") and figure.axes[0].get_ylim()[0] == 60


def test_block_masks():
    figure = plots.block_masks(MASKS, MASKS)
    assert len(figure.axes) == 6 and all(axes.images for axes in figure.axes)
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == [f"layer{i}:\n{4 + i} rows × 3 columns of blocks" for i in range(3)]
    assert legend_labels(figure)


def test_figures_of_masks_tell_the_model_if_it_is_known():
    rows = trained((8,), (0.8,)).query("backend == 'supermask' and seed == 0").assign(device="Some CPU")
    for figure in (plots.block_masks(MASKS, MASKS, rows), plots.kept_blocks(KEPT, rows)):
        assert figure.get_suptitle().startswith("vit_digits on digits, 80% sparse in blocks of 8×8: ")
        assert told(figure).startswith("trained on Some CPU, one seed")
        assert_nothing_is_clipped_or_covered(figure)
    assert plots.block_masks(MASKS, MASKS).get_suptitle() == "Which blocks training exchanged"


def test_saved_twice_a_figure_is_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        plots.save(FIGURES["linear_speedup"][0](), tmp_path / folder, "figure")
    for suffix in ("png", "svg"):
        first, second = ((tmp_path / folder / f"figure.{suffix}").read_bytes() for folder in ("a", "b"))
        assert first == second and len(first) > 5000
    assert not plt.get_fignums(), "saved figures are closed"


def test_lines_show_their_numbers():
    figure = plots.model_speedup(vit(batches=(256,)), "torch", SHARES)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["64×64"].get_xdata(), [0.5, 0.8, 0.9])
    np.testing.assert_allclose(lines["64×64"].get_ydata(), [0.5 + s for s in (0.5, 0.8, 0.9)])
    bound = lines["Amdahl's law at the dense rate"]
    np.testing.assert_allclose(bound.get_ydata()[-1], 1 / (1 - 0.9 * 0.64))


def test_throughput_is_the_work_of_the_blocks_kept():
    figure = plots.linear_throughput(with_dense(linear(blocks=(32,), sparsities=(0.5,), backends=("gather",))), 1e9)
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "32×32")
    shares = [2 * o * i * 197 * 0.5 * (0.3 + 0.5) / 1e9 for o, i in ((768, 768), (3072, 768))]
    np.testing.assert_allclose(line.get_ydata(), [np.mean(shares)])


def lines_of(axes, label: str):
    return [line for line in axes.lines if line.get_label() == label]


def ticks_of(axes):
    return [line for line in axes.lines if line.get_marker() == "|" and len(line.get_xdata())]


def on_drawn_line(line, x: float) -> float:
    """Where a line, straight in logarithms as its axis draws it, stands at ``x``."""
    return np.exp(np.interp(x, line.get_xdata(), np.log(line.get_ydata())))


def test_break_even_ticks_lie_on_the_drawn_lines():
    figure = plots.linear_speedup(linear((32,), (0.5, 0.8, 0.9)), ["gather"])
    for axes in figure.axes:
        ((tick,), (line,)) = ticks_of(axes), lines_of(axes, "32×32")
        assert axes.get_yscale() == "log"
        assert on_drawn_line(line, tick.get_xdata()[0]) == pytest.approx(1)
        straight = comparisons.break_even(line.get_xdata(), line.get_ydata())
        assert tick.get_xdata()[0] != pytest.approx(straight, abs=1e-3), "the two interpolations differ here"


def test_every_gpu_tick_lies_on_a_line():
    ticks = 0
    for axes in gpu_linear_speedup().axes:
        lines = [line for line in axes.lines if "×" in str(line.get_label())]
        for tick in ticks_of(axes):
            (line,) = (line for line in lines if line.get_color() == tick.get_color())
            assert on_drawn_line(line, tick.get_xdata()[0]) == pytest.approx(1)
            ticks += 1
    assert ticks > 20


@pytest.mark.parametrize(("speedup", "ticks"), [((0.2, 0.5, 0.9), 0), ((1.2, 1.5, 1.9), 0), ((0.6, 0.9, 1.1), 1)])
def test_no_tick_without_a_crossing(speedup, ticks):
    rows = linear((32,), (0.5, 0.7, 0.9), ("torch",))
    rows["speedup"] = rows["sparsity"].map(dict(zip((0.5, 0.7, 0.9), speedup, strict=True)))
    assert [len(ticks_of(axes)) for axes in plots.linear_speedup(rows, ["torch"]).axes] == [ticks, ticks]


def test_the_limit_is_dense_time_over_the_least_time_of_any_block_size():
    rows = gpu_speedups(layers=GPU_SHAPE)
    figure = plots.linear_speedup(rows, ["torch"], least(rows))
    (limit,) = lines_of(figure.axes[0], "limit of arithmetic and bytes")
    assert limit.get_linestyle() == "--"
    at90 = rows[rows["sparsity"] == 0.9]
    expected = at90["dense_value"].iloc[0] / least(at90)["seconds"].min()
    assert dict(zip(limit.get_xdata(), limit.get_ydata(), strict=True))[0.9] == pytest.approx(expected)
    assert "limit of arithmetic and bytes" in legend_labels(figure)
    without = plots.linear_speedup(rows, ["torch"])
    assert not lines_of(without.axes[0], "limit of arithmetic and bytes")
    assert "limit of arithmetic and bytes" not in legend_labels(without)


def test_no_measured_line_passes_the_limit():
    for axes in gpu_linear_speedup("bf16").axes:
        (limit,) = lines_of(axes, "limit of arithmetic and bytes")
        for line in (line for line in axes.lines if "×" in str(line.get_label())):
            assert (line.get_ydata() < np.interp(line.get_xdata(), *limit.get_data())).all()


def test_between_the_measured_sparsities_the_limit_is_that_of_the_arithmetic():
    rows = gpu_speedups(layers=GPU_SHAPE).query("sparsity in (0.5, 0.95)")
    (limit,) = lines_of(plots.linear_speedup(rows, ["torch"], least(rows)).axes[0], "limit of arithmetic and bytes")
    own = least(rows.assign(sparsity=0.8))["seconds"].min()
    assert np.interp(0.8, *limit.get_data()) == pytest.approx(rows["dense_value"].median() / own, rel=0.02)
    assert len(limit.get_xdata()) > 50, "a curve, not straight from point to point"


def test_a_row_of_panels_has_a_scale_that_fits_it():
    rows = linear()
    rows.loc[rows["backend"] == "torch", list(EXTRA)] /= 100
    figure = plots.linear_speedup(rows, ["torch", "gather"])
    ends = [axes.get_ylim() for axes in figure.axes]
    assert ends[0] == ends[1] and ends[2] == ends[3]
    assert ends[0][0] < 0.01 and ends[2][0] > 0.3
    assert "scales differ by row" in told(figure)
    assert "scales" not in told(plots.linear_speedup(rows, ["torch"]))


@pytest.mark.parametrize("most", [1.3, 3, 40, 400])
def test_a_speedup_axis_names_the_line_in_question(most):
    rows = linear((32,))
    rows["speedup"] = rows["speedup_low"] = rows["speedup_high"] = np.geomspace(0.9, most, len(rows))
    (axes, *_), place = (figure := plots.linear_speedup(rows, ["gather", "torch"])).axes, 0
    figure.canvas.draw()
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    place = ticks.index(1)
    assert axes.get_yticklabels()[place].get_text() == "1×" and len(ticks) >= 3
    steps = np.diff(np.log(ticks))
    assert most < 4 or steps == pytest.approx([steps[0]] * len(steps)), "evenly spaced"


def test_limits_are_matched_by_index():
    rows = gpu_speedups()
    part = rows[(rows["model"] == "768x768") & (rows["backend"] == "torch")]
    whole, own = (plots.linear_speedup(part, ["torch"], least(table)) for table in (rows, part))
    lines = [lines_of(figure.axes[0], "limit of arithmetic and bytes")[0].get_ydata() for figure in (whole, own)]
    np.testing.assert_allclose(*lines)


def test_the_figure_grows_with_its_backends():
    rows = gpu_speedups(layers=GPU_SHAPE)
    few, many = (plots.linear_speedup(rows, list(GPU_BACKENDS)[:n]) for n in (1, 5))
    assert many.get_figheight() > few.get_figheight() + 4
    assert [axes.get_ylabel() for axes in many.axes] == list(GPU_BACKENDS)


def test_a_cell_without_measurements_says_so():
    table = linear()
    table = table[(table["model"] != LAYERS[0]) | (table["backend"] != "gather")]
    texts = [[t.get_text() for t in axes.texts] for axes in plots.linear_speedup(table, ["torch", "gather"]).axes]
    assert texts == [[], [], ["not measured"], []]


def test_two_of_four_is_a_hollow_point_in_the_panels_of_its_shape():
    rows = gpu_speedups(precisions=("bf16",))
    drawn = plots.linear_speedup(rows, ["torch", "2:4"]).axes
    assert len(drawn) == 5, "no row of its own beside backends with blocks"
    for axes in drawn:
        (point,) = lines_of(axes, "2:4, no blocks")
        name = axes.get_title().split()[-1].replace("×", "x")
        shape = rows[(rows["backend"] == "2:4") & (rows["model"] == name)]
        assert list(point.get_xdata()) == [0.5] and point.get_ydata()[0] == pytest.approx(shape["speedup"].median())
        assert point.get_markerfacecolor() == "white"
    assert not lines_of(plots.linear_speedup(rows, ["torch"]).axes[0], "2:4, no blocks"), "not asked for"
    alone = plots.linear_speedup(rows, ["2:4"])
    assert len(alone.axes) == 5 and all(lines_of(axes, "2:4, no blocks") for axes in alone.axes)


MIXED = {
    "linear_speedup": lambda rows: plots.linear_speedup(rows, ["torch"]),
    "speedup_heatmaps": lambda rows: plots.speedup_heatmaps(rows, "torch"),
    "contenders": lambda rows: plots.contenders(rows, 0.9),
    "linear_throughput": lambda rows: plots.linear_throughput(rows, 1e12),
}


@pytest.mark.parametrize("name", MIXED)
def test_precisions_are_not_mixed(name):
    rows = pd.concat([linear(), linear(precision="bf16")], ignore_index=True)
    with pytest.raises(ValueError, match="one precision a figure, but the rows hold bf16, fp32; choose one"):
        MIXED[name](rows)
    MIXED[name](rows[rows["precision"] == "bf16"])


@pytest.mark.parametrize("name", ["linear_speedup", "contenders"])
def test_token_counts_of_a_shape_are_not_mixed(name):
    rows = pd.concat([linear(), linear(tokens=788)], ignore_index=True)
    with pytest.raises(ValueError, match="one tokens a figure"):
        MIXED[name](rows)
    MIXED[name](rows[(rows["tokens"] == 197) == (rows["model"] == LAYERS[0])])  # another count for another shape


# --- contenders ------------------------------------------------------------------------------------------------------


def tick_names(axes) -> list[str]:
    return [t.get_text() for t in axes.get_yticklabels()]


def test_contenders_stand_in_order_with_their_medians():
    rows = gpu_speedups(precisions=("bf16",))
    (axes,) = plots.contenders(rows, 0.9).axes
    names = tick_names(axes)
    heads = ["qkv 2304×768", "out_proj 768×768", "mlp.0 3072×768", "mlp.3 768×3072", "head 1000×768"]
    assert [name for name in names if "×" in name] == heads, "in the order of the model"
    at90 = rows[(rows["sparsity"] == 0.9) | (rows["backend"] == "2:4")]
    order = at90.groupby("backend")["speedup"].median().sort_values(ascending=False).index
    assert names[1:7] == [name if name != "2:4" else "2:4 (50%)" for name in order]
    ticks = dict(zip(names[7:14], axes.get_yticks()[7:14], strict=True))  # of out_proj
    for backend, block in (("torch", 16), ("gather", 128)):
        points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines_of(axes, f"{block}×{block}")]
        cell = at90[(at90["backend"] == backend) & (at90["block_size"] == block) & (at90["model"] == "768x768")]
        at = [x for x, y in points if abs(y - ticks[backend]) < 0.4]
        assert at == [pytest.approx(cell["speedup"].median())]
    assert any(list(line.get_xdata()) == [1, 1] for line in axes.lines), "a line at break-even"


def test_contenders_by_precision():
    (axes,) = gpu_by_precision().axes
    names = tick_names(axes)
    assert [name for name in names if name in GPU_PEAK] == ["fp32", "tf32", "bf16"]
    assert len(lines_of(axes, "2:4, no blocks")) == 1 and names.index("2:4 (50%)") > names.index("bf16")
    rows = gpu_speedups()
    mlps = gpu_linear(GPU_SHAPE).assign(model="768x3072x768")
    title = plots.contenders(comparisons.speedups(mlps), 0.9, by="precision").get_suptitle()
    assert title == "MLPs of ViT-B/16, 50432 tokens: which backend is fastest, blocks 90% sparse"
    with pytest.raises(ValueError, match="limits are those of a shape"):
        plots.contenders(rows, 0.9, by="precision", limits=least(rows))


def test_contenders_beside_their_limit():
    (axes,) = gpu_contenders().axes
    limits_drawn = lines_of(axes, "limit of arithmetic and bytes")
    assert len(limits_drawn) == len(GPU_SHAPES)
    for limit in limits_drawn:
        low, high = sorted(limit.get_ydata())
        lines = [line for line in axes.lines if "×" in str(line.get_label())]
        beside = [line.get_xdata()[0] for line in lines if low < line.get_ydata()[0] < high]
        assert beside and max(beside) < limit.get_xdata()[0]


# --- large products --------------------------------------------------------------------------------------------------


def test_large_products_leave_out_what_is_not_square_in_tokens_too():
    rows = comparisons.speedups(pd.concat([gpu_squares(), gpu_linear((((768, 768), 197),))], ignore_index=True))
    figure = plots.large_matmuls(rows, 4.8)
    assert [axes.get_title() for axes in figure.axes[:4]] == [f"{s}% sparse" for s in (50, 80, 90, 95)]
    for axes in figure.axes:
        for line in (line for line in axes.lines if "×" in str(line.get_label())):
            assert list(line.get_xdata()) == [4096, 8192, 16384]
        (headline,) = lines_of(axes, "published headline")
        assert set(headline.get_ydata()) == {4.8} and axes.get_xscale() == axes.get_yscale() == "log"
    line = lines_of(figure.axes[2], "64×64")[0]
    cell = rows.query("backend == 'torch' and block_size == 64 and sparsity == 0.9 and tokens == 8192")
    assert line.get_ydata()[1] == pytest.approx(cell["speedup"].item())


def test_large_products_need_a_choice_of_backend_or_precision():
    rows = comparisons.speedups(gpu_squares(precisions=("fp32", "bf16")))
    with pytest.raises(ValueError, match="one precision a figure"):
        plots.large_matmuls(rows)
    with pytest.raises(ValueError, match="one backend a figure"):
        plots.large_matmuls(rows, by="precision")
    figure = plots.large_matmuls(rows[rows["backend"] == "torch"], by="precision")
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["fp32", "bf16"]
    assert not lines_of(figure.axes[0], "published headline")


def test_large_products_without_blocks_are_in_every_panel_of_their_precision():
    figure = gpu_large_by_precision()
    drawn = [len(lines_of(axes, "2:4, no blocks, at 50%")) for axes in figure.axes]
    assert drawn == [0] * 8 + [1] * 4


# --- throughput ------------------------------------------------------------------------------------------------------


def test_throughput_counts_the_blocks_that_are_there():
    """At 95% of 36 blocks 3 stay: 8.3%, not 5%."""
    rows = linear((128,), (0.95,), ("gather",))
    rows = with_dense(rows[rows["model"] == "768x768"])
    (line,) = lines_of(plots.linear_throughput(rows, 1e9).axes[0], "128×128")
    expected = 2 * 768 * 768 * 197 * (3 / 36) / rows["value"].iloc[-1] / 1e9
    np.testing.assert_allclose(line.get_ydata(), [expected])


def test_throughput_is_bound_by_memory_in_bf16_only():
    for precision, bound in (("fp32", False), ("bf16", True)):
        rows = gpu_linear(GPU_SHAPE, precisions=(precision,))
        figure = plots.linear_throughput(rows, GPU_PEAK[precision], least(rows))
        (limit,) = lines_of(figure.axes[0], "limit of arithmetic and bytes, median")
        assert (limit.get_ydata()[-1] < 0.5) == bound
        assert (limit.get_ydata() <= 1 + 1e-9).all()
        assert bool(lines_of(figure.axes[0], "2:4, no blocks")) == (precision == "bf16")


# --- whole models ----------------------------------------------------------------------------------------------------


def test_a_line_is_the_fastest_compile_mode():
    rows = comparisons.speedups(gpu_vit(("mlp",), sparsities=(0.9,)))
    assert rows.query("backend == 'torch' and block_size == 64")["speedup"].nunique() == 3
    fastest = rows.query("backend == 'torch' and block_size == 64")["speedup"].max()
    for figure in (plots.model_speedup(rows, "torch", SHARES), plots.batch_sizes(rows, ["torch"])):
        (line,) = lines_of(figure.axes[0], "64×64")
        assert list(line.get_ydata()) == [pytest.approx(fastest)]


def test_the_model_figure_says_which_backend_over_what():
    table = gpu_vit()
    fastest, eager = (comparisons.speedups(table, baseline=b) for b in ("fastest", "eager"))
    figure = plots.model_speedup(fastest, "torch", SHARES)
    assert figure.get_suptitle() == "ViT-B/16, batches of 256, bf16: speedup of PyTorch's kernels (torch)"
    assert figure.get_supylabel().replace("\n", " ") == "speedup over the fastest dense"
    told = plots.model_speedup(eager, "torch", SHARES).get_supylabel()
    assert told.replace("\n", " ") == "speedup over eager dense PyTorch"


def test_published_speedups_follow_from_published_latencies():
    found = literature.speedups()
    cell = ["source", "model", "precision", "block_size", "sparsity"]
    value = found.set_index(cell)["value"].sort_index()
    assert value["superblock README", "vit_b_16", "fp32", 64, 0.8] == 532.116 / 393.864
    assert value["superblock PR 9", "vit_b_16", "bf16", 64, 0.9] == 77.023 / 73.267
    assert value["torchao superblock", "vit_h_14", "bf16", 64, 0.9] == 489.646 / 315.371
    assert value["blog", "vit_b_16", "fp32", 32, 0.9] == 1.37, "stated, not derived"
    two = found[found["scope"] == "2:4"].set_index("model")
    assert two["block_size"].isna().all() and set(two["sparsity"]) == {0.5}
    assert two.loc["vit_b_16", "value"] == 61.408 / 59.960
    assert set(found["precision"]) == {"fp32", "bf16"} and not found["note"].str.contains("int8").any()
    assert not (found["scope"] == "dense").any() and found["value"].notna().all()
    assert found["note"].str.contains("ms dense /").sum() == 10, "which are derived is told"


def test_published_points_are_hollow_and_where_they_were_published():
    figure = gpu_model()
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    points = sorted((line.get_xdata()[0], round(line.get_ydata()[0], 2)) for line in hollow)
    assert points == [(0.8, 1.29), (0.84, 1.34), (0.9, 1.05), (0.9, 1.44)]
    assert "published: A100, batch 256, over eager dense" in legend_labels(figure)
    assert not [line for line in figure.axes[1].lines if line.get_markerfacecolor() == "none"]
    none = plots.model_speedup(vit(batches=(256,)), "torch", SHARES, published().iloc[:0])
    assert not any("published" in label for label in legend_labels(none))


def test_a_published_point_without_blocks_is_drawn():
    reference = literature.speedups()
    two = reference[(reference["scope"] == "2:4") & (reference["model"] == "vit_b_16")].assign(scope="mlp")
    figure = plots.model_speedup(vit(batches=(256,)), "torch", SHARES, two)
    (point,) = (line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none")
    assert point.get_marker() == "X" and point.get_ydata()[0] == pytest.approx(61.408 / 59.960)


def test_batch_sizes_with_and_without_bounds():
    rows = vit(sparsities=(0.9,)).query("scope == 'mlp'")
    figure = plots.batch_sizes(rows, ["torch", "gather"], limits.amdahl(0.9, 0.64), 16)
    for axes in figure.axes:
        (bound,), (start,) = (
            lines_of(axes, "Amdahl's law at the dense rate"),
            lines_of(axes, "published: faster from batch 16"),
        )
        assert set(bound.get_ydata()) == {limits.amdahl(0.9, 0.64)} and bound.get_linestyle() == "--"
        assert set(start.get_xdata()) == {16}
    plain = legend_labels(plots.batch_sizes(rows, ["torch", "gather"]))
    assert plain == ["blocks 16×16", "blocks 32×32", "blocks 64×64"]


def test_a_long_label_beside_low_panels_is_written_in_two_lines():
    rows = vit(sparsities=(0.9,)).query("scope=='mlp'")
    rows["dense_compile"] = ["eager", "compile"] * (len(rows) // 2) + ["eager"] * (len(rows) % 2)
    figure = plots.batch_sizes(rows, ["torch", "gather"])
    assert figure.get_supylabel() == "speedup over the\nfastest dense"
    assert_nothing_is_clipped_or_covered(figure)


def test_models_and_batches_are_not_mixed():
    with pytest.raises(ValueError, match="one batch_size a figure"):
        plots.model_speedup(vit(), "torch", SHARES)
    with pytest.raises(ValueError, match="one scope a figure"):
        plots.batch_sizes(vit(), ["torch"])


def modes(**how):
    return gpu_vit(("mlp",), sparsities=(0.9,), **how)


def test_execution_modes_are_images_a_second_with_whiskers():
    rows = modes()
    axes = plots.execution_modes(rows).axes[0]
    names = tick_names(axes)
    assert names[-1] == "dense", "dense at the top"
    latency = rows.query("backend == 'torch' and block_size == 64 and compile == 'cudagraph'")
    place = names.index("torch 64×64")
    points = [line for line in axes.lines if line.get_marker() == "^" and len(line.get_ydata())]
    (point,) = (line for line in points if round(line.get_ydata()[0]) == place)
    assert point.get_xdata()[0] == pytest.approx(256 / latency["value"].item())
    spans = [path.vertices[:, 0] for whisker in axes.collections for path in whisker.get_paths()]
    expected = [256 / latency["high"].item(), 256 / latency["low"].item()]
    assert any(np.allclose(span, expected) for span in spans)
    assert f"{256 / latency['value'].item():,.0f}" in [text.get_text() for text in axes.texts]
    (line,) = lines_of(axes, "fastest dense")
    assert line.get_xdata()[0] == pytest.approx(256 / rows[rows["backend"] == "dense"]["value"].min())


def test_execution_modes_are_sorted_by_their_fastest():
    rows = modes()
    names = tick_names(plots.execution_modes(rows).axes[0])[:-1]
    best = rows.groupby(["backend", "block_size"], dropna=False)["value"].min()
    times = [best[n.split()[0], float(n.split("×")[1])] if "×" in n else best["2:4"].min() for n in names]
    assert times == sorted(times, reverse=True) and len(times) == 16


def test_execution_modes_legend_names_those_measured():
    rows = modes()
    labels = legend_labels(plots.execution_modes(rows[rows["compile"] != "cudagraph"]))
    assert labels == ["fastest dense", "eager", "max-autotune"]
    others = modes().assign(compile=lambda rows: rows["compile"].replace("cudagraph", "openvino"))
    assert "OpenVINO" in legend_labels(plots.execution_modes(others))
    no_dense = legend_labels(plots.execution_modes(rows[rows["backend"] != "dense"]))
    assert no_dense == ["eager", "max-autotune", "cudagraph"]
    unknown = rows.assign(compile=rows["compile"].replace("eager", "another way"))
    assert "another way" in legend_labels(plots.execution_modes(unknown))


@pytest.mark.parametrize(
    ("how", "column"), [({"batches": (1, 16)}, "batch_size"), ({"scopes": tuple(SHARES)}, "scope")]
)
def test_execution_modes_are_of_one_setting(how, column):
    with pytest.raises(ValueError, match=f"one {column} a figure"):
        plots.execution_modes(gpu_vit(**{"scopes": ("mlp",), "sparsities": (0.9,), **how}))


def test_memory_is_grouped_by_backend_in_colours_of_the_block_size():
    figure = plots.memory(gpu_memory())
    left, right = figure.axes
    names = tick_names(left)
    assert names[:3] == ["dense", "2:4", "blksprs 16×16"] and len(names) == 17
    assert len(left.patches) == len(right.patches) == 17
    dense = gpu_memory().query("backend == 'dense' and metric == 'model_bytes'")["value"].median()
    assert left.patches[0].get_width() == pytest.approx(dense / 1e6)
    assert left.patches[1].get_facecolor() == (1, 1, 1, 1), "2:4 is hollow"
    gaps = np.diff([bar.get_y() for bar in left.patches])
    assert (gaps > 1.5).sum() == 6 and gaps.min() == pytest.approx(1), "a gap between backends"
    assert figure.get_figheight() > plots.memory(memory()).get_figheight()


def test_block_sizes_that_take_the_same_memory_are_one_bar():
    rows = gpu_memory().query("metric == 'model_bytes'").assign(threads=4)
    rows.loc[rows["backend"] == "torch", "value"] = 8.01e7 + rows["block_size"] * 1e2
    rows.loc[(rows["backend"] == "gather") & (rows["block_size"] > 16), "value"] = 7e7
    figure = plots.memory(rows)
    (axes,) = figure.axes
    names = dict(zip(tick_names(axes), axes.patches, strict=True))
    bars = {name: bar.get_width() for name, bar in names.items() if name.split()[0] in ("torch", "gather")}
    assert list(bars) == ["gather 16×16", "gather 32×32, 64×64", "torch 16×16, 32×32, 64×64"]
    assert bars["gather 32×32, 64×64"] == 70
    assert names["torch 16×16, 32×32, 64×64"].get_facecolor() != names["gather 16×16"].get_facecolor()
    assert_nothing_is_clipped_or_covered(figure)


def test_names_of_several_backends_are_explained():
    rows = vit().query("scope == 'mlp' and sparsity == 0.9")
    assert told(plots.batch_sizes(rows, ["torch", "gather"])).endswith("gather: our fallback; torch: PyTorch's kernels")
    assert "kernels" not in told(plots.model_speedup(vit(batches=(256,)), "torch", SHARES)), "in the title"


# --- heat maps -------------------------------------------------------------------------------------------------------


def cell_texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_all_numbers_of_a_heat_map_have_as_many_decimals():
    rows = linear()
    assert {len(text.split(".")[1]) for text in cell_texts(plots.speedup_heatmaps(rows, "torch"))} == {2}
    fast = rows.assign(**{column: rows[column] * 8 for column in EXTRA})
    texts = cell_texts(plots.speedup_heatmaps(fast, "torch"))
    assert {len(text.split(".")[1]) for text in texts} == {1} and max(map(float, texts)) > 10


def test_cells_of_a_wide_spread_are_grey_and_marked():
    rows = linear((32,), (0.8, 0.9), ("torch",))
    figure = plots.speedup_heatmaps(rows, "torch")
    assert not any("~" in text for text in [*cell_texts(figure), told(figure)])
    rows.loc[(rows["model"] == LAYERS[1]) & (rows["sparsity"] == 0.8), "speedup_low"] /= 3
    figure = plots.speedup_heatmaps(rows, "torch")
    assert cell_texts(figure) == ["1.10", "1.20", "~1.10", "1.20"]
    assert told(figure).endswith("; ~: spread above 2×")
    shades = figure.axes[0].collections[-1].get_array()
    assert shades.mask.tolist() == [[True, True], [False, True]], "of the grey, only that cell is drawn"


def test_no_ticks_between_the_panels_of_a_heat_map():
    for axes in plots.speedup_heatmaps(linear(), "torch").axes:
        assert not any(tick.tick1line.get_visible() for tick in axes.yaxis.get_major_ticks())


# --- overlaps --------------------------------------------------------------------------------------------------------


def overlaps(figure: Figure, texts) -> list[tuple[str, str]]:
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    return [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.overlaps(two)]


def test_labels_of_coinciding_points_do_not_overlap():
    crowd = [
        {"block_size": b, "sparsity": s, "speedup": 1.5 + i / 1000, "top1": 96.0 - i / 1000}
        for i, (b, s) in enumerate(itertools.product((16, 32), (0.5, 0.8)))
    ]
    crowd += [{"block_size": 64, "sparsity": 0.95, "speedup": 2.0, "top1": 92.0}]
    ends = {"low": 92.0, "high": 97.0, "speedup_low": 1.4, "speedup_high": 2.1}
    figure = plots.pareto(in_a_model(crowd).assign(**ends), 97.0)
    figure.canvas.draw()
    texts = figure.axes[0].texts
    assert sorted(t.get_text() for t in texts) == ["50%", "50%: 1.40× to 2.10×", "80%", "80%", "95%"]
    assert not overlaps(figure, texts)


def test_ringed_is_the_highest_low_end_among_those_that_lost_less_than_two_points():
    speedups = {"speedup": [1.2, 1.6, 1.5, 1.1, 1.4, 1.9], "speedup_low": [1.0, 1.1, 1.3, 1.0, 1.2, 1.8]}
    points = in_a_model(POINTS).assign(**speedups, speedup_high=2.0, top1=[97, 97, 96.5, 97, 97, 95], low=94, high=98)
    figure = plots.pareto(points, 98.0)
    (axes,) = figure.axes
    (ring,) = lines_of(axes, "highest low end of the speedup, less than 2 points lost")
    assert ring.get_xdata().tolist() == [1.5] and ring.get_ydata().tolist() == [96.5]
    labels = sorted(text.get_text() for text in axes.texts)
    assert labels == ["50%", "50%", "80%", "80%", "90%", "90%: 1.30× to 2.00×"], "every point has its label"
    assert all(line.get_alpha() in (None, 1) for line in axes.lines), "and none is faint"
    assert "highest low" not in "".join(legend_labels(plots.pareto(points, 100.0))), "all lost more"


def test_accuracy_names_its_data():
    figure = plots.accuracy(trained().assign(dataset="cifar10-jpeg"), literature.losses())
    assert figure.get_suptitle().startswith("vit_digits on CIFAR-10 (JPEG): ")
    assert "mean of 2 seeds, each a dot" in [text.get_text() for text in figure.texts]


def test_accuracy_has_a_tick_where_it_has_a_point():
    for axes in plots.accuracy(trained(sparsities=(0.5, 0.9, 0.95)), literature.losses()).axes:
        assert list(axes.get_xticks()) == [0.5, 0.9, 0.95]


def test_accuracies_stand_side_by_side_with_a_dot_a_seed():
    (axes, _) = plots.accuracy(trained(), literature.losses()).axes
    means = [lines_of(axes, f"{block}×{block}")[0] for block in (8, 16, 32)]
    assert len({line.get_xdata()[0] for line in means}) == 3 and means[1].get_xdata()[0] == 0.5
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert sorted(dots[0].get_ydata()) == [88, 89, 92, 93] and means[0].get_ydata().tolist() == [92.5, 88.5]
    (axes, _) = plots.accuracy(trained().query("seed == 0"), literature.losses()).axes
    assert not sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "."), "one seed is the mean"


def test_variants_are_in_order_of_their_accuracy_below_the_reference():
    table = compared().assign(top1=[85.0, 83.0, 84.0], low=82.0, high=86.0)
    labels = [label.get_text() for label in plots.variants(table.iloc[::-1]).axes[0].get_yticklabels()]
    assert labels == ["reference: learnt scores", "Spartan (soft top-k), sparsity raised slowly", "masks left random"]


NAMES = {
    "scores_lr=0.01": "scores learn 10× faster",
    "scores_lr=0.0005": "scores learn 2× slower",
    "scores_lr=0.1 sparsity_schedule=cubic": "scores learn 100× faster, sparsity raised slowly",
    "sparse_steps=10 sparse_weight_grad=kept": "kept blocks alone learn, each mask for 10 steps",
    "method=another": "method=another",
}


@pytest.mark.parametrize("variant", NAMES)
def test_variants_have_readable_names(variant):
    (_, name) = tick_names(plots.variants(compared(("", variant))).axes[0])
    assert name == NAMES[variant]


def test_how_fast_scores_learn_is_told_beside_the_rate_of_the_recipe():
    table = compared(("", "scores_lr=0.01")).assign(recipe="cifar10 epochs=3 lr=0.002")
    assert tick_names(plots.variants(table).axes[0])[1] == "scores learn 5× faster"
    from blockvit.train.recipe import RECIPES

    assert {name: recipe.lr for name, recipe in RECIPES.items()} == plots.losses.LEARNING_RATES
    assert all(recipe.scores_lr is None for recipe in RECIPES.values())


def test_the_reference_stands_out_and_is_in_the_legend():
    figure = plots.variants(compared())
    (axes,) = figure.axes
    (point,) = lines_of(axes, "reference: learnt scores")
    assert "reference: learnt scores" in legend_labels(figure)
    others = [line for line in axes.lines if len(line.get_xdata()) == 1 and line is not point]
    assert len(others) == 2 and all(line.get_color() != point.get_color() for line in others)
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["bold", "normal", "normal"]


def test_random_masks_are_a_line_that_the_others_have_to_beat():
    (axes,) = plots.variants(compared().assign(top1=[85.0, 83.0, 84.0], low=82.0, high=86.0)).axes
    (line,) = lines_of(axes, "masks left random")
    assert list(line.get_xdata()) == [83, 83]
    assert "masks left random" not in legend_labels(plots.variants(compared(VARIANTS[::2])))


def fine_tuned() -> pd.DataFrame:
    """Variants that begin with the trained dense model, with a dense one that was trained on for as long."""
    start = "epochs=6 start=dense"
    long = "distillation_alpha=0.5 epochs=6 method=magnitude sparsity_schedule=cubic start=dense"
    tuned = compared((start, long)).assign(dense_top1=70.1, top1=[61.0, 64.0], low=60.0, high=65.0)
    return pd.concat([compared().assign(top1=58.0, low=57.0, high=59.0, dense_top1=68.0), tuned]).assign(
        lost=lambda rows: rows["dense_top1"] - rows["top1"]
    )


def test_variants_of_a_trained_model_are_named_and_stand_beside_their_dense_model():
    figure = plots.variants(fine_tuned())
    (axes,) = figure.axes
    names = tick_names(axes)
    assert names[0] == "reference: learnt scores" and "from the trained dense model, 6 epochs" in names
    start, *how = next(name for name in names if "\n" in name).split("\n")
    assert start == "from the trained dense model, 6 epochs:"
    assert " ".join(how) == "blocks of largest weights, sparsity raised slowly, taught by the dense model"
    assert len(how) == 2, "in lines that leave the panel its room"
    for label, top1 in (("dense: 68.0%", 68.0), ("dense, trained on for as long: 70.1%", 70.1)):
        (line,) = lines_of(axes, label)
        assert list(line.get_xdata()) == [top1, top1] and label in legend_labels(figure)
    assert "dense: 90.0%" in legend_labels(plots.variants(compared()))
    assert_nothing_is_clipped_or_covered(figure)


def test_a_variant_of_one_seed_is_hollow_among_others():
    def hollow(seeds):
        figure = plots.variants(compared().assign(seeds=seeds))
        points = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
        return [line.get_markerfacecolor() == "white" for line in points], "hollow" in told(figure)

    assert hollow([2, 3, 1]) == ([False, False, True], True)
    assert hollow([1, 1, 1]) == ([False] * 3, False) == hollow([2, 2, 2])


def test_exchanged_blocks_by_variant():
    (axes,) = plots.mask_changes(masks()).axes
    names = ["reference: learnt scores", "Spartan (soft top-k), sparsity raised slowly", "masks left random"]
    assert tick_names(axes) == names
    (mean,) = lines_of(axes, "mean of the layers")
    (other,) = plots.mask_changes(masks(), order=[VARIANTS[1], VARIANTS[0]]).axes
    assert tick_names(other) == ["masks left random", "reference: learnt scores", names[1]], "others come last"
    assert list(mean.get_xdata()) == [30.0] and len(lines_of(axes, "a layer")[0].get_xdata()) == len(LAYERS_OF_A_VIT)


def test_layers_of_a_kind_are_one_pair_of_boxes():
    kept = pd.DataFrame(
        [{"layer": f"layer {i} {part}", "mask": kind, "kept": k / 8}
         for i in range(4) for part in ("mlp.0", "mlp.3") for kind in ("before training", "learnt") for k in range(4)]
    )  # fmt: skip
    kept = pd.concat([kept, kept.assign(layer="heads head")])
    (axes,) = (figure := plots.kept_blocks(kept)).axes
    assert tick_names(axes) == ["mlp.0", "mlp.3", "head"] and legend_labels(figure) == ["before training", "learnt"]


def test_a_step_is_a_multiple_of_the_dense_one():
    overheads = comparisons.step_overheads(steps())
    figure = plots.step_overhead(overheads)
    assert figure.axes[0].get_yscale() == "log" and figure.get_supylabel().endswith("(lower is faster)")
    (line,) = lines_of(figure.axes[0], "16×16")
    cell = overheads.query("backend == 'supermask' and block_size == 16").sort_values("tokens")
    np.testing.assert_allclose(line.get_ydata(), 1 + cell["overhead"])
    assert set(lines_of(figure.axes[0], "dense")[0].get_ydata()) == {1.0}
    places = [lines_of(figure.axes[0], f"{block}×{block}")[0].get_xdata()[0] for block in (16, 32, 64)]
    assert places[1] == pytest.approx(197)
    assert places[0] < places[1] < places[2], "side by side: their times are the same"


@pytest.mark.parametrize("column", ["sparsity", "recipe"])
def test_variants_of_different_cells_are_not_drawn_as_one(column):
    other = compared().assign(**{column: 0.8 if column == "sparsity" else "cifar10 epochs=3"})
    with pytest.raises(ValueError, match=f"one {column} a figure"):
        plots.variants(pd.concat([compared(), other]))


EMPTY = {
    "training_curves": lambda: plots.training_curves(curves().iloc[:0]),
    "kept_blocks": lambda: plots.kept_blocks(KEPT.iloc[:0]),
    "step_overhead": lambda: plots.step_overhead(comparisons.step_overheads(steps().iloc[:0])),
    "speedup_heatmaps": lambda: plots.speedup_heatmaps(linear(), "no such backend"),
    "linear_speedup": lambda: plots.linear_speedup(linear().iloc[:0], ["torch"]),
    "linear_throughput": lambda: plots.linear_throughput(linear().iloc[:0], 1e12),
    "model_speedup": lambda: plots.model_speedup(vit().iloc[:0], "torch", SHARES),
    "batch_sizes": lambda: plots.batch_sizes(vit(), ["no such backend"]),
    "memory": lambda: plots.memory(vit()),
    "contenders": lambda: plots.contenders(linear(), 0.77),
    "large_matmuls": lambda: plots.large_matmuls(linear()),
    "execution_modes": lambda: plots.execution_modes(memory()),
    "accuracy": lambda: plots.accuracy(trained().iloc[:0], literature.losses()),
    "pareto": lambda: plots.pareto(in_a_model(POINTS).iloc[:0], 97.0),
    "variants": lambda: plots.variants(compared().iloc[:0]),
    "mask_changes": lambda: plots.mask_changes(masks().iloc[:0]),
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
    "break-even, cells missing": lambda: plots.linear_speedup(linear(missing=[(64, 0.9), (16, 0.5)]), ["torch"]),
    "break-even, one cell": lambda: plots.linear_speedup(linear((32,), (0.9,)), ["torch"]),
    "break-even, gpu": lambda: plots.linear_speedup(linear((16, 32, 64, 128), **GPU), ["torch"]),
    "throughput, one cell": lambda: plots.linear_throughput(with_dense(linear((32,), (0.9,))), 1e12),
    "model, cells missing": lambda: plots.model_speedup(
        vit(batches=(256,), missing=[(64, 0.9), (16, 0.5)], precision="bf16"), "gather", SHARES, published()
    ),
    "model, one cell": lambda: plots.model_speedup(vit((32,), (0.9,), (256,)), "torch", {"mlp": 0.64}),
    "batches, one": lambda: plots.batch_sizes(vit((32,), (0.9,), (256,)).query("scope == 'mlp'"), ["torch"]),
    "accuracy, cells missing": lambda: plots.accuracy(trained(missing=[(8, 0.9)]), literature.losses()),
    "accuracy, dense alone": lambda: plots.accuracy(trained(blocks=()), literature.losses().iloc[:0]),
    "variants, the reference alone": lambda: plots.variants(compared(("",))),
    "masks, the reference missing": lambda: plots.mask_changes(masks(VARIANTS[1:])),
    "accuracy, one cell": lambda: plots.accuracy(trained((32,), (0.9,)), literature.losses()),
    "curves, cells missing": lambda: plots.training_curves(curves(missing=[(8, 0.9)])),
    "2:4 alone, heat map": lambda: plots.speedup_heatmaps(gpu_speedups(precisions=("bf16",)), "2:4"),
    "2:4 alone, model": lambda: plots.model_speedup(comparisons.speedups(gpu_vit()), "2:4", SHARES),
    "contenders, cells missing": lambda: plots.contenders(linear(missing=[(64, 0.9)]), 0.9),
    "large, one cell": lambda: plots.large_matmuls(
        comparisons.speedups(gpu_squares()).query("block_size == 64 and sparsity == 0.9 and tokens == 4096")
    ),
    "throughput, no dense": lambda: plots.linear_throughput(linear((32,), (0.9,)), 1e12),
    "modes, one": lambda: plots.execution_modes(gpu_vit(("mlp",), sparsities=(0.9,)).iloc[:1]),
    "memory, one metric": lambda: plots.memory(memory().query("metric == 'model_bytes' or backend == 'dense'")),
    "pareto, one point": lambda: plots.pareto(in_a_model(POINTS[:1]), 97.0),
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
    assert "blocks 64×64" in legend_labels(plots.linear_speedup(table, ["torch"]))


def test_save_makes_its_folder(tmp_path: Path):
    figure = plots.pareto(in_a_model(POINTS), 97.0)
    assert plots.save(figure, tmp_path / "new" / "folder", "name") is figure
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["name.png", "name.svg"]


# --- on the device ---------------------------------------------------------------------------------------------------


def test_latency_tails_are_milliseconds_the_fastest_uppermost():
    (axes,) = plots.latency_tails(tails()).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "dense, eager", "dense, OpenVINO", "cpu, mlp sparse", "cpu+dense, all sparse",
    ]  # fmt: skip
    places = {
        (line.get_marker(), line.get_ydata()[0]): line.get_xdata()[0] for line in axes.lines if len(line.get_xdata())
    }
    assert places[">", 3] == pytest.approx(1.0) and places["|", 3] == pytest.approx(1.25)
    assert places["o", 0] == pytest.approx(8.0) and places["|", 0] == pytest.approx(10.0)
    assert "1.00 / 1.25" in [text.get_text() for text in axes.texts]


def test_a_variant_without_tails_is_left_out_and_two_batches_are_refused():
    rows = tails()
    (axes,) = plots.latency_tails(rows[~((rows["scope"] == "mlp") & (rows["metric"] == "latency_p90"))]).axes
    assert len(axes.get_yticklabels()) == 3
    with pytest.raises(ValueError, match="one batch_size a figure"):
        plots.latency_tails(pd.concat([rows, rows.assign(batch_size=8)]))


def test_a_distribution_is_of_one_group():
    rows = tails()
    later = rows[rows["metric"] == "latency"].assign(group="later", value=1.0)
    assert "1.00 / 1.25" in [text.get_text() for text in plots.latency_tails(pd.concat([rows, later])).axes[0].texts]


def test_threads_has_a_panel_a_scope_with_the_dense_engines_of_its_groups():
    panels = {axes.get_title(): axes for axes in plots.threads(by_threads()).axes}
    assert next(iter(panels)) == "MLP sparse"
    for title, backend, dense in (("MLP sparse", "cpu", 32.0), ("all linear layers sparse", "cpu+dense", 64.0)):
        lines = {line.get_label(): line for line in panels[title].lines}
        assert set(lines) == {"dense, eager", "dense, OpenVINO", backend}
        assert {label: line.get_linestyle() for label, line in lines.items()}[backend] == "-"
        assert lines["dense, eager"].get_linestyle() == "--"
        assert lines["dense, eager"].get_ydata() == pytest.approx([dense, dense / 2, dense / 4])
        assert lines[backend].get_xdata().tolist() == [1, 2, 4]


def test_threads_are_of_one_group_a_scope_and_number():
    rows = by_threads()
    with pytest.raises(ValueError, match=r"one group a scope and number of threads, but mlp at 4 has several"):
        again = rows[(rows["threads"] == 4) & (rows["scope"] == "mlp")].assign(group="later")
        plots.threads(pd.concat([rows, again]))


def test_roofline_has_the_measured_roof_and_achieved_arithmetic():
    axes = roofline().axes[0]
    (roof,) = [line for line in axes.lines if line.get_label() == "measured roof"]
    x, y = roof.get_data()
    assert {f"{tick:e}"[:3] for tick in axes.get_yticks()} <= {"1.0", "2.0", "5.0"}, "no powers of two for a rate"
    assert y.max() <= 2000 and np.allclose(y, np.minimum(2e12, 1e11 * x) / 1e9)
    rows = linear(blocks=(16,), backends=("gather",))
    row = rows.iloc[0]
    flop = limits.linear_seconds(rows, 2e12)["flop"].iloc[0]
    (points,) = [line for line in axes.lines if line.get_label() == "16×16"]
    assert flop / row["value"] / 1e9 == pytest.approx(points.get_ydata()[0])


def test_roofline_of_a_cpu_is_flat_with_a_marker_an_engine():
    axes = roofline(bandwidth=None).axes[0]
    (roof,) = lines_of(axes, "measured peak")
    assert set(roof.get_ydata()) == {2000.0} and not lines_of(axes, "measured roof")
    (point,) = lines_of(axes, "dense, eager")
    shapes = [2 * 768 * 768 * 197 / 1e9, 2 * 3072 * 768 * 197 / 1e9]  # in a second each
    assert point.get_ydata() == pytest.approx([np.median(shapes)])


def test_an_engine_looks_the_same_in_every_figure():
    rows = by_threads()
    figures = [
        plots.threads(rows),
        plots.latency_tails(tails()),
        plots.execution_modes(tails().query("scope != 'all'")),
    ]
    looks = set()
    for figure in figures:
        looks |= {(line.get_marker(), line.get_color()) for axes in figure.axes for line in axes.lines if
                  line.get_marker() == plots.style.ENGINES["openvino"][0]}  # fmt: skip
    assert looks == {plots.style.ENGINES["openvino"]}


def test_figures_tell_machine_threads_and_precision_below_a_title_in_words():
    rows = linear(device="Some CPU", threads=4)
    figure = plots.linear_speedup(rows, ["gather"])
    title, told = (text.get_text() for text in figure.texts[:2])
    assert title == "Linear layers of ViT-B/16, 197 tokens: speedup of our fallback (gather) by sparsity"
    assert told == "Some CPU, 4 threads, fp32"
    assert [axes.get_title() for axes in figure.axes] == ["out_proj 768×768", "mlp.0 3072×768"]


def test_published_models_tell_what_accuracy_they_cost():
    figure = plots.model_speedup(vit(batches=(256,)), "torch", SHARES, published(), literature.losses())
    assert not any(axes.texts for axes in figure.axes), "the panels are for what was measured"
    assert "lost, in points of ImageNet top-1: 0.7 at 80%, 2.3 at 90% (32×32); " in told(figure)
    assert told(figure).endswith("; 4.8 at 80%, 19.0 at 90% (64×64, against other weights)")
    assert_nothing_is_clipped_or_covered(figure)
    without = plots.model_speedup(vit(batches=(256,)), "torch", SHARES, published().iloc[:0], literature.losses())
    assert "lost" not in told(without)


@pytest.mark.parametrize(
    ("value", "text"), [(13.0, "13.0"), (0.057, "0.0570"), (99.96, "100"), (346.4, "346"), (1234.0, "1,234")]
)
def test_numbers_keep_the_zeros_that_were_measured(value, text):
    assert plots.style.three_digits(value) == text


def bands(axes) -> list[tuple[float, float]]:
    """The ends of each shaded range, at its first point."""
    drawn = [path.vertices for shade in axes.collections for path in shade.get_paths()]
    return [(at[at[:, 0] == at[:, 0].min(), 1].min(), at[at[:, 0] == at[:, 0].min(), 1].max()) for at in drawn]


def test_lines_by_batch_size_and_by_threads_have_their_spread():
    rows = vit(sparsities=(0.9,), blocks=(64,)).query("scope == 'mlp'")
    (band,) = bands(plots.batch_sizes(rows, ["torch"]).axes[0])
    assert band == pytest.approx((0.9 * (0.5 + 0.9), 1.1 * (0.5 + 0.9)))
    rows = by_threads().assign(low=lambda rows: rows["value"] * 0.9, high=lambda rows: rows["value"] * 1.2)
    axes = plots.threads(rows).axes[0]
    assert len(bands(axes)) == len(axes.lines) == 3
    (line,) = lines_of(axes, "cpu")
    assert (0.9 * line.get_ydata()[0], 1.2 * line.get_ydata()[0]) in [pytest.approx(band) for band in bands(axes)]


@pytest.mark.parametrize("times", [1, 3, 20, 500])
def test_times_have_three_round_ticks_however_far_apart_they_are(times):
    rows = by_threads().assign(value=lambda rows: np.geomspace(9e-3, 9e-3 * 1.7 * times, len(rows)))
    axes = (figure := plots.threads(rows)).axes[0]
    figure.canvas.draw()
    ticks = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    assert len(ticks) >= 3 and all(f"{tick:e}"[:3] in ("1.0", "1.5", "2.0", "3.0", "5.0", "7.0") or times == 1
                                   for tick in ticks)  # fmt: skip


def test_no_batch_size_lies_above_the_panel():
    rows = vit(sparsities=(0.9,)).query("scope=='mlp'")
    rows.loc[rows["backend"] == "gather", "speedup"] *= 3
    figure = plots.batch_sizes(rows, ["torch", "gather"])
    top = max(line.get_ydata().max() for axes in figure.axes for line in axes.lines if line.get_label().endswith("×64"))
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > top for axes in figure.axes)


def test_bars_of_traffic_add_up_and_tell_their_sum():
    (axes,) = plots.traffic(TRAFFIC, limits.TRAFFIC).axes
    ends = {}
    for bar in axes.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        ends[place] = max(ends.get(place, 0), bar.get_x() + bar.get_width())
    assert [ends[place] for place in (2, 1, 0)] == pytest.approx(list(TRAFFIC["bytes"] / 1e6))
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "dense",
        "sparse, layer by layer",
        "sparse, one kernel",
    ]
    figure = plots.traffic(TRAFFIC, limits.TRAFFIC, "197 tokens, bf16")
    assert told(figure) == "197 tokens, bf16; counted from the shapes, not measured"
    assert axes.texts[2].get_text().startswith(f"{TRAFFIC.loc['one kernel', 'bytes'] / 1e6:,.0f} MB")


def test_speedups_of_machines_stand_below_each_other_beside_their_cost():
    figure = plots.headline_speedups(machines())
    (axes,) = figure.axes
    names = tick_names(axes)
    assert names[:2] == ["dense, eager PyTorch", "dense, on our kernel"]
    assert names[2] == "MLP, 80% in blocks of 32\n0.7 points lost, as published"
    assert names[-1].endswith("\nno accurate model known")
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    at_80 = [line for line in points if round(float(line.get_ydata()[0])) == 2]
    assert [line.get_xdata()[0] for line in at_80] == [1.5, 1.5]
    assert at_80[0].get_ydata()[0] < at_80[1].get_ydata()[0], "in the order of the legend, on an axis that points down"
    assert [line.get_xdata()[0] for line in points if round(float(line.get_ydata()[0])) == 0] == pytest.approx(
        [2 / 3] * 2
    )
    assert len([line for line in points if round(float(line.get_ydata()[0])) == 1]) == 1
    assert legend_labels(figure) == ["CPU 1, fp32", "CPU 2, fp32"]
    assert_nothing_is_clipped_or_covered(figure)
