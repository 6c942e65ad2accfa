"""Triton's interpreter for tests: kernels on tensors in the host's memory, so that they can be tested without a GPU.

Triton reads the switch ``TRITON_INTERPRET`` at import, so what is interpreted runs in a process of its own: a script
(``run_interpreted``), or a test file's own tests once more (``test_file_in_the_interpreter``). Such a file writes its
tests for ``every_device``: they run on a GPU where there is one, and in the interpreter everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process interprets kernels."""

PREAMBLE = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.insert(0, {tests!r})
import triton_interpreter
triton_interpreter.mend()
"""

every_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in the process that interprets")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
"""Parametrizes a test over the devices that can run a kernel in this process."""


def slow(*values: object) -> object:
    """Parameters whose tests are left out where a GPU's are to be done soon: each compiles kernels of its own."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mend() -> None:
    """Repair what keeps kernels from running in the interpreter."""
    import triton.runtime.interpreter as interpreter

    # It wants grids as tuples, which the compiler does not; other people's libraries give lists.
    init = interpreter.GridExecutor.__init__

    def init_with_tuple(self, fn, arg_names, grid, *rest):
        init(self, fn, arg_names, (lambda meta: tuple(grid(meta))) if callable(grid) else tuple(grid), *rest)

    interpreter.GridExecutor.__init__ = init_with_tuple

    # Triton 3.6 takes the int() of an array of one number, which NumPy 2.5 refuses.
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_with_index


if INTERPRETED and importlib.util.find_spec("triton"):
    mend()


def run_interpreted(script: str, *arguments: str) -> None:
    """Run a script, which has to print ``done`` at its end, in a process that interprets kernels."""
    preamble = PREAMBLE.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", preamble + script, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert process.returncode == 0 and process.stdout.endswith("done\n"), process.stdout + process.stderr


def test_file_in_the_interpreter(file: str) -> None:
    """Run the tests of ``file`` for the device ``cpu`` in a process that interprets kernels; fail as they do."""
    if INTERPRETED:
        pytest.skip("this is the process that interprets")
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
    assert process.returncode == 0 and " passed" in process.stdout, process.stdout[-4000:] + process.stderr[-2000:]


test_file_in_the_interpreter.__test__ = False
