"""Law tests: do the releases of a rehearsal follow the stated law, and its batches the stated sampler?

Each test is exact or conservative for the law that is claimed. All of them together fail a sound run with probability
at most `FALSE_ALARM`, whatever their number (Bonferroni).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from maskdp_jax.audit.canaries import Rehearsed
from maskdp_jax.audit.findings import FALSE_ALARM, Finding
from maskdp_jax.mechanism import MASKED

_ROUNDING = 1e-3  # of C: by how much float32 sums of many terms may miss their mean


class _Test(NamedTuple):
    """A named p-value."""

    check: str
    p_value: float
    found: str
    claimed: str


def laws(rehearsed: Rehearsed) -> list[Finding]:
    """All law tests of one rehearsal."""
    tests = [*_noise(rehearsed), *_canaries(rehearsed), *_sampler(rehearsed)]
    level = FALSE_ALARM / len(tests)
    return [
        *(
            Finding(
                t.check,
                t.p_value >= level,
                f"{t.found} (p = {t.p_value:.2g})",
                f"{t.claimed}; fails at p < {level:.1g}",
            )
            for t in tests
        ),
        Finding(
            "every device holds the same release",
            rehearsed.devices == 0,
            f"largest difference {rehearsed.devices:.2g} C",
            "none",
        ),
    ]


def _noise(rehearsed: Rehearsed) -> Iterator[_Test]:
    """Residuals off the canaries' coordinates: variance, centre, shape and independence."""
    quiet = np.ones(len(rehearsed.leaves), bool)
    quiet[rehearsed.places] = False
    noise, leaves = rehearsed.residuals[:, quiet].astype(np.float64), rehearsed.leaves[quiet]
    steps, width = noise.shape
    squares = float(np.sum(noise**2))
    yield _Test(
        "the noise has the stated variance",
        _two_sided(stats.chi2(noise.size), squares),
        f"{squares / noise.size:.4f} × the stated one over {noise.size} numbers",
        "1 (χ²)",
    )
    mean = noise.mean(axis=0)
    yield _Test(
        "the noise is centred at every coordinate",
        _two_sided(stats.chi2(width), steps * float(np.sum(mean**2))),
        f"mean square of {width} means over {steps} steps {np.mean(mean**2):.2g}",
        f"{1 / steps:.2g} (χ²)",
    )
    size = rehearsed.private.sum(axis=1) - rehearsed.private.sum(axis=1).mean()
    if size.any():
        power = (np.sum(noise**2, axis=1) - width) / np.sqrt(2 * width)
        slope = float(power @ size / np.linalg.norm(size))
        yield _Test(
            "the noise does not depend on the size of the batch drawn",
            float(2 * stats.norm.sf(abs(slope))),
            f"{slope:.2f} standard errors of the slope of a step's variance over its batch",
            "0",
        )
    shape = stats.kstest(noise.ravel(), "norm")
    yield _Test(
        "the noise is Gaussian",
        float(shape.pvalue),
        f"largest distance of distribution functions {shape.statistic:.2g}",
        "a normal law (Kolmogorov and Smirnov)",
    )
    if steps > 1:
        yield _correlated("the noise of any two steps is independent", noise, "steps")
    parts = [noise[:, leaves == leaf] for leaf in np.unique(leaves)]
    parts = [half for part in parts for half in np.array_split(part, 2, axis=1) if half.shape[1]]
    yield _correlated("the noise of any two leaves is independent", _padded(parts), "parts of leaves")


def _padded(parts: list[np.ndarray]) -> np.ndarray:
    """Parts of any width as rows; of each the first numbers of every step, as many as the narrowest has."""
    width = min(part.shape[1] for part in parts)
    return np.stack([part[:, :width].ravel() for part in parts])


def _correlated(check: str, rows: Float[np.ndarray, "n length"], what: str) -> _Test:
    """The largest correlation of two rows, by the exact law of one of independent normal rows, times their number."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    among = np.abs(np.triu(unit @ unit.T, 1))
    largest = min(float(among.max()), 1.0)
    pairs, length = len(rows) * (len(rows) - 1) // 2, rows.shape[1]
    chance = stats.beta(0.5, (length - 1) / 2).sf(largest**2)
    return _Test(
        check, min(1.0, pairs * float(chance)), f"largest correlation {largest:.2g} of {pairs} pairs of {what}", "0"
    )


def _canaries(rehearsed: Rehearsed) -> Iterator[_Test]:
    """What canaries add to the sum: C if they are drawn and there, to the public divisor, and nothing else."""
    off = rehearsed.residuals[:, rehearsed.places].astype(np.float64)
    signals, drawn = rehearsed.signals.astype(np.float64), rehearsed.private
    noise = rehearsed.mechanism.noise_multiplier
    opposed = rehearsed.mechanism.sensitivity == 2
    for sign, coin in ((1.0, True), (-1.0 if opposed else 0.0, False)):
        seen = signals[drawn & (rehearsed.coins == coin)]
        if not seen.size:
            continue
        spread = noise / np.sqrt(seen.size)
        distance = max(0.0, abs(seen.mean() - sign) - _ROUNDING) / spread
        yield _Test(
            f"a drawn canary that is {'there' if coin else 'opposed' if opposed else 'zeroed'} adds what is stated",
            float(2 * stats.norm.sf(distance)),
            f"{seen.mean():.3f} C ± {spread:.2g} over {seen.size}",
            f"{sign:.0f} C" if sign else "0",
        )
    yield _Test(
        "the public divisor and all terms are as stated",
        float(stats.chi2(off.size).sf(np.sum(off**2) * (1 - _ROUNDING))),
        f"mean square error {np.mean(off**2):.3f} in units of the noise's variance over {off.size} numbers",
        "1 (χ²)",
    )


def _sampler(rehearsed: Rehearsed) -> Iterator[_Test]:
    """Participation of the canaries in S, and what P says of it."""
    mechanism, drawn = rehearsed.mechanism, rehearsed.private
    steps, count = drawn.shape
    if mechanism.sampling == "shared_epochs":
        epochs = [
            drawn[first : first + mechanism.steps_per_epoch] for first in range(0, steps, mechanism.steps_per_epoch)
        ]
        times = max(int(epoch.sum(axis=0).max()) for epoch in epochs)
        yield _Test(
            "no record is drawn twice an epoch",
            float(times <= 1),
            f"at most {times} times in {len(epochs)} epochs",
            "1",
        )
        return
    total, q = int(drawn.sum()), mechanism.sampling_prob
    yield _Test(
        "records are drawn with the stated probability",
        float(stats.binomtest(total, drawn.size, q).pvalue),
        f"{total / drawn.size:.4f} over {drawn.size} draws",
        f"q = {q:.4f}",
    )
    if 0 < q < 1:
        expected, each = steps * q, drawn.sum(axis=0)
        yield _Test(
            "every record is drawn equally often",
            float(stats.chi2(count).sf(np.sum((each - expected) ** 2) / (expected * (1 - q)))) if expected > 5 else 1.0,
            f"between {each.min()} and {each.max()} times in {steps} steps",
            f"{expected:.1f} (χ²)",
        )
    if mechanism.objective in MASKED and mechanism.sampling == "independent":
        public = rehearsed.public
        if 0 < q < 1 and 0 < public.sum() < public.size:
            both = int((drawn & public).sum())
            yield _Test(
                "the public batch says nothing of the private one",
                float(stats.binomtest(both, int(public.sum()), q).pvalue),
                f"{both / public.sum():.4f} of the records of P are in S",
                f"q = {q:.4f}",
            )
    if steps > 1 and 0 < q < 1:
        again = int((drawn[1:] & drawn[:-1]).sum())
        yield _Test(
            "a batch says nothing of the next",
            float(stats.binomtest(again, max(1, int(drawn[:-1].sum())), q).pvalue),
            f"{again / max(1, drawn[:-1].sum()):.4f} of the records of a batch are in the next",
            f"q = {q:.4f}",
        )


def _two_sided(law, value: float) -> float:
    return float(min(1.0, 2 * min(law.cdf(value), law.sf(value))))
