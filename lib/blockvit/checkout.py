"""The working copy of the study: where it lies, and which commit it is of."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path


def root() -> Path:
    """The working copy of the study that this package belongs to.

    ``$BLOCKVIT_HOME``, or the folder above ``lib/`` of an editable installation, or the current folder's nearest
    ancestor that holds ``data/reference``.
    """
    candidates = [Path(os.environ["BLOCKVIT_HOME"])] if os.environ.get("BLOCKVIT_HOME") else []
    candidates += [Path(__file__).resolve().parents[2], Path.cwd(), *Path.cwd().parents]
    for folder in candidates:
        if (folder / "data" / "reference").is_dir():
            return folder.resolve()
    raise FileNotFoundError(
        "the study's working copy was not found; run inside the cloned repository or set $BLOCKVIT_HOME to it"
    )


@cache
def commit() -> str:
    """Short hash of the repository's commit, with ``+`` behind it if tracked code differs; empty outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", "lib", "notebooks/*.ipynb", "notebooks/profiles"
        )
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
