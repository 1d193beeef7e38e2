"""The sampling trap, shown by attack: `python -m benchmarks.sampling_trap` (docs/sampling-trap.md).

`maskdp_two_step` takes a noisy step and an exact one. If both take the same Poisson batch, the exact step tells who was
in it, and the ε of the usual account of Poisson batches does not hold: an attack finds more. The same noise with
independent batches keeps to it. `--json` prints the figures as JSON.
"""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.planted_faults import CLASSES, DELTA, settings
from maskdp_jax import parallel, step, train
from maskdp_jax.audit import bounds, canaries
from maskdp_jax.config import ParallelConfig, ViTConfig
from maskdp_jax.data import Views
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.model import Network
from maskdp_jax.objectives import Objective


def read_batches(records: int, batch: int, steps: int) -> dict[str, float]:
    """Who was in the batch of an exact step, by least squares on the two iterates around it and the public views.

    The weights move by the learning rate times the sum of the members' public gradients, all of which an adversary who
    has the public views can compute: a linear system in which the unknowns are 0 or 1.
    """
    network = Network(ViTConfig(width=32, depth=1, heads=2, tubelet=(2, 8, 8)), 2, 16, 4, seed=0)
    objective = Objective(network, "maskdp_two_step")
    mechanism = Mechanism(
        records, batch, steps, objective="maskdp_two_step", sampling="shared_poisson", noise_multiplier=1
    )
    layout = parallel.Layout(ParallelConfig(devices=1))
    rate, rng = 0.05, np.random.default_rng(0)
    advance = step.make_step(objective, mechanism, step.Optimizers(optax.sgd(rate), optax.sgd(rate)), layout)
    public = rng.integers(0, 256, (records, 1, 2, 16, 16, 3), np.uint8)
    views = Views(
        public, public, rng.integers(0, 4, (records, 1)), np.ones((records, 1), np.float32), np.zeros(records, bool)
    )
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), network.init)
    state = layout.replicate(step.start(objective, step.Optimizers(optax.sgd(rate), optax.sgd(rate)), params, {}))

    @jax.jit
    def public_gradients(theta):
        def one(record):
            return objective.exact(theta, {}, jax.tree.map(lambda x: x[None], record))[1]

        return jax.lax.map(lambda record: _flat(one(record)), views)

    named = missed = false = 0
    for _ in range(steps):
        members = np.flatnonzero(rng.random(records) < mechanism.sampling_prob)
        padded = np.append(members, 0)
        rows = Views(*(array[padded] for array in views))._replace(padding=np.arange(len(padded)) == len(members))
        key = rng.integers(0, 2**32, 8, np.uint32)
        state = advance(state, layout.shard(step.StepBatch(rows, None)), key)[0]
        before = jax.tree.map(np.asarray, state.weights.theta)
        state = advance(state, layout.shard(step.StepBatch(None, rows)), key)[0]
        moved = (_flat(before) - _flat(state.weights.theta)) * mechanism.public_divisor / rate
        solved = np.linalg.lstsq(np.asarray(public_gradients(before), np.float64).T, np.asarray(moved, np.float64))[0]
        guessed = solved > 0.5
        named += int(guessed[members].sum())
        missed += int((~guessed[members]).sum())
        false += int(guessed.sum() - guessed[members].sum())
    return {"records": records, "steps": steps, "named": named, "missed": missed, "wrongly named": false}


def attacked(sampling: str, epsilon: float) -> dict[str, float | str]:
    """One run at the noise that the usual account gives for `epsilon`: what is reported, and what an attack finds."""
    changes = {"objective__type": "maskdp_two_step", "optim__batch": 8, "optim__steps": 400, "optim__public_batch": 8}
    config = settings("-", "-", **changes)
    usual = train.make_mechanism(
        dataclasses.replace(
            config, objective=dataclasses.replace(config.objective, epsilon=epsilon, noise_multiplier=None)
        ),
        400,
    )
    config = settings(
        "-", "-", privacy__sampling=sampling, objective__noise_multiplier=usual.noise_multiplier, **changes
    )
    rehearsed = canaries.rehearse(config, train.make_mechanism(config, 400), CLASSES)
    _, attacks = bounds.lower_bound(rehearsed, DELTA)
    best = max(attacks, key=lambda attack: attack.epsilon)
    return {
        "batches": "P = S (shared Poisson)" if sampling == "shared_poisson" else "P and S independent",
        "noise multiplier": usual.noise_multiplier,
        "ε by the usual account": usual.epsilon(DELTA).value,
        "ε found at 95 %": best.epsilon,
        "attack": best.name,
        "ε that maskdp reports": rehearsed.mechanism.epsilon(DELTA).value,
    }


def _flat(tree) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, default=1.0, help="by the usual account")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    seen = read_batches(records=100, batch=10, steps=5)
    rows = [attacked(sampling, given.epsilon) for sampling in ("shared_poisson", "independent")]
    if given.json:
        print(json.dumps({"batches": seen, "runs": rows}, indent=2, ensure_ascii=False))
        return 0
    print(
        f"Reading batches off {seen['steps']} exact steps ({seen['records']} records): {seen['named']} members named, "
        f"{seen['missed']} missed, {seen['wrongly named']} wrongly named."
    )
    for row in rows:
        reported, found, stated = (
            row[name] for name in ("ε by the usual account", "ε found at 95 %", "ε that maskdp reports")
        )
        verdict = "the usual account is refuted" if found > reported else "the usual account holds"
        print(
            f"{row['batches']}, σ = {row['noise multiplier']:.4g}: usual account ε = {reported:.3g}, "
            f"attack ε ≥ {found:.3g} ({row['attack']}): {verdict}; maskdp reports ε = {stated:.4g}."
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
