"""What our kernels set out to reach, and what the tables say they reached.

The goals of the GPU kernels were stated before anything was measured; those of the CPU kernel after its first
measurements, from what these and the peak of the machine let expect. A goal that is missed stays in the list with the
number that was measured. Reads tables, needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .answers import AT
from .comparisons import break_even, fastest_of_each, newest, speedups, where
from .limits import bandwidth, linear_seconds
from .results import SCOPE_TITLES

CPU_BACKENDS = ("cpu", "cpu+dense")
GPU_BACKENDS = ("triton", "triton+mlp")
"""Our kernels on each kind of device; a model's goal counts the faster of its two ways."""

MLP_SHAPES = ("3072x768", "768x3072")
BASELINES = ("torch", "torch_tuned", "torchao", "blksprs")
"""Other people's block-sparse GPU kernels, every one of which is to be beaten in every case."""


@dataclass(frozen=True)
class Goal:
    """One goal and what was reached.

    Attributes:
        case: what was to be fast.
        against: what it is compared with, in the same run and precision class.
        target: the ratio, or the share or sparsity, that was to be reached.
        measured: what was reached; None where it was not measured. Where a goal holds for several cells this is the
            worst of them.
        lower: whether the target is an upper bound (a break-even sparsity).
        percent: whether both numbers are shares.
    """

    case: str
    against: str
    target: float
    measured: float | None
    lower: bool = False
    percent: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.target if self.lower else self.measured >= self.target

    def text(self, value: float) -> str:
        """A number of this goal as the table shows it."""
        return f"{100 * value:.3g}%" if self.percent else f"{value:.2f}×"


def table(goals: list[Goal]) -> pd.DataFrame:
    """The goals as a table for a notebook: ``case, against, target, measured, reached``."""
    verdict = {True: "yes", False: "no", None: "not measured"}
    return pd.DataFrame(
        {
            "case": [goal.case for goal in goals],
            "against": [goal.against for goal in goals],
            "target": [("at most " if g.lower else "at least ") + g.text(g.target) for g in goals],
            "measured": ["" if g.measured is None else g.text(g.measured) for g in goals],
            "reached": [verdict[goal.met] for goal in goals],
        }
    )


def on_cpu(linear: pd.DataFrame, vit: pd.DataFrame, ceiling: pd.DataFrame) -> list[Goal]:
    """The goals of the backend ``cpu`` in fp32: single layers of ViT-B/16's MLP, and the model.

    Models run on ``cpu`` or ``cpu+dense``, in which attention has its own kernel since that was written.

    Args:
        linear: rows of the experiment ``linear`` of one device, at one number of threads.
        vit: rows of the experiment ``vit``, likewise.
        ceiling: rows of the experiment ``ceiling``.
    """
    mlp = linear[linear["model"].isin(MLP_SHAPES) & (linear["precision"] == "fp32")]
    eager, fastest = speedups(mlp, baseline="eager"), speedups(mlp)
    goals = []
    for tokens, blocks, target in ((197, (32, 64), 14), (1576, (32, 64), 14), (197, (16,), 11), (1576, (16,), 11)):
        what = f"linear layers of the MLP, {tokens} tokens, 90%, blocks of {_either(blocks)}"
        cell = {"tokens": tokens, "block_size": blocks, "sparsity": AT}
        goals.append(Goal(what, "dense, eager PyTorch", target, _worst(_ours(eager, CPU_BACKENDS, **cell))))
        if tokens == 197 and len(blocks) == 2:
            ratio = _over_backend(mlp, "cpu", "torch", **cell)
            goals.append(Goal(what, "PyTorch's BSR linear", 25, _worst(ratio)))
    for block in (16, 32, 64):
        for tokens in (197, 1576):
            cell = {"tokens": tokens, "block_size": block}
            edges = _break_evens(_ours(fastest, ("cpu",), **cell), log=True)  # as notebook 7's logarithmic axis has it
            what = f"break-even sparsity, {tokens} tokens, blocks of {block}"
            goals.append(Goal(what, "the fastest dense engine", 0.2, _highest(edges), lower=True, percent=True))
    whole = speedups(vit[(vit["model"] == "vit_b_16") & (vit["precision"] == "fp32")])
    for batch, scope, target in ((1, "mlp", 1.9), (1, "all", 3.5), (8, "mlp", 1.9), (8, "all", 5.0)):
        cell = {"batch_size": batch, "scope": scope, "block_size": 64, "sparsity": AT}
        reached = _best(_ours(whole, CPU_BACKENDS, **cell))
        goals.append(Goal(_vit_case(batch, SCOPE_TITLES[scope], 64, AT), "the fastest dense engine", target, reached))
    roof = ceiling.loc[(ceiling["metric"] == "fma_throughput") & (ceiling["precision"] == "fp32"), "value"].dropna()
    for sparsity in (0.0, 0.5):
        rows = _cell(mlp[mlp["backend"] == "cpu"], tokens=1576, sparsity=sparsity, block_size=(16, 32, 64))
        share = linear_seconds(rows, float(roof.max()))["seconds"] / rows["value"] if len(roof) and len(rows) else None
        what = f"arithmetic of the kernel at {sparsity:.0%} sparsity, 1576 tokens, median"
        goals.append(Goal(what, "multiply-adds in registers", 0.75, _median(share), percent=True))
    return goals


def on_gpu(linear: pd.DataFrame, vit: pd.DataFrame, ceiling: pd.DataFrame) -> list[Goal]:
    """The goals of the backend ``triton``: ViT-B/16 at batch 256 and 1, single layers, and every other kernel.

    Args:
        linear: rows of the experiment ``linear`` of one device.
        vit: rows of the experiment ``vit``.
        ceiling: rows of the experiment ``ceiling``.
    """
    model = vit[vit["model"] == "vit_b_16"]
    eager, fastest = speedups(model, baseline="eager"), speedups(model)
    goals = []

    def end_to_end(rows: pd.DataFrame, precision: str, against: str, target: float, **cell: Any) -> None:
        key = {"batch_size": 256, "scope": "mlp", "sparsity": AT, **cell}
        ours = _ours(rows, GPU_BACKENDS, precision=precision, **key)
        case = f"{_vit_case(256, SCOPE_TITLES[key['scope']], key['block_size'], key['sparsity'])}, {precision}"
        goals.append(Goal(case, against, target, _best(ours)))

    for block, target in ((16, 1.9), (32, 2.1), (64, 2.2)):
        end_to_end(eager, "fp32", "dense fp32, TF32 off", target, block_size=block)
    for block in (16, 32, 64):
        ours = _ours(eager, GPU_BACKENDS, precision="fp32", batch_size=256, scope="mlp", block_size=block)
        case = f"break-even sparsity of ViT-B/16, batch 256, MLP, blocks of {block}, fp32"
        edge = _highest(_break_evens(fastest_of_each(ours, ["block_size", "sparsity"]).assign(backend="ours")))
        goals.append(Goal(case, "dense fp32, TF32 off", 0.3, edge, lower=True, percent=True))
    end_to_end(fastest, "tf32", "the fastest dense tf32", 1.5, block_size=64)
    for scope, sparsity, target in (("mlp", AT, 1.45), ("mlp+attention", AT, 1.8), ("mlp", 0.8, 1.25)):
        cell = {"scope": scope, "sparsity": sparsity, "block_size": 64}
        end_to_end(fastest, "bf16", "the fastest dense bf16", target, **cell)
    graphs = speedups(model[model["compile"] == "cudagraph"])
    for precision in ("bf16", "fp32"):
        ours = _ours(graphs, GPU_BACKENDS, precision=precision, batch_size=1, sparsity=AT)
        case = f"ViT-B/16, batch 1, 90%, {precision}, CUDA graph"
        goals.append(Goal(case, "dense, CUDA graph", 1.0, _best(ours)))
    for block, target in ((64, 0.75), (32, 0.65), (16, 0.5)):
        cell = {"model": "3072x768", "tokens": 50432, "precision": "bf16", "sparsity": AT, "block_size": block}
        rows = _cell(linear[linear["backend"] == "triton"], **cell)
        case = f"linear 3072x768, 50432 tokens, bf16, 90%, blocks of {block}"
        goals.append(Goal(case, "its bytes at copy bandwidth", target, _floor_share(rows, ceiling), percent=True))
    square = {"model": "8192x8192", "precision": "bf16", "sparsity": AT, "block_size": 64}
    over_tuned = _over_backend(linear, "triton", "torch_tuned", **square)
    goals.append(Goal("square 8192, bf16, 90%, blocks of 64", "PyTorch's BSR kernel, tuned", 1.5, _worst(over_tuned)))
    for other in BASELINES:
        ratios = _over_backend(linear, "triton", other)
        goals.append(Goal("every linear layer, worst cell", f"backend {other}", 1.0, _worst(ratios)))
    return goals


def text(goals: list[Goal]) -> str:
    """How many of the goals that were measured were reached, as a sentence."""
    measured = [goal for goal in goals if goal.met is not None]
    left = f"; {len(goals) - len(measured)} were not measured" if len(measured) < len(goals) else ""
    return f"{sum(goal.met for goal in measured)} of {len(measured)} goals were reached{left}."


def missed(goals: list[Goal]) -> Iterator[str]:
    """A Markdown line for each goal that was measured and not reached: by how much."""
    for goal in goals:
        if goal.met is False:
            yield f"- {goal.case}, against {goal.against}: {goal.text(goal.measured)} of {goal.text(goal.target)}"


def _vit_case(batch: int, scope: str, block: int, sparsity: float) -> str:
    return f"ViT-B/16, batch {batch}, {scope} at {sparsity:.0%}, blocks of {block}"


def _either(sizes: tuple[int, ...]) -> str:
    return " and ".join(str(size) for size in sizes)


def _cell(rows: pd.DataFrame, **cell: Any) -> pd.DataFrame:
    return where(rows, metric="latency", **cell)


def _ours(rows: pd.DataFrame, backends: tuple[str, ...], **cell: Any) -> pd.DataFrame:
    return _cell(rows, backend=backends, **cell)


def _over_backend(rows: pd.DataFrame, ours: str, other: str, **cell: Any) -> pd.Series:
    """Time of ``other`` over that of ``ours`` in the same group, newest of each cell."""
    rows = _cell(rows, compile="eager", **cell)
    theirs = rows.loc[rows["backend"] == other, ["group", "value"]].rename(columns={"value": "other"})
    pairs = newest(rows[rows["backend"] == ours].merge(theirs, on="group"))
    return pairs["other"] / pairs["value"]


def _break_evens(rows: pd.DataFrame, *, log: bool = False) -> list[float]:
    """Break-even sparsity of each line; 1 for a line that is never faster. Lines of one point tell nothing."""
    by = ["model", "backend", "block_size"]
    lines = [line for _, line in rows.groupby(by) if len(line) > 1]
    edges = [break_even(list(line["sparsity"]), list(line["speedup"]), log=log) for line in lines]
    return [1.0 if edge is None else edge for edge in edges]


def _floor_share(rows: pd.DataFrame, ceiling: pd.DataFrame) -> float | None:
    if rows.empty or not (ceiling["metric"] == "copy_bandwidth").any():
        return None
    moved = linear_seconds(rows, float("inf"))["bytes"]
    return _median(moved / bandwidth(ceiling) / rows["value"])


def _summary(how: Callable[[pd.Series], float], values: Any) -> float | None:
    values = pd.Series([] if values is None else values, dtype=float).dropna()
    return float(how(values)) if len(values) else None


def _highest(values: list[float]) -> float | None:
    return _summary(pd.Series.max, values)


def _median(values: pd.Series | None) -> float | None:
    return _summary(pd.Series.median, values)


def _worst(values: pd.DataFrame | pd.Series) -> float | None:
    return _summary(pd.Series.min, _speedup(values))


def _best(values: pd.DataFrame | pd.Series) -> float | None:
    return _summary(pd.Series.max, _speedup(values))


def _speedup(values: pd.DataFrame | pd.Series) -> pd.Series:
    return values["speedup"] if isinstance(values, pd.DataFrame) else values
