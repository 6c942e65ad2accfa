"""Rows as the tables hold them, made up: one latency of a block-sparse linear layer, changed as a test needs it."""

from __future__ import annotations

DEVICE = "Example CPU (4 cores)"


def row(**changes) -> dict:
    return {
        "experiment": "linear",
        "device": DEVICE,
        "threads": 4,
        "model": "768x3072",
        "dtype": "float32",
        "precision": "fp32",
        "batch_size": 1,
        "tokens": 197,
        "block_size": 32,
        "sparsity": 0.9,
        "backend": "gather",
        "compile": "eager",
        "metric": "latency",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "unit": "ms",
        "repeats": 20,
        "group": "a",
        **changes,
    }


def dense(**changes) -> dict:
    return {"backend": "dense", "sparsity": None, "block_size": None, "value": 2.0, "low": 1.8, "high": 2.4, **changes}
