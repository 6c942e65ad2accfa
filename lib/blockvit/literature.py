"""What others published: the numbers of ``data/reference`` with their sources, and what follows from them. No torch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from . import checkout


def numbers(repo: Path | None = None) -> pd.DataFrame:
    """The published numbers, with their sources: ``data/reference/published_results.csv``."""
    return pd.read_csv((repo or checkout.root()) / "data" / "reference" / "published_results.csv")


def losses() -> pd.DataFrame:
    """Published points of ImageNet top-1 lost against dense: ``source, block_size, sparsity, lost``.

    Each loss is against the dense accuracy that the same source gives.
    """
    top1 = numbers()
    top1 = top1[top1["metric"] == "top1"]
    imagenet = top1[top1["note"].fillna("").str.contains("ImageNet")]
    dense = imagenet[imagenet["scope"] == "dense"].set_index("source")["value"]
    sparse = imagenet[imagenet["block_size"].notna()]
    lost = sparse["source"].map(dense) - sparse["value"]
    return sparse.assign(lost=lost)[["source", "block_size", "sparsity", "lost"]].reset_index(drop=True)


def speedups() -> pd.DataFrame:
    """Published speedups over dense, those that follow from two published latencies included.

    A latency's speedup is over the dense latency that the same source gives for the same device, model, dtype and batch
    size; a latency without such a partner (int8) is left out. ``note`` says which are derived.

    Returns:
        ``source, device, model, precision, batch_size, scope, block_size, sparsity, value, note``; ``block_size`` is
        NaN for 2:4 sparsity, whose ``scope`` is ``"2:4"``, and where the source does not give it.
    """
    reference = numbers()
    stated = reference[reference["metric"] == "speedup"]
    latency = reference[reference["metric"] == "latency"]
    same = ["source", "device", "model", "dtype", "batch_size"]
    dense = latency.loc[latency["scope"] == "dense", [*same, "value"]].rename(columns={"value": "dense"})
    pairs = latency[latency["scope"] != "dense"].merge(dense, on=same)
    notes = [
        f"{note}; {dense:g} ms dense / {value:g} ms sparse"
        for note, dense, value in zip(pairs["note"], pairs["dense"], pairs["value"], strict=True)
    ]
    derived = pairs.assign(value=pairs["dense"] / pairs["value"], note=notes)
    rows = pd.concat([stated, derived], ignore_index=True)
    rows = rows.assign(precision=rows["dtype"].map({"float32": "fp32", "bfloat16": "bf16"}))
    what = ["source", "device", "model", "precision", "batch_size", "scope", "block_size", "sparsity"]
    return rows[[*what, "value", "note"]]
