"""What every notebook needs at its top: where tables and figures go, on which device, and which rows are its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from . import bench, checkout, comparisons, machine, plots, results


@dataclass(frozen=True)
class Study:
    """A profile's run on a device.

    Attributes:
        profile: names the folder of figures, ``figures/<profile>``.
        device: ``"cpu"``, ``"cuda"``, ...
        store: the tables.
        figures: where figures go.
        draw_for: a device's name as in the tables, to draw its figures without having it; None: measure on ``device``.
    """

    profile: str
    device: torch.device
    store: results.Store
    figures: Path
    draw_for: str | None = None

    @classmethod
    def open(
        cls, profile: str, device: str = "cpu", results_dir: str | None = None, draw_for: str | None = None
    ) -> Study:
        """Set the figures' style and check the device.

        Args:
            profile: the profile's name.
            device: where to measure.
            results_dir: the tables' folder; None means ``$BLOCKVIT_RESULTS`` or ``data/results``.
            draw_for: see the class.

        Raises:
            RuntimeError: ``device`` is not there.
        """
        if torch.device(device).type == "cuda" and not torch.cuda.is_available() and draw_for is None:
            raise RuntimeError(
                f"device is {device!r}, but PyTorch finds no CUDA device here; run on a machine with an NVIDIA GPU, "
                "choose PROFILE=laptop, or set draw_for to draw from committed tables"
            )
        plots.set_style()
        figures = Path(os.environ.get("BLOCKVIT_FIGURES") or checkout.root() / "figures") / profile
        return cls(profile, torch.device(device), results.Store(results_dir), figures, draw_for)

    @property
    def device_name(self) -> str:
        """The device's name in the tables."""
        return self.draw_for or bench.device_name(self.device)

    @property
    def measures(self) -> bool:
        """False if this run only draws from the tables."""
        return self.draw_for is None

    @property
    def cache(self) -> Path:
        """Where checkpoints and decoded data sets lie: beside the tables, never committed."""
        return Path(os.environ.get("BLOCKVIT_CACHE") or self.store.root.parent / "cache")

    def rows(self, experiment: str, **columns: Any) -> pd.DataFrame:
        """This device's rows of an experiment, narrowed to the given values of columns (a list: any of them).

        Trainings are read from every device, each once: none changes what they come to, but for rounding. Once this
        working copy has measured some of the rows, only its own: another machine may bear the same name. Of a CPU
        those of the most threads, unless ``threads`` is among the columns.
        """
        if experiment in results.OF_ANY_DEVICE:
            rows = comparisons.newest(self.store.read(experiment), ignore=("device", "threads"))
        else:
            rows = self.store.read(experiment, device=self.device_name)
        rows = comparisons.where(rows, **columns)
        if self.measures and (own := rows["run"] == self.store.run).any():
            rows = rows[own]
        if "threads" not in columns:
            rows = comparisons.most_threads(rows)
        return rows.reset_index(drop=True)

    def save(self, figure: Figure, name: str) -> Figure:
        """Write ``figures/<profile>/<name>.png`` and ``.svg``; returns the figure, for the notebook to show."""
        return plots.save(figure, self.figures, name)

    def describe(self) -> str:
        """One line: what runs where."""
        env = bench.environment(self.device) if self.measures else {"threads": float("nan"), **machine.versions()}
        threads = f", {env['threads']} threads" if self.measures and env["threads"] else ""
        return f"profile {self.profile} on {self.device_name}{threads}; torch {env['torch']}"
