"""The pipeline, on a study of two tiny notebooks."""

import base64
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("nbformat")  # a GPU machine that only runs the tests marked gpu may lack the notebooks' tools
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import blockvit
from blockvit import pipeline
from blockvit.notebook import COMPUTED, Notebook, PublishError, completed, published

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def write_notebook(root, name, parameters, *sources, title="A question?"):
    cells = [new_markdown_cell(f"# {title}\n\n![a dot](../dot.png) ![far](https://example.org/far.png)")]
    cells += [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) for source in sources]
    cells += [new_markdown_cell("## What it means\n\nSee [the next](02_second.ipynb).")]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def write_profile(root, name, text):
    (root / "notebooks" / "profiles" / f"{name}.yaml").write_text(text)


def make_study(root):
    (root / "notebooks" / "profiles").mkdir(parents=True)
    (root / "data" / "reference").mkdir(parents=True)
    (root / "dot.png").write_bytes(base64.b64decode(PNG))
    sections = "".join(
        f"<!-- {name}:begin -->\n{text}<!-- {name}:end -->\n"
        for name, text in (("speed", ""), ("claims", "old\n"), ("scale", ""))
    )
    (root / "README.md").write_text(f"# Study\n{sections}end\n")
    write_notebook(
        root,
        "01_first",
        'profile = "laptop"\nseeds = [0, 1]  # seeds = more\nrate = 0.5\ndata_root = ""',
        "from pathlib import Path\nPath('order.txt').open('a').write('first ')\nseeds, rate",
        "print(Path.cwd() / 'here')\nfor i in range(3): print(i, end='\\r')",
        title="First?",
    )
    write_notebook(
        root,
        "02_second",
        'profile = "laptop"\nremeasure = False\nrate = 0.1\nwait = 0',
        "import sys, time\nfrom pathlib import Path\nPath('order.txt').open('a').write('second ')\ntime.sleep(wait)",
        "rate, remeasure, profile",
        title="Second?",
    )
    write_profile(root, "laptop", "description: the default\n")
    write_profile(
        root, "big", "description: a big one\nnotebooks: [02_second]\nall: {rate: 1e-3}\n02_second: {wait: 2}\n"
    )
    write_profile(root, "gpu", "requires: cuda\n")
    return root


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "study")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of the default profile; tests read it and leave it as it is."""
    root = make_study(tmp_path_factory.mktemp("finished") / "study")
    output = io.StringIO()
    report = pipeline.reproduce(root=root, publish=True, output=output)
    return types.SimpleNamespace(root=root, report=report, output=output.getvalue())


def names(steps):
    return [notebook.name for notebook, _ in steps]


def planned(root, profile="laptop", **options):
    notebooks = pipeline.find_notebooks(root / "notebooks")
    chosen = pipeline.read_profile(root / "notebooks" / "profiles", profile, notebooks)
    return pipeline.plan(notebooks, chosen, **options)


def output_text(path):
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.get("text") or output["data"]["text/plain"] for output in outputs]


# planning


def test_profile_parameters_reach_the_notebooks_that_have_them(study):
    steps = planned(study, "big", only=["02_second", "01_first.ipynb"], overrides={"seeds": [3]})
    assert names(steps) == ["01_first", "02_second"]
    assert dict(steps[0][1]) == {"rate": 1e-3, "seeds": [3], "profile": "big"}
    assert dict(steps[1][1]) == {"rate": 1e-3, "wait": 2, "profile": "big"}


def test_profile_chooses_its_notebooks(study):
    assert names(planned(study, "big")) == ["02_second"]
    assert names(planned(study)) == ["01_first", "02_second"]


def test_a_published_checkpoint_runs_only_the_notebooks_that_take_one(study, monkeypatch):
    """Nothing is trained for it; what --only names is run all the same, if it takes one."""
    write_notebook(
        study, "03_third", 'profile = "laptop"\ncheckpoint = None\ndata_root = None', "1", "2", title="Third?"
    )
    ran = {}
    monkeypatch.setattr(pipeline.run, "execute", lambda notebook, values, *_, **__: ran.update({notebook.name: values}))
    monkeypatch.chdir(study)
    pipeline.reproduce(root=study, checkpoint="sp0.80-ts32.pth", data="images", output=io.StringIO())
    paths = {"checkpoint": str(study / "sp0.80-ts32.pth"), "data_root": str(study / "images")}
    assert ran == {"03_third": {**paths, "profile": "laptop"}}
    with pytest.raises(pipeline.UsageError, match="unknown parameter 'checkpoint'"):
        pipeline.reproduce(root=study, checkpoint="sp0.80-ts32.pth", only=["01_first"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "lapotp"}, "unknown profile 'lapotp'; did you mean 'laptop'"),
        ({"only": ["02_secund"]}, "unknown notebook '02_secund'; did you mean '02_second'"),
        ({"parameters": {"sedes": [1]}}, "unknown parameter 'sedes'; did you mean 'seeds'"),
        ({"only": ["02_second"], "parameters": {"seeds": [1]}}, "unknown parameter 'seeds'"),
        ({"only": ["02_second"], "data": "/data"}, "unknown parameter 'data_root'"),
        ({"checkpoint": "sp0.80-ts32.pth"}, "unknown parameter 'checkpoint'"),
        ({"only": ["01_first"], "remeasure": True}, "unknown parameter 'remeasure'"),
        ({"parameters": {"profile": "big"}}, "choose it with --profile"),
        ({"parameters": {"seeds": 3}}, r"01_first: parameter 'seeds' is given 3, expected a list .*\[0, 1\]"),
        ({"parameters": {"seeds": ["a"]}}, "expected a list, each member a number"),
        ({"parameters": {"remeasure": 1}}, "expected true or false"),
        ({"parameters": {"rate": "fast"}}, "expected a number"),
        ({"publish": True, "only": ["01_first"]}, "all 2 notebooks"),
        ({"publish": True, "profile": "big"}, "takes the profile laptop"),
        ({"publish": True, "parameters": {"rate": 2}}, "01_first is given rate=2"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(study, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.reproduce(root=study, **options)
    assert not (study / "build").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("al: {rate: 1}", "unknown key 'al'; did you mean 'all'"),
        ("all: {rte: 1}", "all: unknown parameter 'rte'; did you mean 'rate'"),
        ("01_first: {wait: 1}", "01_first: unknown parameter 'wait'"),
        ("01_first: 3", "01_first is 3, expected a mapping"),
        ("notebooks: [01_frist]", "did you mean '01_first'"),
        ("requires: cdua", "did you mean 'cuda'"),
        ("test: gpu", "unknown key 'test'; did you mean 'tests'"),
        ("tests: gpu; true", "tests is 'gpu; true', expected pytest markers"),
        ("tests: [gpu, slow]", "expected pytest markers, e.g. gpu and not slow"),
        ("all: [", "is no YAML"),
        ("- 1", "expected a mapping"),
    ],
)
def test_wrong_profile_is_refused(study, text, message):
    write_profile(study, "wrong", text)
    with pytest.raises(ValueError, match=message):
        planned(study, "wrong")


def test_values_that_may_fit_are_accepted(study):
    write_notebook(study, "03_third", "nothing = None\ncount: int = 3\ncomputed = 2 * count\npair = (1, 2)")
    notebook = Notebook.read(study / "notebooks" / "03_third.ipynb")
    assert notebook.defaults == {"nothing": None, "count": 3, "computed": COMPUTED, "pair": (1, 2)}
    for name, value in {"nothing": "x", "count": 0.5, "computed": "x", "pair": [3]}.items():
        notebook.check(name, value)


def test_command_line_answers_in_one_line(study, monkeypatch, capsys):
    monkeypatch.setenv("BLOCKVIT_HOME", str(study))
    assert pipeline.main(["-p", "sedes=[1]"]) == 2
    assert pipeline.main(["-p", "seeds"]) == 2
    assert pipeline.main(["-p", "rate=1e-3", "--profile", "nowhere"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def test_values_on_the_command_line_are_yaml():
    given = ["a=1e-3", "b=[1, x]", "c=true", "d=a=b", "e="]
    assert pipeline.command._parse_parameters(given) == {"a": 1e-3, "b": [1, "x"], "c": True, "d": "a=b", "e": None}


def test_missing_cuda_stops_at_once(study, monkeypatch, capsys):
    monkeypatch.setenv("BLOCKVIT_HOME", str(study))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pipeline.main(["--profile", "gpu"]) == 3
    assert "profile gpu requires a CUDA device" in capsys.readouterr().err
    assert not (study / "build").exists()


def test_import_leaves_torch_alone():
    """The pipeline itself; what the library imports at its top is not its to say."""
    source = Path(importlib.util.find_spec("blockvit.pipeline").origin)
    code = f"""
import importlib, sys, types
package = types.ModuleType("blockvit"); package.__path__ = [{str(source.parents[1])!r}]
sys.modules["blockvit"] = package
importlib.import_module("blockvit.pipeline")
print(sorted({{"torch", "pandas", "papermill", "nbconvert"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# running


def test_notebooks_run_in_order_in_their_folder(finished):
    assert (finished.root / "notebooks" / "order.txt").read_text() == "first second "


def test_progress_is_plain_lines_where_there_is_no_terminal(finished):
    assert "\r" not in finished.output and "\x1b" not in finished.output
    assert re.search(r"^\[2/2\] 02_second  cell 5/5  \d+:\d\d  done$", finished.output, re.MULTILINE)
    assert finished.output.endswith(f"report: {finished.report}\n")


def test_report_is_of_the_profile_and_all_its_notebooks(finished):
    html = finished.report.read_text()
    assert finished.report == finished.root / "build" / "laptop" / "report.html"
    assert "<title>BlockViT · laptop · " in html and "the default" in html
    assert PNG in html and "First?" in html and "Second?" in html


def test_published_notebooks_hold_outputs_and_nothing_of_the_run(finished):
    path = finished.root / "notebooks" / "01_first.ipynb"
    text = path.read_text()
    for trace in ("papermill", "injected-parameters", '"execution"', str(finished.root), str(Path.home())):
        assert trace not in text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3]
    assert cells[1]["outputs"][0]["execution_count"] == 2
    assert output_text(path) == ["([0, 1], 0.5)", f"{Path('notebooks') / 'here'}\n2\r"]
    original = make_study(finished.root.parent / "again") / "notebooks" / "01_first.ipynb"
    sources = [[(c["id"], c["source"]) for c in json.loads(p.read_text())["cells"]] for p in (path, original)]
    assert sources[0] == sources[1]
    assert text == published(path, finished.root / "build" / "laptop" / "01_first.ipynb", finished.root)


def test_what_is_drawn_from_the_tables_for_a_device_may_be_published(study):
    write_notebook(study, "03_third", "draw_for = None")
    output = io.StringIO()
    report = pipeline.reproduce(root=study, publish=True, parameters={"draw_for": "Some CPU"}, output=output)
    assert "Some CPU" in report.read_text()
    third = nbformat.read(study / "notebooks" / "03_third.ipynb", as_version=4)
    assert [cell.execution_count for cell in third.cells if cell.cell_type == "code"] == [1]


def test_publishing_refuses_changed_sources(finished, tmp_path):
    changed = tmp_path / "01_first.ipynb"
    executed = finished.root / "build" / "laptop" / "01_first.ipynb"
    changed.write_text((finished.root / "notebooks" / "01_first.ipynb").read_text().replace("seeds, rate", "rate"))
    with pytest.raises(PublishError, match="01_first: cell 3 of the notebook is not what was executed"):
        published(changed, executed, finished.root)


def test_publishing_refuses_paths_of_the_machine(finished, tmp_path):
    executed = tmp_path / "01_first.ipynb"
    text = (finished.root / "build" / "laptop" / "01_first.ipynb").read_text()
    executed.write_text(text.replace(str(finished.root), str(Path(sys.prefix) / "lib")))
    with pytest.raises(PublishError, match="01_first, cell 4: an output names"):
        published(finished.root / "notebooks" / "01_first.ipynb", executed, finished.root)


def test_a_folder_beside_the_repository_is_not_in_it(finished, tmp_path):
    root, executed = finished.root, tmp_path / "01_first.ipynb"
    text = (root / "build" / "laptop" / "01_first.ipynb").read_text()
    executed.write_text(text.replace("([0, 1], 0.5)", f"{root}/y in {root}:"))
    assert "y in .:" in published(root / "notebooks" / "01_first.ipynb", executed, root)
    executed.write_text(text.replace("([0, 1], 0.5)", f"{root}-old/x"))
    with pytest.raises(PublishError, match="a path of this machine"):
        published(root / "notebooks" / "01_first.ipynb", executed, root)


def test_a_copy_that_is_no_notebook_is_not_complete(tmp_path):
    (tmp_path / "x.ipynb").write_text("[1, 2]")
    assert not completed(tmp_path / "x.ipynb")


# tests before the notebooks

MARKED = """
import os
import pytest

@pytest.mark.gpu
def test_computes():
    open("tested.txt", "a").write("gpu ")
    assert os.environ["BLOCKVIT_HOME"] == os.getcwd()

@pytest.mark.slow
def test_takes_long():
    open("tested.txt", "a").write("slow ")

def test_other():
    open("tested.txt", "a").write("other ")
"""


@pytest.fixture
def executed(monkeypatch):
    """The names of the notebooks that a run came to, in place of running them."""
    names = []
    monkeypatch.setattr(pipeline.run, "execute", lambda notebook, *_, **__: names.append(notebook.name))
    return names


@pytest.fixture
def checked(study, monkeypatch, executed):
    """A study whose profile names tests, none of which is there yet."""
    write_profile(study, "checked", "tests: gpu\nnotebooks: [02_second]\n")
    (study / "tests").mkdir()
    monkeypatch.setenv("BLOCKVIT_HOME", str(study))
    return study


def write_tests(root, text):
    (root / "tests" / "test_study.py").write_text(text)


def test_profiles_tests_run_before_its_notebooks(checked, executed, monkeypatch):
    write_tests(checked, MARKED)
    monkeypatch.setenv("FORCE_COLOR", "1")  # continuous integration sets it; the line is to be read all the same
    output = io.StringIO()
    pipeline.reproduce("checked", root=checked, output=output)
    lines = output.getvalue().splitlines()
    assert lines[0] == "[tests] gpu  0:00"
    done = next(line for line in lines if "done" in line)
    assert re.fullmatch(r"\[tests\] gpu  \d+:\d\d  done  1 passed, 2 deselected.* in [\d.]+s.*", done)
    assert lines[lines.index(done) + 1].startswith("[1/1] 02_second  cell 0/")
    assert (checked / "tested.txt").read_text() == "gpu " and executed == ["02_second"]
    assert "1 passed" in (checked / "build" / "checked" / "tests.log").read_text()


def test_progress_of_tests_is_one_living_line_on_a_terminal(checked):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    write_tests(checked, MARKED)
    pipeline.run_tests("gpu", checked, checked / "tests.log", output := Terminal())
    assert output.getvalue().startswith("\r\x1b[2K[tests] gpu  0:00\r\x1b[2K[tests] gpu  ")
    assert output.getvalue().count("\n") == 1 and output.getvalue().endswith("\n")


def test_a_profile_may_combine_markers(checked, executed):
    write_profile(checked, "checked", "tests: gpu or slow\nnotebooks: [02_second]\n")
    write_tests(checked, MARKED)
    pipeline.reproduce("checked", root=checked, output=(output := io.StringIO()))
    assert (checked / "tested.txt").read_text() == "gpu slow "
    assert "[tests] gpu or slow  0:" in output.getvalue() and executed == ["02_second"]


FAILING = f"{MARKED}\n@pytest.mark.gpu\ndef test_fails():\n    assert 1 == 2, 'far off'\n"
SKIPPED = "import pytest\n@pytest.mark.gpu\n@pytest.mark.skip(reason='no device')\ndef test_computes(): pass\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FAILING, r"the tests marked gpu did not pass \(1 failed, 1 passed, 2 deselected.*\), so no notebook was run"),
        ("import nowhere", r"the tests marked gpu did not pass \(1 error.*\)"),
        ("def test_other(): pass", r"no test marked gpu was run \(1 deselected.*\)"),
        (SKIPPED, r"no test marked gpu was run \(1 skipped.*\)"),
    ],
    ids=["failed", "broken", "none", "skipped"],
)
def test_tests_that_do_not_pass_stop_the_run(checked, executed, capsys, text, message):
    write_tests(checked, text)
    assert pipeline.main(["--profile", "checked"]) == 1
    out, err = capsys.readouterr()
    log = checked / "build" / "checked" / "tests.log"
    assert re.match(f"error: {message}", err) and len(err.splitlines()) == 1 and str(log) in err
    assert log.exists() and "  stopped  1 " in out
    assert executed == [] and not (checked / "build" / "checked" / "report.html").exists()
    assert pipeline.main(["--profile", "checked", "--no-tests"]) == 0
    assert executed == ["02_second"] and "[tests]" not in capsys.readouterr().out


def test_missing_pytest_is_told_before_anything_runs(checked, executed, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "pytest" else name)
    assert pipeline.main(["--profile", "checked"]) == 2
    err = capsys.readouterr().err
    assert "pytest is not installed; run make install, or leave them out with --no-tests" in err
    assert len(err.splitlines()) == 1 and executed == [] and not (checked / "build").exists()
    assert pipeline.main(["--profile", "checked", "--no-tests"]) == 0


def test_missing_cuda_is_told_before_the_tests(checked, executed, monkeypatch, capsys):
    write_profile(checked, "gpu", "requires: cuda\ntests: gpu\n")
    write_tests(checked, MARKED)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)  # nor is the lack of pytest what to tell first
    assert pipeline.main(["--profile", "gpu"]) == 3
    out, err = capsys.readouterr()
    assert err.startswith("error: profile gpu requires a CUDA device") and len(err.splitlines()) == 1 and out == ""
    assert executed == [] and not (checked / "tested.txt").exists() and not (checked / "build").exists()


def test_no_tests_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        pipeline.main(["--help"])
    assert "--no-tests" in capsys.readouterr().out


def test_failure_names_the_cell_keeps_outputs_and_stops(study, monkeypatch, capsys):
    write_notebook(study, "02_second", "rate = 1", "1 + 1", "\n\nrows = []\nrows[rate]")
    write_notebook(study, "03_third", "rate = 1", "open('third.txt', 'w')")
    monkeypatch.setenv("BLOCKVIT_HOME", str(study))
    assert pipeline.main(["--only", "02_second", "03_third", "-p", "rate=7"]) == 1
    message = capsys.readouterr().err
    partial = study / "build" / "laptop" / "02_second.ipynb"
    assert "02_second stopped at cell 4 of 5, which begins `rows = []`" in message
    assert "IndexError: list index out of range" in message and str(partial) in message
    cells = [cell for cell in nbformat.read(partial, as_version=4).cells if cell.cell_type == "code"]
    assert cells[1].source.endswith("rate = 7\n") and cells[2].outputs[0]["data"]["text/plain"] == "2"
    assert not (study / "notebooks" / "third.txt").exists()
    assert not (study / "build" / "laptop" / "report.html").exists()


def test_dead_kernel_is_a_failure_with_a_name(study):
    write_notebook(study, "01_first", "x = 1", "import os\nos._exit(9)")
    with pytest.raises(pipeline.NotebookError, match="01_first stopped at cell 3 of 4"):
        pipeline.reproduce(root=study, only=["01_first"], output=io.StringIO())


def start(root, *arguments):
    """A run in a process of its own, from a folder and a PATH that know nothing of the interpreter."""
    paths = os.pathsep.join([str(Path(blockvit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "BLOCKVIT_HOME": str(root), "PYTHONPATH": paths, "PATH": "/nonexistent"}
    command = [sys.executable, "-m", "blockvit.pipeline", *arguments]
    return subprocess.Popen(
        command, env=environment, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_interleaved_runs(study):
    write_notebook(study, "02_second", "profile = ''\nwait = 0", "import time\ntime.sleep(wait)", "profile")
    write_profile(study, "big", "notebooks: [02_second]\n02_second: {wait: 2}\n")
    slow, other = start(study, "--profile", "big"), start(study, "--only", "02_second")
    copy = study / "build" / "big" / "02_second.ipynb"
    deadline = time.monotonic() + 600
    while not copy.exists() and slow.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(pipeline.BusyError, match=f"profile big is being run already .process {slow.pid},"):
        pipeline.reproduce("big", root=study, output=io.StringIO())
    for process, profile in ((slow, "big"), (other, "laptop")):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors  # a kernel that ends may leave words of its own on the shared stderr
        assert output_text(study / "build" / profile / "02_second.ipynb") == [repr(profile)]
        assert (study / "build" / profile / "report.html").exists()


# README


def test_readme_is_refreshed_after_the_claims(study, monkeypatch):
    write_notebook(study, "06_claims", "results_dir = ''")
    monkeypatch.setattr(pipeline.run, "execute", lambda *_, **__: None)
    claims = types.SimpleNamespace(readme=lambda store: f"| from {store.root.relative_to(study)} |")
    monkeypatch.setitem(sys.modules, "blockvit.claims", claims)
    monkeypatch.setattr(blockvit, "claims", claims, raising=False)
    monkeypatch.setenv("BLOCKVIT_RESULTS", str(study / "tables"))
    pipeline.reproduce(root=study, only=["01_first"], output=io.StringIO())
    pipeline.reproduce(root=study, readme=False, output=io.StringIO())
    assert "old" in (study / "README.md").read_text()
    pipeline.reproduce(root=study, output=io.StringIO())
    expected = "# Study\n<!-- speed:begin -->\nNo speed of a whole ViT-B/16 is in the tables yet.\n<!-- speed:end -->\n"
    expected += "<!-- claims:begin -->\n| from tables |\n<!-- claims:end -->\n"
    expected += "<!-- scale:begin -->\nNo GPU has measured "
    assert (study / "README.md").read_text().startswith(expected)
    pipeline.reproduce(root=study, parameters={"results_dir": "../others"}, output=io.StringIO())
    assert "| from others |" in (study / "README.md").read_text()


def test_missing_claims_marker_is_told_before_the_run(study):
    write_notebook(study, "06_claims", "x = 1")
    (study / "README.md").write_text("# Study\n")
    with pytest.raises(ValueError, match="'<!-- speed:begin -->' 0 times, expected once"):
        pipeline.reproduce(root=study)
    assert not (study / "build").exists()


def test_readme_sections_are_replaced_between_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- a:begin -->\n1\n<!-- a:end -->\n<!-- b:begin --><!-- b:end -->\n")
    readme.chmod(0o640)
    pipeline.refresh_readme(readme, {"a": "new\n", "b": "more"})
    wanted = "<!-- a:begin -->\nnew\n<!-- a:end -->\n<!-- b:begin -->\nmore\n<!-- b:end -->\n"
    assert readme.read_text() == wanted and readme.stat().st_mode & 0o777 == 0o640
    pipeline.refresh_readme(readme, {"a": "new\n"})
    assert readme.read_text() == wanted
    assert list(tmp_path.iterdir()) == [readme]


@pytest.mark.parametrize("text", ["", "<!-- a:begin -->", "<!-- a:end --><!-- a:begin -->", "<!-- a:begin -->" * 2])
def test_readme_without_its_markers_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md holds"):
        pipeline.refresh_readme(readme, {"a": "new"})
    assert readme.read_text() == text
