"""What the compiler makes of our kernels for GPUs that are not there: spills, tensor cores, shared memory."""

from __future__ import annotations

import re

import pytest
from triton_interpreter import INTERPRETED

pytest.importorskip("triton")
from blockvit.kernels.triton import linear, offline, parameters

pytestmark = pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
PROCESSORS = {80: 108, 90: 132}


def compiled(
    arch: int, dtype: str, block_size: int, group: int = 1, precision: str = "tf32x3", *, tokens=50432, **more
):
    """The kernel with the default parameters for 3072 outputs, fused exact GELU and all; and these parameters."""
    height = group * block_size
    sizes = parameters.default(
        height,
        300.0,
        ITEMSIZE[dtype],
        precision,
        tokens,
        3072 // height,
        multiprocessors=PROCESSORS[arch],
        shared=offline.SHARED_BYTES[arch],
    )
    sizes |= more
    tensors = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr"), dtype)
    tensors |= dict.fromkeys(("crow_ptr", "col_ptr", *(["rows_ptr"] if group > 1 else [])), "i32")
    report = offline.compile_for(
        linear._linear_kernel,
        arch,
        tensors,
        {"tokens": tokens, "stride_xt": 768, "stride_xi": 1, "stride_yt": 3072},
        {
            **({} if group > 1 else {"rows_ptr": None}),
            "order_ptr": None,
            "ROWS": height,
            "COLS": block_size,
            "TRANSPOSED": False,
            "ACTIVATION": "gelu",
            "PRECISION": precision,
            **{name: value for name, value in sizes.items() if name.startswith("BLOCK")},
        },
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
    )
    return report, sizes


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
    report, sizes = compiled(arch, dtype, block_size, group, precision)
    assert report.spills == 0
    assert report.shared <= offline.SHARED_BYTES[arch]
    assert report.wgmma if arch == 90 else report.tensor_cores
    assert report.programs_at_once(arch) >= (2 if arch == 90 else 1)
    tiles = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]
    counted = parameters.shared_bytes(*tiles, sizes["num_stages"], ITEMSIZE[dtype])
    assert report.shared <= counted + 1024  # the parts of emulated float32 lie where the tiles do


def test_activations_come_16_bytes_at_a_time_and_past_the_registers():
    """Blocks of 16 that are joined to a tile: what the compiler has to see is that 16 neighbours are contiguous."""
    report, _ = compiled(90, "bf16", 16, 4)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x\w+)", report.ptx)
    assert copies and set(copies) == {"0x10"}
    assert set(re.findall(r"st\.global\S*", report.ptx)) == {"st.global.v4.b32"}


def test_few_tokens_use_tensor_cores_too():
    report, sizes = compiled(90, "bf16", 64, tokens=5)
    assert sizes["BLOCK_M"] == 16
    assert report.tensor_cores and not report.wgmma and report.spills == 0


def test_a_report_shows_spills_and_what_is_no_tensor_core():
    report, _ = compiled(90, "fp32", 64, precision="ieee", BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=2)
    assert report.spills > 0 and not report.tensor_cores
    assert "FFMA" in report.sass
