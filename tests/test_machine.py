"""How the processor is called in the tables."""

from __future__ import annotations

import pytest

from blockvit import machine

VM = "processor : 0\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 avx512f avx512_bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (VM, "AMD EPYC AVX-512"),
        (VM.replace("avx512f", "x"), "AMD EPYC AVX2"),
        (VM.replace("AMD EPYC", "Intel(R) Xeon(R) Processor").replace("fpu", "amx_tile"), "Intel Xeon AMX"),
        (VM.replace("AMD EPYC", "AMD EPYC 7B13"), "AMD EPYC 7B13"),
        ("model name : Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz\nflags : avx2\n", "Intel Core i7-9700K"),
        ("model name : AMD EPYC\nflags : fpu\n", "AMD EPYC"),
        ("Model : Raspberry Pi 4 Model B Rev 1.4\nFeatures : fp asimd\n", "Raspberry Pi 4 Model B Rev 1.4"),
        ("CPU implementer : 0x41\n", ""),
    ],
)
def test_a_processor_is_told_apart_from_others_of_its_name(cpuinfo, name):
    assert machine.named_in(cpuinfo) == name


def test_the_name_tells_the_number_of_cores():
    assert machine.cpu_name().endswith(f" ({machine.usable_cores()} cores)")
