"""One run of the study: the tests and notebooks of a profile, then the report, the README and what is published."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from .. import checkout, files, report
from ..machine import cpu_name
from ..notebook import Notebook, completed, execute, published
from . import checks
from .errors import BusyError
from .profiles import DEFAULT_PROFILE, Profile, find_notebooks, plan, read_profile
from .progress import Progress
from .readme import check_sections, refresh_readme, sections

CLAIMS = "06_claims"


def reproduce(
    profile: str = DEFAULT_PROFILE,
    *,
    data: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    only: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    remeasure: bool = False,
    publish: bool = False,
    readme: bool = True,
    tests: bool = True,
    root: str | os.PathLike | None = None,
    output: TextIO | None = None,
) -> Path:
    """Run the study's notebooks in order and write the report.

    Args:
        profile: a file of ``notebooks/profiles``, without its ending.
        data: the data sets' folder, for the notebooks that have a ``data_root``.
        checkpoint: a published checkpoint, for the notebooks that have a ``checkpoint``; unless ``only`` says
            otherwise, only they are run, because there is nothing to train.
        only: names of the notebooks to run; empty means the profile's choice, or all.
        parameters: values that override the profile's in each notebook that has the parameter.
        remeasure: measure again what has been measured already.
        publish: afterwards, write the outputs into the repository's notebooks, to be committed. Takes all notebooks
            with their own defaults; ``draw_for`` may name a device of the tables to draw them for.
        readme: refresh README.md's claims after a run that decided them.
        tests: first run the tests that the profile names.
        root: the repository; found by ``checkout.root`` if None.
        output: where progress is shown; standard output if None.

    Returns:
        The path of the HTML report.

    Raises:
        UsageError: an unknown profile, notebook or parameter, a value of the wrong kind, or no pytest for the profile's
            tests; nothing was run.
        MissingDeviceError: the profile requires a device that is not there; nothing was run.
        BusyError: a run of this profile is under way.
        FailedTestsError: the profile's tests did not pass; no notebook was run.
        NotebookError: a cell failed; later notebooks were not run.
        PublishError: the outputs may not be committed; the repository's notebooks are unchanged.
    """
    root = Path(root).resolve() if root else checkout.root()
    output = output or sys.stdout
    paths = {"data_root": data, "checkpoint": checkpoint}
    overrides: dict[str, Any] = {name: str(Path(path).expanduser().resolve()) for name, path in paths.items() if path}
    overrides |= {"remeasure": True} if remeasure else {}
    overrides |= parameters or {}

    notebooks = find_notebooks(root / "notebooks")
    if checkpoint:
        only = only or [notebook.name for notebook in notebooks if "checkpoint" in notebook.defaults]
    chosen = read_profile(root / "notebooks" / "profiles", profile, notebooks)
    steps = plan(notebooks, chosen, only=only, overrides=overrides)
    if publish:
        checks.check_publishable(chosen, steps, notebooks)
    of_claims = next((values for notebook, values in steps if readme and notebook.name == CLAIMS), None)
    if of_claims is not None:
        check_sections(root / "README.md")
    checks.check_requirements(chosen)
    marked = chosen.tests if tests else ""
    if marked:
        checks.check_pytest(chosen)

    build, environment = root / "build" / chosen.name, _environment(root)
    with _locked(build):
        if marked:
            checks.run_tests(marked, root, build / "tests.log", output, environment=environment)
        for number, (notebook, values) in enumerate(steps, 1):
            with Progress(f"[{number}/{len(steps)}] {notebook.name}", output, notebook.cells) as progress:
                copy = build / notebook.path.name
                execute(notebook, values, copy, environment=environment, on_cell=progress.cell)
        copies = [build / n.path.name for n in notebooks if completed(build / n.path.name)]
        device = overrides.get("draw_for") or _device(chosen)
        title = f"BlockViT · {chosen.name} · {device} · {datetime.now(UTC):%Y-%m-%d}"
        page = report.write(build / "report.html", copies, title=title, description=chosen.description, root=root)
        if publish:
            _publish([notebook for notebook, _ in steps], build, root)
        if of_claims is not None:
            refresh_readme(root / "README.md", sections(root, of_claims.get("results_dir")))
    output.write(f"report: {page}\n")
    return page


def _environment(root: Path) -> dict[str, str]:
    """Where the study, its results and figures are, for kernels that run in another folder than this process."""
    given = {name: os.environ.get(name) for name in ("BLOCKVIT_RESULTS", "BLOCKVIT_FIGURES")}
    return {"BLOCKVIT_HOME": str(root)} | {name: str(Path(text).resolve()) for name, text in given.items() if text}


@contextmanager
def _locked(build: Path) -> Iterator[None]:
    """Hold the build folder; the system lets go of it when the process ends, however it ends."""
    build.mkdir(parents=True, exist_ok=True)
    lock = build / ".lock"
    with ExitStack() as held:
        try:
            file = held.enter_context(files.locked(lock, wait=False))
        except BlockingIOError as error:
            holder = lock.read_text(encoding="utf-8").strip() or "just started"
            raise BusyError(
                f"profile {build.name} is being run already ({holder}) and writes to {build}; wait for it to end, or "
                "end it: this run then goes on from what was measured"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}, since {datetime.now():%H:%M:%S}".encode())
        yield


def _publish(notebooks: Iterable[Notebook], build: Path, root: Path) -> None:
    """Write all notebooks or, if one is refused, none."""
    texts = {n.path: published(n.path, build / n.path.name, root) for n in notebooks}
    for path, text in texts.items():
        files.write(path, text)


def _device(profile: Profile) -> str:
    if "cuda" in profile.requires:
        import torch

        return torch.cuda.get_device_name()
    return cpu_name()
