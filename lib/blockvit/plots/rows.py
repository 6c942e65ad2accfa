"""Which rows a figure may take, those of a block size or of none, and what their speedups are over."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd


def require(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """The rows as they are; raise if there are none, with what to do about it."""
    if rows.empty:
        raise ValueError(f"nothing to draw: no {what} in the tables; run the notebook that measures it first")
    return rows


def one_of(rows: pd.DataFrame, *columns: str) -> None:
    """Raise if rows differ in ``columns``: medians over precisions or models would look like measurements."""
    for column in columns:
        if len(found := sorted(rows[column].dropna().unique())) > 1:
            raise ValueError(f"one {column} a figure, but the rows hold {', '.join(map(str, found))}; choose one")


def block_sizes(rows: pd.DataFrame) -> list[int]:
    """The block sizes there are, smallest first."""
    return sorted(int(b) for b in rows["block_size"].dropna().unique())


def by_block(rows: pd.DataFrame) -> Iterator[tuple[int | None, pd.DataFrame]]:
    """The rows of each block size, then under None those that are sparse without blocks."""
    for block in block_sizes(rows):
        yield block, rows[rows["block_size"] == block]
    without = without_blocks(rows)
    if len(without):
        yield None, without


def without_blocks(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that are sparse without blocks (2:4)."""
    return rows[rows["block_size"].isna() & (rows["backend"] != "dense")]


def baseline(speedups: pd.DataFrame) -> str:
    """What the speedups are over: eager dense PyTorch, or the fastest of several variants."""
    variants = set(speedups["dense_compile"].dropna()) if "dense_compile" in speedups else set()
    return "dense" if not variants else "eager dense PyTorch" if variants == {"eager"} else "the fastest dense"
