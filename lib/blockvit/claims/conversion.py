"""The claim of folding and conversion: C10."""

from __future__ import annotations

import pandas as pd

from ..comparisons import where
from .evidence import Evidence
from .verdicts import FAILS, HOLDS, NOT_MEASURED, Verdict
from .wording import model_names


def c10(e: Evidence) -> Verdict:
    """Folding changes nothing; conversion is done once and cached."""
    metrics = ("fold_difference", "load_difference", "convert_seconds", "load_seconds")
    fold, load, convert, read = (where(e.conversion, metric=metric) for metric in metrics)
    if any(rows.empty for rows in (fold, load, convert, read)):
        return NOT_MEASURED
    same = (pd.concat([fold, load])["value"] == 0).all()  # one model that folding changes refutes the claim
    converted, loaded = (rows["value"].median() for rows in (convert, read))
    took = f"{model_names(convert)} converted in {converted:.2f} s, loaded in {loaded:.2f} s"
    return Verdict(
        HOLDS if same else FAILS,
        f"largest change of a logit of {model_names(fold)} by folding {fold['value'].max():.3g}, by saving and loading "
        f"{load['value'].max():.3g}; {took}",
        brief=f"folding, saving and loading change {'no logit' if same else 'logits'} of {model_names(fold)}; {took}",
    )
