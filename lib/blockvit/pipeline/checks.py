"""What must be so before the notebooks run: a device, tests that pass and, to publish, the notebooks' own defaults."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..notebook import COMPUTED, Notebook
from .errors import FailedTestsError, MissingDeviceError, UsageError
from .profiles import DEFAULT_PROFILE, Profile
from .progress import Progress

_NO_TESTS_COLLECTED = 5  # pytest's exit code


def check_publishable(
    profile: Profile, steps: Sequence[tuple[Notebook, Mapping[str, Any]]], notebooks: Sequence[Notebook]
) -> None:
    """What is committed must be what a reader gets who runs the notebooks as they are, from first to last.

    Or who draws them from the tables, ``draw_for`` a device: the same figures and sentences, without measuring.
    """
    if profile.name != DEFAULT_PROFILE:
        raise UsageError(f"--publish takes the profile {DEFAULT_PROFILE}, not {profile.name}; leave one of the two out")
    if len(steps) != len(notebooks):
        raise UsageError(f"--publish takes all {len(notebooks)} notebooks, not {len(steps)} of them; leave --only out")
    for notebook, values in steps:
        for name, value in values.items():
            default = notebook.defaults[name]
            if name not in ("remeasure", "draw_for") and (default is COMPUTED or default != value):
                raise UsageError(
                    f"--publish takes the notebooks' own defaults, but {notebook.name} is given {name}={value!r}; "
                    "leave the parameter out, or change the default in the notebook"
                )


def check_requirements(profile: Profile) -> None:
    """Refuse a profile whose device this machine lacks."""
    if "cuda" not in profile.requires:
        return
    import torch

    if not torch.cuda.is_available():
        raise MissingDeviceError(
            f"profile {profile.name} requires a CUDA device and PyTorch {torch.__version__} finds none; "
            f"run it on a machine with an NVIDIA GPU and driver, or take --profile {DEFAULT_PROFILE}"
        )


def check_pytest(profile: Profile) -> None:
    """Refuse a profile that has tests run, where nothing can run them."""
    if importlib.util.find_spec("pytest") is None:
        raise UsageError(
            f"profile {profile.name} runs the tests marked {profile.tests} first, and pytest is not installed; "
            "run make install, or leave them out with --no-tests"
        )


def run_tests(
    marked: str, root: Path, log: Path, output: TextIO, *, environment: Mapping[str, str] | None = None
) -> None:
    """Run the tests that are ``marked`` so (``pytest -m``), in a process of their own; what it says goes to ``log``.

    ``environment`` holds variables that it gets besides this process's.

    Raises:
        FailedTestsError: a test failed, or none was run.
    """
    command = [sys.executable, "-m", "pytest", str(root / "tests"), "-m", marked, "-q", "--color=no"]
    with Progress(f"[tests] {marked}", output) as progress:
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                command,
                cwd=root,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        progress.note = next((line.strip() for line in reversed(lines) if line.strip()), "")
        # Tests that were all skipped leave pytest content, and nothing tested.
        none_ran = code == _NO_TESTS_COLLECTED or (code == 0 and not re.search(r"\b\d+ passed\b", progress.note))
        if none_ran:
            raise FailedTestsError(
                f"no test marked {marked} was run ({progress.note}), so no notebook was; {log} says why. Mark tests "
                "below tests/, name other markers in the profile, or leave them out with --no-tests"
            )
        if code:
            raise FailedTestsError(
                f"the tests marked {marked} did not pass ({progress.note or f'exit code {code}'}), so no notebook was "
                f"run: what computes wrongly is not timed; read {log} and repair what fails"
            )
