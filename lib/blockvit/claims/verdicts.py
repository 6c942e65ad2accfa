"""What can be said of a claim."""

from __future__ import annotations

from dataclasses import dataclass, fields

HOLDS, FAILS, OPEN, UNDECIDED = "holds", "does not hold", "not measured here", "not decided"
"""The last two: nothing was measured in the way that the claim is about; it was, but it is no ground to decide on."""

HOLDS_ON_CPU, HOLDS_BY_OURS = "holds on a CPU", "holds on a CPU, through our kernel"
"""Of C7, for no other hardware than a CPU stands in for a device; the first where PyTorch's kernels are faster, too."""

LIFTED = "no longer so"
"""Of C11, a limit that this library has not."""

NEAR = 0.95  # a published speedup counts as reached from this share of it on: run to run noise


@dataclass(frozen=True)
class Verdict:
    """What the tables say of a claim on one device.

    ``number`` decides, ``ours`` tells of the best backend, ``others`` of both in the other precision classes. ``brief``
    is what the README says of all that, in a dozen words.
    """

    verdict: str
    number: str = ""
    ours: str = ""
    others: str = ""
    brief: str = ""

    def __str__(self) -> str:
        parts = [emphasised(self.verdict), self.number, self.ours, self.others]
        return "; ".join(part for part in parts if part)


def emphasised(verdict: str) -> str:
    """A verdict as the tables show it: what was decided stands out."""
    return verdict if verdict in (OPEN, UNDECIDED) else f"**{verdict}**"


NOT_MEASURED = Verdict(OPEN)
VERDICT = [field.name for field in fields(Verdict)]
