"""The claims C1 to C11 of the blog post, decided from the tables: per device, with the number that decides.

A claim is decided like for like, as the post measured it: PyTorch's BSR kernels against eager dense PyTorch in the
same precision, which is fp32 but for C3. Beside it stands the best backend there is against the fastest dense variant
measured with it, and the same numbers in the other precision classes measured. What the post says of speed it says of
an A100: a CPU's numbers are told and decide nothing (``decisions.OF_GPUS``), but for C7, a conjecture about other
hardware that the post did not measure: the best backend decides it. What the tables do not hold is "not measured here".

- ``evidence``: a device's rows as the claims read them. ``verdicts``: what can be said of a claim. ``wording``: words.
- ``linears`` (C1, C2, C3, C11), ``models`` (C4 to C7), ``accuracy`` (C8, C9), ``conversion`` (C10): a function a claim.
- ``decisions``: all claims on all devices. ``pages``: the tables of README and notebook.
"""

from ..losses import LIMITED_LOSS, SMALL_LOSS
from .decisions import CLAIMS, decide, devices
from .evidence import Evidence
from .pages import briefly, counted, coverage, markdown, readme
from .verdicts import (
    FAILS,
    HOLDS,
    HOLDS_BY_OURS,
    HOLDS_ON_CPU,
    LIFTED,
    NEAR,
    NOT_MEASURED,
    OPEN,
    UNDECIDED,
    VERDICT,
    Verdict,
)

__all__ = [
    "CLAIMS",
    "FAILS",
    "HOLDS",
    "HOLDS_BY_OURS",
    "HOLDS_ON_CPU",
    "LIFTED",
    "LIMITED_LOSS",
    "NEAR",
    "NOT_MEASURED",
    "OPEN",
    "SMALL_LOSS",
    "UNDECIDED",
    "VERDICT",
    "Evidence",
    "Verdict",
    "briefly",
    "counted",
    "coverage",
    "decide",
    "devices",
    "markdown",
    "readme",
]
