"""The claims C1 to C11 of the blog post, decided from the tables: per device, with the number that decides.

A claim is decided like for like, as the post measured it: PyTorch's BSR kernels against eager dense PyTorch in the
same precision, which is fp32 but for C3. Beside it stands the best backend there is against the fastest dense variant
measured with it, and the same numbers in the other precision classes measured. What the post says of speed it says of
an A100: a CPU's numbers are told and decide nothing (``OF_GPUS``), but for C7, a conjecture about other hardware that
the post did not measure: the best backend decides it. What the tables do not hold is "not measured here".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields, replace

import numpy as np
import pandas as pd

from . import literature, losses
from .comparisons import (
    beside_most_engines,
    break_even,
    fastest_of_each,
    most_threads,
    newest,
    over_strongest_field,
    speedups,
    variant,
    where,
)
from .losses import LIMITED_LOSS, SMALL_LOSS
from .results import FAILED, OF_ANY_DEVICE, SCOPE_TITLES, Store

HOLDS, FAILS, OPEN, UNDECIDED = "holds", "does not hold", "not measured here", "not decided"
"""The last two: nothing was measured that the claim is about; or something was, and it is no ground to decide on."""

HOLDS_ON_CPU, LIFTED = "holds on a CPU", "no longer so"
"""Of C7, for no other hardware than a CPU stands in for a device; and of C11, a limit that this library has not."""

TABLES = ("linear", "vit", "accuracy", "conversion")  # what the claims are decided from

VIT_B_16_LINEARS = ("768x768", "2304x768", "3072x768", "768x3072", "1000x768")
HEAD = "1000x768"
LARGE = 4096  # from this size up a square matmul is "large"
NEAR = 0.95  # a published speedup counts as reached from this share of it on: run to run noise

OTHERS = ("tf32", "bf16")  # precision classes told of beside fp32, which decides

TOO_EASY = ("digits",)  # a model of five tokens says nothing of a headline on ImageNet

TRAINED_OUT = {"cifar10": 86.0, "cifar10-jpeg": 86.0, "imagenet": 76.0}
"""Top-1 in percent from which on a dense model counts as trained: five points below ViT-CIFAR's 90.9 (200 epochs) and
torchvision's 81.07 (ViT-B/16). One stopped earlier loses points to sparsity that more training would bring back."""


@dataclass(frozen=True)
class Verdict:
    """What the tables say of a claim on one device.

    ``number`` decides, ``ours`` tells of the best backend, ``others`` of both in the other precision classes. ``brief``
    is what the README says of all that, in a dozen words.
    """

    verdict: str
    number: str = ""
    ours: str = ""
    others: str = ""
    brief: str = ""

    def __str__(self) -> str:
        parts = [emphasised(self.verdict), self.number, self.ours, self.others]
        return "; ".join(part for part in parts if part)


def emphasised(verdict: str) -> str:
    """A verdict as the tables show it: what was decided stands out."""
    return verdict if verdict in (OPEN, UNDECIDED) else f"**{verdict}**"


NOT_MEASURED = Verdict(OPEN)
VERDICT = [field.name for field in fields(Verdict)]


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


def _x(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def _by_block(rows: pd.DataFrame) -> str:
    rows = rows.sort_values("block_size")
    return ", ".join(f"{_x(r.speedup)} ({int(r.block_size)})" for r in rows.itertuples())


def _by(rows: pd.DataFrame) -> str:
    """Who did it, while that is short: `` by gather and torch_tuned``."""
    names = sorted(rows["backend"].unique())
    return f" by {' and '.join(names)}" if 1 <= len(names) <= 2 else ""


Reading = Callable[[pd.DataFrame], str]  # of rows of one precision class; empty if they do not suffice


def _others(like: pd.DataFrame, best: pd.DataFrame, number: Reading, ours: Reading) -> str:
    """What was measured in the other precision classes, read as in fp32: ``bf16: 0.90× (best here: 1.20×)``."""
    texts = []
    for precision in OTHERS:
        rows, all_rows = (where(table, precision=precision) for table in (like, best))
        told, best_told = number(rows) if len(rows) else "", ours(all_rows) if len(all_rows) else ""
        if told:
            texts.append(f"{precision}: {told}" + (f" (best here: {best_told})" if best_told else ""))
        elif best_told:
            texts.append(f"{precision}, best here: {best_told}")
    return "; ".join(texts)


def _decided(holds: bool, like: pd.DataFrame, best: pd.DataFrame, number: Reading, ours: Reading) -> Verdict:
    """A verdict with its texts: from the fp32 rows, and beside them from those of the other precision classes."""
    fp32, best_fp32 = (where(table, precision="fp32") for table in (like, best))
    return Verdict(
        HOLDS if holds else FAILS, number(fp32), f"best here: {ours(best_fp32)}", _others(like, best, number, ours)
    )


def c1(e: Evidence) -> Verdict:
    """Up to 4.8x on large matmuls."""
    goal = _published(metric="headline_speedup", scope="linear")["value"].iloc[0]

    def large(rows: pd.DataFrame) -> pd.DataFrame:
        if rows.empty:
            return rows
        return rows[rows["model"].str.split("x").map(lambda s: min(map(int, s)) >= LARGE)]

    def ours(rows: pd.DataFrame) -> str:
        top = rows.loc[rows["speedup"].idxmax()]
        return f"{_x(top['speedup'])} by {variant(top)}"

    like, best = large(e.linear_like), large(e.linear_best)
    fp32 = where(like, precision="fp32")
    if fp32.empty:
        return NOT_MEASURED
    reached = fp32["speedup"].max() >= NEAR * goal
    # "Up to" is reached by one product, and refuted only by products as large and sparse as the post could mean.
    sizes = where(fp32, sparsity=fp32["sparsity"].max())["tokens"]
    if not reached and (fp32["sparsity"].max() < 0.95 or sizes.max() < 2 * LARGE):
        return NOT_MEASURED
    return _decided(reached, like, best, lambda rows: f"up to {_x(rows['speedup'].max())}", ours)


def _vit_b_16_cells(rows: pd.DataFrame, precision: str) -> pd.DataFrame:
    rows = where(rows, precision=precision)
    return rows[rows["model"].isin(VIT_B_16_LINEARS) & (rows["sparsity"] > 0)]


_CELL = ["model", "tokens", "block_size", "sparsity"]


def c2(e: Evidence) -> Verdict:
    """fp32 linear layers: faster when block size >= 32 or sparsity >= 0.8, at the most tokens measured."""

    def claimed(rows: pd.DataFrame) -> pd.DataFrame:
        rows = _vit_b_16_cells(rows, "fp32")
        return rows[(rows["block_size"] >= 32) | (rows["sparsity"] >= 0.8)]

    like, best = claimed(e.linear_like), fastest_of_each(claimed(e.linear_best), _CELL)
    if like.empty:
        return NOT_MEASURED
    tokens = like["tokens"].max()  # the post measured at batch 256; a small batch is not what it speaks of
    like = like[like["tokens"] == tokens]
    best = best.merge(like[_CELL], on=_CELL)  # the same cells
    holds = (like["speedup"] > 1).all()
    if holds and set(like["model"]) != set(VIT_B_16_LINEARS):
        return NOT_MEASURED  # one cell refutes it, but only all layers confirm it
    return Verdict(
        HOLDS if holds else FAILS,
        f"at {tokens:.0f} tokens {_faster(like)}, {_x(like['speedup'].min())} to {_x(like['speedup'].max())}",
        "; ".join(
            f"best here, over {_field(engines)}: {_faster(rows)}, {_x(rows['speedup'].min())} to "
            f"{_x(rows['speedup'].max())}"
            for engines, rows in best.groupby("dense_variants")
        ),
        brief=f"{_faster(like)} through PyTorch's kernels; {_faster(best)} through the best here",
    )


def _faster(rows: pd.DataFrame) -> str:
    return f"{(rows['speedup'] > 1).sum()} of {len(rows)} cells faster"


def c3(e: Evidence) -> Verdict:
    """bf16: smaller speedups, usually only for block size >= 64 and higher sparsity; at the most tokens, as C2."""
    fp32, bf16 = (_vit_b_16_cells(e.linear_like, precision) for precision in ("fp32", "bf16"))
    both = bf16.merge(fp32[[*_CELL, "speedup"]], on=_CELL, suffixes=("", "_fp32"))
    if both.empty:
        return NOT_MEASURED
    tokens = both["tokens"].max()
    both, bf16 = (rows[rows["tokens"] == tokens] for rows in (both, bf16))
    smaller = (both["speedup"] < both["speedup_fp32"]).mean()
    small_blocks = bf16[bf16["block_size"] < 64]["speedup"]
    usually_not = not (small_blocks > 1).mean() >= 0.5  # of no cells the mean is NaN: nothing speaks against it
    best = fastest_of_each(where(_vit_b_16_cells(e.linear_best, "bf16"), tokens=tokens), _CELL)
    return Verdict(
        HOLDS if smaller > 0.5 and usually_not else FAILS,
        f"at {tokens:.0f} tokens smaller than in fp32 in {smaller:.0%} of cells, {_faster(bf16)}",
        f"best here: {_faster(best)}, up to {_x(best['speedup'].max())}",
    )


def _vit_b_16(rows: pd.DataFrame, **equal: object) -> pd.DataFrame:
    return where(rows, model="vit_b_16", scope="mlp", **equal)


def c4(e: Evidence) -> Verdict:
    """End to end at 90%: 1.24x, 1.37x, 1.65x."""
    goals = _published(metric="speedup", scope="mlp", model="vit_b_16").set_index("block_size")["value"]
    like, best = (_vit_b_16(rows, batch_size=256, sparsity=0.9) for rows in (e.vit_like, e.vit_best))
    like = like[like["block_size"].isin(goals.index)]
    fp32 = where(like, precision="fp32")
    if set(fp32["block_size"]) != set(goals.index):
        return NOT_MEASURED
    reached = fp32["speedup"].to_numpy() >= NEAR * goals[fp32["block_size"]].to_numpy()
    return _decided(reached.all(), like, best, _by_block, _best_by_block)


def _best_by_block(rows: pd.DataFrame) -> str:
    """The fastest variant of each block size, named once if it is the same for all."""
    best = fastest_of_each(rows, ["block_size"]).sort_values("block_size")
    names = [variant(row) for row in best.itertuples()]
    if len(set(names)) == 1:
        return f"{_by_block(best)} by {names[0]}"
    return ", ".join(
        f"{_x(row.speedup)} ({row.block_size:.0f}, {name})" for row, name in zip(best.itertuples(), names, strict=True)
    )


def c5(e: Evidence) -> Verdict:
    """Break-even sparsity 0.86, 0.82, 0.70."""
    goals = _published(metric="break_even_sparsity").set_index("block_size")["value"]

    def sweeps(rows: pd.DataFrame) -> pd.DataFrame:
        rows = fastest_of_each(_vit_b_16(rows, batch_size=256), ["precision", "block_size", "sparsity"])
        enough = rows.groupby(["precision", "block_size"])["sparsity"].transform("nunique") >= 3
        return rows[enough & rows["block_size"].isin(goals.index)]

    like, best = sweeps(e.vit_like), sweeps(e.vit_best)
    fp32 = _break_evens(where(like, precision="fp32"))
    if set(fp32) != {int(block) for block in goals.index}:
        return NOT_MEASURED
    reached = [
        np.interp(goals[block], *line.sort_values("sparsity")[["sparsity", "speedup"]].to_numpy().T) >= NEAR
        for block, line in where(like, precision="fp32").groupby("block_size")
    ]
    reached.append(None not in fp32.values())  # near 1 everywhere is faster nowhere
    return _decided(all(reached), like, best, _edges, lambda rows: _edges(rows) + _by(rows[rows["speedup"] > 1]))


def _break_evens(rows: pd.DataFrame) -> dict[int, float | None]:
    return {
        int(block): break_even(list(line["sparsity"]), list(line["speedup"]))
        for block, line in rows.groupby("block_size")
    }


def _edges(rows: pd.DataFrame) -> str:
    lowest = rows.groupby("block_size")["sparsity"].min()

    def text(block: int, edge: float | None) -> str:
        if edge is None:
            return f"never ({block})"
        at_most = "≤ " if edge <= lowest[block] else ""  # faster wherever measured: the true edge may lie lower
        return f"{at_most}{edge:.2f} ({block})"

    return ", ".join(text(block, edge) for block, edge in _break_evens(rows).items())


def c6(e: Evidence) -> Verdict:
    """At 90% faster from batch size 16 up; larger blocks win at large batches, smaller break even earlier.

    Decided by the post's block sizes of which batches of both 16 and 256 were measured.
    """
    goals = _published(metric="speedup", scope="mlp", model="vit_b_16")["block_size"]
    like = _vit_b_16(e.vit_like, sparsity=0.9)
    like = like[like["block_size"].isin(goals)]
    cell = ["precision", "block_size"]
    both = like[like["batch_size"].isin((16, 256))].groupby(cell)["batch_size"].nunique() == 2
    like = like[pd.MultiIndex.from_frame(like[cell]).isin(both[both].index)]
    fp32 = where(like, precision="fp32")
    if fp32["block_size"].nunique() < 2:
        return NOT_MEASURED
    fast = (fp32[fp32["batch_size"] >= 16]["speedup"] > 1).all()
    at_most = fp32[fp32["batch_size"] == fp32["batch_size"].max()].sort_values("block_size")["speedup"]
    holds = fast and at_most.is_monotonic_increasing and _first_faster(fp32).is_monotonic_increasing
    return _decided(holds, like, _vit_b_16(e.vit_best, sparsity=0.9), _by_batch, _from_batch)


def _first_faster(rows: pd.DataFrame) -> pd.Series:
    """By block size, in order: the smallest batch that is faster than dense; infinite if none is."""
    first = rows[rows["speedup"] > 1].groupby("block_size")["batch_size"].min()
    return first.reindex(sorted(rows["block_size"].unique())).fillna(float("inf"))


def _by_batch(rows: pd.DataFrame) -> str:
    first = ", ".join(
        f"never ({block:.0f})" if batch == float("inf") else f"{batch:.0f} ({block:.0f})"
        for block, batch in _first_faster(rows).items()
    )
    return f"{_faster(rows[rows['batch_size'] >= 16])} from batch 16 up, first faster at batch {first}"


def _from_batch(rows: pd.DataFrame) -> str:
    """From which batch size on the best variant is faster, at each batch measured."""
    best = fastest_of_each(rows, ["batch_size"]).sort_values("batch_size", ascending=False)
    faster = best[(best["speedup"] > 1).cummin()]
    return f"from batch {faster['batch_size'].min():.0f} up{_by(faster)}" if len(faster) else "never"


def c7(e: Evidence) -> Verdict:
    """On-device hardware is faster at batch size 1.

    The post measured nothing here that could be repeated like for like: any backend that is faster decides, with the
    MLP sparse, as the published models have it, if that was measured. A CPU stands in for a device, whichever it is.
    """
    rows = where(e.vit_best, model="vit_b_16", batch_size=1, sparsity=0.9)
    fp32 = beside_most_engines(where(rows, precision="fp32"))
    if e.is_gpu or fp32.empty:
        return NOT_MEASURED
    others = {precision: beside_most_engines(where(rows, precision=precision)) for precision in OTHERS}
    told = [f"{precision}: {_one_image(cell)}" for precision, cell in others.items() if len(cell)]
    return Verdict(
        HOLDS_ON_CPU if _top_by_scope(fp32)[0]["speedup_low"] > 1 else FAILS,
        _one_image(fp32),
        others="; ".join([*told, "no phone or board was measured: this CPU stands in"]),
        brief=_one_image_in_brief(fp32),
    )


def _one_image_in_brief(rows: pd.DataFrame) -> str:
    tops = [
        f"{SCOPE_TITLES.get(top['scope'], top['scope'])} {_x(top['speedup'])} ({_x(top['speedup_low'])} to "
        f"{_x(top['speedup_high'])})"
        for top in _top_by_scope(rows)
    ]
    seed = where(rows, backend="torch")["speedup"]
    return f"at 90% {', '.join(tops)}" + (f"; through PyTorch's kernels {_x(seed.max())}" if len(seed) else "")


def _top_by_scope(rows: pd.DataFrame) -> list[pd.Series]:
    """The variant of each scope that is surely fastest, by the low end of its spread; the MLP's first."""
    tops = [top for _, top in fastest_of_each(rows, ["scope"], by="speedup_low").iterrows()]
    return sorted(tops, key=lambda top: (top["scope"] != "mlp", top["scope"]))


def _one_image(rows: pd.DataFrame) -> str:
    """What each scope reaches at batch size 1, and what PyTorch's kernels, the post's seed, do there."""
    texts = []
    for best in _top_by_scope(rows):
        seed = where(rows, scope=best["scope"], backend="torch")["speedup"]
        texts.append(
            f"{SCOPE_TITLES.get(best['scope'], best['scope'])} at 90%: {_x(best['speedup'])} (spread "
            f"{_x(best['speedup_low'])} to {_x(best['speedup_high'])}) by {variant(best)} in blocks of "
            f"{best['block_size']:.0f}" + (f", PyTorch's BSR {_x(seed.max())}" if len(seed) else "")
        )
    return f"{'; '.join(texts)}; over {_field(rows['dense_variants'].max())}"


def _field(engines: float) -> str:
    """What a speedup over the fastest of so many dense variants is over."""
    return "eager dense PyTorch" if engines == 1 else f"the fastest of {engines:.0f} dense engines"


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
    goal = _published(metric="headline_speedup", scope="mlp")["value"].iloc[0]
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
            f"{trained}, {point['backend']}: {_x(point['speedup'])} with {point['lost']:.1f} points lost "
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


def c10(e: Evidence) -> Verdict:
    """Folding changes nothing; conversion is done once and cached."""
    metrics = ("fold_difference", "load_difference", "convert_seconds", "load_seconds")
    fold, load, convert, read = (where(e.conversion, metric=metric) for metric in metrics)
    if any(rows.empty for rows in (fold, load, convert, read)):
        return NOT_MEASURED
    same = (pd.concat([fold, load])["value"] == 0).all()  # one model that folding changes refutes the claim
    return Verdict(
        HOLDS if same else FAILS,
        f"largest change of a logit of {_models(fold)} by folding {fold['value'].max():.3g}, by saving and loading "
        f"{load['value'].max():.3g}; {_models(convert)} converted in {convert['value'].median():.2f} s, loaded in "
        f"{read['value'].median():.2f} s",
        brief=f"folding, saving and loading change {'no logit' if same else 'logits'}; {_models(convert)} converted in "
        f"{convert['value'].median():.2f} s, loaded in {read['value'].median():.2f} s",
    )


def _models(rows: pd.DataFrame) -> str:
    return ", ".join(sorted(rows["model"].unique()))


def c11(e: Evidence) -> Verdict:
    """Sizes that are no multiple of the block size cannot be converted: a limit of PyTorch's BSR, lifted here."""
    head = where(e.linear_best, model=HEAD)
    head = head[head["block_size"].map(lambda b: 1000 % b != 0)]
    if head.empty:
        return NOT_MEASURED
    best = head.loc[head["speedup"].idxmax()]
    return Verdict(
        LIFTED,
        f"the {HEAD} head converts in blocks of {_sizes(head)}: up to {_x(best['speedup'])} by {best['backend']} over "
        f"{_field(best['dense_variants'])} (blocks of {best['block_size']:.0f}, {best['tokens']:.0f} tokens, "
        f"{best['sparsity']:.0%})",
        brief=f"the head of 1000 classes converts in blocks of {_sizes(head)}, padded",
    )


def _sizes(rows: pd.DataFrame) -> str:
    return ", ".join(f"{block:.0f}" for block in sorted(rows["block_size"].unique()))


def _published(**equal: object) -> pd.DataFrame:
    return where(literature.numbers(), source="blog", **equal)


CLAIMS: dict[str, tuple[str, Callable[[Evidence], Verdict]]] = {
    "C1": ("Block-sparse kernels reach up to 4.8× over dense on large matmuls at high sparsity.", c1),
    "C2": ("fp32 linear layers of ViT-B/16: faster when block size ≥ 32 or sparsity ≥ 0.8.", c2),
    "C3": ("bf16: smaller speedups, usually only for block size ≥ 64 and higher sparsity.", c3),
    "C4": ("ViT-B/16, batch 256, MLP at 90%: 1.24×, 1.37×, 1.65× for block size 16, 32, 64.", c4),
    "C5": ("Lowest sparsity with a speedup: 0.86, 0.82, 0.70 for block size 16, 32, 64.", c5),
    "C6": ("At 90%: faster from batch size 16 up; larger blocks win at large batches, smaller break even earlier.", c6),
    "C7": ("On-device hardware, unlike server GPUs, gets speedups at batch size 1 (a conjecture).", c7),
    "C8": ("Accuracy: no meaningful loss to 70%, limited loss from 80% to 90%, significant loss from 90%.", c8),
    "C9": ("Headline: 1.46× with less than 2 points of top-1 lost.", c9),
    "C10": ("Folding changes no output; BSR conversion is done once, cached, and needs no code change.", c10),
    "C11": ("Layers whose size is no multiple of the block size cannot be converted.", c11),
}


OF_GPUS = ("C1", "C2", "C3", "C4", "C5", "C6", "C9")
"""What the post says of an A100."""


def devices(store: Store, tables: Iterable[str] = TABLES) -> list[str]:
    """Every device that has rows in ``tables``, GPUs first."""
    rows = pd.concat([store.read(name)[["device", "threads"]] for name in tables])
    if rows.empty:
        return []
    on_cpu = rows.groupby("device")["threads"].max().notna()
    return sorted(on_cpu.index, key=lambda device: (on_cpu[device], device))


def decide(store: Store) -> pd.DataFrame:
    """Every claim on every device: ``id, claim, device`` and the fields of ``Verdict``.

    A device that only trained has nothing of its own to tell: its accuracies count for all. It is left out, unless
    there are no others.
    """
    rows = []
    for device in devices(store, (name for name in TABLES if name not in OF_ANY_DEVICE)) or devices(store):
        evidence = Evidence.of(store, device)
        for claim_id, (text, decide_one) in CLAIMS.items():
            found = decide_one(evidence)
            if claim_id in OF_GPUS and not evidence.is_gpu and found.verdict in (HOLDS, FAILS):
                found = replace(found, verdict=UNDECIDED, brief=f"on a CPU, {found.brief or found.number}")
            rows.append((claim_id, text, device, *astuple(found)))
    return pd.DataFrame(rows, columns=["id", "claim", "device", *VERDICT])


def briefly(store: Store) -> str:
    """The claims as a short Markdown table for the README, a row a claim: the verdict, and what it rests on."""
    decided = decide(store)
    lines = ["| | Claim of the post | Verdict | Measured |", "| --- | --- | --- | --- |"]
    for claim_id, (text, _) in CLAIMS.items():
        found = decided[(decided["id"] == claim_id) & (decided["verdict"] != OPEN)]
        by_verdict = found.groupby("verdict", sort=False)["device"].agg(" and ".join)
        verdicts = [emphasised(v) + (f" ({on})" if len(by_verdict) > 1 else "") for v, on in by_verdict.items()]
        told = [row.brief or "; ".join(filter(None, (row.number, row.ours))) for row in found.itertuples()]
        if len(set(told)) > 1:
            told = [f"{device}: {one}" for device, one in zip(found["device"], told, strict=True)]
        lines.append(f"| {claim_id} | {text} | {'; '.join(verdicts) or OPEN} | {'<br>'.join(dict.fromkeys(told))} |")
    return "\n".join(lines) + "\n"


def coverage(store: Store) -> str:
    """What was measured where, as a Markdown table: a row a device and experiment, of whole models a row a model."""
    lines = [
        "| device | experiment | models | precision | batch or tokens | blocks | sparsity | rows | repeats | torch |"
    ]
    lines.append("| --- |" + " --- |" * 9)
    for device in devices(store):
        for experiment in TABLES:
            every = newest(store.read(experiment, device=device))
            every = every[every["metric"] != FAILED]
            parts = [every] if experiment == "linear" else [rows for _, rows in every.groupby("model")]
            for rows in parts:
                if rows.empty:
                    continue
                size = rows["tokens"] if experiment == "linear" else rows["batch_size"]
                threads = rows["threads"].dropna().unique()
                name = device + (f", {_threads(threads)}" if len(threads) else "")
                cells = [name, experiment, _models(rows), ", ".join(sorted(set(rows["precision"]) - {""}))]
                cells += [_span(size), _span(rows["block_size"]), _span(rows["sparsity"], percent=True)]
                cells += [str(len(rows)), _span(rows["repeats"]), ", ".join(sorted(rows["torch"].unique()))]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _threads(counts: np.ndarray) -> str:
    texts = [f"{count:.0f}" for count in sorted(counts)]
    return f"{'/'.join(texts)} thread{'' if texts == ['1'] else 's'}"


def _span(values: pd.Series, *, percent: bool = False) -> str:
    found = sorted(values.dropna().unique())
    texts = [f"{value:.0%}" if percent else f"{value:.0f}" for value in found]
    return "" if not texts else ", ".join(texts) if len(texts) <= 5 else f"{texts[0]} to {texts[-1]}"


def markdown(store: Store) -> str:
    """The claims as a Markdown table, a row a claim, a column a device."""
    decided = decide(store)
    columns = list(dict.fromkeys(decided["device"]))
    if not columns:
        lines = ["| | Claim of the post | |", "| --- | --- | --- |"]
        return "\n".join([*lines, *(f"| {i} | {text} | {OPEN} |" for i, (text, _) in CLAIMS.items())]) + "\n"
    lines = ["| | Claim of the post | " + " | ".join(columns) + " |", "| --- | --- |" + " --- |" * len(columns)]
    for claim_id, (text, _) in CLAIMS.items():
        found = decided[decided["id"] == claim_id].set_index("device")
        cells = [str(Verdict(*found.loc[device, VERDICT])) for device in columns]
        lines.append(f"| {claim_id} | {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
