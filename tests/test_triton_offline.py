"""What the compiler makes of our kernels for GPUs that are not there: spills, tensor cores, shared memory."""

from __future__ import annotations

import re

import pytest
from triton_interpreter import INTERPRETED

pytest.importorskip("triton")
from blockvit.kernels.triton import offline, packing, parameters, survey

pytestmark = pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")


@pytest.mark.parametrize(
    "arch, dtype, block_size, group, precision",
    [
        (90, "bf16", 16, 4, "ieee"),
        (90, "bf16", 32, 1, "ieee"),
        (90, "bf16", 64, 1, "ieee"),
        (90, "bf16", 64, 2, "ieee"),
        (90, "fp32", 16, 1, "tf32x3"),
        (90, "fp32", 64, 1, "tf32x3"),
        (90, "fp32", 128, 1, "tf32"),
        (80, "bf16", 64, 2, "ieee"),
        (80, "fp32", 64, 1, "tf32x3"),
    ],
)
def test_defaults_spill_nothing_and_use_tensor_cores(arch, dtype, block_size, group, precision):
    report, sizes = survey.linear(arch, dtype, block_size, group, precision)
    assert report.spills == 0
    assert report.shared <= offline.SHARED_BYTES[arch]
    assert report.wgmma if arch == 90 else report.tensor_cores
    assert report.programs_at_once(arch) >= (2 if arch == 90 else 1)
    tiles = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]
    counted = parameters.shared_bytes(*tiles, sizes["num_stages"], survey.DTYPES[dtype].itemsize)
    assert report.shared <= counted + 1024  # the parts of emulated float32 lie where the tiles do


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "dtype, block_size, precision", [("bf16", 16, "ieee"), ("bf16", 64, "ieee"), ("fp32", 32, "tf32x3")]
)
def test_the_gradient_of_the_input_spills_nothing_and_uses_tensor_cores(arch, dtype, block_size, precision):
    report, _ = survey.linear(arch, dtype, block_size, 1, precision, activation=None, transposed=True)
    assert report.spills == 0 and report.tensor_cores
    assert report.shared <= offline.SHARED_BYTES[arch]


def test_the_other_gelu_spills_nothing_either():
    report, _ = survey.linear(90, "bf16", 64, 2, activation="gelu_tanh")
    assert report.spills == 0 and report.wgmma


def test_activations_come_16_bytes_at_a_time_and_past_the_registers():
    """Blocks of 16 that are joined to a tile: what the compiler has to see is that 16 neighbours are contiguous."""
    report, _ = survey.linear(90, "bf16", 16, 4)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x\w+)", report.ptx)
    assert copies and set(copies) == {"0x10"}
    assert set(re.findall(r"st\.global\S*", report.ptx)) == {"st.global.v4.b32"}


def test_few_tokens_use_tensor_cores_too():
    report, sizes = survey.linear(90, "bf16", 64, tokens=5)
    assert sizes["BLOCK_M"] == 16
    assert report.tensor_cores and not report.wgmma and report.spills == 0


def test_a_report_shows_spills_and_what_is_no_tensor_core():
    report, _ = survey.linear(90, "fp32", 64, precision="ieee", BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=2)
    assert report.spills > 0 and not report.tensor_cores
    assert "FFMA" in report.sass


def test_the_table_tells_what_a_conversion_would_run():
    (row,) = survey.table([90], ["bf16"], [16]).to_dict("records")
    report, sizes = survey.linear(90, "bf16", 16, row["rows"])
    assert row["rows"] == survey.packed("bf16", 16).values.shape[1] // 16 > 1
    assert 1 < row["packed"] <= packing.MEMORY
    assert (row["spills"], row["cores"]) == (0, "wgmma")
    assert row["tile"].startswith(f"{sizes['BLOCK_M']}×{sizes['BLOCK_N']}×") and row["registers"] == report.registers
