"""What this process runs on: the processor, its cores, the versions of what computes; by the standard library alone."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use."""
    # Under a CPU limit of the container or batch system, os.cpu_count() still counts the whole machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cpu_name() -> str:
    """The processor's marketing name and its number of usable cores, e.g. ``AMD EPYC 7B13 (4 cores)``.

    A virtual machine may hide the model; then its widest vector instructions tell processors of one name apart:
    ``AMD EPYC AVX-512 (2 cores)``.
    """
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = named_in(cpuinfo.read_text()) or name
    elif platform.system() == "Darwin":
        name = (
            subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
            ).stdout.strip()
            or name
        )
    return f"{_plain(name)} ({usable_cores()} cores)"


_VECTORS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Instructions of x86 processors by their flag in ``/proc/cpuinfo``, the widest first."""


def named_in(cpuinfo: str) -> str:
    """The processor that ``/proc/cpuinfo`` is of, with its vector instructions unless a number tells the model."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if model is None:
        return ""
    name, known = _plain(model[1]), set(flags[1].split() if flags else ())
    vectors = next((title for flag, title in _VECTORS.items() if flag in known), "")
    return name if re.search(r"\d", name) else f"{name} {vectors}".strip()


def _plain(name: str) -> str:
    return " ".join(re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b", "", name).split("@")[0].split())


@cache
def versions() -> dict[str, str]:
    """Installed versions of torch and triton, for the columns of those names; empty where not installed."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    return {name: installed(name) for name in ("torch", "triton")}
