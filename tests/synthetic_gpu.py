"""Tables as an H100 would fill them, with made-up numbers: for the figures, the claims' notebook and the profile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from blockvit.results import Store, new_group

DEVICE = "Synthetic H100 (no such machine)"
PEAK = {"fp32": 50e12, "tf32": 350e12, "bf16": 700e12}
BANDWIDTH = 3e12
BLOCKS, SPARSITIES = (16, 32, 64, 128), (0.5, 0.7, 0.8, 0.9, 0.95)
SHAPES = ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1000, 768))
SPEED = {"triton": 0.7, "torch": 0.3, "torch_tuned": 0.45, "torchao": 0.35, "blksprs": 0.1, "gather": 0.05}
DTYPE = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}


def _latency(seconds: float, **key: Any) -> dict[str, Any]:
    low, high = 0.98 * seconds, 1.03 * seconds
    return {
        "device": DEVICE, "torch": "2.11.0", "triton": "3.6.0", "metric": "latency", "unit": "s", "compile": "eager",
        "value": seconds, "low": low, "high": high, "repeats": 20, "seed": 0,
        "dtype": DTYPE[key["precision"]], **key,
    }  # fmt: skip


def linear_rows() -> Iterator[dict[str, Any]]:
    layers = [(out, in_, tokens) for (out, in_) in SHAPES for tokens in (50432, 197)]
    layers += [(size, size, size) for size in (4096, 8192, 16384)]
    for (out, in_, tokens), precision in itertools.product(layers, PEAK):
        key = {"experiment": "linear", "scope": "linear", "model": f"{out}x{in_}", "tokens": tokens}
        seconds = 2 * out * in_ * tokens / PEAK[precision] / 0.9 + 2e-6
        for block, sparsity in itertools.product(BLOCKS, SPARSITIES):
            group = {"group": new_group(), "precision": precision}
            yield _latency(seconds, backend="dense", **key, **group)
            if precision == "bf16" and (block, sparsity) == (64, 0.9):
                yield _latency(seconds / 1.5, backend="2:4", sparsity=0.5, **key, **group)
            for backend, share in SPEED.items():
                done = seconds * (1 - sparsity) / (share * (block / 64) ** 0.3) + 3e-6
                yield _latency(done, backend=backend, block_size=block, sparsity=sparsity, **key, **group)


def mlp_rows() -> Iterator[dict[str, Any]]:
    speed = {"triton": 0.7, "triton+mlp": 0.9, "torch_tuned": 0.45}
    for precision, tokens, sparsity, block in itertools.product(PEAK, (50432, 197), (0.9, 0.8), (64, 32, 16)):
        key = {"experiment": "mlp", "scope": "mlp", "model": "768x3072x768", "tokens": tokens, "precision": precision}
        group, seconds = {"group": new_group()}, 4 * 768 * 3072 * tokens / PEAK[precision] / 0.8 + 4e-6
        for mode, factor in {"eager": 1.0, "max-autotune": 0.9}.items():
            yield {**_latency(seconds * factor, backend="dense", **key, **group), "compile": mode}
        for backend, share in speed.items():
            done = seconds * (1 - sparsity) / (share * (block / 64) ** 0.3) + 5e-6
            yield _latency(done, backend=backend, block_size=block, sparsity=sparsity, **key, **group)


def vit_rows(model: str = "vit_b_16", share: float = 0.635) -> Iterator[dict[str, Any]]:
    for precision, batch, scope in itertools.product(("fp32", "bf16"), (1, 4, 16, 64, 256), ("mlp", "mlp+attention")):
        key = {"experiment": "vit", "model": model, "batch_size": batch, "precision": precision}
        dense = batch * 35e9 / PEAK[precision] + 4e-3 / batch
        modes = {"eager": 1.0, "cudagraph": 0.95} | ({"max-autotune": 0.85} if batch == 256 else {})
        for block, sparsity in itertools.product(BLOCKS[:3], SPARSITIES if batch == 256 else (0.9,)):
            group = {"group": new_group()}
            for metric, value in {"model_bytes": 3.5e8, "peak_memory": 2e9}.items() if batch == 256 else ():
                held = _latency(0, backend="dense", scope="dense", **key, **group)
                yield {**held, "metric": metric, "value": value, "unit": "B"}
            for mode, factor in modes.items():
                yield _latency(dense * factor, backend="dense", scope="dense", compile=mode, **key, **group)
            contenders = {"triton+mlp": 0.9, **SPEED}.items()
            for (backend, speed), (mode, factor) in itertools.product(contenders, modes.items()):
                part = (1 - sparsity) / (speed * (block / 16) ** 0.3) * share
                sparse = {"backend": backend, "scope": scope, "block_size": block, "sparsity": sparsity}
                yield _latency(dense * factor * (1 - share + part), compile=mode, **sparse, **key, **group)
                if (batch, sparsity, mode) == (256, 0.9, "eager"):
                    for metric, value in {"model_bytes": 1.2e8, "peak_memory": 2e9}.items():
                        yield {**_latency(0, **sparse, **key, **group), "metric": metric, "value": value, "unit": "B"}


def ceiling_rows() -> Iterator[dict[str, Any]]:
    for precision, peak in PEAK.items():
        key = {"experiment": "ceiling", "backend": "dense", "precision": precision, "group": new_group()}
        square = {"model": "8192x8192", "metric": "matmul_throughput", "unit": "FLOP/s"}
        copy = {"model": "copy", "metric": "copy_bandwidth", "unit": "B/s"}
        yield {**_latency(peak, **key), **square}
        yield {**_latency(BANDWIDTH, **key), **copy}


def fill(store: Store) -> Store:
    """Write the whole grid of the gpu profile into ``store``."""
    store.append([*linear_rows(), *mlp_rows(), *vit_rows(), *vit_rows("vit_h_14", 0.65), *ceiling_rows()])
    return store
