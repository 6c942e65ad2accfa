"""What figures call things: models, layers, backends, dense engines, batches, what is sparse, and the setting.

The tables' own names stand beside the words wherever a reader would look them up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from ..losses import TITLES
from ..results import SCOPE_TITLES

LAYERS = {"2304x768": "qkv", "768x768": "out_proj", "3072x768": "mlp.0", "768x3072": "mlp.3", "1000x768": "head"}
"""Linear layers of ViT-B/16 by their shape, out×in, in the order that it computes them in."""

_BACKENDS = {
    "cpu": "our kernel",
    "cpu+dense": "our kernels throughout",
    "gather": "our fallback",
    "triton": "our kernel",
    "triton+mlp": "our kernels",
    "torch": "PyTorch's kernels",
    "torch_tuned": "PyTorch's kernels, tuned",
    "supermask": "our masks",  # from here on, ways to train
    "naive": "masks expanded to the weight",
    "sparse": "products of kept blocks",
    "sparse-kept": "likewise, kept blocks alone learn",
}
_ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def model_title(model: str) -> str:
    """``ViT-B/16`` for ``vit_b_16``; others bear the name that the tables give them."""
    parts = re.fullmatch(r"vit_([a-z])_(\d+)", model)
    return f"ViT-{parts[1].upper()}/{parts[2]}" if parts else model


def layer_title(shape: str) -> str:
    """``qkv 2304×768`` for ``2304x768``."""
    return " ".join([*([LAYERS[shape]] if shape in LAYERS else []), shape.replace("x", "×")])


def layer_rank(shape: str) -> tuple[int, list[int]]:
    """To sort shapes by: the layers of ViT-B/16 in their order, then others by size."""
    order = list(LAYERS)
    return order.index(shape) if shape in order else len(order), [int(size) for size in shape.split("x")]


def layers_title(rows: pd.DataFrame) -> str:
    """Which linear layers, or MLPs, rows are of, and at how many tokens if that is one number."""
    what = "Linear layers" if rows["model"].str.fullmatch(r"\d+x\d+").all() else "MLPs"
    of_vit = " of ViT-B/16" if set(rows["model"]) <= {*LAYERS, "768x3072x768"} else ""
    tokens = _one(rows, "tokens")
    return f"{what}{of_vit}" + (f", {tokens:.0f} tokens" if tokens else "")


def backend_title(backend: str) -> str:
    """Whose kernel a backend is, with its name."""
    return f"{_BACKENDS[backend]} ({backend})" if backend in _BACKENDS else backend


def named_backends(backends: Iterable[str]) -> str:
    """What the names of several backends mean, ``cpu: our kernel; torch: PyTorch's kernels``; empty for one."""
    names = sorted(set(backends) - {"dense"})
    return "; ".join(f"{name}: {_BACKENDS[name]}" for name in names if name in _BACKENDS) if len(names) > 1 else ""


def engine_title(engine: str) -> str:
    """A way to run a dense model or layer."""
    return _ENGINES.get(engine, engine)


def scope_title(scope: str) -> str:
    """A panel's title for what is sparse in it."""
    return f"{SCOPE_TITLES.get(scope, scope)} sparse"


def dataset_title(rows: pd.DataFrame) -> str:
    """The data sets of trainings."""
    return " and ".join(TITLES.get(name, name) for name in rows["dataset"].dropna().unique() if name)


def images(batch_size: float) -> str:
    """``one image`` or ``batches of 8``."""
    return "one image" if batch_size == 1 else f"batches of {batch_size:.0f}"


def model_setting(rows: pd.DataFrame) -> str:
    """What all rows of whole models share: model, batch, what is sparse, by how much and in which blocks, precision."""
    sparse = rows[rows["backend"] != "dense"]
    blocked = sparse[sparse["block_size"].notna()]
    share, of_blocks = _one(blocked, "sparsity"), in_blocks(blocked)
    scope = _one(blocked, "scope")
    told = [model_title(model) for model in [_one(rows, "model")] if model]
    told += [images(batch) for batch in [_one(rows, "batch_size")] if batch]
    if scope and share:
        told.append(f"{SCOPE_TITLES.get(scope, scope)} {share:.0%} sparse")
    elif share:
        told.append(f"{share:.0%} sparse")
    if share and of_blocks:
        told[-1] += f" {of_blocks}"
    return ", ".join([*told, *filter(None, [_one(rows, "precision")])])


def in_blocks(rows: pd.DataFrame) -> str:
    """``in blocks of 32×32``, if that is one size."""
    block = _one(rows, "block_size")
    return f"in blocks of {block:.0f}×{block:.0f}" if block else ""


def measured_on(rows: pd.DataFrame) -> str:
    """Where rows were measured and how: the machine, its threads, the precision; what rows do not share is left out."""
    threads = _one(rows, "threads")
    counted = f"{threads:.0f} thread{'s' if threads > 1 else ''}" if threads else None
    return ", ".join(filter(None, [_one(rows, "device"), counted, _one(rows, "precision")]))


def trained_model(rows: pd.DataFrame) -> str:
    """What was trained on which data: ``vit_digits on digits``."""
    return " on ".join(
        filter(None, [" and ".join(model_title(m) for m in rows["model"].unique()), dataset_title(rows)])
    )


def trained_sparse(rows: pd.DataFrame) -> str:
    """What was trained on which data, how sparse: ``vit_digits on digits, 80% sparse in blocks of 8×8``."""
    return f"{trained_model(rows)}, {_one(rows, 'sparsity'):.0%} sparse {in_blocks(rows)}"


def trained_on(rows: pd.DataFrame, *, spread: str = "bars span them") -> str:
    """Where models were trained, over how many seeds their accuracies are, and how these are drawn."""
    device = _one(rows, "device")
    cell = [column for column in ("backend", "variant", "block_size", "sparsity") if column in rows]
    counts = rows["seeds"] if "seeds" in rows else rows.groupby(cell, dropna=False)["seed"].nunique()
    seeds = [f"mean of {_span(counts)} seeds", spread] if max(counts) > 1 else ["one seed"]
    return ", ".join(filter(None, [f"trained on {device}" if device else "", *seeds]))


def _span(counts: Iterable[float]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _one(rows: pd.DataFrame, column: str) -> object | None:
    """The value that all rows with one share; None if there are several, or none."""
    found = [] if column not in rows else [value for value in rows[column].dropna().unique() if value != ""]
    return found[0] if len(found) == 1 else None
