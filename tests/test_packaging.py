"""pyproject.toml, requirements.lock and environment.yml say the same."""

import ast
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import blockvit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]
STUDY = [Requirement(text) for text in PROJECT["optional-dependencies"]["study"]]
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
@pytest.mark.parametrize("dependency", [*DEPENDENCIES, *STUDY, *TESTING], ids=lambda requirement: requirement.name)
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
    names = {canonicalize_name(requirement.name) for requirement in [*DEPENDENCIES, *STUDY, *TESTING]}
    assert names >= {"torch", "torchvision", "jupyterlab", "papermill", "seaborn", "pandas", "nbval"}


ALONE = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
from blockvit import *
from blockvit import kernels
if kernels.triton._no_triton() is None:
    import blockvit.kernels.triton.gradients, blockvit.kernels.triton.mlp
kernels.tuning.load("a GPU")
{snippet}
assert logits.shape == (1, 1000) and not {missing} & {{name.partition(".")[0] for name in sys.modules}}
"""


def installed_with(requirements):
    """Names of the distributions that are installed for ``requirements``."""
    found, left = set(), list(requirements)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            left += [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:  # for another platform, or left out of this installation
            continue
        found.add(name)
    return found


def test_the_library_runs_without_the_packages_of_the_study(tmp_path):
    """The README's example on a small model, in a process that finds no other package than the dependencies."""
    library = installed_with(DEPENDENCIES)
    providers = metadata.packages_distributions().items()
    missing = {
        module for module, names in providers if not {canonicalize_name(n) for n in names} & {*library, "blockvit"}
    }
    assert missing >= {"pandas", "matplotlib", "yaml", "papermill", "tqdm", "pytest"}
    snippet = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    small = "torchvision.models.VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=64, mlp_dim=128)"
    snippet = snippet.replace("torchvision.models.vit_b_16()", small).replace("224", "32")
    code = ALONE.format(missing=missing, snippet=snippet)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_names_every_module():
    layout = (ROOT / "README.md").read_text().partition("## Layout")[2]
    modules = {module.name for module in pkgutil.iter_modules([ROOT / "lib" / "blockvit"])}
    assert {name for name in re.findall(r"`(\w+)`", layout) if name != "TEST_BUDGET_S"} == modules


def test_conda_installs_this_project_held_to_the_lock():
    *conda, last = ENVIRONMENT["dependencies"]
    assert last == {"pip": ["--constraint requirements.lock", "--editable .[study,test]"]}
    assert "pip" in conda
    assert ENVIRONMENT["name"] == PROJECT["name"]
    assert "conda-forge" in ENVIRONMENT["channels"]


def test_conda_python_is_the_projects():
    (python,) = (Requirement(text) for text in ENVIRONMENT["dependencies"][:-1] if text.startswith("python"))
    required = SpecifierSet(PROJECT["requires-python"])
    releases = [f"3.{minor}" for minor in range(8, 20)]
    assert [r for r in releases if python.specifier.contains(r)] == [r for r in releases if required.contains(r)]


def test_what_the_package_exports():
    """Late, so the imports for type checkers and the table for everybody else must agree."""
    tree = ast.parse((ROOT / "lib/blockvit/__init__.py").read_text())
    late = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: statement.module for statement in late.body for alias in statement.names}
    assert typed.pop("kernels") is None
    assert typed == blockvit._HOME
    assert list(blockvit._EXPORTS) == sorted(blockvit._EXPORTS)
    for name in blockvit.__all__:
        value = getattr(blockvit, name)
        assert name in dir(blockvit) and value.__name__ == name
        assert value.__module__.startswith(f"blockvit.{typed[name]}")
    assert blockvit.kernels.registry and blockvit.supermask.METHODS
    with pytest.raises(AttributeError, match="module 'blockvit' has no attribute 'spasify'"):
        blockvit.spasify  # noqa: B018
    assert (ROOT / "lib/blockvit/py.typed").exists()
