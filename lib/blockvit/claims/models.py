"""Claims of whole models' speed: C4 to C7."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..comparisons import beside_most_engines, break_even, fastest_of_each, variant, where
from ..results import SCOPE_TITLES
from .evidence import Evidence, published
from .verdicts import FAILS, HOLDS_BY_OURS, HOLDS_ON_CPU, NEAR, NOT_MEASURED, Verdict
from .wording import OTHERS, by_backends, by_block, cells_faster, decided, dense_field, times


def c4(e: Evidence) -> Verdict:
    """End to end at 90%: 1.24x, 1.37x, 1.65x."""
    goals = published(metric="speedup", scope="mlp", model="vit_b_16").set_index("block_size")["value"]
    like, best = (_vit_b_16(rows, batch_size=256, sparsity=0.9) for rows in (e.vit_like, e.vit_best))
    like = like[like["block_size"].isin(goals.index)]
    fp32 = where(like, precision="fp32")
    if set(fp32["block_size"]) != set(goals.index):
        return NOT_MEASURED
    reached = fp32["speedup"].to_numpy() >= NEAR * goals[fp32["block_size"]].to_numpy()
    return decided(reached.all(), like, best, by_block, _best_by_block)


def _best_by_block(rows: pd.DataFrame) -> str:
    """The fastest variant of each block size, named once if it is the same for all."""
    best = fastest_of_each(rows, ["block_size"]).sort_values("block_size")
    names = [variant(row) for row in best.itertuples()]
    if len(set(names)) == 1:
        return f"{by_block(best)} by {names[0]}"
    return ", ".join(
        f"{times(row.speedup)} ({row.block_size:.0f}, {name})"
        for row, name in zip(best.itertuples(), names, strict=True)
    )


def c5(e: Evidence) -> Verdict:
    """Break-even sparsity 0.86, 0.82, 0.70."""
    goals = published(metric="break_even_sparsity").set_index("block_size")["value"]

    def sweeps(rows: pd.DataFrame) -> pd.DataFrame:
        rows = fastest_of_each(_vit_b_16(rows, batch_size=256), ["precision", "block_size", "sparsity"])
        enough = rows.groupby(["precision", "block_size"])["sparsity"].transform("nunique") >= 3
        return rows[enough & rows["block_size"].isin(goals.index)]

    like, best = sweeps(e.vit_like), sweeps(e.vit_best)
    fp32 = _break_evens(where(like, precision="fp32"))
    if set(fp32) != {int(block) for block in goals.index}:
        return NOT_MEASURED
    reached = [
        np.interp(goals[block], *line.sort_values("sparsity")[["sparsity", "speedup"]].to_numpy().T) >= NEAR
        for block, line in where(like, precision="fp32").groupby("block_size")
    ]
    reached.append(None not in fp32.values())  # near 1 everywhere is faster nowhere
    return decided(all(reached), like, best, _edges, lambda rows: _edges(rows) + by_backends(rows[rows["speedup"] > 1]))


def _break_evens(rows: pd.DataFrame) -> dict[int, float | None]:
    return {
        int(block): break_even(list(line["sparsity"]), list(line["speedup"]))
        for block, line in rows.groupby("block_size")
    }


def _edges(rows: pd.DataFrame) -> str:
    lowest = rows.groupby("block_size")["sparsity"].min()

    def text(block: int, edge: float | None) -> str:
        if edge is None:
            return f"never ({block})"
        at_most = "≤ " if edge <= lowest[block] else ""  # faster wherever measured: the true edge may lie lower
        return f"{at_most}{edge:.2f} ({block})"

    return ", ".join(text(block, edge) for block, edge in _break_evens(rows).items())


def c6(e: Evidence) -> Verdict:
    """At 90% faster from batch size 16 up; larger blocks win at large batches, smaller break even earlier.

    Decided by the post's block sizes of which batches of both 16 and 256 were measured.
    """
    goals = published(metric="speedup", scope="mlp", model="vit_b_16")["block_size"]
    like = _vit_b_16(e.vit_like, sparsity=0.9)
    like = like[like["block_size"].isin(goals)]
    cell = ["precision", "block_size"]
    both = like[like["batch_size"].isin((16, 256))].groupby(cell)["batch_size"].nunique() == 2
    like = like[pd.MultiIndex.from_frame(like[cell]).isin(both[both].index)]
    fp32 = where(like, precision="fp32")
    if fp32["block_size"].nunique() < 2:
        return NOT_MEASURED
    fast = (fp32[fp32["batch_size"] >= 16]["speedup"] > 1).all()
    at_most = fp32[fp32["batch_size"] == fp32["batch_size"].max()].sort_values("block_size")["speedup"]
    holds = fast and at_most.is_monotonic_increasing and _first_faster(fp32).is_monotonic_increasing
    return decided(holds, like, _vit_b_16(e.vit_best, sparsity=0.9), _by_batch, _from_batch)


def _first_faster(rows: pd.DataFrame) -> pd.Series:
    """By block size, in order: the smallest batch that is faster than dense; infinite if none is."""
    first = rows[rows["speedup"] > 1].groupby("block_size")["batch_size"].min()
    return first.reindex(sorted(rows["block_size"].unique())).fillna(float("inf"))


def _by_batch(rows: pd.DataFrame) -> str:
    first = ", ".join(
        f"never ({block:.0f})" if batch == float("inf") else f"{batch:.0f} ({block:.0f})"
        for block, batch in _first_faster(rows).items()
    )
    return f"{cells_faster(rows[rows['batch_size'] >= 16])} from batch 16 up, first faster at batch {first}"


def _from_batch(rows: pd.DataFrame) -> str:
    """From which batch size on the best variant is faster, at each batch measured."""
    best = fastest_of_each(rows, ["batch_size"]).sort_values("batch_size", ascending=False)
    faster = best[(best["speedup"] > 1).cummin()]
    return f"from batch {faster['batch_size'].min():.0f} up{by_backends(faster)}" if len(faster) else "never"


def c7(e: Evidence) -> Verdict:
    """On-device hardware is faster at batch size 1.

    The post measured nothing here that could be repeated like for like: any backend that is faster decides, with the
    MLP sparse, as the published models have it, if that was measured. A CPU stands in for a device, whichever it is.
    """
    rows = where(e.vit_best, model="vit_b_16", batch_size=1, sparsity=0.9)
    fp32 = beside_most_engines(where(rows, precision="fp32"))
    if e.is_gpu or fp32.empty:
        return NOT_MEASURED
    others = {precision: beside_most_engines(where(rows, precision=precision)) for precision in OTHERS}
    told = [f"{precision}: {_one_image(cell)}" for precision, cell in others.items() if len(cell)]
    top = _top_by_scope(fp32)[0]
    seed = where(fp32, scope=top["scope"], backend="torch")["speedup"]
    holds = HOLDS_ON_CPU if (seed > 1).any() else HOLDS_BY_OURS
    return Verdict(
        holds if top["speedup_low"] > 1 else FAILS,
        _one_image(fp32),
        others="; ".join([*told, "no phone or board was measured: this CPU stands in"]),
        brief=_one_image_in_brief(fp32),
    )


def _one_image_in_brief(rows: pd.DataFrame) -> str:
    tops = []
    for top in _top_by_scope(rows):
        spread = f"{times(top['speedup_low'])} to {times(top['speedup_high'])}"
        how = f"blocks of {top['block_size']:.0f}" + ("" if top["compile"] == "eager" else ", compiled")
        tops.append(f"{SCOPE_TITLES.get(top['scope'], top['scope'])} {times(top['speedup'])} ({spread}; {how})")
    seed = where(rows, backend="torch")["speedup"]
    return f"at 90% {', '.join(tops)}" + (f"; through PyTorch's kernels {times(seed.max())}" if len(seed) else "")


def _top_by_scope(rows: pd.DataFrame) -> list[pd.Series]:
    """The variant of each scope that is surely fastest, by the low end of its spread; the MLP's first."""
    tops = [top for _, top in fastest_of_each(rows, ["scope"], by="speedup_low").iterrows()]
    return sorted(tops, key=lambda top: (top["scope"] != "mlp", top["scope"]))


def _one_image(rows: pd.DataFrame) -> str:
    """What each scope reaches at batch size 1, and what PyTorch's kernels, the post's seed, do there."""
    texts = []
    for best in _top_by_scope(rows):
        seed = where(rows, scope=best["scope"], backend="torch")["speedup"]
        texts.append(
            f"{SCOPE_TITLES.get(best['scope'], best['scope'])} at 90%: {times(best['speedup'])} (spread "
            f"{times(best['speedup_low'])} to {times(best['speedup_high'])}) by {variant(best)} in blocks of "
            f"{best['block_size']:.0f}" + (f", PyTorch's BSR {times(seed.max())}" if len(seed) else "")
        )
    return f"{'; '.join(texts)}; over {dense_field(rows['dense_variants'].max())}"


def _vit_b_16(rows: pd.DataFrame, **equal: object) -> pd.DataFrame:
    return where(rows, model="vit_b_16", scope="mlp", **equal)
