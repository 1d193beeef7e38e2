"""The exact release: the law of its noise, the sensitivity of its sums, and an attack on floating point.

Statistical tests run on fixed keys; each states the chance with which fresh ones would have failed it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from maskdp.errors import UserError
from maskdp_jax import lattice
from maskdp_jax.keys import RunSecret
from maskdp_jax.lattice import Lattice
from maskdp_jax.noise import add_noise

SECRET = RunSecret(bytes(range(32)), "run", "config", "data")


def draws(stddev: float, count: int, step: int = 0) -> np.ndarray:
    planned = Lattice(1.0, stddev, 1)
    return np.asarray(jax.jit(planned.noise, static_argnums=1)(SECRET.noise_key(step), count), np.int64)


def rounded_gaussian(stddev: float, k: np.ndarray) -> np.ndarray:
    return special.ndtr((k + 0.5) / stddev) - special.ndtr((k - 0.5) / stddev)


@pytest.mark.parametrize("stddev", [64.0, 3000.0, 5e6])
def test_noise_has_the_law_of_a_rounded_gaussian(stddev):
    """χ² over 60 equally likely cells, two tails and the lowest digit, on 400,000 draws. False alarm 4e-6."""
    n = 400_000
    found = draws(stddev, n)
    edges = np.round(stddev * special.ndtri(np.linspace(0, 1, 61)[1:-1]))
    expected = n * np.diff(special.ndtr(np.concatenate([[-np.inf], (edges + 0.5) / stddev, [np.inf]])))
    counts = np.histogram(found, np.concatenate([[-np.inf], edges + 0.5, [np.inf]]))[0]
    assert stats.chisquare(counts, expected).pvalue > 1e-6
    for side in (found, -found):
        beyond = n * special.ndtr(-(4 * stddev + 0.5) / stddev)
        assert abs((side > 4 * stddev).sum() - beyond) < 5 * math.sqrt(beyond)
    assert stats.chisquare(np.bincount(found % 16, minlength=16)).pvalue > 1e-6
    lag = np.corrcoef(found[:-1], found[1:])[0, 1]
    assert abs(lag) < 5 / math.sqrt(n)


@pytest.mark.parametrize("stddev", [64.0, 100.0, 1500.0])
def test_total_variation_is_below_its_bound(stddev):
    """The law of the ladder, from the tables themselves, against the rounded Gaussian; both in float64."""
    planned = Lattice(1.0, stddev, 1)
    table = lattice._table(planned._variance)[: lattice._entries(planned._variance)]
    cumulated = [sum(int(word) << shift for word, shift in zip(row, (96, 64, 32, 0))) for row in table]
    masses = np.array([b - a for a, b in zip([0, *cumulated], cumulated)], np.float64) / 2.0**127
    rung = np.concatenate([masses[:0:-1] / 2, masses[:1], masses[1:] / 2])
    law = rung
    for _ in range(planned._rungs - 1):
        spread = np.zeros(16 * (len(law) - 1) + 1)
        spread[::16] = law
        law = np.convolve(spread, rung)
    k = np.arange(len(law)) - len(law) // 2
    assert law.sum() == pytest.approx(1, abs=1e-12)
    found = np.abs(law - rounded_gaussian(stddev, k)).sum() / 2
    assert found < planned.total_variation + 1e-12  # to which τ is rounded up
    assert found > planned.total_variation / 20
    assert abs((law * k**2.0).sum() - stddev**2 - 1 / 12) < 1e-9 * stddev**2


def test_bisection_counts_the_entries_below():
    table = lattice._table(64.0**2)
    assert len(table) + 1 == 2 ** (len(table) + 1).bit_length() // 2
    numbers = [sum(int(word) << shift for word, shift in zip(row, (96, 64, 32, 0))) for row in table]
    near = sorted({max(0, n + d) for n in numbers[:896:7] for d in (-(2**64), -1, 0, 1, 2**31)} | {0, 2**127 - 1})
    near = [n for n in near if n < 2**127]
    words = [np.array([n >> shift & 2**32 - 1 for n in near], np.uint32) for shift in (96, 64, 32, 0)]
    found = np.asarray(lattice._search(jnp.asarray(table), tuple(map(jnp.asarray, words))))
    assert found.tolist() == [sum(entry <= n for entry in numbers) for n in near]


@pytest.mark.parametrize(
    ("noise", "clip", "records", "coordinates"), [(2.68, 1.0, 274, 7680), (46.2, 0.1, 300, 10**5), (0.7, 3.0, 40, 50)]
)
def test_plan_fits_int32_and_its_noise_covers_the_rounding(noise, clip, records, coordinates):
    planned = Lattice.plan(noise, clip, records, coordinates)
    assert math.log2(planned.spacing).is_integer()
    assert records * planned.reach + planned._largest_noise < 2**31
    assert planned.stddev * planned.spacing >= noise * (clip + planned.spacing * math.sqrt(coordinates) / 2)
    assert planned.stddev * planned.spacing < noise * clip * 1.001
    assert coordinates * planned.total_variation <= lattice.LOST


def test_what_does_not_fit_integers_is_refused():
    for noise, records in ((1e-3, 100), (2.0**30, 100), (0.0, 2**31)):
        with pytest.raises(UserError, match="for integers of 32 bits"):
            Lattice.plan(noise, 1.0, records, 1000)


def test_one_term_moves_the_integer_sum_by_its_share_at_most():
    """Terms at the clip norm, at every scale of their coordinates: the norm in units of g is at most C/g + √d/2."""
    generator = np.random.default_rng(0)
    for coordinates in (1, 48, 5000):
        planned = Lattice.plan(1.0, 0.1, 1000, coordinates)
        bound = 0.1 / planned.spacing + math.sqrt(coordinates) / 2
        for power in (0, 1, 8):
            term = generator.standard_normal(coordinates) * generator.random(coordinates) ** power
            term = (term * 0.1 / np.linalg.norm(term)).astype(np.float32)
            whole = np.asarray(planned.rounded(jnp.asarray(term)), np.float64)
            assert np.array_equal(whole, np.round(np.float64(term) / planned.spacing))
            assert np.linalg.norm(whole) <= bound * (1 + 1e-7)
    assert np.abs(planned.rounded(jnp.asarray([1e30, -1e30]))).tolist() == [planned.reach] * 2


# --- The attack -------------------------------------------------------------------------------------------------------

SIGMA, COORDINATES = 4.0, 4096
WITH = np.full(COORDINATES, 1 / 64, np.float32)  # the sum if the record is there: norm C = 1; otherwise 0


@pytest.fixture(scope="module")
def attainable():
    """All values near 0 that σ times the noise of `noise.gaussian` takes, sorted. Every probability near 1/2 is one."""
    chances = (2**24 - np.arange(800_000)).astype(np.float32) * np.float32(2.0**-25)
    half = np.float32(SIGMA) * -np.asarray(jax.jit(jax.scipy.special.ndtri)(chances))
    return np.unique(np.concatenate([half, -half]))


def on_the_grid(released: np.ndarray, total: np.ndarray, attainable: np.ndarray) -> float:
    """Of the coordinates whose noise would be near 0 were `total` the sum: the share that attainable noise explains."""
    noise = released.astype(np.float64) - total
    near = np.abs(noise) < attainable[-1] / 2
    place = np.searchsorted(attainable, noise[near])
    candidates = attainable[np.clip(place[:, None] + np.arange(-3, 4), 0, len(attainable) - 1)]
    return (total[near, None] + candidates == released[near, None]).any(1).mean()


def guesses_right(release, attainable) -> int:
    """Of 60 releases, half of them with the record: how often the better explained of the two sums is the true one."""
    right = 0
    for trial in range(60):
        total = WITH if trial % 2 else np.zeros_like(WITH)
        released = np.asarray(release(total, SECRET.noise_key(trial)))
        shares = [on_the_grid(released, guess, attainable) for guess in (np.zeros_like(WITH), WITH)]
        coin = (trial // 2) % 2  # for ties
        right += int(shares[1] > shares[0] or (shares[1] == shares[0] and coin)) == trial % 2
    return right


def test_floating_point_gives_the_record_away(attainable):
    """The attack that the exact release is made against, at ε ≈ 1: right every time."""
    noised = jax.jit(lambda total, key: add_noise(total, key, SIGMA))
    assert guesses_right(noised, attainable) == 60


def test_attack_on_the_exact_release_is_at_chance(attainable):
    """At most 49 of 60 right: fair coins exceed it with probability 4e-7, or 1e-5 given what ε ≈ 1 allows by itself."""
    planned = Lattice.plan(SIGMA, 1.0, 64, COORDINATES)
    exact = jax.jit(lambda total, key: planned.released(planned.rounded(total), key))
    assert 11 <= guesses_right(exact, attainable) <= 49
