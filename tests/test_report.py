"""The report, of two small notebooks as papermill leaves them."""

import base64
import re

import pytest

pytest.importorskip("nbformat")  # a GPU machine that only runs the tests marked gpu may lack the notebooks' tools
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from blockvit import report

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
RUN = {"end_time": "2026-01-02T03:04:05", "duration": 6.7}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    (root / "dot.png").write_bytes(base64.b64decode(PNG))
    drawn = new_output("display_data", {"image/png": PNG, "text/html": "<b>bold</b><script>alert(1)</script>"})
    copies = []
    for name, question in (("01_first", "First?"), ("02_second", "Second & last?")):
        cells = [
            new_markdown_cell(f"# {question}\n\n![a dot](../dot.png) ![far](https://example.org/far.png)"),
            new_code_cell("seeds = [3]", metadata={"tags": ["injected-parameters"]}),
            new_code_cell("seeds, 0.5", outputs=[drawn]),
            new_markdown_cell("## What it means\n\nSee [the next](02_second.ipynb) and [this](#What-it-means)."),
        ]
        copies.append(root / "build" / f"{name}.ipynb")
        copies[-1].parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=cells, metadata={"papermill": RUN}), copies[-1])
    path = report.write(root / "build" / "report.html", copies, title="A & B", description="of a <test>", root=root)
    assert path == root / "build" / "report.html"
    return path.read_text()


def test_is_one_file_that_fetches_nothing(page):
    references = re.findall(r"""(?:\bsrc|<link[^>]*\bhref|\bdata|poster|srcset)\s*=\s*["']?([^"'\s>]+)""", page)
    assert references and all(reference.startswith("data:") for reference in references)
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!['\"]?data:)", page)
    assert "default-src 'none'" in page
    assert PNG in page and "[image not embedded: https://example.org/far.png]" in page and "<b>bold</b>" in page


def test_has_contents_and_folded_code(page):
    anchors = re.findall(r'<a href="#([^"]+)"', page)
    assert [a for a in anchors if a in ("01_first", "02_second")] == ["01_first", "02_second", "02_second", "02_second"]
    assert all(f'id="{anchor}"' in page for anchor in anchors)
    assert page.count('">What it means</a>') == 2 and "Second &amp; last?</a>" in page
    assert page.count('<details class="code"><summary>code</summary>') == 2
    assert page.count('<details class="code"><summary>parameters of this run</summary>') == 2


def test_says_what_it_is_and_whence(page):
    assert "<title>A &amp; B</title>" in page and "of a &lt;test&gt;" in page
    assert page.count("_first.ipynb, run at 2026-01-02 03:04 UTC in 7 s") == 1
