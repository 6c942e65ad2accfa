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
    """The processor's marketing name and its number of usable cores, e.g. ``AMD EPYC 7B13 (4 cores)``."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1] if found else name
    elif platform.system() == "Darwin":
        name = (
            subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
            ).stdout.strip()
            or name
        )
    name = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b", "", name).split("@")[0]
    return f"{' '.join(name.split())} ({usable_cores()} cores)"


@cache
def versions() -> dict[str, str]:
    """Installed versions of torch and triton, for the columns of those names; empty where not installed."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    return {name: installed(name) for name in ("torch", "triton")}
