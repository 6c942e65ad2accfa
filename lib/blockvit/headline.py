"""The README's first table: how fast ViT-B/16 is, dense and block-sparse, and what that sparsity costs. No torch."""

from __future__ import annotations

import pandas as pd

from . import literature
from .comparisons import fastest_of_each, most_threads, over_strongest_field, speedups
from .results import SCOPE_TITLES, Store

MODEL = "vit_b_16"
BATCHES = (1, 256)  # one image is what a device sees; 256 is the post's
CASES = (("mlp", 0.8, 32), ("mlp", 0.9, 32), ("mlp", 0.9, 64), ("all", 0.9, 64))
"""``(scope, sparsity, block size)``: those with published losses, and the fastest."""


def markdown(store: Store) -> str:
    """A Markdown table for each batch size measured: milliseconds, and times as fast as the fastest dense engine.

    A column is a device and precision class, the last what the sparsity cost on ImageNet as published. Each speedup is
    over the dense engine that was timed in turn with it; the dense times are the medians over these groups.
    """
    rows = _speedups(store)
    if rows.empty:
        return "No speed of a whole ViT-B/16 is in the tables yet.\n"
    parts = [_table(rows[rows["batch_size"] == batch], batch) for batch in BATCHES]
    return "\n".join(part for part in parts if part)


def _speedups(store: Store) -> pd.DataFrame:
    """The fastest variant of each case, over the strongest field of dense engines; ``eager_value`` beside it."""
    rows = store.read("vit")
    rows = rows[rows["model"] == MODEL]
    rows = pd.concat([most_threads(mine) for _, mine in rows.groupby("device")] or [rows])
    case = ["scope", "sparsity", "block_size"]
    found = over_strongest_field(speedups(rows)).merge(pd.DataFrame(CASES, columns=case))
    found = fastest_of_each(found, ["device", "precision", "batch_size", *case])
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
    for scope, sparsity, block in CASES:
        cells = [_cell(mine, scope, sparsity, block) for mine in columns.values()]
        if any(cells):
            name = f"{SCOPE_TITLES[scope]}, {sparsity:.0%} in blocks of {block}"
            lines.append(_line([name, *cells, _published_loss(scope, sparsity, block)]))
    return "\n".join(lines) + "\n"


def _cell(rows: pd.DataFrame, scope: str, sparsity: float, block_size: int) -> str:
    found = rows[(rows["scope"] == scope) & (rows["sparsity"] == sparsity) & (rows["block_size"] == block_size)]
    return "" if found.empty else f"{_ms(found['value'].iloc[0])} (**{found['speedup'].iloc[0]:.2f}×**)"


def _published_loss(scope: str, sparsity: float, block_size: int) -> str:
    """Of ViT-B/16 on ImageNet with a sparse MLP, as its sources have it."""
    losses = literature.losses()
    found = losses[(losses["sparsity"] == sparsity) & (losses["block_size"] == block_size)]
    return f"{found['lost'].iloc[0]:.1f}" if scope == "mlp" and len(found) else "none published"


def _ms(seconds: float) -> str:
    return "" if seconds != seconds else f"{1e3 * seconds:.3g} ms"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
