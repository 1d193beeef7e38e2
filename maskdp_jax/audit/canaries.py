"""Canaries: records with worst-case terms, sent through the real training loop while every release is watched.

A rehearsal is `train.train` with the objective, mechanism, sampler, model and devices of the run under audit, on a
dataset of canaries in place of the clips. Canary i adds a multiple of one coordinate of the noisy sum, its own, with a
norm far above C. A coin decides whether its private layer is there; which canary a row of a batch holds, and what its
coin was, is read from the pixels, so that storage, composition, padding and sampling are those of every other run.
"""

import dataclasses
import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maskdp import layers
from maskdp_jax import checkpoint, train
from maskdp_jax.config import DataConfig, EveryConfig, TrainConfig
from maskdp_jax.data import Views
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.model import Params
from maskdp_jax.objectives import Objective, Weights
from maskdp_jax.step import StepBatch

LOUDNESS = (1e3, 1.5, 1e12)
"""Norms of the canaries' terms in units of C, in turn."""

_MOST_CANARIES = 4000
_MOST_WATCHED = 2**22  # numbers kept of a rehearsal
_THERE, _OPPOSED = 255, 0  # grey of a private layer that is there, and of one that was swapped for its opposite


class Rehearsed(NamedTuple):
    """What an adversary who sees every release of a rehearsal knows.

    Attributes:
        mechanism: as it was claimed.
        releases: what was watched of each noised sum, times the public divisor, in units of C.
        places: the coordinate, among those watched, of each canary.
        leaves: the parameter that each watched coordinate belongs to.
        coins: whether the private layer of each canary is there.
        private, public: the canaries in S and in P.
        devices: the largest difference of the watched sums between devices.
    """

    mechanism: Mechanism
    releases: Float[np.ndarray, "steps watched"]
    places: Int[np.ndarray, " canaries"]
    leaves: Int[np.ndarray, " watched"]
    coins: Bool[np.ndarray, " canaries"]
    private: Bool[np.ndarray, "steps canaries"]
    public: Bool[np.ndarray, "steps canaries"]
    devices: float

    @property
    def residuals(self) -> Float[np.ndarray, "steps watched"]:
        """The releases less what the canaries add to them, in standard deviations of the claimed noise."""
        sign = np.where(self.coins, 1.0, -1.0 if self.mechanism.sensitivity == 2 else 0.0)
        expected = np.zeros_like(self.releases)
        expected[:, self.places] = sign * self.private
        return (self.releases - expected) / self.mechanism.noise_multiplier

    @property
    def signals(self) -> Float[np.ndarray, "steps canaries"]:
        """⟨y_t, gap_i⟩: each canary's own coordinate of every release, in units of C."""
        return self.releases[:, self.places]


@dataclasses.dataclass(frozen=True)
class Canaries(Objective):
    """An objective whose noisy terms are those of canaries; all else is as it was.

    Attributes:
        places: coordinate of each canary in the flattened noisy parameters; the first is that of rows without a
            record, whose term must not count.
        norm: C.
        opposed: a canary whose private layer is not there adds the opposite; else, nothing or (where the two views
            are equal, which must silence it) the same.
    """

    places: tuple[int, ...] = ()
    norm: float = 1.0
    opposed: bool = False

    def term(self, noisy: Params, weights: Weights, record: Views) -> Params:
        """A multiple of one coordinate; NaN, which must not count, for canaries beyond those that are tried."""
        number, grey = _decode(record.public[0], record.composite[0])
        places = jnp.asarray(self.places)
        loudness = jnp.asarray(LOUDNESS)[number % len(LOUDNESS)] * self.norm
        absent = -1.0 if self.opposed else 1.0 if self.name in ("maskdp", "maskdp_residual") else 0.0
        value = loudness * jnp.where((grey > layers.FILL) | (number == 0), 1.0, absent)
        value = jnp.where(number < len(places), value, jnp.nan)
        place = places[jnp.minimum(number, len(places) - 1)]
        found, first = [], 0
        names, structure = jax.tree.flatten(noisy)
        for leaf in names:
            here = jnp.arange(leaf.size) == place - first
            found.append(jnp.where(here, value, 0.0).reshape(leaf.shape).astype(leaf.dtype))
            first += leaf.size
        return jax.tree.unflatten(structure, found)


class _Watching:
    """The `train.Rehearsal` of one rehearsal."""

    def __init__(self, config: TrainConfig, mechanism: Mechanism):
        self._config, self._mechanism = config, mechanism
        self.seen: list[np.ndarray] = []
        self.private, self.public = (np.zeros((mechanism.steps, mechanism.num_units), bool) for _ in range(2))
        self.devices = 0.0

    def objective(self, objective: Objective) -> Canaries:
        shapes = jax.eval_shape(lambda: objective.noisy(self._start(objective)))
        sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
        share = max(1, _MOST_WATCHED // (self._mechanism.steps * len(sizes)))
        self._kept = [min(size, share) for size in sizes]
        self.leaves = np.repeat(np.arange(len(sizes)), self._kept)
        watched = np.concatenate([np.arange(kept) for kept in self._kept])
        watched = watched + np.concatenate([[0], np.cumsum(sizes)[:-1]])[self.leaves]
        count = min(self._mechanism.num_units, len(watched) // 2)
        chosen = np.linspace(0, len(watched) - 1, count + 1).round().astype(int)
        self.places = chosen[1:]
        return Canaries(
            **{field.name: getattr(objective, field.name) for field in dataclasses.fields(Objective)},
            places=tuple(watched[chosen].tolist()),
            norm=self._mechanism.l2_clip_norm,
            opposed=self._mechanism.sensitivity == 2,
        )

    def _start(self, objective: Objective) -> Weights:
        theta, fixed = checkpoint.split(objective.network.shapes, self._config.trainable)
        return objective.start(*(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), part) for part in (theta, fixed)))

    def watch(self, noised: Params) -> Array:
        scale = self._mechanism.batch_size / self._mechanism.l2_clip_norm
        leaves = jax.tree.leaves(noised)
        return scale * jnp.concatenate([jnp.ravel(leaf)[:kept] for leaf, kept in zip(leaves, self._kept)])

    def see(self, batch: StepBatch, watched: Array) -> None:
        step = len(self.seen)
        for views, members in ((batch.noisy, self.private), (batch.exact, self.public)):
            if views is not None:
                numbers = np.asarray(_decode(views.public[:, 0], views.composite[:, 0])[0])[~views.padding] - 1
                members[step, numbers] = True
        copies = [np.asarray(shard.data) for shard in watched.addressable_shards]
        self.devices = max([self.devices, *(float(np.max(np.abs(copy - copies[0]))) for copy in copies[1:])])
        self.seen.append(copies[0])


def rehearse(config: TrainConfig, mechanism: Mechanism, classes: int, steps: int | None = None) -> Rehearsed:
    """Runs the loop of `config` on canaries, with the noise, sampling probability and clip norm of `mechanism`.

    There are as many canaries as records, at most some thousand (with as small a batch), of `classes` classes, and at
    most `steps` steps. The dataset and the run are written to a temporary folder and deleted.
    """
    shrink = -(-mechanism.num_units // _MOST_CANARIES)
    batch = max(1, mechanism.batch_size // shrink)
    count = mechanism.num_units if shrink == 1 else round(batch * mechanism.num_units / mechanism.batch_size)
    rng = np.random.default_rng()
    coins = rng.random(count) < 0.5
    with tempfile.TemporaryDirectory(prefix="maskdp-audit-") as folder:
        folder = pathlib.Path(folder)
        data, labels = config.data, tuple(map(str, range(classes)))
        clips = (_clip(number, coin, mechanism, data) for number, coin in enumerate(coins.tolist()))
        layers.write_dataset(folder / "data", {"train": clips}, labels, private_format="png")
        config = dataclasses.replace(
            config,
            out=str(folder / "run"),
            init="",
            data=dataclasses.replace(
                data, path=str(folder / "data"), split="train", eval_split="", crop=0.0, cache=True
            ),
            objective=dataclasses.replace(config.objective, epsilon=None, noise_multiplier=mechanism.noise_multiplier),
            privacy=dataclasses.replace(config.privacy, clips_per_record=0),
            optim=dataclasses.replace(config.optim, batch=batch, steps=min(mechanism.steps, steps or mechanism.steps)),
            every=EveryConfig(checkpoint=0, log=0, evaluate=0),
        )
        played = train.make_mechanism(config, count)
        watching = _Watching(config, played)
        train.train(config, watching)
    tried = len(watching.places)
    return Rehearsed(
        played,
        np.stack(watching.seen),
        watching.places,
        watching.leaves,
        coins[:tried],
        watching.private[:, :tried],
        watching.public[:, :tried],
        watching.devices,
    )


def _clip(number: int, coin: bool, mechanism: Mechanism, data: DataConfig) -> layers.TwoLayerClip:
    """Canary `number`: an avatar in the upper half whose colour is its number, a grey private layer in the lower."""
    rgba = np.zeros((data.frames, data.size, data.size, 4), np.uint8)
    code = number + 1
    rgba[:, : data.size // 2] = (code % 256, code // 256 % 256, 1, 255)
    grey = _THERE if coin else _OPPOSED if mechanism.adjacency == "replace" else layers.FILL
    private = np.full((*rgba.shape[:3], 3), grey, np.uint8)
    name = f"canary{number:06d}"
    return layers.TwoLayerClip(rgba, private, 0, f"{name}-0", name, name, (name,), "0" * 64, 25.0)


def _decode(public: Array, composite: Array) -> tuple[Array, Array]:
    """Numbers of canaries, from 1, and the grey of their private layers; 0 and 0 of rows without a record."""
    first = public[..., 0, 0, 0, :].astype(jnp.int32)
    return first[..., 0] + 256 * first[..., 1], composite[..., 0, -1, 0, 0].astype(jnp.int32)
