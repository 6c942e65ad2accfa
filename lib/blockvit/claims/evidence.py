"""What a claim is decided from: one device's rows, and what the post published."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from .. import literature, losses
from ..comparisons import most_threads, newest, over_strongest_field, speedups, where
from ..results import Store


@dataclass(frozen=True)
class Evidence:
    """One device's rows, as the claims read them; accuracies are of every device, for none changes them.

    ``*_like`` compares PyTorch's BSR kernels as shipped, eager, with eager dense PyTorch; ``*_best`` every
    block-sparse variant with the fastest dense one of its group. ``lost`` is ``losses.points_lost``.
    """

    device: str
    linear_like: pd.DataFrame
    linear_best: pd.DataFrame
    vit_like: pd.DataFrame
    vit_best: pd.DataFrame
    lost: pd.DataFrame
    conversion: pd.DataFrame

    @classmethod
    def of(cls, store: Store, device: str) -> Evidence:
        """Read the tables of ``device``."""
        linear, vit = (most_threads(store.read(experiment, device=device)) for experiment in ("linear", "vit"))
        like = [speedups(rows, baseline="eager") for rows in (linear, vit)]
        like = [rows[(rows["backend"] == "torch") & (rows["compile"] == "eager")] for rows in like]
        best = [over_strongest_field(speedups(rows)) for rows in (linear, vit)]
        best = [rows[rows["block_size"].notna()] for rows in best]  # 2:4 sparsity has no blocks: no claim is about it
        conversion = newest(store.read("conversion", device=device))
        return cls(
            device,
            linear_like=like[0],
            linear_best=best[0],
            vit_like=like[1],
            vit_best=best[1],
            lost=losses.points_lost(store.read("accuracy")),
            conversion=conversion,
        )

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU: its rows have no CPU thread count."""
        tables = (self.linear_best, self.vit_best)
        return any(len(t) and t["threads"].isna().all() for t in tables)


def published(**equal: object) -> pd.DataFrame:
    """The post's own numbers whose columns have these values."""
    return where(literature.numbers(), source="blog", **equal)
