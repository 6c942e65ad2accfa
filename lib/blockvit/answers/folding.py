"""Notebook 2: what folding changes, and what conversion costs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd


def conversion(
    difference: Mapping[str, float],
    fates: pd.DataFrame,
    cost: Mapping[str, float],
    *,
    model: str,
    large_model: str,
    block_size: int,
    sparsity: float,
) -> str:
    """Whether folding changed anything, what became of the layers, bytes and seconds; a Markdown list.

    Args:
        difference: the largest change of a logit by each of ``workloads.DIFFERENCES``.
        fates: as ``layer_fates`` gives them, of ``model``.
        cost: of a ``workloads.ConversionCase`` of ``large_model``, by metric; of an older one, which did not time how a
            dense checkpoint loads, without that.
        model: what was folded.
        large_model: what was timed, every linear layer of it sparse.
        block_size: of the large model.
        sparsity: likewise.
    """
    fold, load = difference["fold_difference"], difference["load_difference"]
    counts = fates["fate"].value_counts()
    seconds = f"Converting took {cost['convert_seconds']:.2f} s, once; loading takes {cost['load_seconds']:.2f} s"
    if "dense_load_seconds" in cost:
        seconds += f", that of a dense checkpoint {cost['dense_load_seconds']:.2f} s"
    parts = [
        f"{_changed('Folding', fold)}, {_changed('saving and loading', load)}; the block-sparse product sums in "
        f"another order and differs by {difference['convert_difference']:.2g}.",
        f"Of the {len(fates)} layers of {model}, {counts.get('converted', 0)} were converted, "
        f"{counts.get('padded', 0)} padded, {counts.get('dense', 0)} left dense.",
        f"With every linear layer at {sparsity:.0%} in blocks of {block_size}, {large_model} went from "
        f"{cost['dense_bytes'] / 1e6:.0f} MB to {cost['sparse_bytes'] / 1e6:.0f} MB in memory, as the backend holds "
        f"it, and {cost['file_bytes'] / 1e6:.0f} MB on disk. {seconds}.",
    ]
    return "\n".join(f"- {part}" for part in parts)


def _changed(step: str, difference: float) -> str:
    return f"{step} changed no logit" if difference == 0 else f"{step} changed logits by up to {difference:.2g}"
