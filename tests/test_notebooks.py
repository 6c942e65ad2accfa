"""The notebooks as files: their form, and the README's snippets. That they run is tested by nbval."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from blockvit import pipeline, results

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROFILES = sorted(path.stem for path in (FOLDER / "profiles").glob("*.yaml"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str | None = None) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if kind in (None, cell.cell_type)]


def output_texts(path: Path) -> list[str]:
    texts = []
    for cell in cells(path, "code"):
        for output in cell.outputs:
            texts += [output.get("text", ""), *(str(v) for k, v in output.get("data", {}).items() if "image" not in k)]
    return texts


def test_the_six_notebooks_are_there():
    wanted = ["01_train", "02_fold", "03_microbenchmarks", "04_vit_speedup", "05_accuracy", "06_claims"]
    assert [path.stem for path in NOTEBOOKS][:6] == wanted
    assert set(PROFILES) >= {"laptop", "gpu", "cifar10", "imagenet"}


@each_notebook
def test_one_parameters_cell_with_what_every_notebook_has(path):
    tagged = [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
    given: dict = {}
    exec(tagged[0].source, given)
    assert (given["profile"], given["device"], given["results_dir"]) == ("laptop", "cpu", None)
    # What trains needs its device; what only measures can be drawn from committed tables.
    trains = path.stem in ("01_train", "02_fold")
    assert ("draw_for" in given) != trains and given.get("draw_for") is None


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_name_only_what_exists(profile):
    notebooks = pipeline.find_notebooks(FOLDER)
    found = pipeline.read_profile(FOLDER / "profiles", profile, notebooks)
    assert found.description
    assert set(found.notebooks) <= {notebook.name for notebook in notebooks}


@each_notebook
def test_the_title_is_a_question_and_the_end_a_computed_answer(path):
    first, *_, heading, answer = cells(path)
    assert first.cell_type == "markdown"
    assert re.match(r"# \d+\. .+\?$", first.source.splitlines()[0])
    assert heading.cell_type == "markdown" and heading.source.strip() == "## Answer"
    assert answer.cell_type == "code"
    assert re.search(r"display\(\s*Markdown\(\s*(f\"|text)", answer.source), "its numbers are computed"
    titles = [line for cell in cells(path, "markdown") for line in cell.source.splitlines() if line.startswith("# ")]
    assert len(titles) == 1


@each_notebook
def test_committed_outputs_hold_no_error_and_no_path_of_a_machine(path):
    assert not [o for cell in cells(path, "code") for o in cell.outputs if o.output_type == "error"]
    private = re.compile(r"(?<![\w./:-])/(home|root|Users|tmp|work|mnt|var|opt|usr|private)/\S+")
    for text in [*output_texts(path), *(cell.source for cell in cells(path))]:
        assert not private.search(text), private.search(text)[0]


@each_notebook
def test_markdown_is_plain(path):
    """TeX would be fetched from afar to be shown: the report is one file."""
    assert not [cell.source for cell in cells(path, "markdown") if "$" in cell.source]


@each_notebook
def test_code_compiles(path):
    for number, cell in enumerate(cells(path)):
        if cell.cell_type == "code":
            compile(cell.source, f"{path.name}[{number}]", "exec")


def test_readme_snippets_run(tmp_path, monkeypatch):
    """On one's own model, as the README shows it: in one namespace, in order, in an empty folder."""
    snippets = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    if not snippets:
        pytest.skip("README.md has no python block")
    home = results.repository()
    monkeypatch.chdir(tmp_path)
    for name in ("RESULTS", "FIGURES", "CACHE"):
        monkeypatch.setenv(f"BLOCKVIT_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("BLOCKVIT_HOME", str(home))
    namespace: dict = {"__name__": "__readme__"}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number + 1}", "exec"), namespace)
    assert Path.cwd() == tmp_path
