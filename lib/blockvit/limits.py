"""What no kernel can beat: the least time of a block-sparse linear layer, and of a model that holds some.

Both limits need two ceilings of the device, which the table ``ceiling`` holds: how fast it multiplies dense matrices in
a precision, and how fast it copies memory. Reads tables, needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .comparisons import dense_throughput

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight or an activation by precision class; TF32 is a way to multiply, its operands are fp32 in memory."""

INDEX_BYTES = 4
"""Bytes that say where a kept block lies: one 32-bit column index; row pointers are fewer by far and left out."""


def peak(ceilings: pd.DataFrame, linear_rows: pd.DataFrame, precision: str) -> float:
    """The fastest dense product measured in a precision, FLOP/s: a large square one or any dense linear layer.

    Not the data sheet's number: what this device did, in this study, with PyTorch's own dense kernels.

    Args:
        ceilings: rows of the experiment ``ceiling`` of one device.
        linear_rows: rows of the experiment ``linear`` of the same device.
        precision: as the tables name it.

    Raises:
        ValueError: neither table holds a dense product in ``precision``.
    """
    squares = ceilings[(ceilings["metric"] == "matmul_throughput") & (ceilings["precision"] == precision)]
    layers = linear_rows[
        (linear_rows["metric"] == "latency")
        & (linear_rows["backend"] == "dense")
        & (linear_rows["precision"] == precision)
    ]
    measured = [*squares["value"].dropna(), *(dense_throughput(layers).dropna() if len(layers) else [])]
    if not measured:
        raise ValueError(f"no dense product in {precision} in the tables; run the notebook that measures the ceilings")
    return float(max(measured))


TF32_PRODUCTS = 3
"""TF32 products that a product as accurate as fp32 is made of at least, on tensor cores (``tf32x3``)."""


def roof(ceilings: pd.DataFrame, linear_rows: pd.DataFrame, precision: str) -> float:
    """What no kernel of a precision class can multiply faster than, FLOP/s: ``peak``, or other means to its accuracy.

    The class fp32 is IEEE arithmetic or what is as accurate: where TF32 was measured and a third of its peak is more
    than the peak of fp32, products of three TF32 ones have the higher roof. Arguments and errors as ``peak``.
    """
    own = peak(ceilings, linear_rows, precision)
    if precision != "fp32":
        return own
    try:
        return max(own, peak(ceilings, linear_rows, "tf32") / TF32_PRODUCTS)
    except ValueError:
        return own


def bandwidth(ceilings: pd.DataFrame) -> float:
    """The fastest copy measured, B/s, counting both what was read and what was written.

    Raises:
        ValueError: the table holds no copy.
    """
    measured = ceilings.loc[ceilings["metric"] == "copy_bandwidth", "value"].dropna()
    if measured.empty:
        raise ValueError("no copy bandwidth in the tables; run the notebook that measures the ceilings")
    return float(measured.max())


def kept_share(rows: pd.DataFrame) -> pd.Series:
    """Share of its weight that each linear layer keeps: the exact share of blocks where there are blocks.

    A mask keeps ``n - round(sparsity * (n - 1))`` of its ``n = ceil(out/b) * ceil(in/b)`` blocks (as
    ``masks.num_kept``, which needs torch). In small grids this is much more than ``1 - sparsity``: of the 36
    blocks of 128 in a 768x768 layer 95% sparsity keeps 3, which are 8.3%. Rows without a block size keep
    ``1 - sparsity`` (2:4), rows without a sparsity keep all (dense).
    """
    sparsity = rows["sparsity"].astype(float).fillna(0.0)
    out_in = _out_in(rows)
    blocks = np.ceil(out_in["out"] / rows["block_size"]) * np.ceil(out_in["in"] / rows["block_size"])
    # Through percent, as num_kept does it: 0.01 * (0.7 * 100) is a little more than 0.7, which decides ties.
    kept = blocks - (0.01 * (sparsity * 100) * (blocks - 1)).round()
    return (kept / blocks).fillna(1 - sparsity).rename("kept")


def linear_seconds(
    rows: pd.DataFrame, peak: float | Mapping[str, float], bandwidth: float | None = None
) -> pd.DataFrame:
    """The least time that each linear layer can take: that of its arithmetic, or of its bytes if that is longer.

    Arithmetic is ``2 * tokens * out * in * kept`` operations at ``peak``. Bytes are the input read once, the output
    written once, the kept weights, the bias, and the indices: 4 bytes a kept block, for 2:4 two bits a kept weight.
    ``kept`` is ``kept_share``; a block at the edge, which is partial where sizes are no multiples, counts with the
    average part of a block that lies inside, so that padding is not taken for necessary work.

    No kernel can be faster *with operands that come from memory*: whatever stays in a cache between two products costs
    no bandwidth. And ``peak`` is to be what was reached here by whatever means the precision class allows: ``roof``.

    Args:
        rows: linear layers with ``model`` (``OUTxIN``), ``tokens``, ``precision``, ``block_size`` and ``sparsity``;
            dense ones have no block size and no sparsity.
        peak: FLOP/s, or FLOP/s by precision; see ``roof``.
        bandwidth: bytes a second, see the function of that name; None: as if memory took no time.

    Returns:
        By ``rows``' index: ``seconds``, ``bound_by`` ("arithmetic" or "bytes"), ``flop`` and ``bytes``.

    Raises:
        ValueError: a precision without a size (``ELEMENT_BYTES``) or without a peak.
    """
    precisions = set(rows["precision"])
    peaks = dict(peak) if isinstance(peak, Mapping) else dict.fromkeys(precisions, peak)
    for what, known in (("size", ELEMENT_BYTES), ("peak", peaks)):
        if unknown := sorted(map(str, precisions - set(known))):
            raise ValueError(f"no {what} is known for precision {', '.join(unknown)}; known are {', '.join(known)}")
    element = rows["precision"].map(ELEMENT_BYTES).astype(float)
    out, in_ = (_out_in(rows)[side] for side in ("out", "in"))
    kept = out * in_ * kept_share(rows)
    indices = INDEX_BYTES * kept / rows["block_size"] ** 2
    two_bits = kept / 4 * (rows["sparsity"].fillna(0) > 0)
    flop = 2 * rows["tokens"] * kept
    moved = element * (rows["tokens"] * (out + in_) + kept + out) + indices.fillna(two_bits)
    arithmetic = flop / rows["precision"].map(peaks).astype(float)
    memory = moved / bandwidth if bandwidth else moved * 0.0
    return pd.DataFrame(
        {
            "seconds": np.maximum(arithmetic, memory),
            "bound_by": np.where(memory > arithmetic, "bytes", "arithmetic"),
            "flop": flop,
            "bytes": moved,
        },
        index=rows.index,
    )


TRAFFIC = ("input", "hidden written", "hidden read", "weights", "output")
"""What an MLP moves: the columns of ``mlp_traffic``."""


def mlp_traffic(tokens: int, width: int, hidden: int, precision: str, block_size: int, sparsity: float) -> pd.DataFrame:
    """Bytes that two linear layers ``width -> hidden -> width`` have to move, and the operations that they have to do.

    Args:
        tokens: rows of the input.
        width: features of the input and the output.
        hidden: features between the layers.
        precision: as the tables name it.
        block_size: of both weights.
        sparsity: of both weights.

    Returns:
        A row each for ``dense``, ``layer by layer`` (block-sparse) and ``one kernel`` (block-sparse, hidden activations
        kept on the chip); columns ``TRAFFIC`` (bytes), ``bytes`` (their sum), ``flop`` and ``intensity`` (flop a byte).
    """
    shapes = [f"{hidden}x{width}", f"{width}x{hidden}"]
    layers = pd.DataFrame({"model": shapes, "tokens": tokens, "precision": precision})
    element = ELEMENT_BYTES[precision]
    ways = {}
    for name, cell in {"dense": (np.nan, np.nan), "layer by layer": (block_size, sparsity)}.items():
        counted = linear_seconds(layers.assign(block_size=cell[0], sparsity=cell[1]), float("inf"))
        activations = 2 * element * tokens * (width + hidden)  # each layer reads one side of it and writes the other
        outside, inside = element * tokens * width, element * tokens * hidden
        weights = counted["bytes"].sum() - activations
        ways[name] = dict(zip(TRAFFIC, (outside, inside, inside, weights, outside), strict=True))
        ways[name]["flop"] = counted["flop"].sum()
    ways["one kernel"] = {**ways["layer by layer"], "hidden written": 0.0, "hidden read": 0.0}
    table = pd.DataFrame(ways).T
    table["bytes"] = table[list(TRAFFIC)].sum(axis=1)
    return table.assign(intensity=table["flop"] / table["bytes"])


def amdahl(sparsity: float | np.ndarray, share: float) -> float | np.ndarray:
    """Amdahl's bound: how many times as fast a model gets at most without ``sparsity`` of ``share`` of its arithmetic.

    ``1 / (1 - sparsity * share)``; ``share`` is the fraction of the model's operations that its sparse layers do.
    """
    return 1 / (1 - sparsity * share)


def _out_in(rows: pd.DataFrame) -> pd.DataFrame:
    sizes = rows["model"].str.extract(r"^(?P<out>\d+)x(?P<in>\d+)$").astype(float)
    if sizes.isna().any(axis=None):
        strange = sorted(rows.loc[sizes.isna().any(axis=1), "model"].astype(str).unique())
        raise ValueError(f"not linear layers: {', '.join(strange)}; expected models named OUTxIN")
    return sizes
