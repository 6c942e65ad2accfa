"""What to run: a profile's parameters for the notebooks, and those given on top of them, every name checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..notebook import Notebook
from .errors import UsageError

DEFAULT_PROFILE = "laptop"


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


def read_profile(folder: Path, name: str, notebooks: Sequence[Notebook]) -> Profile:
    """Read a profile and check every name in it.

    Raises:
        UsageError: there is no such profile, or it names a notebook or a parameter that does not exist.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UsageError(_unknown("profile", name, known))
    content = read_yaml((folder / f"{name}.yaml").read_text(encoding="utf-8"), f"profile {name}") or {}
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
    check_parameters(profile.shared, notebooks, f"profile {name}, all")
    for key, section in profile.own.items():
        check_parameters(section, [by_name[key]], f"profile {name}, {key}")
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


def check_parameters(given: Collection[str], notebooks: Sequence[Notebook], where: str) -> None:
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
    check_parameters(overrides, chosen, "the notebooks to run")
    steps = []
    for notebook in chosen:
        given = {**profile.shared, **profile.own.get(notebook.name, {}), **overrides, "profile": profile.name}
        values = {name: value for name, value in given.items() if name in notebook.defaults}
        with _as_usage_error():
            for name, value in values.items():
                notebook.check(name, value)
        steps.append((notebook, values))
    return steps


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-3`` is a number, as in Python; YAML 1.1 wants ``1.0e-3`` and takes the rest for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    """A value as YAML; ``where`` it stands is said if it is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
