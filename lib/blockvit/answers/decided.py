"""Notebook 6: the published claims and our own goals, device by device."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ..claims import FAILS, HOLDS, HOLDS_ON_CPU, LIFTED, OPEN, UNDECIDED, VERDICT, Verdict

_COUNTED = {
    HOLDS: ("holds", "hold"),
    HOLDS_ON_CPU: ("holds on a CPU", "hold on a CPU"),
    LIFTED: ("is a limit no longer", "are limits no longer"),
    FAILS: ("does not hold", "do not hold"),
    UNDECIDED: ("is not decided", "are not decided"),
    OPEN: ("is not measured here", "are not measured here"),
}


def verdicts(decided: pd.DataFrame) -> str:
    """How many of the claims hold, do not, or are open, and which; ``decided`` is as of ``claims.decide``.

    A claim that was measured nowhere is open; one that devices decide differently counts with each.
    """
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


def claims_list(decided: pd.DataFrame) -> str:
    """What each claim that was measured rests on, as a Markdown list: by device, and once where devices agree."""
    lines = []
    for claim_id, every in decided.groupby("id", sort=False):
        rows, text = every[every["verdict"] != OPEN], every["claim"].iloc[0]
        if rows.empty:
            continue
        told = [str(Verdict(*row)) for row in rows[VERDICT].itertuples(index=False)]
        lines.append(f"- {claim_id}. *{text}*")
        if len(set(told)) == 1:
            lines.append(f"    - {' and '.join(rows['device'])}: {told[0]}")
        else:
            lines += [f"    - {device}: {one}" for device, one in zip(rows["device"], told, strict=True)]
    return "\n".join(lines)


def goals_by_device(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The same goals on several devices in one table: a column a device, what was measured and whether it suffices.

    ``tables`` are as of ``goals.table``, by device.
    """
    key = ["case", "against", "target"]
    columns = {}
    for device, table in tables.items():
        measured = table.set_index(key)[["measured", "reached"]]
        columns[device] = (
            measured["measured"].where(measured["measured"] == "", measured["measured"] + ": ") + measured["reached"]
        )
    return pd.DataFrame(columns).reset_index() if columns else pd.DataFrame(columns=key)
