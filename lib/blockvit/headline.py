"""The README's first numbers: how fast ViT-B/16 is, dense and block-sparse, and what that sparsity costs. No torch."""

from __future__ import annotations

import pandas as pd

from . import literature
from .comparisons import fastest_of_each, most_threads, newest_machines, over_strongest_field, speedups, where
from .results import SCOPE_TITLES, UNPRUNED, Store

MODEL = "vit_b_16"
BATCHES = (1, 256)  # one image is what a device sees; 256 is the post's
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # in the order of the table
EAGER = "dense, eager PyTorch"
Case = tuple[str, float, int]  # scope, sparsity, block size

CASES: tuple[Case, ...] = (("mlp", 0.8, 32), ("mlp", 0.9, 32), ("all", 0.9, 64))
"""Those whose published losses are worth it, and the fastest."""

OURS_DENSE: Case = (UNPRUNED, 0.0, 32)
"""Likewise the dense model wholly on our kernels: what of a speedup is theirs."""

NOT_COMPILED = "ᵉ"
"""Marks a speedup whose sparse model was timed eagerly only; elsewhere compiled models took part."""


def fastest(store: Store) -> pd.DataFrame:
    """The way to run each case that is surely fastest, on each processor, in each precision class and batch size.

    A processor that was measured with several numbers of cores is told of by its newest run.

    Returns:
        Rows of ``comparisons.speedups``, one a cell, with ``column`` (processor and precision, in the order of the
        README's rows), ``eager_value`` (s, eager dense PyTorch in the same group) and ``compiled`` (whether
        compiled sparse models were timed as well).
    """
    rows = store.read("vit")
    rows = rows[rows["model"] == MODEL]
    rows = pd.concat([most_threads(mine) for _, mine in rows.groupby("device")] or [rows])
    cases = pd.DataFrame([*CASES, OURS_DENSE], columns=["scope", "sparsity", "block_size"])
    found = over_strongest_field(speedups(rows)).merge(cases)
    found = found[found["batch_size"].isin(BATCHES)]
    for precision, mine in found.groupby("precision"):
        found = found[(found["precision"] != precision) | found["device"].isin(newest_machines(mine))]
    eager = rows[(rows["backend"] == "dense") & (rows["compile"] == "eager") & (rows["metric"] == "latency")]
    found = found.merge(eager[["group", "precision", "value"]].rename(columns={"value": "eager_value"}), how="left")
    cell = ["device", "precision", "batch_size", "scope", "sparsity", "block_size"]
    found["compiled"] = found["compile"].ne("eager").groupby([found[key] for key in cell]).transform("any")
    best = fastest_of_each(found, cell, by="speedup_low")
    order = pd.Categorical(best["precision"], PRECISIONS)
    best = best.assign(column=best["device"] + ", " + best["precision"], order=order)
    return best.sort_values(["order", "device"]).drop(columns="order")


def case_title(scope: str, sparsity: float, block_size: float) -> str:
    """``MLP, 80% in blocks of 32``; of the dense model ``dense, on our kernel``."""
    if scope == UNPRUNED:
        return "dense, on our kernel"
    return f"{SCOPE_TITLES[scope]}, {sparsity:.0%} in blocks of {block_size:.0f}"


def of_case(rows: pd.DataFrame, case: Case) -> pd.DataFrame:
    """The rows of one of ``CASES`` or of ``OURS_DENSE``."""
    scope, sparsity, block_size = case
    return where(rows, scope=scope, sparsity=sparsity, block_size=block_size)


def cases_of(rows: pd.DataFrame) -> list[Case]:
    """The dense model on our kernel and the sparse cases, those that ``rows`` hold, in order."""
    return [case for case in (OURS_DENSE, *CASES) if len(of_case(rows, case))]


def eager_speedup(rows: pd.DataFrame) -> float:
    """How many times as fast as the fastest dense engine eager PyTorch is: the median over the groups of ``rows``."""
    return (rows["dense_value"] / rows["eager_value"]).median()


def published_loss(case: Case) -> str:
    """Points of top-1 that a published ViT-B/16 with such an MLP lost on ImageNet; empty if none is known."""
    scope, sparsity, block_size = case
    found = where(literature.losses(), sparsity=sparsity, block_size=block_size)
    return f"{found['lost'].iloc[0]:.1f}" if scope == "mlp" and len(found) else ""


def markdown(store: Store) -> str:
    """For each batch size measured: in a line a case how much faster it is, then all numbers as a Markdown table; and
    the bytes that the weights take.

    A row is a device and precision class. Each speedup is over the dense engine that was timed in turn with it, with
    its spread in brackets, and the milliseconds of both.
    """
    rows = fastest(store)
    if rows.empty:
        return "No speed of a whole ViT-B/16 is in the tables yet.\n"
    parts = [_batch(rows[rows["batch_size"] == batch], batch) for batch in BATCHES]
    return "\n".join([*filter(None, parts), _weights_held(store, rows)]).rstrip("\n") + "\n"


def _batch(rows: pd.DataFrame, batch: int) -> str:
    if rows.empty:
        return ""
    images = "" if batch == 1 else f", a batch of {batch}"
    told = [_line_of(mine, case, images) for case in CASES if len(mine := of_case(rows, case))]
    return "\n".join([*told, "", _table(rows, batch)])


def _line_of(rows: pd.DataFrame, case: Case, images: str) -> str:
    ends = [_times(rows.loc[end]) for end in (rows["speedup"].idxmin(), rows["speedup"].idxmax())]
    return f"- {case_title(*case)}{images}: **{' to '.join(dict.fromkeys(ends))}** as fast; {_cost(case)}."


def _times(row: pd.Series) -> str:
    return f"{row['speedup']:.2f}×{'' if row['compiled'] else NOT_COMPILED}"


def _cost(case: Case) -> str:
    if lost := published_loss(case):
        return f"a published model lost {lost} points of top-1"
    alone = published_loss(("mlp", *case[1:]))
    told = f" (with the MLP alone sparse a published one lost {alone} points)" if alone else ""
    return f"no accurate model of this shape is known to us{told}"


def _weights_held(store: Store, rows: pd.DataFrame) -> str:
    """What is left of the weights in memory, as measured last, whatever the device: it has no part in it."""
    precision = rows["precision"].iloc[0]
    held = where(store.read("vit"), model=MODEL, metric="model_bytes", precision=precision)
    dense = where(held, backend="dense")
    told = [f"dense {_mb(dense['value'].iloc[-1])}"] if len(dense) else []
    for case in CASES:
        ours = where(of_case(held, case), backend=list(of_case(rows, case)["backend"]))
        told += [f"{case_title(*case)}: {_mb(ours['value'].iloc[-1])}"] if len(ours) else []
    return f"Weights held in memory ({precision}): {'; '.join(told)}.\n" if len(told) > 1 else ""


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def _table(rows: pd.DataFrame, batch: int) -> str:
    cases = cases_of(rows)
    title = "One image" if batch == 1 else f"A batch of {batch}"
    heads = [title, EAGER, *(case_title(*case) for case in cases)]
    losses = ["" if case == OURS_DENSE else published_loss(case) or "none known" for case in cases]
    lines = [_line(heads), _line(["---"] * len(heads)), _line(["points lost, published", "", *losses])]
    for column, mine in rows.groupby("column", sort=False):
        lines.append(_line([column, f"{eager_speedup(mine):.2f}×", *(_cell(of_case(mine, case)) for case in cases)]))
    return "\n".join(lines) + "\n"


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    best = rows.iloc[0]
    spread = f"{best['speedup_low']:.2f}–{best['speedup_high']:.2f}"
    return f"**{_times(best)}** ({spread}), {_ms(best['dense_value'])} → {_ms(best['value'])} ms"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.9995 else f"{1e3 * seconds:#.3g}".rstrip(".")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
