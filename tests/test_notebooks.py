"""The notebooks as files: their form, and the README's snippets. That they run is tested by nbval."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("nbformat")  # a GPU machine that only runs the tests marked gpu may lack the notebooks' tools
import nbformat
import synthetic_gpu
import torchvision

from blockvit import checkout, files, notebook, pipeline, results

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
    assert "draw_for" in given and given["draw_for"] is None, "every notebook can be drawn from committed tables"


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_name_only_what_exists(profile):
    notebooks = pipeline.find_notebooks(FOLDER)
    found = pipeline.read_profile(FOLDER / "profiles", profile, notebooks)
    assert found.description
    assert set(found.notebooks) <= {notebook.name for notebook in notebooks}
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = set(re.findall(r"\w+", found.tests)) - {"and", "or", "not"}
    assert markers <= {marker.split(":")[0] for marker in settings["markers"]}
    sources = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    assert all(f"@pytest.mark.{marker}\n" in sources for marker in markers)


def test_the_gpu_profile_tests_its_kernels_before_it_times_them():
    found = pipeline.read_profile(FOLDER / "profiles", "gpu", pipeline.find_notebooks(FOLDER))
    assert (found.requires, found.tests) == (("cuda",), "gpu and not slow")


@each_notebook
def test_the_title_is_a_question_and_the_end_a_computed_answer(path):
    first, *_, heading, answer = cells(path)
    assert first.cell_type == "markdown"
    assert re.match(r"# \d+\. .+\?$", first.source.splitlines()[0])
    assert heading.cell_type == "markdown" and heading.source.strip() == "## Answer"
    assert answer.cell_type == "code"
    assert re.search(r"display\(\s*Markdown\(\s*(f\"|text|\"\\n\"\.join)", answer.source), "its numbers are computed"
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


@pytest.mark.parametrize("name", ["03_microbenchmarks", "04_vit_speedup", "06_claims", "08_kernels"])
def test_the_gpu_profile_is_drawn_from_a_table_without_a_gpu(name, tmp_path, gpu_table):
    """Every figure and sentence of ``PROFILE=gpu``, from made-up rows: nothing is measured, no device is needed."""
    notebooks = pipeline.find_notebooks(FOLDER)
    profile = pipeline.read_profile(FOLDER / "profiles", "gpu", notebooks)
    overrides = {"results_dir": str(gpu_table), "draw_for": synthetic_gpu.DEVICE}
    if name == "03_microbenchmarks":
        overrides["precisions"] = ["fp32", "bf16"]  # a third class draws the same once more
    ((chosen, values),) = pipeline.plan(notebooks, profile, only=[name], overrides=overrides)
    environment = {"BLOCKVIT_HOME": str(REPOSITORY), "BLOCKVIT_FIGURES": str(tmp_path / "figures")}
    notebook.execute(chosen, values, tmp_path / f"{name}.ipynb", environment=environment)
    drawn = {path.stem for path in (tmp_path / "figures" / "gpu").glob("*")}
    assert drawn >= GPU_FIGURES[name]
    text = "\n".join(output_texts(tmp_path / f"{name}.ipynb"))
    assert "bf16" in text and "not measured in this profile" not in text


@pytest.fixture(scope="module")
def gpu_table(tmp_path_factory):
    return synthetic_gpu.fill(results.Store(tmp_path_factory.mktemp("results"))).root


GPU_FIGURES = {
    "03_microbenchmarks": {
        f"linear_{what}_{precision}"
        for what in ("speedup", "contenders", "large", "throughput")
        for precision in ("fp32", "bf16")
    }
    | {f"linear_heatmap_{precision}_{b}" for precision in ("fp32", "bf16") for b in ("torch", "triton")},
    "04_vit_speedup": {
        f"vit_{what}_{precision}"
        for what in ("speedup", "batch_sizes", "modes", "memory")
        for precision in ("fp32", "bf16")
    }
    | {"vit_speedup_fp32_like_for_like", "vit_speedup_bf16_like_for_like"},
    "06_claims": {"claims"},
    "08_kernels": {"kernel_traffic"}
    | {f"kernel_mlp_{files.slug(synthetic_gpu.DEVICE)}_{tokens}" for tokens in (50432, 197)}
    | {f"kernel_roofline_{files.slug(synthetic_gpu.DEVICE)}_{precision}" for precision in ("fp32", "bf16", "tf32")},
}


def test_training_shows_masks_of_a_seed_that_it_trained(tmp_path):
    """Of another it would train the model again, only to look at its masks."""
    notebooks = pipeline.find_notebooks(FOLDER)
    small = {"block_sizes": [8], "sparsities": [0.8], "seeds": [3], "recipe": {"epochs": 2}, "step_batch_sizes": [8]}
    overrides = {**small, "step_model": "16x16", "step_block_sizes": [8], "workers": 1}
    profile = pipeline.read_profile(FOLDER / "profiles", "laptop", notebooks)
    ((chosen, values),) = pipeline.plan(notebooks, profile, only=["01_train"], overrides=overrides)
    environment = {f"BLOCKVIT_{name}": str(tmp_path / name.lower()) for name in ("RESULTS", "FIGURES", "CACHE")}
    notebook.execute(chosen, values, tmp_path / "01_train.ipynb", environment=environment)
    assert (tmp_path / "figures" / "laptop" / "block_masks.png").is_file()
    trained = [path.name for path in (tmp_path / "cache" / "checkpoints").rglob("*.pt")]
    assert len(trained) == 2 and all("-seed3-" in name for name in trained)


def test_readme_snippets_run(tmp_path, monkeypatch):
    """On one's own model, as the README shows it: in one namespace, in order, in an empty folder."""
    snippets = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert snippets, "README.md has no python block"
    home = checkout.root()
    monkeypatch.chdir(tmp_path)
    for name in ("RESULTS", "FIGURES", "CACHE"):
        monkeypatch.setenv(f"BLOCKVIT_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("BLOCKVIT_HOME", str(home))
    # Weights that are named are drawn, not fetched.
    drawn = torchvision.models.vit_b_16().state_dict()
    monkeypatch.setattr(torchvision.models.ViT_B_16_Weights, "get_state_dict", lambda self, **how: drawn)
    namespace: dict = {"__name__": "__readme__"}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number + 1}", "exec"), namespace)
    assert Path.cwd() == tmp_path
