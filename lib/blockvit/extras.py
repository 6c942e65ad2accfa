"""Packages that only the study needs: what to install where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def of_the_study() -> Iterator[None]:
    """Around imports: a package that is missing is told with the way to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "blockvit").partition(".")[0] == "blockvit":
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed, which trainings and measurements need beside the library: in a clone of "
            "BlockViT, pip install '.[study]'",
            name=error.name,
        ) from None
