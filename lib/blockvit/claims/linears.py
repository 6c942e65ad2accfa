"""Claims of single linear layers: C1, C2, C3 and C11."""

from __future__ import annotations

import pandas as pd

from ..comparisons import fastest_of_each, variant, where
from .evidence import Evidence, published
from .verdicts import FAILS, HOLDS, LIFTED, NEAR, NOT_MEASURED, Verdict
from .wording import block_sizes, cells_faster, decided, dense_field, times

VIT_B_16_LINEARS = ("768x768", "2304x768", "3072x768", "768x3072", "1000x768")
HEAD = "1000x768"
LARGE = 4096  # from this size up a square matmul is "large"

_CELL = ["model", "tokens", "block_size", "sparsity"]


def c1(e: Evidence) -> Verdict:
    """Up to 4.8x on large matmuls."""
    goal = published(metric="headline_speedup", scope="linear")["value"].iloc[0]

    def large(rows: pd.DataFrame) -> pd.DataFrame:
        if rows.empty:
            return rows
        return rows[rows["model"].str.split("x").map(lambda s: min(map(int, s)) >= LARGE)]

    def ours(rows: pd.DataFrame) -> str:
        top = rows.loc[rows["speedup"].idxmax()]
        return f"{times(top['speedup'])} by {variant(top)}"

    like, best = large(e.linear_like), large(e.linear_best)
    fp32 = where(like, precision="fp32")
    if fp32.empty:
        return NOT_MEASURED
    reached = fp32["speedup"].max() >= NEAR * goal
    # "Up to" is reached by one product, and refuted only by products as large and sparse as the post could mean.
    sizes = where(fp32, sparsity=fp32["sparsity"].max())["tokens"]
    if not reached and (fp32["sparsity"].max() < 0.95 or sizes.max() < 2 * LARGE):
        return NOT_MEASURED
    return decided(reached, like, best, lambda rows: f"up to {times(rows['speedup'].max())}", ours)


def c2(e: Evidence) -> Verdict:
    """fp32 linear layers: faster when block size >= 32 or sparsity >= 0.8, at the most tokens measured."""

    def claimed(rows: pd.DataFrame) -> pd.DataFrame:
        rows = _vit_b_16_cells(rows, "fp32")
        return rows[(rows["block_size"] >= 32) | (rows["sparsity"] >= 0.8)]

    like, best = claimed(e.linear_like), fastest_of_each(claimed(e.linear_best), _CELL)
    if like.empty:
        return NOT_MEASURED
    tokens = like["tokens"].max()  # the post measured at batch 256; a small batch is not what it speaks of
    like = like[like["tokens"] == tokens]
    best = best.merge(like[_CELL], on=_CELL)  # the same cells
    holds = (like["speedup"] > 1).all()
    if holds and set(like["model"]) != set(VIT_B_16_LINEARS):
        return NOT_MEASURED  # one cell refutes it, but only all layers confirm it
    fields = [(dense_field(engines), rows) for engines, rows in best.groupby("dense_variants")]
    ours = ", ".join(f"{cells_faster(rows)} than {field}" for field, rows in fields)
    parts = "of these " if len(fields) > 1 else ""
    return Verdict(
        HOLDS if holds else FAILS,
        f"at {tokens:.0f} tokens {cells_faster(like)}, {_range(like)}",
        "; ".join(f"best here, over {field}: {cells_faster(rows)}, {_range(rows)}" for field, rows in fields),
        brief=f"{cells_faster(like)} through PyTorch's kernels; through the best here, {parts}{ours}",
    )


def _range(rows: pd.DataFrame) -> str:
    return f"{times(rows['speedup'].min())} to {times(rows['speedup'].max())}"


def c3(e: Evidence) -> Verdict:
    """bf16: smaller speedups, usually only for block size >= 64 and higher sparsity; at the most tokens, as C2."""
    fp32, bf16 = (_vit_b_16_cells(e.linear_like, precision) for precision in ("fp32", "bf16"))
    both = bf16.merge(fp32[[*_CELL, "speedup"]], on=_CELL, suffixes=("", "_fp32"))
    if both.empty:
        return NOT_MEASURED
    tokens = both["tokens"].max()
    both, bf16 = (rows[rows["tokens"] == tokens] for rows in (both, bf16))
    smaller = (both["speedup"] < both["speedup_fp32"]).mean()
    small_blocks = bf16[bf16["block_size"] < 64]["speedup"]
    usually_not = not (small_blocks > 1).mean() >= 0.5  # of no cells the mean is NaN: nothing speaks against it
    best = fastest_of_each(where(_vit_b_16_cells(e.linear_best, "bf16"), tokens=tokens), _CELL)
    return Verdict(
        HOLDS if smaller > 0.5 and usually_not else FAILS,
        f"at {tokens:.0f} tokens smaller than in fp32 in {smaller:.0%} of cells, {cells_faster(bf16)}",
        f"best here: {cells_faster(best)}, up to {times(best['speedup'].max())}",
    )


def c11(e: Evidence) -> Verdict:
    """Sizes that are no multiple of the block size cannot be converted: a limit of PyTorch's BSR, lifted here."""
    head = where(e.linear_best, model=HEAD)
    head = head[head["block_size"].map(lambda b: 1000 % b != 0)]
    if head.empty:
        return NOT_MEASURED
    best = head.loc[head["speedup"].idxmax()]
    return Verdict(
        LIFTED,
        f"the {HEAD} head converts in blocks of {block_sizes(head)}: up to {times(best['speedup'])} by "
        f"{best['backend']} over {dense_field(best['dense_variants'])} (blocks of {best['block_size']:.0f}, "
        f"{best['tokens']:.0f} tokens, {best['sparsity']:.0%})",
        brief=f"the head of 1000 classes converts in blocks of {block_sizes(head)}, padded",
    )


def _vit_b_16_cells(rows: pd.DataFrame, precision: str) -> pd.DataFrame:
    rows = where(rows, precision=precision)
    return rows[rows["model"].isin(VIT_B_16_LINEARS) & (rows["sparsity"] > 0)]
