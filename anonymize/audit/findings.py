"""`Finding`: one line of the audit; and intervals of confidence."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: what was checked, with the bound where there is one.
        holds: whether the bound was kept; None for a figure without a bound.
        seen: what was seen, in words.
        figures: the same as numbers.
    """

    check: str
    holds: bool | None
    seen: str
    figures: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


def interval(values: Sequence[float], groups: Sequence, seed: int = 0, draws: int = 2000) -> Interval:
    """Mean of the values and its 95 % percentile interval, by a bootstrap that draws whole groups.

    Values of one group (the clips of one person) are not independent of each other; those of two groups are.
    """
    values = np.asarray(values, float)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))
