"""The claims as Markdown: for the README, for a notebook, and what they were decided from."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..comparisons import newest, newest_machines, where
from ..results import FAILED, Store
from .decisions import CLAIMS, TABLES, decide, devices
from .verdicts import (
    FAILS,
    HOLDS,
    HOLDS_BY_OURS,
    HOLDS_ON_CPU,
    LIFTED,
    OPEN,
    UNDECIDED,
    VERDICT,
    Verdict,
    emphasised,
)
from .wording import model_names

_COUNTED = {
    HOLDS: ("holds", "hold"),
    HOLDS_ON_CPU: ("holds on a CPU", "hold on a CPU"),
    HOLDS_BY_OURS: ("holds on a CPU through our kernel", "hold on a CPU through our kernel"),
    LIFTED: ("names a limit that is lifted here", "name limits that are lifted here"),
    FAILS: ("does not hold", "do not hold"),
    UNDECIDED: ("is not decided", "are not decided"),
    OPEN: ("is not measured here", "are not measured here"),
}


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


def readme(store: Store) -> str:
    """For the README: how many claims hold, and the short table."""
    decided = _on_newest_machines(store)
    return f"{_counted(decided)}\n\n{_table(decided)}"


def briefly(store: Store) -> str:
    """The claims as a short Markdown table, a row a claim: the verdict, and what it rests on.

    Of each processor only the newest machine that measured the claim.
    """
    return _table(_on_newest_machines(store))


def counted(store: Store) -> str:
    """How many of the claims hold, do not, or are open, and which; on the machines that ``briefly`` tells of.

    A claim that was measured nowhere is open; one that they decide differently counts with each.
    """
    return _counted(_on_newest_machines(store))


def _counted(decided: pd.DataFrame) -> str:
    measured = decided[decided["verdict"] != OPEN]
    ids = list(dict.fromkeys(decided["id"]))
    found = {
        verdict: [i for i in ids if (measured[measured["id"] == i]["verdict"] == verdict).any()] for verdict in _COUNTED
    }
    found[OPEN] = [i for i in ids if i not in set(measured["id"])]
    told = [
        f"{len(those)} {_COUNTED[verdict][len(those) > 1]} ({', '.join(those)})"
        for verdict, those in found.items()
        if those
    ]
    return f"Of {len(ids)} claims {', '.join(told)}." if told else "No claim is decided: the tables are empty."


def _on_newest_machines(store: Store) -> pd.DataFrame:
    """``decide(store)`` without older machines of a processor whose newer one has measured the claim as well."""
    decided, rows = decide(store), pd.concat([store.read(name)[["device", "date"]] for name in TABLES])
    kept = []
    for _, found in decided.groupby("id", sort=False):
        measured = found[found["verdict"] != OPEN]["device"]
        machines = newest_machines(where(rows, device=list(measured)))
        kept.append(found[(found["verdict"] == OPEN) | found["device"].isin(machines)])
    return pd.concat([*kept, decided[:0]])


def _table(decided: pd.DataFrame) -> str:
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
                cells = [name, experiment, model_names(rows), ", ".join(sorted(set(rows["precision"]) - {""}))]
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
