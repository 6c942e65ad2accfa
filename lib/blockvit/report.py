"""The report of a run: executed notebooks as one HTML page that stands alone.

It holds no script, and its policy forbids any fetch.

nbconvert and its like take a second or more to import: they are imported where they are used.
"""

from __future__ import annotations

import base64
import html
import json
import mimetypes
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from . import files
from .notebook import quiet

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

_STYLE = """
body { margin: 0; color: #1b1f24; background: #fff; font: 16px/1.55 system-ui, sans-serif; }
body { display: grid; grid-template-columns: 17rem minmax(0, 60rem); column-gap: 3rem; }
nav { position: sticky; top: 0; height: 100vh; overflow: auto; padding: 1.5rem 1rem; box-sizing: border-box;
      border-right: 1px solid #d8dee4; font-size: .875rem; line-height: 1.35; }
nav ul { list-style: none; margin: 0; padding-left: .9rem; } nav > ul { padding-left: 0; }
nav li { margin: .35rem 0; } nav > ul > li { margin-top: .9rem; font-weight: 600; } nav ul ul { font-weight: 400; }
a { color: #0b5cad; text-decoration: none; } a:hover { text-decoration: underline; }
main { padding: 1.5rem 1.5rem 6rem 0; } section { border-top: 1px solid #d8dee4; margin-top: 3rem; }
h1, h2, h3 { line-height: 1.25; } h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; } h3 { font-size: 1.1rem; }
.text_cell, .output_wrapper { margin: .8rem 0; } .text_cell, .output_markdown :is(p, ul) { max-width: 46rem; }
.meta { color: #59636e; }
img, svg { max-width: 100%; height: auto; } .output_area { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; } th, td { padding: .25rem .7rem; text-align: right; }
th { border-bottom: 2px solid #d8dee4; } td { border-bottom: 1px solid #eaeef2; font-variant-numeric: tabular-nums; }
.text_cell th, .text_cell td, .output_markdown th, .output_markdown td { text-align: left; vertical-align: top; }
pre, code { font: .8125rem/1.45 ui-monospace, monospace; } pre { overflow-x: auto; margin: .3rem 0; }
.output_stderr pre { color: #6b4b00; } .output_error pre { background: #fff0ee; padding: .6rem; }
details.code { font-size: .8125rem; color: #59636e; } details.code summary { cursor: pointer; }
details.code pre { background: #f6f8fa; padding: .6rem .8rem; }
@media (max-width: 60rem) { body { display: block; } nav { position: static; height: auto; border: 0; }
                            main { padding: 0 1rem 3rem; } }
@media print { body { display: block; } nav { position: static; height: auto; } details.code { display: none; } }
"""


def write(path: Path, copies: Sequence[Path], *, title: str, description: str, root: Path) -> Path:
    """Write executed notebooks as one HTML page, and return its path.

    Args:
        path: where the page goes.
        copies: executed notebooks, in the report's order.
        title: of the page.
        description: a line below it.
        root: the repository: where pictures that are embedded lie, and, in ``notebooks``, where relative links start.
    """
    from pygments.formatters import HtmlFormatter

    parts = sections(copies, root / "notebooks", root)
    toc, body = [], []
    for part, copy in zip(parts, copies, strict=True):
        own = part.headings[0][2] if part.headings else part.name
        inner = "".join(f'<li><a href="#{i}">{html.escape(text)}</a></li>' for _, i, text in part.headings[1:])
        toc.append(f'<li><a href="#{part.name}">{html.escape(own)}</a><ul>{inner}</ul></li>')
        body.append(f'<section id="{part.name}"><p class="meta">{_origin(copy)}</p>{part.html}</section>')
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}{HtmlFormatter().get_style_defs(".highlight")}</style>
</head>
<body>
<nav><ul>{"".join(toc)}</ul></nav>
<main><h1>{html.escape(title)}</h1><p class="meta">{html.escape(description)}</p>{"".join(body)}</main>
</body>
</html>
"""
    files.write(path, page)
    return path


def _origin(copy: Path) -> str:
    run = json.loads(copy.read_text(encoding="utf-8"))["metadata"]["papermill"]
    return f"{copy.name}, run at {run['end_time'][:16].replace('T', ' ')} UTC in {run['duration']:.0f} s"


@dataclass(frozen=True)
class Section:
    """An executed notebook as a part of the report: its HTML, and its headings as (level, id, text)."""

    name: str
    html: str
    headings: list[tuple[int, str, str]]


_CELLS = """
{%- extends 'classic/base.html.j2' -%}
{%- block input_group -%}
{%- if cell.source.strip() -%}
{%- if 'injected-parameters' in cell.metadata.get('tags', []) -%}
<details class="code"><summary>parameters of this run</summary>
{%- else -%}
<details class="code"><summary>code</summary>
{%- endif -%}
{{ super() }}</details>
{%- endif -%}
{%- endblock input_group -%}
"""


def sections(copies: Collection[Path], folder: Path, root: Path) -> list[Section]:
    """Executed notebooks as HTML that holds no script and fetches nothing: images are embedded, code is folded.

    Args:
        copies: executed notebooks, in the report's order.
        folder: where the notebooks' own relative links start.
        root: images outside it are left out.
    """
    import nbformat

    names = {path.stem for path in copies}
    exporter = _exporter()
    parts = []
    for path in copies:
        with quiet():
            page, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
        parts.append(_section(path.stem, page, names, folder, root))
    return parts


def _exporter() -> HTMLExporter:
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    kinds = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/latex", "text/plain"]
    return HTMLExporter(
        raw_template=_CELLS,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        config=Config(NbConvertBase={"display_data_priority": kinds}),
    )


def _section(name: str, page: str, names: Collection[str], folder: Path, root: Path) -> Section:
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page, "html.parser")
    for tag in soup(["script", "link", "iframe", "object", "embed", "video", "audio"]):
        tag.decompose()
    headings = _number_headings(soup, name)
    _embed_images(soup, folder, root)
    _redirect_links(soup, names, {text.replace(" ", "-"): anchor for _, anchor, text in headings})
    return Section(name, str(soup), headings)


def _number_headings(soup: BeautifulSoup, name: str) -> list[tuple[int, str, str]]:
    headings = []
    for number, tag in enumerate(soup.select(".text_cell h1, .text_cell h2, .text_cell h3"), 1):
        tag["id"] = f"{name}-{number}"
        headings.append((int(tag.name[1]), tag["id"], tag.get_text(" ", strip=True)))
    return headings


def _embed_images(soup: BeautifulSoup, folder: Path, root: Path) -> None:
    """Put image files below ``root`` into the page; nbconvert does so below the notebook's own folder only."""
    for image in soup.find_all("img"):
        source = image.get("src", "")
        if source.startswith("data:"):
            continue
        file = (folder / unquote(source)).resolve()
        if "://" not in source and file.is_relative_to(root) and file.is_file():
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            image["src"] = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
            del image["srcset"]
        else:
            image.replace_with(f"[image not embedded: {source}]")


def _redirect_links(soup: BeautifulSoup, names: Collection[str], anchors: Mapping[str, str]) -> None:
    """Let links between and inside notebooks lead to their places in the report."""
    for link in soup.find_all("a", href=True):
        other = re.fullmatch(r"(?:\./)?([^/#]+)\.ipynb(?:#.*)?", link["href"])
        if other and other[1] in names:
            link["href"] = f"#{other[1]}"
        elif link["href"].startswith("#"):
            anchor = unquote(link["href"][1:])
            link["href"] = f"#{anchors.get(anchor, anchor)}"
