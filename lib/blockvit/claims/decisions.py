"""The claims by name, and what each device decides of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, replace

import pandas as pd

from ..results import OF_ANY_DEVICE, Store
from .accuracy import c8, c9
from .conversion import c10
from .evidence import Evidence
from .linears import c1, c2, c3, c11
from .models import c4, c5, c6, c7
from .verdicts import FAILS, HOLDS, UNDECIDED, VERDICT, Verdict

TABLES = ("linear", "vit", "accuracy", "conversion")  # what the claims are decided from

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
