"""The sections of README.md that are written from the tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .. import files
from .errors import UsageError

README_SECTIONS = ("speed", "claims", "scale")
"""Sections of the README that are generated when the claims are decided."""


def check_sections(readme: Path) -> None:
    """Refuse a README without the sections' places: told before the first notebook, not after the last.

    Raises:
        UsageError: as ``refresh_readme``.
    """
    for name in README_SECTIONS:
        _section(readme, name, _text(readme))


def sections(root: Path, results_dir: str | None = None) -> dict[str, str]:
    """What the README tells of the tables, as Markdown, from those that the claims' notebook read."""
    from .. import claims, headline, results
    from ..train import cost

    if results_dir:
        folder = root / "notebooks" / results_dir  # as the notebook, running there, resolves it
    else:
        folder = Path(os.environ.get("BLOCKVIT_RESULTS") or root / "data" / "results")
    store = results.Store(folder)
    contents = headline.markdown(store), claims.readme(store), cost.readme(store)
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
