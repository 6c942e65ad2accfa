"""How verdicts put rows of speedups in words."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from ..comparisons import where
from .verdicts import FAILS, HOLDS, Verdict

OTHERS = ("tf32", "bf16")  # precision classes told of beside fp32, which decides

Reading = Callable[[pd.DataFrame], str]  # of rows of one precision class; empty if they do not suffice


def times(value: float) -> str:
    """A speedup: ``1.24×``."""
    return f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def by_block(rows: pd.DataFrame) -> str:
    """Speedups with their block sizes: ``1.24× (16), 1.37× (32)``."""
    rows = rows.sort_values("block_size")
    return ", ".join(f"{times(r.speedup)} ({int(r.block_size)})" for r in rows.itertuples())


def by_backends(rows: pd.DataFrame) -> str:
    """Who did it, while that is short: `` by gather and torch_tuned``."""
    names = sorted(rows["backend"].unique())
    return f" by {' and '.join(names)}" if 1 <= len(names) <= 2 else ""


def cells_faster(rows: pd.DataFrame) -> str:
    """How many are faster than dense: ``3 of 5 cells faster``."""
    return f"{(rows['speedup'] > 1).sum()} of {len(rows)} cells faster"


def dense_field(engines: float) -> str:
    """What a speedup over the fastest of so many dense variants is over."""
    return "eager dense PyTorch" if engines == 1 else f"the fastest of {engines:.0f} dense engines"


def model_names(rows: pd.DataFrame) -> str:
    """The models that the rows are of."""
    return ", ".join(sorted(rows["model"].unique()))


def block_sizes(rows: pd.DataFrame) -> str:
    """The block sizes that the rows are of."""
    return ", ".join(f"{block:.0f}" for block in sorted(rows["block_size"].unique()))


def other_precisions(like: pd.DataFrame, best: pd.DataFrame, number: Reading, ours: Reading) -> str:
    """What was measured in the other precision classes, read as in fp32: ``bf16: 0.90× (best here: 1.20×)``."""
    texts = []
    for precision in OTHERS:
        rows, all_rows = (where(table, precision=precision) for table in (like, best))
        told, best_told = number(rows) if len(rows) else "", ours(all_rows) if len(all_rows) else ""
        if told:
            texts.append(f"{precision}: {told}" + (f" (best here: {best_told})" if best_told else ""))
        elif best_told:
            texts.append(f"{precision}, best here: {best_told}")
    return "; ".join(texts)


def decided(holds: bool, like: pd.DataFrame, best: pd.DataFrame, number: Reading, ours: Reading) -> Verdict:
    """A verdict with its texts: from the fp32 rows, and beside them from those of the other precision classes."""
    fp32, best_fp32 = (where(table, precision="fp32") for table in (like, best))
    return Verdict(
        HOLDS if holds else FAILS,
        number(fp32),
        f"best here: {ours(best_fp32)}",
        other_precisions(like, best, number, ours),
    )
