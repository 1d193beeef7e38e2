"""Where a run's ε comes from: card, mechanism and config agree, and a second account comes to no more."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import pld
from scipy import stats

from maskdp_jax.audit.findings import Finding
from maskdp_jax.config import TrainConfig
from maskdp_jax.mechanism import Mechanism, gaussian_delta
from maskdp_jax.train import plan_mechanism

_Relation = dp_accounting.NeighboringRelation
_TOLERANCE = 0.01  # of ε: the second account rounds up on a coarser grid
_SWAPPED = {("dp_sgd", "zero_out"), ("maskdp_two_step", "zero_out")}  # besides all of `replace`: moves of 2C


def claims(config: TrainConfig, card: Mapping[str, Any], num_units: int, dataset: str) -> Iterator[Finding]:
    """Checks of the ε on a card of a run on the dataset with the id `dataset`."""
    recorded = Mechanism(**card["mechanism"])
    own = recorded.epsilon(card["delta"]).value
    yield Finding(
        "ε follows from the mechanism",
        own <= card["epsilon"] * (1 + 1e-6),
        f"ε = {own:.6g} by the account of the recorded mechanism",
        f"ε = {card['epsilon']:.6g}",
    )
    plan = plan_mechanism(config, num_units, dataset)
    from_config = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier or recorded.noise_multiplier)
    yield Finding(
        "the mechanism follows from the config and the dataset",
        from_config == recorded,
        from_config.epsilon(card["delta"]).event,
        recorded.epsilon(card["delta"]).event,
    )
    yield second_account(recorded, card["delta"])


def second_account(mechanism: Mechanism, delta: float) -> Finding:
    """ε computed once more from the fields of the mechanism, without the account of `Mechanism`."""
    claimed, again = mechanism.epsilon(delta).value, _again(mechanism, delta)
    return Finding(
        "a second account finds no more than is claimed",
        again * (1 - _TOLERANCE) <= claimed,
        f"ε = {again:.4g} with batches of at most {mechanism.private_slots}",
        f"ε = {claimed:.4g} at δ = {delta:g}",
    )


def _again(mechanism: Mechanism, delta: float) -> float:
    noise, steps = mechanism.noise_multiplier, mechanism.steps
    if mechanism.objective == "public_only":
        return 0.0
    if mechanism.objective == "sgd" or noise == 0:
        return float("inf")
    swapped = mechanism.adjacency == "replace" or (mechanism.objective, mechanism.adjacency) in _SWAPPED
    move = 2.0 if swapped else 1.0
    if mechanism.sampling == "shared_epochs":
        epochs = -(-steps // -(-mechanism.num_units // mechanism.batch_size))
        return _smallest(lambda epsilon: float(gaussian_delta(epsilon, np.sqrt(epochs) * move / noise)), delta)
    q = mechanism.batch_size / mechanism.num_units
    if mechanism.sampling == "shared_poisson":
        times = np.arange(steps + 1)
        chances = stats.binom.pmf(times, steps, q)
        return _smallest(lambda e: float(chances @ gaussian_delta(e, np.sqrt(times) * move / noise)), delta)
    slots = mechanism.private_slots
    gaussian = dp_accounting.GaussianDpEvent(noise)
    event = dp_accounting.PoissonSampledDpEvent(q, gaussian)
    if steps * stats.binom.sf(slots, mechanism.num_units, q) > 1e-3 * delta:
        event = dp_accounting.TruncatedSubsampledGaussianDpEvent(mechanism.num_units, q, slots, noise)
    vanishing = _Relation.ADD_OR_REMOVE_ONE if mechanism.adjacency == "remove" else _Relation.REPLACE_SPECIAL
    accountant = pld.PLDAccountant(
        _Relation.REPLACE_ONE if swapped else vanishing, value_discretization_interval=1e-3 / np.sqrt(steps)
    )
    return float(accountant.compose(event, steps).get_epsilon(delta))


def _smallest(delta_of, delta: float) -> float:
    if delta_of(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high) > delta and high < 1e6:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle) <= delta else (middle, high)
    return high
