"""One notebook of the study as a file: its parameters, its execution, and what of it is committed.

papermill and nbformat take a second or more to import: they are imported where they are used, so that the pipeline's
``--help`` and its refusals come at once.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_client import AsyncKernelManager
    from nbformat import NotebookNode

COMPUTED = object()
"""The default of a parameter that is no literal: only the kernel knows it."""

_KINDS = {"true or false": bool, "a number": (int, float), "text": str, "a list": (list, tuple, set), "a mapping": dict}


class NotebookError(RuntimeError):
    """A notebook's cell failed; says which, with what, and where the outputs until then are."""


class PublishError(RuntimeError):
    """Outputs that must not be committed."""


@dataclass(frozen=True)
class Notebook:
    """A notebook and the parameters that its cell tagged ``parameters`` defines, with their defaults."""

    path: Path
    cells: int
    defaults: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Notebook:
        """Read a notebook's parameters.

        The cell is parsed as Python rather than with papermill's own inspection, which goes line by line and loses a
        parameter whose line holds a second ``=``, be it in a comment.

        Raises:
            ValueError: the file is no notebook, or its parameters cell is no plain Python.
        """
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name} is no notebook ({error!r}); restore it from the repository") from error
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        try:
            defaults = _assignments("".join(tagged[0]["source"])) if tagged else {}
        except SyntaxError as error:
            raise ValueError(
                f"{path.name}: line {error.lineno} of the cell tagged 'parameters' is no Python ({error.msg}); "
                "the cell may hold assignments only"
            ) from error
        return cls(path, len(cells), defaults)

    @property
    def name(self) -> str:
        """The file's name without its ending, e.g. ``01_train``."""
        return self.path.stem

    def check(self, parameter: str, value: Any) -> None:
        """Refuse a value that certainly is of another kind than the parameter's default.

        Nothing is certain where either is None or the default is computed; whole numbers and fractions are one kind.

        Raises:
            ValueError: names the parameter, the value and what its default is.
        """
        default = self.defaults[parameter]
        expected = _unmet_kind(default, value)
        if expected:
            raise ValueError(
                f"{self.name}: parameter {parameter!r} is given {value!r}, "
                f"expected {expected} like its default {default!r}"
            )


def _assignments(source: str) -> dict[str, Any]:
    values = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value:
            targets = [statement.target]
        else:
            continue
        values |= {target.id: _literal(statement.value) for target in targets if isinstance(target, ast.Name)}
    return values


def _literal(expression: ast.expr) -> Any:
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return COMPUTED


def _kind(value: Any) -> str | None:
    return next((kind for kind, types in _KINDS.items() if isinstance(value, types)), None)


def _unmet_kind(default: Any, value: Any) -> str | None:
    """What ``value`` would have to be, if it certainly is not."""
    expected, given = _kind(default), _kind(value)
    if expected is None or given is None:
        return None
    if expected != given:
        return expected
    members = {_kind(member) for member in default} if expected == "a list" else set()
    if len(members) == 1 and members != {None} and not {_kind(member) for member in value} <= {*members, None}:
        return f"a list, each member {members.pop()},"
    return None


def execute(
    notebook: Notebook,
    values: Mapping[str, Any],
    output: Path,
    *,
    environment: Mapping[str, str] | None = None,
    on_cell: Callable[[int], None] = lambda number: None,
) -> None:
    """Run a notebook with papermill in a kernel of this interpreter, from the notebook's own folder.

    Args:
        notebook: what to run.
        values: parameters to inject behind the parameters cell.
        output: the executed copy, written again before and after every cell.
        environment: variables for the kernel beside those of this process.
        on_cell: called with each cell's number, from 1, as it starts; the injected cell is not counted.

    Raises:
        NotebookError: a cell failed, or the kernel died in it.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    number, first_line, injected = 0, "", 0

    def started(cell: NotebookNode, cell_index: int) -> None:
        nonlocal number, first_line, injected
        injected |= "injected-parameters" in cell.metadata.get("tags", [])
        number = cell_index + 1 - injected
        first_line = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
        on_cell(number)

    try:
        with quiet():
            papermill.execute_notebook(
                _unformatted(notebook.path),
                _unformatted(output),
                dict(values),
                kernel_name="python3",
                kernel_manager_class=_this_interpreter(environment or {}),
                language="python",
                cwd=notebook.path.parent,
                start_timeout=180,  # a loaded two-core machine takes a minute to import ipykernel
                progress_bar=False,
                on_cell_start=started,
                coalesce_streams=True,
                iopub_timeout=120,  # a loaded machine delivers a cell's outputs late; later than this is an error
            )
    except (PapermillExecutionError, RuntimeError, TimeoutError) as error:  # the last: the kernel died or kept silent
        cause = f"{error.ename}: {error.evalue}" if isinstance(error, PapermillExecutionError) else f"{error}"
        raise NotebookError(
            f"{notebook.name} stopped at cell {number} of {notebook.cells}, which begins `{first_line}`\n"
            f"  {cause.strip()}\n  the outputs until then, with the traceback: {output}"
        ) from error


def _unformatted(path: Path) -> str:
    """A path that survives papermill's ``str.format``."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _this_interpreter(environment: Mapping[str, str]) -> type[AsyncKernelManager]:
    """Kernels of the running interpreter, whatever kernelspecs are installed and whatever PATH says."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    # ipykernel warns at each start (of frozen modules to the debugger, of plain TCP on the loopback) and logs a
    # traceback when it is shut down in mid-cell; what fails in a cell reaches the notebook all the same.
    quieted = get_kernel_dict(extra_arguments=["--IPKernelApp.log_level=50"])
    # A progress bar would end in the notebook's outputs with its last speed; the pipeline shows its own progress.
    spec = KernelSpec(**quieted, env={"PYDEVD_DISABLE_FILE_VALIDATION": "1", "TQDM_DISABLE": "1", **environment})

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

    return ThisInterpreter


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what papermill and jupyter log and warn in this process; what matters is raised."""
    loggers = [logging.getLogger(name) for name in ("papermill", "traitlets", "nbconvert", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def completed(executed: Path) -> bool:
    """Whether an executed copy is there and ran to its end."""
    try:
        run = json.loads(executed.read_text(encoding="utf-8"))["metadata"]["papermill"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(run.get("end_time")) and not run.get("exception")


def published(notebook: Path, executed: Path, root: Path) -> str:
    """The repository's notebook with the outputs of its executed copy: the text to commit.

    Cells and metadata are the repository's; execution counts run from 1 without gaps; paths below ``root`` become
    relative to it.

    Raises:
        PublishError: the copy was made from other cells, or an output names another path of this machine.
    """
    import nbformat

    target, copy = (nbformat.read(path, as_version=4) for path in (notebook, executed))
    cells = [cell for cell in copy.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    _check_sources(notebook.stem, target.cells, cells)
    for key in ("papermill", "widgets"):
        target.metadata.pop(key, None)
    count = 0
    for number, (cell, ran) in enumerate(zip(target.cells, cells, strict=True), 1):
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        cell.outputs = [_portable(output, root, f"{notebook.stem}, cell {number}") for output in ran.outputs]
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = cell.execution_count
    return nbformat.writes(target).rstrip("\n") + "\n"


def _check_sources(name: str, cells: list[NotebookNode], ran: list[NotebookNode]) -> None:
    sources, executed = ([(cell.cell_type, cell.source) for cell in each] for each in (cells, ran))
    if sources == executed:
        return
    pairs = zip(sources, executed, strict=False)
    differs = next((n for n, (left, right) in enumerate(pairs, 1) if left != right), min(len(cells), len(ran)) + 1)
    raise PublishError(
        f"{name}: cell {differs} of the notebook is not what was executed, so its outputs were not published; "
        "run the pipeline again with --publish and leave the notebooks alone meanwhile"
    )


def _portable(value: Any, root: Path, where: str) -> Any:
    """An output without this machine's paths; images in base64 hold none, though they may look so."""
    if isinstance(value, dict):
        for key, member in value.items():
            if not key.startswith("image/") or key == "image/svg+xml":
                value[key] = _portable(member, root, where)
        return value
    if isinstance(value, list):
        return [_portable(member, root, where) for member in value]
    if not isinstance(value, str):
        return value
    _refuse(value, Path(sys.prefix), where)  # before the next line: the environment may lie in the repository
    text = re.sub(re.escape(str(root)) + r"(?![\w.-])", ".", value.replace(f"{root}{os.sep}", ""))
    for private in (Path.home(), Path(tempfile.gettempdir())):
        _refuse(text, private, where)
    return text


def _refuse(text: str, private: Path, where: str) -> None:
    if private != Path(private.anchor) and f"{private}{os.sep}" in text:
        raise PublishError(
            f"{where}: an output names {str(private)!r}, a path of this machine, so nothing was published; "
            "remove the cause of the warning it stands in, or show the path relative to the repository"
        )
