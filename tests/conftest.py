"""Settings that all tests share: two threads, seeded draws, quiet hypothesis, and GPU tests skipped without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, tzinfo

import pytest
import torch
from hypothesis import HealthCheck, settings

# Compiling and first calls take long once, and function-scoped fixtures (the seed) are meant to span the examples.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=50, **common)
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, **common)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state of torch."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def on_a_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the tables be written on a day of January 2026."""

    def write_on(day: int) -> None:
        class Then(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:
                return datetime(2026, 1, day, tzinfo=tz)

        monkeypatch.setattr("blockvit.results.datetime", Then)

    return write_on
