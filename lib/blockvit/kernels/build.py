"""Compiles the C++ kernels at first use, once for each source, instruction set and version of PyTorch.

At first use rather than at installation: a wheel stays free of machine code, so it installs without a compiler and runs
on any CPU, and the compiler is told which instructions this CPU has. It takes about ten seconds, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .. import files

SOURCES = Path(__file__).parent / "csrc"
TIMEOUT = 300
"""Seconds after which a compiler counts as hung; ten are usual."""

FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
"""``fp-contract``: multiply-adds become FMA. No flag lets the compiler assume that there is no NaN."""

_AVX2 = ("-mavx2", "-mfma", "-mprfchw")  # prefetchw, from Broadwell on; a CPU with AVX2 that lacks it skips it
_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", *_AVX2)
ISA_FLAGS = {  # the best first, each with all that stands below it
    "amx": ("-mamx-tile", "-mamx-bf16", "-mavx512bf16", *_AVX512),
    "avx512_bf16": ("-mavx512bf16", *_AVX512),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "baseline": (),  # what every CPU of the architecture has: SSE2, NEON
}


class BuildError(RuntimeError):
    """A kernel could not be compiled; the message says why and what to do."""


@cache
def isa() -> str:
    """The best instruction set of ``ISA_FLAGS`` that this CPU has and PyTorch uses; those below it run as well.

    PyTorch's choice is followed so that ``ATEN_CPU_CAPABILITY`` (``default``, ``avx2``) lowers both; it is checked
    against the CPU because that variable may also name more than the CPU has.
    """
    used = torch.backends.cpu.get_cpu_capability()
    if used == "AVX512" and torch.cpu._is_avx512_supported():
        if not torch.cpu._is_avx512_bf16_supported():
            return "avx512"
        return "amx" if _has_amx() else "avx512_bf16"
    if used in ("AVX2", "AVX512") and torch.cpu._is_avx2_supported():
        return "avx2"
    return "baseline"


def _has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 on AMX. Linux grants the registers only to processes that ask for them."""
    has = torch.cpu.get_capabilities()
    return all(has.get(feature, False) for feature in ("amx_tile", "amx_bf16")) and torch.cpu._init_amx()


def cache_folder() -> Path:
    """``$BLOCKVIT_CACHE/kernels``, or ``blockvit/kernels`` in the user's cache folder (``$XDG_CACHE_HOME``)."""
    if chosen := os.environ.get("BLOCKVIT_CACHE"):
        return Path(chosen) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockvit" / "kernels"


@dataclass(frozen=True)
class Library:
    """One C++ file of ``csrc`` and what it is compiled for."""

    source: str
    isa: str

    @property
    def name(self) -> str:
        """File name; tells apart all that must not be mixed up where a cache is shared between machines."""
        digest = hashlib.sha256()
        for path in sorted(SOURCES.iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        machine = (platform.system(), platform.machine(), *platform.libc_ver())
        digest.update(repr((FLAGS, ISA_FLAGS[self.isa], torch.__version__, machine)).encode())
        return f"{Path(self.source).stem}-{self.isa}-{digest.hexdigest()[:16]}.so"

    def command(self, compiler: list[str], output: Path) -> list[str]:
        """The compiler's command line. Links to the PyTorch that is loaded, and so to its OpenMP: no second one."""
        root = Path(torch.__file__).parent
        undefined = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
        return [
            *(*compiler, *FLAGS, *ISA_FLAGS[self.isa], "-shared", "-fPIC", f"-I{root / 'include'}"),
            *(str(SOURCES / self.source), "-o", str(output), f"-L{root / 'lib'}", "-ltorch_cpu", *undefined),
        ]


def build_for_this_cpu(source: str) -> Path:
    """``source`` compiled for ``isa()`` or, where the compiler is too old for that, for the next one below it.

    Raises:
        BuildError: it could be compiled for none; with what was said of the best.
    """
    first = None
    names = list(ISA_FLAGS)
    for name in names[names.index(isa()) :]:
        try:
            return build(Library(source, name))
        except BuildError as error:
            first = first or error
    raise first


def build(library: Library) -> Path:
    """The compiled ``library``, from the cache or made now.

    Several processes may call this at once, on several machines that share the cache: one compiles, the others wait,
    and a file appears under its name only when it is whole.

    Raises:
        BuildError: no compiler, or it fails; nothing is left behind.
    """
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows; use Linux, macOS or WSL")
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / library.name).is_file():
        return folder / library.name
    if os.access(folder, os.W_OK):
        return _built(library, folder)
    folder = temporary_folder()
    try:
        return _built(library, folder)
    except BaseException:
        with contextlib.suppress(OSError):  # other libraries in it
            folder.rmdir()
        raise


def temporary_folder() -> Path:
    """Where libraries are kept if the cache cannot be written: in the system's folder for files that do not last.

    It is this user's own, for what lies there is run: nobody else may have made it or be able to write to it.

    Raises:
        BuildError: it cannot be made, or not be trusted.
    """
    folder = Path(tempfile.gettempdir()) / f"blockvit-kernels-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()  # a link is somebody's, whatever it points to
    except OSError as error:
        raise BuildError(f"neither {cache_folder()} nor {folder} can be written ({error}); {_REMEDY}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BuildError(
            f"{cache_folder()} cannot be written, and {folder} is no folder that only you can write to; remove it, or "
            f"{_REMEDY}"
        )
    return folder


_REMEDY = "set $BLOCKVIT_CACHE to a folder that can be written"


def _built(library: Library, folder: Path) -> Path:
    target = folder / library.name
    lock = target.with_suffix(".lock")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # where there are no locks both compile, and the last to finish is kept
            held.enter_context(files.locked(lock))
        if target.is_file():
            return target
        try:
            _compile(library, target)
        except BaseException:
            lock.unlink(missing_ok=True)
            raise
    return target


def find_compiler() -> list[str]:
    """``$CXX``, which may have arguments, else the first of c++, g++ and clang++ on the path.

    Raises:
        BuildError: there is none.
    """
    commands = [shlex.split(os.environ.get("CXX", ""))]
    commands = commands if commands[0] else [["c++"], ["g++"], ["clang++"]]
    for name, *arguments in commands:
        if found := shutil.which(name):
            return [found, *arguments]
    names = " or ".join(command[0] for command in commands)
    raise BuildError(f"no C++ compiler: {names} is not on the PATH; install g++ or clang++, or set CXX")


def _compile(library: Library, target: Path) -> None:
    compiler = find_compiler()
    handle, unfinished = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".tmp")
    os.close(handle)
    try:
        command = library.command(compiler, Path(unfinished))
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            errors = "\n".join(done.stderr.strip().splitlines()[:5])
            raise BuildError(f"{' '.join(compiler)} cannot compile {library.source} for {library.isa}:\n{errors}")
        Path(unfinished).chmod(0o755)
        Path(unfinished).replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{' '.join(compiler)} did not compile {library.source}: {error}") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)
