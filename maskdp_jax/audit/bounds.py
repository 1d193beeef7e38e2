"""Lower bounds on ε from what canaries left in the releases.

One-run auditing: a coin decides for every canary whether it is there; many coins guessed right refute a small
ε (Steinke et al., arXiv 2305.08846; with the trade-off curve of a Gaussian mechanism in place of (ε, δ), Mahloujifar et
al., arXiv 2410.22235). Those two hold for any mechanism. The bound by Clopper and Pearson (arXiv 2101.04535) takes the
canaries for independent, which they are in the mechanism as claimed: they share no coordinate, and the noise of
coordinates is independent (a law test). A sound run exceeds its claim by any of them with probability at most 5 %.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor
from jaxtyping import Bool, Float
from scipy import optimize, stats

from maskdp_jax.audit.canaries import Rehearsed
from maskdp_jax.audit.findings import CONFIDENCE, Finding
from maskdp_jax.mechanism import gaussian_delta

COUNTING = {
    "one run": CanaryScoreAuditor.epsilon_one_run,
    "one run, f-DP": CanaryScoreAuditor.epsilon_one_run_fdp,
    "Clopper-Pearson": CanaryScoreAuditor.epsilon_clopper_pearson,
}

"""Bounds that count right guesses; any scores will do."""

_MANY = 20  # expected releases of a canary from which on a sum over them is taken for normal


@dataclasses.dataclass(frozen=True)
class Attack:
    """Scores of canaries that are there and of those that are not; higher means there.

    Attributes:
        name: how the scores were made.
        there, absent: the scores.
        bounds: method → ε at least, each at its share of the error probability.
    """

    name: str
    there: Float[np.ndarray, " n"]
    absent: Float[np.ndarray, " m"]
    bounds: Mapping[str, float]

    @property
    def epsilon(self) -> float:
        """The best of the bounds."""
        return max(self.bounds.values())

    def curve(self, points: int = 200) -> tuple[list[float], list[float]]:
        """True against false positive rates over all thresholds, for a plot."""
        cuts = np.quantile(np.concatenate([self.there, self.absent]), np.linspace(1, 0, points))
        true, false = ([0.0, *(float(np.mean(scores >= cut)) for cut in cuts)] for scores in (self.there, self.absent))
        return false, true


def attacks(rehearsed: Rehearsed, delta: float) -> list[Attack]:
    """Every attack on a rehearsal, the probability of error shared out among all attacks and methods."""
    scored = list(_scores(rehearsed))
    error = (1 - CONFIDENCE) / (len(scored) * (len(COUNTING) + 1))
    made = []
    for name, scores, linear in scored:
        found = attack(name, scores, rehearsed.coins, delta, error)
        if linear is not None and len(found.there) and len(found.absent):
            there, absent = (linear[coins & np.isfinite(linear)] for coins in (rehearsed.coins, ~rehearsed.coins))
            bound = gaussian(there, absent, delta, error)
            found = dataclasses.replace(found, bounds=found.bounds | {"Gaussian": bound})
        made.append(found)
    return made


def attack(
    name: str, scores: Float[np.ndarray, " n"], coins: Bool[np.ndarray, " n"], delta: float, error: float
) -> Attack:
    """An attack with the bounds that count, each wrong with probability at most `error`."""
    there, absent = scores[coins], scores[~coins]
    if not len(there) or not len(absent):
        return Attack(name, there, absent, dict.fromkeys(COUNTING, 0.0))
    auditor = CanaryScoreAuditor(there, absent)
    return Attack(
        name, there, absent, {label: float(bound(auditor, error, delta)) for label, bound in COUNTING.items()}
    )


def _scores(rehearsed: Rehearsed) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Of each adversary: a name, scores, and linear ones (NaN: no guess) if those are normal enough for `gaussian`."""
    mechanism, signals = rehearsed.mechanism, rehearsed.signals.astype(np.float64)
    q, variance = mechanism.sampling_prob, mechanism.noise_multiplier**2
    opposed = mechanism.sensitivity == 2
    total = signals.sum(axis=0)
    yield "sum of projections", total, total if q == 1 or len(signals) * q >= _MANY else None

    def likelihood(sign: float) -> np.ndarray:
        return np.logaddexp(math.log1p(-q), math.log(q) + (sign * signals - 0.5) / variance)

    if q < 1:
        ratio = likelihood(1.0) - (likelihood(-1.0) if opposed else 0.0)
        yield "likelihood ratio, batches secret", ratio.sum(axis=0), None
    if rehearsed.public.any() and q < 1:
        times = rehearsed.public.sum(axis=0)
        known = np.where(rehearsed.public, signals, 0).sum(axis=0)
        ratio = 2 * known if opposed else known - times / 2
        linear = np.where(times > 0, known / np.sqrt(np.maximum(times, 1)), np.nan)
        yield "likelihood ratio, batches read off the public gradients", ratio, linear


def lower_bound(rehearsed: Rehearsed, delta: float) -> tuple[Finding, list[Attack]]:
    """Whether any attack refutes the claim of the rehearsed mechanism."""
    made = attacks(rehearsed, delta)
    claimed = rehearsed.mechanism.epsilon(delta).value
    best = max(made, key=lambda attack: attack.epsilon)
    method = max(best.bounds, key=best.bounds.get)
    how = f" ({best.name}; {method})" if best.epsilon else ""
    finding = Finding(
        "no attack on the releases finds more than is claimed",
        best.epsilon <= claimed,
        f"ε ≥ {best.epsilon:.3g} at {100 * CONFIDENCE:.0f} % by {len(made)} attacks on {len(rehearsed.coins)} "
        f"canaries{how}",
        f"ε = {claimed:.4g} at δ = {delta:g} for {rehearsed.mechanism.steps} steps",
    )
    return finding, made


def gaussian(there: Float[np.ndarray, " n"], absent: Float[np.ndarray, " m"], delta: float, error: float) -> float:
    """ε of a pair of Gaussians fitted to scores (arXiv 2606.12733), at the least favourable end of its confidence set.

    The scores must be normal with one variance, and independent. That is the case in our mechanism for scores whose
    participation the adversary knows; otherwise it is so asymptotically. The variance counts at its upper limit (χ²),
    the distance of the means at its lower limit; the ε is that of N(μ, 1) against N(0, 1) at `delta`.
    """
    freedom = len(there) + len(absent) - 2
    if freedom < 1:
        return 0.0
    pooled = np.sum((there - there.mean()) ** 2) + np.sum((absent - absent.mean()) ** 2)
    spread = math.sqrt(pooled / stats.chi2(freedom).ppf(error / 2))
    gap = (
        there.mean() - absent.mean() + stats.norm.ppf(error / 2) * spread * math.sqrt(1 / len(there) + 1 / len(absent))
    )
    shift = gap / spread
    if shift <= 0 or float(gaussian_delta(0.0, shift)) <= delta:
        return 0.0
    highest = 1.0
    while float(gaussian_delta(highest, shift)) > delta and highest < 512:
        highest *= 2
    return float(optimize.brentq(lambda epsilon: float(gaussian_delta(epsilon, shift)) - delta, 0.0, highest))
