"""Closed forms for the account, and statistics for the sampler.

Statistical tests run on a fixed secret, so they are deterministic; each states the chance with which a fresh secret
would have failed it.
"""

import dataclasses
import itertools
import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import optimize, special, stats

from maskdp.errors import UserError
from maskdp_jax import mechanism as mechanisms
from maskdp_jax.keys import RunSecret
from maskdp_jax.mechanism import Mechanism, calibrate, compose, gaussian_delta, upward
from maskdp_jax.noise import support_delta

SECRET = RunSecret(bytes(range(32)), "run", "config", "data")
PAPER = dict(num_units=40_320, batch_size=128, steps=150 * 315)
SMALL = dict(num_units=1000, batch_size=50, steps=100)


def drawn(units: np.ndarray) -> np.ndarray:
    return units[units >= 0]


# --- sensitivity and refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "adjacency", "sensitivity"),
    [
        ("maskdp", "zero_out", 1),
        ("maskdp", "replace", 2),
        ("maskdp_residual", "zero_out", 1),
        ("maskdp_residual", "replace", 2),
        ("maskdp_two_step", "zero_out", 2),
        ("maskdp_two_step", "replace", 2),
        ("dp_sgd", "remove", 1),
        ("dp_sgd", "zero_out", 2),
        ("dp_sgd", "replace", 2),
        ("public_only", "zero_out", 0),
        ("public_only", "replace", 0),
        ("sgd", "zero_out", math.inf),
    ],
)
def test_sensitivity_table(objective, adjacency, sensitivity):
    assert Mechanism(**SMALL, objective=objective, adjacency=adjacency).sensitivity == sensitivity


@pytest.mark.parametrize(
    "fields",
    [
        dict(objective="maskdp", adjacency="remove"),
        dict(objective="maskdp_residual", adjacency="remove"),
        dict(objective="maskdp_two_step", adjacency="remove"),
        dict(objective="public_only", adjacency="remove"),
        dict(objective="dp_sgd", sampling="shared_poisson"),
        dict(objective="sgd", noise_multiplier=1.0),
        dict(objective="public_only", noise_multiplier=1.0),
        dict(objective="dp_sgd", public_batch=3),
        dict(sampling="shared_epochs", max_batch=60),
        dict(sampling="shared_poisson", public_batch=3),
        dict(noise_multiplier=-1.0),
        dict(noise_multiplier=math.nan),
        dict(l2_clip_norm=0.0),
        dict(batch_size=1001),
        dict(steps=0),
        dict(objective="dpsgd"),
    ],
)
def test_refuses_what_has_no_meaning_or_no_proof(fields):
    with pytest.raises(UserError) as refusal:
        Mechanism(**SMALL | fields)
    assert "\n" not in str(refusal.value)


def test_no_epsilon_without_noise_and_none_needed_without_private_layers():
    assert Mechanism(**SMALL).epsilon(1e-5).value == math.inf
    assert Mechanism(**SMALL, objective="sgd").epsilon(1e-5).value == math.inf
    assert Mechanism(**SMALL, objective="public_only").epsilon(1e-5).value == 0
    assert SMALL["num_units"] not in Mechanism(**SMALL, objective="public_only").batch(SECRET, 0).private


# --- the account ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adjacency", "s"), [("zero_out", 1), ("replace", 2)])
def test_full_batches_are_the_gaussian_mechanism(adjacency, s):
    """q = 1, T steps: δ(ε) of N(√T·s/σ, 1) against N(0, 1), in closed form (arXiv 1805.06530)."""
    mechanism = Mechanism(10, 10, 25, adjacency=adjacency, noise_multiplier=12.0)
    for epsilon in (0.1, 1.0, 4.0):
        exact = gaussian_delta(epsilon, math.sqrt(25) * s / 12)
        assert exact <= mechanism.delta(epsilon) <= exact * 1.001 + 1e-12


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_one_poisson_step_in_closed_form(sigma):
    """H_α((1-q)N(0) + qN(1), N(0)) = q · δ_Gauss(log(1 + (α-1)/q))."""
    mechanism = Mechanism(100, 10, 1, noise_multiplier=sigma)
    for epsilon in (0.05, 0.3, 1.0):
        exact = 0.1 * gaussian_delta(math.log(1 + math.expm1(epsilon) / 0.1), 1 / sigma)
        assert exact <= mechanism.delta(epsilon) <= exact * 1.002 + 1e-10


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_one_step_of_swapped_terms_in_closed_form(sigma):
    """H_α of (1-q)N(0) + qN(C) against (1-q)N(0) + qN(-C): the best half-line. Halving σ instead is another number."""
    q = 0.1
    mechanism = Mechanism(100, 10, 1, adjacency="replace", noise_multiplier=sigma)
    for epsilon in (0.05, 0.3, 1.0):
        exact = half_line(math.exp(epsilon), q, 1 / sigma)
        assert exact * (1 - 1e-6) <= mechanism.delta(epsilon) <= exact * 1.002 + 1e-10
        halved = q * gaussian_delta(math.log(1 + math.expm1(epsilon) / q), 2 / sigma)
        assert abs(halved - exact) > 0.02 * exact


def half_line(alpha: float, q: float, shift: float) -> float:
    """max_z q·Φ(z + shift) - αq·Φ(z - shift) - (1-q)(α-1)·Φ(z), on a grid fine enough for 1e-7 of it."""
    z = np.linspace(-12, 12, 20_001)
    normal = special.ndtr
    values = q * normal(z + shift) - alpha * q * normal(z - shift) - (1 - q) * (alpha - 1) * normal(z)
    return max(0.0, values.max())


def test_opposite_shifts_dominate_every_swap():
    """The lemma of docs/privacy.md by integration: no v, v′ of norm ≤ C in the plane beat (C, -C) on a line."""
    axis = np.linspace(-7, 7, 201)
    x, y = np.meshgrid(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    density = lambda v: np.exp(-((x - v[0]) ** 2 + (y - v[1]) ** 2) / 2) / (2 * math.pi)  # noqa: E731
    generator = np.random.default_rng(0)
    closest = 1.0
    for trial in range(60):
        q, shift, alpha = generator.uniform(0.05, 1), generator.uniform(0.1, 1.5), math.exp(generator.uniform(0, 1.5))
        angles = generator.uniform(0, 2 * math.pi, 2) if trial % 3 else np.array([0.3, 0.3 + math.pi])
        lengths = shift * (generator.uniform(0, 1, 2) if trial % 3 == 1 else 1)
        v, w = (lengths * np.array([np.cos(angles), np.sin(angles)])).T
        mixture_v = (1 - q) * density((0, 0)) + q * density(v)
        mixture_w = (1 - q) * density((0, 0)) + q * density(w)
        integral = np.maximum(mixture_v - alpha * mixture_w, 0).sum() * cell
        bound = half_line(alpha, q, shift)
        assert integral <= bound + 5e-4
        closest = min(closest, bound - integral)
    assert closest < 5e-4  # opposite vectors of full length reach it


@pytest.mark.parametrize(("adjacency", "terms"), [("zero_out", (1, 0)), ("replace", (1, -1))])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_one_step_of_four_records_by_enumeration(adjacency, terms, slots):
    """Every draw, every cut, every sign of the others' terms: none exceeds δ, and without a cut one reaches it."""
    q, sigma = 0.5, 0.8
    x, width = np.linspace(-9, 9, 4001, retstep=True)

    def density(values: list[float]) -> np.ndarray:
        chances = dict.fromkeys(range(-4, 5), 0.0)  # of each sum
        for member in itertools.product([0, 1], repeat=4):
            units = [i for i in range(4) if member[i]]
            kept = list(itertools.combinations(units, min(len(units), slots)))
            for subset in kept:
                chances[sum(values[i] for i in subset)] += 1 / 16 / len(kept)
        return sum(chance * stats.norm.pdf(x, mean, sigma) for mean, chance in chances.items())

    pairs = [
        [density([term, *others]) for term in terms]
        for others in itertools.combinations_with_replacement([-1, 0, 1], 3)
    ]
    mechanism = Mechanism(4, 2, 1, adjacency=adjacency, noise_multiplier=sigma, max_batch=slots)
    assert mechanism.sampling_prob == q
    for epsilon in (0.1, 1.0, 2.0):
        alpha = math.exp(epsilon)
        worst = max(np.maximum(p - alpha * r, 0).sum() * width for a, b in pairs for p, r in ((a, b), (b, a)))
        assert worst <= mechanism.delta(epsilon) + 1e-6
        if slots == 4:
            assert worst == pytest.approx(mechanism.delta(epsilon), rel=2e-3)


def test_shared_poisson_is_the_mixture_with_the_identity():
    """Σ_k Binomial · δ_Gauss is the T-fold composition of "Gaussian with chance q, else nothing", S in plain sight."""
    mechanism = Mechanism(100, 20, 30, sampling="shared_poisson", noise_multiplier=4.0)
    once = privacy_loss_distribution.from_gaussian_mechanism(4.0, value_discretization_interval=1e-3)
    nothing = privacy_loss_distribution.identity(value_discretization_interval=1e-3)
    mixed = once.compute_mixture(nothing, 0.2).self_compose(30)
    for epsilon in (0.1, 0.5, 1.0, 2.0):
        assert mechanism.delta(epsilon) == pytest.approx(mixed.get_delta_for_epsilon(epsilon), rel=2e-3)


@pytest.mark.parametrize(
    ("sampling", "adjacency"),
    [
        ("independent", "zero_out"),
        ("independent", "replace"),
        ("shared_poisson", "zero_out"),
        ("shared_poisson", "replace"),
        ("shared_epochs", "zero_out"),
    ],
)
def test_delta_by_monte_carlo(sampling, adjacency):
    """δ(ε) = E max(0, 1 - e^(ε - L)) over simulated runs: who is drawn, what is released, its privacy loss L.

    One coordinate, the other records at 0, the term of ours at C (`replace`: at -C for the neighbour). Five standard
    errors and the grid of the account: false alarm 6e-7.
    """
    q, steps, runs, epsilon = 0.2, 30, 200_000, 0.5
    sigma = {"independent": 1.5, "shared_poisson": 6.0, "shared_epochs": 3.0}[sampling]
    mechanism = Mechanism(100, 20, steps, sampling=sampling, adjacency=adjacency, noise_multiplier=sigma)
    generator = np.random.default_rng(1)
    other = -1.0 if adjacency == "replace" else 0.0
    losses = np.zeros(runs)
    for step in range(steps):
        if sampling == "shared_epochs":
            drawn_in = np.full(runs, step % 5 == 0)  # once an epoch of five steps; which one does not matter
        else:
            drawn_in = generator.random(runs) < q
        released = np.where(drawn_in, 1.0, 0.0) + sigma * generator.standard_normal(runs)
        here, there, absent = (stats.norm.pdf(released, place, sigma) for place in (1.0, other, 0.0))
        if sampling == "independent":
            here, there = (1 - q) * absent + q * here, (1 - q) * absent + q * there
        else:  # everyone sees who is drawn
            here, there = np.where(drawn_in, here, absent), np.where(drawn_in, there, absent)
        losses += np.log(here / there)
    spent = np.maximum(0, -np.expm1(epsilon - losses))
    exact = mechanism.delta(epsilon)
    assert exact > 1e-3
    assert abs(exact - spent.mean()) < 5 * spent.std() / math.sqrt(runs) + 2e-3 * exact


def test_epochs_compose_as_often_as_a_unit_is_seen():
    """A third of an epoch counts as one: k = ⌈T / ⌈N/B⌉⌉."""
    for steps, times in ((20, 1), (21, 2), (7, 1), (100, 5)):
        mechanism = Mechanism(1000, 50, steps, sampling="shared_epochs", noise_multiplier=3.0)
        assert mechanism.delta(1.0) == pytest.approx(float(gaussian_delta(1.0, math.sqrt(times) / 3)), abs=1e-15)
        seen = np.bincount(np.concatenate([drawn(mechanism.batch(SECRET, t).private) for t in range(steps)]))
        assert seen.max() == times


def test_paper_setting():
    """N = 40,320; batch 128; 150 epochs; δ = 1e-5: the noise multipliers at ε = 1, from both sides."""
    for fields, sigma in (
        (dict(), 2.677),
        (dict(objective="dp_sgd", adjacency="remove"), 2.677),
        (dict(adjacency="replace"), 5.152),
        (dict(objective="maskdp_two_step"), 5.152),
        (dict(sampling="shared_epochs"), 45.70),
        (dict(sampling="shared_poisson"), 46.17),
    ):
        mechanism = Mechanism(**PAPER, **fields)
        at = lambda noise, m=mechanism: dataclasses.replace(m, noise_multiplier=noise).delta(1.0)  # noqa: E731
        assert at(sigma) <= 1e-5 < at(sigma * 0.998)


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_epsilon_of_one_swapped_step_in_closed_form(sigma):
    """The ε of `replace` is that of the best half-line, which dp_accounting has no part in."""
    exact = optimize.brentq(lambda e: half_line(math.exp(e), 0.1, 1 / sigma) - 1e-3, 0.01, 10)
    claim = Mechanism(100, 10, 1, adjacency="replace", noise_multiplier=sigma).epsilon(1e-3)
    assert exact * (1 - 1e-6) <= claim.value <= exact * 1.001


def test_epsilon_of_two_swapped_steps_by_integration():
    """δ = ∫ max(0, p(x)p(y) - e^ε q(x)q(y)) over the plane, for p, q = (1-q)N(0) + qN(±C)."""
    q, sigma = 0.3, 1.5
    x, width = np.linspace(-14, 14, 2801, retstep=True)
    normal = lambda mean: stats.norm.pdf(x, mean, sigma)  # noqa: E731
    one, other = ((1 - q) * normal(0) + q * normal(mean) for mean in (1.0, -1.0))
    claim = Mechanism(10, 3, 2, adjacency="replace", noise_multiplier=sigma).epsilon(1e-3)
    at = lambda e: np.maximum(np.outer(one, one) - math.exp(e) * np.outer(other, other), 0).sum() * width**2  # noqa: E731
    assert at(claim.value) <= 1e-3 * 1.001
    assert at(claim.value * 0.998) > 1e-3


@pytest.mark.parametrize("steps", [25, 47_250])
def test_rounding_never_undercuts_the_closed_form(steps):
    """q = 1: the Fourier transform's error would hide half of δ = 7e-13 at 47,250 steps."""
    mechanism = Mechanism(10, 10, steps, noise_multiplier=2.3 * math.sqrt(steps))
    for epsilon in np.linspace(0.5, 5, 19):
        assert mechanism.delta(epsilon) >= gaussian_delta(epsilon, 1 / 2.3)


def test_tiny_epsilon_and_tiny_delta_take_little_more_noise_than_the_limit():
    """Large T and σ: the run is one Gaussian with μ = q·√(T·(e^(1/σ²) - 1)); both corners of (ε, δ) are near it."""
    limit = lambda sigma: 128 / 40_320 * math.sqrt(150 * 315 * math.expm1(sigma**-2))  # noqa: E731
    for epsilon, delta, worse in ((0.001, 1e-5, 1.01), (1.0, 1e-15, 1.06)):
        spent = lambda s, e=epsilon: math.log(max(gaussian_delta(e, limit(s)), 1e-300))  # noqa: E731
        least = optimize.brentq(lambda s, d=delta, spent=spent: spent(s) - math.log(d), 1, 1e4)
        found = calibrate(Mechanism(**PAPER), epsilon, delta)
        assert least < found.noise_multiplier < least * worse
        assert found.epsilon(delta).value <= epsilon


def test_calibration_reaches_the_largest_epsilon_and_names_it():
    """Beyond it the finite support of the noise alone costs δ, whatever σ is."""
    start = Mechanism(1000, 50, 100, sampling="shared_epochs")
    largest = math.log(1e-5 / support_delta(100, 0.0))
    assert calibrate(start, math.floor(largest), 1e-5).epsilon(1e-5).value <= largest
    for epsilon in (largest + 1, 800.0):
        with pytest.raises(UserError, match=f"at most {math.floor(10 * largest) / 10}.*finite support"):
            calibrate(start, epsilon, 1e-5)
    assert start.delta(800.0) == 1.0


def test_long_runs_are_composed_in_stages():
    """100 steps at a time cost no more than one part in a thousand."""
    run = Mechanism(10_000, 100, 100_050, noise_multiplier=6.0)
    whole = mechanisms._composed_pld(run._untruncated, run.event()[1], run._grid)
    below, above = (dataclasses.replace(run, steps=steps) for steps in (100_000, 100_200))
    assert below.delta(1.0) <= run.delta(1.0) <= above.delta(1.0) * (1 + 1e-9)
    assert whole.get_delta_for_epsilon(1.0) == pytest.approx(run.delta(1.0), rel=1e-4)


def test_lengths_beyond_any_account_are_refused():
    for fields in (dict(steps=10**20), dict(num_units=2**31)):
        with pytest.raises(UserError, match="expected at most"):
            Mechanism(**SMALL | fields)


def test_shown_figures_are_rounded_up():
    for value in (0.1234561, 1.00000049, 123456.1, 29.99951, 1e-5, 3.0):
        shown = float(upward(value))
        assert value <= shown < value * (1 + 1e-5)
    assert upward(1e-5) == "1e-05"
    assert upward(0.99951, 3) == "1"


def test_renyi_is_looser_and_absent_where_it_has_no_event():
    assert Mechanism(**PAPER, noise_multiplier=2.89).epsilon(1e-5).rdp == pytest.approx(1.0, abs=2e-3)
    for fields, present in (
        (dict(), True),
        (dict(adjacency="replace"), False),
        (dict(sampling="shared_epochs", adjacency="replace"), True),
        (dict(sampling="shared_poisson"), False),
    ):
        claim = Mechanism(**SMALL, **fields, noise_multiplier=6.0).epsilon(1e-5)
        assert (claim.rdp is not None) == present
        assert claim.rdp is None or claim.rdp > claim.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "sigma"),
    [
        (dict(), 2.676),
        (dict(adjacency="replace"), 5.151),
        (dict(sampling="shared_epochs"), 45.691),
        (dict(sampling="shared_poisson"), 46.167),
    ],
)
def test_paper_setting_calibrated(fields, sigma):
    found = calibrate(Mechanism(**PAPER, **fields), 1.0, 1e-5)
    assert found.noise_multiplier == pytest.approx(sigma, rel=5e-4)
    assert found.epsilon(1e-5).value <= 1


def test_truncation_is_charged():
    """Few slots cost ε; slots for every unit, or the default, cost nothing that shows."""
    roomy, default, tight = (
        Mechanism(**SMALL, noise_multiplier=1.5, max_batch=slots).epsilon(1e-5).value for slots in (1000, None, 55)
    )
    assert roomy == pytest.approx(default, rel=1e-4)
    assert tight > roomy * 1.05
    event, relation = Mechanism(**SMALL, noise_multiplier=1.5, max_batch=55).event()
    assert event.event == dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.05, 55, 1.5)
    assert relation is dp_accounting.NeighboringRelation.REPLACE_SPECIAL


def test_neighbouring_relation_follows_the_adjacency():
    relation = dp_accounting.NeighboringRelation
    for fields, expected in (
        (dict(), relation.REPLACE_SPECIAL),
        (dict(adjacency="replace"), relation.REPLACE_ONE),
        (dict(objective="maskdp_two_step"), relation.REPLACE_ONE),
        (dict(objective="dp_sgd"), relation.REPLACE_ONE),
        (dict(objective="dp_sgd", adjacency="remove"), relation.ADD_OR_REMOVE_ONE),
    ):
        assert Mechanism(**SMALL, **fields, noise_multiplier=2.0).event()[1] is expected


def test_epsilon_and_delta_agree_and_fall_with_noise():
    claims = [Mechanism(**SMALL, noise_multiplier=sigma).epsilon(1e-5) for sigma in (1.0, 2.0, 4.0)]
    assert claims[0].value > claims[1].value > claims[2].value > 0
    for sigma, claim in zip((1.0, 2.0, 4.0), claims):
        assert Mechanism(**SMALL, noise_multiplier=sigma).delta(claim.value) <= 1e-5
        assert Mechanism(**SMALL, noise_multiplier=sigma).delta(claim.value * (1 - 1e-5)) > 1e-5


@pytest.mark.parametrize("sampling", ["independent", "shared_poisson", "shared_epochs"])
@pytest.mark.parametrize("sigma", [1e-6, 0.01, 0.1])
def test_hopeless_noise_has_no_claim_and_fits_in_memory(sampling, sigma):
    mechanism = Mechanism(1000, 100, 1000, sampling=sampling, noise_multiplier=sigma)
    assert mechanism.epsilon(1e-5).value == math.inf


def test_calibration_keeps_to_epsilon_and_wastes_little():
    start = Mechanism(**SMALL, sampling="shared_epochs")
    noise = calibrate(start, 2.0, 1e-6)
    assert noise.epsilon(1e-6).value <= 2
    assert dataclasses.replace(noise, noise_multiplier=noise.noise_multiplier * 0.9999).epsilon(1e-6).value > 2

    independent = calibrate(Mechanism(**SMALL), 2.0, 1e-6)
    assert independent.epsilon(1e-6).value <= 2

    poisson = Mechanism(**SMALL, sampling="shared_poisson", noise_multiplier=10.0)
    steps = calibrate(poisson, 2.0, 1e-6, "steps")
    assert steps.epsilon(1e-6).value <= 2 < dataclasses.replace(steps, steps=steps.steps + 1).epsilon(1e-6).value
    batch = calibrate(poisson, 2.0, 1e-6, "batch_size")
    assert batch.epsilon(1e-6).value <= 2
    assert dataclasses.replace(batch, batch_size=batch.batch_size + 1).epsilon(1e-6).value > 2

    for hopeless in (Mechanism(**SMALL, objective="sgd"), Mechanism(**SMALL, objective="public_only")):
        with pytest.raises(UserError):
            calibrate(hopeless, 1.0, 1e-5)


# --- the sampler ------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_secret_and_step():
    mechanism = Mechanism(**SMALL)
    other = RunSecret(bytes(32), "run", "config", "data")
    first, again = mechanism.batch(SECRET, 7), mechanism.batch(SECRET, 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first.private, mechanism.batch(SECRET, 8).private)
    assert not np.array_equal(first.private, mechanism.batch(other, 7).private)
    assert not np.array_equal(first.public, mechanism.batch(other, 7).public)
    assert first.private.dtype == first.public.dtype == np.int32


def test_only_accounted_steps_are_drawn():
    mechanism = Mechanism(**SMALL)
    for step in (-1, mechanism.steps):
        with pytest.raises(ValueError, match="not among"):
            mechanism.batch(SECRET, step)


def test_poisson_inclusion():
    """Every unit with chance q, independently: counts per unit, pairs and batch sizes. False alarm 3e-6."""
    mechanism = Mechanism(200, 50, 2000)
    member = np.zeros((mechanism.steps, 200), bool)
    for step in range(mechanism.steps):
        member[step, drawn(mechanism.batch(SECRET, step).private)] = True
    q, steps = 0.25, mechanism.steps
    per_unit = ((member.sum(0) - q * steps) ** 2 / (steps * q * (1 - q))).sum()
    assert stats.chi2.ppf(5e-7, 200) < per_unit < stats.chi2.ppf(1 - 5e-7, 200)
    sizes = ((member.sum(1) - 50) ** 2 / (200 * q * (1 - q))).sum()
    assert stats.norm.ppf(5e-7) < (sizes - steps) / math.sqrt(2 * steps) < stats.norm.ppf(1 - 5e-7)
    neighbours = (member[:, :-1] & member[:, 1:]).sum()  # a batch of constant size or a block of units would show here
    expected, spread = q**2 * 199 * steps, math.sqrt(199 * steps * q**2 * (1 - q**2) * 1.5)
    assert abs(neighbours - expected) < 5 * spread


def test_public_batch_says_nothing_of_the_private_one():
    """Independent: given P, each unit is in S with chance q all the same. False alarm 6e-7. Shared: P is S."""
    mechanism = Mechanism(200, 50, 1000)
    both = total = 0
    for step in range(mechanism.steps):
        batch = mechanism.batch(SECRET, step)
        both += len(np.intersect1d(drawn(batch.private), drawn(batch.public)))
        total += len(drawn(batch.public))
    assert abs(both - 0.25 * total) < 5 * math.sqrt(total * 0.25 * 0.75)
    for sampling in ("shared_poisson", "shared_epochs"):
        batch = Mechanism(**SMALL, sampling=sampling).batch(SECRET, 3)
        assert np.array_equal(batch.private, batch.public)


def test_epochs_show_every_unit_once():
    for fields in (dict(sampling="shared_epochs"), dict(objective="sgd"), dict(objective="public_only")):
        mechanism = Mechanism(107, 10, 33, **fields)
        assert mechanism.steps_per_epoch == 11
        batches = [mechanism.batch(SECRET, step) for step in range(33)]
        units = [b.public if mechanism.objective == "public_only" else b.private for b in batches]
        for epoch in range(3):
            seen = np.concatenate([drawn(u) for u in units[11 * epoch : 11 * epoch + 11]])
            assert np.array_equal(np.sort(seen), np.arange(107))
        assert not np.array_equal(units[0], units[11])


def test_divisor_is_constant_whatever_is_drawn():
    mechanism = Mechanism(40, 2, 60)
    sizes = {len(drawn(mechanism.batch(SECRET, step).private)) for step in range(60)}
    assert 0 in sizes  # empty batches occur and are no error
    assert len(sizes) > 3
    assert mechanism.divisor == 2 == mechanism.sampling_prob * 40
    assert mechanism.public_divisor == 2
    assert Mechanism(40, 2, 60, public_batch=9).public_divisor == 9
    assert Mechanism(40, 2, 60, sampling="shared_poisson").public_divisor == 2


def test_overflow_is_cut_to_a_random_subset():
    """Chance 20/1000 a step for each unit in the end. False alarm 1e-6."""
    mechanism = Mechanism(100, 50, 1500, max_batch=20)
    counts = np.zeros(100)
    for step in range(mechanism.steps):
        units = drawn(mechanism.batch(SECRET, step).private)
        assert len(units) == 20 == len(set(units))
        counts[units] += 1
    statistic = ((counts - 300) ** 2 / (1500 * 0.2 * 0.8)).sum()
    assert stats.chi2.ppf(5e-7, 99) < statistic < stats.chi2.ppf(1 - 5e-7, 99)


def test_default_slots_practically_never_overflow():
    for n, batch, steps in ((1000, 50, 100), (40_320, 128, 47_250), (20, 10, 5)):
        slots = Mechanism(n, batch, steps).private_slots
        assert steps * stats.binom.sf(slots, n, batch / n) <= 1e-24
        assert slots == n or steps * stats.binom.sf(slots - 1, n, batch / n) > 1e-24
        assert Mechanism(n, batch, steps).batch(SECRET, 0).private.shape == (slots,)


# --- Publishing several runs (rule 9) --------------------------------------------------------------------------------


def test_two_equal_runs_cost_one_run_of_twice_the_steps():
    one = Mechanism(400, 40, 30, noise_multiplier=2.0)
    twice = dataclasses.replace(one, steps=60, max_batch=one.private_slots)
    together = compose([one, one], 1e-5)
    assert together.value == pytest.approx(twice.epsilon(1e-5).value, rel=1e-3)
    assert together.value > one.epsilon(1e-5).value


def test_epochs_compose_to_the_closed_form():
    one = Mechanism(400, 40, 10, sampling="shared_epochs", noise_multiplier=4.0)
    exact = dataclasses.replace(one, steps=30).epsilon(1e-5).value
    assert exact <= compose([one] * 3, 1e-5).value <= exact * 1.01


def test_what_reads_no_private_layer_adds_nothing_and_what_adds_no_noise_ends_the_claim():
    noisy = Mechanism(400, 40, 30, noise_multiplier=2.0)
    public, plain = (dataclasses.replace(noisy, objective=o, noise_multiplier=0.0) for o in ("public_only", "sgd"))
    assert compose([noisy, public], 1e-5).value == pytest.approx(noisy.epsilon(1e-5).value, rel=1e-3)
    assert compose([noisy, plain], 1e-5).value == math.inf
    assert compose([public], 1e-5).value == 0


def test_a_run_without_a_loss_distribution_joins_by_basic_composition():
    shared = Mechanism(400, 40, 5, sampling="shared_poisson", noise_multiplier=20.0)
    other = Mechanism(400, 40, 30, noise_multiplier=2.0)
    expected = shared.epsilon(5e-6).value + other.epsilon(5e-6).value
    assert compose([shared, other], 1e-5).value == pytest.approx(expected, rel=1e-3)


def test_runs_on_other_records_share_no_claim():
    one = Mechanism(400, 40, 30, noise_multiplier=2.0)
    with pytest.raises(UserError, match="share no claim"):
        compose([one, dataclasses.replace(one, num_units=500)], 1e-5)


@pytest.mark.parametrize(
    ("change", "name"),
    [(dict(unit="subject"), "unit"), (dict(dataset="b"), "dataset"), (dict(num_units=101), "num_units")],
)
def test_runs_that_share_no_claim_are_not_added(change, name):
    one = Mechanism(100, 10, 5, noise_multiplier=1.0, dataset="a")
    with pytest.raises(UserError, match=f"differ in {name}"):
        compose([one, dataclasses.replace(one, **change)], 1e-5)


def test_a_mechanism_survives_json_exactly():
    mechanism = Mechanism(101, 7, 5, noise_multiplier=1 / 3, l2_clip_norm=0.1, unit="scene", dataset="a")
    assert Mechanism(**json.loads(json.dumps(mechanism.as_dict()))) == mechanism


@pytest.mark.parametrize("fields", [dict(noise_multiplier=s) for s in (1e-300, 1e300, math.nan)])
def test_noise_beyond_any_account_is_refused_at_once(fields):
    with pytest.raises(UserError, match="noise_multiplier"):
        Mechanism(**SMALL | fields)


@pytest.mark.parametrize("norm", [1e-33, 1e-300, 1e300, math.inf, math.nan])
def test_clip_norms_beyond_float32_are_refused(norm):
    """At 1e-33 the lattice's spacing is no normal float32, and a rounded term was 88 times as long as accounted."""
    with pytest.raises(UserError, match="l2_clip_norm"):
        Mechanism(**SMALL | dict(l2_clip_norm=norm))


def test_composition_charges_the_rounding_of_the_fourier_transform():
    mechanism = Mechanism(40_320, 128, 100, noise_multiplier=2.68)
    assert compose([mechanism], 1e-13).value >= mechanism.epsilon(1e-13).pld * (1 - 1e-6)
