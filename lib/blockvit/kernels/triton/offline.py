"""Compile a kernel for a GPU that is not there, and see what the compiler made of it.

Triton needs no GPU to compile, and its wheel brings NVIDIA's assembler: registers, spills, shared memory and the use of
tensor cores are known before anything runs. Whether a kernel is fast is not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program can have, by compute capability (CUDA C++ Programming Guide)."""

REGISTERS = 64 * 1024
"""32-bit registers of a multiprocessor, on both."""


@dataclass(frozen=True)
class Report:
    """What a kernel needs on one architecture."""

    registers: int
    """32-bit registers a thread."""
    spills: int
    """Bytes that a thread keeps in local memory because registers do not suffice."""
    shared: int
    """Bytes of shared memory a program."""
    threads: int
    """Threads a program."""
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @property
    def sass(self) -> str:
        """The machine code, read anew from the binary: for a look at what the numbers do not tell."""
        return _cuobjdump("-sass", self.cubin)

    @property
    def wgmma(self) -> bool:
        """Whether it uses Hopper's tensor core instructions."""
        return "wgmma.mma_async" in self.ptx

    @property
    def tensor_cores(self) -> bool:
        """Whether it uses tensor cores at all."""
        return self.wgmma or "mma.sync" in self.ptx

    def programs_at_once(self, arch: int) -> int:
        """How many programs one multiprocessor holds, by registers, shared memory and threads."""
        by_registers = REGISTERS // (_round_up(self.registers, 8) * self.threads)
        by_shared = (SHARED_BYTES[arch] + 1024) // (self.shared + 1024)  # each program is charged 1 KiB more
        return min(by_registers, by_shared, 2048 // self.threads)


def compile_for(
    kernel: triton.JITFunction,
    arch: int,
    pointers: Mapping[str, str],
    integers: Mapping[str, int],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
) -> Report:
    """Compile ``kernel`` as a call with such arguments would.

    Args:
        kernel: a ``triton.jit`` function.
        arch: compute capability times ten, 80 or 90.
        pointers: element type, in Triton's spelling (``"bf16"``, ``"i32"``), of each tensor; addresses count as
            multiples of 16 bytes, as those of new tensors are.
        integers: an example of each integer argument: 1 and multiples of 16 are compiled in, as Triton does.
        constants: the ``tl.constexpr`` arguments, and tensors that are None.
        num_warps: as at a launch.
        num_stages: as at a launch.
        maxnreg: as at a launch.
    """
    signature, constexprs, attributes = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        if name in pointers:
            signature[name] = f"*{pointers[name]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in integers and (kernel.params[i].do_not_specialize or integers[name] != 1):
            signature[name] = "i64" if abs(integers[name]) >= 1 << 31 else "i32"
            if integers[name] % 16 == 0 and not kernel.params[i].do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constexprs[name] = 1 if name in integers else constants[name]
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = compiled.asm["cubin"]
    # From the binary, not from the assembler's own report: Triton keeps that for itself.
    used = dict(re.findall(r"(\w+):(\d+)", _cuobjdump("-res-usage", cubin).rpartition("Function")[2]))
    return Report(
        registers=int(used["REG"]),
        spills=int(used["STACK"]) + int(used["LOCAL"]),
        shared=compiled.metadata.shared,
        threads=32 * num_warps,
        ptx=compiled.asm["ptx"],
        cubin=cubin,
    )


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
