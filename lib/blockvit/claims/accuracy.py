"""Claims of accuracy, alone and beside speed: C8 and C9."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .. import losses
from ..comparisons import where
from ..losses import LIMITED_LOSS, SMALL_LOSS
from .evidence import Evidence, published
from .verdicts import FAILS, HOLDS, NEAR, NOT_MEASURED, UNDECIDED, Verdict
from .wording import times

TOO_EASY = ("digits",)  # a model of five tokens says nothing of a headline on ImageNet

TRAINED_OUT = {"cifar10": 86.0, "cifar10-jpeg": 86.0, "imagenet": 76.0}
"""Top-1 in percent from which on a dense model counts as trained: five points below ViT-CIFAR's 90.9 (200 epochs) and
torchvision's 81.07 (ViT-B/16). One stopped earlier loses points to sparsity that more training would bring back."""

_SPEED_SCOPE = {"mlp+out_proj+head": "blog"}  # the layers masked in training, as the speed's rows call them


def c8(e: Evidence) -> Verdict:
    """No meaningful loss to 70%, limited from 80% to 90%, significant from 90%; by the reference method.

    Models that are too easy or were not trained out are told of, and decide nothing.
    """
    verdicts, decides, beside = [], [], []
    for setting, cells in _settings(e.lost):
        if (found := _c8(cells)) is None:
            continue
        holds, text = found
        dense = cells["dense_top1"].iloc[0]
        if why := _does_not_decide(setting[0], dense):
            beside.append(f"{losses.setting(*setting)}, {why} (dense {dense:.1f}%): {text}")
        else:
            verdicts.append(holds)
            decides.append(f"{losses.setting(*setting)}: {text}")
    if not verdicts and not beside:
        return NOT_MEASURED
    verdict = UNDECIDED if not verdicts else HOLDS if all(verdicts) else FAILS
    return Verdict(verdict, "; ".join(decides), "; ".join(beside), brief="; ".join(decides or beside))


def _does_not_decide(dataset: str, dense_top1: float) -> str:
    if dataset in TOO_EASY:
        return "too easy"
    return "not trained to convergence" if dense_top1 < TRAINED_OUT.get(dataset, 0) else ""


def _settings(lost: pd.DataFrame) -> Iterable[tuple[tuple[str, str, str], pd.DataFrame]]:
    """The cells of the reference method, for each data set, model and recipe."""
    return losses.reference(lost).groupby(losses.MODEL)


def _c8(cells: pd.DataFrame) -> tuple[bool, str] | None:
    s = cells["sparsity"]
    parts = cells[s <= 0.7], cells[(s >= 0.8) & (s < 0.9)], cells[s >= 0.9]
    if any(part.empty for part in parts):
        return None
    worst = [round(part["lost"].max(), 2) for part in parts]  # a difference of 5 must not decide by its last bit
    above = cells[s >= 0.8].groupby("sparsity")["lost"].max()
    told = ", ".join(f"{lost:.1f} at {sparsity:.0%}" for sparsity, lost in above.items())
    text = f"at most {worst[0]:.1f} points lost to 70%, {told} ({_seeds(cells)})"
    return worst[0] <= SMALL_LOSS and worst[1] <= LIMITED_LOSS and worst[2] > LIMITED_LOSS, text


def _seeds(cells: pd.DataFrame) -> str:
    counts = sorted({int(n) for n in (*cells["seeds"], *cells["dense_seeds"])})
    return f"{' or '.join(map(str, counts))} seed{'' if counts == [1] else 's'}"


def c9(e: Evidence) -> Verdict:
    """1.46x with less than 2 points lost, accuracy and speed of the same model."""
    goal = published(metric="headline_speedup", scope="mlp")["value"].iloc[0]
    lost = e.lost.replace({"scope": _SPEED_SCOPE})
    on = ["model", "scope", "block_size", "sparsity"]

    def both(lost: pd.DataFrame, speeds: pd.DataFrame) -> pd.DataFrame:
        return lost.merge(where(speeds, precision="fp32")[[*on, "speedup", "backend", "batch_size"]], on=on)

    def fastest(points: pd.DataFrame) -> pd.Series | None:
        points = points[points["lost"] < losses.CHEAP]
        return None if points.empty else points.loc[points["speedup"].idxmax()]

    # Like for like is trained as the post did, too; what is best here may have been trained otherwise.
    like, best = both(losses.reference(lost), e.vit_like), both(lost, e.vit_best)
    if best.empty:
        return NOT_MEASURED
    measured = ", ".join(sorted({losses.TITLES.get(name, name) for name in best["dataset"]}))
    like, best = _deciding(like), _deciding(best)
    if best.empty:
        why = f"only {measured} has accuracy and speed here, which neither confirms nor refutes it"
        return Verdict(UNDECIDED, why, brief=why)

    def text(point: pd.Series) -> str:
        trained = losses.setting(point["dataset"], point["model"], point["recipe"])
        how = f", {point['variant']}" if point["variant"] else ""
        return (
            f"{trained}, {point['backend']}: {times(point['speedup'])} with {point['lost']:.1f} points lost "
            f"(block {point['block_size']:.0f}, {point['sparsity']:.0%}{how})"
        )

    decides, top = fastest(like), fastest(best)
    ours = "" if top is None else f"best here: {text(top)}"
    if like.empty:
        return Verdict(UNDECIDED, "", ours, brief=ours)
    if decides is None:
        return Verdict(FAILS, f"no model lost less than 2 points; the fewest lost are {like['lost'].min():.1f}", ours)
    if top is not None and text(top) == text(decides):
        ours = ""
    return Verdict(HOLDS if decides["speedup"] >= NEAR * goal else FAILS, text(decides), ours)


def _deciding(points: pd.DataFrame) -> pd.DataFrame:
    """Those of models that are neither too easy nor short of training."""
    pairs = zip(points["dataset"], points["dense_top1"], strict=True)
    return points[np.array([not _does_not_decide(dataset, top1) for dataset, top1 in pairs], dtype=bool)]
