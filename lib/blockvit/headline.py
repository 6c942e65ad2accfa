"""The README's first table: how fast ViT-B/16 is, dense and block-sparse, and what that sparsity costs. No torch."""

from __future__ import annotations

import pandas as pd

from . import literature
from .comparisons import most_threads, over_strongest_field, speedups
from .results import SCOPE_TITLES, UNPRUNED, Store

MODEL = "vit_b_16"
BATCHES = (1, 256)  # one image is what a device sees; 256 is the post's
CASES = (("mlp", 0.8, 32), ("mlp", 0.9, 32), ("mlp", 0.9, 64), ("all", 0.9, 64))
"""``(scope, sparsity, block size)``: those with published losses, and the fastest."""


OURS_DENSE = (UNPRUNED, 0.0, 32)
"""Likewise the dense model wholly on our kernel: what of a speedup is the kernel's."""

DENSE_TOO = "+dense"
"""Ends the name of a backend that runs the layers which stay dense as well; see ``workloads.variants``."""


def markdown(store: Store) -> str:
    """A Markdown table for each batch size measured: milliseconds, and times as fast as the fastest dense engine.

    A column is a device and precision class, the last what the sparsity cost on ImageNet as published. Each speedup is
    over the dense engine that was timed in turn with it, and is that of the way to run the model that is surely
    fastest; its spread is in brackets. The dense times are the medians over these groups.
    """
    rows = _speedups(store)
    if rows.empty:
        return "No speed of a whole ViT-B/16 is in the tables yet.\n"
    parts = [_table(rows[rows["batch_size"] == batch], batch) for batch in BATCHES]
    return "\n".join(part for part in parts if part)


def _speedups(store: Store) -> pd.DataFrame:
    """Every variant of each case, over the strongest field of dense engines; ``eager_value`` beside it."""
    rows = store.read("vit")
    rows = rows[rows["model"] == MODEL]
    rows = pd.concat([most_threads(mine) for _, mine in rows.groupby("device")] or [rows])
    cases = pd.DataFrame([*CASES, OURS_DENSE], columns=["scope", "sparsity", "block_size"])
    found = over_strongest_field(speedups(rows)).merge(cases)
    eager = rows[(rows["backend"] == "dense") & (rows["compile"] == "eager") & (rows["metric"] == "latency")]
    return found.merge(eager[["group", "precision", "value"]].rename(columns={"value": "eager_value"}), how="left")


def _table(rows: pd.DataFrame, batch: int) -> str:
    if rows.empty:
        return ""
    columns = dict(list(rows.groupby(["device", "precision"])))
    title = "One image" if batch == 1 else f"A batch of {batch}"
    heads = [title, *(f"{device}, {precision}" for device, precision in columns), "points lost, published"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for name, column in (("dense, eager PyTorch", "eager_value"), ("dense, the fastest engine", "dense_value")):
        lines.append(_line([name, *(_ms(mine[column].median()) for mine in columns.values()), ""]))
    unpruned = [_of(mine, *OURS_DENSE) for mine in columns.values()]
    if any(len(mine) for mine in unpruned):
        lines.append(_line(["dense, on our kernel", *map(_cell, unpruned), ""]))
    for case in CASES:
        ways = {"": [_of(mine, *case) for mine in columns.values()]}
        if any(mine["backend"].str.endswith(DENSE_TOO).any() for mine in ways[""]) and case[0] != "all":
            ways["; the other layers in PyTorch"] = [m[~m["backend"].str.endswith(DENSE_TOO)] for m in ways[""]]
        for way, cells in ways.items():
            if any(len(mine) for mine in cells):
                scope, sparsity, block = case
                name = f"{SCOPE_TITLES[scope]}, {sparsity:.0%} in blocks of {block}{way}"
                lines.append(_line([name, *map(_cell, cells), _published_loss(*case)]))
    return "\n".join(lines) + "\n"


def _of(rows: pd.DataFrame, scope: str, sparsity: float, block_size: int) -> pd.DataFrame:
    return rows[(rows["scope"] == scope) & (rows["sparsity"] == sparsity) & (rows["block_size"] == block_size)]


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    best = rows.loc[rows["speedup_low"].idxmax()]
    how = "" if best["compile"] == "eager" else ", compiled"
    spread = f"{best['speedup_low']:.2f}–{best['speedup_high']:.2f}"
    return f"{_ms(best['value'])}{how}, **{best['speedup']:.2f}×** ({spread})"


def _published_loss(scope: str, sparsity: float, block_size: int) -> str:
    """Of ViT-B/16 on ImageNet with a sparse MLP, as its sources have it."""
    losses = literature.losses()
    found = losses[(losses["sparsity"] == sparsity) & (losses["block_size"] == block_size)]
    return f"{found['lost'].iloc[0]:.1f}" if scope == "mlp" and len(found) else "none published"


def _ms(seconds: float) -> str:
    return "" if seconds != seconds else f"{1e3 * seconds:#.3g} ms".replace(". ", " ")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
