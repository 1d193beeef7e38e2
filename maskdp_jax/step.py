"""The training step on a device mesh: clip locally, one sum over devices, noise once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, UInt32

from maskdp_jax import parallel
from maskdp_jax.clipping import clipped_fun
from maskdp_jax.config import TrainConfig
from maskdp_jax.data import Views
from maskdp_jax.lattice import Lattice
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.model import Params
from maskdp_jax.noise import add_noise
from maskdp_jax.objectives import Objective, Weights
from maskdp_jax.parallel import Layout


class StepBatch(NamedTuple):
    """The records of one step; None where the objective takes none.

    Attributes:
        noisy: S, whose terms are clipped and noised.
        exact: the records of exact gradients: P, or S itself for `sgd`.
    """

    noisy: Views | None
    exact: Views | None


class State(NamedTuple):
    """All that a checkpoint holds.

    Attributes:
        step: steps done.
        weights: the model.
        average: mean of W over the second half of the run: free, and better than the last iterate of a convex problem.
        noisy_optimizer, exact_optimizer: their states.
    """

    step: Array
    weights: Weights
    average: Params
    noisy_optimizer: Any
    exact_optimizer: Any


class Optimizers(NamedTuple):
    """Of the steps that carry noise, and of those that do not."""

    noisy: optax.GradientTransformation
    exact: optax.GradientTransformation

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Optimizers":
        """Both with a linear warm-up and a cosine to 0."""
        optim = config.optim

        def make(learning_rate: float, kind: str) -> optax.GradientTransformation:
            warmup = min(optim.warmup_steps, optim.steps // 2)
            schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, optim.steps)
            return optax.adam(schedule) if kind == "adam" else optax.sgd(schedule, momentum=optim.momentum)

        two_paths = config.objective.name == "maskdp"
        return cls(
            make(config.objective.learning_rate or optim.learning_rate, "sgd" if two_paths else optim.optimizer),
            make(optim.learning_rate, optim.optimizer),
        )


def start(objective: Objective, optimizers: Optimizers, theta: Params, fixed: Params) -> State:
    """The state before the first step."""
    weights = objective.start(theta, fixed)
    return State(
        jnp.zeros((), jnp.int32),
        weights,
        jax.tree.map(jnp.copy, weights.head),
        optimizers.noisy.init(objective.noisy(weights)),
        optimizers.exact.init(weights.theta),
    )


def release(
    objective: Objective,
    mechanism: Mechanism,
    layout: Layout,
    weights: Weights,
    batch: Views,
    key: UInt32[Array, "8"],
) -> tuple[Params, Array]:
    """One device's part in the noised sum over all devices, divided by the public constant; and its records' norms.

    Guarantees:
        Each record's term is clipped, the terms are summed once over all devices, and noise from the same key
        everywhere is added once to the global sum. If `mechanism.exact`, terms, sum and noise are integers
        (`lattice.Lattice`): the sum is independent of the order and, with the same microbatch on each device, the
        release is the same to the bit on any number of devices. It holds the terms of a microbatch (of all rows, where
        there is none). Otherwise they are floats, and the noise has standard deviation `mechanism.noise_stddev`.
    """
    clipped_sum = clipped_fun(
        lambda noisy, record: objective.term(noisy, weights, record),
        batch_argnums=1,
        keep_batch_dim=False,
        l2_clip_norm=mechanism.l2_clip_norm,
        return_norms=True,
        microbatch_size=None if mechanism.exact else layout.microbatch(len(batch.padding)),
        dtype=jnp.float32,
    )
    skipped = batch.padding | objective.unchanged(batch)
    noisy = parallel.varying(objective.noisy(weights))
    if mechanism.exact:
        coordinates = sum(leaf.size for leaf in jax.tree.leaves(noisy))
        lattice = Lattice.plan(mechanism.noise_multiplier, mechanism.l2_clip_norm, mechanism.private_slots, coordinates)

        def one(record: Views, skip: Array) -> tuple[Params, Array]:
            alone = jax.tree.map(lambda x: x[None], record)
            term, norms = clipped_sum(noisy, alone, is_padding_example=skip[None])
            return lattice.rounded(term), norms[0]

        def add(total: Params, part: tuple[Views, Array]) -> tuple[Params, Array]:
            terms, norms = jax.vmap(one)(*part)
            return jax.tree.map(lambda a, b: a + b.sum(0), total, terms), norms

        if len(skipped) * jax.lax.axis_size(parallel.AXIS) > layout.padded(mechanism.private_slots):
            raise ValueError(f"more rows than the {mechanism.private_slots} slots that the integers have room for")
        size = layout.microbatch(len(skipped)) or len(skipped)
        parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (batch, skipped))
        zero = parallel.varying(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), noisy))
        total, norms = jax.lax.scan(add, zero, parts)
        total, norms = lattice.released(jax.lax.psum(total, parallel.AXIS), key), norms.reshape(-1)
    else:
        total, norms = clipped_sum(noisy, batch, is_padding_example=skipped)
        total = add_noise(jax.lax.psum(total, parallel.AXIS), key, mechanism.noise_stddev)
    return jax.tree.map(lambda g: g / mechanism.divisor, total), jnp.where(skipped, 0, norms)


def make_step(
    objective: Objective,
    mechanism: Mechanism,
    optimizers: Optimizers,
    layout: Layout,
    watch: Callable[[Params], Array] | None = None,
) -> Callable[[State, StepBatch, UInt32[Array, "8"]], tuple[State, dict[str, Array], Array]]:
    """Compiles `step(state, batch, noise_key) -> (state, metrics, norms of the records' terms)`.

    With `watch`, `metrics["watched"]` is what it makes of the noised sum; for `maskdp audit`.

    Guarantees:
        Private data reach the state through `release` alone (but for `sgd`, which has no privacy). Whatever the
        devices, the noise is the same to the bit; sums differ by rounding. Rows of padding add exactly 0, an empty
        batch is noise alone. The norms are not private; they are for tests.

    References:
        Docs: `docs/privacy.md`; `Mechanism` states what the released states cost.
    """
    exact_divisor = mechanism.divisor if objective.name == "sgd" else mechanism.public_divisor

    def exact_gradient(weights: Weights, batch: Views) -> tuple[Array, Params]:
        total = objective.exact(parallel.varying(weights.theta), weights.fixed, batch)
        return jax.tree.map(lambda g: g / exact_divisor, jax.lax.psum(total, parallel.AXIS))

    def noisy_update(state: State, gradient: Params) -> State:
        weights = state.weights
        updates, optimizer = optimizers.noisy.update(gradient, state.noisy_optimizer, objective.noisy(weights))
        moved = optax.apply_updates(objective.noisy(weights), updates)
        weights = weights._replace(head=moved) if objective.two_paths else weights._replace(theta=moved)
        return state._replace(weights=weights, noisy_optimizer=optimizer)

    def exact_update(state: State, gradient: Params) -> State:
        updates, optimizer = optimizers.exact.update(gradient, state.exact_optimizer, state.weights.theta)
        theta = optax.apply_updates(state.weights.theta, updates)
        return state._replace(weights=state.weights._replace(theta=theta), exact_optimizer=optimizer)

    def step(state: State, batch: StepBatch, key: Array) -> tuple[State, dict[str, Array], Array]:
        metrics, norms = {}, jnp.zeros(1)
        if batch.noisy is not None:
            gradient, norms = release(objective, mechanism, layout, state.weights, batch.noisy, key)
            if watch:
                metrics["watched"] = watch(gradient)
            if objective.name == "maskdp_residual":
                metrics["loss"], public = exact_gradient(state.weights, batch.exact)
                gradient = jax.tree.map(jnp.add, gradient, public)
            state = noisy_update(state, gradient)
        if batch.exact is not None and objective.name != "maskdp_residual":
            metrics["loss"], gradient = exact_gradient(state.weights, batch.exact)
            state = exact_update(state, gradient)
        return _finished(state, mechanism.steps), metrics, norms

    return layout.mapped(step)


def _finished(state: State, steps: int) -> State:
    """Counts the step and, in the second half, takes W into the average."""
    count = jnp.maximum(state.step - steps // 2, 0) + 1
    average = jax.tree.map(lambda mean, w: mean + (w - mean) / count, state.average, state.weights.head)
    return state._replace(step=state.step + 1, average=average)
