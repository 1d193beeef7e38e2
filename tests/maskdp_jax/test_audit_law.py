"""Law tests and bounds on releases that are drawn here, so that their law is known."""

import dataclasses

import numpy as np
import pytest

from maskdp_jax.audit import bounds, law
from maskdp_jax.audit.canaries import Rehearsed
from maskdp_jax.audit.findings import failed
from maskdp_jax.mechanism import Mechanism, gaussian_delta

STEPS, WATCHED, CANARIES = 40, 240, 100
DELTA = 1e-5


def rehearsed(seed: int = 0, objective: str = "maskdp", noise: float = 2.0, **changes) -> Rehearsed:
    """What a sound loop would release."""
    rng = np.random.default_rng(seed)
    mechanism = Mechanism(
        num_units=CANARIES, batch_size=25, steps=STEPS, objective=objective, noise_multiplier=noise, **changes
    )
    coins = rng.random(CANARIES) < 0.5
    private = rng.random((STEPS, CANARIES)) < mechanism.sampling_prob
    shared = mechanism.sampling != "independent"
    public = private if shared else rng.random((STEPS, CANARIES)) < 0.25
    places = np.arange(CANARIES)
    releases = noise * rng.normal(size=(STEPS, WATCHED))
    releases[:, places] += private * np.where(coins, 1.0, -1.0 if mechanism.sensitivity == 2 else 0.0)
    return Rehearsed(mechanism, releases, places, np.arange(WATCHED) * 4 // WATCHED, coins, private, public, 0.0)


def noise_of(found: Rehearsed, change) -> Rehearsed:
    """`found` with its noise changed by `change`."""
    noise = found.residuals * found.mechanism.noise_multiplier
    return found._replace(releases=found.releases - noise + change(noise))


def same_in_two_leaves(noise: np.ndarray) -> np.ndarray:
    noise = noise.copy()
    noise[:, 180:] = noise[:, 120:180]
    return noise


def uniform(noise: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, noise.shape) * np.sqrt(3) * 2


def test_sound_releases_pass():
    for seed in range(20):
        assert failed(law.laws(rehearsed(seed))) == []


def test_sound_swaps_and_shared_batches_pass():
    assert failed(law.laws(rehearsed(objective="maskdp_two_step"))) == []
    assert failed(law.laws(rehearsed(objective="maskdp_residual", sampling="shared_poisson"))) == []


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda noise: 0.9 * noise, "the noise has the stated variance"),
        (lambda noise: noise + 1.0, "the noise is centred at every coordinate"),
        (uniform, "the noise is Gaussian"),
        (lambda noise: np.repeat(noise[::2], 2, axis=0), "the noise of any two steps is independent"),
        (same_in_two_leaves, "the noise of any two leaves is independent"),
    ],
)
def test_another_noise_is_found(change, check):
    assert check in failed(law.laws(noise_of(rehearsed(), change)))


def test_noise_that_follows_the_batch_is_found():
    found = rehearsed()
    scale = 25 / found.private.sum(axis=1, keepdims=True)
    check = "the noise does not depend on the size of the batch drawn"
    assert check in failed(law.laws(noise_of(found, lambda noise: noise * scale)))


def test_another_sampler_is_found():
    found = rehearsed()
    often = np.random.default_rng(1).random(found.private.shape) < 0.32
    moved = found._replace(releases=found.releases.copy(), private=often)
    moved.releases[:, found.places] += found.coins * (often.astype(float) - found.private)
    assert "records are drawn with the stated probability" in failed(law.laws(moved))
    assert failed(law.laws(found._replace(public=found.private))) == [
        "the public batch says nothing of the private one"
    ]
    again = np.repeat(found.private[::2], 2, axis=0)
    moved = found._replace(releases=found.releases.copy(), private=again)
    moved.releases[:, found.places] += found.coins * (again.astype(float) - found.private)
    assert "a batch says nothing of the next" in failed(law.laws(moved))


def test_a_record_twice_an_epoch_is_found():
    found = rehearsed(objective="maskdp_residual", sampling="shared_epochs")
    assert "no record is drawn twice an epoch" in failed(law.laws(found))


def test_other_terms_and_devices_are_found():
    found = rehearsed()
    twice = found.releases.copy()
    twice[:, found.places] += found.private * found.coins
    assert "a drawn canary that is there adds what is stated" in failed(law.laws(found._replace(releases=twice)))
    leaking = found.releases.copy()
    leaking[:, found.places] += found.private * ~found.coins
    assert failed(law.laws(found._replace(releases=leaking))) == ["a drawn canary that is zeroed adds what is stated"]
    assert failed(law.laws(found._replace(devices=1e-3))) == ["every device holds the same release"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "maskdp_two_step"},
        {"objective": "dp_sgd", "adjacency": "replace", "noise": 1.0},
        {"objective": "maskdp_residual", "sampling": "shared_poisson", "noise": 4.0},
    ],
)
def test_sound_releases_stay_below_their_claim(changes):
    for seed in range(4):
        finding, attacks = bounds.lower_bound(rehearsed(seed, **changes), DELTA)
        assert finding.holds
        assert len({attack.name for attack in attacks}) == len(attacks) >= 2


def test_missing_noise_exceeds_the_claim():
    """Without noise every coin is guessed, and the bounds come near the largest that this number of coins can show."""
    found = noise_of(rehearsed(noise=8.0), lambda noise: 1e-3 * noise)
    finding, attacks = bounds.lower_bound(found, DELTA)
    assert not finding.holds
    assert max(attack.bounds["one run"] for attack in attacks) > 1.5
    assert max(attack.bounds["Clopper-Pearson"] for attack in attacks) > 1.5


def test_shared_batches_accounted_as_independent_exceed_the_claim():
    found = rehearsed(objective="maskdp_two_step", sampling="shared_poisson")
    claim = dataclasses.replace(found.mechanism, sampling="independent", batch_size=1, steps=STEPS)
    finding, attacks = bounds.lower_bound(found, DELTA)
    assert finding.holds
    assert max(attack.epsilon for attack in attacks) > claim.epsilon(DELTA).value
    assert max(attacks, key=lambda attack: attack.epsilon).name.endswith("read off the public gradients")


def test_gaussian_bound_covers():
    """Of 200 pairs of samples no more than expected are bounded above their true ε; many samples come close to it."""
    rng = np.random.default_rng(0)
    shift, above = 1.5, 0
    for _ in range(200):
        epsilon = bounds.gaussian(rng.normal(shift, 1, 60), rng.normal(0, 1, 60), DELTA, 0.05)
        above += gaussian_delta(epsilon, shift) < DELTA
    assert above <= 20
    close = bounds.gaussian(rng.normal(shift, 3, 100_000) + shift * 2, rng.normal(0, 3, 100_000), DELTA, 0.05)
    assert DELTA < gaussian_delta(close, shift) < 2 * DELTA


def test_curve_runs_from_nothing_to_everything():
    found = bounds.attack("x", np.arange(10.0), np.arange(10) > 4, DELTA, 0.05)
    false, true = found.curve()
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert all(t >= f for f, t in zip(false, true))
