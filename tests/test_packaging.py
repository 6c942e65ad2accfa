"""pyproject.toml, requirements.lock and environment.yml say the same."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]
TESTING = [Requirement(text) for text in PROJECT["optional-dependencies"]["test"]]
LOCK = (ROOT / "requirements.lock").read_text()
PINS = [Requirement(line) for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PYTHONS = ["3.11", "3.12", "3.13"]


def platform(python, system="linux", machine="x86_64"):
    full = f"{python}.9"
    return {
        "python_version": python,
        "python_full_version": full,
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": machine,
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def pinned(name, environment):
    """The versions that the lock installs of a package on a platform."""
    return [
        str(pin.specifier).removeprefix("==")
        for pin in PINS
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("dependency", [*DEPENDENCIES, *TESTING], ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_once_and_within_its_range(dependency, python):
    versions = pinned(dependency.name, platform(python))
    assert len(versions) == 1
    assert dependency.specifier.contains(versions[0])


def test_lock_holds_exact_versions_and_no_place_of_this_machine():
    assert PINS
    for pin in PINS:
        assert pin.url is None
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"{pin} is no exact pin"
        assert not Version(str(pin.specifier).removeprefix("==")).local, f"{pin} is a local build"
    assert not re.search(r"://|--|file:|(?<![\w.])/", LOCK)


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_takes_the_cuda_build_of_torch_on_linux_only(python):
    for name in ("triton", "nvidia-cublas", "nvidia-cudnn-cu13"):
        assert len(pinned(name, platform(python))) == 1
        assert pinned(name, platform(python, "darwin", "arm64")) == []


def test_lock_pairs_torch_with_the_torchvision_built_for_it():
    """Beside another torch, torchvision does not import; the pair moves together, here too."""
    (torch,), (torchvision,) = (pinned(name, platform("3.11")) for name in ("torch", "torchvision"))
    assert (Version(torch).release[:2], Version(torchvision).release[:2]) == ((2, 15), (0, 29))


def test_the_study_has_the_tools_it_is_described_with():
    names = {canonicalize_name(requirement.name) for requirement in [*DEPENDENCIES, *TESTING]}
    assert names >= {"torch", "torchvision", "jupyterlab", "papermill", "seaborn", "pandas", "nbval"}


def test_conda_installs_this_project_held_to_the_lock():
    *conda, last = ENVIRONMENT["dependencies"]
    assert last == {"pip": ["--constraint requirements.lock", "--editable .[test]"]}
    assert "pip" in conda
    assert ENVIRONMENT["name"] == PROJECT["name"]
    assert "conda-forge" in ENVIRONMENT["channels"]


def test_conda_python_is_the_projects():
    (python,) = (Requirement(text) for text in ENVIRONMENT["dependencies"][:-1] if text.startswith("python"))
    required = SpecifierSet(PROJECT["requires-python"])
    releases = [f"3.{minor}" for minor in range(8, 20)]
    assert [r for r in releases if python.specifier.contains(r)] == [r for r in releases if required.contains(r)]
