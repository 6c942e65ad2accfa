from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from blockvit import limits
from blockvit.masks import num_kept

LAYER = {"model": "768x3072", "tokens": 100, "precision": "fp32", "block_size": 32, "sparsity": 0.9, "backend": "torch"}
DENSE = {**LAYER, "block_size": np.nan, "sparsity": np.nan, "backend": "dense"}


def table(*rows: dict) -> pd.DataFrame:
    return pd.DataFrame([{**LAYER, **row} for row in rows])


def only(rows: pd.DataFrame, peak=1e12, bandwidth=1e12) -> pd.Series:
    (found,) = limits.linear_seconds(rows, peak, bandwidth).to_dict("records")
    return pd.Series(found)


def test_a_layer_counted_by_hand():
    kept = 24 * 96 - 2073  # of 2304 blocks, 0.9 * 2303 = 2072.7 are dropped
    found = only(table({}))
    assert found["flop"] == 2 * 100 * kept * 32 * 32
    assert found["bytes"] == 4 * (100 * 3072 + 100 * 768 + kept * 32 * 32 + 768) + 4 * kept
    assert found["seconds"] == found["flop"] / 1e12 and found["bound_by"] == "arithmetic"


def test_bytes_bind_when_memory_is_slow_and_arithmetic_when_it_is_fast():
    slow, fast = only(table({}), bandwidth=1e9), only(table({}), bandwidth=1e15)
    assert (slow["bound_by"], slow["seconds"]) == ("bytes", slow["bytes"] / 1e9)
    assert (fast["bound_by"], fast["seconds"]) == ("arithmetic", fast["flop"] / 1e12)
    assert only(table({}), bandwidth=None)["seconds"] == fast["seconds"], "no bandwidth: memory takes no time"


def test_dense_rows_keep_everything_and_have_no_indices():
    found = only(table(DENSE))
    assert found["flop"] == 2 * 100 * 768 * 3072
    assert found["bytes"] == 4 * (100 * (768 + 3072) + 768 * 3072 + 768)


def test_two_of_four_keeps_half_with_two_bits_a_value():
    found = only(table({**DENSE, "sparsity": 0.5, "backend": "2:4", "precision": "bf16"}))
    half = 768 * 3072 // 2
    assert found["flop"] == 2 * 100 * half
    assert found["bytes"] == 2 * (100 * (768 + 3072) + half + 768) + half / 4


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("tf32", 4), ("bf16", 2), ("fp16", 2)])
def test_bytes_of_a_precision(precision, size):
    found = only(table({**DENSE, "precision": precision}))
    assert found["bytes"] == size * (100 * (768 + 3072) + 768 * 3072 + 768)


def test_each_precision_has_its_peak():
    rows = table({"precision": "fp32"}, {"precision": "bf16"})
    found = limits.linear_seconds(rows, {"fp32": 1e12, "bf16": 4e12})["seconds"]
    assert found[0] == pytest.approx(4 * found[1])


def test_the_index_of_the_rows_is_kept():
    rows = table({}, {}, {"sparsity": 0.5}).drop(index=1)
    assert limits.linear_seconds(rows, 1e12).index.tolist() == [0, 2]


def test_what_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"no size is known for precision int8; known are fp32, tf32, bf16, fp16"):
        limits.linear_seconds(table({"precision": "int8"}), 1e12)
    with pytest.raises(ValueError, match=r"no peak is known for precision fp32; known are bf16"):
        limits.linear_seconds(table({}), {"bf16": 1e12})
    with pytest.raises(ValueError, match=r"not linear layers: vit_b_16; expected models named OUTxIN"):
        limits.linear_seconds(table({"model": "vit_b_16"}), 1e12)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("shape", ["768x768", "768x3072", "1000x768"])
def test_blocks_are_counted_as_the_masks_are_made(shape, block_size):
    out, in_ = map(int, shape.split("x"))
    blocks = -(-out // block_size) * -(-in_ // block_size)
    for sparsity in (0.0, 0.5, 0.7, 0.8, 0.86, 0.9, 0.95):
        rows = table({"model": shape, "block_size": block_size, "sparsity": sparsity})
        assert limits.kept_share(rows).item() == num_kept(blocks, sparsity) / blocks


def test_the_exact_share_differs_from_the_nominal_one_in_small_grids():
    rows = table({"model": "768x768", "block_size": 128, "sparsity": 0.95})
    assert limits.kept_share(rows).item() == pytest.approx(3 / 36)


def test_padding_is_not_work():
    """Blocks at the edge of a 1000-class head count with the average part that lies inside."""
    rows = table({"model": "1000x768", "block_size": 64, "sparsity": 0.0})
    assert only(rows)["flop"] == 2 * 100 * 1000 * 768


def test_no_sparsity_is_no_sparsity():
    zero, none = only(table({**DENSE, "sparsity": 0.0})), only(table(DENSE))
    pd.testing.assert_series_equal(zero, none)


# --- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(*rows: tuple[str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["metric", "precision", "value"])


LINEARS = pd.DataFrame(
    [
        {**DENSE, "metric": "latency", "value": 1e-3},
        {**LAYER, "metric": "latency", "value": 1e-9},  # sparse: no dense product
        {**DENSE, "metric": "latency", "value": 1e-9, "precision": "tf32"},
        {**DENSE, "metric": "failed", "value": 1e-9},
    ]
)
OF_LAYER = 2 * 100 * 768 * 3072 / 1e-3


def test_the_peak_is_the_fastest_dense_product_of_the_precision():
    faster = ceilings(("matmul_throughput", "fp32", 2 * OF_LAYER), ("matmul_throughput", "tf32", 9 * OF_LAYER))
    slower = ceilings(("matmul_throughput", "fp32", OF_LAYER / 2), ("copy_bandwidth", "fp32", 9 * OF_LAYER))
    assert limits.peak(faster, LINEARS, "fp32") == 2 * OF_LAYER
    assert limits.peak(slower, LINEARS, "fp32") == pytest.approx(OF_LAYER)
    assert limits.peak(slower, LINEARS.iloc[:0], "fp32") == OF_LAYER / 2
    assert limits.peak(slower.iloc[:0], LINEARS, "fp32") == pytest.approx(OF_LAYER)


def test_no_peak_without_a_dense_product():
    with pytest.raises(ValueError, match=r"no dense product in bf16 in the tables; run the notebook that measures"):
        limits.peak(ceilings(("matmul_throughput", "fp32", 1.0)), LINEARS, "bf16")


def test_bandwidth_is_the_fastest_copy():
    rows = ceilings(("copy_bandwidth", "fp32", 2.0), ("copy_bandwidth", "bf16", 3.0), ("matmul_throughput", "fp32", 9))
    assert limits.bandwidth(rows) == 3.0
    with pytest.raises(ValueError, match="no copy bandwidth in the tables"):
        limits.bandwidth(rows.iloc[2:])


def test_amdahl():
    assert limits.amdahl(0.9, 0.64) == pytest.approx(1 / 0.424)
    assert limits.amdahl(0.0, 0.64) == limits.amdahl(0.9, 0.0) == 1
    np.testing.assert_allclose(limits.amdahl(np.array([0.5, 0.75]), 1.0), [2, 4])


def test_limits_and_figures_need_no_torch():
    """Run alone, because other tests have imported torch. The pipeline, too: its help comes at once."""
    modules = "answers, goals, limits, losses, notebook, pipeline, plots, results"
    code = f"import sys; from blockvit import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("tf32, roof", [(9.0, 3.0), (4.5, 2.0), (None, 2.0)])
def test_fp32_may_be_made_of_three_tf32_products(tf32, roof):
    measured = [("matmul_throughput", "fp32", 2.0), ("matmul_throughput", "bf16", 60.0)]
    table = ceilings(*measured, *([] if tf32 is None else [("matmul_throughput", "tf32", tf32)]))
    assert limits.roof(table, LINEARS.iloc[:0], "fp32") == roof
    assert limits.roof(table, LINEARS.iloc[:0], "bf16") == 60.0


def test_an_mlp_counted_by_hand():
    kept = 24 * 96 - 2073  # blocks in each of the two weights
    found = limits.mlp_traffic(100, 768, 3072, "bf16", 32, 0.9)
    assert list(found.index) == ["dense", "layer by layer", "one kernel"]
    assert set(found["input"]) == set(found["output"]) == {2 * 100 * 768}
    assert list(found["hidden written"]) == list(found["hidden read"]) == [2 * 100 * 3072, 2 * 100 * 3072, 0]
    assert found.loc["dense", "weights"] == 2 * (2 * 768 * 3072 + 768 + 3072)
    sparse = 2 * (2 * kept * 32 * 32 + 768 + 3072) + 4 * 2 * kept
    assert list(found["weights"][1:]) == [sparse, sparse]
    assert list(found["flop"]) == [4 * 100 * 768 * 3072, *[4 * 100 * kept * 32 * 32] * 2]
    assert found.loc["one kernel", "bytes"] == 2 * 2 * 100 * 768 + sparse
    assert found.loc["one kernel", "intensity"] == found.loc["one kernel", "flop"] / found.loc["one kernel", "bytes"]
