"""Notebook 6: the published claims and our own goals, device by device."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ..claims import OPEN, VERDICT, Verdict


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
