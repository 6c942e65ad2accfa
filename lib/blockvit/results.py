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
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from . import checkout
from .files import is_full, locked, slug

KEYS = [
    "experiment",  # linear | mlp | attention | vit | accuracy | training | masks | training_step | ceiling | conversion
    "device",  # the processor's name, with its number of cores if a CPU
    "threads",  # CPU threads used; empty on a GPU
    "torch",
    "triton",
    "dataset",
    "model",  # a model's name, OUTxIN for a single linear layer, or HEADSxSIZE for attention
    "scope",  # which layers are sparse: linear | mlp | mlp+attention | ...
    "dtype",
    "precision",  # fp32 | tf32 | bf16 | fp16 | int8
    "batch_size",
    "tokens",  # rows that a linear layer multiplies, for ViT-B/16 197 an image; of attention, those of one image
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

FAILED = "failed"
"""The metric of what was tried and could not be measured: it raised, or was not close to the dense result."""

OF_ANY_DEVICE = ("accuracy", "training", "masks")
"""Experiments that tell of what was trained: the device has no part in it, but for rounding."""

STEP_SECONDS, IMAGES_PER_SECOND = "step_seconds", "images_per_second"
"""Metrics of a training step: forward, backward and optimiser."""

UNPRUNED = "none"
"""The scope of a model of which nothing is sparse: the dense one, wholly on our kernels."""

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
        self.root = Path(root or os.environ.get("BLOCKVIT_RESULTS") or checkout.root() / "data" / "results").resolve()

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
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        stamp = {"run": self.run, "git_sha": checkout.commit(), "date": now}
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
