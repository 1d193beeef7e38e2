import types

import jax.numpy as jnp
import numpy as np
import pytest

from maskdp import layers
from maskdp_jax.audit import membership
from maskdp_jax.config import DataConfig


class Memory:
    """A model that is sure of the label where it knows the background, and indifferent elsewhere."""

    def __init__(self, known: list[float]):
        self._known = known

    def logits(self, weights, composite, public):
        bright = composite[:, 0, 0, 0, 0].astype(jnp.float32)
        seen = sum(jnp.abs(bright - value) < 0.5 for value in self._known) if self._known else jnp.zeros(bright.shape)
        return jnp.stack([3.0 * seen, jnp.zeros(bright.shape)], axis=1)


@pytest.fixture
def data(tmp_path):
    """Each record has a background of one grey of its own."""

    def clip(number: int) -> layers.TwoLayerClip:
        rgba = np.zeros((1, 8, 8, 4), np.uint8)
        rgba[:, 4:, 4:] = (10, 20, 30, 255)
        name = f"clip{number}"
        private = np.full((1, 8, 8, 3), 4 * number, np.uint8)
        return layers.TwoLayerClip(rgba, private, 0, f"{name}-0", name, name, (name,), "0" * 64, 25.0)

    splits = {"train": [clip(n) for n in range(25)], "test": [clip(n) for n in range(25, 50)]}
    layers.write_dataset(tmp_path, splits, ("one", "other"), private_format="png")
    return layers.Dataset(tmp_path)


def trained(known, data, epsilon):
    return types.SimpleNamespace(
        objective=Memory(known),
        weights=(),
        views=DataConfig(path=str(data.path), frames=1, size=8),
        card={"epsilon": epsilon, "delta": 1e-5},
    )


def test_a_model_that_remembers_is_found(data):
    model = trained([4.0 * number for number in range(25)], data, epsilon=0.5)
    outcome = membership.membership(model, data, "train", "test")
    assert outcome.auc == 1
    assert (outcome.picked, outcome.picked_absent) == (1, 0)
    found = membership.finding(model, data, "train", "test")
    assert not found.holds
    assert found.private


def test_a_model_that_remembers_nothing_passes(data):
    outcome = membership.membership(trained([], data, epsilon=0.5), data, "train", "test")
    assert outcome.auc == 0.5
    assert outcome.epsilon(1e-5) == 0
    assert membership.finding(trained([], data, 0.5), data, "train", "test").holds


def test_no_claim_is_not_refuted(data):
    model = trained([4.0 * number for number in range(25)], data, epsilon=None)
    assert membership.finding(model, data, "train", "test").holds
