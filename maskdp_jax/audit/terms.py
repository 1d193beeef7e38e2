"""A run's own model and records: how far one record moves the clipped sum, and what reaches θ without noise.

Everything here runs the objective, the data and `step.release` of the run on its own weights and some of its own
records, without noise: what is found depends on private layers and must not leave the lab.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskdp import layers
from maskdp_jax import parallel
from maskdp_jax import step as steps
from maskdp_jax.audit.findings import Finding
from maskdp_jax.config import DataConfig, TrainConfig
from maskdp_jax.data import Clips, Views
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.objectives import Objective, Weights

RECORDS = 8
"""Records that are looked at."""

_CLOSE = 1e-5  # of C, for the rounding of sums
_ROUNDING = 1e-3  # of the public gradient's norm, by which the terms of two equal views may differ from 0
_NEARLY = 0.03  # of the public gradient's norm, for two views that differ in one pixel by one level


def terms(
    objective: Objective, weights: Weights, config: TrainConfig, mechanism: Mechanism, dataset: layers.Dataset
) -> Iterator[Finding]:
    """All checks of one model on some records of its own dataset."""
    clips = Clips(dataset, config.data.split, config.data)
    there = _some(clips)
    rng = np.random.default_rng()
    yield public_views(dataset, config.data, rng)
    yield exact_gradient(objective, weights, there, rng)
    if not mechanism.noise_multiplier:
        return
    yield from moves(objective, weights, mechanism, there, rng)
    if objective.name in ("maskdp", "maskdp_residual"):
        yield equal_views(objective, weights, there)


def _some(clips: Clips) -> Views:
    return clips.batch([(number,) for number in range(min(RECORDS, len(clips)))], 1)


class _Repainted:
    """A dataset whose private layers were replaced by noise; its public layers are as they were."""

    def __init__(self, dataset: layers.Dataset, rng: np.random.Generator):
        self.path, self.labels, self._dataset, self._rng = dataset.path, dataset.labels, dataset, rng

    def __getitem__(self, split: str) -> "list[_RepaintedRecord]":
        records = itertools.islice(self._dataset[split], RECORDS)
        return [_RepaintedRecord(record, self._rng) for record in records]


class _RepaintedRecord:
    def __init__(self, record: layers.Record, rng: np.random.Generator):
        self._record, self._rng = record, rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record, name)

    def layers(self, frames: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        rgba, private = self._record.layers(frames)
        return rgba, self._rng.integers(0, 256, private.shape, np.uint8)


def public_views(dataset: layers.Dataset, config: DataConfig, rng: np.random.Generator) -> Finding:
    """Noise in place of private layers must leave the bytes of public views as they are."""
    config = dataclasses.replace(config, cache=False)
    own = Clips(dataset, config.split, config)
    other = Clips(_Repainted(dataset, rng), config.split, config)
    pairs = [(own.views(number), other.views(number)) for number in range(len(other))]
    moved = [number for number, (mine, theirs) in enumerate(pairs) if (mine[1] != theirs[1]).any()]
    blind = [number for number, (mine, theirs) in enumerate(pairs) if (mine[0] == theirs[0]).all()]
    return Finding(
        "public views hold no private pixel",
        not moved and len(blind) < len(pairs),
        f"{len(moved)} of {len(pairs)} public views change when private layers are replaced by noise",
        "none",
        private=True,
    )


def exact_gradient(objective: Objective, weights: Weights, batch: Views, rng: np.random.Generator) -> Finding:
    """Noise in place of composites must leave exact gradients as they are, to the bit."""
    exact = jax.jit(objective.exact)
    repainted = batch._replace(composite=rng.integers(0, 256, batch.composite.shape, np.uint8))
    mine, theirs = (exact(weights.theta, weights.fixed, views) for views in (batch, repainted))
    moved = sum(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(mine[1]), jax.tree.leaves(theirs[1])))
    return Finding(
        "no private pixel reaches the exact gradients of θ",
        not moved or objective.name == "sgd",
        f"{moved} of {len(jax.tree.leaves(mine[1]))} gradients change when composites are replaced by noise",
        "all may, the objective is sgd" if objective.name == "sgd" else "none",
        private=True,
    )


def equal_views(objective: Objective, weights: Weights, batch: Views) -> Finding:
    """The difference of two equal views is 0, and that of two nearly equal ones is small."""
    nearly = batch.public.copy()
    nearly[:, :, 0, 0, 0, 0] ^= 1

    @jax.jit
    def norms(views: Views):
        record = jax.tree.map(lambda x: x[:1], views._replace(padding=np.zeros(len(batch.label), bool)))
        one = jax.tree.map(lambda x: x[0], record)
        _, whole = objective.exact(weights.theta, weights.fixed, record)
        return _norm(objective.term(objective.noisy(weights), weights, one)), _norm(whole)

    (equal, whole), (near, _) = (norms(batch._replace(composite=views)) for views in (batch.public, nearly))
    whole = max(float(whole), 1e-30)
    return Finding(
        "both views of a record share their randomness",
        float(equal) <= _ROUNDING * whole and float(near) <= _NEARLY * whole,
        f"terms of equal views have norm {float(equal) / whole:.2g}, of views that differ in one pixel by one level "
        f"{float(near) / whole:.2g}, in units of the public gradient's norm",
        f"at most {_ROUNDING:g} and {_NEARLY:g}",
        private=True,
    )


def moves(
    objective: Objective, weights: Weights, mechanism: Mechanism, batch: Views, rng: np.random.Generator
) -> Iterator[Finding]:
    """How far one record moves the clipped sum, at a clip norm below all norms; and what padding adds to it."""
    quiet = dataclasses.replace(mechanism, noise_multiplier=0.0)
    layout = parallel.Layout(parallel.ParallelConfig(devices=1))
    key = np.zeros(8, np.uint32)

    def clipped_sum(mechanism: Mechanism):
        def one(weights, views, key):
            return weights, *steps.release(objective, mechanism, layout, weights, views, key)

        def flat(views: Views):
            _, total, norms = layout.mapped(one)(weights, views, key)
            return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(total)]) * mechanism.divisor, norms

        return jax.jit(flat)

    rows = len(batch.padding)
    norms = np.asarray(clipped_sum(quiet)(batch)[1])
    loud = float(norms[norms > 0].min()) / 10 if (norms > 0).any() else mechanism.l2_clip_norm
    quiet = dataclasses.replace(quiet, l2_clip_norm=loud)
    total = clipped_sum(quiet)
    whole = np.asarray(total(batch)[0], np.float64)
    far = []
    for row in range(rows):
        if mechanism.adjacency == "replace":
            composite = batch.composite.copy()
            composite[row] = rng.integers(0, 256, composite[row].shape, np.uint8)
            other = batch._replace(composite=composite)
        elif mechanism.adjacency == "remove":
            other = batch._replace(padding=np.arange(rows) == row)
        else:
            composite = batch.composite.copy()
            composite[row] = batch.public[row]
            other = batch._replace(composite=composite)
        far.append(float(np.linalg.norm(whole - np.asarray(total(other)[0], np.float64))) / loud)
    limit = mechanism.sensitivity
    yield Finding(
        "one record moves the clipped sum by no more than is accounted",
        max(far) <= limit * (1 + _CLOSE) + _CLOSE * math.sqrt(rows),
        f"{max(far):.4f} C at most, of {rows} records, at a clip norm below all their norms",
        f"{limit:.0f} C",
        private=True,
    )
    hidden = batch._replace(padding=np.arange(rows) >= (rows + 1) // 2)
    garbage = hidden.composite.copy()
    garbage[hidden.padding] = rng.integers(0, 256, garbage[hidden.padding].shape, np.uint8)
    one, other = (np.asarray(total(views)[0]) for views in (hidden, hidden._replace(composite=garbage)))
    yield Finding(
        "padding adds exactly nothing",
        (one == other).all() and np.linalg.norm(one) <= (rows + 1) // 2 * loud * (1 + _CLOSE),
        f"the sum changes by {np.linalg.norm(one - other) / loud:.2g} C with what lies in "
        f"{int(hidden.padding.sum())} rows of padding",
        "0",
        private=True,
    )


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
