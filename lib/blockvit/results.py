"""The tidy tables: one row a measurement, one file a device, appended as soon as something is measured.

``<root>/<experiment>/<device>.csv``, columns ``COLUMNS``. Rows that are to be compared with each other were measured
interleaved and share a ``group``; ``run`` names the working copy that measured them, so that a rerun in the same copy
continues while a fresh clone measures everything itself. Appending is one locked write: several processes may append
to one table, and a killed one leaves whole rows behind.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import subprocess
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .files import is_full, locked, slug

KEYS = [
    "experiment",  # linear | mlp | vit | accuracy | training | masks | training_step | ceiling | conversion
    "device",  # the processor's name, with its number of cores if a CPU
    "threads",  # CPU threads used; empty on a GPU
    "torch",
    "triton",
    "dataset",
    "model",  # a model's name, or OUTxIN for a single linear layer
    "scope",  # which layers are sparse: linear | mlp | mlp+attention | ...
    "dtype",
    "precision",  # fp32 | tf32 | bf16 | fp16 | int8
    "batch_size",
    "tokens",  # rows that a linear layer multiplies; for ViT-B/16, 197 an image
    "block_size",
    "sparsity",
    "backend",  # dense | torch | gather | ...
    "compile",  # eager, or how it was compiled
    "seed",
    "epoch",
    "recipe",  # of a training: the data set's, and what was changed in it
    "metric",
]
COLUMNS = [*KEYS, "value", "low", "high", "unit", "repeats", "run", "group", "git_sha", "date"]
"""``value`` is the median, ``low`` and ``high`` the 20th and 80th percentile of ``repeats`` measurements."""

_SAME = [column for column in KEYS if column not in ("torch", "triton")]  # what is measured, whatever with

FAILED = "failed"
"""The metric of what was tried and could not be measured: it raised, or was not close to the dense result."""

OF_ANY_DEVICE = ("accuracy", "training", "masks")
"""Experiments that tell of what was trained: the device has no part in it, but for rounding."""

STEP_SECONDS, IMAGES_PER_SECOND = "step_seconds", "images_per_second"
"""Metrics of a training step: forward, backward and optimiser."""

SCOPE_TITLES = {"mlp": "MLP", "mlp+attention": "MLP and projections", "all": "all linear layers"}
"""How prose and figures call what of a model is sparse; others bear the name that the tables give them."""

NUMBERS = [
    "threads",
    "batch_size",
    "tokens",
    "block_size",
    "sparsity",
    "seed",
    "epoch",
    "value",
    "low",
    "high",
    "repeats",
]


class Store:
    """The tables below one folder.

    Args:
        root: the folder; None means ``$BLOCKVIT_RESULTS`` or, without it, ``data/results`` of this repository.
    """

    def __init__(self, root: str | os.PathLike | None = None) -> None:
        self.root = Path(root or os.environ.get("BLOCKVIT_RESULTS") or repository() / "data" / "results").resolve()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    @property
    def run(self) -> str:
        """The id of this working copy's run, made at first use and kept in ``<root>/.run``."""
        path = self.root / ".run"
        with _writable(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                # Linked into place whole: who finds the file, finds the id in it, however many start at once.
                draft = path.with_name(f".run.{uuid.uuid4().hex}")
                try:
                    draft.write_text(uuid.uuid4().hex[:8])
                    with suppress(FileExistsError):
                        path.hardlink_to(draft)
                finally:
                    draft.unlink(missing_ok=True)
        return path.read_text().strip()

    def path(self, experiment: str, device: str) -> Path:
        """The file that holds an experiment's rows from one device."""
        return self.root / experiment / f"{slug(device)}.csv"

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``rows`` behind their tables, with run, commit and date filled in; all rows of a table in one write.

        Raises:
            ValueError: a row has an unknown column or lacks experiment, device, metric or value.
            OSError: the folder cannot be written or the disk is full; the table is as it was before.
        """
        stamp = {"run": self.run, "git_sha": git_sha(), "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        tables: dict[Path, list[dict[str, Any]]] = {}
        for row in rows:
            unknown = sorted(set(row) - set(COLUMNS))
            missing = [c for c in ("experiment", "device", "metric", "value") if row.get(c) in (None, "")]
            if unknown or missing:
                raise ValueError(f"a result row has unknown columns {unknown} and lacks {missing}; see results.COLUMNS")
            tables.setdefault(self.path(row["experiment"], row["device"]), []).append({**row, **stamp})
        with _writable(self.root):
            for path, table in tables.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                _append(path, table)

    def read(self, experiment: str, *, device: str | None = None, run: str | None = None) -> pd.DataFrame:
        """All rows of an experiment, from every device (or one) and every run (or one), oldest first.

        Always has all columns; empty if nothing was measured. Rows cut short by a full disk or a pulled plug are left
        out with a warning.
        """
        files = sorted((self.root / experiment).glob("*.csv"))
        tables = [table for path in files if (table := _read(path)) is not None and len(table)]
        rows = pd.concat(tables, ignore_index=True) if tables else _typed(pd.DataFrame(columns=COLUMNS, dtype=str))
        if device is not None:
            rows = rows[rows["device"] == device]
        if run is not None:
            rows = rows[rows["run"] == run]
        return rows.sort_values("date", kind="stable").reset_index(drop=True)

    def measured(self, experiment: str, device: str) -> Measured:
        """What this working copy's run has measured already."""
        return Measured(self.read(experiment, device=device, run=self.run))


class Measured:
    """A set of keys, to ask whether a measurement is there; see ``Store.measured``."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._groups: dict[tuple[str, ...], set[str]] = {}
        for row in rows[[*KEYS, "group"]].to_dict("records"):
            self._groups.setdefault(_key(row), set()).add(row["group"])

    @classmethod
    def none(cls) -> Measured:
        """Nothing measured yet."""
        return cls(pd.DataFrame(columns=[*KEYS, "group"]))

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return _key(row) in self._groups

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """From now on ``rows`` count as measured, together."""
        group = new_group()
        for row in rows:
            self._groups.setdefault(_key(row), set()).add(group)

    def together(self, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Whether one group holds all of ``rows``: only then were they measured to be compared.

        What was tried in the group and failed counts as measured.
        """
        groups = [
            self._groups.get(_key(row), set()) | self._groups.get(_key({**row, "metric": FAILED}), set())
            for row in rows
        ]
        return bool(groups and set.intersection(*groups))


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_text(row.get(column)) for column in KEYS)


def _text(value: Any) -> str:
    """A value as the tables write it: nothing for None and NaN, numbers in their shortest form."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.10g}"
    return " ".join(str(value).splitlines())  # a row is a line


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise PermissionError(
            f"cannot write results to {root} ({error.strerror}); make it writable, or {_ANOTHER_FOLDER}"
        ) from error
    except OSError as error:
        remedy = "free some space" if is_full(error) else _ANOTHER_FOLDER
        raise OSError(
            error.errno,
            f"results were not written to {root} ({error.strerror}); rows written before are intact: "
            f"{remedy} and run again, what is missing will be measured",
        ) from error


_ANOTHER_FOLDER = "name another folder with the results_dir parameter or $BLOCKVIT_RESULTS"


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([_text(row.get(column)) for column in COLUMNS] for row in rows)
    header = ",".join(COLUMNS) + "\n"
    while True:
        with locked(path) as file:
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # set aside by another process between open and lock
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            if end and file.readline().decode(errors="replace") != header:
                _set_aside(path)
                continue
            text = buffer.getvalue() if end else header + buffer.getvalue()
            if end and not _ends_in_newline(file):
                text = "\n" + text  # a row cut short stays alone on its line, where the reader leaves it out
            _write_whole(file, text.encode(), end)
            return


def _ends_in_newline(file: io.FileIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _write_whole(file: io.FileIO, data: bytes, end: int) -> None:
    """Write ``data`` at the end of the file or, if the disk does not take all of it, leave the file as it was."""
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def _set_aside(path: Path) -> None:
    kept = path.with_name(f"{path.stem}.foreign-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.csv.bak")
    path.rename(kept)
    warnings.warn(
        f"{path} has another header than this version writes; it is kept as {kept.name} and a new table begins",
        stacklevel=5,
    )


def _read(path: Path) -> pd.DataFrame | None:
    with locked(path, shared=True) as file:
        lines = file.read().decode(errors="replace").splitlines()  # a cut may go through a character
    if not lines:
        return None  # just made, or emptied again because the disk was full
    # Line by line: the open quote of a row cut short must not swallow the rows behind it.
    records = [next(csv.reader([line]), []) for line in lines]
    if records[0] != COLUMNS:
        warnings.warn(f"{path} has a header that this version does not know; its rows are left out", stacklevel=3)
        return None
    whole = [r for r in records[1:] if len(r) == len(COLUMNS) and r[-1].endswith("Z")]  # Z ends the date, and the row
    if len(whole) < len(records) - 1:
        warnings.warn(f"{path}: {len(records) - 1 - len(whole)} incomplete rows left out", stacklevel=3)
    return _typed(pd.DataFrame(whole, columns=COLUMNS, dtype=str))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(**{c: pd.to_numeric(table[c], errors="coerce").astype(float) for c in NUMBERS})


def new_group() -> str:
    """An id for a group of measurements that were interleaved and may be compared."""
    return uuid.uuid4().hex[:8]


def speedups(rows: pd.DataFrame, *, baseline: str = "fastest") -> pd.DataFrame:
    """Speed of each sparse latency row over the dense one of its own group, one measurement of each kind only.

    Of several in a run that counts which is beside the most dense variants, or over eager dense PyTorch beside the
    fewest, whose threads disturb it least; of these the one of the most repeats; and at last the newest.

    Args:
        rows: rows with ``metric == "latency"`` among them, as ``Store.read`` gives them.
        baseline: ``"fastest"``, the fastest dense variant of the group, or ``"eager"``, dense PyTorch as it comes.

    Returns:
        The sparse rows with ``speedup`` (dense time / sparse time), its range ``speedup_low`` to ``speedup_high``
        (dense 20th over sparse 80th percentile and the reverse), ``dense_value``, ``dense_compile``, and how many
        dense variants the group has, ``dense_variants``.
    """
    if baseline not in ("fastest", "eager"):
        raise ValueError(f"baseline is {baseline!r}; expected 'fastest' or 'eager'")
    latency = rows[(rows["metric"] == "latency") & (rows["group"] != "")]  # without a group: not to be compared
    is_dense = latency["backend"] == "dense"
    on = ["experiment", "group", "precision"]
    dense = latency[is_dense].assign(dense_variants=latency[is_dense].groupby(on)["compile"].transform("nunique"))
    dense = dense[dense["compile"] == "eager"] if baseline == "eager" else dense
    dense = dense.sort_values("value").drop_duplicates(on)
    columns = {"value": "dense_value", "low": "dense_low", "high": "dense_high", "compile": "dense_compile"}
    pairs = latency[~is_dense].merge(dense[[*on, "dense_variants", *columns]].rename(columns=columns), on=on)
    pairs = pairs.assign(
        speedup=pairs["dense_value"] / pairs["value"],
        speedup_low=pairs["dense_low"] / pairs["high"],
        speedup_high=pairs["dense_high"] / pairs["low"],
    )
    for column, most in (("dense_variants", "max" if baseline == "fastest" else "min"), ("repeats", "max")):
        wanted = pairs.groupby([*_SAME, "run"], dropna=False)[column].transform(most)
        pairs = pairs[(pairs[column] == wanted) | wanted.isna()]
    return newest(pairs)


def over_strongest_field(speedups: pd.DataFrame) -> pd.DataFrame:
    """Of each cell the rows over the most dense variants: beside a weaker field a variant must not win by its weakness.

    ``speedups`` are as the function of that name returns them; a cell is what is computed, on one device.
    """
    cell = ["device", "precision", "model", "scope", "tokens", "batch_size", "block_size", "sparsity"]
    most = speedups.groupby(cell, dropna=False)["dense_variants"].transform("max")
    return speedups[speedups["dense_variants"] == most]


def step_overheads(rows: pd.DataFrame) -> pd.DataFrame:
    """How much longer each masked training step takes than the dense one of its own group, run in the same way.

    Args:
        rows: of experiment ``training_step``, as ``Store.read`` gives them.

    Returns:
        The masked rows of ``STEP_SECONDS``, newest of each kind, with ``overhead`` (masked time / dense time - 1), its
        range ``overhead_low`` to ``overhead_high`` (20th over dense 80th percentile and the reverse), ``dense_value``.
    """
    steps = rows[(rows["metric"] == STEP_SECONDS) & (rows["group"] != "")]
    is_dense, on = steps["backend"] == "dense", ["group", "compile"]
    columns = {"value": "dense_value", "low": "dense_low", "high": "dense_high"}
    pairs = steps[~is_dense].merge(steps.loc[is_dense, [*on, *columns]].rename(columns=columns), on=on)
    pairs = pairs.assign(
        overhead=pairs["value"] / pairs["dense_value"] - 1,
        overhead_low=pairs["low"] / pairs["dense_high"] - 1,
        overhead_high=pairs["high"] / pairs["dense_low"] - 1,
    )
    return newest(pairs)


def break_even(sparsity: Sequence[float], speedup: Sequence[float], *, log: bool = False) -> float | None:
    """Lowest sparsity from which on the speedup stays above 1, interpolated between measured points.

    None if it is not above 1 at the highest sparsity; the lowest measured sparsity if it is above 1 everywhere.

    Args:
        sparsity: in any order.
        speedup: over dense, for each sparsity.
        log: interpolate the speedup's logarithm: the place where a line drawn on a logarithmic axis crosses 1. Without
            it the speedup itself is interpolated, which is where a line on a linear axis does, and what the published
            break-even sparsities are compared with. Both lie between the same two measured points.
    """
    order = np.argsort(sparsity)
    s, v = np.asarray(sparsity, dtype=float)[order], np.asarray(speedup, dtype=float)[order]
    if not len(v) or v[-1] <= 1:
        return None
    below = np.flatnonzero(v <= 1)
    if not len(below):
        return float(s[0])
    i = below[-1]
    height = np.log(v) if log else v - 1  # above break-even
    return float(s[i] - height[i] / (height[i + 1] - height[i]) * (s[i + 1] - s[i]))


def dense_throughput(rows: pd.DataFrame) -> pd.Series:
    """FLOP/s of each linear layer as if it were dense: ``2 * out * in * tokens`` over its latency."""
    out_in = rows["model"].str.split("x", expand=True).astype(float)
    return 2 * out_in[0] * out_in[1] * rows["tokens"] / rows["value"]


def newest(rows: pd.DataFrame, ignore: Sequence[str] = ()) -> pd.DataFrame:
    """Of rows that measure the same thing (any version, any run), the last one; order kept otherwise.

    Rows that differ only in the key columns of ``ignore`` count as the same, too.
    """
    same = [column for column in _SAME if column not in ignore]
    return rows.sort_values("date", kind="stable").drop_duplicates(same, keep="last").reset_index(drop=True)


def fullest_group(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the newest run's group with the most latencies; of several, the most repeats, and then the newest.

    For tables and figures of times: what stands side by side there was timed in turn.
    """
    latency = rows[(rows["metric"] == "latency") & (rows["group"] != "")]
    if latency.empty:
        return latency
    latency = latency[latency["run"] == latency.sort_values("date", kind="stable")["run"].iloc[-1]]
    groups = latency.groupby("group").agg(size=("value", "size"), repeats=("repeats", "max"), date=("date", "max"))
    return rows[rows["group"] == groups.sort_values(["size", "repeats", "date"]).index[-1]]


def variant(row: pd.Series) -> str:
    """What computed a row: its backend, and how it was run unless that was eagerly: ``cpu``, ``cpu with compile``."""
    return row.backend if row.compile == "eager" else f"{row.backend} with {row.compile}"


def most_threads(rows: pd.DataFrame) -> pd.DataFrame:
    """Of CPU rows those of the largest number of threads, which is what a device is judged by; GPU rows all."""
    return rows[rows["threads"].isna() | (rows["threads"] == rows["threads"].max())]


def published(repo: Path | None = None) -> pd.DataFrame:
    """The published numbers, with their sources: ``data/reference/published_results.csv``."""
    return pd.read_csv((repo or repository()) / "data" / "reference" / "published_results.csv")


def published_losses() -> pd.DataFrame:
    """Published points of ImageNet top-1 lost against dense: ``source, block_size, sparsity, lost``.

    Each loss is against the dense accuracy that the same source gives.
    """
    top1 = published()
    top1 = top1[top1["metric"] == "top1"]
    imagenet = top1[top1["note"].fillna("").str.contains("ImageNet")]
    dense = imagenet[imagenet["scope"] == "dense"].set_index("source")["value"]
    sparse = imagenet[imagenet["block_size"].notna()]
    lost = sparse["source"].map(dense) - sparse["value"]
    return sparse.assign(lost=lost)[["source", "block_size", "sparsity", "lost"]].reset_index(drop=True)


def published_speedups() -> pd.DataFrame:
    """Published speedups over dense, those that follow from two published latencies included.

    A latency's speedup is over the dense latency that the same source gives for the same device, model, dtype and batch
    size; a latency without such a partner (int8) is left out. ``note`` says which are derived.

    Returns:
        ``source, device, model, precision, batch_size, scope, block_size, sparsity, value, note``; ``block_size`` is
        NaN for 2:4 sparsity, whose ``scope`` is ``"2:4"``, and where the source does not give it.
    """
    reference = published()
    stated = reference[reference["metric"] == "speedup"]
    latency = reference[reference["metric"] == "latency"]
    same = ["source", "device", "model", "dtype", "batch_size"]
    dense = latency.loc[latency["scope"] == "dense", [*same, "value"]].rename(columns={"value": "dense"})
    pairs = latency[latency["scope"] != "dense"].merge(dense, on=same)
    notes = [
        f"{note}; {dense:g} ms dense / {value:g} ms sparse"
        for note, dense, value in zip(pairs["note"], pairs["dense"], pairs["value"], strict=True)
    ]
    derived = pairs.assign(value=pairs["dense"] / pairs["value"], note=notes)
    rows = pd.concat([stated, derived], ignore_index=True)
    rows = rows.assign(precision=rows["dtype"].map({"float32": "fp32", "bfloat16": "bf16"}))
    what = ["source", "device", "model", "precision", "batch_size", "scope", "block_size", "sparsity"]
    return rows[[*what, "value", "note"]]


def repository() -> Path:
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
def git_sha() -> str:
    """Short hash of the repository's commit, with ``+`` behind it if tracked code differs; empty outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", "lib", "notebooks/*.ipynb", "notebooks/profiles"
        )
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
