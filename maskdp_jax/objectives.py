"""What each objective differentiates.

Notation: x a record's composite, x̃ its public view, θ the model, φ a frozen encoder, W the private head.
Sensitivities are those of `Mechanism.sensitivity`; proofs in `docs/privacy.md`.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, UInt8

from maskdp_jax.config import ObjectiveConfig
from maskdp_jax.data import Views
from maskdp_jax.model import Network, Params


class Weights(NamedTuple):
    """Everything a trained model consists of.

    Attributes:
        theta: the parameters of f that are trained.
        fixed: those that are not.
        encoder: all parameters of φ; empty but for `maskdp`.
        head: W, the private path; empty but for `maskdp`.
    """

    theta: Params
    fixed: Params
    encoder: Params
    head: Params


@dataclasses.dataclass(frozen=True)
class Objective:
    """One of the six, bound to a network.

    Attributes:
        network: f and φ.
        name: the value of `objective.type`.
        lambda_: λ of `maskdp`.
        both_views: whether `sgd` learns from public views too.
    """

    network: Network
    name: str
    lambda_: float = 1.0
    both_views: bool = False

    @classmethod
    def from_config(cls, network: Network, config: ObjectiveConfig) -> "Objective":
        """The objective that a config names."""
        options = {key: getattr(config, key) for key in ("lambda_", "both_views") if hasattr(config, key)}
        return cls(network, config.name, **options)

    @property
    def two_paths(self) -> bool:
        """Whether the noisy steps train W and not θ."""
        return self.name == "maskdp"

    def start(self, theta: Params, fixed: Params) -> Weights:
        """Initial weights; φ is a copy of f as it starts, a function of public data alone."""
        if not self.two_paths:
            return Weights(theta, fixed, {}, {})
        head = {"kernel": jnp.zeros((self.network.width, self.network.classes))}
        return Weights(theta, fixed, jax.tree.map(jnp.copy, theta | fixed), head)

    def noisy(self, weights: Weights) -> Params:
        """The parameters that the noisy sum is the gradient of: W, or θ where the objective has one path."""
        return weights.head if self.two_paths else weights.theta

    def term(self, noisy: Params, weights: Weights, record: Views) -> Params:
        """What one record adds to the noisy sum before clipping, a vector like `noisy`; its clips are averaged first.

        `dp_sgd`, `maskdp_two_step`: ∇L(x). `maskdp_residual`: ∇L(x) − ∇L(x̃). `maskdp`: ∇_W L(f(x̃) + λ·h(φ(x) − φ(x̃))).

        Guarantees:
            A function of this record and of `weights`. For `maskdp` and `maskdp_residual` 0 where x = x̃, and the step
            makes that exact by `unchanged`.
        """
        match self.name:
            case "maskdp":
                public = self.network.logits(weights.theta | weights.fixed, record.public)
                gap = self._gap(weights.encoder, record.composite, record.public)
                return jax.grad(lambda head: mean_loss(public + self._private_path(head, gap), record))(noisy)
            case "maskdp_residual":
                full = jax.grad(self._loss)(noisy, weights.fixed, record.composite, record)
                public = jax.grad(self._loss)(noisy, weights.fixed, record.public, record)
                return jax.tree.map(jnp.subtract, full, public)
            case "dp_sgd" | "maskdp_two_step":
                return jax.grad(self._loss)(noisy, weights.fixed, record.composite, record)
        raise ValueError(f"{self.name} adds no noise")

    def unchanged(self, batch: Views) -> Bool[Array, " b"]:
        """Records whose term is 0 because their two views are equal byte for byte."""
        if self.name in ("maskdp", "maskdp_residual"):
            return jnp.all(batch.composite == batch.public, axis=(1, 2, 3, 4, 5))
        return jnp.zeros(batch.padding.shape, bool)

    def exact(self, theta: Params, fixed: Params, batch: Views) -> tuple[Array, Params]:
        """Σ over the records of a batch of the loss and its exact gradient in θ: L(x) for `sgd`, L(x̃) for all others.

        With `both_views`, `sgd` takes the mean of the two.

        Guarantees:
            But for `sgd` it reads public views alone: no private pixel, and not W, reaches it.
        """
        video = batch.composite if self.name == "sgd" else batch.public
        weight = jnp.where(batch.padding[:, None], 0, batch.weight)
        if self.both_views:
            video = jnp.concatenate([video, batch.public])
            batch = batch._replace(label=jnp.concatenate([batch.label] * 2))
            weight = jnp.concatenate([weight / 2] * 2)
        flat = Views(*(array.reshape(-1, *array.shape[2:]) for array in (video, video, batch.label, weight)), None)
        return jax.value_and_grad(self._loss)(theta, fixed, flat.public, flat)

    def logits(
        self,
        weights: Weights,
        composite: UInt8[Array, "b t h w 3"],
        public: UInt8[Array, "b t h w 3"],
    ) -> Float[Array, "b classes"]:
        """What the trained model says of clips; with `composite` = `public`, of their public views."""
        params = weights.theta | weights.fixed
        if not self.two_paths:
            return self.network.logits(params, composite)
        gap = self._gap(weights.encoder, composite, public)
        return self.network.logits(params, public) + self._private_path(weights.head, gap)

    def _loss(self, theta: Params, fixed: Params, video: Array, record: Views) -> Array:
        return mean_loss(self.network.logits(theta | fixed, video), record)

    def _gap(self, encoder: Params, composite: Array, public: Array) -> Float[Array, "b d"]:
        """(φ(x) − φ(x̃)) / √d: a public constant, never a norm of the difference."""
        both = self.network.features(encoder, jnp.concatenate([composite, public]))
        return (both[: len(composite)] - both[len(composite) :]) / jnp.sqrt(self.network.width)

    def _private_path(self, head: Mapping[str, Array], gap: Float[Array, "b d"]) -> Float[Array, "b classes"]:
        """λ·h(gap; W), linear without a bias: h(0) = 0 for every W."""
        return self.lambda_ * gap @ head["kernel"]


def mean_loss(logits: Float[Array, "k classes"], record: Views) -> Array:
    """Cross-entropy summed with the clips' weights: of one record, the mean over its clips."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, record.label)
    return jnp.sum(jnp.where(record.weight > 0, losses * record.weight, 0))
