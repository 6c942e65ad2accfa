"""The study in one call: runs the notebooks in order and writes their outputs and one report.

``python -m blockvit.pipeline --profile gpu`` executes ``notebooks/NN_*.ipynb`` by name. A notebook's own defaults are
the laptop profile; ``notebooks/profiles/<profile>.yaml`` and then the command line override them. Executed copies and
``report.html`` go to ``build/<profile>/``. Measured rows are kept by the library: a rerun measures what is missing.
A profile may have tests run first: what computes wrongly is not worth timing.

A run holds a lock on its profile's build folder. Two runs of one profile would write the same copies and, worse, time
the same rows on one machine at once; the second is refused and loses nothing by waiting.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from . import checkout, files, report
from .machine import cpu_name
from .notebook import COMPUTED, Notebook, NotebookError, PublishError, completed, execute, published

DEFAULT_PROFILE = "laptop"
CLAIMS = "06_claims"
README_SECTIONS = ("speed", "claims", "scale")
"""Sections of the README that are generated when the claims are decided."""


class UsageError(ValueError):
    """A profile, notebook or parameter that does not exist or does not fit."""


class MissingDeviceError(RuntimeError):
    """The profile requires a device that this machine lacks."""


class BusyError(RuntimeError):
    """Another run of the same profile is under way."""


class FailedTestsError(RuntimeError):
    """The tests that the profile names did not pass."""


EXIT_CODES = {
    NotebookError: 1,
    PublishError: 1,
    FailedTestsError: 1,
    UsageError: 2,
    MissingDeviceError: 3,
    BusyError: 4,
}


@dataclass(frozen=True)
class Profile:
    """Parameters for the notebooks, read from ``notebooks/profiles/<name>.yaml``."""

    name: str
    description: str = ""
    requires: tuple[str, ...] = ()
    tests: str = ""
    """Which tests to run before the notebooks, as ``pytest -m`` takes it: ``gpu and not slow``."""
    notebooks: tuple[str, ...] = ()
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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
        _check_publishable(chosen, steps, notebooks)
    claims = readme and any(notebook.name == CLAIMS for notebook, _ in steps)
    if claims:
        # A missing marker is told now, not after the last notebook.
        for name in README_SECTIONS:
            _section(root / "README.md", name, _text(root / "README.md"))
    _check_requirements(chosen)
    marked = chosen.tests if tests else ""
    if marked:
        _check_pytest(chosen)

    build = root / "build" / chosen.name
    with _locked(build):
        if marked:
            run_tests(marked, root, build / "tests.log", output)
        for number, (notebook, values) in enumerate(steps, 1):
            with _Progress(f"[{number}/{len(steps)}] {notebook.name}", output, notebook.cells) as progress:
                copy = build / notebook.path.name
                execute(notebook, values, copy, environment=_environment(root), on_cell=progress.cell)
        copies = [build / n.path.name for n in notebooks if completed(build / n.path.name)]
        device = overrides.get("draw_for") or _device(chosen)
        title = f"BlockViT · {chosen.name} · {device} · {datetime.now(UTC):%Y-%m-%d}"
        page = report.write(build / "report.html", copies, title=title, description=chosen.description, root=root)
        if publish:
            _publish([notebook for notebook, _ in steps], build, root)
        if claims:
            refresh_readme(root / "README.md", _readme_sections(root, steps))
    output.write(f"report: {page}\n")
    return page


def _environment(root: Path) -> dict[str, str]:
    """Where the study, its results and figures are, for kernels that run in another folder than this process."""
    given = {name: os.environ.get(name) for name in ("BLOCKVIT_RESULTS", "BLOCKVIT_FIGURES")}
    return {"BLOCKVIT_HOME": str(root)} | {name: str(Path(text).resolve()) for name, text in given.items() if text}


def find_notebooks(folder: Path) -> list[Notebook]:
    """The study's notebooks, ``NN_*.ipynb``, in order of name."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise UsageError(f"{folder} holds no notebook named like 01_train.ipynb; run inside the cloned repository")
    with _as_usage_error():
        return [Notebook.read(path) for path in paths]


@contextmanager
def _as_usage_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-3`` is a number, as in Python; YAML 1.1 wants ``1.0e-3`` and takes the rest for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def read_profile(folder: Path, name: str, notebooks: Sequence[Notebook]) -> Profile:
    """Read a profile and check every name in it.

    Raises:
        UsageError: there is no such profile, or it names a notebook or a parameter that does not exist.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UsageError(_unknown("profile", name, known))
    content = _yaml((folder / f"{name}.yaml").read_text(encoding="utf-8"), f"profile {name}") or {}
    by_name = {notebook.name: notebook for notebook in notebooks}
    keys = ["description", "requires", "tests", "notebooks", "all", *by_name]
    for key in _mapping(content, f"profile {name}"):
        if key not in keys:
            raise UsageError(f"profile {name}: {_unknown('key', key, keys)}")
    profile = Profile(
        name,
        description=str(content.get("description", "")),
        requires=_names(content.get("requires")),
        tests=str(content.get("tests", "")),
        notebooks=_names(content.get("notebooks")),
        shared=_mapping(content.get("all"), f"profile {name}, all"),
        own={key: _mapping(content.get(key), f"profile {name}, {key}") for key in by_name},
    )
    _check_parameters(profile.shared, notebooks, f"profile {name}, all")
    for key, section in profile.own.items():
        _check_parameters(section, [by_name[key]], f"profile {name}, {key}")
    for requirement in profile.requires:
        if requirement != "cuda":
            raise UsageError(f"profile {name}: {_unknown('requirement', requirement, ['cuda'])}")
    if not re.fullmatch(r"[\w\s()]*", profile.tests):
        raise UsageError(f"profile {name}: tests is {profile.tests!r}, expected pytest markers, e.g. gpu and not slow")
    return profile


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}, expected a mapping of names to values")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(str(name) for name in (value if isinstance(value, list) else [value]))


def _unknown(what: str, name: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}known: {', '.join(known) or 'none'}"


def _check_parameters(given: Collection[str], notebooks: Sequence[Notebook], where: str) -> None:
    """Refuse names that none of the notebooks has: papermill would take them and change nothing."""
    known = sorted({name for notebook in notebooks for name in notebook.defaults} - {"profile"})
    for name in given:
        if name == "profile":
            raise UsageError(f"{where}: parameter 'profile' is the profile's own name; choose it with --profile")
        if name not in known:
            raise UsageError(f"{where}: {_unknown('parameter', name, known)}")


def plan(
    notebooks: Sequence[Notebook],
    profile: Profile,
    *,
    only: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> list[tuple[Notebook, dict[str, Any]]]:
    """Which notebooks to run, in order, and the parameters that each is given.

    Raises:
        UsageError: an unknown notebook; an override that none of the chosen notebooks has; a value of the wrong kind.
    """
    overrides = overrides or {}
    wanted = [name.removesuffix(".ipynb") for name in (only or profile.notebooks)]
    known = [notebook.name for notebook in notebooks]
    for name in wanted:
        if name not in known:
            raise UsageError(_unknown("notebook", name, known))
    chosen = [notebook for notebook in notebooks if not wanted or notebook.name in wanted]
    _check_parameters(overrides, chosen, "the notebooks to run")
    steps = []
    for notebook in chosen:
        given = {**profile.shared, **profile.own.get(notebook.name, {}), **overrides, "profile": profile.name}
        values = {name: value for name, value in given.items() if name in notebook.defaults}
        with _as_usage_error():
            for name, value in values.items():
                notebook.check(name, value)
        steps.append((notebook, values))
    return steps


def _check_publishable(
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


def _check_requirements(profile: Profile) -> None:
    if "cuda" not in profile.requires:
        return
    import torch

    if not torch.cuda.is_available():
        raise MissingDeviceError(
            f"profile {profile.name} requires a CUDA device and PyTorch {torch.__version__} finds none; "
            f"run it on a machine with an NVIDIA GPU and driver, or take --profile {DEFAULT_PROFILE}"
        )


_NO_TESTS_COLLECTED = 5  # pytest's exit code


def _check_pytest(profile: Profile) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise UsageError(
            f"profile {profile.name} runs the tests marked {profile.tests} first, and pytest is not installed; "
            "run make install, or leave them out with --no-tests"
        )


def run_tests(marked: str, root: Path, log: Path, output: TextIO) -> None:
    """Run the tests that are ``marked`` so (``pytest -m``), in a process of their own; what it says goes to ``log``.

    Raises:
        FailedTestsError: a test failed, or none was run.
    """
    command = [sys.executable, "-m", "pytest", str(root / "tests"), "-m", marked, "-q", "--color=no"]
    with _Progress(f"[tests] {marked}", output) as progress:
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                command,
                cwd=root,
                env={**os.environ, **_environment(root)},
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


class _Progress:
    """Elapsed time of one step, and its cell: a living line on a terminal, else a line now and then for the log.

    ``note``, where it is set, is shown at the end.
    """

    def __init__(self, label: str, output: TextIO, cells: int | None = None) -> None:
        self._label, self._cells, self._output = label, cells, output
        self.note = ""
        self._live = output.isatty()
        self._number = 0
        self._begin = time.monotonic()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> _Progress:
        self._show("")
        self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._ticker.join()
        self._show("stopped" if kind else "done", last=True)

    def cell(self, number: int) -> None:
        """Note that a cell has started."""
        self._number = number
        if self._live:
            self._show("")

    def _tick(self) -> None:
        while not self._ended.wait(1 if self._live else 60):
            self._show("")

    def _show(self, state: str, *, last: bool = False) -> None:
        seconds = round(time.monotonic() - self._begin)
        elapsed = f"{seconds // 60}:{seconds % 60:02}"
        cell = "" if self._cells is None else f"cell {self._number}/{self._cells}"
        line = "  ".join(part for part in (self._label, cell, elapsed, state, self.note) if part)
        self._output.write(f"\r\x1b[2K{line}" + "\n" * last if self._live else f"{line}\n")
        self._output.flush()


def _publish(notebooks: Iterable[Notebook], build: Path, root: Path) -> None:
    """Write all notebooks or, if one is refused, none."""
    texts = {n.path: published(n.path, build / n.path.name, root) for n in notebooks}
    for path, text in texts.items():
        files.write(path, text)


def _readme_sections(root: Path, steps: Sequence[tuple[Notebook, Mapping[str, Any]]]) -> dict[str, str]:
    """What the README tells of the tables, as Markdown, from those that the claims' notebook read."""
    from . import claims, headline, results
    from .train import cost

    given = next(values for notebook, values in steps if notebook.name == CLAIMS)
    if given.get("results_dir"):
        folder = root / "notebooks" / given["results_dir"]  # as the notebook, running there, resolves it
    else:
        folder = Path(os.environ.get("BLOCKVIT_RESULTS") or root / "data" / "results")
    store = results.Store(folder)
    contents = headline.markdown(store), claims.briefly(store), cost.readme(store)
    return dict(zip(README_SECTIONS, contents, strict=True))


def refresh_readme(readme: Path, contents: Mapping[str, str]) -> None:
    """Replace what stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, for each name, in one write.

    Raises:
        UsageError: a marker is missing, comes twice, or ends before it begins; the file is unchanged.
    """
    text = _text(readme)
    for name, content in contents.items():
        begin, end = _section(readme, name, text)
        text = f"{text[:begin]}\n{content.strip()}\n{text[end:]}"
    files.write(readme, text)


def _text(readme: Path) -> str:
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


def _section(readme: Path, name: str, text: str) -> tuple[int, int]:
    """Where the content between a section's two markers begins and ends."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise UsageError(
                f"{readme} holds the marker {marker!r} {text.count(marker)} times, expected once; "
                f"put {begin} and {end} where the section {name!r} belongs"
            )
    first, last = text.index(begin) + len(begin), text.index(end)
    if last < first:
        raise UsageError(f"{readme} holds {end!r} before {begin!r}; exchange the two")
    return first, last


def _device(profile: Profile) -> str:
    if "cuda" in profile.requires:
        import torch

        return torch.cuda.get_device_name()
    return cpu_name()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 failed notebook or tests, 2 wrong usage, 3 no such device, 4 busy."""
    options = _parser().parse_args(arguments)
    try:
        reproduce(
            options.profile,
            data=options.data,
            checkpoint=options.checkpoint,
            only=options.only,
            parameters=_parse_parameters(options.parameters),
            remeasure=options.remeasure,
            publish=options.publish,
            readme=not options.no_readme,
            tests=not options.no_tests,
        )
    except tuple(EXIT_CODES) as error:
        print(f"error: {error}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would report the cell that was cut short
        print("\ninterrupted; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockvit.pipeline", description="Run the study's notebooks in order and write one report."
    )
    parser.add_argument(
        "--profile", default=DEFAULT_PROFILE, help="a file of notebooks/profiles (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="PATH", help="folder of the data sets, for profiles that need one")
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="a published checkpoint: run only the notebooks that take one"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NOTEBOOK", help="run these, e.g. 03_microbenchmarks")
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="override a parameter in every notebook that has it; the value is read as YAML",
    )
    parser.add_argument("--remeasure", action="store_true", help="measure again what has been measured already")
    parser.add_argument("--publish", action="store_true", help="write the outputs into notebooks/, to be committed")
    parser.add_argument("--no-readme", action="store_true", help="leave README.md as it is")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests that the profile names first")
    return parser


def _parse_parameters(texts: Iterable[str]) -> dict[str, Any]:
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"-p is given {text!r}, expected NAME=VALUE, e.g. -p seeds=[0,1]")
        parameters[name] = _yaml(value, f"the value of -p {name}")
    return parameters


if __name__ == "__main__":
    sys.exit(main())
