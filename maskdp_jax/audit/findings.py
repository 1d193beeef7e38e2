"""What an audit says: one line a check, with what was checked, what was found and what is claimed."""

import dataclasses

CONFIDENCE = 0.95
"""Of every lower bound on ε: a sound run exceeds its claim with probability at most 1 - CONFIDENCE."""

FALSE_ALARM = 1e-3
"""Probability that a sound run fails any of the law tests of an audit; shared out among them by Bonferroni."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: what should hold.
        holds: whether it does.
        found: what was measured.
        claimed: what it is compared with.
        private: computed from private layers: it must not leave the lab.
    """

    check: str
    holds: bool
    found: str
    claimed: str = ""
    private: bool = False

    def __post_init__(self):
        object.__setattr__(self, "holds", bool(self.holds))


def failed(findings) -> list[str]:
    """Names of the checks that do not hold."""
    return [finding.check for finding in findings if not finding.holds]
