"""Tuned kernel parameters: one JSON file a GPU, for every backend that has parameters to tune.

``<folder>/<gpu>.json``, where the folder is ``tuned/`` beside this file or ``$BLOCKVIT_TUNED`` (an installation that
cannot be written, a test). A file is made to be read and committed: sorted, one entry a line.

    {"device": "NVIDIA H100 80GB HBM3",
     "backends": {"torch_tuned": [{"key": {"block_size": 64, "dtype": "bfloat16", ...},
                                   "parameters": {"num_warps": 4, ...}, "ms": 0.41, "default_ms": 0.63,
                                   "seconds": 48.0, "torch": "2.11.0", "triton": "3.6.0", "date": "..."}]}}

What a key and its parameters hold is the backend's own business; which entry fits a call, too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypedDict, TypeVar

import torch

from .. import files
from ..machine import versions

P, T = ParamSpec("P"), TypeVar("T")


class Entry(TypedDict):
    """One tuned case of a backend."""

    key: dict[str, Any]
    """What was tuned for: sizes, block size, dtype, sparsity; scalars only."""
    parameters: dict[str, int]
    """What the kernel is launched with."""
    ms: float
    """Median milliseconds with these parameters."""
    default_ms: float | None
    """Median milliseconds with the kernel's own defaults, measured beside it; None where it has none."""
    seconds: float
    """What the tuning took."""
    torch: str
    triton: str
    date: str


class TuningFileError(ValueError):
    """A file of tuned parameters that cannot be read as one."""


_remembered: list[Callable[..., Any]] = []


def remembered(look_up: Callable[P, T]) -> Callable[P, T]:
    """Remember what ``look_up`` answers by its arguments, until this process stores an entry; a decorator.

    A look-up takes longer than a small product.
    """
    cached = lru_cache(maxsize=4096)(look_up)
    _remembered.append(cached)
    return cached


def folder() -> Path:
    """Where the files lie: ``$BLOCKVIT_TUNED``, or ``tuned/`` in this package."""
    return Path(os.environ.get("BLOCKVIT_TUNED") or Path(__file__).parent / "tuned")


def path(device_name: str) -> Path:
    """The file of a GPU, which need not exist."""
    return folder() / f"{files.slug(device_name)}.json"


def key(
    out_features: int,
    in_features: int,
    tokens: int,
    block_size: int,
    dtype: torch.dtype,
    nnz: int,
    precision: str = "ieee",
) -> dict[str, Any]:
    """What parameters of a linear layer depend on. Sizes are the padded ones, ``nnz`` the number of stored blocks."""
    blocks = out_features * in_features / block_size**2
    return {
        "block_size": block_size,
        "dtype": "tf32" if precision == "tf32" else str(dtype).removeprefix("torch."),
        "in_features": in_features,
        "out_features": out_features,
        "sparsity": round(1 - nnz / blocks, 2),
        "tokens": tokens,
    }


def entries(device: torch.device, backend: str) -> list[Entry]:
    """What is kept of ``backend`` for ``device``."""
    return load(device_name(device)).get(backend, [])


def device_name(device: torch.device) -> str:
    """The name that a device's entries are kept under: the GPU's, or ``"cpu"``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load(device_name: str) -> dict[str, list[Entry]]:
    """Every backend's entries for a GPU, empty if nothing was tuned on one; not to be changed.

    Raises:
        TuningFileError: there is a file, but not with such content.
    """
    file = path(device_name)
    try:
        status = file.stat()
    except FileNotFoundError:
        return {}
    return _read(file, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=16)
def _read(file: Path, *version: int) -> dict[str, list[Entry]]:
    try:
        backends = json.loads(file.read_text(encoding="utf-8"))["backends"]
        for entries in backends.values():
            for entry in entries:
                _check(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuningFileError(
            f"{file} holds no tuned parameters ({type(error).__name__}: {error}); expected JSON with 'backends', each "
            "a list of entries with 'key' and 'parameters'. Remove it, or restore it from git, and tune again"
        ) from error
    return backends


def _check(entry: Any) -> None:
    for part in ("key", "parameters"):
        if not isinstance(entry[part], dict):
            raise TypeError(f"{part!r} is {entry[part]!r}, not an object")


def find(device_name: str, backend: str, key: Mapping[str, Any]) -> Entry | None:
    """The entry with exactly this key."""
    return next((entry for entry in load(device_name).get(backend, []) if entry["key"] == dict(key)), None)


def nearest(entries: Iterable[Entry], key: Mapping[str, Any]) -> Entry | None:
    """The entry with this key, or the nearest of its block size and dtype; None if there is none of these.

    Keys hold ``block_size``, ``dtype``, ``out_features``, ``in_features``, ``sparsity`` and ``tokens``. An entry of the
    same shape is nearer than any other; then the nearest sparsity, number of tokens and shape.
    """

    def distance(entry: Entry) -> tuple[float, ...]:
        other = entry["key"]
        out_ratio, in_ratio, tokens_ratio = (
            abs(math.log(other[name] / key[name])) for name in ("out_features", "in_features", "tokens")
        )
        apart = out_ratio + in_ratio
        return apart > 0, round(abs(other["sparsity"] - key["sparsity"]), 4), tokens_ratio, apart

    alike = [e for e in entries if all(e["key"][name] == key[name] for name in ("block_size", "dtype"))]
    return min(alike, key=distance, default=None)


def store(
    device_name: str,
    backend: str,
    key: Mapping[str, Any],
    parameters: Mapping[str, int],
    *,
    ms: float,
    default_ms: float | None = None,
    seconds: float,
) -> Entry:
    """Write an entry, in place of the one with the same key, and return it.

    The file is replaced as a whole, under a lock on its folder: a reader sees the old or the new one, and processes
    that store at the same time lose nothing of each other's.

    Raises:
        TuningFileError: the file that is there is damaged; it is left as it is.
        OSError: the folder cannot be written; the message names ``$BLOCKVIT_TUNED``.
    """
    entry: Entry = {
        "key": dict(key),
        "parameters": dict(parameters),
        "ms": round(ms, 5),
        "default_ms": None if default_ms is None else round(default_ms, 5),
        "seconds": round(seconds, 1),
        **versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    file = path(device_name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(file.parent):
            backends = dict(load(device_name))
            others = [other for other in backends.get(backend, []) if other["key"] != entry["key"]]
            backends[backend] = [*others, entry]
            files.write(file, _text(device_name, backends))
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; set $BLOCKVIT_TUNED to a folder that can be written", str(file)
        ) from error
    for look_up in _remembered:
        look_up.cache_clear()
    return entry


def _text(device_name: str, backends: Mapping[str, list[Entry]]) -> str:
    """The file's content: JSON with a line for each entry, in the order of backends and keys."""
    blocks = []
    for backend in sorted(backends):
        entries = sorted(
            backends[backend], key=lambda entry: sorted((k, str(v).zfill(9)) for k, v in entry["key"].items())
        )
        lines = ",\n".join(
            "      " + json.dumps({**entry, "key": dict(sorted(entry["key"].items()))}) for entry in entries
        )
        blocks.append(f"    {json.dumps(backend)}: [\n{lines}\n    ]")
    return f'{{\n  "device": {json.dumps(device_name)},\n  "backends": {{\n' + ",\n".join(blocks) + "\n  }\n}\n"
