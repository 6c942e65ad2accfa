"""Notebooks 3, 4 and 7: how fast, from which sparsity on, and over what, in small tables and sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pandas as pd

from ..comparisons import break_even, fastest_of_each, variant, where
from ..limits import amdahl, linear_seconds
from ..results import SCOPE_TITLES
from .rows import AT, with_dense


def break_evens(speedups: pd.DataFrame, *, log: bool = False) -> dict[int, str]:
    """Break-even sparsity by block size: ``{16: "86%", 32: "never", 64: "≤ 50%"}``; none without a sweep.

    Of several layers or models it is the highest. ``log`` as in ``comparisons.break_even``: text and figure agree.
    Rows of several token counts or batch sizes raise ``ValueError``: their break-evens differ.
    """
    for column in ("tokens", "batch_size"):
        if column in speedups and len(found := sorted(speedups[column].dropna().unique())) > 1:
            held = ", ".join(f"{value:.0f}" for value in found)
            raise ValueError(f"break-even of one {column} at a time, but the rows hold {held}; choose one")
    texts = {}
    for block, cell in speedups.groupby("block_size"):
        lines = [line.groupby("sparsity")["speedup"].median() for _, line in cell.groupby("model")]
        edges = [break_even(list(line.index), list(line), log=log) for line in lines if len(line) > 1]
        if not edges:
            continue
        edge = None if None in edges else max(edges)
        at_most = "≤ " if edge is not None and edge <= cell["sparsity"].min() else ""
        texts[int(block)] = "never" if edge is None else f"{at_most}{edge:.0%}"
    return texts


def break_even_text(speedups: pd.DataFrame, *, log: bool = False) -> str:
    """As ``break_evens``, in one line: ``16: 86%, 32: never, 64: ≤ 50%``."""
    return ", ".join(f"{block}: {text}" for block, text in break_evens(speedups, log=log).items())


def linear(speedups: pd.DataFrame, over_engines: pd.DataFrame, reference: str) -> str:
    """From which sparsity on a linear layer is faster, through the best backend and through ``reference``; a sentence.

    Args:
        speedups: over eager dense PyTorch, of linear layers of one precision and token count.
        over_engines: over the fastest dense engine, of such layers through any backend; may be empty.
        reference: PyTorch's own kernels, by their backend's name.
    """
    others = where(speedups[speedups["backend"] != reference], sparsity=AT)
    own = where(speedups, backend=reference)
    parts = []
    if len(others):
        best = others.groupby("backend")["speedup"].median().idxmax()
        edge = _from_text(where(speedups, backend=best))
        told = f"through `{best}` the slowest layer beats eager dense PyTorch: {edge}"
        beside = where(over_engines, backend=best)
        if beside["dense_variants"].max() > 1:
            layers = " and ".join(sorted(set(beside["model"])))
            engines = f"{beside['dense_variants'].max():.0f} dense engines (timed for {layers})"
            told += f"; the fastest of {engines}: {_from_text(beside)}"
        parts.append(f"{told}.")
    if len(own):
        faster = f"{(own['speedup'] > 1).sum()} of {len(own)} cells are faster"
        how = "Through" if parts else "through"
        parts.append(f"{how} `{reference}`, PyTorch's own kernels: {_from_text(own)} ({faster}).")
    return " ".join(parts) or "no block-sparse layer is in the tables yet."


def _from_text(speedups: pd.DataFrame) -> str:
    """When it is faster: ``from 22% to 33% sparsity on, by block size``, ``at every sparsity measured``, ``never``."""
    edges = break_evens(speedups, log=True)
    if not edges:
        return "not known, only one sparsity was measured"
    told = set(edges.values())
    if told == {"never"}:
        return "never"
    lowest = f"at every sparsity measured (from {speedups['sparsity'].min():.0%} on)"
    if all(text.startswith("≤") for text in told):
        return lowest
    if all(re.fullmatch(r"\d+%", text) for text in told):
        low, high = (how(told, key=lambda text: int(text[:-1])) for how in (min, max))
        return f"from {low} sparsity on" if low == high else f"from {low} to {high} sparsity on, by block size"
    texts = {text: lowest if text.startswith("≤") else text if text == "never" else f"from {text} on" for text in told}
    return ", ".join(f"in blocks of {block} {texts[text]}" for block, text in edges.items())


def linear_summary(speedups: pd.DataFrame, sparsity: float = AT) -> pd.DataFrame:
    """What each backend of ``speedups`` reaches, whose rows are linear layers of one precision and token count.

    How many cells are faster than dense, the median and the range of the speedups at ``sparsity``, and the break-even
    sparsity of the worst layer for each block size.
    """
    lines = []
    for backend, mine in speedups.groupby("backend"):
        line = {"backend": backend, "cells faster": f"{(mine['speedup'] > 1).sum()} of {len(mine)}"}
        at = mine[mine["sparsity"] == sparsity]["speedup"]
        if len(at):
            line[f"median at {sparsity:.0%}"] = f"{at.median():.2f}×"
            line["least to most"] = f"{at.min():.2f}× to {at.max():.2f}×"
        lines.append(line | _break_even_columns(break_evens(mine, log=True)))
    return _table(lines, ["backend"])


def model_summary(speedups: pd.DataFrame, shares: Mapping[str, float], sparsity: float = AT) -> pd.DataFrame:
    """What each backend reaches with each scope of ``speedups``: one model, one batch size, one precision.

    The best speedup at ``sparsity``, what the spread of the timings leaves of it (``speedup_low`` to ``speedup_high``)
    and its block size, what Amdahl's law gives if all arithmetic runs at one rate, and the break-even sparsity for each
    block size, of the ways to run it that were measured at every sparsity.

    Args:
        speedups: may hold several ways to run a backend; the fastest counts.
        shares: for each scope, the share of the model's arithmetic that it holds.
        sparsity: at which the best speedup is told.
    """
    lines = []
    for (scope, backend), mine in speedups.groupby(["scope", "backend"]):
        at = mine[mine["sparsity"] == sparsity].sort_values("speedup")
        if at.empty:
            continue
        top = at.iloc[-1]
        line = {
            "sparse layers": scope,
            "backend": backend,
            f"best at {sparsity:.0%}": f"{top['speedup']:.2f}×",
            "spread": f"{top['speedup_low']:.2f}× to {top['speedup_high']:.2f}×",
            "with": f"blocks of {top['block_size']:.0f}" + (f", {top['compile']}" if top["compile"] != "eager" else ""),
            "Amdahl's law": f"{amdahl(sparsity, shares[scope]):.2f}×",
        }
        lines.append(line | _break_even_columns(break_evens(_swept(mine))))
    return _table(lines, ["sparse layers", "backend"])


def _swept(speedups: pd.DataFrame) -> pd.DataFrame:
    """Of each block size the fastest cells among the ways to run it that most sparsities were measured in.

    One that a few of them were measured in would bend the line there.
    """
    ways = speedups.groupby(["block_size", "compile"])["sparsity"].transform("nunique")
    most = ways.groupby(speedups["block_size"]).transform("max")
    return fastest_of_each(speedups[ways == most], ["block_size", "sparsity"])


def whole_model(speedups: pd.DataFrame, sparsity: float = AT) -> str:
    """The best speedup of each scope at ``sparsity``, the MLP's first, in one line with its spread; empty without any.

    ``speedups`` are of one model, batch size and precision.
    """
    tops = fastest_of_each(where(speedups, sparsity=sparsity), ["scope"])
    tops = tops.sort_values("scope", key=lambda scopes: scopes != "mlp", kind="stable")
    unknown = ", a shape for which no accurate model is known"  # published are models whose MLP is sparse
    return "; ".join(
        f"{_of_scope(top['scope'])} at {sparsity:.0%}{unknown * (top['scope'] != 'mlp')}: {top['speedup']:.2f}× "
        f"(spread {top['speedup_low']:.2f}× to {top['speedup_high']:.2f}×; `{variant(top)}`, blocks of "
        f"{top['block_size']:.0f})"
        for _, top in tops.iterrows()
    )


def _of_scope(scope: str) -> str:
    title = SCOPE_TITLES.get(scope, scope)
    return f"the {title}" if scope == "mlp" else title


def memory_line(rows: pd.DataFrame, sparsity: float = AT) -> str:
    """What a model holds, by backend, with the MLP at ``sparsity``, and dense; empty where either was not measured."""
    held = with_dense(where(rows, metric="model_bytes"), scope="mlp", sparsity=sparsity)
    held = held.groupby("backend")["value"].min() / 1e6
    if "dense" not in held or len(held) == 1:
        return ""
    sparse = ", ".join(f"{megabytes:.0f} MB `{name}`" for name, megabytes in held.drop("dense").sort_values().items())
    return f"With the MLP at {sparsity:.0%} the model holds {sparse}; dense it holds {held['dense']:.0f} MB."


def on_device(models: pd.DataFrame, layers: pd.DataFrame, rows: pd.DataFrame, small: pd.DataFrame, peak: float) -> str:
    """Whether block sparsity pays with one image on a CPU, and what it owes to the kernel: a Markdown list.

    Args:
        models: speedups of one model with one image, over the fastest dense engine; those of the model that is not
            pruned among them, if that was measured.
        layers: speedups of single layers.
        rows: the rows that ``layers`` are of, dense ones among them.
        small: speedups of a small model; may be empty.
        peak: of this CPU's multiply-adds, FLOP/s.
    """
    edges = [f"at {count:.0f} tokens {break_even_text(cell, log=True)}" for count, cell in layers.groupby("tokens")]
    parts = [
        _pays(models),
        _kernel_alone(models),
        _small_text(small),
        f"Single layers, over the fastest dense engine: break-even sparsity by block size, of the worse layer, "
        f"{'; '.join(edges)}." if edges else "",
        _arithmetic(rows, peak),
    ]  # fmt: skip
    return "\n".join(f"- {part}" for part in parts if part)


def _pays(models: pd.DataFrame) -> str:
    at = where(models, sparsity=AT)
    if at.empty:
        return "Not known yet: no whole model was measured."
    mlp = where(at, scope="mlp")
    best = fastest_of_each(mlp if len(mlp) else at, ["scope"]).iloc[-1]
    told = "Yes" if best["speedup_low"] > 1 else "No" if best["speedup_high"] < 1 else "Not clearly"
    return (
        f"{told}: on {best['device']}, in {best['precision']}, one image through {best['model']} takes "
        f"{_ms(best['value'])} with {_of_scope(best['scope'])} at {AT:.0%} in blocks of {best['block_size']:.0f} "
        f"(`{variant(best)}`), and {_ms(best['dense_value'])} in the fastest dense engine ({best['dense_compile']}). "
        f"Speedups over the fastest dense engine: {whole_model(at)}. The masks are random blocks."
    )


def _kernel_alone(models: pd.DataFrame) -> str:
    """What the dense model gains on our kernel; without that, nothing tells the two apart."""
    alone = models[models["sparsity"] == 0]
    if alone.empty:
        return ""
    best = alone.loc[alone["speedup"].idxmax()]
    return (
        f"What our kernels do without sparsity: the dense model wholly on them (`{variant(best)}`) takes "
        f"{_ms(best['value'])}, {best['speedup']:.2f}× the speed of the fastest dense engine (spread "
        f"{best['speedup_low']:.2f}× to {best['speedup_high']:.2f}×)."
    )


def _small_text(small: pd.DataFrame) -> str:
    at = where(small, sparsity=AT)
    if at.empty:
        return ""
    faster, best = (at["speedup"] > 1).sum(), at.loc[at["speedup"].idxmax()]
    return (
        f"The small {best['model']} is faster in {faster} of {len(at)} cases, at best {best['speedup']:.2f}× "
        f"({_of_scope(best['scope'])}, `{variant(best)}`)."
    )


def _arithmetic(rows: pd.DataFrame, peak: float) -> str:
    """What share of the peak the kernel's arithmetic on kept blocks reaches, where there is most of it."""
    most = rows[(rows["sparsity"] <= 0.5) & (rows["tokens"] == rows["tokens"].max())]
    if most.empty:
        return ""
    share = linear_seconds(most, peak)["seconds"] / most["value"]
    return (
        f"At up to 50% sparsity and {most['tokens'].max():.0f} tokens the kernel's arithmetic on kept blocks is "
        f"{share.min():.0%} to {share.max():.0%} of the {peak / 1e9:.0f} GFLOP/s that multiply-adds in registers reach."
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _break_even_columns(edges: Mapping[int, str]) -> dict[str, str]:
    return {f"break-even, {block}×{block}": text for block, text in edges.items()}


def _table(lines: list[dict[str, str]], index: list[str]) -> pd.DataFrame:
    """A row for each of ``lines``; what one does not have stays empty."""
    return pd.DataFrame(lines, columns=None if lines else index).fillna("").set_index(index)


def model_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Latency (ms), images a second, weights and peak memory (MB) of each variant of one model, fastest first.

    The peak is told of GPUs only: on a CPU that of one dense model differs up to twofold from group to group. ``rows``
    are of one batch size, precision, scope, block size and sparsity, dense ones among them.
    """
    latency = rows[rows["metric"] == "latency"].set_index(["backend", "compile"])
    table = pd.DataFrame(
        {
            "ms": latency["value"] * 1e3,
            "20th percentile": latency["low"] * 1e3,
            "80th percentile": latency["high"] * 1e3,
            "images/s": latency["batch_size"] / latency["value"],
        }
    )
    memory = {"weights MB": "model_bytes"} | ({"peak MB": "peak_memory"} if rows["threads"].isna().all() else {})
    for column, metric in memory.items():
        held = rows[rows["metric"] == metric].set_index(["backend", "compile"])["value"] / 1e6
        table[column] = held.reindex(table.index)
    table = table.sort_values("ms").dropna(axis="columns", how="all").round(2)
    return table.astype(object).where(table.notna(), "")  # engines do not tell what they hold


def batch_line(speedups: pd.DataFrame) -> str:
    """The best speedup of each batch size and what reached it: ``0.81× (1, torch), 1.10× (16, torch_tuned)``."""
    best = fastest_of_each(speedups, ["batch_size"]).sort_values("batch_size")
    return ", ".join(f"{row.speedup:.2f}× ({row.batch_size:.0f}, {row.backend})" for row in best.itertuples())
